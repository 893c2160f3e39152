"""Hostile and broken surroundings: each ends in one line and exit code 2, or in a correct run."""
import asyncio
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import pytest
import runs_helper
import torch
from conftest import ROOT, metrics_of, run_args
from runs_helper import command, small_args

import chat
import common
import dpo
import evaluate
import grpo
import plot
import sft

ESCAPE = "\x1b[2J"
REWARD = "def score(prompts, completions, **columns):\n    return [{} for text in completions]\n"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    runs_helper.write_data(folder)
    return folder


# ---- the name of the run folder ------------------------------------------------------------------

@pytest.mark.parametrize("name", ["", "x" * 300, "tests/" + "x" * 300, "\udcff"])
def test_a_folder_name_that_cannot_be_used_is_refused_at_once(name, refused):
    """Empty, too long, or not UTF-8, which the tokenizer would refuse after all training."""
    assert refused(run_args, dpo, output_dir=name).startswith("error: --output-dir ")


def test_a_folder_that_may_not_be_read_is_refused_at_once(refused, monkeypatch, tmp_path):
    def denied(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "exists", denied)
    monkeypatch.setattr(common, "is_tiny", lambda name: False)
    assert "Permission denied" in refused(run_args, dpo, output_dir=tmp_path / "run")


def test_a_folder_that_cannot_be_made_is_refused_before_training(data, refused):
    args = small_args("dpo", data, "/proc/run", max_steps=1)
    assert "--output-dir /proc/run" in refused(command, "dpo", args)


# ---- files of a run that are not what they should be ---------------------------------------------

@pytest.mark.parametrize("content", ["[]", "[1]", "null", "5", "{"])
def test_a_summary_that_is_no_object_is_one_line(content, data, tmp_path, refused):
    """In a model that trained all weights, in a run that is drawn or measured."""
    shutil.copytree(data / "chat", tmp_path / "model")
    (tmp_path / "model/summary.json").write_text(content)
    assert "loading the model" in refused(run_args, dpo, model=tmp_path / "model")
    (tmp_path / "model/metrics.jsonl").write_text('{"step": 1, "loss": 2}\n')
    if content != "[]":  # which adds nothing to the settings
        args = plot.flags.parse_args([str(tmp_path / "model")])
        assert "reading the settings" in refused(plot.main, args)


@pytest.mark.parametrize("broken", ["step", "metrics", "samples", "nan"])
def test_a_saved_state_without_a_part_or_with_nan_is_refused(
        broken, data, tmp_path, refused, monkeypatch):
    args = small_args("dpo", data, tmp_path / "run", max_steps=2, save_every=1)
    with monkeypatch.context() as patch:
        patch.setattr(dpo, "log_step", runs_helper.interrupted(dpo.log_step))
        with pytest.raises(InterruptedError):
            command("dpo", args)
    file = tmp_path / "run/resume.pt"
    state = torch.load(file, weights_only=True)
    if broken == "nan":
        next(iter(state["weights"].values()))[0, 0] = float("nan")
    else:
        del state[broken]
    torch.save(state, file)
    assert f"reading {file}" in refused(command, "dpo", args)


# ---- exceptions ----------------------------------------------------------------------------------

def raise_in_phase(error):
    with common.phase("doing this"):
        raise error


def test_an_exception_that_is_its_own_cause_ends(refused):
    error, other = ValueError("round"), ValueError("about")
    error.__cause__ = error
    assert refused(raise_in_phase, error) == "error: doing this: ValueError: round"
    error.__cause__, other.__cause__ = other, error
    assert "doing this: ValueError" in refused(raise_in_phase, error)


def test_what_is_no_exception_is_one_line_and_an_interrupt_stays_one(refused):
    assert "doing this: CancelledError" in refused(raise_in_phase, asyncio.CancelledError())
    with pytest.raises(KeyboardInterrupt):
        raise_in_phase(KeyboardInterrupt())


def test_a_traceback_is_shown_on_request(monkeypatch, capsys):
    """Above the line, with the place at which the error was raised."""
    monkeypatch.setenv("TRACEBACK", "1")
    with pytest.raises(SystemExit) as ended:
        raise_in_phase(ValueError("reason"))
    said = capsys.readouterr().err
    assert ended.value.code == 2 and "in raise_in_phase" in said
    assert said.endswith("error: doing this: ValueError: reason\n")
    with pytest.raises(SystemExit):
        common.fail("without an exception")
    assert capsys.readouterr().err == "error: without an exception\n"


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(28, "No space left on device")])
def test_only_what_can_be_resumed_says_so(error, refused):
    def run(**options):
        with common.running("--flags", **options):
            raise error

    assert "the same command resumes an interrupted run" in refused(run)
    assert "same command" not in refused(run, resumes="")
    for name in ("chat", "evaluate", "pairs", "plot"):
        assert 'resumes=""' in (ROOT / f"{name}.py").read_text(), name


# ---- streams -------------------------------------------------------------------------------------

@pytest.mark.parametrize("closed", ["<&- >&-", "<&- >&- 2>&-"])
def test_closed_streams_do_not_disturb_a_run(closed, data, tmp_path):
    """No file of the run gets the number of standard output."""
    words = ["dpo.py"]
    for name, value in vars(small_args("dpo", data, tmp_path / "run", max_steps=1)).items():
        if value not in (None, []):
            words += ["--" + name.replace("_", "-"), str(value)]
    shell = ["bash", "-c", f'exec "$@" {closed}', "bash", sys.executable, *words]
    done = subprocess.run(shell, cwd=ROOT, stderr=subprocess.PIPE, timeout=200)
    assert done.returncode == 0, done.stderr
    assert len(metrics_of(tmp_path / "run")) == 1
    json.loads((tmp_path / "run/summary.json").read_text())


def test_a_talk_without_input_ends():
    shell = ["bash", "-c", f"exec {sys.executable} chat.py <&-"]
    done = subprocess.run(shell, cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr


# ---- plot.py -------------------------------------------------------------------------------------

def a_run(folder, line='{"step": 1, "loss": 2}'):
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text(line + "\n")
    return str(folder)


def draw(*words):
    plot.main(plot.flags.parse_args([str(word) for word in words]))


def test_numbers_without_end_are_drawn_as_infinite(tmp_path):
    for digits in 400, 5000:
        run = a_run(tmp_path / str(digits), '{"step": 1, "loss": %s}' % ("9" * digits))
        draw(run)
        assert plot.read_metrics(run) == [{"step": 1.0, "loss": float("inf")}]
        assert (tmp_path / str(digits) / "curves.png").exists()


@pytest.mark.parametrize("value", ['"x"', "[1]", "{}", "true"])
def test_a_metric_that_is_no_number_is_refused(value, tmp_path, refused):
    run = a_run(tmp_path / "run", f'{{"step": 1, "loss": {value}}}')
    assert "no number" in refused(draw, run)


def test_a_picture_without_a_suffix_overwrites_none_with_one(tmp_path, refused):
    run = a_run(tmp_path / "run")
    for name in "x.png", "x.html":
        (tmp_path / name).write_text("mine")
        assert f"{name} is there already" in refused(draw, run, "--output", tmp_path / "x")
        assert (tmp_path / name).read_text() == "mine"
        (tmp_path / name).unlink()
    draw(run, "--output", tmp_path / "x")
    assert {path.name for path in tmp_path.iterdir()} == {"run", "x.png", "x.html"}


def test_a_page_that_fails_leaves_no_picture(tmp_path, refused):
    """Or the same command would be refused once the page is mended."""
    run = a_run(tmp_path / "run")
    (tmp_path / "run/args.json").write_text("{")
    assert "reading the settings" in refused(draw, run)
    (tmp_path / "run/args.json").unlink()
    draw(run)


def test_odd_names_of_runs_are_drawn(tmp_path, refused):
    """Formulas, which matplotlib would parse; too long a name for a picture is one line."""
    draw(a_run(tmp_path / r"a$\frac{$b"))
    assert "--output" in refused(draw, tmp_path, "--output", "x" * 300)


# ---- escape sequences ----------------------------------------------------------------------------

def test_names_cannot_move_the_cursor(data, tmp_path, capsys):
    """Of the run folder, of runs that are drawn, of checkpoints that are measured."""
    folder = tmp_path / f"a{ESCAPE}"
    command("dpo", small_args("dpo", data, folder, max_steps=1))
    draw(folder)
    line = {"checkpoint": str(folder), "kl": None}
    evaluate.show_table([line], [], ["kl"], evaluate.flags.parse_args([]))
    shown = capsys.readouterr().out
    assert ESCAPE not in shown and shown.count(r"a\x1b[2J") == 5  # twice by finish and by draw


def test_the_name_of_a_checkpoint_cannot_move_the_cursor(data, tmp_path, capsys, monkeypatch):
    name = tmp_path / f"a{ESCAPE}"
    name.symlink_to(data / "chat")
    lines = iter(["What is 2 + 3?"])

    def read(prompt):
        try:
            return next(lines)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr("builtins.input", read)
    monkeypatch.setattr(sys, "stdin", open(os.devnull))
    chat.main(chat.flags.parse_args([str(name), str(name), "--tokens", "--max-new-tokens", "2"]))
    said = capsys.readouterr().out
    assert ESCAPE not in said and r"a\x1b[2J" in said


def test_an_end_token_cannot_move_the_cursor(data, tmp_path, capsys):
    """The line that says that answers end with it prints it."""
    shutil.copytree(ROOT / "tiny/base", tmp_path / "base")
    for file in (tmp_path / "base").glob("*.json"):
        text = file.read_text().replace("<|endoftext|>", r"<|\u001b[2J|>")
        file.write_text(text)
    common.load_tokenizer(str(tmp_path / "base"))
    said = capsys.readouterr().out
    assert ESCAPE not in said and r"<|\x1b[2J|>" in said


# ---- a resumed run is the same run ---------------------------------------------------------------

def interrupt(name, args, monkeypatch):
    module = runs_helper.SCRIPTS[name]
    with monkeypatch.context() as patch:
        patch.setattr(module, "log_step", runs_helper.interrupted(module.log_step))
        with pytest.raises(InterruptedError):
            command(name, args)


@pytest.mark.parametrize("changed", ["weights", "template", "reward"])
def test_a_run_is_not_resumed_with_other_weights_or_rewards(
        changed, data, tmp_path, refused, monkeypatch):
    """And once they are what they were, the same command resumes it."""
    shutil.copytree(data / "chat", tmp_path / "chat")
    reward = tmp_path / "rewards.py"
    reward.write_text(REWARD.format("len(text)"))
    args = small_args("grpo", data, tmp_path / "run", max_steps=2, save_every=1,
                      model=tmp_path / "chat", reward=f"{reward}:score")
    interrupt("grpo", args, monkeypatch)
    file = {"weights": tmp_path / "chat/model.safetensors", "reward": reward,
            "template": tmp_path / "chat/generation_config.json"}[changed]
    before = file.read_bytes()
    if changed == "weights":
        file.write_bytes(before[:-4] + bytes(4))
    elif changed == "reward":
        file.write_text(REWARD.format("-len(text)"))
    else:
        file.write_bytes(before + b"\n")
    assert "other flags, data, weights or rewards" in refused(command, "grpo", args)
    file.write_bytes(before)
    plot.main(plot.flags.parse_args([str(tmp_path / "run")]))  # what it leaves is no obstacle
    command("grpo", args)
    assert len(metrics_of(tmp_path / "run")) == 2


def test_an_adapter_and_its_base_are_both_in_the_fingerprint(data, tmp_path):
    shutil.copytree(data / "chat", tmp_path / "base")
    shutil.copytree(data / "reward", tmp_path / "adapter")
    config = tmp_path / "adapter/adapter_config.json"
    config.write_text(config.read_text().replace(str(data / "chat"), str(tmp_path / "base")))
    prints = [common.fingerprint(str(tmp_path / "adapter"))]
    for file in ("base/model.safetensors", "adapter/adapter_model.safetensors"):
        with open(tmp_path / file, "r+b") as opened:
            opened.seek(-8, os.SEEK_END)
            opened.write(b"otherval")
        prints.append(common.fingerprint(str(tmp_path / "adapter")))
    assert len(set(prints)) == 3
    (tmp_path / "adapter/notes.md").write_text("what a user writes there changes nothing")
    assert common.fingerprint(str(tmp_path / "adapter")) == prints[-1]


def test_a_large_file_is_read_in_part(data, tmp_path):
    """Its start, its end and its size count; 40 GB, nearly all of it a hole, take no time."""
    shutil.copytree(data / "chat", tmp_path / "model")
    file = tmp_path / "model/more.safetensors"
    prints = []
    file.touch()
    for size, place in ((40 * 10**9, 0), (40 * 10**9, 2), (40 * 10**9, 40 * 10**9 - 2),
                        (40 * 10**9 + 1, 0)):
        with file.open("r+b") as opened:
            opened.truncate(size)
            opened.seek(place)
            opened.write(b"x")
        prints.append(common.fingerprint(str(tmp_path / "model")))
    assert len(set(prints)) == 4


@pytest.mark.parametrize("place", [7 * 2**20, 10**9 + 12345, 3 * 10**9])
def test_one_matrix_of_a_large_file_that_changed_is_noticed(place, data, tmp_path):
    """Two MiB of 4 GB, wherever they are: a matrix of 1024 x 1024 numbers in 16 bits."""
    shutil.copytree(data / "chat", tmp_path / "model")
    file = tmp_path / "model/more.safetensors"
    with file.open("wb") as opened:
        opened.truncate(4 * 10**9)
    before = common.fingerprint(str(tmp_path / "model"))
    with file.open("r+b") as opened:
        opened.seek(place)
        opened.write(b"x" * 2**21)
    assert common.fingerprint(str(tmp_path / "model")) != before


def test_a_model_of_the_hub_counts_by_its_commit(tmp_path, monkeypatch):
    monkeypatch.setattr(common, "base_of", lambda name: name)
    prints = []
    for commit in "aab":
        monkeypatch.setattr(
            huggingface_hub, "try_to_load_from_cache", lambda name, file, commit=commit: (
                f"{tmp_path}/snapshots/{commit}/{file}" if file == "config.json" else None))
        prints.append(common.fingerprint("some/model"))
    assert prints[0] == prints[1] != prints[2]


def test_a_start_that_failed_does_not_block_the_next(data, tmp_path, refused):
    """A reward that is mended, or another flag: nothing was trained with the old ones."""
    reward = tmp_path / "rewards.py"
    reward.write_text(REWARD.format("1 / 0"))
    flags = dict(max_steps=1, reward=f"{reward}:score")
    refused(command, "grpo", small_args("grpo", data, tmp_path / "run", **flags))
    assert {path.name for path in (tmp_path / "run").iterdir()} == {"args.json", "run.lock"}
    reward.write_text(REWARD.format("len(text)"))
    command("grpo", small_args("grpo", data, tmp_path / "run", **flags, seed=3))
    assert json.loads((tmp_path / "run/args.json").read_text())["seed"] == 3


def test_a_settings_file_of_somebody_else_is_kept(data, tmp_path, refused):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/args.json").write_text('{"mine": 1}')
    assert "name another" in refused(command, "sft", small_args("sft", data, tmp_path / "run"))
    assert (tmp_path / "run/args.json").read_text() == '{"mine": 1}'


# ---- defaults ------------------------------------------------------------------------------------

def test_full_fine_tuning_has_a_learning_rate_ten_times_lower(monkeypatch):
    """On the tiny model and on others; what a user says goes first."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    for model in {"model": "tiny/base"}, {"model": "other/model"}:
        lora = run_args(sft, **model).learning_rate
        assert run_args(sft, **model, lora_rank=0).learning_rate == pytest.approx(lora / 10)
        assert run_args(sft, **model, lora_rank=0, learning_rate=0.5).learning_rate == 0.5


def test_downloads_show_their_progress_and_local_files_none(data, capsys):
    assert not huggingface_hub.utils.are_progress_bars_disabled()
    common.load_rows(str(data / "sft_train.jsonl"), "train", 10, 0)
    common.load_model(str(data / "chat"), trainable=False)
    assert capsys.readouterr().err == ""


def test_parsing_changes_no_other_run(tmp_path):
    """Each of several runs in one process gets the defaults that a process of its own gives."""
    before = run_args(grpo, model="tiny/chat")
    run_args(grpo, model="tiny/chat", loss="gspo", lora_rank=3)
    assert vars(run_args(grpo, model="tiny/chat")) == vars(before)
    assert grpo.flags.get_default("max_steps") != grpo.TINY["max_steps"]


@pytest.mark.parametrize("wish", [{}, {"HF_HUB_DISABLE_PROGRESS_BARS": "1"}])
def test_who_wants_no_bars_is_not_warned_of_it(wish):
    env = {name: x for name, x in os.environ.items() if name != "HF_HUB_DISABLE_PROGRESS_BARS"}
    env |= wish
    code = ("import common, huggingface_hub as hub; "
            "print(hub.utils.are_progress_bars_disabled())")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, text=True,
                          capture_output=True, timeout=200)
    assert (done.stdout, done.stderr) == (f"{bool(wish)}\n", "")
