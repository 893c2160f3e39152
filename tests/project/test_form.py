"""What must hold for the project as a whole: how its files read, its pictures and its data."""
import ast
import io
import json
import re
import sys
import tokenize
from collections import defaultdict
from pathlib import Path

import pytest
from transformers import AutoConfig, AutoModelForCausalLM

import common
import plot

ROOT = Path(__file__).resolve().parents[2]
METHODS = ["sft", "reward_model", "prm", "dpo", "kto", "online_dpo", "ppo", "grpo"]
# the most lines of code that a script may have: room, not a target
ROOM = {"common": 834, "sft": 330, "reward_model": 275, "dpo": 325, "kto": 345, "online_dpo": 370,
        "ppo": 450, "grpo": 460, "prm": 315, "pairs": 330, "evaluate": 340, "chat": 185,
        "plot": 140}
NO_CODE = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT,
           tokenize.ENDMARKER}
SCRIPTS = [ROOT / f"{name}.py" for name in ROOM]  # a reader may put files of his own beside them
# what each script has in a form of its own: the loop, and what scores a batch
OWN = {"main", "train", "evaluate", "describe", "rollout"}
each_script = pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
each_method = pytest.mark.parametrize("name", METHODS)


def functions(path):
    """The functions and classes of a file by name."""
    body = ast.parse(path.read_text()).body
    return {node.name: node for node in body if isinstance(node, ast.FunctionDef | ast.ClassDef)}


def depth(node):
    """How many statements are nested in each other below `node`."""
    inner = [depth(child) for child in ast.iter_child_nodes(node)]
    blocks = ast.For | ast.While | ast.If | ast.With | ast.Try
    return max(inner, default=0) + isinstance(node, blocks)


def code_lines(source):
    """How many lines hold code: those that are not blank, not a comment and not in a docstring."""
    lines = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in NO_CODE:
            lines.update(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(ast.parse(source)):
        documented = ast.Module | ast.FunctionDef | ast.ClassDef
        if isinstance(node, documented) and ast.get_docstring(node) is not None:
            lines -= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    return len(lines)


def test_code_lines_count_neither_prose_nor_blank_lines():
    source = '"""A\ndocstring."""\n\n# a comment\nx = """\ntext\n"""  # another\n'
    function = 'def f():\n    """Says."""\n    # why\n    return [\n\n        1]\n'
    assert code_lines(source) == 3 and code_lines(source + function) == 6


@each_script
def test_a_script_has_its_room(path):
    """Lines of code, and no line wider than 100 columns."""
    source = path.read_text()
    assert code_lines(source) <= ROOM[path.stem]
    assert max(map(len, source.splitlines())) <= 100


def test_all_other_files_keep_to_100_columns():
    folders = ["tests", "tiny", "benchmarks", "examples", "experiments", "site"]
    for path in [path for folder in folders for path in (ROOT / folder).rglob("*.py")]:
        assert max(map(len, path.read_text().splitlines())) <= 100, path.name


def test_a_function_of_one_name_is_the_same_everywhere():
    copies = defaultdict(dict)
    for path in SCRIPTS:
        source = path.read_text()
        for name, node in functions(path).items():
            copies[name].setdefault(ast.get_source_segment(source, node), []).append(path.name)
    drifted = {name: list(texts.values()) for name, texts in copies.items() if len(texts) > 1}
    assert {name: files for name, files in drifted.items() if name not in OWN} == {}


def test_housekeeping_is_the_same_everywhere():
    """From its heading to the end of the file."""
    parts = {(ROOT / f"{name}.py").read_text().partition("# ---- housekeeping")[2]
             .partition("\nif __name__")[0] for name in METHODS}
    assert len(parts) == 1 and parts.pop()


@each_method
def test_train_is_short_and_flat(name):
    """85 lines, 110 where there is sampling; numbered steps; nothing defined, no deep nesting."""
    path = ROOT / f"{name}.py"
    train = functions(path)["train"]
    source = ast.get_source_segment(path.read_text(), train)
    assert code_lines(source) <= (110 if name in ("ppo", "grpo") else 85)
    nested = ast.FunctionDef | ast.Lambda | ast.ClassDef
    assert not any(isinstance(node, nested) for node in ast.walk(train) if node is not train)
    assert depth(train) <= 4
    steps = re.findall(r"^ +# (\d+)\. ", ast.get_source_segment(path.read_text(), train), re.M)
    assert steps == [str(i + 1) for i in range(len(steps))] and len(steps) >= 7


@each_method
def test_losses_are_short(name):
    for function, node in functions(ROOT / f"{name}.py").items():
        if function.endswith(("_loss", "_losses")):
            source = ast.get_source_segment((ROOT / f"{name}.py").read_text(), node)
            assert code_lines(source) <= 25, function


@each_method
def test_every_flag_is_read(name):
    """A flag that no line reads would be a promise that nothing keeps."""
    source = (ROOT / f"{name}.py").read_text()
    flags = set(re.findall(r'^add\("--([a-z0-9-]+)"', source, re.M))
    shared = {"dataset", "eval-dataset", "split", "columns"}  # read by common.load_examples
    for flag in flags - shared:
        assert f"args.{flag.replace('-', '_')}" in source.replace("args.max_length,", "") or (
            flag in ("max-length", "eval-size")), flag
    assert len(flags) >= 18


@each_script
def test_scripts_import_common_and_libraries_only(path):
    names = {path.stem for path in SCRIPTS} - {"common"} | {"trl"}
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            assert not names & {alias.name.split(".")[0] for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            assert node.module.split(".")[0] not in names


# ---- the embedded default ------------------------------------------------------------------------

def rows(name):
    text = (ROOT / "tiny/data" / name).read_text()
    return [json.loads(line) for line in text.splitlines()]


def asked(row):
    """The question of a row: its two numbers in order of size, and whether they are added."""
    text = row.get("prompt", row.get("messages"))[0]["content"]
    numbers = sorted(int(number) for number in re.findall(r"\d+", text))
    return *numbers, any(word in text for word in ("+", "Add", "gets"))


@pytest.mark.parametrize("kind", ["sft", "preference", "prompt"])
def test_held_out_questions_are_in_no_training_file(kind):
    files = [f"{name}_train.jsonl" for name in ("sft", "preference", "prompt")]
    trained = {asked(row) for file in files for row in rows(file)}
    held_out = {asked(row) for row in rows(f"{kind}_heldout.jsonl")}
    assert len(held_out) > 250 and len(trained) > 2000 and not trained & held_out


def test_tiny_answers_are_right_and_rejected_ones_wrong():
    for row in rows("preference_train.jsonl") + rows("preference_heldout.jsonl"):
        small, large, plus = asked(row)
        right = small + large if plus else large - small
        chosen, rejected = (row[side][0]["content"].split()[-1] for side in ("chosen", "rejected"))
        assert int(chosen) == right != int(rejected)
    for row in rows("prompt_heldout.jsonl") + rows("prompt_train.jsonl"):
        small, large, plus = asked(row)
        assert int(row["answer"]) == (small + large if plus else large - small)


STEPS = ["steps_train", "steps_sft_train", "steps_heldout", "steps_sft_heldout",
         "steps_prompt_heldout"]


def addends(row):
    """The numbers of a long sum, in the order of the question."""
    text = row.get("prompt", row.get("messages"))[0]["content"]
    assert re.fullmatch(r"What is \d+( \+ \d+)+\?|Add \d+(, \d+)+ and \d+\.", text), text
    return [int(number) for number in re.findall(r"\d+", text)]


def test_a_step_is_right_if_it_and_all_before_it_are_partial_sums():
    """After a wrong one none is right, whatever it says; both labels are there in plenty."""
    seen = []
    for row in rows("steps_train.jsonl") + rows("steps_heldout.jsonl"):
        numbers = addends(row)
        assert len(row["completions"]) == len(row["labels"])
        right = [f"{sum(numbers[:i])} + {numbers[i]} = {sum(numbers[:i + 1])}"
                 for i in range(1, len(numbers))]
        said = row["completions"]
        assert row["labels"] == [said[:i + 1] == right[:i + 1] for i in range(len(said))]
        seen += row["labels"]
    assert 0.5 < sum(seen) / len(seen) < 0.8


def test_solutions_for_sft_are_right_and_prompts_have_their_sums():
    for row in rows("steps_sft_train.jsonl") + rows("steps_sft_heldout.jsonl"):
        numbers = addends(row)
        assert row["messages"][1]["content"].split("\n") == [
            f"{sum(numbers[:i])} + {numbers[i]} = {sum(numbers[:i + 1])}"
            for i in range(1, len(numbers))]
    for row in rows("steps_prompt_heldout.jsonl"):
        assert int(row["answer"]) == sum(addends(row))


def test_held_out_long_sums_are_in_no_training_file_in_any_order():
    """Nor are the sums of two numbers that the other files hold out, as a step of a solution."""
    asked_in = {name: {tuple(sorted(addends(row))) for row in rows(f"{name}.jsonl")}
                for name in STEPS}
    trained = asked_in["steps_train"] | asked_in["steps_sft_train"]
    for name in STEPS:
        assert len(asked_in[name]) > (2000 if "train" in name else 250)
        assert "train" in name or not asked_in[name] & trained
    held_out = {asked(row) for row in rows("prompt_heldout.jsonl")}
    for row in rows("steps_train.jsonl") + rows("steps_sft_train.jsonl"):
        text = "\n".join(row["completions"] if "completions" in row
                         else [row["messages"][1]["content"]])
        for a, b in re.findall(r"(\d+) \+ (\d+) =", text):
            assert (*sorted((int(a), int(b))), True) not in held_out


def test_the_tiny_model_is_what_the_readme_says():
    for name in ("tiny/base", "tiny/chat"):
        assert AutoConfig.from_pretrained(ROOT / name).model_type == "qwen2"
        model = AutoModelForCausalLM.from_pretrained(ROOT / name)
        assert sum(p.numel() for p in model.parameters()) == 940_800
    base = common.load_tokenizer("tiny/base")
    assert base.eos_token == "<|endoftext|>" and "<|im_end|>" in base.get_vocab()


# ---- plot.py -------------------------------------------------------------------------------------

def log(folder, *steps):
    folder.mkdir(exist_ok=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(step) + "\n" for step in steps))
    return str(folder)


def test_plot_draws_a_panel_per_metric_and_all_runs(tmp_path, monkeypatch):
    """Titles for what any run logged, units on both axes, a line per run, gaps for None."""
    a = log(tmp_path / "a", {"step": 1, "loss": 2, "kl": 0.1}, {"step": 2, "loss": None, "kl": 1})
    b = log(tmp_path / "b", {"step": 1, "loss": 1, "rollout_seconds": 3})
    figures = []
    subplots = plot.plt.subplots

    def keep(*args, **kwargs):
        figures.append(subplots(*args, **kwargs))
        return figures[-1]

    monkeypatch.setattr(plot.plt, "subplots", keep)
    picture = plot.draw([a, b], tmp_path / "curves.png")
    axes = [axis for axis in figures[0][1].flat if axis.get_visible()]
    assert [axis.get_title() for axis in axes] == ["loss", "kl", "rollout seconds"]
    assert [axis.get_ylabel() for axis in axes] == ["loss", "nats per answer", "s"]
    assert {axis.get_xlabel() for axis in axes} == {"optimizer step or rollout"}
    assert [line.get_label() for line in axes[0].lines] == [a, b]
    assert [list(line.get_ydata()) for line in axes[0].lines] == [[2], [1]]
    assert picture[:4] == b"\x89PNG"


@pytest.mark.parametrize("given", [True, False])
def test_plot_overwrites_no_picture(given, tmp_path, refused):
    """Neither one that is named nor the default."""
    run = log(tmp_path / "run", {"step": 1, "loss": 2})
    picture = tmp_path / "mine.png" if given else tmp_path / "run/curves.png"
    picture.write_text("mine")
    args = plot.flags.parse_args([run] + (["--output", str(picture)] if given else []))
    assert "is there already" in refused(plot.main, args) and picture.read_text() == "mine"


@pytest.mark.parametrize("content", [None, "", '{"step": 1}\n{\n', "12\n", '{"a": 1}\n'])
def test_plot_refuses_what_is_no_run(content, tmp_path, refused):
    if content is not None:
        (tmp_path / "metrics.jsonl").write_text(content)
    assert f"reading the metrics of {tmp_path}" in refused(plot.read_metrics, str(tmp_path))


def test_plot_refuses_a_picture_it_cannot_write(tmp_path, refused):
    run = log(tmp_path / "run", {"step": 1, "loss": 2})
    for name, word in ("none/x.png", "writing"), ("x.txt", "drawing"):
        args = plot.flags.parse_args([run, "--output", str(tmp_path / name)])
        assert word in refused(plot.main, args)
    assert not any(path.suffix in (".png", ".html", ".txt") for path in tmp_path.rglob("*"))


# ---- examples/rewards.py -------------------------------------------------------------------------

@pytest.fixture
def rewards(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "examples")
    sys.modules.pop("rewards", None)
    import rewards
    return rewards


def test_shortness_falls_with_the_length(rewards):
    assert rewards.shortness(["q"] * 3, ["", "x" * 250, "x" * 2000]) == [1.0, 0.75, 0.0]


@pytest.mark.parametrize("answer, right, wrong", [
    ("(1, 2)", r"so \boxed{(1, 2)}", r"\boxed{2}"), (r"\frac{14}{3}", r"$\frac{28}{6}$", "it is 3"),
    (r"\{2, 1\}", r"\boxed{\{1, 2\}}", r"\boxed{1}"), ("3", "the answer is 3.", "the answer is 4")])
def test_math_answers_are_compared_as_what_they_mean(rewards, answer, right, wrong):
    pytest.importorskip("math_verify")
    scores = rewards.math_answer(["q"] * 2, [right, wrong], answer=[answer] * 2)
    assert scores == [1.0, 0.0]


def test_a_foreign_classifier_scores_the_whole_conversation(rewards, tmp_path, monkeypatch):
    """Its own tokenizer and template, texts and messages; the logit of a plain forward pass."""
    import torch
    from transformers import Qwen2Config, Qwen2ForSequenceClassification
    torch.manual_seed(0)
    tokenizer = common.load_tokenizer("tiny/chat")
    config = Qwen2Config(vocab_size=len(tokenizer), hidden_size=16, intermediate_size=24,
                         num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1,
                         num_labels=1, pad_token_id=tokenizer.pad_token_id)
    model = Qwen2ForSequenceClassification(config).eval()
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    monkeypatch.setenv("REWARD_MODEL", str(tmp_path))
    prompts = [[{"role": "user", "content": "1 + 1?"}], "1 + 1 ="]
    scores = rewards.classifier(prompts, ["2", " 2"])
    chat = [*prompts[0], {"role": "assistant", "content": "2"}]
    for score, ids in zip(scores, [common.to_ids(tokenizer, common.render(tokenizer, chat)),
                                   tokenizer("1 + 1 = 2")["input_ids"]], strict=True):
        with torch.no_grad():
            logit = model(input_ids=torch.tensor([ids])).logits[0, 0].item()
        assert score == pytest.approx(logit, abs=1e-5)
