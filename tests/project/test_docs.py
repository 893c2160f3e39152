"""The pages in docs/: their metrics, quoted lines, commands and links agree with the code."""
import ast
import importlib
import json
import re
from unittest import mock

import pytest
import runs_helper
from conftest import ROOT, flags_of, metrics_of
from runs_helper import SCRIPTS, arguments, command, small_args
from test_readme import commands

import evaluate
import pairs

pytestmark = pytest.mark.filterwarnings("ignore")
PAGES = sorted([*(ROOT / "docs").glob("*.md"), *ROOT.glob("*.md")])
METRICS = (ROOT / "docs/metrics.md").read_text()
TROUBLES = (ROOT / "docs/troubleshooting.md").read_text()


# ---- metrics.md: a row for everything that is logged, and nothing else ---------------------------

def metric_rows():
    """The rows of all tables as lists of cells; the first cell is the name of a metric."""
    lines = [line for line in METRICS.splitlines() if line.startswith("| `")]
    rows = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]
    return [[row[0].strip("`"), *row[1:]] for row in rows]


def documented(script):
    """The names in the rows that name this script."""
    names = [row[0] for row in metric_rows() if script in row[1].split(", ")
             or row[1] == "all" and script in SCRIPTS]
    assert len(names) == len(set(names)), f"{script} has a metric with two rows"
    return set(names)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    runs_helper.write_data(folder)
    return folder


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_logged_metric_has_a_row_and_no_row_is_made_up(name, data, tmp_path):
    """Checks all numbers that a real run logs."""
    flags = {"max_steps": 1}
    if hasattr(flags_of(SCRIPTS[name]).parse_args([]), "eval_every"):
        flags["eval_every"] = 1
    args = small_args(name, data, tmp_path / "run", **flags)
    command(name, args)
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    figures = [*metrics_of(tmp_path / "run"), summary["before"], summary["after"]]
    names = {key for logged in figures for key, value in logged.items()
             if isinstance(value, int | float | None)}  # samples, which are lists, are logged too
    own = {f"reward_{reward}": "reward_<name>" for reward in [*getattr(args, "reward", "")]}
    assert {own.get(key, key.removeprefix("eval_")) for key in names} == documented(name)


def test_the_columns_of_evaluate_have_their_rows(data, tmp_path):
    evaluate.main(arguments(
        evaluate, data / "chat", dataset=data / "prompt_heldout.jsonl", best_of=2, k=2,
        samples_per_prompt=2, max_new_tokens=4, output=tmp_path / "table.json"))
    columns = set(json.loads((tmp_path / "table.json").read_text())[0]) - {"checkpoint"}
    assert {column.removesuffix("_interval") for column in columns} == documented("evaluate")


def test_the_table_of_pairs_has_its_rows(capsys):
    answers = [{"text": "1", "length": 1, "count": 1, "score": 1.0}]
    pairs.summarize([answers], [True], mock.Mock(samples=1))
    head = capsys.readouterr().out.splitlines()[-5]
    assert set(head.split()) == documented("pairs")


def test_rows_are_whole_and_their_units_are_those_of_the_plots():
    from plot import UNITS
    units = {}
    for row in metric_rows():
        assert len(row) == 6 and row[3] and set(row[1].split(", ")) <= {
            "all", "evaluate", "pairs", *SCRIPTS}, row
        units.setdefault(row[0], set()).add(row[2])
    assert {name: units[name] for name in UNITS} == {name: {unit} for name, unit in UNITS.items()}


# ---- troubleshooting.md: quoted lines are in the code --------------------------------------------

QUOTE = re.compile(r"^\[`(\S+)`: `(\S+)`\]\(\.\./(\S+)\)\n\n```python\n(.*?\n)```$", re.M | re.S)


def top_level(file, name):
    """The source of a function, or of the assignment to a name, at the top of a file."""
    source = (ROOT / file).read_text()
    for node in ast.parse(source).body:
        names = [target.id for target in getattr(node, "targets", []) if hasattr(target, "id")]
        if name in (getattr(node, "name", None), *names):
            return ast.get_source_segment(source, node, padded=True) + "\n"
    raise AssertionError(f"{file} has no {name}")


def test_quoted_lines_stand_in_the_code():
    quotes = QUOTE.findall(TROUBLES)
    assert len(quotes) == TROUBLES.count("```python") > 15
    for file, name, target, code in quotes:
        assert file == target and code in top_level(file, name), f"{file}, {name}: {code}"


# ---- all pages: commands and links ---------------------------------------------------------------

def slug(title):
    """The anchor that a heading has on GitHub."""
    return re.sub(r"[^\w\- ]", "", title.replace("`", "").lower()).replace(" ", "-")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_commands_parse_links_lead_somewhere_and_lines_are_short(page):
    """Rows of tables may be longer, because they cannot be broken. A + would become a bullet."""
    for words in commands(page.read_text()):
        module = importlib.import_module(words[0].removesuffix(".py"))
        module.make_flags().parse_args(words[1:])
    for line in page.read_text().splitlines():
        assert len(line) <= 100 or line.startswith(("|", "[")), line
        assert not line.startswith("+"), line
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if not target.startswith("https://"):
            file, _, anchor = target.partition("#")
            path = page.parent / file if file else page
            assert path.exists(), target
            titles = re.findall(r"^#+ (.*)$", path.read_text(), re.M) if anchor else []
            assert not anchor or anchor in map(slug, titles), target
