"""The table: what each of its numbers is, against brute force over a model that can be read."""
import itertools
import json
import math
import random
from pathlib import Path

import pytest
import torch
from conftest import ROOT

import common
import evaluate

PROMPTS = [{"prompt": [{"role": "user", "content": f"What is {a} + 1?"}], "answer": str(a + 1),
            "kind": f"k{a}"} for a in range(1, 7)]


@pytest.fixture
def table(tmp_path, write_jsonl, capsys):
    """Runs the command and returns the table that it saved, and what it printed."""
    def run(*checkpoints, rows=PROMPTS, **flags):
        output = tmp_path / "table.json"
        flags = {"dataset": write_jsonl(rows), "output": output, "max_new_tokens": 8} | flags
        argv = list(checkpoints)
        for name, value in flags.items():
            argv += ["--" + name.replace("_", "-"), str(value)]
        evaluate.main(evaluate.make_flags().parse_args(argv))
        return json.loads(output.read_text()), capsys.readouterr().out
    return run


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    """A checkpoint that is not tiny/chat: an adapter on it with some noise."""
    folder = str(tmp_path_factory.mktemp("adapter"))
    torch.manual_seed(0)
    model = common.load_model("tiny/chat")
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.01)
    common.save_model(model, common.load_tokenizer("tiny/chat"), folder)
    return folder


# ---- formulas ------------------------------------------------------------------------------------

def test_pass_at_k_is_the_share_of_draws_with_a_right_one():
    """Every way to draw k of n samples, of which some are right."""
    for count, right in itertools.product((1, 4, 6), range(7)):
        for k in range(1, count + 1 if right <= count else 1):
            samples = [i < right for i in range(count)]
            draws = [any(draw) for draw in itertools.combinations(samples, k)]
            expected = sum(draws) / len(draws)
            assert evaluate.pass_at_k(right, count, k) == pytest.approx(expected)


@pytest.mark.parametrize("right, count, low, high", [  # R: binom::binom.wilson
    (0, 10, 0.0, 0.27753), (5, 10, 0.23659, 0.76341), (81, 263, 0.25529, 0.36621)])
def test_wilson_interval(right, count, low, high):
    interval = evaluate.wilson(right / count, count)
    assert interval == pytest.approx((low, high), abs=2e-4)


def test_wilson_covers_the_truth():
    """19 of 20 intervals hold the share that the samples were drawn with."""
    draw = random.Random(0)
    held = 0
    for _ in range(2000):
        share = sum(draw.random() < 0.8 for _ in range(40)) / 40
        low, high = evaluate.wilson(share, 40)
        held += low <= 0.8 <= high
    assert 0.93 < held / 2000 < 0.975


# ---- the numbers of a line -----------------------------------------------------------------------

def scripted(answers):
    """In place of `sample`: answers by prompt, then by sample, as texts; the calls are kept."""
    calls = []

    def sample(model, tokenizer, prompts, copies, args, seed):
        calls.append({"copies": copies, "temperature": args.temperature, "seed": seed})
        ids = []
        for prompt in prompts:
            text = tokenizer.decode(prompt)
            key = next(key for key in answers if key in text)
            for answer in answers[key][copies > 1][:copies]:
                end = [] if answer.endswith("...") else [tokenizer.eos_token_id]
                ids.append(tokenizer(answer)["input_ids"] + end)
        return ids
    return sample, calls


def test_each_figure_is_what_its_name_says(table, monkeypatch):
    """Greedy and sampled answers counted by hand; groups never mix prompts."""
    answers = {"1 + 1": (["2"], ["2", "2", "2", "2"]), "2 + 1": (["9"], ["9", "9", "9", "3..."]),
               "3 + 1": (["4"], ["9", "9", "9", "9"])}
    sample, calls = scripted(answers)
    monkeypatch.setattr(evaluate, "sample", sample)
    (line,), printed = table("tiny/chat", rows=PROMPTS[:3], k=2, temperature=0.7, seed=5,
                             micro_batch_size=4)
    assert line["greedy"] == pytest.approx(2 / 3)
    assert line["sampled"] == line["reward"] == pytest.approx(5 / 12)
    assert line["pass@k"] == pytest.approx((1 + 0.5 + 0) / 3)
    assert line["stopped"] == pytest.approx(11 / 12)
    tokenizer = common.load_tokenizer("tiny/chat")
    tail = len(tokenizer("3...")["input_ids"])
    assert line["length"] == pytest.approx((11 * 2 + tail) / 12)
    assert line["kl"] is None
    assert line["sampled_interval"] == pytest.approx(evaluate.wilson(5 / 12, 3))
    assert line["greedy_interval"] == pytest.approx(evaluate.wilson(2 / 3, 3))
    sampled = [call for call in calls if call["copies"] > 1]
    assert {call["temperature"] for call in sampled} == {0.7}
    assert len({call["seed"] for call in sampled}) == 3 and sampled[0]["seed"] == 5
    assert all(call["temperature"] < 1e-3 for call in calls if call["copies"] == 1)
    assert "pass@2" in printed and "0.417" in printed


@pytest.mark.parametrize("first, temperature", [
    ("tiny/chat", 1.0), ("tiny/chat", 1.5), ("tiny/base", 1.0)])
def test_kl_is_that_of_the_sampled_answers(first, temperature, adapter, table, monkeypatch):
    """The mean over answers of the sum of log π/π_first, from plain forward passes at T.

    The first is what the other is an adapter on, or a model of its own.
    """
    seen = []
    sample = evaluate.sample

    def keep(model, tokenizer, prompts, copies, args, seed):
        answers = sample(model, tokenizer, prompts, copies, args, seed)
        if copies > 1:
            prompts = [prompt for prompt in prompts for _ in range(copies)]
            seen.append(list(zip(prompts, answers, strict=True)))
        return answers

    monkeypatch.setattr(evaluate, "sample", keep)
    lines, _ = table(first, adapter, rows=PROMPTS[:3], temperature=temperature)
    pairs = seen[-1]
    models = [common.load_model(name, trainable=False) for name in (adapter, first)]
    ratios = []
    for prompt, answer in pairs:
        logps = []
        for model in models:
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([prompt + answer])).logits[0].double()
            table_ = (logits / temperature).log_softmax(-1)[len(prompt) - 1:-1]
            logps.append(table_.gather(1, torch.tensor(answer)[:, None]).sum().item())
        ratios.append(logps[0] - logps[1])
    assert lines[1]["kl"] == pytest.approx(sum(ratios) / len(ratios), abs=1e-4)
    assert abs(lines[1]["kl"]) > 1e-3 and lines[0]["kl"] is None


def test_a_checkpoint_is_at_distance_0_of_itself(table):
    lines, _ = table("tiny/chat", "tiny/chat", rows=PROMPTS[:2])
    assert lines[1]["kl"] == 0 and lines[0]["sampled"] == lines[1]["sampled"]


def test_rewards_get_prompts_completions_and_columns(table, tmp_path):
    """Four completions of a row, its columns with them; all of the rows count alike."""
    (tmp_path / "mine.py").write_text(
        "def check(prompts, completions, kind, answer, **columns):\n"
        "    assert len(prompts) == len(completions) == len(kind) == 4 and not columns\n"
        "    assert answer == [{'k1': '2', 'k2': '3'}[kind[0]]] * 4 and prompts[0][0]['role']\n"
        "    return [3.5] * 4 if kind == ['k1'] * 4 else [1.5] * 4\n")
    (line,), _ = table("tiny/chat", rows=PROMPTS[:2], reward=f"{tmp_path}/mine.py:check")
    assert line["reward"] == 2.5


# ---- best of N -----------------------------------------------------------------------------------

def test_each_way_to_pick_is_what_a_search_finds():
    """First; the number said most often, of equals the first said; the first best score; any."""
    draw = random.Random(0)
    for _ in range(300):
        texts = [draw.choice(["7", "so 7", "7.0", "8", "9", "none"]) for _ in range(5)]
        right = [float(evaluate.last_number(text) == 8) for text in texts]
        scores = [draw.choice([0.0, 0.5, 1.0]) for _ in range(5)]
        first = slice(4)  # of five samples that were drawn
        numbers = [None if text == "none" else float(text.split()[-1]) for text in texts[first]]
        votes = [sum(x == y for y in numbers) if x is not None else 0 for x in numbers]
        leaders = [x for x, count in zip(numbers, votes, strict=True) if count == max(votes)]
        pairs = zip(right[first], scores[first], strict=True)
        top = [x for x, score in pairs if score == max(scores[first])]
        assert evaluate.pick(4, texts, scores, right) == {
            "first": right[0], "majority": leaders[0] == 8, "best": top[0],
            "oracle": any(x == 8 for x in numbers)}


def test_best_of_n_reads_the_first_n_samples_of_each_prompt(table, monkeypatch, tmp_path):
    """The shares, by hand, with their intervals over prompts; the other figures are of all."""
    answers = {"1 + 1": (["2"], ["9", "8", "2", "8", "2"]),  # 8 and 9 lead, 9 came first
               "2 + 1": (["3"], ["3", "4", "4", "4", "4"]),
               "3 + 1": (["4"], ["7", "4 ", "4", "7", "9"])}
    sample, calls = scripted(answers)
    monkeypatch.setattr(evaluate, "sample", sample)
    (tmp_path / "mine.py").write_text(
        "def size(prompts, completions, **columns):\n"
        "    return [len(text) + (text == '3') for text in completions]\n")
    flags = {"reward": f"{tmp_path}/mine.py:size", "micro_batch_size": 10, "rows": PROMPTS[:3]}
    (line,), printed = table("tiny/chat", best_of=3, samples_per_prompt=5, k=2, **flags)
    assert {call["copies"] for call in calls} == {1, 5}
    expected = {"first": 1 / 3, "majority": 1 / 3, "best": 2 / 3, "oracle": 1.0}
    for name, share in expected.items():
        assert line[name] == pytest.approx(share)
        assert line[f"{name}_interval"] == pytest.approx(evaluate.wilson(share, 3))
    assert line["sampled"] == pytest.approx(5 / 15)
    assert line["pass@k"] == pytest.approx((0.7 + 0.4 + 0.7) / 3)  # 1 − (3 of 10 draws) and so on
    assert all(name in printed for name in evaluate.PICKS) and "one of 3 samples" in printed
    (tmp_path / "table.json").unlink()
    table("tiny/chat", best_of=5, **flags)  # as many samples as there are to pick from
    assert {call["copies"] for call in calls} == {1, 5}
    (tmp_path / "table.json").unlink()
    (line,), printed = table("tiny/chat", **flags)
    assert not set(evaluate.PICKS) & line.keys() and "oracle" not in printed


def test_picking_changes_no_other_figure(table, tmp_path):
    """Of two checkpoints, as the second is compared with the first."""
    plain, _ = table("tiny/chat", "tiny/chat", rows=PROMPTS[:2])
    (tmp_path / "table.json").unlink()
    picked, _ = table("tiny/chat", "tiny/chat", rows=PROMPTS[:2], best_of=4)
    for before, after in zip(plain, picked, strict=True):
        added = {f"{name}{end}" for name in evaluate.PICKS for end in ("", "_interval")}
        assert after.keys() - before.keys() == added
        assert {name: after[name] for name in before} == before
    assert plain[1]["kl"] == 0


@pytest.mark.parametrize("method", ["reward_model", "prm"])
def test_a_trained_head_is_a_reward(method, table, tmp_path, monkeypatch):
    """A run of reward_model.py or prm.py scores what was sampled, whatever is sampled."""
    for file in (ROOT / "tiny/reward").iterdir():
        (tmp_path / "run").mkdir(exist_ok=True)
        (tmp_path / "run" / file.name).write_bytes(file.read_bytes())
    (tmp_path / "run/summary.json").write_text(json.dumps({"method": method}))
    sample, _ = scripted({"1 + 1": (["2"], ["1 + 1 = 2", "1 + 1 = 30", "", "1 + 1..."])})
    monkeypatch.setattr(evaluate, "sample", sample)
    run = str(tmp_path / "run")
    (line,), _ = table("tiny/chat", rows=PROMPTS[:1], best_of=4, reward=run)
    scorer = evaluate.load_scorer(run, evaluate.make_flags().parse_args([]))
    texts = ["1 + 1 = 2", "1 + 1 = 30", "", "1 + 1"]
    scores = scorer([PROMPTS[0]["prompt"]] * 4, [*texts[:3], "1 + 1..."])
    assert line["reward"] == pytest.approx(sum(scores) / 4, abs=1e-5)
    assert line["best"] == float(scores.index(max(scores)) == 0)
    assert (min(scores) < 0) == (method == "reward_model")


# ---- what is refused -----------------------------------------------------------------------------

def refusal(refused, *argv):
    return refused(lambda: evaluate.main(evaluate.make_flags().parse_args(argv)))


@pytest.mark.parametrize("body, words", [
    ("return [1.0]", "below 1e38"), ("return [float('nan')] * len(prompts)", "below 1e38"),
    ("raise KeyError('x')", "KeyError"), ("import sys; sys.exit()", "SystemExit")])
def test_bad_rewards_are_one_line(body, words, table, tmp_path, refused):
    (tmp_path / "mine.py").write_text(f"def f(prompts, **columns):\n    {body}\n")
    name = f"{tmp_path}/mine.py:f"
    line = refused(table, "tiny/chat", rows=PROMPTS[:2], reward=name)
    assert words in line and name in line


def test_what_is_wrong_shows_before_anything_is_measured(tmp_path, refused, monkeypatch):
    monkeypatch.setattr(evaluate, "measure", None)
    (tmp_path / "there.json").write_text("mine")
    (tmp_path / "mine.py").write_text("x = 1\n")
    for argv, words in (
            (["--k", "5"], "--samples-per-prompt"), (["--output", f"{tmp_path}/there.json"], "is"),
            (["--output", f"{tmp_path}/none/x.json"], "folder"), (["no/such/model"], "no/such"),
            (["--reward", f"{tmp_path}/mine.py:f"], "mine.py:f"),
            (["--dataset", f"{tmp_path}/none.jsonl"], "none.jsonl")):
        assert words in refusal(refused, *argv)
    assert (tmp_path / "there.json").read_text() == "mine"


def test_rows_without_an_answer_are_dropped_and_none_left_is_refused(table, refused):
    rows = [{"prompt": "1 + 1 ="}, {"prompt": "", "answer": "2"}]
    assert "0 examples" in refused(table, "tiny/chat", rows=rows)
    (line,), printed = table("tiny/chat", rows=rows + PROMPTS[:1])
    assert "3 rows, 1 examples" in printed and line["greedy"] in (0, 1)


def test_checkpoints_that_can_read_other_rows_are_not_compared(tmp_path, table, refused):
    """A model of a shorter context drops a prompt that the other one reads."""
    for file in (ROOT / "tiny/chat").iterdir():
        (tmp_path / "short").mkdir(exist_ok=True)
        (tmp_path / "short" / file.name).write_bytes(file.read_bytes())
    config = tmp_path / "short/config.json"
    values = json.loads(config.read_text()) | {"max_position_embeddings": 40}
    config.write_text(json.dumps(values))
    long = {"prompt": [{"role": "user", "content": "1 + 1? " * 6}], "answer": "2"}
    line = refused(table, "tiny/chat", str(tmp_path / "short"), rows=[*PROMPTS[:1], long])
    assert "can use other rows" in line


# ---- without arguments ---------------------------------------------------------------------------

def test_tiny_runs_are_found_and_others_left_out(tmp_path, monkeypatch, adapter, refused):
    """Finished runs on the tiny model; no reward models, no runs on other models."""
    monkeypatch.chdir(tmp_path)
    for name, method in (("b", "dpo"), ("a", "sft"), ("r", "reward_model"),
                         ("p", "prm")):
        Path("runs", name).mkdir(parents=True)
        Path("runs", name, "summary.json").write_text(json.dumps({"method": method}))
        config = Path(adapter, "adapter_config.json").read_text()
        Path("runs", name, "adapter_config.json").write_text(config)
    Path("runs/unfinished").mkdir()
    assert evaluate.tiny_runs() == ["runs/a", "runs/b"]
    Path("runs/unfinished/summary.json").write_text("{")
    assert "runs/unfinished/summary.json" in refused(evaluate.tiny_runs)


def test_named_checkpoints_read_no_other_run(tmp_path, monkeypatch, table):
    """A broken run beside them is nobody's business."""
    monkeypatch.chdir(tmp_path)
    Path("runs/broken").mkdir(parents=True)
    Path("runs/broken/summary.json").write_text("{")
    lines, _ = table("tiny/chat", rows=PROMPTS[:1])
    assert len(lines) == 1 and not math.isnan(lines[0]["sampled"])
