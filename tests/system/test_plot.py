"""The page that plot.py writes: all that runs say of themselves, in one file, with nothing run."""
import base64
import html.parser
import json
import re

import pytest

import plot

ALONE = {"meta", "img"}  # these have no end tag
EVIL = "</td><script>alert(1)</script><img src=x onerror=y> & \u202e \ud800"


class Reader(html.parser.HTMLParser):
    """Tags that must close in order, the text of cells and definitions, and all attributes."""

    def __init__(self):
        super().__init__()
        self.open, self.cells, self.seen, self.attributes = [], [], [], []

    def handle_starttag(self, tag, attributes):
        self.seen.append(tag)
        self.attributes += [(tag, *attribute) for attribute in attributes]
        if tag not in ALONE:
            self.open.append(tag)
        if tag in ("th", "td", "dt", "dd", "summary"):
            self.cells.append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] in ("th", "td", "dt", "dd", "summary"):
            self.cells[-1] += data


def read(page):
    reader = Reader()
    reader.feed(page.read_text(encoding="utf-8"))
    reader.close()
    assert reader.open == [] and reader.seen[:3] == ["html", "head", "meta"]
    reader.cells = [cell.strip() for cell in reader.cells]
    return reader


def a_run(folder, steps=({"step": 1, "loss": 2.0},), args=None, **summary):
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(step) + "\n" for step in steps))
    (folder / "args.json").write_text(json.dumps(args or {}))
    if summary:
        (folder / "summary.json").write_text(json.dumps((args or {}) | summary))
    return str(folder)


def write(*argv):
    plot.main(plot.make_flags().parse_args(list(map(str, argv))))


def row_of(reader, name, columns):
    start = reader.cells.index(name) + 1
    return reader.cells[start:start + columns]


@pytest.fixture
def three(tmp_path):
    """A DPO run, a GRPO run, and one in progress, which differ in all sorts of ways."""
    dpo = a_run(
        tmp_path / "dpo", [{"step": 1, "loss": 0.7}, {"step": 2, "loss": None, "margin": 1}],
        {"model": "tiny/chat", "beta": 2.0, "seed": 0}, method="dpo", before={"accuracy": 0.5},
        after={"accuracy": 0.9876}, samples=[{"prompt": "2+2?", "before": "5", "after": EVIL}])
    said = [{"step": step, "prompt": f"p{step}", "answer": f"a{step}{i}", "score": 0.123456 * i}
            for step in (10, 9, 100) for i in range(2)]
    grpo = a_run(tmp_path / "grpo", [{"step": 1, "loss": 0.1, "rollout_seconds": 3}],
                 {"model": "tiny/chat", "seed": 0, "reward": ["a", "b"]}, method="grpo",
                 before={"reward": 0.1}, after={"reward": 0.2}, samples=said)
    going = a_run(tmp_path / EVIL.replace("/", "").replace("\ud800", ""), args={
        "model": "tiny/chat", "beta": 0.1, "seed": 0, "data": "0123456789abcdef"})
    return [dpo, grpo, going]


def test_the_page_has_all_of_runs_of_different_methods(three, tmp_path):
    """What differs is told first, what a run lacks is –, and a figure of it stays in its column."""
    write(*three, "--output", tmp_path / "all.png")
    page = read(tmp_path / "all.html")
    assert row_of(page, "method", 3) == ["dpo", "grpo", "–"]
    assert row_of(page, "beta", 3) == ["2", "–", "0.1"]
    assert row_of(page, "reward", 3) == ["–", "['a', 'b']", "–"]
    assert row_of(page, "data", 3) == ["–", "–", "01234567"]
    same = page.cells.index("The same in all runs")
    assert page.cells.index("beta") < same < page.cells.index("seed")
    assert row_of(page, "model", 3) == ["tiny/chat"] * 3 and page.cells.index("model") > same
    assert row_of(page, "accuracy", 3) == ["0.500 → 0.988", "–", "–"]
    rewards = [i for i, cell in enumerate(page.cells) if cell == "reward"]  # a setting, a figure
    assert page.cells[rewards[1] + 1:][:3] == ["–", "0.100 → 0.200", "–"]


def test_samples_stand_in_the_order_of_the_steps_with_their_scores(three, tmp_path):
    write(*three, "--output", tmp_path / "all.png")
    cells = read(tmp_path / "all.html").cells
    said = cells[cells.index("held out"):]
    assert said[:3] == ["held out", "prompt", "2+2?"] and said[3:6] == ["before", "5", "after"]
    expected = []
    for step in (9, 10, 100):
        expected.append(f"step {step}")
        for i in range(2):
            score = ["0", "0.1235"][i]
            expected += ["prompt", f"p{step}", "answer", f"a{step}{i}", "score", score]
    assert said[7:] == expected


def test_what_comes_from_data_is_text(three, tmp_path):
    """Tags close in order, and neither an answer nor the name of a folder becomes one."""
    write(*three, "--output", tmp_path / "all.png")
    page = read(tmp_path / "all.html")
    assert "script" not in page.seen and not any("onerror" in x for x in page.attributes)
    answer = page.cells[page.cells.index("after") + 1]
    assert answer == EVIL.replace("\ud800", "\ufffd")
    assert sum("<script>" in cell for cell in page.cells) > 1  # also the folder's name


def test_the_page_needs_nothing_else(three, tmp_path):
    """No address, no script; the pictures are inside, one for each number that was logged."""
    write(*three, "--output", tmp_path / "all.png")
    text = (tmp_path / "all.html").read_text(encoding="utf-8")
    page = read(tmp_path / "all.html")
    assert not re.search(r"https?:|url\(|@import|<link|<script", text)
    pictures = {}
    for tag, name, value in page.attributes:
        if tag == "img" and name == "alt":
            metric = value
        if name in ("src", "href"):
            kind, _, data = value.partition("base64,")
            assert kind == "data:image/svg+xml;"
            pictures[metric] = base64.b64decode(data)
    assert list(pictures) == ["loss", "margin", "rollout_seconds"]
    assert all(b"</svg>" in svg for svg in pictures.values())
    assert len(set(pictures.values())) == 3


def test_a_run_alone_shows_all_of_its_settings(three):
    """Beside its picture, and none of them hidden: there is nothing to differ from."""
    write(three[0])
    folder = plot.Path(three[0])
    assert (folder / "curves.png").read_bytes()[:4] == b"\x89PNG"
    page = read(folder / "report.html")
    assert row_of(page, "beta", 1) == ["2"] and ("details", "open", None) in page.attributes


def test_a_run_without_samples_or_figures_has_no_section_for_them(three):
    write(three[2])
    text = (plot.Path(three[2]) / "report.html").read_text()
    assert "Held out" not in text and "Samples" not in text and "Curves" in text


@pytest.mark.parametrize("named", [True, False])
@pytest.mark.parametrize("there", ["picture", "page"])
def test_nothing_is_overwritten_and_nothing_half_written(named, there, tmp_path, refused):
    """Neither file, whichever of them is there, named or not."""
    run = a_run(tmp_path / "run")
    files = {"picture": tmp_path / "x.png", "page": tmp_path / "x.html"} if named else {
        "picture": tmp_path / "run/curves.png", "page": tmp_path / "run/report.html"}
    files[there].write_text("mine")
    argv = [run, "--output", tmp_path / "x.png"] if named else [run]
    assert f"{files[there]} exists already" in refused(write, *argv)
    assert files.pop(there).read_text() == "mine" and not any(x.exists() for x in files.values())


@pytest.mark.parametrize("broken", ["args.json", "summary.json"])
def test_broken_settings_are_one_line(broken, tmp_path, refused):
    run = a_run(tmp_path / "run")
    (tmp_path / "run" / broken).write_text("{")
    assert f"reading the settings of {run}" in refused(write, run, "--output", tmp_path / "x.png")


def test_a_run_that_logged_nothing_but_steps_is_refused(tmp_path, refused):
    run = a_run(tmp_path / "run", [{"step": 1}])
    assert "no steps were logged" in refused(write, run)
