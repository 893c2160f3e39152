"""What must hold for the scripts as a whole: their form, their flags, the embedded data."""
import ast
import importlib
import json
import re
import sys
from collections import defaultdict
from pathlib import Path

import common
import plot
import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = sorted(ROOT.glob("*.py"))
OWN = {"Args", "main", "train", "check", "collate", "encode", "evaluate"}  # what each script has in a form of its own


def definitions(path):
    source = path.read_text()
    return {node.name: ast.get_source_segment(source, node) for node in ast.parse(source).body if isinstance(node, (ast.FunctionDef, ast.ClassDef))}


def test_a_function_in_two_scripts_is_the_same_to_the_letter():
    copies = defaultdict(dict)
    for path in SCRIPTS:
        for name, text in definitions(path).items():
            copies[name].setdefault(text, []).append(path.name)
    assert {name: list(texts.values()) for name, texts in copies.items() if len(texts) > 1 and name not in OWN} == {}


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_every_flag_is_read(path):
    """A field of Args that no line of its script reads would be a promise that nothing keeps."""
    tree = ast.parse(path.read_text())
    fields = {line.target.id for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "Args" for line in node.body if isinstance(line, ast.AnnAssign)}
    read = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load)
            and isinstance(node.value, ast.Name) and node.value.id == "args"}
    assert fields - read == set()


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_scripts_import_common_and_libraries_only(path):
    names = {path.stem for path in SCRIPTS} - {"common"}
    for node in ast.walk(ast.parse(path.read_text())):
        imported = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        assert not names & {name.split(".")[0] for name in imported} and "trl" not in imported


@pytest.mark.parametrize("script, scorer", [("sft", "score_rows"), ("reward_model", "score_comparisons"), ("dpo", "score_pairs")])
def test_epochs_shuffle_anew_and_no_held_out_prompt_is_trained_on(script, scorer, tmp_path, write_jsonl, monkeypatch):
    """Seven questions, two rows each: both epochs see the same rows in another order, and none whose question is held out."""
    module, seen = importlib.import_module(script), {True: [], False: []}
    original = getattr(module, scorer)

    def spy(model, rows, *rest):
        seen[torch.is_grad_enabled()] += [tuple(example["prompt"]) for row in rows for example in (row if script == "sft" else [row])]
        return original(model, rows, *rest)
    monkeypatch.setattr(module, scorer, spy)
    data = [{"prompt": [{"role": "user", "content": f"{i} + {i}"}], "chosen": [{"role": "assistant", "content": str(2 * i)}],
             "rejected": [{"role": "assistant", "content": str(3 * i + j)}]} for i in range(1, 8) for j in (0, 1)]
    data = [{"messages": row["prompt"] + row["chosen"]} for row in data] if script == "sft" else data
    module.train(module.Args(model="tiny/chat", dataset=write_jsonl(data), output_dir=str(tmp_path / "run"), epochs=2, batch_size=1, eval_size=2))
    first, second = seen[True][:len(seen[True]) // 2], seen[True][len(seen[True]) // 2:]
    assert len(first) >= 10 and sorted(first) == sorted(second) and first != second
    assert seen[False] and not set(seen[True]) & set(seen[False])


def rows(name):
    return [json.loads(line) for line in (ROOT / "tiny/data" / name).read_text().splitlines()]


def asked(text):
    """The question of a tiny prompt: its two numbers in order of size, and whether they are added."""
    numbers = sorted(int(n) for n in re.findall(r"\d+", text))
    return *numbers, any(word in text for word in ("+", "Add", "gets"))


@pytest.mark.parametrize("kind", ["sft", "preference", "prompt"])
def test_held_out_questions_are_in_no_training_file(kind):
    trained = {asked(row.get("prompt", row.get("messages"))[0]["content"]) for name in ("sft", "preference", "prompt") for row in rows(f"{name}_train.jsonl")}
    held_out = {asked(row.get("prompt", row.get("messages"))[0]["content"]) for row in rows(f"{kind}_heldout.jsonl")}
    assert len(held_out) > 250 and len(trained) > 2000 and not trained & held_out


def test_tiny_answers_are_right_and_rejected_ones_wrong():
    for row in rows("preference_train.jsonl") + rows("preference_heldout.jsonl"):
        small, large, plus = asked(row["prompt"][0]["content"])
        right = small + large if plus else large - small
        value = {side: int(row[side][0]["content"].split()[-1]) for side in ("chosen", "rejected")}
        assert value["chosen"] == right != value["rejected"]
    for row in rows("prompt_heldout.jsonl"):
        small, large, plus = asked(row["prompt"][0]["content"])
        assert int(row["answer"]) == (small + large if plus else large - small)


def test_the_tiny_model_is_what_the_readme_says():
    from transformers import AutoConfig, AutoModelForCausalLM
    for name in ("tiny/base", "tiny/chat"):
        assert AutoConfig.from_pretrained(ROOT / name).model_type == "qwen2"
        assert 0.8e6 < sum(p.numel() for p in AutoModelForCausalLM.from_pretrained(ROOT / name).parameters()) < 1.2e6
    base = common.load_tokenizer("tiny/base")
    assert base.eos_token == "<|endoftext|>" and "<|im_end|>" in base.get_vocab()


def test_plot_draws_a_panel_for_each_metric_and_all_runs(tmp_path, monkeypatch):
    """Two runs that logged different numbers: titles for all of them, labels on both axes, a line a run."""
    for name, extra in (("a", {"kl": 0.1}), ("b", {"reward": 1.0})):
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.jsonl").write_text("".join(json.dumps({"step": s, "loss": 1 / s} | extra) + "\n" for s in (1, 2, 3)))
    kept = []
    monkeypatch.setattr(plot.plt, "subplots", lambda *args, original=plot.plt.subplots, **kwargs: kept.append(original(*args, **kwargs)) or kept[0])
    plot.draw([str(tmp_path / "a"), str(tmp_path / "b")], tmp_path / "curves.png")
    axes = [axis for axis in kept[0][1].flat if axis.get_visible()]
    assert [axis.get_title() for axis in axes] == ["loss", "kl", "reward"]
    assert all(axis.get_xlabel() and axis.get_ylabel() for axis in axes)
    assert [line.get_label() for line in axes[0].lines] == [str(tmp_path / "a"), str(tmp_path / "b")]
    assert list(axes[0].lines[1].get_ydata()) == [1, 1 / 2, 1 / 3]
    assert (tmp_path / "curves.png").read_bytes()[:4] == b"\x89PNG"


def test_plot_leaves_out_a_line_that_is_still_being_written(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 1.0}\n{"step": 2, "lo')
    assert plot.read_metrics(str(tmp_path)) == [{"step": 1, "loss": 1.0}]


@pytest.mark.parametrize("output", ["mine.png", "none/x.png", "x.txt"])
def test_plot_writes_only_new_pictures(output, tmp_path, monkeypatch, refused):
    monkeypatch.chdir(tmp_path)
    Path("metrics.jsonl").write_text('{"step": 1, "loss": 1.0}\n')
    Path("mine.png").write_text("mine")
    monkeypatch.setattr(sys, "argv", ["plot.py", ".", "--output", output])
    assert f"--output {output} must be a new .png" in refused(plot.main) and Path("mine.png").read_text() == "mine"


@pytest.mark.parametrize("content, words", [(None, "holds no metrics.jsonl"), ("", "is empty"), ('{"step": 1}\n{\n', "line 2"), ("12\n", "line 1"), ('{"a": 1}\n', "line 1")])
def test_plot_refuses_what_is_no_run(content, words, tmp_path, refused):
    if content is not None:
        (tmp_path / "metrics.jsonl").write_text(content)
    assert words in refused(plot.read_metrics, str(tmp_path))
