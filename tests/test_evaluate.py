"""The yardstick: it samples from exactly the distribution that is scored, scores right, and says what it was given wrong."""
import itertools
import json
import math
import os
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import common
import evaluate
import pytest
import torch
from evaluate import final_answer
from transformers import GenerationConfig, Qwen2Config, Qwen2ForCausalLM

ROOT = Path(__file__).parents[1]
TINY = str(ROOT / "tiny/chat")
PROMPTS = [[1, 2, 3], [4, 5], [6, 1, 1, 2, 7, 3, 5], [3]]


def random_model(vocab=8, seed=0, layers=2, spread=0.6):
    """A small Qwen2 with grouped heads and uneven next-token probabilities; its generation config tries to spoil the sampling."""
    torch.manual_seed(seed)
    model = Qwen2ForCausalLM(Qwen2Config(
        vocab_size=vocab, hidden_size=16, intermediate_size=32, num_hidden_layers=layers, num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=128, initializer_range=spread / 2, tie_word_embeddings=False, bos_token_id=None, eos_token_id=None, pad_token_id=None)).eval()
    model.generation_config = GenerationConfig(do_sample=True, top_k=1, top_p=0.1, temperature=0.1, repetition_penalty=3.0, max_new_tokens=1, eos_token_id=2)
    return model


def sample(model, prompts=PROMPTS, samples_per_prompt=1, max_new_tokens=6, temperature=1.0, stop_ids=(), pad_id=0, seed=0):
    return evaluate.sample(model, prompts, samples_per_prompt, max_new_tokens, temperature, list(stop_ids), pad_id, seed)


@torch.no_grad()
def next_logps(model, ids, temperature=1.0):
    """log softmax(logits / T) after one sequence, without cache, mask or padding."""
    return (model(input_ids=torch.tensor([ids])).logits[0, -1].double() / temperature).log_softmax(-1)


def sequence_logp(model, prompt, completion, temperature=1.0):
    return sum(next_logps(model, prompt + completion[:i], temperature)[token].item() for i, token in enumerate(completion))


# ---- sampling ---------------------------------------------------------------------------------------------

@pytest.mark.parametrize("temperature", [0.7, 1.0, 1.5])
def test_samples_follow_the_scored_distribution(temperature):
    """Pairs of tokens come as often as softmax(logits / T) says (chi-squared), whatever top-k or penalty generation_config names."""
    model, n = random_model(), 20000
    drawn, pairs = sample(model, PROMPTS[:2], n, 2, temperature), list(itertools.product(range(8), repeat=2))
    for number, prompt in enumerate(PROMPTS[:2]):
        expected = torch.tensor([n * math.exp(sequence_logp(model, prompt, list(pair), temperature)) for pair in pairs])
        assert abs(expected.sum() - n) < 1e-2 * n and expected.max() < 0.9 * n  # a distribution, and not all in one place
        counts = Counter(map(tuple, drawn[number * n:(number + 1) * n]))
        seen = torch.tensor([float(counts[pair]) for pair in pairs])
        often = expected >= 5
        seen, expected = (torch.cat([x[often], x[~often].sum()[None]]) for x in (seen, expected))
        chi2, degrees = ((seen - expected) ** 2 / expected.clamp(min=1e-9)).sum().item(), len(seen) - 1
        assert chi2 < degrees + 4 * math.sqrt(2 * degrees), (chi2, degrees)


def test_a_row_does_not_depend_on_its_neighbours():
    """Other, longer or more prompts beside it and another pad token leave a row's completion as it is."""
    model, ours = random_model(spread=0.4), [2, 6, 5]
    rows = [sample(model, [a, ours, *more], 3, 8, stop_ids=[7], pad_id=pad)[3:6] for a, more, pad in (
        ([1], [], 0), ([4, 4], [], 0), ([3] * 30, [[5, 5]], 0), ([1], [[2] * 9, [6]], 4), ([3] * 30, [], 7))]
    assert all(row == rows[0] for row in rows[1:])
    assert sample(model, [[1], [5, 6, 2]], 3, 8, stop_ids=[7])[3:] != rows[0]
    assert sample(model, [[1], ours], 3, 8, stop_ids=[7], seed=1)[3:] != rows[0]


def test_dropping_finished_rows_changes_no_other():
    """With stop tokens, when finished rows leave the batch, each row is the row sampled without any, cut after its first stop token."""
    model, stops = random_model(spread=0.4), [2, 7]
    whole, cut = sample(model, samples_per_prompt=8, max_new_tokens=12), sample(model, samples_per_prompt=8, max_new_tokens=12, stop_ids=stops)
    ends = [next((i + 1 for i, token in enumerate(row) if token in stops), len(row)) for row in whole]
    assert {len(row) for row in whole} == {12} and len(set(ends)) > 4  # rows leave at many different steps
    assert cut == [row[:end] for row, end in zip(whole, ends)]


def test_stop_tokens_end_rows_and_belong_to_them():
    """A row ends with the first stop token, which it includes, or at max_new_tokens; never empty."""
    rows = sample(random_model(spread=0.4), samples_per_prompt=16, max_new_tokens=5, stop_ids=[2, 7])
    assert all(1 <= len(row) <= 5 and not {2, 7} & set(row[:-1]) and (row[-1] in (2, 7) or len(row) == 5) for row in rows)
    assert any(len(row) == 5 and row[-1] not in (2, 7) for row in rows) and {row[-1] for row in rows} >= {2, 7}
    assert {len(row) for row in sample(random_model(), max_new_tokens=1)} == {1}
    assert {len(row) for row in sample(random_model(), samples_per_prompt=2, stop_ids=range(8))} == {1}


def test_samples_are_grouped_by_prompt():
    """Row i answers prompt i // samples_per_prompt, and the samples of a prompt differ."""
    model = random_model(spread=0.4)
    greedy = sample(model, temperature=0)
    assert len(set(map(tuple, greedy))) > 1
    assert sample(model, samples_per_prompt=3, temperature=0) == [row for row in greedy for _ in range(3)]
    assert len(set(map(tuple, sample(model, PROMPTS[:1], 10)))) > 5


@pytest.mark.parametrize("which", ["random", "tiny"])
def test_greedy_is_the_argmax_at_every_step(which):
    """Temperature 0 gives the rows of an argmax loop without a cache, and those of generate()."""
    if which == "random":
        model, prompts, stops, steps = random_model(spread=0.4), PROMPTS, [7], 10
    else:
        model, tokenizer = common.load_model(TINY, trainable=False), common.load_tokenizer(TINY)
        questions = "Add 12 and 9.", "What is 86 - 83?", "Tom has 14 figs and gets 83 more. How many figs now?"
        prompts = [common.encode_prompt(tokenizer, [{"role": "user", "content": question}]) for question in questions]
        stops, steps = [tokenizer.eos_token_id], 16
    loop = []
    for prompt in prompts:
        row = []
        while len(row) < steps and not (row and row[-1] in stops):
            row.append(next_logps(model, prompt + row).argmax().item())
        loop.append(row)
    assert sample(model, prompts, temperature=0, max_new_tokens=steps, stop_ids=stops) == loop
    model.generation_config = GenerationConfig()
    config = GenerationConfig(do_sample=False, max_new_tokens=steps, eos_token_id=stops, pad_token_id=0)
    assert [model.generate(torch.tensor([prompt]), generation_config=config)[0, len(prompt):].tolist() for prompt in prompts] == loop


def test_training_with_checkpointing_samples_with_the_cache():
    """In train mode with gradient checkpointing the rows are those of eval mode, one token is read a step, and train mode is back."""
    torch.manual_seed(0)
    model = common.load_model(TINY, lora_rank=2, gradient_checkpointing="on")
    for name, p in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.3)
    prompts, widths = [[5, 9, 17, 33], [80, 12]], []
    hook = common.causal_lm(model).base_model.register_forward_pre_hook(lambda _, __, kwargs: widths.append(kwargs["input_ids"].shape[1]), with_kwargs=True)
    training = sample(model, prompts, 2, 6)
    assert model.training and all(m.training for m in model.modules()) and widths == [4, 1, 1, 1, 1, 1]
    hook.remove()
    model.eval()
    assert training == sample(model, prompts, 2, 6) and not model.training
    with common.reference(model):  # the adapter took part
        assert training != sample(model, prompts, 2, 6)


# ---- scores -----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("text, answer", [
    ("12 + 9 = 21", "21"), ("12 + 9 = 21.", "21"), ("It is 21, I think", "21"), ("first 3, then 21", "21"), ("#### 72", "72"), ("21 apples", "21"),
    ("$1,234,567", "1234567"), ("1,000", "1000"), ("1000", "1,000"), ("5 - 8 = -3", "-3"), ("x=-3", "-3"), ("5-3", "3"), ("-3", "-3.0"),
    ("3.0", "3"), ("3.50", "3.5"), ("0.5", "1/2"), ("2/4", "1/2"), ("-1/2", "-0.5"), ("18%", "18"), ("sum is 3.", "3"), ("(7)", "7"), ("**7**", "7"),
    (r"so \boxed{21}", "21"), (r"\boxed{1,234}", "1234"), (r"\boxed{3.0}", "3"), (r"\boxed{-4}", "-4"), (r"\boxed{$5$}", "5"),
    (r"\boxed{ 5 }. I used 2 steps", "5"),
    (r"\boxed{1} or rather \boxed{2}", "2"), (r"\boxed{\frac{1}{2}}", r"\boxed{\frac{1}{2}}"), (r"\boxed{\frac{1}{2}} done", r"\boxed{ \frac{1}{2} }"),
    (r"\boxed{x^{2^{3}}+1}", r"\boxed{x^{2^{3}} + 1}"), (21, 21), ("7", 7), ("0.1", 0.1),
    ("it costs $.50", "0.5"), ("-.5", "-1/2"), ("1e5", "100000"), ("6.02E23", "602000000000000000000000"), (r"\boxed{2.5e-1}", "1/4"), ("5e", "5"),
    (r"\boxed{no solution}", "no solution"), (r"\boxed{\text{Yes}}", "Yes"), (r"\boxed{Yes}", r"\text{Yes}"), (r"\boxed{1, 2}", "1,2"), ("so 0", "it is 0"),
    (r"\boxed{21 \text{ apples}}", "21 apples"), ("1,2", "2"),
])
def test_right_answers_are_right(text, answer):
    """What equals the row's answer scores 1, in whatever notation."""
    assert evaluate.correct_answer(["?"], [str(text)], [answer]) == [1.0]


@pytest.mark.parametrize("text, answer", [
    ("21", "22"), ("3", "-3"), ("-3", "3"), ("21 is less than 22", "21"), ("", "0"), ("no idea", "0"), ("no idea", "none"), ("1234", "1.234"), ("210", "21"),
    ("1.21", "21"), ("1e5", "1"), ("1e5", "5"), ("I cannot say", "no solution"), (r"\boxed{\text{No}}", r"\text{Yes}"), (r"\boxed{\text{(B)}}", r"\text{(A)}"),
    (r"\boxed{12}", "1,2"), (r"\boxed{}", ""), ("nothing", ""), (r"\boxed{5} of 7", "7"), (r"\boxed{\frac{1}{2}}", "2"), (r"\boxed{\frac{1}{2}}", r"\boxed{\frac{1}{3}}"), (r"\boxed{}", "0"),
    ("x21", "21"),
])
def test_wrong_answers_are_wrong(text, answer):
    """What differs from the row's answer scores 0; two texts without any answer do not agree."""
    assert evaluate.correct_answer(["?"], [text], [answer]) == [0.0]


def test_final_answer_of_what_says_nothing():
    """No number and no box is None, and boxes may nest or stay open."""
    assert final_answer("I do not know.") is None and final_answer("") is None
    assert final_answer(r"\boxed{\sqrt{\frac{a}{b}}} and 3") == r"\sqrt{\frac{a}{b}}" and final_answer(r"\boxed{21") == 21


def test_any_text_can_be_scored():
    """Whatever a model writes gets a score, never an exception."""
    texts = ["7.5/2", r"\boxed{3.5/2}", "1/0", r"\boxed{1/0}", "9" * 5000, "1,,2", ",", "-", "--3", "1.2.3", "\\boxed{", "}{", "３ / ４", "1e400", "1e999999999", "½ ² ٣"]
    failed = []
    for text in texts:
        try:
            assert evaluate.correct_answer(["?"], [text], ["-777"]) == [0.0]
        except ValueError as error:
            failed.append((text[:20], error))
    assert not failed


@pytest.mark.parametrize("answer, right, wrong", [(r"\frac{14}{3}", r"\boxed{\frac{14}{3}}", "it is 3"), (r"\sqrt{2}", r"\boxed{\sqrt{2}}", r"\boxed{2}")])
def test_answers_in_latex(answer, right, wrong):
    """A row's answer that is a bare formula, as in MATH, is matched by that formula in a box and not by its last number."""
    assert evaluate.correct_answer(["?"] * 2, [right, wrong], [answer] * 2) == [1.0, 0.0]


def test_wilson_interval():
    """Known values (Wilson's 5 of 10: 0.2366 to 0.7634), in [0, 1] at the ends, around the share, and roots of its own quadratic."""
    assert evaluate.wilson(0.5, 10) == pytest.approx([0.23659, 0.76341], abs=1e-4)
    assert evaluate.wilson(0.0, 20) == pytest.approx([0, 0.16113], abs=1e-4) and evaluate.wilson(1.0, 20) == pytest.approx([0.83887, 1], abs=1e-4)
    for share, count in itertools.product((0.1, 0.5, 0.77), (1, 30, 1000)):
        for p in evaluate.wilson(share, count):
            assert abs(share - p) == pytest.approx(1.96 * math.sqrt(p * (1 - p) / count), rel=1e-9)


@pytest.mark.parametrize("count", [20, 100])
def test_wilson_covers_the_truth(count):
    """By enumeration: over all outcomes the interval holds the true share about 95 times in 100."""
    intervals = [evaluate.wilson(k / count, count) for k in range(count + 1)]
    coverage = [sum(math.comb(count, k) * p**k * (1 - p) ** (count - k) for k, (low, high) in enumerate(intervals) if low <= p <= high)
                for p in (i / 500 for i in range(25, 476))]
    assert 0.94 < sum(coverage) / len(coverage) < 0.965 and min(coverage) > 0.85


# ---- KL ---------------------------------------------------------------------------------------------------

def test_kl_of_a_model_from_itself_is_zero():
    """log-ratio 0 everywhere: exactly 0 for each answer, also with rows of different lengths."""
    model = random_model()
    answers = sample(model, samples_per_prompt=2, stop_ids=[7])
    assert evaluate.kl_from(model, model, [p for p in PROMPTS for _ in range(2)], answers, 1.0, 0).tolist() == [0.0] * 8


@pytest.mark.parametrize("temperature", [1.0, 0.8])
def test_kl_is_that_of_the_answers(temperature):
    """Its mean is Σ_y p(y|x) log p(y|x) / q(y|x) over all answers y up to two tokens, within Monte Carlo error; and so is its direction."""
    model, first, prompt, stop, n = random_model(vocab=6, spread=0.6), random_model(vocab=6, seed=1, spread=0.2), [1, 2, 3], 5, 20000
    answers = [[stop]] + [[a, b] for a in range(5) for b in range(6)]
    p, q = (torch.tensor([sequence_logp(m, prompt, y, temperature) for y in answers]) for m in (model, first))
    assert p.exp().sum().item() == pytest.approx(1, abs=1e-4)
    exact, reverse = (p.exp() * (p - q)).sum().item(), (q.exp() * (q - p)).sum().item()
    drawn = sample(model, [prompt], n, 2, temperature, stop_ids=[stop])
    kl = evaluate.kl_from(first, model, [prompt] * n, drawn, temperature, 0)
    error = (kl.std() / math.sqrt(n)).item()
    assert exact > 0.1 and abs(exact - reverse) > 8 * error  # the test can tell them apart
    assert abs(kl.mean().item() - exact) < 4 * error and kl.min() >= -1e-5


# ---- the command ------------------------------------------------------------------------------------------

@pytest.fixture
def command(monkeypatch, capsys):
    """Runs evaluate.py's main with a command line in this process, and returns what it printed."""
    def run(*line):
        capsys.readouterr()
        monkeypatch.setattr(sys, "argv", ["evaluate.py", *map(str, line)])
        evaluate.main()
        return capsys.readouterr().out
    return run


@pytest.fixture
def refusal(command, capsys):
    """Runs a command line that must end with exit code 2 and one line on stderr, and returns that line."""
    def run(*line):
        with pytest.raises(SystemExit) as stop:
            command(*line)
        out, err = capsys.readouterr()
        assert stop.value.code == 2 and len(err.strip().splitlines()) == 1 and err.startswith("error: ") and not out, err
        return err
    return run


QUICK = ("--size", 4, "--max_new_tokens", 16, "--samples_per_prompt", 2)
NAMES = ["sampled", "greedy", "pass@4", "reward", "kl", "length", "stopped"]


def test_command_prints_one_table_and_saves_it(tmp_path):
    """The shell command works from any folder: one line a checkpoint under one header, and the same figures as JSON."""
    run = subprocess.run([sys.executable, str(ROOT / "evaluate.py"), "tiny/chat", "--size", "20", "--output", "x.json"],
                         cwd=tmp_path, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert run.returncode == 0, run.stderr
    lines = [line.split() for line in run.stdout.splitlines() if line.strip()]
    (row,) = json.loads((tmp_path / "x.json").read_text())
    assert lines[-2] == ["checkpoint", *NAMES] and lines[-1][0] == "tiny/chat" == row["checkpoint"] and len(lines) == 3
    assert lines[-1][1:] == [f"{row['sampled']:.3f}", "({:.3f}–{:.3f})".format(*row["sampled_interval"]), f"{row['greedy']:.3f}",
                             "({:.3f}–{:.3f})".format(*row["greedy_interval"]), f"{row['pass@4']:.3f}", f"{row['reward']:.3f}", "0.000",
                             f"{row['length']:.1f}", f"{row['stopped']:.3f}"]
    assert row["reward"] == row["sampled"] and row["kl"] == 0 and all(0 <= row[name] <= 1 for name in ("sampled", "greedy", "stopped"))
    assert all(row[f"{mode}_interval"] == pytest.approx(evaluate.wilson(row[mode], 20)) for mode in ("sampled", "greedy"))


def test_figures_are_those_of_the_samples(command, tmp_path):
    """Length, stopped and the two accuracies are means over the model's own answers, in any batch size; the same checkpoint twice has KL 0."""
    limit = 11  # some answers stop earlier, some with their last token, some do not
    command(TINY, TINY, ROOT / "tiny/base", *QUICK, "--max_new_tokens", limit, "--output", tmp_path / "a.json")
    one, two, base = json.loads((tmp_path / "a.json").read_text())
    tokenizer, model = common.load_tokenizer(TINY), common.load_model(TINY, trainable=False)
    rows = [json.loads(line) for line in (ROOT / "tiny/data/prompt_heldout.jsonl").read_text().splitlines()[:4]]
    prompts = [common.encode_prompt(tokenizer, row["prompt"]) for row in rows]
    answers = {name: sample(model, prompts, k, limit, temperature, [tokenizer.eos_token_id], tokenizer.pad_token_id)
               for name, k, temperature in (("sampled", 2, 1.0), ("greedy", 1, 0))}
    for name, ids in answers.items():
        repeats = len(ids) // 4
        right = [final_answer(tokenizer.decode(row, skip_special_tokens=True)) == int(rows[i // repeats]["answer"]) for i, row in enumerate(ids)]
        assert one[name] == sum(right) / len(right)
    assert one["length"] == sum(map(len, answers["sampled"])) / 8
    assert {(len(row) == limit, row[-1] == tokenizer.eos_token_id) for row in answers["sampled"]} == {(False, True), (True, True), (True, False)}
    assert one["stopped"] == sum(row[-1] == tokenizer.eos_token_id for row in answers["sampled"]) / 8
    assert one == two and two["kl"] == 0.0 and base["kl"] > 0.1


def test_without_arguments_it_compares_the_tiny_runs(command, tmp_path, monkeypatch):
    """No checkpoint named: tiny/chat and every finished run of a language model on it in runs/, but neither reward models nor other folders."""
    for name, task in (("dpo", "CAUSAL_LM"), ("dpo-2", "CAUSAL_LM"), ("reward", "SEQ_CLS")):
        common.load_model(TINY, lora_rank=2, task=task).save_pretrained(tmp_path / "runs" / name, save_embedding_layers=False)
        common.load_tokenizer(TINY).save_pretrained(tmp_path / "runs" / name)
        (tmp_path / "runs" / name / "summary.json").write_text(json.dumps({"method": "reward_model" if name == "reward" else "dpo", "model": "tiny/chat"}))
    shutil.copytree(tmp_path / "runs/dpo", tmp_path / "runs/killed")
    (tmp_path / "runs/killed/summary.json").unlink()
    (tmp_path / "runs/notes").mkdir()
    monkeypatch.chdir(tmp_path)
    command(*QUICK, "--output", "x.json")
    table = json.loads(Path("x.json").read_text())
    assert [row["checkpoint"] for row in table] == ["tiny/chat", "runs/dpo", "runs/dpo-2"]
    assert [row["sampled"] for row in table] == [table[0]["sampled"]] * 3 and [row["kl"] for row in table] == [0.0] * 3  # untrained adapters


REWARD = '''
import json
import torch

def record(prompts, completions, **columns):
    with open("seen.json", "w") as file:
        json.dump({"prompts": prompts, "completions": completions, **columns}, file)
    return [0.25] * len(completions)

def first(prompts, completions, answer, **columns):
    return torch.arange(len(completions), dtype=torch.float32)

def few(prompts, completions, **columns):
    return [1.0]

def broken(prompts, completions, **columns):
    return [float("nan")] * len(completions)
'''


@pytest.fixture
def rewards(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("rewards.py").write_text(REWARD)


def test_reward_function_gets_prompts_completions_and_columns(command, rewards):
    """The user's function sees each prompt with each of its answers and every other column, aligned, and its mean is the reward."""
    chats = [[{"role": "user", "content": f"Add {a} and 2."}] for a in (1, 2)]
    Path("rows.jsonl").write_text("".join(json.dumps({"prompt": chat, "answer": a, "level": f"L{a}", "rare": a} if a == 3 else
                                                     {"prompt": chat, "answer": a, "level": f"L{a}"}) + "\n" for chat, a in zip(chats, (3, 4))))
    command(TINY, "--dataset", "rows.jsonl", "--reward", "rewards.py:record", *QUICK, "--output", "x.json")
    seen, (row,) = json.loads(Path("seen.json").read_text()), json.loads(Path("x.json").read_text())
    assert seen.keys() == {"prompts", "completions", "answer", "level", "rare"}
    assert seen["prompts"] == [chats[0]] * 2 + [chats[1]] * 2 and seen["answer"] == [3, 3, 4, 4] and seen["level"] == ["L3", "L3", "L4", "L4"]
    assert seen["rare"] == [3, 3, None, None]
    assert all("<|" not in text and text for text in seen["completions"]) and row["reward"] == 0.25
    assert row["sampled"] == sum(evaluate.correct_answer(seen["prompts"], seen["completions"], seen["answer"])) / 4


def test_reward_may_be_a_tensor(command, rewards):
    """A tensor of scores, as a reward model gives it, counts like a list, on the screen and in the JSON."""
    assert "3.500" in command(TINY, "--reward", "rewards.py:first", *QUICK, "--output", "x.json")
    assert json.loads(Path("x.json").read_text())[0]["reward"] == 3.5


@pytest.mark.parametrize("spec, words", [
    ("nowhere.py:record", "nowhere.py"), ("rewards.py:absent", "absent"), ("rewards.py", "FILE.py:function"), ("rewards.py:REWARD", "REWARD"),
    ("rewards.py:few", "1 scores for 8"), ("rewards.py:broken", "nan"), ("wrong.py:record", "wrong.py"), ("wrong.txt:record", "no Python file")])
def test_bad_reward(refusal, rewards, spec, words):
    """A missing or broken file or function, too few scores or NaN end in one line with exit code 2."""
    Path("wrong.py").write_text("def record(:\n")
    Path("wrong.txt").write_text("def record(**columns):\n    return []\n")
    if spec in ("rewards.py:few", "rewards.py:broken"):  # found only after sampling, when a progress bar is on stderr
        evaluate_tqdm = evaluate.tqdm
        evaluate.tqdm = lambda items, **_: items
        try:
            assert words in refusal(TINY, "--reward", spec, *QUICK)
        finally:
            evaluate.tqdm = evaluate_tqdm
    else:
        assert words in refusal(TINY, "--reward", spec, *QUICK)


def test_a_reward_file_may_hold_what_any_module_may(tmp_path):
    """A dataclass with postponed annotations looks its module up by name."""
    (tmp_path / "data.py").write_text("from __future__ import annotations\nfrom dataclasses import dataclass\n\n@dataclass\nclass A:\n    x: int = 1\n\n"
                                      "def score(**columns):\n    return [A().x]\n")
    assert evaluate.load_function(f"{tmp_path}/data.py:score")() == [1]


def test_what_is_wrong_shows_before_anything_is_sampled(refusal, tmp_path, monkeypatch):
    """The second checkpoint is not there; the folder of --output is not; prompt and answer are longer than what the model can read."""
    monkeypatch.setattr(evaluate, "sample", lambda *args: pytest.fail("sampled"))
    (tmp_path / "empty").mkdir()
    assert "empty" in refusal(TINY, tmp_path / "empty")
    assert "--output" in refusal(TINY, "--output", tmp_path / "none/x.json")
    assert "reads 512 tokens" in refusal(TINY, "--max_new_tokens", 510)
    assert "there is no flag --bogus" in refusal(TINY, "--bogus")


def test_output_is_not_overwritten(refusal, tmp_path):
    """An --output that exists is refused before anything runs, and stays as it is."""
    (tmp_path / "x.json").write_text("precious")
    assert "x.json" in refusal(TINY, "--output", tmp_path / "x.json") and (tmp_path / "x.json").read_text() == "precious"


@pytest.mark.parametrize("content, words", [
    ('{"prompt": "Add 1 and 2.", "question": "x"}\n', ["row 1", "no answer", "prompt, question", "wanted are prompt, answer"]),
    ('{"prompt": "a", "answer": "3"}\n{"answer": "3"}\n', ["row 2", "no prompt"]),
    ('{"prompt": "a", "answer": "3"}\n{broken\n', ["line 2"]), ("", ["empty"]), ("[1]\n", ["one JSON object per row"]),
    ('{"prompt": [{"role": "assistant", "content": "a"}], "answer": "3"}\n', ["roles out of order"]),
    ('{"prompt": 5, "answer": "3"}\n', ["prompt"]), ('{"prompt": [], "answer": "3"}\n', ["prompt"]),
])
def test_bad_dataset(refusal, tmp_path, content, words):
    """Missing columns (found and wanted), broken lines, no rows and unusable prompts end in one line that names file and row."""
    (tmp_path / "rows.jsonl").write_text(content)
    line = refusal(TINY, "--dataset", tmp_path / "rows.jsonl")
    assert "rows.jsonl" in line and all(word in line for word in words), line


@pytest.mark.parametrize("flag", ["size", "samples_per_prompt", "max_new_tokens", "batch_size", "temperature"])
def test_flags_out_of_range(refusal, flag):
    """Zero of anything is refused by the flag's name."""
    assert f"--{flag.replace('_', '-')}" in refusal(TINY, f"--{flag}", "0")


def test_missing_dataset_file(refusal):
    """A file that is not there is named."""
    assert "gone.jsonl" in refusal(TINY, "--dataset", "gone.jsonl")


def test_pass_at_k_is_the_share_of_draws_with_a_right_one():
    """Every draw of k out of n samples, enumerated."""
    for n, right, k in ((4, 0, 2), (4, 1, 2), (4, 4, 3), (6, 2, 3), (5, 1, 5)):
        draws = list(itertools.combinations([1] * right + [0] * (n - right), k))
        assert evaluate.pass_at_k(right, n, k) == pytest.approx(sum(map(any, draws)) / len(draws))
