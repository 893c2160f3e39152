import json
import math
import os
import random
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import MagicMock

import common
import grpo
import pytest
import torch
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parents[1]
LOSSES = ["grpo", "dr_grpo", "dapo", "gspo", "cispo"]
GARBAGE = 0.7  # stands outside the mask, where nothing may be read


def random_batch(seed=0, rows=6, width=7):
    """Log-probs of ragged completions after prompts of unequal length, ratios on both sides of the clip, advantages of both signs."""
    g = torch.Generator().manual_seed(seed)
    start, length = torch.randint(0, 3, (rows, 1), generator=g), torch.randint(1, 5, (rows, 1), generator=g)
    place = torch.arange(width)[None]
    mask = ((place >= start) & (place < start + length)).long()
    logps = -2 * torch.rand(rows, width, generator=g, dtype=torch.float64) - 0.1
    old, ref = (torch.where(mask.bool(), logps + 0.5 * torch.randn(rows, width, generator=g, dtype=torch.float64), GARBAGE) for _ in range(2))
    return torch.where(mask.bool(), logps, GARBAGE).requires_grad_(), old, ref, torch.randn(rows, generator=g, dtype=torch.float64), mask


def whole(logps, old, ref, advantages, mask, loss, **kwargs):
    return grpo.policy_loss(logps, old, ref, advantages, mask, len(mask), mask.sum().item(), loss, **kwargs)[0]


def grad_of(value, tensor):
    return torch.autograd.grad(value, tensor)[0]


# ---- the loss ---------------------------------------------------------------------------------------------

def by_hand(logps, old, ref, advantages, mask, loss, beta, epsilon, epsilon_high, max_new_tokens):
    """The objective of each paper, token by token, with math only."""
    total, everything = 0.0, sum(map(sum, mask))
    for logp, o, r, a, m in zip(logps, old, ref, advantages, mask):
        places = [t for t in range(len(m)) if m[t]]
        for t in places:
            ratio = math.exp(statistics.fmean(logp[s] - o[s] for s in places) if loss == "gspo" else logp[t] - o[t])
            gain = min(ratio * a, min(max(ratio, 1 - epsilon), 1 + epsilon_high) * a)
            if loss == "cispo":
                gain = min(ratio, 1 + epsilon_high) * a * logp[t]
            kl = math.exp(r[t] - logp[t]) - (r[t] - logp[t]) - 1
            share = {"grpo": 1 / len(places) / len(mask), "gspo": 1 / len(places) / len(mask), "dr_grpo": 1 / max_new_tokens / len(mask)}.get(loss, 1 / everything)
            total -= share * (gain - beta * kl)
    return total


@pytest.mark.parametrize("beta", [0.0, 0.3])
@pytest.mark.parametrize("loss", LOSSES)
def test_each_loss_equals_its_equation_token_by_token(loss, beta):
    for seed in range(5):
        batch = random_batch(seed)
        settings = dict(beta=beta, epsilon=0.2, epsilon_high=0.28, max_new_tokens=9)
        assert whole(*batch, loss, **settings).item() == pytest.approx(by_hand(*(x.tolist() for x in batch), loss, **settings), abs=1e-7)  # 1 / length is fp32


@pytest.mark.parametrize("loss", [loss for loss in LOSSES if loss != "cispo"])  # its weight is detached: its gradient has a test below
def test_each_loss_passes_gradcheck_and_reads_nothing_outside_the_mask(loss):
    logps, old, ref, advantages, mask = random_batch(1)
    assert torch.autograd.gradcheck(lambda x: whole(x, old, ref, advantages, mask, loss, beta=0.3), logps)
    assert (grad_of(whole(logps, old, ref, advantages, mask, loss), logps)[mask == 0] == 0).all()


@pytest.mark.parametrize("loss", LOSSES)
def test_micro_batches_add_up_to_the_batch(loss):
    """Value and gradient, for uneven parts."""
    batch = random_batch(2)
    value = whole(*batch, loss)
    parts = [grpo.policy_loss(*(x[part] for x in batch), 6, batch[4].sum().item(), loss)[0] for part in (slice(0, 1), slice(1, 4), slice(4, 6))]
    assert sum(parts).item() == pytest.approx(value.item(), abs=1e-12)
    assert torch.allclose(grad_of(sum(parts), batch[0]), grad_of(value, batch[0]), atol=1e-12)


def test_at_ratio_1_grpo_is_reinforce_with_a_group_baseline():
    """One update a rollout: the loss is 0 but its gradient is −A ∇ mean_t log π, the most asked question about GRPO."""
    logps, _, ref, _, mask = random_batch(3)
    advantages = grpo.group_advantages(torch.rand(2, 3, dtype=torch.float64)).flatten()
    loss = whole(logps, logps.detach(), ref, advantages, mask, "grpo", beta=0.0)
    reinforce = -(advantages * (logps * mask).sum(-1) / mask.sum(-1)).mean()
    assert abs(loss.item()) < 1e-7 and abs(reinforce.item()) > 1e-3
    assert torch.allclose(grad_of(loss, logps), grad_of(reinforce, logps), atol=1e-7)


def test_what_a_token_counts_does_not_depend_on_its_completions_length_but_in_grpo_and_gspo():
    """Gradient per token at ratio 1, A = 1, lengths 1, 2 and 4."""
    mask = torch.tensor([[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 1]])
    logps = torch.full((3, 4), -1.0, dtype=torch.float64, requires_grad=True)
    slopes = {loss: [row[m.bool()].tolist() for row, m in zip(
        grad_of(whole(logps, logps.detach(), logps.detach(), torch.ones(3), mask, loss, max_new_tokens=10), logps), mask)] for loss in LOSSES}
    for loss, weights in {"grpo": (1 / 3, 1 / 6, 1 / 12), "gspo": (1 / 3, 1 / 6, 1 / 12), "dr_grpo": [1 / 30] * 3, "dapo": [1 / 7] * 3, "cispo": [1 / 7] * 3}.items():
        for length, row, weight in zip((1, 2, 4), slopes[loss], weights):
            assert row == pytest.approx([-weight] * length), (loss, length)


def test_gspo_has_one_ratio_a_sequence_the_geometric_mean():
    """Token ratios 4 and 1/4 are far outside the clip, their mean is not; and all tokens of a sequence have the same gradient."""
    logps = torch.tensor([[math.log(4), -math.log(4), 0.0], [0.6, 0.6, 0.0]], dtype=torch.float64, requires_grad=True)
    old, mask = torch.zeros(2, 3, dtype=torch.float64), torch.tensor([[1, 1, 0], [1, 1, 0]])
    loss, ratio, _ = grpo.policy_loss(logps, old, None, torch.ones(2), mask, 2, 4, "gspo", beta=0.0)
    assert torch.allclose(ratio[:, :2], torch.tensor([[1.0, 1.0], [math.exp(0.6)] * 2], dtype=torch.float64))
    assert torch.allclose(grad_of(loss, logps), torch.tensor([[-0.25, -0.25, 0], [0, 0, 0]], dtype=torch.float64))


def test_cispo_gives_every_token_a_gradient_with_a_clipped_weight():
    """−min(ρ, 1 + ε_high) A / N, also where the clip of PPO leaves nothing, and β (1 − π_ref / π) / N for the KL."""
    logps, old, ref, advantages, mask = random_batch(4)
    grad = grad_of(whole(logps, old, ref, advantages, mask, "cispo", beta=0.3, epsilon_high=0.28), logps)
    ratio = (logps - old).exp()
    expected = (-ratio.clamp(max=1.28) * advantages[:, None] + 0.3 * (1 - (ref - logps).exp())) * mask / mask.sum()
    assert torch.allclose(grad, expected, atol=1e-12)
    stopped = (ratio > 1.28) & (advantages[:, None] > 0) & mask.bool()
    without_kl = [grad_of(whole(logps, old, ref, advantages, mask, loss, beta=0.0, epsilon_high=0.28), logps)[stopped] for loss in ("cispo", "dapo")]
    assert stopped.any() and (without_kl[0] < 0).all() and (without_kl[1] == 0).all()


@pytest.mark.parametrize("loss", ["grpo", "dr_grpo", "dapo", "gspo"])
@pytest.mark.parametrize("advantage, ratio, moves", [
    (1.0, 0.7, True), (1.0, 1.25, True), (1.0, 1.3, False), (-1.0, 0.7, False), (-1.0, 0.85, True), (-1.0, 1.3, True)])
def test_the_clip_cells(loss, advantage, ratio, moves):
    """The clip stops going further, up with A > 0 beyond 1 + ε_high and down with A < 0 below 1 − ε, and never the way back."""
    logps = torch.full((1, 1), math.log(ratio), dtype=torch.float64, requires_grad=True)
    value = grpo.policy_loss(logps, torch.zeros(1, 1), None, torch.tensor([advantage]), torch.ones(1, 1), 1, 1, loss, 0.0, 0.2, 0.28, 1)[0]
    assert grad_of(value, logps).item() == pytest.approx(-advantage * ratio if moves else 0.0, abs=1e-9)
    assert value.item() == pytest.approx(-advantage * (ratio if moves else 1.28 if ratio > 1 else 0.8))


@pytest.mark.parametrize("loss", LOSSES)
def test_the_k3_penalty_by_enumeration(loss):
    """E_π of the loss's KL term is KL(π ‖ π_ref); its expected gradient is that of KL(π_ref ‖ π); the rewards' is that of −E[r]."""
    torch.manual_seed(0)
    logits, ref, rewards = torch.randn(5, dtype=torch.float64, requires_grad=True), torch.randn(5, dtype=torch.float64).log_softmax(0), torch.randn(5, dtype=torch.float64)
    logps = logits.log_softmax(0)
    p = logps.exp().detach()
    terms = [grpo.policy_loss(logps[y].view(1, 1), logps[y].detach().view(1, 1), ref[y].view(1, 1), rewards[y].view(1), torch.ones(1, 1), 1, 1, loss, 0.7, max_new_tokens=1)
             for y in range(5)]
    assert sum(p[y] * terms[y][2].item() for y in range(5)).item() == pytest.approx((p * (p.log() - ref)).sum().item(), abs=1e-12)
    expected = sum(p[y] * terms[y][0] for y in range(5))
    exact = 0.7 * (ref.exp() * (ref - logps)).sum() - (logps.exp() * rewards).sum()
    assert torch.allclose(torch.autograd.grad(expected, logits, retain_graph=True)[0], grad_of(exact, logits), atol=1e-12)


@pytest.mark.parametrize("loss", LOSSES)
def test_parity_with_trl_grpo(loss):
    """Loss (1e-5) and gradient norm (1e-4) of TRL 1.16 in fp32. Its cispo takes the bound itself, ours adds 1 as the paper does."""
    pytest.importorskip("trl")
    from trl.trainer.grpo_trainer import GRPOTrainer
    logps, old, ref, advantages, mask = (x.detach() if x.dtype == torch.long else x.detach().float() for x in random_batch(5))
    logps.requires_grad_()
    trainer = MagicMock()
    trainer._get_per_token_logps_and_entropies = lambda *args, **kwargs: (logps, torch.zeros_like(logps), None)
    trainer.aux_loss_enabled, trainer.top_entropy_quantile, trainer.off_policy_mask_threshold, trainer.use_vllm = False, 1.0, None, False
    trainer.importance_sampling_level, trainer.loss_type = "sequence" if loss == "gspo" else "token", "grpo" if loss == "gspo" else loss
    trainer.beta, trainer.epsilon_low, trainer.epsilon_high, trainer.max_completion_length = 0.3, 0.2, 1.28 if loss == "cispo" else 0.28, 9
    trainer.args.use_bias_correction_kl, trainer.args.delta, trainer.args.steps_per_generation = False, None, 1
    trainer.current_gradient_accumulation_steps, trainer.accelerator.num_processes, trainer._entropy_bonus_enabled = 1, 1, False
    trainer.accelerator.gather, trainer.accelerator.reduce, trainer._metrics = lambda x: x, lambda x, **kwargs: x, {"train": defaultdict(list)}
    inputs = {"prompt_ids": mask[:, :0], "prompt_mask": mask[:, :0], "completion_ids": mask, "completion_mask": mask, "advantages": advantages,
              "old_per_token_logps": old, "ref_per_token_logps": ref, "num_items_in_batch": mask.sum()}
    theirs = GRPOTrainer._compute_loss(trainer, None, inputs)
    ours = whole(logps, old, ref, advantages, mask, loss, beta=0.3, epsilon=0.2, epsilon_high=0.28, max_new_tokens=9)
    assert ours.item() == pytest.approx(theirs.item(), abs=1e-5)
    assert grad_of(ours, logps).norm().item() == pytest.approx(grad_of(theirs, logps).norm().item(), rel=1e-4)


# ---- advantages -------------------------------------------------------------------------------------------

def test_advantages_against_the_statistics_module():
    """Standardised with ddof 1 and 1e-4; Dr.GRPO leaves the spread in; RLOO takes the mean of the others; REINFORCE nothing."""
    rewards = torch.randn(4, 5, dtype=torch.float64)
    for i, group in enumerate(rewards.tolist()):
        mean, std = statistics.fmean(group), statistics.stdev(group)
        assert grpo.group_advantages(rewards)[i].tolist() == pytest.approx([(r - mean) / (std + 1e-4) for r in group])
        assert grpo.group_advantages(rewards, scale=False)[i].tolist() == pytest.approx([r - mean for r in group])
        others = [statistics.fmean(group[:j] + group[j + 1:]) for j in range(5)]
        assert grpo.group_advantages(rewards, "rloo")[i].tolist() == pytest.approx([r - o for r, o in zip(group, others)])
        assert grpo.group_advantages(rewards, "none")[i].tolist() == group


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", [2, 3, 5, 7, 11, 13])
def test_equal_rewards_give_exactly_no_advantage(size, dtype):
    """Also where the rounded mean of equal numbers is another number, which a division by 1e-4 would blow up."""
    rewards = torch.tensor([0.1, 1 / 3, 0.7, -1e-3, 1e6 + 0.1, 0.0], dtype=dtype)[:, None].expand(-1, size)
    for baseline, scale in (("group", True), ("group", False), ("rloo", True)):
        assert (grpo.group_advantages(rewards, baseline, scale) == 0).all()


# ---- rewards ----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("text, truth, score", [
    ("36 - 25 = 11", "11", 1), ("11 cups", "11", 1), ("11", "12", 0), ("", "0", 0), ("11.", "11", 1), ("so 1,234.50", "1234.5", 1), ("-3", "3", 0), ("= -3", "-3", 1),
    (r"12, so \boxed{7}. Then 8", "7", 1), (r"\boxed{ 1/2 }", "0.5", 1), (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}", 1), (r"\boxed{\frac{1}{2}}", r"\frac{1}{3}", 0),
    (r"\boxed{$10$}", "$10$", 1), ("5", "2 + 3 = 5 #### 5", 1), ("6", "2 + 3 = 5 #### 5", 0), ("a2", "2", 0), (r"\boxed{3", "3", 1), ("50%", "50", 1)])
def test_correct_answer(text, truth, score):
    assert grpo.correct_answer(None, [text], answer=[truth]) == [score] == grpo.correct_answer(None, [text], solution=[truth])


def test_no_completion_makes_correct_answer_raise():
    """A reward that raises ends the run, and a model may write anything: 20000 random strings, also as the row's answer."""
    pieces, draw = ["\\boxed{", "}", "{", "$", "%", ".", ",", "/", "-", " ", "0", "1", "5", "12", "x", "####", "\n"], random.Random(0)
    texts = ["".join(draw.choices(pieces, k=draw.randint(0, 7))) for _ in range(20000)]
    assert set(grpo.correct_answer(None, texts, answer=texts[::-1])) == {0.0, 1.0}


def test_well_formed_and_concise():
    for text, score in {"1 + 1 = 2": 1, "2.": 1, r"So \boxed{x + y}.": 1, "$2$": 1, "2 apples": 0, "none": 0, "": 0, r"\boxed{2} is it": 0}.items():
        assert grpo.well_formed(None, [text]) == [score], text
    assert grpo.concise(None, ["", "a" * 250, "a" * 1000, "a" * 5000]) == [1.0, 0.75, 0.0, 0.0]


def write_rewards(tmp_path):
    """A file with a reward for each way of going wrong, and one that writes down what it was given."""
    (tmp_path / "rewards.py").write_text(f"""import json
def record(**given):
    with open({str(tmp_path / 'given.jsonl')!r}, "a") as file:
        file.write(json.dumps(given) + "\\n")
    return [len(text) for text in given["completions"]]
def raises(prompts, completions, **columns): raise KeyError("no such thing")
def too_few(prompts, completions, **columns): return [1.0]
def nan(prompts, completions, **columns): return [0.0, float("nan")] + [0.0] * (len(prompts) - 2)
def varied(prompts, completions, **columns): return [sum(map(ord, text)) % 10 / 10 for text in completions]
def half(prompts, completions, difficulty, **columns): return [len(text) if d > 4 else 1.0 for text, d in zip(completions, difficulty)]
def words(prompts, completions, **columns): return ["good"] * len(prompts)
""")
    return str(tmp_path / "rewards.py")


ROWS = [{"prompt": f"Sam has {n} cups", "answer": str(n), "difficulty": n} for n in (3, 5, 7)]


@pytest.mark.parametrize("name, words", [("raises", "raised KeyError: 'no such thing'"), ("too_few", "gave 1 scores for 3 completions"), ("nan", "gave nan"),
                                         ("words", "raised ValueError"), ("absent", "no function 'absent'")])
def test_a_reward_that_fails_ends_the_run_with_the_row_shown(name, words, tmp_path, write_jsonl, refused):
    line = refused(run, tmp_path, reward=[f"{write_rewards(tmp_path)}:{name}"], dataset=write_jsonl(ROWS), eval_dataset=write_jsonl(ROWS, "eval.jsonl"))
    assert words in line and name in line and (name == "absent" or '"difficulty"' in line and '"completion"' in line)
    assert name != "nan" or '"difficulty": 5' in line  # the row of the NaN, not the first


def test_rewards_get_prompts_completions_and_every_other_column(tmp_path, write_jsonl):
    """One entry a completion, in step with each other; weights apply; the sum is the reward."""
    folder = run(tmp_path, reward=[f"{write_rewards(tmp_path)}:record", "concise"], reward_weights=[0.5, 2.0], dataset=write_jsonl(ROWS), eval_dataset=write_jsonl(ROWS, "eval.jsonl"))
    given = [json.loads(line) for line in (tmp_path / "given.jsonl").read_text().splitlines()]
    assert [len(call["prompts"]) for call in given] == [3, 8, 8, 3]  # before, 2 steps of 2 x 4, after
    for call in given:
        assert set(call) == {"prompts", "completions", "answer", "difficulty"}
        assert call["prompts"] == [f"Sam has {n} cups" for n in call["difficulty"]] and call["answer"] == [str(n) for n in call["difficulty"]]
    for call, m in zip(given[1:3], metrics_of(folder)):
        assert m["reward_record"] == pytest.approx(statistics.fmean(map(len, call["completions"])))
        assert m["reward_concise"] == pytest.approx(statistics.fmean(1 - len(text) / 1000 for text in call["completions"]))
        assert m["reward"] == pytest.approx(0.5 * m["reward_record"] + 2 * m["reward_concise"], rel=1e-6)
        assert m["reward_std"] == pytest.approx(statistics.pstdev(0.5 * len(t) + 2 * (1 - len(t) / 1000) for t in call["completions"]), rel=1e-4)


# ---- samples and their log-probs --------------------------------------------------------------------------

def tiny_model():
    """The tiny chat model with an adapter away from its start, where half of the gradients are zero."""
    torch.manual_seed(0)
    model = common.load_model("tiny/chat")
    for name, p in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.02)
    return model


@pytest.fixture(scope="module")
def tiny():
    tokenizer = common.load_tokenizer("tiny/chat")
    rows = grpo.load_rows("tiny/data/prompt_train.jsonl", "train", 0, 0)[:4]
    prompts = [common.encode_prompt(tokenizer, row["prompt"]) for row in rows] + [tokenizer("1 + 1 =")["input_ids"]]
    return SimpleNamespace(model=tiny_model(), tokenizer=tokenizer, prompts=prompts)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_sampled_tokens_follow_the_distribution_that_scores_them(tiny, temperature):
    """Prompts of unequal length, 3 samples each: every token is where its random number falls in the softmax of a plain forward pass
    without padding or cache, and its log-prob there is that of completion_logps on the padded batch."""
    stop_ids = common.stop_token_ids(tiny.tokenizer, tiny.model.generation_config)
    ids = grpo.sample(tiny.model, tiny.prompts, 3, 10, temperature, stop_ids, tiny.tokenizer.pad_token_id, seed=5)
    prompts = [prompt for prompt in tiny.prompts for _ in range(3)]
    assert len({len(prompt) for prompt in prompts}) > 2 and len({len(row) for row in ids}) > 2
    batch = grpo.collate(prompts, ids, tiny.tokenizer.pad_token_id, "cpu")
    noise = torch.rand(len(ids), 10, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        logps = grpo.completion_logps(tiny.model, **batch, temperature=temperature)[0]
        for row, (prompt, completion) in enumerate(zip(prompts, ids)):
            assert completion[-1] in stop_ids or len(completion) == 10
            assert not set(completion[:-1]) & set(stop_ids)
            for t, token in enumerate(completion):
                expected = (tiny.model(torch.tensor([prompt + completion[:t]])).logits[0, -1].double() / temperature).log_softmax(-1)
                assert logps[row, len(prompt) - 1 + t].item() == pytest.approx(expected[token].item(), abs=1e-4)
                upper = expected.exp().cumsum(-1)[token].item()
                assert upper - expected[token].exp().item() - 1e-5 <= noise[row, t] <= upper + 1e-5
            logps[row, len(prompt) - 1:len(prompt) - 1 + len(completion)] = 0
        assert (logps == 0).all()  # nothing is scored but what was sampled


def test_reward_model_on_the_policys_base_scores_like_itself(tiny):
    """role_scores inside the policy model = the same reward model loaded alone, at the last token, whatever is padded around."""
    head = common.add_role(model := tiny_model(), "tiny/reward", "reward")
    alone = common.load_model("tiny/reward", task="SEQ_CLS", trainable=False)
    completions = [tiny.tokenizer(text)["input_ids"] + [tiny.tokenizer.eos_token_id] for text in ("11", "36 - 25 = 11", "97", "5 = 5 = 5", "2")]
    batch = grpo.collate(tiny.prompts, completions, tiny.tokenizer.pad_token_id, "cpu")
    before = grpo.completion_logps(model, **batch)[0]
    scores = grpo.role_scores(model, head, "reward", batch, 2)
    with torch.no_grad():
        for score, prompt, completion in zip(scores, tiny.prompts, completions):
            inner = alone.get_base_model()
            expected = inner.score(inner.model(input_ids=torch.tensor([prompt + completion])).last_hidden_state)[0, -1, 0]
            assert score.item() == pytest.approx(expected.item(), abs=1e-4)
    assert scores.std() > 0.05 and torch.equal(grpo.completion_logps(model, **batch)[0], before)


# ---- whole runs -------------------------------------------------------------------------------------------

def run(tmp_path, name="run", **kwargs):
    kwargs = {"eval_size": 4, "max_new_tokens": 12, "batch_size": 2, "group_size": 4, "max_steps": 2, "save_every": 1} | kwargs
    grpo.train(grpo.Args(output_dir=str(tmp_path / name), **kwargs))
    return tmp_path / name


def metrics_of(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_run_leaves_what_it_should_and_is_its_own_reference(tmp_path):
    """Files, figures and adapter; then a second run from that adapter, whose KL starts at 0 though adapters off would be another model."""
    first = run(tmp_path, max_steps=4, batch_size=4, show_every=2, learning_rate=3e-3, warmup_ratio=0)
    summary, logged = json.loads((first / "summary.json").read_text()), metrics_of(first)
    for key in ("method", "model", "dataset", "steps", "seconds", "tokens_per_second", "peak_memory_gib", "device", "dtype"):
        assert summary[key] not in (None, ""), key
    assert {"reward", "length", "stopped"} <= set(summary["before"]) & set(summary["after"])
    wanted = {"reward", "reward_std", "reward_correct_answer", "zero_spread", "kl", "entropy", "clip_fraction", "ratio", "length", "truncated", "advantage_std", "loss",
              "sampling_share", "grad_norm", "learning_rate", "tokens_per_second", "peak_memory_gib"}
    assert all(wanted <= set(m) for m in logged) and [m["step"] for m in logged] == [1, 2, 3, 4]
    assert [m["learning_rate"] for m in logged] == pytest.approx([3e-3 * (0.5 + 0.5 * math.cos(math.pi * n / 4)) for n in range(4)])
    assert abs(logged[0]["kl"]) < 1e-9 and logged[3]["kl"] > 1e-5 and 0 < logged[0]["sampling_share"] < 1
    samples = [json.loads(line) for line in (first / "samples.jsonl").read_text().splitlines()]
    assert [s["step"] for s in samples] == [1] * 4 + [2] * 4 + [4] * 4 and {"prompt", "completion", "rewards", "advantage"} <= set(samples[0])
    from peft import AutoPeftModelForCausalLM
    ids = torch.tensor([[5, 9, 20, 31]])
    os.chdir(ROOT)
    ours = common.load_model(str(first), trainable=False)(ids).logits
    assert torch.allclose(AutoPeftModelForCausalLM.from_pretrained(first, dtype=torch.float32)(ids).logits, ours, atol=1e-5)
    assert not torch.allclose(common.load_model("tiny/chat", trainable=False)(ids).logits, ours, atol=1e-3)
    assert abs(metrics_of(run(tmp_path, "second", model=str(first), max_steps=1))[0]["kl"]) < 1e-9


@pytest.mark.parametrize("loss, baseline, size", [("dr_grpo", "group", 4), ("dapo", "group", 4), ("gspo", "rloo", 4), ("cispo", "group", 4), ("grpo", "none", 1)])
def test_every_loss_and_baseline_trains(loss, baseline, size, tmp_path):
    folder = run(tmp_path, loss=loss, baseline=baseline, group_size=size, reward=[f"{write_rewards(tmp_path)}:varied"], max_new_tokens=24, temperature=1.5)
    assert all(math.isfinite(m["loss"]) and m["grad_norm"] > 0 for m in metrics_of(folder))
    assert all(("kl" in m) == (loss in ("grpo", "gspo")) for m in metrics_of(folder))  # the others have no KL term by default, so none is measured
    weights = load_file(folder / "adapter_model.safetensors")
    assert any(w.abs().sum() > 0 for name, w in weights.items() if "lora_B" in name)


def test_dapo_with_nothing_left_to_learn_from_moves_nothing(tmp_path):
    """Cut off by --max-new-tokens 1, every answer is filtered: loss and gradient are 0, and the adapter stays what it was."""
    folder = run(tmp_path, loss="dapo", max_new_tokens=1, reward=[f"{write_rewards(tmp_path)}:varied"], temperature=3.0)
    assert all(m["loss"] == m["grad_norm"] == 0 and m["truncated"] == 1 and m["zero_spread"] < 1 for m in metrics_of(folder))
    assert all((w == 0).all() for name, w in load_file(folder / "adapter_model.safetensors").items() if "lora_B" in name)


def test_dapo_counts_only_the_tokens_of_groups_with_spread(tmp_path, monkeypatch, write_jsonl):
    """The prompt of difficulty 3 gets 1 whatever is answered: its answers are masked and not among the tokens that the loss is divided by."""
    seen, original = [], grpo.policy_loss
    monkeypatch.setattr(grpo, "policy_loss", lambda *args: (seen.append(args), original(*args))[1])
    monkeypatch.setattr(grpo, "sample", sample_by_prompt)
    rows = [write_jsonl(ROWS, name) for name in ("train.jsonl", "eval.jsonl")]
    folder = run(tmp_path, loss="dapo", reward=[f"{write_rewards(tmp_path)}:half"], dataset=rows[0], eval_dataset=rows[1], batch_size=3, max_steps=1, beta=0.0)
    (_, _, _, advantages, mask, _, tokens, *_), = seen
    used = advantages.view(3, 4).abs().sum(1) > 0
    assert used.sum() == 2 and metrics_of(folder)[0]["zero_spread"] == pytest.approx(1 / 3)
    assert ((mask.view(3, 4, -1).sum((1, 2)) > 0) == used).all() and tokens == mask.sum()


def test_the_ratio_is_1_in_the_first_update_and_not_after(tmp_path, monkeypatch):
    """--updates 3 compares with the policy that sampled: ratio 1 and nothing clipped first, then away from it; all in one optimizer step each."""
    seen, original = [], grpo.policy_loss

    def spy(*args, **kwargs):
        result = original(*args, **kwargs)
        seen.append(result[1].detach()[args[4].bool()])
        return result
    monkeypatch.setattr(grpo, "policy_loss", spy)
    folder = run(tmp_path, updates=3, learning_rate=3e-3, warmup_ratio=0, reward=[f"{write_rewards(tmp_path)}:varied"], temperature=1.5)
    assert len(seen) == 6
    for i, logged in enumerate(metrics_of(folder)):  # what is logged is the mean over the updates
        assert logged["ratio"] == pytest.approx(sum(ratio.mean().item() for ratio in seen[3 * i:3 * i + 3]) / 3, rel=1e-5)
    for i, ratio in enumerate(seen):
        assert ((ratio - 1).abs().max() < 1e-5) == (i % 3 == 0), i
    assert all(m["ratio"] != 1 for m in metrics_of(folder))


def test_micro_batches_and_checkpointing_change_nothing(tmp_path):
    """They save memory, and the figures stay."""
    settings = {"updates": 2}
    one = metrics_of(run(tmp_path, "one", **settings))
    for name, changed in {"micro": {"micro_batch_size": 3}, "checkpointing": {"gradient_checkpointing": "on"}}.items():
        for a, b in zip(one, metrics_of(run(tmp_path, name, **settings, **changed)), strict=True):
            for figure in ("loss", "kl", "grad_norm", "entropy", "ratio", "reward"):
                assert a[figure] == pytest.approx(b[figure], rel=1e-3, abs=1e-6), (name, a["step"], figure)


def test_a_learned_reward_beside_a_function(tmp_path):
    """--reward-model alone replaces the default function, beside --reward its score is added with weight 1."""
    alone = metrics_of(run(tmp_path, "alone", reward_model="tiny/reward", max_steps=1))[0]
    assert alone["reward"] == pytest.approx(alone["reward_reward_model"], rel=1e-6) and "reward_correct_answer" not in alone
    both = metrics_of(run(tmp_path, "both", reward_model="tiny/reward", reward=["concise"], reward_weights=[3.0], max_steps=1))[0]
    assert both["reward"] == pytest.approx(both["reward_reward_model"] + 3 * both["reward_concise"], rel=1e-6)
    assert both["reward_reward_model"] == pytest.approx(alone["reward_reward_model"], abs=1e-4)  # the same samples


def process(*flags):
    env = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.Popen([sys.executable, *flags], cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def test_a_killed_run_resumes_to_the_same_numbers(tmp_path, monkeypatch):
    """Killed between two savings, the run ends bit for bit like one that was never interrupted."""
    settings, killed = {"max_steps": 7, "save_every": 3, "updates": 2, "show_every": 2}, tmp_path / "killed"
    flags = [str(x) for k, v in ({"eval_size": 4, "max_new_tokens": 12, "batch_size": 2, "group_size": 4} | settings).items() for x in ("--" + k.replace("_", "-"), v)]
    child = process("grpo.py", *flags, "--output-dir", str(killed))
    whole_run = run(tmp_path, "whole", **settings)
    while not (killed / "metrics.jsonl").exists() or len((killed / "metrics.jsonl").read_text().splitlines()) < 5:
        assert child.poll() is None, child.stdout.read()
        time.sleep(0.01)
    child.kill()
    child.wait()
    assert not (killed / "summary.json").exists()
    monkeypatch.setattr(sys, "argv", ["grpo.py", "--resume", str(killed)])
    grpo.train(grpo.parse_args(grpo.Args, grpo.__doc__))
    for a, b in zip(metrics_of(whole_run), metrics_of(killed), strict=True):
        for name in a.keys() - {"tokens_per_second", "peak_memory_gib", "sampling_share"}:
            assert a[name] == b[name], (a["step"], name)
    old, new = load_file(whole_run / "adapter_model.safetensors"), load_file(killed / "adapter_model.safetensors")
    assert all(torch.equal(old[name], new[name]) for name in old)
    assert (whole_run / "samples.jsonl").read_text() == (killed / "samples.jsonl").read_text()
    assert json.loads((whole_run / "summary.json").read_text())["after"] == json.loads((killed / "summary.json").read_text())["after"]


def sample_by_prompt(model, prompts, samples_per_prompt, max_new_tokens, temperature, stop_ids, pad_id, seed):
    """In place of sample: completions that follow from the prompt alone, however prompts are shared out."""
    draw = [random.Random(f"{prompt} {i}") for prompt in prompts for i in range(samples_per_prompt)]
    return [[d.randrange(10, 300) for _ in range(d.randint(1, 6))] + [stop_ids[-1]] for d in draw]


def test_two_processes_equal_one(tmp_path, monkeypatch):
    """torchrun with two gloo processes and an uneven share of the prompts gives the figures of one process, given the same samples."""
    settings = {"max_steps": 2, "updates": 2, "batch_size": 3, "group_size": 4, "eval_size": 4, "max_new_tokens": 12, "reward": ["concise"], "beta": 0.04}
    runs = [settings | {"loss": loss, "output_dir": str(tmp_path / f"{loss}-two")} for loss in ("grpo", "dapo")]
    child = process("-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "29541", __file__, *map(json.dumps, runs))
    monkeypatch.setattr(grpo, "sample", sample_by_prompt)
    for loss in ("grpo", "dapo"):
        run(tmp_path, f"{loss}-one", **settings, loss=loss)
    assert child.wait(timeout=120) == 0, child.stdout.read()
    for loss in ("grpo", "dapo"):
        for a, b in zip(metrics_of(tmp_path / f"{loss}-one"), metrics_of(tmp_path / f"{loss}-two"), strict=True):
            for name in ("loss", "kl", "ratio", "entropy", "clip_fraction", "reward", "reward_std", "zero_spread", "advantage_std", "length", "truncated", "grad_norm"):
                assert a[name] == pytest.approx(b[name], rel=1e-3, abs=1e-6), (loss, a["step"], name)


# ---- bad input --------------------------------------------------------------------------------------------

@pytest.mark.parametrize("flags, words", [
    ({"group_size": 1}, "--group-size 1 is out of range: from 2"), ({"baseline": "rloo", "group_size": 1}, "--group-size"), ({"updates": 0}, "--updates"),
    ({"beta": -0.1}, "--beta"), ({"epsilon": 0.0}, "--epsilon"), ({"epsilon_high": -1.0}, "--epsilon-high"), ({"temperature": 0.0}, "--temperature"),
    ({"warmup_ratio": 1.5}, "--warmup-ratio"), ({"learning_rate": -1.0}, "--learning-rate"), ({"max_new_tokens": 0}, "--max-new-tokens"), ({"batch_size": 0}, "--batch-size"),
    ({"learning_rate": math.nan}, "--learning-rate"), ({"reward_weights": [1.0, 2.0]}, "--reward-weights has 2 numbers for the 1 functions"),
    ({"reward": ["concise"], "reward_weights": []}, "--reward-weights has 0 numbers"), ({"reward": ["shortness"]}, "--reward shortness"), ({"reward": ["nofile.py:f"]}, "nofile.py"),
    ({"model": "tiny/base", "reward_model": "tiny/reward"}, "one base has to carry both"), ({"reward_model": "tiny/chat"}, "tiny/chat"), ({"track": "wandb"}, "not installed"),
    ({"max_prompt_length": 2}, "longer than 2 tokens: raise --max-prompt-length"), ({"reward": ["concise", "concise"]}, "twice"), ({"reward": ["a.py:f", "b.py:f"]}, "twice"),
    ({"reward_weights": [math.nan]}, "--reward-weights must be finite"), ({"max_new_tokens": 509}, "lower --max-new-tokens"),
    ({"loss": "dapo", "baseline": "none"}, "choose --baseline group or rloo"), ({"dataset": "x.jsonl", "eval_dataset": "x.jsonl"}, "is also what is trained on"),
])
def test_bad_flags_are_refused(flags, words, tmp_path, refused):
    assert words in refused(run, tmp_path, **flags)


def test_the_answer_may_be_called_solution_row_by_row():
    assert grpo.correct_answer(["?"] * 3, ["7", "7", "7"], answer=["7", None, "8"], solution=[None, "7", "7"]) == [1.0, 1.0, 0.0]


@pytest.mark.parametrize("rows, words", [([{"prompt": "1 + 1 =", "answer": None}], "row 1, has no answer and no solution"), ([{"prompt": "", "answer": "2"}], "row 1: the prompt is empty"),
                                         ([{"question": "x"}], "row 1, has no prompt"), ([{"prompt": 5}], "row 1, has no prompt"), ([ROWS[0]], "too few different prompts"),
                                         ([{"prompt": [{"role": "assistant", "content": "x"}]}], "roles out of order")])
def test_bad_rows_are_refused(rows, words, write_jsonl, tmp_path, refused):
    assert words in refused(run, tmp_path, dataset=write_jsonl(rows))


def test_a_loss_that_is_not_finite_stops_the_run_with_step_dtype_and_cause(tmp_path, capsys):
    with pytest.raises(SystemExit) as exit_info:
        run(tmp_path, learning_rate=1e9, max_grad_norm=1e9, warmup_ratio=0, max_steps=20, reward=[f"{write_rewards(tmp_path)}:varied"])
    line = capsys.readouterr().err.splitlines()[-1]
    assert exit_info.value.code == 2 and line.startswith("error: step ") and "float32" in line and "--learning-rate" in line


if __name__ == "__main__":  # one of the two processes above
    grpo.sample = sample_by_prompt
    torch.distributed.init_process_group("gloo")
    torch.distributed.init_process_group = lambda backend: None  # once for all runs
    for settings in sys.argv[1:]:
        grpo.train(grpo.Args(**json.loads(settings)))
