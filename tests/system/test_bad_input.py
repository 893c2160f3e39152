"""Every mistake of a user ends in one line on stderr that names it, and in exit code 2.

A mistake that all scripts detect in the same function of common.py is tried on one script.
"""
import contextlib
import json
import shutil
import sys

import pytest
import runs_helper
import torch
import transformers
from conftest import flags_of
from runs_helper import KIND, REWARDED, SCRIPTS, command, small_args
from safetensors.torch import load_file, save_file

import common

pytestmark = pytest.mark.filterwarnings("ignore")
ONLINE = [name for name in SCRIPTS if KIND[name] == "prompt"]
OF_SCRIPTS = pytest.mark.parametrize("name", SCRIPTS)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    runs_helper.write_data(folder)
    # A language model's adapter, such as sft.py saves.
    shutil.copytree(folder / "reward", folder / "adapter")
    change_json("adapter_config", task_type="CAUSAL_LM", modules_to_save=None)(folder / "adapter")
    change_weights(lambda key, x: None if "score" in key else x)(folder / "adapter")
    return folder


@pytest.fixture
def ends(data, tmp_path, refused, monkeypatch):
    """Runs a script that must end in one line before it creates a folder; returns the line."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)

    def run(name, **flags):
        if "model" in flags and name in REWARDED:
            flags["reward"] = "correct_answer"  # a reward model needs the policy's base
        flags = {"max_steps": 1} | flags  # a run that is not refused ends soon
        line = refused(lambda: command(name, small_args(name, data, tmp_path / "run", **flags)))
        assert not (tmp_path / "run").exists()
        return line
    return run


# ---- models, adapters, tokenizers ----------------------------------------------------------------

def change_json(file, **changes):
    def change(folder):
        path = folder / f"{file}.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return change


def change_weights(make):
    """Replaces each weight by make(key, weight), or removes it if that is None."""
    def change(folder):
        file, = folder.glob("*model.safetensors")
        weights = {key: make(key, x) for key, x in load_file(file).items()}
        weights = {key: x.contiguous() for key, x in weights.items() if x is not None}
        save_file(weights, file, metadata={"format": "pt"})
    return change


def rename_weights(folder):
    file, = folder.glob("*model.safetensors")
    save_file({key.replace("lora_", "other_"): x for key, x in load_file(file).items()}, file)


def write(file, text):
    return lambda folder: (folder / file).write_bytes(text.encode())


def nan_in(part):
    return change_weights(lambda key, x: torch.full_like(x, torch.nan) if part in key else x)


def untied_nan_head(folder):
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, tie_word_embeddings=False)
    model.lm_head.weight.data.fill_(torch.nan)
    model.save_pretrained(folder)


def one_nan_embedding(key, x):
    if "embed_tokens" in key:
        x[300] = torch.nan
    return x


def add_tokens(folder):
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["zyzzyva"])
    tokenizer.save_pretrained(folder)


ADAPTER_OF_NOTHING = ('{"peft_type": "LORA", "task_type": "CAUSAL_LM", '
                      '"base_model_name_or_path": "gone/away"}')
BROKEN = {  # {folder of `data`: {name: a function that breaks a copy of it}}
    "chat": {
        "empty": lambda x: [file.unlink() for file in x.iterdir()],
        "no json": write("config.json", "{not json"),
        "tokenizer cut short": write("tokenizer.json", '{"version": "1.0"'),
        "weights cut short": write("model.safetensors", "\x10" * 40),
        "wrong shapes": change_json("config", hidden_size=64),
        "an unknown kind": change_json("config", model_type="frog"),
        "nan everywhere": nan_in(""),
        "one nan embedding": change_weights(one_nan_embedding),
        "nan head": untied_nan_head,
        "a token too many": add_tokens,
        "a template that raises": write("chat_template.jinja", "{{ raise_exception('never') }}"),
        "no template": write("chat_template.jinja", "{% if %}"),
        "an adapter without a base": write("adapter_config.json", ADAPTER_OF_NOTHING),
        "a broken adapter": write("adapter_config.json", "{not json")},
    "adapter": {
        "rank": change_json("adapter_config", r=8), "nan": nan_in("lora"),
        "base": change_json("adapter_config", base_model_name_or_path="tiny/nothing"),
        "shape": change_weights(lambda key, x: x[:, :-1]), "names": rename_weights,
        "alpha": change_json("adapter_config", lora_alpha=float("nan"))},
    "reward": {
        "rank": change_json("adapter_config", r=8), "nan": nan_in("lora"), "names": rename_weights,
        "no score": change_weights(lambda key, x: None if "score" in key else x),
        "cut": lambda x: write("adapter_model.safetensors", "\x10" * 40)(x)}}
CASES = [(start, breakage, "ppo" if start == "reward" else "dpo")
         for start, table in BROKEN.items() for breakage in table]
CASES += [(start, "nan everywhere" if start == "chat" else "nan", name)
          for start in ("chat", "adapter") for name in SCRIPTS if name != "dpo"]


@pytest.mark.parametrize("start, breakage, name", CASES)
def test_a_broken_model_is_named(start, breakage, name, data, tmp_path, ends):
    """Before anything is trained or a folder is created."""
    folder = tmp_path / "broken"
    shutil.copytree(data / start, folder)
    BROKEN[start][breakage](folder)
    line = ends(name, **{"reward" if start == "reward" else "model": folder})
    assert str(folder) in line and "learning-rate" not in line
    assert "nan" not in breakage or "finite" in line, "the weights must be named, not what follows"
    assert breakage != "a token too many" or "369" in line, "the first id without an embedding"


@pytest.mark.parametrize("name", sorted({*SCRIPTS} - {"reward_model", "prm"}))
def test_a_model_that_is_not_a_policy_is_named(name, data, ends):
    line = ends(name, model=data / "reward")
    assert str(data / "reward") in line and "SEQ_CLS" in line
    assert "no-such-org/no-such-model" in ends(name, model="no-such-org/no-such-model")


# ---- rows ----------------------------------------------------------------------------------------

USER = [{"role": "user", "content": "1 + 1?"}]


def say(text):
    return [{"role": "assistant", "content": text}]


def steps(completions=("1 + 1 = 2",), labels=(True,), prompt=USER):
    return {"prompt": prompt, "completions": completions, "labels": labels}


BAD_ROWS = {
    "sft": [
        {"other": 1}, {"messages": []}, {"messages": USER}, {"messages": "text"},
        {"messages": [{"role": "assistant"}]}, {"messages": [{"content": "x"}]},
        {"messages": ["x"]}, {"prompt": "x"}, {"prompt": "x", "completion": ""},
        {"prompt": "x", "completion": 0.5}, {"prompt": USER, "completion": True}, {"output": "x"},
        {"instruction": "x", "output": ""}, {"text": ""}, {"text": 0.5}, {"text": ["x"]}],
    "preference": [
        {"other": 1}, {"prompt": "x", "chosen": "y"}, {"chosen": "Yes.", "rejected": "No."},
        {"prompt": "x", "chosen": "y", "rejected": "y"},
        {"prompt": "x", "chosen": 0.5, "rejected": 0.6}, {"chosen": say("y"), "rejected": say("z")},
        {"prompt": "x", "chosen": say("y"), "rejected": "z"},
        {"prompt": USER, "chosen": USER, "rejected": say("z")},
        {"prompt": USER, "chosen": [{"role": "assistant", "text": "y"}], "rejected": say("z")}],
    "steps": [
        {"other": 1}, {"prompt": USER, "completions": ["1 + 1 = 2"]}, steps("1 + 1 = 2"),
        steps(labels=[1]), steps(labels=[True, False]), steps(["1 + 1 = 2", "So it is 2."]),
        steps(labels=["true"]), steps(labels=True), steps([], []), steps([""]), steps([2]),
        steps([say("1 + 1 = 2")]), steps(prompt=""), steps(prompt=["x"]),
        steps(prompt=[{"role": "user"}]), {"completions": ["1 + 1 = 2"], "labels": [True]}],
    "prompt": [
        {"other": 1}, {"prompt": "", "answer": "2"}, {"prompt": [], "answer": "2"},
        {"prompt": 0.5, "answer": "2"}, {"prompt": [{"role": "user"}], "answer": "2"},
        {"prompt": ["x"], "answer": "2"}, {"prompt": {"role": "user"}, "answer": "2"}]}
BAD_ROWS["tools"] = [*BAD_ROWS["prompt"], {"prompt": "x", "answer": "2"},
                     {"prompt": USER, "answer": "2", "tools": [{"name": "f"}]}]


@OF_SCRIPTS
def test_rows_of_every_wrong_form_are_named(name, data, write_jsonl, ends):
    """With file, row, columns, and a reason that is not an internal error of Python."""
    for bad in BAD_ROWS[KIND[name]]:
        file = write_jsonl([bad])
        line = ends(name, dataset=file)
        assert file in line and "row 1: " in line, bad
        assert f"columns: {', '.join(bad)}"[:60] in line, bad
        assert "object has no attribute" not in line and "not subscriptable" not in line, line


PAIR = {"prompt": USER, "chosen": say("y"), "rejected": say("z")}


@pytest.mark.parametrize("name, row, flags, words", [
    *(("grpo", {"prompt": "x"} | answer, {"reward": "correct_answer"},
       "its answer is not a plain number")
      for answer in ({}, {"answer": None}, {"answer": "none"}, {"answer": "(3, 5)"})),
    *(("reward_model", PAIR | {"margin": margin}, {}, "") for margin in ("big", torch.nan, 1e400)),
    *((name, None, {"max_length": 4}, "") for name in ("reward_model", "prm", *ONLINE))])
def test_rows_that_cannot_be_used_leave_no_examples(name, row, flags, words, write_jsonl, ends):
    """Answers that are not numbers, margins that are not finite, rows that are too long."""
    if row:
        flags = flags | {"dataset": write_jsonl([row])}
    assert "row 1: " + words in ends(name, **flags)


BAD_FILES = {
    "empty": b"", "no json": b'{"prompt": "x"}\n{"prompt": "y",}\n', "no rows": b"[]",
    "numbers": b"[1]\n", "not utf-8": b'{"text": "\xff\xfe"}\n',
    "a lone surrogate": b'{"prompt": "\\ud800", "text": "\\ud800", "messages": "\\ud800"}\n'}


@pytest.mark.parametrize("flag", ["dataset", "eval_dataset"])
def test_data_that_cannot_be_read_is_named_with_the_cause(flag, data, tmp_path, ends):
    """`datasets` only says that "an error occurred", but the user needs the reason."""
    for content in BAD_FILES.values():
        file = tmp_path / "bad.jsonl"
        file.write_bytes(content)
        line = ends("sft", **{flag: file})
        assert str(file) in line and not line.endswith("while generating the dataset"), content
    for name in tmp_path / "missing.jsonl", "nobody/nothing", "nobody/nothing:main":
        assert str(name).removesuffix(":main") in ends("sft", **{flag: name})
    file = data / "sft_train.jsonl"
    assert str(file) in ends("sft", dataset=file, eval_dataset=file), "all rows are held out"


# ---- rewards -------------------------------------------------------------------------------------

REWARDS = """
import sys
def leaves(completions, **columns): sys.exit(0)
def raises(completions, **columns): raise KeyError("no such thing")
def too_few(completions, **columns): return [0.0]
def nan(completions, **columns): return [float("nan")] * len(completions)
def words(completions, **columns): return ["good"] * len(completions)
def none(completions, **columns): print("\\x1b[2J")
def escapes(completions, **columns): raise ValueError("\\x1b[2J\\x07")
def no_columns(completions): return [1.0] * len(completions)
number = 5
"""


@pytest.mark.parametrize("reward, cause", [
    ("leaves", "SystemExit"), ("raises", "no such thing"), ("too_few", "got [0.0]"),
    ("nan", "nan"), ("words", "good"), ("none", "NoneType"), ("no_columns", "no_columns"),
    ("number", "plain function"), ("escapes", r"\x1b[2J\x07"), ("absent", "absent")])
def test_a_reward_that_fails_is_named_with_its_cause(reward, cause, data, tmp_path, refused):
    """With exit code 2, even if the reward calls sys.exit(0)."""
    (tmp_path / "rewards.py").write_text(REWARDS)
    args = small_args("grpo", data, tmp_path / "run", reward=f"{tmp_path}/rewards.py:{reward}")
    line = refused(command, "grpo", args)
    assert cause in line and f"rewards.py:{reward}" in line and "\x1b" not in line


@pytest.mark.parametrize("name", REWARDED)
def test_a_reward_that_cannot_be_loaded_is_named_before_a_model_is_loaded(
        name, data, tmp_path, ends, monkeypatch):
    """A file that exits or cannot be parsed; a missing file, function or reward model."""
    monkeypatch.setattr(common, "load_model", lambda *args: pytest.fail("the model was loaded"))
    (tmp_path / "rewards.py").write_text("import sys\nsys.exit(0)\n")
    (tmp_path / "broken.py").write_text("def (")
    rewards = [tmp_path / x for x in ("rewards.py:f", "broken.py:f", "nowhere.py:f", "nowhere.py")]
    for reward in [*rewards, "correct", "nobody/nothing", data / "chat", data / "adapter"]:
        assert str(reward).split("/")[-1] in ends(name, reward=reward)
    assert "must share one base" in ends(name, reward="tiny/reward")


# ---- flags ---------------------------------------------------------------------------------------

NO_ZERO = """batch_size micro_batch_size sample_batch_size max_steps epochs max_length save_every
eval_size learning_rate temperature max_new_tokens group_size updates minibatches epsilon
epsilon_high target_kl""".split()


@OF_SCRIPTS
def test_every_number_on_the_command_line_is_checked(name, refused, monkeypatch):
    """Negative, not finite, zero where zero makes no sense, or not a number at all."""
    module = SCRIPTS[name]

    def line(*words):
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *words])
        return refused(
            common.parse, flags_of(module), module.TINY, getattr(module, "BY_LOSS", None))

    checked = set()
    for action in flags_of(module)._actions:
        flag = action.option_strings[0] if action.option_strings else ""
        if action.type:
            values = ["nan", "inf", "-inf", "x", "", "1e400"]
            values += ["-1"] * (action.dest != "reward_weights")
            for value in values + ["0"] * (action.dest in NO_ZERO):
                assert flag in line(f"{flag}={value}"), (flag, value)
            checked.add(action.dest)
        elif action.choices:
            assert flag in line(flag, "some")
    assert {"batch_size", "learning_rate", "seed", "max_steps", "lora_rank"} <= checked
    assert "--bogus" in line("--bogus", "1") and "stray" in line("stray")
    assert "--seed" in line("--seed")


# ---- the terminal --------------------------------------------------------------------------------

@OF_SCRIPTS
def test_control_characters_in_data_do_not_reach_the_terminal(name, data, tmp_path, capsys):
    """Neither from rows that are shown as examples or answers, nor from rows that are refused."""
    evil = r"\u001b[2J\u001b]0;title\u0007\r\u009b"
    files = {}
    for flag, part in ("dataset", "train"), ("eval_dataset", "heldout"):
        text = (data / f"{KIND[name]}_{part}.jsonl").read_text()
        text = text.replace('"content": "', f'"content": "{evil}')
        files[flag] = tmp_path / f"{part}.jsonl"
        files[flag].write_text(text + f'\n{{"{evil}": 5}}')
    command(name, small_args(name, data, tmp_path / "run", max_steps=1, eval_size=9, **files))
    said = capsys.readouterr()
    assert r"\x1b[2J" in said.out and "cannot be used" in said.out
    shown = said.out.replace("\033[32m", "").replace("\033[0m", "")
    assert all(c.isprintable() or c == "\n" for c in shown), ascii(shown)


@pytest.mark.parametrize("error, words", [
    (KeyboardInterrupt(), "the same command resumes"),
    (torch.OutOfMemoryError("CUDA out of memory"), "out of memory: lower --these-flags"),
    (MemoryError(), "out of memory: lower --these-flags"),
    (RuntimeError("DefaultCPUAllocator: can't allocate memory"), "lower --these-flags"),
    (OSError(28, "No space left on device"), "disk is full"),
    (OSError(122, "Disk quota exceeded"), "disk is full"),
    (RuntimeError("[enforce fail at inline_container.cc:672] unexpected pos 64"), "disk is full")])
def test_an_error_that_can_occur_anywhere_says_what_to_do(error, words, refused):
    """Wherever it occurs. A program that cannot be resumed does not claim that it can."""
    def run(within, **options):
        with common.running("--these-flags", **options), within:
            raise error

    plain = contextlib.nullcontext()
    assert words in refused(run, plain)
    if isinstance(error, KeyboardInterrupt | torch.OutOfMemoryError):
        assert words in refused(run, common.phase("loading the model"))
    assert "same command" not in refused(run, plain, resumes="")
