"""What a run leaves behind (checkpoints, folders and results), and torchrun.

The housekeeping is the same in all scripts (tests/project/test_form.py), so one or two of them
prove most of it. test_loop.py interrupts every script and runs each in two processes.
"""
import errno
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
from unittest import mock

import filelock
import pytest
import runs_helper
import torch
from conftest import ROOT, metrics_of
from runs_helper import KIND, SCRIPTS, command, small_args
from safetensors.torch import load_file

import common

pytestmark = pytest.mark.filterwarnings("ignore")
all_scripts = pytest.mark.parametrize("name", SCRIPTS)
offline_and_online = pytest.mark.parametrize("name", ["dpo", "ppo"])
STEPS = dict(max_steps=5, save_every=2)  # checkpoints after steps 2, 4 and 5
TWO_STEPS = dict(max_steps=2, save_every=1)
EXTRA = dict.fromkeys(("sft", "dpo", "reward_model", "prm"), dict(epochs=2)) | {
    "kto": {}, "online_dpo": dict(batch_size=3), "ppo": dict(batch_size=4, minibatches=2),
    "grpo": dict(batch_size=2), "distill": dict(batch_size=3),
    "agent": dict(batch_size=2)}
CLOCK = {"seconds", "rollout_seconds", "tokens_per_second", "peak_memory_gib"}


def growing_scaler(model):
    """A loss scale as in fp16, which doubles after every second step."""
    return torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=2)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    runs_helper.write_data(folder)
    return folder


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory):
    """Uninterrupted runs, one per script, made when first asked for."""
    folders = {}

    def run(name):
        if name not in folders:
            folders[name] = tmp_path_factory.mktemp(name) / "run"
            with mock.patch.object(common, "grad_scaler", growing_scaler):
                command(name, small_args(name, data, folders[name], **STEPS, **EXTRA[name]))
        return folders[name]
    return run


def results(folder):
    """All figures of a run that do not depend on the clock or the machine."""
    summary = json.loads(Path(folder, "summary.json").read_text())
    steps = [{name: x for name, x in step.items() if name not in CLOCK}
             for step in metrics_of(folder)]
    return {"steps": steps, **{name: summary[name] for name in ("before", "after", "samples")},
            "settings": summary.keys()}


def assert_same_run(one, other):
    """The same figures and the same weights, to the last bit."""
    assert results(one) == results(other)
    weights, others = [load_file(x / "adapter_model.safetensors") for x in (one, other)]
    assert weights.keys() == others.keys()
    for name, weight in weights.items():
        assert torch.equal(weight, others[name]), name


def contents(folder):
    """For every file of a folder: its name, a hash of its bytes and the time of its last change."""
    return {str(path): (hashlib.sha256(path.read_bytes()).digest(), path.stat().st_mtime_ns)
            for path in sorted(folder.rglob("*")) if path.is_file() and path.suffix != ".lock"}


# ---- resuming ------------------------------------------------------------------------------------

class Killed(BaseException):
    """Ends a run anywhere, as kill -9 does. Nothing in the scripts catches it."""


FULL = OSError(errno.ENOSPC, "No space left on device")
TORN = RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 64 vs 0")
SPACE = "disk is full|No space left"
# Each command is ended in the n-th call of a function (for a certain file) by an error. The rest of
# the tuple is the message, and the step of the last checkpoint. The next command resumes there.
MOMENTS = [
    (Path, "write_text", 1, "args.new", FULL, SPACE, 0),
    (Path, "replace", 1, "args.new", Killed(), None, 0),
    ("script", "update", 2, "", KeyboardInterrupt(), "interrupted.*same command", 0),
    (Path, "write_text", 1, "metrics.new", FULL, SPACE, 0),
    (torch, "save", 1, "", TORN, SPACE, 0),
    (Path, "replace", 1, "resume.new", Killed(), None, 0),
    ("script", "log_step", 3, "", Killed(), None, 2),
    (torch, "save", 1, "", FULL, SPACE, 2),
    ("script", "save", 2, "", KeyboardInterrupt(), "interrupted", 4),
    (common, "save_model", 1, "", FULL, SPACE, 5),
    (common, "write_card", 1, "", Killed(), None, 5),
    (Path, "write_text", 1, "summary.new", FULL, SPACE, 5),
    (Path, "replace", 1, "summary.new", Killed(), None, 5),
]


def dying(owner, name, nth, file, error):
    """Replaces `owner.name`: its n-th call (for `file`) leaves half a file and raises `error`."""
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


@offline_and_online
def test_the_same_command_resumes_wherever_it_ended(name, data, whole, tmp_path, capsys):
    """Killed, interrupted or out of disk space at any moment, it ends with the same bits."""
    module, folder = SCRIPTS[name], tmp_path / "run"
    args = small_args(name, data, folder, **STEPS, **EXTRA[name])
    saved, log_step = 0, module.log_step
    for owner, function, nth, file, error, says, saved_then in MOMENTS:
        moment, steps = f"{function} {nth} {file}", []

        def log(args, state, metrics, *rest, steps=steps):
            steps.append(metrics["step"])
            log_step(args, state, metrics, *rest)

        with mock.patch.object(common, "grad_scaler", growing_scaler), \
                mock.patch.object(module, "log_step", log), \
                dying(module if owner == "script" else owner, function, nth, file, error), \
                pytest.raises((SystemExit, Killed)) as ended:
            command(name, args)
        if says:
            assert ended.value.code == 2, moment
            line = [x for x in capsys.readouterr().err.splitlines() if "it/s" not in x and x][-1]
            assert line.startswith("error: ") and re.search(says, line), (moment, line)
        assert not steps or steps[0] == saved + 1, f"{moment}: a saved step is done again"
        state = folder / "resume.pt"
        saved = torch.load(state, weights_only=True)["step"] if state.exists() else 0
        assert saved == saved_then and not (folder / "summary.json").exists(), moment
    with mock.patch.object(common, "grad_scaler", growing_scaler):
        command(name, args)
    assert_same_run(whole(name), folder)
    assert {x.name for x in folder.iterdir()} == {x.name for x in whole(name).iterdir()}
    scales = [step["loss_scale"] for step in metrics_of(folder)]
    assert scales[0] < scales[-1], "a loss scale that starts anew would not show"


def test_a_checkpoint_that_is_not_whole_is_named_and_kept(data, started, refused):
    """It is truncated, lacks a part, belongs to another model, or has infinite weights."""
    file = started("dpo") / "resume.pt"
    state = torch.load(file, weights_only=True)
    first, weight = next(iter(state["weights"].items()))
    others = without(state["weights"], first)
    broken = [(f"'{part}'", without(state, part))
              for part in ("step", "samples", "optimizer", "weights")]
    for words, weights in (f"another model: {first}", others), (
            f"another model: {first}", others | {first: weight[:1]}), (
            f"{first} holds numbers that are not", others | {first: weight / 0}):
        broken.append((words, state | {"weights": weights}))
    for words, content in [("", None), *broken]:
        if content:
            torch.save(content, file)
        else:
            file.write_bytes(file.read_bytes()[:2000])
        before = file.read_bytes()
        line = refused(command, "dpo", small_args("dpo", data, file.parent, **TWO_STEPS))
        assert f"reading {file}" in line and words in line, words
        assert file.read_bytes() == before


def without(values, name):
    return {key: value for key, value in values.items() if key != name}


# ---- folders -------------------------------------------------------------------------------------

@pytest.fixture
def started(data, tmp_path, capsys):
    """Starts a run that is killed in its second step, and returns its folder."""
    def run(name):
        args = small_args(name, data, tmp_path / "started", **TWO_STEPS)
        with dying(SCRIPTS[name], "log_step", 2, "", Killed()), pytest.raises(Killed):
            command(name, args)
        capsys.readouterr()
        return tmp_path / "started"
    return run


@all_scripts
def test_a_folder_of_another_run_is_refused_and_stays_as_it_is(
        name, data, started, capsys, refused):
    """Other flags, other training rows, other held-out rows, or a run that is still going."""
    folder = started(name)
    before = contents(folder)
    same = TWO_STEPS
    line = refused(command, name, small_args(name, data, folder, **same, seed=1))
    assert str(folder) in line and "flags" in line and "name another" in line
    for part in "train", "heldout":
        file = data / f"{KIND[name]}_{part}.jsonl"
        text = file.read_text()
        try:
            file.write_text(text.replace("2", "3"))
            line = refused(command, name, small_args(name, data, folder, **same))
        finally:
            file.write_text(text)
        assert "data" in line
    with filelock.FileLock(folder / "run.lock"):
        line = refused(command, name, small_args(name, data, folder, **same))
    assert "one run at a time" in line and contents(folder) == before


def test_a_finished_run_is_refused_and_stays_as_it_is(data, whole, refused):
    """Both when the command line is read and if the run has finished since."""
    finished, same = whole("dpo"), STEPS | EXTRA["dpo"]
    before = contents(finished)
    args = small_args("dpo", data, finished.parent / "other", **same)
    args.output_dir = str(finished)
    assert "finished" in refused(command, "dpo", args)
    assert "finished" in refused(small_args, "dpo", data, finished, **same)
    assert contents(finished) == before


@pytest.mark.parametrize("file", ["notes.json", "README.md", "resume.pt", "log.txt"])
def test_files_of_the_user_stay_as_they_are(file, data, tmp_path):
    """A folder with such a file is refused, except for a log, which no run would overwrite."""
    (tmp_path / file).write_text("keep")
    try:
        command("sft", small_args("sft", data, tmp_path, max_steps=1))
    except SystemExit:
        assert file != "log.txt"
    assert (tmp_path / file).read_text() == "keep"


# ---- results -------------------------------------------------------------------------------------

@all_scripts
def test_a_run_leaves_one_adapter_its_settings_and_its_figures(name, data, whole):
    """It leaves nothing else: no checkpoint, no half-written file."""
    folder = whole(name)
    assert {path.name for path in folder.iterdir()} == {
        "README.md", "adapter_config.json", "adapter_model.safetensors", "args.json",
        "chat_template.jinja", "metrics.jsonl", "run.lock", "summary.json", "tokenizer.json",
        "tokenizer_config.json"}
    flags = vars(small_args(name, data, folder.parent / "other", **STEPS, **EXTRA[name]))
    flags = json.loads(json.dumps(flags | {"output_dir": str(folder)}))  # as JSON has them
    saved, summary = (json.loads((folder / x).read_text()) for x in ("args.json", "summary.json"))
    assert saved == flags | {name: saved[name] for name in ("data", "files")}
    assert summary == summary | flags | {
        "method": name, "step": 5, "load_in_4bit": False, "device": "cpu", "dtype": "torch.float32"}
    assert summary["before"].keys() == summary["after"].keys() and summary["before"]
    assert f"# {name} on" in (folder / "README.md").read_text()
    steps = metrics_of(folder)
    assert summary["seconds"] == pytest.approx(sum(step["seconds"] for step in steps))
    assert [step["step"] for step in steps] == [1, 2, 3, 4, 5]
    assert all(steps[0].keys() == step.keys() for step in steps)
    # prompts and answers of the tiny world have 10 to 60 tokens; the last batch may be one row
    tokens = [step["tokens_per_second"] * step["seconds"] for step in steps]
    assert 10 < min(tokens) and max(tokens) < 1000 and 0.1 < steps[0]["peak_memory_gib"] < 64


def test_a_newcomer_sees_legible_samples_a_table_and_what_to_do_next(data, tmp_path, capsys):
    command("dpo", small_args("dpo", data, tmp_path / "run", max_steps=1))
    said = capsys.readouterr().out.partition("samples: held-out prompts")
    assert re.search(r"held out +before +after\nloss ", said[0])
    assert said[2].endswith(f"\ntry it:  python chat.py {tmp_path}/run\n")
    samples = re.findall(r"  prompt: (.+)\n  before: (.+)\n   after: (.+)\n", said[2])
    assert len(samples) == 3
    assert samples[0][0] == "<|im_start|>user Add 12 and 9.<|im_end|> <|im_start|>assistant"
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert [list(sample) for sample in summary["samples"]] == [["prompt", "before", "after"]] * 3


class Broken(io.StringIO):
    """A terminal that fails when a certain text is printed."""

    def __init__(self, text, error):
        super().__init__()
        self.text, self.error = text, error

    def write(self, text):
        if self.text in text:
            raise self.error
        return super().write(text)

    def reconfigure(self, **options):
        pass


def test_a_terminal_that_fails_loses_nothing(data, whole, tmp_path, monkeypatch):
    """Results are saved before they are shown, so `| head` or a poor terminal costs no step."""
    monkeypatch.setattr(os, "dup2", lambda *args: None)  # it would close pytest's own stdout
    expected = set(os.listdir(whole("ppo")))  # made here, while the terminal still works
    args = small_args("ppo", data, tmp_path / "run", max_steps=1)
    monkeypatch.setattr(sys, "stdout", Broken("score ", BrokenPipeError()))  # during training
    with pytest.raises(SystemExit):
        command("ppo", args)
    assert torch.load(tmp_path / "run/resume.pt", weights_only=True)["step"] == 1
    letter = UnicodeEncodeError("ascii", "\u00e9", 0, 1, "not in range")
    monkeypatch.setattr(sys, "stdout", Broken("held out", letter))
    with pytest.raises(UnicodeEncodeError):
        command("ppo", args)
    assert set(os.listdir(tmp_path / "run")) == expected


def test_a_terminal_without_the_letters_of_the_data_is_no_error(data, tmp_path, monkeypatch):
    rows = (data / "sft_train.jsonl").read_text().replace("What", "\u201cWhat\u201d \u00e9")
    (tmp_path / "rows.jsonl").write_text(rows)
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding="ascii"))
    files = dict(dataset=tmp_path / "rows.jsonl", eval_dataset=data / "sft_train.jsonl")
    command("sft", small_args("sft", data, tmp_path / "run", max_steps=1, **files))
    assert (tmp_path / "run/summary.json").exists()


# ---- torchrun ------------------------------------------------------------------------------------

def test_two_processes_equal_one_and_only_the_first_writes(data, tmp_path):
    """Even interrupted and resumed. If one process fails in a step, the other does not wait."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone",
                "--nproc-per-node", "2", runs_helper.__file__, str(data)]
    env = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT}/tests"}
    child = subprocess.run(launcher, env=env, stderr=subprocess.PIPE, text=True, timeout=150)
    ended = time.time()
    assert "as planned" in child.stderr and child.returncode != 0, child.stderr
    assert ended - (data / "died").stat().st_mtime < 15
    assert not (data / "failing/summary.json").exists()
    command("dpo", small_args("dpo", data, tmp_path / "one", max_steps=3))
    one, two = results(tmp_path / "one"), results(data / "two")
    assert len(one["steps"]) == 3 and one["settings"] == two["settings"]
    for a, b in zip([one["before"], one["after"], *one["steps"]],
                    [two["before"], two["after"], *two["steps"]], strict=True):
        assert a == pytest.approx(b, rel=1e-3, abs=1e-5)
