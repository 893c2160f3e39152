"""Each figure in the table of evaluate.py, by brute force, for answers that are known."""
import itertools
import json
import random
import shutil
from pathlib import Path

import by_hand
import pytest
import torch
from conftest import ROOT
from runs_helper import arguments, scripted

import common
import evaluate

PROMPTS = [{"prompt": [{"role": "user", "content": f"What is {a} + 1?"}], "answer": str(a + 1)}
           for a in range(1, 7)]


@pytest.fixture
def table(tmp_path, write_jsonl, capsys):
    """Runs the program; returns the table that it saved, and what it printed."""
    def run(*checkpoints, rows=PROMPTS, **flags):
        output = tmp_path / "table.json"
        flags = {"dataset": write_jsonl(rows), "output": output, "max_new_tokens": 8} | flags
        evaluate.main(arguments(evaluate, *checkpoints, **flags))
        lines = json.loads(output.read_text())
        output.unlink()
        return lines, capsys.readouterr().out
    return run


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    """A run on tiny/chat that has changed it a little."""
    return by_hand.save_adapter(tmp_path_factory.mktemp("adapter"), std=0.1)


# ---- formulas ------------------------------------------------------------------------------------

def test_pass_at_k_is_the_share_of_draws_with_a_correct_one():
    """By counting every way to draw k of n samples."""
    for count, correct in itertools.product((1, 4, 6), range(7)):
        for k in range(1, count + 1 if correct <= count else 1):
            samples = [i < correct for i in range(count)]
            draws = [any(draw) for draw in itertools.combinations(samples, k)]
            found = evaluate.pass_at_k(correct, count, k)
            assert found == pytest.approx(sum(draws) / len(draws)), f"pass@{k}: is it unbiased?"


def test_wilson_interval():
    for correct, count, low, high in [  # R: binom::binom.wilson
            (0, 10, 0.0, 0.27753), (5, 10, 0.23659, 0.76341), (81, 263, 0.25529, 0.36621)]:
        assert evaluate.wilson(correct / count, count) == pytest.approx((low, high), abs=2e-4)


def test_each_way_to_pick_is_what_a_search_finds():
    """The first answer; the first of the most frequent numbers; the first best score; any."""
    draw = random.Random(0)
    for _ in range(300):
        texts = [draw.choice(["7", "so 7", "7.0", "8", "9", "none"]) for _ in range(5)]
        correct = [float(evaluate.last_number(text) == 8) for text in texts]
        scores = [draw.choice([0.0, 0.5, 1.0]) for _ in range(5)]
        first = slice(4)  # of the five samples
        numbers = [None if text == "none" else float(text.split()[-1]) for text in texts[first]]
        votes = [sum(x == y for y in numbers) if x is not None else 0 for x in numbers]
        leader = numbers[votes.index(max(votes))]
        top = scores[first].index(max(scores[first]))
        assert evaluate.pick(4, texts, scores, correct) == {
            "first": correct[0], "majority": leader == 8, "best": correct[top],
            "oracle": 8 in numbers}, f"picked of {texts[first]} with scores {scores[first]}"


def test_the_worked_example_of_the_docstring(monkeypatch):
    """The functions of the script give its numbers."""
    assert [evaluate.pass_at_k(1, 4, k) for k in (1, 2, 4)] == [0.25, 0.5, 1.0]
    assert "pass@1 = 1 − 3/4 = 0.25    pass@2 = 1 − 3/6 = 0.5    pass@4 = 1" in evaluate.__doc__
    texts = ["so 8", "so 7", "it is 8", "no number"]
    picked = evaluate.pick(4, texts, [0.2, 0.9, 0.4, 0.1], [0, 1, 0, 0])
    assert picked == {"first": 0, "majority": 0, "best": 1, "oracle": 1}
    logps = {"model": torch.tensor([[-2.0], [-3.0]]), "first": torch.tensor([[-4.0], [-3.5]])}
    monkeypatch.setattr(evaluate, "token_logps", lambda model, batch, temperature: logps[model])
    ratios = evaluate.answer_log_ratios("model", "first", None, 1.0)
    assert ratios.mean() == 1.25, f"KL: expected 1.25, got {ratios.mean()}: is the sign flipped?"
    assert evaluate.wilson(0.6, 300) == pytest.approx((0.544, 0.654), abs=5e-4)
    assert "= 1.25" in evaluate.__doc__ and "interval 0.544 to 0.654" in evaluate.__doc__


# ---- the figures of a line -----------------------------------------------------------------------

def test_each_figure_is_what_its_name_says(table, monkeypatch):
    """Greedy and sampled answers are counted by hand; no group mixes prompts."""
    sample = scripted({"1 + 1": ["2"], "2 + 1": ["9", "9", "9", "3..."], "3 + 1": ["9"]},
                      greedy={"1 + 1": "2", "2 + 1": "9", "3 + 1": "4"})
    monkeypatch.setattr(evaluate, "sample", sample)
    (line,), printed = table("tiny/chat", size=3, k=2, temperature=0.7, seed=5, micro_batch_size=4)
    assert "3 rows, 3 examples" in printed, "--size"
    tail = len(common.load_tokenizer("tiny/chat")("3...")["input_ids"])
    expected = {"greedy": 2 / 3, "sampled": 5 / 12, "reward": 5 / 12, "pass@k": (1 + 0.5 + 0) / 3,
                "stopped": 11 / 12, "length": (11 * 2 + tail) / 12}
    for name, value in expected.items():
        assert line[name] == pytest.approx(value), name
    assert line["kl"] is None and "pass@2" in printed and "0.417" in printed
    for name in evaluate.SHARES:
        interval = evaluate.wilson(expected[name], 3)
        assert line[f"{name}_interval"] == pytest.approx(interval), "it counts prompts"
    sampled = [(temperature, seed) for _, n, temperature, seed in sample.calls if n > 1]
    assert {temperature for temperature, _ in sampled} == {0.7}
    assert len({seed for _, seed in sampled}) == 3 and sampled[0][1] == 5
    assert all(temperature < 1e-3 for _, n, temperature, _ in sample.calls if n == 1)


@pytest.mark.parametrize("first, temperature", [
    ("tiny/chat", 1.0), ("tiny/chat", 1.5), ("tiny/base", 1.0)])
def test_kl_is_the_mean_log_ratio_to_the_first_of_three(first, temperature, adapter, table,
                                                        monkeypatch):
    """By plain forward passes at the temperature of the samples.

    The first checkpoint is the base of an adapter or another model. It is loaded only once.
    """
    seen, loaded = [], []
    sample, load = evaluate.sample, common.load_model

    def keep(model, tokenizer, prompts, copies, args, seed):
        answers = sample(model, tokenizer, prompts, copies, args, seed)
        if copies > 1:
            asked = [prompt for prompt in prompts for _ in range(copies)]
            seen.append(list(zip(asked, answers, strict=True)))
        return answers

    monkeypatch.setattr(evaluate, "sample", keep)
    monkeypatch.setattr(common, "load_model", lambda *args, **kw: loaded.append(args[0]) or load(
        *args, **kw))
    names = [first, "tiny/base" if first == "tiny/chat" else "tiny/chat", adapter]
    lines, _ = table(*names, rows=PROMPTS[:3], temperature=temperature)
    assert loaded == names, "each checkpoint is loaded once"
    models = [load(name, trainable=False) for name in names]
    for line, model, answers in zip(lines[1:], models[1:], seen[1:], strict=True):
        ratios = []
        for pair in answers:
            own, base = (by_hand.logps(m, *pair, temperature).sum() for m in (model, models[0]))
            ratios.append((own - base).item())
        expected = sum(ratios) / len(ratios)
        assert abs(expected) > 1e-3 and line["kl"] == pytest.approx(expected, abs=1e-4), (
            f"KL of {line['checkpoint']} to the first: wrong sign, temperature or checkpoint?")
    assert lines[0]["kl"] is None


def test_best_of_n_reads_the_first_n_samples_of_each_prompt(table, monkeypatch):
    """Counted by hand, with intervals over prompts; the other figures use all samples."""
    sample = scripted({"1 + 1": ["9", "8", "2", "8", "2"], "2 + 1": ["3", "4", "4", "4", "4"],
                       "3 + 1": ["7", "4 ", "4", "7", "9"]})
    monkeypatch.setattr(evaluate, "sample", sample)
    monkeypatch.setattr(evaluate, "load_scorer", lambda *_: lambda completions, **_: [
        len(text) + (text == "3") for text in completions])
    flags = {"reward": "mine.py:f", "micro_batch_size": 10, "rows": PROMPTS[:3]}
    (line,), printed = table("tiny/chat", best_of=3, samples_per_prompt=5, k=2, **flags)
    expected = {"first": 1 / 3, "majority": 1 / 3, "best": 2 / 3, "oracle": 1.0}
    for name, share in expected.items():
        assert line[name] == pytest.approx(share), name
        assert line[f"{name}_interval"] == pytest.approx(evaluate.wilson(share, 3))
    assert line["sampled"] == pytest.approx(5 / 15)
    assert line["pass@k"] == pytest.approx((0.7 + 0.4 + 0.7) / 3)  # 1 − (3 of 10 draws) and so on
    assert all(name in printed for name in evaluate.PICKS) and "one of 3 samples" in printed
    table("tiny/chat", best_of=5, **flags)  # raises the number of samples to 5
    assert {copies for _, copies, *_ in sample.calls} == {1, 5}
    (line,), printed = table("tiny/chat", **flags)
    assert not set(evaluate.PICKS) & line.keys() and "oracle" not in printed


# ---- errors, and the runs that are found ---------------------------------------------------------

def test_errors_show_before_anything_is_measured(tmp_path, write_jsonl, refused, monkeypatch):
    monkeypatch.setattr(evaluate, "measure", None)
    monkeypatch.setattr(common, "load_model", None)
    for argv, words in (
            (["no/such/model"], "no/such"), (["--reward", f"{tmp_path}/mine.py:f"], "mine.py:f"),
            (["--dataset", f"{tmp_path}/none.jsonl"], "none.jsonl"),
            (["--dataset", write_jsonl([{"prompt": "without an answer"}])], "0 examples")):
        assert words in refused(evaluate.main, arguments(evaluate, "tiny/chat", *argv))


def test_checkpoints_that_can_read_other_rows_are_not_compared(tmp_path, table, refused):
    """A model with a shorter context drops a prompt that the other model reads."""
    short = shutil.copytree(ROOT / "tiny/chat", tmp_path / "short")
    values = json.loads((short / "config.json").read_text()) | {"max_position_embeddings": 40}
    (short / "config.json").write_text(json.dumps(values))
    long = {"prompt": [{"role": "user", "content": "1 + 1? " * 6}], "answer": "2"}
    assert "can use different rows" in refused(table, "tiny/chat", short, rows=[*PROMPTS[:1], long])


def test_tiny_runs_are_found_and_others_left_out(tmp_path, monkeypatch, adapter, refused, table):
    """Finished policies on the tiny model. A broken run matters only if runs are looked for."""
    monkeypatch.chdir(tmp_path)
    for name, method in (("b", "dpo"), ("a", "sft"), ("r", "reward_model"), ("p", "prm")):
        shutil.copytree(adapter, Path("runs", name))
        Path("runs", name, "summary.json").write_text(json.dumps({"method": method}))
    Path("runs/unfinished").mkdir()
    assert evaluate.tiny_runs() == ["runs/a", "runs/b"]
    Path("runs/unfinished/summary.json").write_text("{")
    assert "runs/unfinished/summary.json" in refused(evaluate.tiny_runs)
    assert len(table("tiny/chat", rows=PROMPTS[:1])[0]) == 1
