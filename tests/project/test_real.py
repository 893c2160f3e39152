"""The runs on a real model: their commands can still be typed, and the page has their figures."""
import contextlib
import importlib
import io
import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "experiments"))
import real  # noqa: E402

RECORDED = sorted(path.parent for path in real.RESULTS.glob("*/metrics.jsonl"))


@pytest.mark.parametrize("name", real.RUNS)
def test_each_command_is_one_that_its_script_accepts(name):
    needs, command = real.RUNS[name]
    script, *flags = command.format(model="tiny/chat", runs="runs").split()
    importlib.import_module(script.removesuffix(".py")).make_flags().parse_args(flags)
    assert all(list(real.RUNS).index(need) < list(real.RUNS).index(name) for need in needs)


def test_the_page_has_the_recorded_figures():
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        real.print_tables()
    page = (ROOT / "docs/real_model.md").read_text()
    assert all(table in page for table in printed.getvalue().split("\n\n"))


@pytest.mark.parametrize("folder", RECORDED, ids=lambda folder: folder.name)
def test_recorded_runs_are_whole_and_name_no_machine(folder):
    texts = [(folder / name).read_text() for name in ("args.json", "metrics.jsonl", "summary.json")]
    steps = [json.loads(line)["step"] for line in texts[1].splitlines()]
    assert steps == list(range(1, json.loads(texts[2])["step"] + 1))
    assert not any(f'"{root}' in text for text in texts for root in ("/", "C:", "~"))
