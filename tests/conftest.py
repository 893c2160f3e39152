"""What several test files use."""
import functools
import json
import os
import re
import sys
import tempfile
from pathlib import Path
from unittest import mock

import pytest
import torch
from transformers.integrations import sdpa_attention

import common

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared"
USE_GQA = sdpa_attention.use_gqa_in_sdpa
# the tests leave nothing behind in the checkout, and hypothesis still remembers what failed
os.environ.setdefault("HYPOTHESIS_STORAGE_DIRECTORY", f"{tempfile.gettempdir()}/hypothesis")


def pytest_configure():
    torch.set_num_threads(1)
    # A forked process replaces torch's thread pool at its first use. If several threads use torch
    # first, as those with which transformers loads weights, one may find no pool and fail
    # ("Invalid thread pool!"). Here, the only thread of a new process is the first.
    os.register_at_fork(after_in_child=functools.partial(torch.set_num_threads, 1))


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup():
    """Each test, with the fixtures that it is the first to use, draws the same numbers."""
    torch.manual_seed(0)


def flags_of(module):
    """The argument parser of a script."""
    return module.make_flags() if hasattr(module, "make_flags") else module.flags


def run_args(module, **overrides):
    """The flags of a script as its command line gives them, with some of them set."""
    argv = [module.__name__ + ".py"]
    # the default folder may hold a finished run; in this one nothing can be written by mistake
    for name, value in ({"output_dir": "/dev/null/run"} | overrides).items():
        argv.append("--" + name.replace("_", "-"))
        argv += map(str, value) if isinstance(value, list | tuple) else [str(value)]
    with mock.patch.object(sys, "argv", argv):
        return common.parse(flags_of(module), module.TINY, getattr(module, "BY_LOSS", None))


@pytest.fixture(autouse=True)
def fresh_attention(monkeypatch):
    """What load_model() does to SDPA on an fp16 GPU holds for the process; here, for a test."""
    monkeypatch.setattr(sdpa_attention, "use_gqa_in_sdpa", USE_GQA)


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


@pytest.fixture
def draws(monkeypatch):
    """All calls of torch.multinomial: probabilities and tokens of the rows that are sampled."""
    recorded, multinomial = [], torch.multinomial

    def draw(probs, *args, **options):
        recorded.append((probs, multinomial(probs, *args, **options)))
        return recorded[-1][1]

    monkeypatch.setattr(torch, "multinomial", draw)
    return recorded


def drawn_logps(draws, answers):
    """The log-probs with which the tokens of each answer were drawn: a tensor for each answer."""
    chosen = [probs.gather(1, token)[:, 0].double().log() for probs, token in draws]
    # Answers that ended earlier have left the batch.
    return [torch.stack([chosen[t][sum(len(x) > t for x in answers[:row])]
                         for t in range(len(answer))]) for row, answer in enumerate(answers)]


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
