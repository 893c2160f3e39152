"""Hostile and broken environments end in one line and exit code 2, or in a correct run."""
import asyncio
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from unittest import mock

import huggingface_hub
import pytest
import runs_helper
from conftest import ROOT, flags_of, metrics_of, run_args
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
    """Empty, too long, or not UTF-8, which the tokenizer would only refuse after training."""
    assert refused(run_args, dpo, output_dir=name).startswith("error: --output-dir ")


def test_a_folder_that_cannot_be_read_or_made_is_refused(data, refused, monkeypatch, tmp_path):
    def denied(path):
        raise PermissionError(13, "Permission denied", str(path))

    args = small_args("dpo", data, "/proc/run", max_steps=1)
    assert "--output-dir /proc/run" in refused(command, "dpo", args)
    monkeypatch.setattr(Path, "exists", denied)
    monkeypatch.setattr(common, "is_tiny", lambda name: False)
    assert "Permission denied" in refused(run_args, dpo, output_dir=tmp_path / "run")


# ---- broken files of a run -----------------------------------------------------------------------

@pytest.mark.parametrize("content", ["[]", "[1]", "null", "5", "{"])
def test_a_summary_that_is_not_an_object_is_one_line(content, data, tmp_path, refused):
    """In the folder of a fully fine-tuned model, and in a run that is plotted."""
    shutil.copytree(data / "chat", tmp_path / "model")
    (tmp_path / "model/summary.json").write_text(content)
    assert "loading the model" in refused(run_args, dpo, model=tmp_path / "model")
    (tmp_path / "model/metrics.jsonl").write_text('{"step": 1, "loss": 2}\n')
    if content != "[]":  # which adds nothing to the settings
        args = flags_of(plot).parse_args([str(tmp_path / "model")])
        assert "reading the settings" in refused(plot.main, args)


def interrupt(name, args, monkeypatch):
    """Starts a run and interrupts it after its first step."""
    module = runs_helper.SCRIPTS[name]
    with monkeypatch.context() as patch:
        patch.setattr(module, "log_step", runs_helper.interrupted(module.log_step))
        with pytest.raises(InterruptedError):
            command(name, args)


# ---- exceptions ----------------------------------------------------------------------------------

def raise_in_phase(error):
    with common.phase("doing this"):
        raise error


def test_odd_exceptions_are_one_line_and_an_interrupt_stays_an_interrupt(refused):
    error, other = ValueError("round"), ValueError("about")
    error.__cause__ = error
    assert refused(raise_in_phase, error) == "error: doing this: ValueError: round"
    error.__cause__, other.__cause__ = other, error
    assert "doing this: ValueError" in refused(raise_in_phase, error)
    assert "doing this: CancelledError" in refused(raise_in_phase, asyncio.CancelledError())
    with pytest.raises(KeyboardInterrupt):
        raise_in_phase(KeyboardInterrupt())


def test_a_traceback_is_shown_on_request(monkeypatch, capsys):
    """Above the line, and with the place at which the error was raised."""
    monkeypatch.setenv("TRACEBACK", "1")
    with pytest.raises(SystemExit) as ended:
        raise_in_phase(ValueError("reason"))
    said = capsys.readouterr().err
    assert ended.value.code == 2 and "in raise_in_phase" in said
    assert said.endswith("error: doing this: ValueError: reason\n")
    with pytest.raises(SystemExit):
        common.fail("without an exception")
    assert capsys.readouterr().err == "error: without an exception\n"


# ---- streams -------------------------------------------------------------------------------------

def test_closed_streams_do_not_disturb_a_run(data, tmp_path):
    """No file of the run gets the file descriptor of standard output."""
    words = ["dpo.py"]
    for name, value in vars(small_args("dpo", data, tmp_path / "run", max_steps=1)).items():
        if value not in (None, []):
            words += ["--" + name.replace("_", "-"), str(value)]
    shell = ["bash", "-c", 'exec "$@" <&- >&- 2>&-', "bash", sys.executable, *words]
    assert subprocess.run(shell, cwd=ROOT, timeout=200).returncode == 0
    assert len(metrics_of(tmp_path / "run")) == 1
    json.loads((tmp_path / "run/summary.json").read_text())


def test_a_chat_without_standard_input_ends():
    shell = ["bash", "-c", f"exec {sys.executable} chat.py <&-"]
    done = subprocess.run(shell, cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr


# ---- plot.py -------------------------------------------------------------------------------------

def a_run(folder, line='{"step": 1, "loss": 2}'):
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text(line + "\n")
    return str(folder)


def draw(*words):
    plot.main(flags_of(plot).parse_args([str(word) for word in words]))


def test_numbers_that_overflow_are_infinite_and_other_values_are_refused(tmp_path, refused):
    run = a_run(tmp_path / "run", '{"step": 1, "loss": %s}' % ("9" * 5000))
    draw(run)
    assert plot.read_metrics(run) == [{"step": 1.0, "loss": float("inf")}]
    for value in '"x"', "[1]", "{}", "true":
        run = a_run(tmp_path / value, f'{{"step": 1, "loss": {value}}}')
        assert "not a number" in refused(draw, run)


def test_odd_names_of_runs_are_drawn(tmp_path, refused):
    """A formula, which matplotlib would parse; a file name that is too long ends in one line."""
    draw(a_run(tmp_path / r"a$\frac{$b"))
    assert "--output" in refused(draw, tmp_path, "--output", "x" * 300)


# ---- escape sequences ----------------------------------------------------------------------------

def test_names_cannot_move_the_cursor(data, tmp_path, capsys, monkeypatch):
    """Names of runs that are trained, plotted or evaluated, of checkpoints, and of an end token."""
    folder = tmp_path / f"a{ESCAPE}"
    command("dpo", small_args("dpo", data, folder, max_steps=1))
    draw(folder)
    line = {"checkpoint": str(folder), "kl": None}
    evaluate.show_table([line], [], ["kl"], flags_of(evaluate).parse_args([]))
    monkeypatch.setattr("builtins.input", mock.Mock(side_effect=["What is 2 + 3?", EOFError]))
    monkeypatch.setattr(sys, "stdin", open(os.devnull))
    words = [str(folder), str(folder), "--tokens", "--max-new-tokens", "2"]
    chat.main(flags_of(chat).parse_args(words))
    shutil.copytree(ROOT / "tiny/base", tmp_path / "base")
    for file in (tmp_path / "base").glob("*.json"):
        file.write_text(file.read_text().replace("<|endoftext|>", r"<|\u001b[2J|>"))
    common.load_tokenizer(str(tmp_path / "base"))  # a line says that answers end with it
    shown = capsys.readouterr().out
    assert ESCAPE not in shown and shown.count(r"a\x1b[2J") > 5 and r"<|\x1b[2J|>" in shown


# ---- a resumed run is the same run ---------------------------------------------------------------

@pytest.mark.parametrize("changed", ["weights", "reward"])
def test_a_run_is_not_resumed_with_other_weights_or_rewards(
        changed, data, tmp_path, refused, monkeypatch):
    """Once they are restored, the same command resumes it."""
    shutil.copytree(data / "chat", tmp_path / "chat")
    reward = tmp_path / "rewards.py"
    reward.write_text(REWARD.format("len(text)"))
    args = small_args("grpo", data, tmp_path / "run", max_steps=2, save_every=1,
                      model=tmp_path / "chat", reward=f"{reward}:score")
    interrupt("grpo", args, monkeypatch)
    file = tmp_path / "chat/model.safetensors" if changed == "weights" else reward
    before = file.read_bytes()
    if changed == "weights":
        file.write_bytes(before[:-4] + bytes(4))
    else:
        file.write_text(REWARD.format("-len(text)"))
    assert "other flags, data, weights or rewards" in refused(command, "grpo", args)
    file.write_bytes(before)
    plot.main(flags_of(plot).parse_args([str(tmp_path / "run")]))  # must not prevent resuming
    command("grpo", args)
    assert len(metrics_of(tmp_path / "run")) == 2


def test_an_adapter_and_its_base_are_both_in_the_fingerprint(data, tmp_path):
    shutil.copytree(data / "chat", tmp_path / "base")
    shutil.copytree(data / "reward", tmp_path / "adapter")
    adapter, config = str(tmp_path / "adapter"), tmp_path / "adapter/adapter_config.json"
    config.write_text(config.read_text().replace(str(data / "chat"), str(tmp_path / "base")))
    prints = [common.fingerprint(adapter)]
    for file in ("base/model.safetensors", "adapter/adapter_model.safetensors"):
        content = (tmp_path / file).read_bytes()
        (tmp_path / file).write_bytes(content[:-8] + b"otherval")
        prints.append(common.fingerprint(adapter))
    assert len(set(prints)) == 3
    (tmp_path / "adapter/notes.md").write_text("Notes of the user do not count.")
    assert common.fingerprint(adapter) == prints[-1]


def test_a_model_of_the_hub_is_identified_by_its_commit(tmp_path, monkeypatch):
    monkeypatch.setattr(common, "base_of", lambda name: name)
    prints = []
    for commit in "aab":
        monkeypatch.setattr(
            huggingface_hub, "try_to_load_from_cache", lambda name, file, commit=commit: (
                f"{tmp_path}/snapshots/{commit}/{file}" if file == "config.json" else None))
        prints.append(common.fingerprint("some/model"))
    assert prints[0] == prints[1] != prints[2]


def test_a_start_that_failed_does_not_block_the_next(data, tmp_path, refused):
    """The reward or a flag may change, because nothing was trained with the old ones."""
    reward = tmp_path / "rewards.py"
    reward.write_text(REWARD.format("1 / 0"))
    flags = dict(max_steps=1, reward=f"{reward}:score")
    refused(command, "grpo", small_args("grpo", data, tmp_path / "run", **flags))
    assert {path.name for path in (tmp_path / "run").iterdir()} == {"args.json", "run.lock"}
    reward.write_text(REWARD.format("len(text)"))
    command("grpo", small_args("grpo", data, tmp_path / "run", **flags, seed=3))
    assert json.loads((tmp_path / "run/args.json").read_text())["seed"] == 3


def test_an_args_file_of_another_program_is_kept(data, tmp_path, refused):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/args.json").write_text('{"mine": 1}')
    assert "name another" in refused(command, "sft", small_args("sft", data, tmp_path / "run"))
    assert (tmp_path / "run/args.json").read_text() == '{"mine": 1}'


# ---- defaults ------------------------------------------------------------------------------------

def test_full_fine_tuning_has_a_learning_rate_ten_times_lower(monkeypatch):
    """On the tiny model and on others; a flag takes precedence."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    for model in {"model": "tiny/base"}, {"model": "other/model"}:
        lora = run_args(sft, **model).learning_rate
        assert run_args(sft, **model, lora_rank=0).learning_rate == pytest.approx(lora / 10)
        assert run_args(sft, **model, lora_rank=0, learning_rate=0.5).learning_rate == 0.5


def test_parsing_changes_no_other_run():
    """Several runs in one process get the same defaults as in separate processes."""
    before = run_args(grpo, model="tiny/chat")
    run_args(grpo, model="tiny/chat", loss="gspo", lora_rank=3)
    assert vars(run_args(grpo, model="tiny/chat")) == vars(before)


def test_turning_off_progress_bars_gives_no_warning():
    code = ("import common, huggingface_hub as hub; common.patch_libraries(); "
            "print(hub.utils.are_progress_bars_disabled())")
    env = os.environ | {"HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, text=True,
                          capture_output=True, timeout=200)
    assert (done.stdout, done.stderr) == ("True\n", "")
