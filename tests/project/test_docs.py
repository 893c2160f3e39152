"""The pages in docs/ that are written by hand: their metrics, lines of code, commands and links."""
import ast
import json
import re
from unittest import mock

import pytest
import runs_helper
from conftest import ROOT, metrics_of
from runs_helper import SCRIPTS, command, small_args

import evaluate
import pairs

pytestmark = pytest.mark.filterwarnings("ignore")
DOCS = ROOT / "docs"
PAGES = ["metrics", "troubleshooting", "tiny_world", "your_data", "tests"]
each_page = pytest.mark.parametrize("page", PAGES)


def text_of(page):
    return (DOCS / f"{page}.md").read_text()


# ---- metrics.md: a row for everything that is logged, and nothing else ---------------------------

def metric_rows():
    """The rows of all tables: lists of cells, of which the first is the name of a metric."""
    lines = [line for line in text_of("metrics").splitlines() if line.startswith("| `")]
    rows = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]
    return [[row[0].strip("`"), *row[1:]] for row in rows]


def documented(script):
    """The names in the rows that name this script."""
    rows = [row for row in metric_rows() if script in row[1].split(", ")
            or row[1] == "all" and script in SCRIPTS]
    names = [row[0] for row in rows]
    assert len(names) == len(set(names)), f"{script} has a metric with two rows"
    return set(names)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    runs_helper.write_data(folder)
    return folder


@pytest.mark.parametrize("name", SCRIPTS)
def test_what_a_run_logs_has_its_row_and_no_row_is_made_up(name, data, tmp_path):
    """All numbers of a real run."""
    flags = {"max_steps": 1}
    if any(action.dest == "eval_every" for action in SCRIPTS[name].flags._actions):
        flags["eval_every"] = 1
    args = small_args(name, data, tmp_path / "run", **flags)
    command(name, args)
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    figures = [*metrics_of(tmp_path / "run"), summary["before"], summary["after"]]
    names = {key for logged in figures for key, value in logged.items()
             if isinstance(value, int | float | None)}  # samples are logged, too, as lists
    own = {f"reward_{reward}": "reward_<name>" for reward in [*getattr(args, "reward", "")]}
    assert {own.get(key, key.removeprefix("eval_")) for key in names} == documented(name)


def test_the_columns_of_evaluate_have_their_rows(data, tmp_path):
    args = evaluate.flags.parse_args([
        str(data / "chat"), "--dataset", str(data / "prompt_heldout.jsonl"), "--best-of", "2",
        "--samples-per-prompt", "2", "--k", "2", "--max-new-tokens", "4",
        "--output", str(tmp_path / "table.json")])
    evaluate.main(args)
    columns = set(json.loads((tmp_path / "table.json").read_text())[0]) - {"checkpoint"}
    assert {column.removesuffix("_interval") for column in columns} == documented("evaluate")


def test_the_table_of_pairs_has_its_rows(capsys):
    answers = [{"text": "1", "length": 1, "count": 1, "score": 1.0}]
    args = mock.Mock(samples=1)
    pairs.summarise([answers], [True], args)
    head, *lines = capsys.readouterr().out.splitlines()[-5:]
    assert set(head.split()) == documented("pairs")
    for line in lines:
        assert f"`{line.split()[0]}`" in text_of("metrics").partition("## pairs.py")[2], line


def test_every_row_is_whole():
    """Name, script, unit, formula, healthy, sick; an unknown script would be a row for nobody."""
    known = {"all", "evaluate", "pairs", *SCRIPTS}
    for row in metric_rows():
        assert len(row) == 6 and row[3], row
        assert set(row[1].split(", ")) <= known, row


def test_units_are_those_of_the_picture():
    """plot.py has them, too."""
    from plot import UNITS
    units = {}
    for name, _, unit, *_ in metric_rows():
        units.setdefault(name, set()).add(unit)
    for name, unit in UNITS.items():
        assert units[name] == {unit}, name


# ---- troubleshooting.md: quoted lines stand where it says ----------------------------------------

QUOTE = re.compile(r"^\[`(\S+)`: `(\S+)`\]\(\.\./(\S+)\)\n\n```python\n(.*?\n)```$", re.M | re.S)


def top_level(file, name):
    """The source of a function, or of what a name is set to, at the top of a file."""
    source = (ROOT / file).read_text()
    for node in ast.parse(source).body:
        names = [target.id for target in getattr(node, "targets", []) if hasattr(target, "id")]
        if name in (getattr(node, "name", None), *names):
            return ast.get_source_segment(source, node, padded=True) + "\n"
    raise AssertionError(f"{file} has no {name}")


def test_quoted_lines_stand_in_the_code():
    quotes = QUOTE.findall(text_of("troubleshooting"))
    assert len(quotes) == text_of("troubleshooting").count("```python") > 15
    for file, name, target, code in quotes:
        assert file == target and code in top_level(file, name), f"{file}, {name}: {code}"


def test_every_question_quotes_a_line_and_is_in_the_index():
    head, *sections = re.split(r"^## ", text_of("troubleshooting"), flags=re.M)
    for section in sections:
        title = section.partition("\n")[0]
        assert QUOTE.search(section), title
        assert f"[{title}](#{slug(title)})" in head, title
    assert head.count("](#") == len(sections)


# ---- all pages: commands and links ---------------------------------------------------------------

def slug(title):
    """The anchor that a heading has on GitHub."""
    return re.sub(r"[^\w\- ]", "", title.replace("`", "").lower()).replace(" ", "-")


@each_page
def test_commands_have_flags_that_exist(page):
    text = text_of(page).replace("\\\n", " ")
    for script, flags in re.findall(r"python ([\w/]+\.py)([^`\n#]*)", text):
        source = (ROOT / script).read_text()
        for flag in re.findall(r"--[a-z0-9-]+", flags):
            assert f'"{flag}"' in source, f"{script} has no {flag}"


@each_page
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", text_of(page)):
        if target.startswith("https://"):
            continue
        file, _, anchor = target.partition("#")
        path = DOCS / file if file else DOCS / f"{page}.md"
        assert path.exists(), target
        titles = re.findall(r"^#+ (.*)$", path.read_text(), re.M) if anchor else []
        assert not anchor or anchor in map(slug, titles), target


@each_page
def test_prose_keeps_to_100_columns(page):
    """Rows of tables may be wider: they cannot be broken."""
    for line in text_of(page).splitlines():
        assert len(line) <= 100 or line.startswith(("|", "[")), line
