"""experiments/compare.py: the scripts accept its commands, and its plots show what was measured."""
import importlib
import importlib.util
import json
import math

import pytest
import torch
from conftest import ROOT
from runs_helper import command, small_args, write_data

import common
import dpo

spec = importlib.util.spec_from_file_location("compare", ROOT / "experiments/compare.py")
compare = importlib.util.module_from_spec(spec)
spec.loader.exec_module(compare)
EVERY = compare.METHODS | compare.EXTRA
RUNS = compare.plan(compare.make_flags().parse_args(["--runs", "r"]))


@pytest.mark.parametrize("run", RUNS[:len(EVERY)], ids=lambda run: run["name"])
def test_the_scripts_take_their_commands(run):
    """The parsers of the scripts accept every flag, and a run writes to the folder of its plan."""
    for words in filter(None, (run["training"], run["sampling"])):
        module = importlib.import_module(words[0].removesuffix(".py"))
        args = module.make_flags().parse_args(words[1:])
        assert args.seed == run["seed"] and "{" not in " ".join(words)
    assert run["training"][-1] == str(run["folder"]) == f"r/{run['name']}_{run['seed']}"
    if run["sampling"]:
        assert args.output in run["training"]  # RAFT trains on the file that was sampled


def test_every_run_is_planned_once_and_drawn():
    assert len({str(run["folder"]) for run in RUNS}) == len(RUNS) == (
        3 * len(compare.METHODS) + len(compare.EXTRA))
    drawn = [name for _, names in compare.FAMILIES.values() for name in names]
    assert sorted(drawn) == sorted(compare.METHODS)
    pairs = [(normal[0], failing[0]) for _, normal, failing, _ in compare.FAILURES.values()]
    assert {name for pair in pairs for name in pair} >= set(compare.EXTRA)
    for normal, failing in pairs:
        assert EVERY[normal].split()[0] == EVERY[failing].split()[0]


def test_checkpoints_of_a_run_are_the_policy_at_their_steps(tmp_path, monkeypatch):
    write_data(tmp_path)
    folder, seen = tmp_path / "run", {}
    save = dpo.save

    def keep(args, state, *rest):
        save(args, state, *rest)
        compare.keep_state(folder, 30, state["step"])
        compare.keep_state(folder, 30, 99)  # nothing new was saved, so nothing is kept
        seen[state["step"]] = torch.load(folder / "resume.pt", weights_only=True)["weights"]

    monkeypatch.setattr(dpo, "save", keep)
    command("dpo", small_args("dpo", tmp_path, folder, max_steps=2, save_every=1))
    states = compare.read_states(folder)
    assert {step: state["cpu_seconds"] for step, state in states.items()} == {1: 31, 2: 32}
    checkpoints = compare.write_checkpoints(folder, states)
    ids, logits = torch.arange(20, 30)[None], []
    model = common.load_model(str(folder))
    for weights, name in zip(seen.values(), checkpoints, strict=True):
        compare.load_weights(model, weights)
        merged = common.load_model(name, lora_rank=0, trainable=False)
        logits.append(merged(ids).logits)
        assert torch.allclose(logits[-1], common.causal_lm(model)(ids).logits, atol=1e-4)
    assert not torch.allclose(*logits, atol=1e-4)
    with pytest.raises(ValueError, match="no copy of its last checkpoint"):
        compare.write_checkpoints(folder, {1: states[1]})


def test_the_smallest_kl_is_that_of_two_coins():
    assert compare.least_kl(0.5, 0.5) == 0
    assert math.isclose(compare.least_kl(1, 0.5), math.log(2))
    assert math.isclose(compare.least_kl(0.9, 0.6), 0.9 * math.log(1.5) + 0.1 * math.log(0.25))


def test_answers_are_counted_as_the_page_says():
    for method, answers in ("sft", 16), ("dpo", 32), ("ppo", 16), ("grpo", 128):
        summary = {"method": method, "batch_size": 16, "group_size": 8}
        assert compare.answers_per_step(summary) == answers, method


def test_the_bars_show_the_means_of_the_results(tmp_path, monkeypatch):
    """The lengths and labels of all eleven bars, for the compare.json of the repository."""
    results = json.loads((ROOT / "experiments/results/compare.json").read_text())["runs"]
    figures = []
    monkeypatch.setattr(compare, "save_figure", lambda figure, file: figures.append(figure))
    compare.draw_accuracy(results, tmp_path / "accuracy.png")
    axis = figures[0].axes[0]
    drawn = dict(zip([label.get_text() for label in axis.get_yticklabels()],
                     [before.get_width() + gain.get_width() for before, gain in
                      zip(axis.patches[::2], axis.patches[1::2], strict=True)], strict=True))
    for _, names in compare.FAMILIES.values():
        for name, label in names.items():
            ends = [run["points"][-1]["sampled"] for run in results if run["name"] == name]
            assert math.isclose(drawn[label], sum(ends) / len(ends)), label
