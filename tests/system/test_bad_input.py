"""Whatever a user gets wrong ends in one line on stderr that names it, and exit code 2."""
import contextlib
import itertools
import json
import shutil
import sys

import pytest
import runs_helper
import torch
import transformers
from runs_helper import KIND, SCRIPTS, command, small_args
from safetensors.torch import load_file, save_file

import common

pytestmark = pytest.mark.filterwarnings("ignore")
ONLINE = [name for name in SCRIPTS if KIND[name] == "prompt"]
PAIRWISE = [name for name in SCRIPTS if KIND[name] == "preference"]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    runs_helper.write_data(folder)
    return folder


@pytest.fixture
def ends(data, tmp_path, refused, monkeypatch):
    """Runs a script that has to end in one line before it has made a folder; returns the line."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)

    def run(name, **flags):
        if "model" in flags and KIND[name] == "prompt":
            flags["reward"] = "correct_answer"  # a reward model sits on its own base
        flags = {"max_steps": 1} | flags  # a run that is not refused ends soon
        line = refused(lambda: command(name, small_args(name, data, tmp_path / "run", **flags)))
        assert not (tmp_path / "run").exists()
        return line
    return run


# ---- models, adapters, tokenizers ----------------------------------------------------------------

def change_json(file, **changes):
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def change_weights(file, change):
    save_file({key: change(key, x).contiguous() for key, x in load_file(file).items()}, file,
              metadata={"format": "pt"})


def nan_in(part):
    return lambda key, x: torch.full_like(x, torch.nan) if part in key else x


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


BROKEN_MODELS = {
    "an empty folder": lambda x: [file.unlink() for file in x.iterdir()],
    "no json": lambda x: (x / "config.json").write_text("{not json"),
    "tokenizer cut short": lambda x: (x / "tokenizer.json").write_text('{"version": "1.0"'),
    "weights cut short": lambda x: (x / "model.safetensors").write_bytes(b"\x10" * 40),
    "wrong shapes": lambda x: change_json(x / "config.json", hidden_size=64),
    "an unknown kind": lambda x: change_json(x / "config.json", model_type="frog"),
    "nan everywhere": lambda x: change_weights(x / "model.safetensors", nan_in("")),
    "one nan embedding": lambda x: change_weights(x / "model.safetensors", one_nan_embedding),
    "nan head": untied_nan_head,
    "a token too many": add_tokens,
    "a template that raises": lambda x: (x / "chat_template.jinja").write_text(
        "{{ raise_exception('never') }}"),
    "a template that is no template": lambda x: (x / "chat_template.jinja").write_text("{% if %}"),
    "an adapter without a base": lambda x: (x / "adapter_config.json").write_text(json.dumps(
        {"peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": "gone/away"})),
    "a broken adapter": lambda x: (x / "adapter_config.json").write_text("{not json"),
}


# a reward model has no head over the vocabulary
CASES = [pair for pair in itertools.product(SCRIPTS, BROKEN_MODELS)
         if pair not in (("reward_model", "nan head"), ("prm", "nan head"))]


@pytest.mark.parametrize("name, breakage", CASES)
def test_broken_models_are_named(name, breakage, data, tmp_path, ends):
    """Before anything is trained, or a folder made: the model's own, or with an adapter in it."""
    folder = tmp_path / "broken"
    shutil.copytree(data / "chat", folder)
    BROKEN_MODELS[breakage](folder)
    line = ends(name, model=folder)
    assert str(folder) in line and "the learning rate" not in line
    if breakage == "a token too many":
        assert "369" in line  # the first id without an embedding


@pytest.mark.parametrize("name", SCRIPTS)
def test_an_unknown_model_is_named(name, ends):
    assert "no-such-org/no-such-model" in ends(name, model="no-such-org/no-such-model")


def make_adapter(data, folder, **changes):
    """A language model's adapter, which a run of sft.py would leave."""
    shutil.copytree(data / "reward", folder)
    change_json(folder / "adapter_config.json", task_type="CAUSAL_LM", modules_to_save=None,
                **changes)
    weights = load_file(folder / "adapter_model.safetensors")
    weights = {key: x for key, x in weights.items() if "score" not in key}
    save_file(weights, folder / "adapter_model.safetensors")


BROKEN_ADAPTERS = {
    "rank": (dict(r=8), None),
    "base": (dict(base_model_name_or_path="tiny/nothing"), None),
    "shape": ({}, lambda key, x: x[:, :-1]),
    "nan": ({}, nan_in("lora")),
    "names": ({}, "renamed"),
}


@pytest.mark.parametrize("breakage", BROKEN_ADAPTERS)
@pytest.mark.parametrize("name", SCRIPTS)
def test_broken_adapters_are_named(name, breakage, data, tmp_path, ends):
    """An adapter that does not fit its base, or holds other weights than it says."""
    folder = tmp_path / "adapter"
    changes, change = BROKEN_ADAPTERS[breakage]
    make_adapter(data, folder, **changes)
    file = folder / "adapter_model.safetensors"
    if change == "renamed":
        weights = load_file(file)
        save_file({key.replace("lora_", "other_"): x for key, x in weights.items()}, file)
    elif change:
        change_weights(file, change)
    assert str(folder) in ends(name, model=folder)


@pytest.mark.parametrize("name", sorted({*SCRIPTS} - {"reward_model", "prm"}))
def test_a_reward_model_is_no_policy(name, data, ends):
    line = ends(name, model=data / "reward")
    assert str(data / "reward") in line and "SEQ_CLS" in line


# ---- rows ----------------------------------------------------------------------------------------

USER = [{"role": "user", "content": "1 + 1?"}]


def say(text):
    return [{"role": "assistant", "content": text}]


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
        {"other": 1}, {"prompt": USER, "completions": ["1 + 1 = 2"]},
        {"prompt": USER, "completions": "1 + 1 = 2", "labels": [True]},
        {"prompt": USER, "completions": ["1 + 1 = 2"], "labels": [1]},
        {"prompt": USER, "completions": ["1 + 1 = 2"], "labels": [True, False]},
        {"prompt": USER, "completions": ["1 + 1 = 2", "So it is 2."], "labels": [True]},
        {"prompt": USER, "completions": ["1 + 1 = 2"], "labels": ["true"]},
        {"prompt": USER, "completions": ["1 + 1 = 2"], "labels": True},
        {"prompt": USER, "completions": [], "labels": []},
        {"prompt": USER, "completions": [""], "labels": [True]},
        {"prompt": USER, "completions": [2], "labels": [True]},
        {"prompt": USER, "completions": [say("1 + 1 = 2")], "labels": [True]},
        {"prompt": "", "completions": ["1 + 1 = 2"], "labels": [True]},
        {"prompt": ["x"], "completions": ["1 + 1 = 2"], "labels": [True]},
        {"prompt": [{"role": "user"}], "completions": ["1 + 1 = 2"], "labels": [True]},
        {"completions": ["1 + 1 = 2"], "labels": [True]}],
    "prompt": [
        {"other": 1}, {"prompt": "", "answer": "2"}, {"prompt": [], "answer": "2"},
        {"prompt": 0.5, "answer": "2"}, {"prompt": [{"role": "user"}], "answer": "2"},
        {"prompt": ["x"], "answer": "2"}, {"prompt": {"role": "user"}, "answer": "2"}]}


@pytest.mark.parametrize("name", SCRIPTS)
def test_rows_of_every_wrong_form_are_dropped_and_counted(name, data, write_jsonl, ends, capsys):
    """One alone is an error that names file, row and columns; among good ones it is counted."""
    for bad in BAD_ROWS[KIND[name]]:
        file = write_jsonl([bad])
        line = ends(name, dataset=file)
        assert file in line and "row 1: " in line, bad
        assert f"columns: {', '.join(bad)}"[:60] in line, bad
        assert "object has no attribute" not in line and "not subscriptable" not in line, line


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_bad_row_among_good_ones_costs_only_itself(name, data, tmp_path, capsys):
    good = (data / f"{KIND[name]}_train.jsonl").read_text().splitlines()
    (tmp_path / "rows.jsonl").write_text("\n".join([*good[:2], '{"other": 1}', *good[2:]]))
    command(name, small_args(name, data, tmp_path / "run", dataset=tmp_path / "rows.jsonl",
                             max_steps=1))
    out = capsys.readouterr().out
    assert f"12 rows, {22 if name == 'kto' else 11} examples; " in out
    assert "; 1 rows cannot be used, the first is row 3: " in out


@pytest.mark.parametrize("name", ONLINE)
@pytest.mark.parametrize("answer", [{}, {"answer": None}, {"answer": "none"}, {"answer": "(3, 5)"}])
def test_a_row_without_a_number_is_of_no_use_to_correct_answer(name, answer, write_jsonl, ends):
    line = ends(name, dataset=write_jsonl([{"prompt": "x"} | answer]), reward="correct_answer")
    assert "row 1: no plain number as its answer: " in line and "math_answer" in line


@pytest.mark.parametrize("name", ["reward_model", "prm", *ONLINE])
def test_rows_longer_than_max_length_leave_nothing(name, ends):
    """Where nothing is cut: comparisons, solutions and prompts."""
    assert "row 1: " in ends(name, max_length=4)


@pytest.mark.parametrize("margin", ["big", float("nan"), float("inf")])
def test_a_margin_must_be_a_finite_number(margin, write_jsonl, ends):
    row = {"prompt": USER, "chosen": say("y"), "rejected": say("z"), "margin": margin}
    assert "row 1: " in ends("reward_model", dataset=write_jsonl([row]))


BAD_FILES = {
    "empty": b"", "no json": b'{"prompt": "x"}\n{"prompt": "y",}\n', "no rows": b"[]",
    "numbers": b"[1]\n", "not utf-8": b'{"text": "\xff\xfe"}\n',
    "a lone surrogate": b'{"prompt": "\\ud800", "text": "\\ud800", "messages": "\\ud800"}\n'}


@pytest.mark.parametrize("content", BAD_FILES)
@pytest.mark.parametrize("name", SCRIPTS)
def test_files_that_cannot_be_read_are_named_with_the_cause(name, content, tmp_path, ends):
    """`datasets` says only that "an error occurred": the reason is what the user needs."""
    file = tmp_path / "bad.jsonl"
    file.write_bytes(BAD_FILES[content])
    for flag in "dataset", "eval_dataset":
        line = ends(name, **{flag: file})
        assert str(file) in line and not line.endswith("An error occurred while generating the "
                                                       "dataset"), line


@pytest.mark.parametrize("name", SCRIPTS)
def test_missing_data_and_wrong_splits_of_data_are_named(name, data, write_jsonl, tmp_path, ends):
    for flag in "dataset", "eval_dataset":
        assert "missing.jsonl" in ends(name, **{flag: tmp_path / "missing.jsonl"})
        assert "nobody/nothing" in ends(name, **{flag: "nobody/nothing"})
        assert "nobody/nothing" in ends(name, **{flag: "nobody/nothing:main"})
    file = data / f"{KIND[name]}_train.jsonl"
    assert str(file) in ends(name, dataset=file, eval_dataset=file)


@pytest.mark.parametrize("name", SCRIPTS)
def test_lone_surrogates_in_a_row_make_it_unusable(name, data, tmp_path, monkeypatch, refused):
    """No tokenizer takes them. (Files cannot hold them, other sources of rows can.)"""
    rows = [json.loads(line.replace("2", "\ud800").replace("1", "\ud800"))
            for line in (data / f"{KIND[name]}_train.jsonl").read_text().splitlines()]
    monkeypatch.setattr(common, "load_rows", lambda *args: rows[:1])
    line = refused(command, name, small_args(name, data, tmp_path / "run"))
    assert "row 1: " in line


# ---- rewards -------------------------------------------------------------------------------------

REWARDS = """
import sys
def leaves(completions, **columns):
    sys.exit(0)
def raises(completions, **columns):
    raise KeyError("no such thing")
def too_few(completions, **columns):
    return [0.0]
def nan(completions, **columns):
    return [float("nan")] * len(completions)
def words(completions, **columns):
    return ["good"] * len(completions)
def none(completions, **columns):
    print("\\x1b[2J")
def escapes(completions, **columns):
    raise ValueError("\\x1b[2J\\x07")
def no_columns(completions):
    return [1.0] * len(completions)
number = 5
"""


@pytest.mark.parametrize("name", ONLINE)
@pytest.mark.parametrize("reward, cause", [
    ("leaves", "SystemExit"), ("raises", "no such thing"), ("too_few", "but [0.0]"),
    ("nan", "nan"), ("words", "good"), ("none", "NoneType"), ("no_columns", "no_columns"),
    ("number", "plain function"), ("escapes", r"\x1b[2J\x07")])
def test_a_reward_that_fails_is_named_with_its_cause(
        name, reward, cause, data, tmp_path, refused):
    """Exit code 2, also if it calls sys.exit(0); then the same command goes on with it mended."""
    (tmp_path / "rewards.py").write_text(REWARDS)
    args = small_args(name, data, tmp_path / "run", reward=f"{tmp_path}/rewards.py:{reward}")
    line = refused(command, name, args)
    assert cause in line and f"rewards.py:{reward}" in line and "\x1b" not in line


@pytest.mark.parametrize("name", ONLINE)
def test_a_reward_that_is_not_there_is_named_before_a_model_is_loaded(
        name, data, tmp_path, ends, monkeypatch):
    """Also a reward model that is none, is broken, or sits on another base."""
    monkeypatch.setattr(common, "load_model", lambda *args: pytest.fail("the model was loaded"))
    (tmp_path / "rewards.py").write_text("import sys\nsys.exit(0)\n")
    (tmp_path / "broken.py").write_text("def (")
    for reward in ("rewards.py:f", "broken.py:f", "nowhere.py:f", "nowhere.py", "correct"):
        assert reward in ends(name, reward=reward if reward == "correct" else tmp_path / reward)
    (tmp_path / "rewards.py").write_text("")
    assert "absent" in ends(name, reward=f"{tmp_path}/rewards.py:absent")
    assert "nobody/nothing" in ends(name, reward="nobody/nothing")
    assert str(data / "chat") in ends(name, reward=data / "chat")
    assert "one base" in ends(name, reward="tiny/reward")
    make_adapter(data, tmp_path / "policy")
    assert "policy" in ends(name, reward=tmp_path / "policy")


@pytest.mark.parametrize("name", ONLINE)
@pytest.mark.parametrize("breakage", ["rank", "nan", "names", "no score", "cut"])
def test_a_broken_reward_model_is_named(name, breakage, data, tmp_path, ends):
    folder = tmp_path / "reward"
    shutil.copytree(data / "reward", folder)
    file = folder / "adapter_model.safetensors"
    weights = load_file(file)
    if breakage == "rank":
        change_json(folder / "adapter_config.json", r=8)
    elif breakage == "nan":
        change_weights(file, nan_in("lora"))
    elif breakage == "names":
        save_file({key.replace("lora_", "other_"): x for key, x in weights.items()}, file)
    elif breakage == "no score":
        save_file({key: x for key, x in weights.items() if "score" not in key}, file)
    else:
        file.write_bytes(file.read_bytes()[:1000])
    line = ends(name, reward=folder)
    assert str(folder) in line and "learning-rate" not in line


# ---- flags ---------------------------------------------------------------------------------------

NO_ZERO = """batch_size micro_batch_size sample_batch_size max_steps epochs max_length save_every
eval_size learning_rate temperature max_new_tokens group_size updates minibatches epsilon
epsilon_high target_kl""".split()


def refuses_flag(module, refused, monkeypatch, flag, *values):
    monkeypatch.setattr(sys, "argv", [f"{module.__name__}.py", flag, *values])
    return refused(common.parse, module.flags, module.TINY, getattr(module, "BY_LOSS", None))


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_number_on_the_command_line_is_checked(name, refused, monkeypatch):
    """Negative, not finite, zero where that makes no sense, or no number at all."""
    module = SCRIPTS[name]
    checked = set()
    for action in module.flags._actions:
        flag = action.option_strings[0] if action.option_strings else ""
        if action.type:
            values = ["nan", "inf", "-inf", "x", "", "1e400"]
            values += ["-1"] * (action.dest != "reward_weights")
            for value in values + ["0"] * (action.dest in NO_ZERO):
                line = refuses_flag(module, refused, monkeypatch, f"{flag}={value}")
                assert flag in line, (flag, value)
            checked.add(action.dest)
        elif action.choices:
            assert flag in refuses_flag(module, refused, monkeypatch, flag, "some")
    assert {"batch_size", "learning_rate", "seed", "max_steps", "lora_rank"} <= checked


@pytest.mark.parametrize("name", SCRIPTS)
def test_unknown_flags_and_words_are_refused(name, refused, monkeypatch):
    module = SCRIPTS[name]
    assert "--bogus" in refuses_flag(module, refused, monkeypatch, "--bogus", "1")
    assert "stray" in refuses_flag(module, refused, monkeypatch, "stray")
    assert "--seed" in refuses_flag(module, refused, monkeypatch, "--seed")


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_tracker_that_is_not_installed_is_named(name, ends, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    assert "wandb" in ends(name, track="wandb")


@pytest.mark.parametrize("name, flags, words", [
    ("grpo", {"reward_weights": [1, 2]}, "--reward-weights"),
    ("grpo", {"loss": "dapo", "baseline": "none"}, "--baseline"),
    ("grpo", {"reward": ["correct_answer"] * 2, "reward_weights": [1, 1]}, "--reward"),
    ("ppo", {"batch_size": 2, "minibatches": 3}, "--minibatches")])
def test_flags_that_contradict_each_other_are_refused(name, flags, words, ends):
    assert words in ends(name, **flags)


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_model_that_blows_up_says_so(name, data, tmp_path, refused):
    """Its gradient is not finite: the line names the flag that is most likely too high."""
    epochs = {} if name in ("grpo", "online_dpo") else {"epochs": 10}
    args = small_args(name, data, tmp_path / "run", learning_rate=1e9, max_steps=30, **epochs)
    assert "--learning-rate" in refused(command, name, args)


# ---- the terminal --------------------------------------------------------------------------------

@pytest.mark.parametrize("name", SCRIPTS)
def test_control_characters_of_the_data_do_not_reach_the_terminal(name, data, tmp_path, capsys):
    """Neither from rows, which are shown as examples and answers, nor from rows that fail."""
    evil = r"\u001b[2J\u001b]0;title\u0007\r\u009b"
    files = {}
    for part in "train", "heldout":
        text = (data / f"{KIND[name]}_{part}.jsonl").read_text()
        text = text.replace('"content": "', f'"content": "{evil}')
        file = tmp_path / f"{part}.jsonl"
        file.write_text(text + f'\n{{"{evil}": 5}}')
        files["dataset" if part == "train" else "eval_dataset"] = file
    command(name, small_args(name, data, tmp_path / "run", max_steps=1, eval_size=9, **files))
    said = capsys.readouterr()
    assert r"\x1b[2J" in said.out and "cannot be used" in said.out
    shown = said.out.replace("\033[32m", "").replace("\033[0m", "")
    assert all(c.isprintable() or c == "\n" for c in shown), ascii(shown)


@pytest.mark.parametrize("error, words", [
    (KeyboardInterrupt(), "interrupted; the same command resumes"),
    (torch.OutOfMemoryError("CUDA out of memory"), "out of memory: lower --these-flags"),
    (MemoryError(), "out of memory: lower --these-flags"),
    (RuntimeError("DefaultCPUAllocator: can't allocate memory"), "lower --these-flags"),
    (OSError(28, "No space left on device"), "disk is full"),
    (OSError(122, "Disk quota exceeded"), "disk is full"),
    (RuntimeError("[enforce fail at inline_container.cc:672] unexpected pos 64"), "disk is full")])
def test_what_hits_the_whole_run_says_what_to_do(error, words, refused):
    """Wherever in the run it happens."""
    def run(within):
        with common.running("--these-flags"), within:
            raise error

    assert words in refused(run, contextlib.nullcontext())
    if isinstance(error, KeyboardInterrupt | torch.OutOfMemoryError):
        assert words in refused(run, common.phase("loading the model"))


def test_a_mistake_of_the_program_is_not_hidden():
    """What no user can mend keeps its traceback."""
    with pytest.raises(ZeroDivisionError), common.running("--these-flags"):
        raise ZeroDivisionError
