"""The housekeeping of all five scripts: going on, folders, faults, processes, what is left."""
import errno
import fcntl
import hashlib
import io
import itertools
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import common
import peft
import pytest
import runs_helper
import torch
from conftest import ROOT, metrics_of
from runs_helper import SCRIPTS, command, small_args
from safetensors.torch import load_file

pytestmark = pytest.mark.filterwarnings("ignore")
STEPS = dict(max_steps=5, save_every=2)  # saved after the steps 2, 4 and 5
EXTRA = {"sft": dict(neftune_alpha=5, epochs=2), "ppo": dict(batch_size=4, minibatches=2),
         "grpo": dict(batch_size=2, updates=2), "dpo": dict(epochs=2), "reward_model": {}}


def growing_scaler(model):
    """The loss scale of fp16, which doubles after every second step."""
    return torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=2)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    runs_helper.write_data(folder)
    return folder


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory):
    """Runs that nothing interrupts, one for each script, made when first asked for."""
    folders = {}

    def run(name):
        if name not in folders:
            folders[name] = tmp_path_factory.mktemp(name) / "run"
            with mock.patch.object(common, "grad_scaler", growing_scaler):
                command(name, small_args(name, data, folders[name], **STEPS, **EXTRA[name]))
        return folders[name]
    return run


def results(folder):
    """All numbers of a run that do not depend on the clock."""
    summary = json.loads(Path(folder, "summary.json").read_text())
    steps = []
    for step in metrics_of(folder):
        steps.append({name: x for name, x in step.items() if not name.endswith("seconds")})
    return {"steps": steps, "before": summary["before"], "after": summary["after"],
            "settings": summary.keys()}


def assert_same_run(one, other):
    """The same numbers and the same weights, to the last bit."""
    assert results(one) == results(other)
    weights = [load_file(Path(x, "adapter_model.safetensors")) for x in (one, other)]
    assert weights[0].keys() == weights[1].keys()
    for name, weight in weights[0].items():
        assert torch.equal(weight, weights[1][name]), name


def contents(folder):
    """Every file of a folder: its name, a hash of its bytes and when it was written."""
    return {str(path): (hashlib.sha256(path.read_bytes()).digest(), path.stat().st_mtime_ns)
            for path in sorted(Path(folder).rglob("*")) if path.is_file()}


# ---- going on ------------------------------------------------------------------------------------

class Killed(BaseException):
    """Ends a run wherever it is, as kill -9 does: nothing in the scripts catches it."""


FULL = OSError(errno.ENOSPC, "No space left on device")
TORN = RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 64 vs 0")
MEMORY = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
CPU_MEMORY = RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: 8 bytes")
SPACE = "disk is full|No space left"
# where a command ends: in what is called for the n-th time, with which file; what is raised and
# said; and the last step that is saved by then. Each command goes on from where the last one ended
MOMENTS = [
    (Path, "write_text", 1, "args.new", FULL, SPACE, 0),
    (Path, "replace", 1, "args.new", Killed(), None, 0),
    ("script", "evaluate", 1, "", MEMORY, "out of memory: lower --micro-batch-size", 0),
    ("script", "update", 2, "", KeyboardInterrupt(), "interrupted.* same command goes on", 0),
    (Path, "write_text", 1, "metrics.new", FULL, SPACE, 0),
    (torch, "save", 1, "", TORN, SPACE, 0),
    (Path, "replace", 1, "resume.new", Killed(), None, 0),
    ("script", "log_step", 3, "", Killed(), None, 2),
    (torch, "save", 1, "", FULL, SPACE, 2),
    (Path, "replace", 2, "metrics.new", Killed(), None, 2),
    (Path, "write_text", 1, "metrics.new", CPU_MEMORY, "out of memory", 2),
    ("script", "save", 2, "", KeyboardInterrupt(), "interrupted", 4),
    (common, "save_model", 1, "", FULL, SPACE, 5),
    (Path, "write_text", 1, "summary.new", FULL, SPACE, 5),
    (Path, "replace", 1, "summary.new", Killed(), None, 5),
]


def dying(owner, name, nth, file, error):
    """`owner.name` up to its n-th call (for `file`), which leaves half a file and raises."""
    original, calls = getattr(owner, name), itertools.count(1)

    def call(*args, **kwargs):
        if file not in str(args[0] if file else "") or next(calls) < nth:
            return original(*args, **kwargs)
        if name == "save_model":
            args = [Path(args[2], "adapter_model.safetensors")]
        if name in ("write_text", "save_model") or owner is torch:
            with open(args[1] if owner is torch else args[0], "w") as half:
                half.write("{to")
        raise error
    return mock.patch.object(owner, name, call)


@pytest.mark.parametrize("name", SCRIPTS)
def test_the_same_command_goes_on_wherever_it_ended(name, data, whole, tmp_path, capsys):
    """Killed, interrupted, out of memory or disk at every kind of moment: the same bits at last."""
    module, folder = SCRIPTS[name], tmp_path / "run"
    args = small_args(name, data, folder, **STEPS, **EXTRA[name])
    expected, saved = whole(name), 0
    for owner, function, nth, file, error, says, saved_then in MOMENTS:
        owner = module if owner == "script" else owner
        if not hasattr(owner, function):
            function = "rollout"  # PPO's evaluation
        logged = []
        log_step = module.log_step

        def log(args, state, metrics, log_step=log_step, logged=logged):
            logged.append(metrics["step"])
            log_step(args, state, metrics)

        moment = f"{function} {nth} {file}"
        with mock.patch.object(common, "grad_scaler", growing_scaler), \
                mock.patch.object(module, "log_step", log), \
                dying(owner, function, nth, file, error), \
                pytest.raises((SystemExit, Killed)) as ended:
            command(name, args)
        if says:
            assert ended.value.code == 2, moment
            line = [x for x in capsys.readouterr().err.splitlines() if "it/s" not in x and x][-1]
            assert line.startswith("error: ")
            assert re.search(says, line), (moment, line)
        assert not logged or logged[0] == saved + 1, moment  # no step is done again that was saved
        state = folder / "resume.pt"
        saved = torch.load(state, weights_only=True)["step"] if state.exists() else 0
        assert saved == saved_then, moment
        assert not (folder / "summary.json").exists(), moment
    with mock.patch.object(common, "grad_scaler", growing_scaler):
        command(name, args)
    assert_same_run(expected, folder)
    assert contents(expected).keys() == {x.replace(str(folder), str(expected))
                                         for x in contents(folder)}
    scales = [step["loss_scale"] for step in metrics_of(folder)]
    assert scales[0] < scales[-1]  # so that a scale that starts anew would show
