"""plot.py: picture and report show all that runs logged, and the report runs no code of theirs."""
import base64
import json
import re

import pytest
from html_helper import Page

import plot

EVIL = "</td><script>alert(1)</script><img src=x onerror=y> & \u202e \ud800"


class Report(Page):
    """A report: `cells` are the texts of its cells, definitions and summaries."""

    def __init__(self, path):
        super().__init__(path)
        assert [element.tag for element in self.elements[:3]] == ["html", "head", "meta"]
        self.cells = [element.text.strip() for element in self.elements
                      if element.tag in ("th", "td", "dt", "dd", "summary")]

    def row(self, name, columns, which=0):
        start = [i for i, cell in enumerate(self.cells) if cell == name][which] + 1
        return self.cells[start:start + columns]


def a_run(folder, *steps, args=None, **summary):
    folder.mkdir(parents=True)
    lines = [json.dumps(step) + "\n" for step in steps or [{"step": 1, "loss": 2.0}]]
    (folder / "metrics.jsonl").write_text("".join(lines))
    (folder / "args.json").write_text(json.dumps(args or {}))
    if summary:
        (folder / "summary.json").write_text(json.dumps((args or {}) | summary))
    return str(folder)


def write(*argv):
    plot.main(plot.make_flags().parse_args([str(word) for word in argv]))


@pytest.fixture
def runs(tmp_path):
    """A DPO run, a GRPO run, and a run in progress, which differ in many ways."""
    dpo = a_run(
        tmp_path / "dpo", {"step": 1, "loss": 0.7}, {"step": 2, "loss": None, "margin": 1},
        args={"model": "tiny/chat", "beta": 2.0, "seed": 0}, method="dpo", before={"accuracy": 0.5},
        after={"accuracy": 0.9876}, samples=[{"prompt": "2+2?", "before": "5", "after": EVIL}])
    said = [{"step": step, "prompt": f"p{step}", "answer": f"a{step}", "score": step / 81}
            for step in (10, 9, 100)]
    grpo = a_run(tmp_path / "grpo", {"step": 1, "loss": 0.1, "kl": 0.2, "rollout_seconds": 3},
                 args={"model": "tiny/chat", "seed": 0, "reward": ["a", "b"]}, method="grpo",
                 before={"reward": 0.1}, after={"reward": 0.2}, samples=said)
    going = a_run(tmp_path / EVIL.replace("/", "").replace("\ud800", ""), args={
        "model": "tiny/chat", "beta": 0.1, "seed": 0, "data": "0123456789abcdef"})
    return [dpo, grpo, going]


@pytest.fixture
def page(runs, tmp_path):
    write(*runs, "--output", tmp_path / "all.png")
    assert (tmp_path / "all.png").read_bytes()[:4] == b"\x89PNG"
    return Report(tmp_path / "all.html")


def test_panels_have_titles_units_and_a_line_per_run(runs):
    """Steps in which a metric was not logged are left out; many noisy steps are smoothed."""
    figure = plot.draw_panels(["loss", "kl", "rollout_seconds"], {
        run: plot.read_metrics(run) for run in runs})
    axes = [axis for axis in figure.axes if axis.get_visible()]
    assert [axis.get_title(loc="left") for axis in axes] == ["loss", "kl", "rollout seconds"]
    assert [axis.get_ylabel() for axis in axes] == ["", "nats per answer", "s"]
    assert {axis.get_xlabel() for axis in axes} == {"optimizer step or rollout"}
    assert [list(line.get_ydata()) for line in axes[0].lines] == [[0.7], [0.1], [2.0]], "gaps"
    assert [line.get_label() for line in axes[0].lines][:2] == runs[:2]
    steps = [{"step": i, "loss": i % 2, "learning_rate": i % 2} for i in range(100)]
    noisy, exact = plot.draw_panels(["loss", "learning_rate"], {"run": steps}).axes
    assert len(noisy.lines) == 2 and len(exact.lines) == 1
    assert all(abs(y - 0.5) < 0.2 for y in noisy.lines[1].get_ydata()[10:-10])


def test_the_report_compares_runs_and_shows_their_samples(page):
    """Settings that differ come first. A value that a run lacks is –. Samples follow the steps."""
    rows = {"method": ["dpo", "grpo", "–"], "beta": ["2", "–", "0.1"],
            "reward": ["–", "['a', 'b']", "–"], "data": ["–", "–", "01234567"],
            "accuracy": ["0.500 → 0.988", "–", "–"]}
    assert {name: page.row(name, 3) for name in rows} == rows
    assert page.row("reward", 3, which=1) == ["–", "0.100 → 0.200", "–"]
    place = page.cells.index
    assert place("beta") < place("The same in all runs") < min(place("seed"), place("model"))
    said = page.cells[place("held out"):]
    assert said[:6] == ["held out", "prompt", "2+2?", "before", "5", "after"]
    expected = []
    for step, score in ((9, "0.1111"), (10, "0.1235"), (100, "1.235")):
        expected += [f"step {step}", "prompt", f"p{step}", "answer", f"a{step}", "score", score]
    assert said[7:] == expected


def test_text_from_data_is_escaped_and_the_page_needs_no_other_file(page):
    """Neither an answer nor the name of a folder becomes a tag. Pictures are inside the page."""
    assert not page.values("onerror") and "script" not in {x.tag for x in page.elements}
    assert page.cells[page.cells.index("after") + 1] == EVIL.replace("\ud800", "\ufffd")
    assert sum("<script>" in cell for cell in page.cells) > 1  # also the folder's name
    assert not re.search(r"https?:|url\(|@import|<link|<script", page.source)
    sources = page.values("src", "href")
    assert page.values("alt", tags=["img"]) == ["loss", "margin", "kl", "rollout_seconds"]
    assert len(set(sources)) == 4
    for source in sources:
        kind, _, data = source.partition("base64,")
        assert kind == "data:image/svg+xml;" and b"</svg>" in base64.b64decode(data)


def test_a_run_alone_shows_all_of_its_settings_and_no_empty_section(runs):
    write(runs[0])
    page = Report(plot.Path(runs[0], "report.html"))
    assert page.row("beta", 1) == ["2"] and page.values("open", tags=["details"])
    write(runs[2])
    text = plot.Path(runs[2], "report.html").read_text()
    assert "Held-out" not in text and "Samples" not in text and "Curves" in text


@pytest.mark.parametrize("named", [True, False])
@pytest.mark.parametrize("there", [0, 1])
def test_nothing_is_overwritten_and_nothing_half_written(named, there, tmp_path, refused):
    """If either file exists, neither is written, with --output or without."""
    run = a_run(tmp_path / "run")
    names = ["x.png", "x.html"] if named else ["run/curves.png", "run/report.html"]
    files = [tmp_path / name for name in names]
    files[there].write_text("mine")
    argv = [run, "--output", files[0]] if named else [run]
    assert f"{files[there]} exists already" in refused(write, *argv)
    assert files[there].read_text() == "mine" and not files[1 - there].exists()


@pytest.mark.parametrize("name, content, words", [
    ("metrics.jsonl", "", "no steps"), ("metrics.jsonl", '{"step": 1}\n', "no steps"),
    ("metrics.jsonl", '{"step": 1}\n{\n', "metrics of"), ("metrics.jsonl", "12\n", "metrics of"),
    ("metrics.jsonl", '{"a": 1}\n', "no steps"), ("args.json", "{", "settings of"),
    ("summary.json", "{", "settings of")])
def test_broken_runs_are_one_line_and_leave_no_picture(name, content, words, tmp_path, refused):
    run = a_run(tmp_path / "run")
    (tmp_path / "run" / name).write_text(content)
    assert words in refused(write, run)
    assert not (tmp_path / "run/curves.png").exists()


@pytest.mark.parametrize("name, words", [("none/x.png", "writing"), ("x.txt", "drawing")])
def test_a_picture_that_cannot_be_written_is_one_line(name, words, tmp_path, refused):
    assert words in refused(write, a_run(tmp_path / "run"), "--output", tmp_path / name)
    assert not any(path.suffix in (".png", ".html", ".txt") for path in tmp_path.rglob("*"))
