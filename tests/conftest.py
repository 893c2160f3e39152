"""What several test files use."""
import json
import re
import sys
from pathlib import Path

import pytest
import torch

import common

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared"


def pytest_configure():
    torch.set_num_threads(1)


def run_args(module, **overrides):
    """The flags of a script as its command line gives them, with some of them set."""
    argv = [module.__name__ + ".py"]
    for name, value in overrides.items():
        argv.append("--" + name.replace("_", "-"))
        argv += map(str, value) if isinstance(value, list | tuple) else [str(value)]
    defaults = dict(module.flags._defaults)
    by_flag = {action.dest: action.default for action in module.flags._actions}
    before = sys.argv
    sys.argv = argv
    try:
        return common.parse(module.flags, module.TINY, getattr(module, "BY_LOSS", None))
    finally:  # parse() changes the defaults of the parser, which here serves many runs
        sys.argv = before
        module.flags._defaults = defaults
        for action in module.flags._actions:
            action.default = by_flag[action.dest]


@pytest.fixture
def shared():
    """The folder with real data, a real model and real tokenizers, not part of the repository."""
    if not SHARED.is_dir():
        pytest.skip("needs the folder ../shared with real data, models and tokenizers")
    return SHARED


@pytest.fixture
def write_jsonl(tmp_path):
    """Writes rows to a .jsonl file and returns its name."""
    def write(rows, name="rows.jsonl"):
        path = tmp_path / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(path)
    return write


@pytest.fixture
def refused(capsys):
    """Runs what has to end in one line on stderr and exit code 2, and returns the line."""
    def run(call, *args, **kwargs):
        with pytest.raises(SystemExit) as exit_info:
            call(*args, **kwargs)
        assert exit_info.value.code == 2
        lines = capsys.readouterr().err.splitlines()
        lines = [x for x in lines if x.strip() and not re.search("it/s|s/it", x)]
        assert len(lines) == 1 and lines[0].startswith("error: "), lines
        return lines[0]
    return run


def metrics_of(folder):
    """What a run logged, step by step."""
    return [json.loads(line) for line in Path(folder, "metrics.jsonl").read_text().splitlines()]


def joined(example):
    """The pieces of an example with the head of its prompt and the rest of it as one."""
    (head, _), (rest, _), *others = example
    return [(head + rest, False), *others]


def encoded(*args):
    """common.encode, with prompts whole."""
    return [joined(example) for example in common.encode(*args)]


def encoded_preference(*args):
    """common.encode_preference, with prompts whole."""
    return tuple(joined(side) for side in common.encode_preference(*args))
