"""The housekeeping of all five scripts: going on, folders, faults, processes, what is left."""
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
from types import SimpleNamespace
from unittest import mock

import filelock
import peft
import pytest
import runs_helper
import torch
from conftest import ROOT, metrics_of
from runs_helper import KIND, SCRIPTS, command, small_args
from safetensors.torch import load_file

import common

pytestmark = pytest.mark.filterwarnings("ignore")
STEPS = dict(max_steps=5, save_every=2)  # saved after the steps 2, 4 and 5
EXTRA = {"sft": dict(neftune_alpha=5, epochs=2), "ppo": dict(batch_size=4, minibatches=2),
         "grpo": dict(batch_size=2), "dpo": dict(epochs=2), "reward_model": dict(epochs=2),
         "prm": dict(epochs=2),
         "kto": dict(desirable_weight=1.2), "online_dpo": dict(batch_size=3, loss="nash_md")}


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
    return {"steps": steps, **{name: summary[name] for name in ("before", "after", "samples")},
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
            for path in sorted(Path(folder).rglob("*"))
            if path.is_file() and path.suffix != ".lock"}


# ---- going on ------------------------------------------------------------------------------------

class Killed(BaseException):
    """Ends a run wherever it is, as kill -9 does: nothing in the scripts catches it."""


FULL = OSError(errno.ENOSPC, "No space left on device")
TORN = RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 64 vs 0")
SPACE = "disk is full|No space left"
# where a command ends: in what is called for the n-th time, with which file; what is raised and
# said; and the last step that is saved by then. Each command goes on from where the last one ended
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


CHILD = """
import os, signal, sys
sys.argv = sys.argv[1:]
import common, dpo
calls = []
def update(*args):
    calls.append(args)
    if len(calls) == int(os.environ["KILL"]):
        os.kill(os.getpid(), signal.SIGKILL)
    return original(*args)
original, dpo.update = dpo.update, update
with common.running(""):
    dpo.train(common.parse(dpo.flags, dpo.TINY))
"""


def test_a_process_that_is_killed_goes_on_in_another(data, tmp_path):
    """kill -9 in step 4, once saved at 2: the numbers of a run in one go, without a loss scale."""
    def child(folder, kill):
        argv = ["dpo.py"]
        for name, value in vars(small_args("dpo", data, folder, **STEPS, epochs=2)).items():
            if value not in (None, []):
                argv += ["--" + name.replace("_", "-"), str(value)]
        env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "KILL": str(kill)}
        run = subprocess.run([sys.executable, "-c", CHILD, *argv], env=env, capture_output=True)
        assert run.returncode == (-9 if kill else 0), run.stderr

    child(tmp_path / "killed", 4)
    assert torch.load(tmp_path / "killed/resume.pt", weights_only=True)["step"] == 2
    child(tmp_path / "killed", 0)
    child(tmp_path / "whole", 0)
    assert_same_run(tmp_path / "whole", tmp_path / "killed")


# ---- folders -------------------------------------------------------------------------------------

@pytest.fixture
def started(data, tmp_path, capsys):
    """Starts a run that is killed in its second step, and returns its folder."""
    def run(name):
        args = small_args(name, data, tmp_path / "started", max_steps=2, save_every=1)
        with dying(SCRIPTS[name], "log_step", 2, "", Killed()), pytest.raises(Killed):
            command(name, args)
        capsys.readouterr()
        return tmp_path / "started"
    return run


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_folder_of_another_run_is_refused_and_stays_as_it_is(
        name, data, whole, started, capsys, refused):
    """A finished run, other flags, other training or held-out rows, a run that is running."""
    finished = whole(name)
    capsys.readouterr()
    same = STEPS | EXTRA[name]
    before = contents(finished)
    args = small_args(name, data, finished.parent / "other", **same)
    args.output_dir = str(finished)  # as if it had ended since the command line was read
    assert "finished" in refused(command, name, args)
    assert "finished" in refused(small_args, name, data, finished, **same)
    assert contents(finished) == before

    folder = started(name)
    before = contents(folder)
    same = dict(max_steps=2, save_every=1)
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
    assert "one run at a time" in line
    assert contents(folder) == before
    command(name, small_args(name, data, folder, **same))  # none of it hindered the run itself


@pytest.mark.parametrize("file", [
    "notes.json", "README.md", "adapter_model.safetensors", "resume.pt", "log.txt"])
def test_what_is_in_a_folder_stays_as_it_is(file, data, tmp_path):
    """A folder with a user's own files is refused, unless a run has none of that name: a log."""
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / file).write_text("keep")
    try:
        command("sft", small_args("sft", data, tmp_path / "mine", max_steps=1))
    except SystemExit:
        assert file != "log.txt"
    assert (tmp_path / "mine" / file).read_text() == "keep"


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_file_where_the_folder_should_be_is_refused(name, data, tmp_path, refused):
    """And keeps what it holds."""
    (tmp_path / "notes.txt").write_text("keep")
    for place in "notes.txt", "notes.txt/run":
        assert place in refused(command, name, small_args(name, data, tmp_path / place))
    assert (tmp_path / "notes.txt").read_text() == "keep"


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_saved_state_that_cannot_be_read_is_named_and_kept(name, data, started, refused):
    """Cut short, of another model, or not of torch at all."""
    folder = started(name)
    file = folder / "resume.pt"
    state = torch.load(file, weights_only=True)
    weight_name, weight = state["weights"].popitem()
    torch.save(state, folder / "missing.pt")
    state["weights"][weight_name] = weight[:1]
    torch.save(state, folder / "other.pt")
    broken = [file.read_bytes()[:2000], b"", b"not torch"]
    others = [(folder / other).read_bytes() for other in ("missing.pt", "other.pt")]
    for content in [*broken, *others]:
        file.write_bytes(content)
        args = small_args(name, data, folder, max_steps=2, save_every=1)
        line = refused(command, name, args)
        assert f"reading {file}" in line and file.read_bytes() == content
        assert content in broken or f"another model: {weight_name}" in line


# ---- what is left --------------------------------------------------------------------------------

@pytest.mark.parametrize("name", SCRIPTS)
def test_a_run_leaves_one_adapter_its_settings_and_its_figures(name, data, whole):
    """Nothing else: no base, critic or reward weights, no saved state, no half-written file."""
    folder = whole(name)
    assert {path.name for path in folder.iterdir()} == {
        "README.md", "adapter_config.json", "adapter_model.safetensors", "args.json",
        "chat_template.jinja", "metrics.jsonl", "run.lock", "summary.json", "tokenizer.json",
        "tokenizer_config.json"}
    flags = vars(small_args(name, data, folder.parent / "other", **STEPS, **EXTRA[name]))
    flags = json.loads(json.dumps(flags | {"output_dir": str(folder)}))  # as a file has them
    saved, summary = (json.loads((folder / x).read_text()) for x in ("args.json", "summary.json"))
    assert saved == flags | {name: saved[name] for name in ("data", "files")}
    assert summary == summary | flags | {"load_in_4bit": False}
    steps = metrics_of(folder)
    assert summary["method"] == name and summary["step"] == 5
    assert summary["device"] == "cpu" and summary["dtype"] == "torch.float32"
    assert summary["before"].keys() == summary["after"].keys() and summary["before"]
    assert summary["seconds"] == pytest.approx(sum(step["seconds"] for step in steps))
    assert [step["step"] for step in steps] == [1, 2, 3, 4, 5]
    assert all(steps[0].keys() == step.keys() for step in steps)

    rank = summary["lora_rank"]
    kind = peft.AutoPeftModelForCausalLM
    options = {}
    if name in ("reward_model", "prm"):
        kind, options = peft.AutoPeftModelForSequenceClassification, {"num_labels": 1}
    model = kind.from_pretrained(folder, is_trainable=True, **options)
    weights = load_file(folder / "adapter_model.safetensors")
    assert all(weight.dtype == torch.float32 for weight in weights.values())
    # seven linear layers in one block
    assert len(weights) == 2 * 7 + (name in ("reward_model", "prm"))
    for key, weight in weights.items():
        assert ".lora_A." in key or ".lora_B." in key or key.endswith(".score.weight")
        assert rank in weight.shape or "score" in key
    trained = [p for p in model.parameters() if p.requires_grad]
    assert sum(p.numel() for p in trained) == sum(x.numel() for x in weights.values())
    assert any(x.abs().max() > 0 for key, x in weights.items() if ".lora_B." in key)


class Broken(io.StringIO):
    """A terminal that fails once a certain text is printed."""

    def __init__(self, text, error):
        super().__init__()
        self.text, self.error = text, error

    def write(self, text):
        if self.text in text:
            raise self.error
        return super().write(text)

    def reconfigure(self, **options):
        pass


PIPE, LETTER = BrokenPipeError(), UnicodeEncodeError("ascii", "\u00e9", 0, 1, "not in range")


@pytest.mark.parametrize("name", SCRIPTS)
def test_what_cannot_be_printed_loses_nothing(name, data, whole, tmp_path, monkeypatch):
    """A result is saved before it is shown: `| head` and poor terminals cost no trained step."""
    monkeypatch.setattr(os, "dup2", lambda *args: None)  # it would close pytest's own stdout
    expected = {path.name for path in whole(name).iterdir()}
    folder = tmp_path / "run"
    args = small_args(name, data, folder, max_steps=1)
    if KIND[name] == "prompt":  # these show samples on the way
        monkeypatch.setattr(sys, "stdout", Broken("score ", PIPE))
        with pytest.raises(SystemExit):
            command(name, args)
        assert torch.load(folder / "resume.pt", weights_only=True)["step"] == 1
    monkeypatch.setattr(sys, "stdout", Broken("held out", LETTER))
    with pytest.raises(UnicodeEncodeError):
        command(name, args)
    assert {path.name for path in folder.iterdir()} == expected


def test_a_terminal_without_the_letters_of_the_data_is_no_error(data, tmp_path, monkeypatch):
    """What the terminal cannot encode is spelled out."""
    rows = (data / "sft_train.jsonl").read_text().replace("What", "\u201cWhat\u201d \u00e9")
    (tmp_path / "rows.jsonl").write_text(rows)
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding="ascii"))
    files = dict(dataset=tmp_path / "rows.jsonl", eval_dataset=data / "sft_train.jsonl")
    command("sft", small_args("sft", data, tmp_path / "run", max_steps=1, **files))
    assert (tmp_path / "run/summary.json").exists()


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_tracker_gets_the_start_every_step_and_the_end(name, data, tmp_path, monkeypatch):
    """wandb and trackio have init, log and finish in common; what is sent is what is logged."""
    calls = []
    tracker = SimpleNamespace(
        init=lambda **options: calls.append(("init", options)),
        log=lambda metrics, step: calls.append((step, dict(metrics))),
        finish=lambda: calls.append(("finish", None)))
    monkeypatch.setitem(sys.modules, "wandb", tracker)
    args = small_args(name, data, tmp_path / "run", max_steps=2, track="wandb")
    command(name, args)
    steps = metrics_of(tmp_path / "run")
    assert [call[0] for call in calls] == ["init", 1, 2, "finish"]
    assert calls[0][1]["config"] == vars(args) and calls[0][1]["name"] == "run"
    assert [call[1] for call in calls[1:3]] == steps


# ---- several processes ---------------------------------------------------------------------------

@pytest.fixture(scope="module")
def two(data):
    """All scripts in two processes, and then a run in which the second process fails."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone",
                "--nproc-per-node", "2", str(ROOT / "tests/runs_helper.py"), str(data)]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    child = subprocess.run(launcher, env=env, stderr=subprocess.PIPE, text=True, timeout=150)
    return SimpleNamespace(code=child.returncode, stderr=child.stderr, ended=time.time())


@pytest.mark.parametrize("name", SCRIPTS)
def test_two_processes_equal_one(name, data, two, tmp_path, monkeypatch):
    """Interrupted and going on, too, and in batches that leave a process without a row.

    One of them writes, or the other would fail.
    """
    assert "as planned" in two.stderr, two.stderr
    monkeypatch.setattr(SCRIPTS[name], "sample", runs_helper.answers_by_prompt, raising=False)
    monkeypatch.setattr(SCRIPTS[name], "sample_mixture", runs_helper.draws_by_prompt, raising=False)
    command(name, small_args(name, data, tmp_path / "one", max_steps=3))
    one, other = results(tmp_path / "one"), results(data / "two" / name)
    assert len(one["steps"]) == 3 and one["settings"] == other["settings"]
    for a, b in zip([one["before"], one["after"], *one["steps"]],
                    [other["before"], other["after"], *other["steps"]], strict=True):
        assert a == pytest.approx(b, rel=1e-3, abs=1e-5)
    weights = [load_file(x / "adapter_model.safetensors")
               for x in (tmp_path / "one", data / "two" / name)]
    for key, weight in weights[0].items():  # Adam magnifies the rounding of small gradients
        assert (weight - weights[1][key]).norm() <= 1e-3 * weight.norm(), key


def test_a_process_that_fails_ends_the_other(data, two):
    """In the middle of a step: nobody waits for gradients that never come."""
    assert two.code != 0
    assert two.ended - (data / "died").stat().st_mtime < 15
    assert not (data / "failing/summary.json").exists()
