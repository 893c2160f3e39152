import json
import math
import os
import random
import statistics
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import common
import ppo
import pytest
import torch
from safetensors.torch import load_file
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer, BertConfig, BertForSequenceClassification, Qwen2Config, Qwen2ForSequenceClassification

ROOT = Path(__file__).resolve().parents[1]
GARBAGE = 0.7  # stands outside the mask, where nothing may be read


def random_batch(count, seed=0, rows=6, width=9):
    """`count` random tensors [B, T-1] and the mask of ragged answers after prompts of unequal length."""
    g = torch.Generator().manual_seed(seed)
    start, length = torch.randint(0, 4, (rows, 1), generator=g), torch.randint(1, 6, (rows, 1), generator=g)
    mask = ((torch.arange(width) >= start) & (torch.arange(width) < start + length)).long()
    return *(torch.where(mask.bool(), torch.randn(rows, width, generator=g, dtype=torch.float64), GARBAGE) for _ in range(count)), mask


def grad_of(value, tensor):
    return torch.autograd.grad(value, tensor)[0]


# ---- rewards and advantages -------------------------------------------------------------------------------

def test_every_token_pays_its_kl_and_the_last_one_gets_the_score():
    """Token by token; the score is nowhere but on the last generated token, and nothing is outside the mask."""
    logps, ref, mask = random_batch(2)
    scores = torch.arange(10.0, 16.0, dtype=torch.float64)
    rewards = ppo.token_rewards(scores, logps, ref, mask, 0.3).tolist()
    for row, m in enumerate(mask.tolist()):
        places = [t for t in range(len(m)) if m[t]]
        for t in range(len(m)):
            expected = (-0.3 * (logps[row, t] - ref[row, t]).item() if m[t] else 0) + (scores[row].item() if t == places[-1] else 0)
            assert rewards[row][t] == pytest.approx(expected, abs=1e-12), (row, t)


@pytest.mark.parametrize("gamma, lam", [(1.0, 0.95), (0.9, 0.7), (1.0, 1.0), (0.9, 0.0), (0.8, 1.0)])
def test_advantages_are_the_double_sum_of_the_paper(gamma, lam):
    """A_t = Σ_l (γλ)^l δ_{t+l} over the answer, in O(T²). λ = 1: discounted return − value. λ = 0: the TD error. Garbage outside is not read."""
    rewards, values, mask = random_batch(2, seed=1)
    advantages, returns = ppo.generalised_advantages(rewards, values, mask, gamma, lam)
    for row, m in enumerate(mask.tolist()):
        places = [t for t in range(len(m)) if m[t]]
        r, v = rewards[row, places].tolist(), [*values[row, places].tolist(), 0.0]
        deltas = [r[i] + gamma * v[i + 1] - v[i] for i in range(len(places))]
        expected = [sum((gamma * lam) ** j * delta for j, delta in enumerate(deltas[i:])) for i in range(len(places))]
        assert advantages[row, places].tolist() == pytest.approx(expected, abs=1e-12)
        assert returns[row, places].tolist() == pytest.approx([a + b for a, b in zip(expected, v)], abs=1e-12)
        if lam == 1:
            assert expected == pytest.approx([sum(gamma**j * x for j, x in enumerate(r[i:])) - v[i] for i in range(len(places))])
        if lam == 0:
            assert expected == pytest.approx(deltas)
    assert (advantages[mask == 0] == 0).all() and (returns[mask == 0] == 0).all()


def test_whitening_reads_the_mask_alone():
    """Mean 0 and variance 1 over the real tokens, order kept; neither garbage outside nor more padding changes them; equal numbers give 0."""
    values, mask = random_batch(1, seed=2)
    white = ppo.whiten(5 * values + 3, mask)
    inside = white[mask.bool()]
    assert inside.mean().abs() < 1e-6 and (inside.var(unbiased=False) - 1).abs() < 1e-6 and (white[mask == 0] == 0).all()
    assert torch.equal(inside.argsort(), values[mask.bool()].argsort())
    other = ppo.whiten(torch.nn.functional.pad(torch.where(mask.bool(), 5 * values + 3, 99.0), (2, 3)), torch.nn.functional.pad(mask, (2, 3)))
    assert torch.allclose(other[:, 2:-3], white, atol=1e-12)
    assert ppo.whiten(torch.full((2, 3), 0.1), torch.ones(2, 3)).abs().max() < 1e-3


# ---- the losses -------------------------------------------------------------------------------------------

def test_policy_loss_token_by_token_and_by_gradcheck():
    """−min(ρA, clip(ρ)A) summed over the mask and divided by the tokens given."""
    old, noise, advantages, mask = random_batch(3, seed=3)
    logps = (old + 0.4 * noise).requires_grad_()
    expected = 0.0
    for x, o, a, m in zip(*(t.flatten().tolist() for t in (logps, old, advantages, mask))):
        ratio = math.exp(x - o)
        expected -= m * min(ratio * a, min(max(ratio, 0.8), 1.2) * a) / 50
    loss, ratio = ppo.clipped_loss(logps, old, advantages, mask, 50, 0.2)
    assert loss.item() == pytest.approx(expected, abs=1e-12)
    assert torch.allclose(ratio[mask.bool()], (logps - old).exp()[mask.bool()])
    assert torch.autograd.gradcheck(lambda x: ppo.clipped_loss(x, old, advantages, mask, 50, 0.2)[0], logps)
    assert (grad_of(loss, logps)[mask == 0] == 0).all()


@pytest.mark.parametrize("advantage, ratio, moves", [(2.0, 0.7, True), (2.0, 1.1, True), (2.0, 1.3, False), (-2.0, 0.7, False), (-2.0, 0.9, True), (-2.0, 1.3, True)])
def test_the_clip_cells(advantage, ratio, moves):
    """No gradient for going further, up with A > 0 above 1.2 and down with A < 0 below 0.8; always one for the way back."""
    logps = torch.full((1, 1), math.log(ratio), dtype=torch.float64, requires_grad=True)
    loss = ppo.clipped_loss(logps, torch.zeros(1, 1), torch.full((1, 1), advantage), torch.ones(1, 1), 1, 0.2)[0]
    assert grad_of(loss, logps).item() == pytest.approx(-advantage * ratio if moves else 0.0)
    assert loss.item() == pytest.approx(-advantage * (ratio if moves else 1.2 if ratio > 1 else 0.8))


def test_value_loss_token_by_token_and_by_gradcheck():
    """½ max of the two squared errors, summed over the mask and divided by the tokens given."""
    values, old, returns, mask = random_batch(3, seed=4)
    values.requires_grad_()
    expected = 0.0
    for v, o, r, m in zip(*(t.flatten().tolist() for t in (values, old, returns, mask))):
        expected += m * 0.5 * max((v - r) ** 2, (o + min(max(v - o, -0.2), 0.2) - r) ** 2) / 40
    loss = ppo.value_loss(values, old, returns, mask, 40, 0.2)
    assert loss.item() == pytest.approx(expected, abs=1e-12)
    assert torch.autograd.gradcheck(lambda x: ppo.value_loss(x, old, returns, mask, 40, 0.2), values)
    assert (grad_of(loss, values)[mask == 0] == 0).all()


@pytest.mark.parametrize("value, target, moves", [(0.5, 1.0, False), (-0.5, -1.0, False), (0.1, 1.0, True), (0.5, 0.0, True), (-0.5, 0.0, True), (0.5, 0.3, True), (3.0, 1.0, True)])
def test_value_clipping(value, target, moves):
    """Old value 0, ε 0.2: a value beyond ±0.2 on the target's side gets no gradient, unless its own error is the larger one."""
    values = torch.full((1, 1), value, dtype=torch.float64, requires_grad=True)
    loss = ppo.value_loss(values, torch.zeros(1, 1), torch.full((1, 1), target), torch.ones(1, 1), 1, 0.2)
    assert grad_of(loss, values).item() == pytest.approx(value - target if moves else 0.0)


def test_micro_batches_add_up_to_the_minibatch():
    """Value and gradient of both losses, for uneven parts."""
    a, b, c, mask = random_batch(3, seed=5)
    for loss in (lambda x, *rest: ppo.clipped_loss(x, *rest, 33, 0.2)[0], lambda x, *rest: ppo.value_loss(x, *rest, 33, 0.2)):
        x = (b + 0.3 * a).requires_grad_()
        value = loss(x, b, c, mask)
        parts = sum(loss(x[i], b[i], c[i], mask[i]) for i in (slice(0, 1), slice(1, 4), slice(4, 6)))
        assert parts.item() == pytest.approx(value.item(), abs=1e-12) and torch.allclose(grad_of(parts, x), grad_of(value, x), atol=1e-12)


def enumerated():
    """All answers of a two-token policy over {stop, 1, 2} and their probabilities: log-probs [7, 2] of policy and reference, with gradient."""
    torch.manual_seed(0)
    first, second, ref_first, ref_second = (torch.randn(shape, dtype=torch.float64) for shape in ((3,), (3, 3), (3,), (3, 3)))
    first.requires_grad_(), second.requires_grad_()
    answers = [(0,)] + [(a, b) for a in (1, 2) for b in range(3)]

    def logps(first, second):
        return torch.stack([torch.stack([first.log_softmax(0)[y[0]], second.log_softmax(1)[y[0], y[1]] if len(y) > 1 else torch.zeros(())]) for y in answers])
    mask = torch.tensor([[1, len(y) - 1] for y in answers])
    new, ref = logps(first, second) * mask, logps(ref_first, ref_second) * mask
    # a critic that knows what was written so far, as the real one does, and is wrong
    values = torch.stack([torch.tensor([0.3, [0.0, -0.8, 1.1][y[0]]], dtype=torch.float64) for y in answers]) * mask
    return (first, second), new, ref, mask, new.sum(1).exp(), values


def test_the_kl_in_the_reward_is_exact_by_enumeration():
    """k1: the expected sum of the token rewards is −β KL(π ‖ π_ref), and REINFORCE on it follows the KL's true gradient; k1 in the
    loss has expected gradient 0; k3 in the reward would give another gradient."""
    tables, logps, ref, mask, p, _ = enumerated()
    exact = (p * (logps - ref).sum(1)).sum()
    truth = torch.autograd.grad(exact, tables, retain_graph=True)
    rewards = ppo.token_rewards(torch.zeros(7, dtype=torch.float64), logps, ref, mask, 0.3)
    assert (p * rewards.sum(1)).sum().item() == pytest.approx(-0.3 * exact.item(), abs=1e-12) and exact > 0.1
    k3 = ((ref - logps).exp() - (ref - logps) - 1) * mask
    for total, right in ((rewards.sum(1), True), (-0.3 * k3.sum(1), False)):
        followed = torch.autograd.grad((p.detach() * total.detach() * logps.sum(1)).sum(), tables, retain_graph=True)
        assert all(torch.allclose(a, -0.3 * b, atol=1e-12) for a, b in zip(followed, truth)) == right
    for grad in torch.autograd.grad((p.detach() * rewards.sum(1)).sum(), tables):
        assert grad.abs().max() < 1e-12


def test_the_whole_chain_follows_the_true_gradient_by_enumeration():
    """Rewards, advantages over a wrong critic with γ = λ = 1 and the loss at ratio 1: in expectation ∇ (E[score] − β KL)."""
    tables, logps, ref, mask, p, values = enumerated()
    scores = torch.randn(7, dtype=torch.float64)
    truth = torch.autograd.grad((p * (scores - 0.3 * (logps - ref).sum(1))).sum(), tables, retain_graph=True)
    rewards = ppo.token_rewards(scores, logps.detach(), ref, mask, 0.3)
    advantages, returns = ppo.generalised_advantages(rewards, values, mask, 1.0, 1.0)
    loss = sum(p[i].item() * ppo.clipped_loss(logps[i:i + 1], logps[i:i + 1].detach(), advantages[i:i + 1], mask[i:i + 1], 1, 0.2)[0] for i in range(7))
    for grad, true in zip(torch.autograd.grad(loss, tables), truth):
        assert torch.allclose(-grad, true, atol=1e-12) and true.abs().max() > 0.01
    assert torch.allclose(returns[:, 0], scores - 0.3 * ((logps - ref) * mask).sum(1).detach())


# ---- the roles --------------------------------------------------------------------------------------------

@pytest.fixture
def roles():
    """A policy away from its reference, the shipped reward model and a new critic on one base, with a batch of answers."""
    torch.manual_seed(0)
    model = common.load_model("tiny/chat")
    reward_head, critic_head = common.add_role(model, "tiny/reward", "reward"), common.add_role(model, None, "critic", trainable=True)
    torch.nn.init.normal_(critic_head.weight, std=0.1)
    for name, p in model.named_parameters():
        if "lora_B.default" in name or "lora_B.critic" in name:
            torch.nn.init.normal_(p, std=0.02)
    tokenizer = common.load_tokenizer("tiny/chat")
    prompts = [common.encode_prompt(tokenizer, row["prompt"]) for row in ppo.load_rows("tiny/data/prompt_train.jsonl", "train", 0, 0)[:4]]
    answers = [tokenizer(text)["input_ids"] + [tokenizer.eos_token_id] for text in ("11", "36 - 25 = 11", "97", "14 = 5 = 5")]
    return SimpleNamespace(model=model, reward_head=reward_head, critic_head=critic_head, batch=ppo.collate(prompts, answers, tokenizer.pad_token_id, "cpu"))


def outputs(roles):
    """What each role says about the batch."""
    with torch.no_grad():
        with common.reference(roles.model):
            reference = ppo.completion_logps(roles.model, **roles.batch)[0]
        return {"reference": reference, "policy": ppo.completion_logps(roles.model, **roles.batch)[0], "critic": ppo.token_values(roles.model, roles.critic_head, **roles.batch),
                "reward": ppo.role_scores(roles.model, roles.reward_head, "reward", roles.batch, 3)}


@pytest.mark.parametrize("role", ["policy", "critic"])
def test_a_step_of_one_role_moves_no_other(role, roles):
    """Gradients reach its adapter (and head) alone; after AdamW over all that can be trained, the other roles answer bit for bit as before."""
    mask, before = roles.batch["loss_mask"][:, 1:], outputs(roles)
    trained = {n: p for n, p in roles.model.named_parameters() if p.requires_grad} | {"critic_head": roles.critic_head.weight}
    assert {"default", "critic"} == {part for n in trained for part in n.split(".") if part in ("default", "critic", "reward", "reference")}
    assert all(not torch.equal(before["reference"], before[name]) for name in ("policy", "critic"))
    if role == "policy":
        loss = ppo.clipped_loss(ppo.completion_logps(roles.model, **roles.batch)[0], before["policy"], torch.ones_like(mask), mask, 9, 0.2)[0]
    else:
        loss = ppo.value_loss(ppo.token_values(roles.model, roles.critic_head, **roles.batch), before["critic"], torch.ones_like(mask), mask, 9, 0.2)
    loss.backward()
    own = {n for n in trained if (".default." in n if role == "policy" else "critic" in n)}
    assert {n for n, p in trained.items() if p.grad is not None and p.grad.abs().sum() > 0} == own
    torch.optim.AdamW(trained.values(), lr=1e-2).step()
    after = outputs(roles)
    assert {name for name in before if not torch.equal(before[name], after[name])} == {role}


def test_values_are_read_before_their_token_and_ignore_padding_and_answers_to_come(roles):
    """The value of a token depends on what is before it only, and is 0 outside the answer."""
    values, mask = outputs(roles)["critic"], roles.batch["loss_mask"][:, 1:]
    assert (values[mask == 0] == 0).all() and (values[mask == 1] != 0).all()
    for row in range(4):
        length = roles.batch["attention_mask"][row].sum().item()
        with torch.no_grad(), common.using(roles.model, "critic"):
            hidden = common.causal_lm(roles.model).base_model(input_ids=roles.batch["input_ids"][row:row + 1, :length - 1]).last_hidden_state[0]
        expected = (hidden @ roles.critic_head.weight[0]) * mask[row, :length - 1]
        assert torch.allclose(values[row, :length - 1], expected, atol=1e-5)


def test_the_critic_starts_as_the_reward_model_with_weights_of_its_own(roles):
    """Loaded from tiny/reward, it gives the reward model's own score at the last token, and training it leaves the reward model."""
    head = common.add_role(roles.model, "tiny/reward", "critic2", trainable=True)
    assert torch.allclose(ppo.role_scores(roles.model, head, "critic2", roles.batch, 4), outputs(roles)["reward"], atol=1e-5)
    assert head.weight.data_ptr() != roles.reward_head.weight.data_ptr() and head.weight.requires_grad and not roles.reward_head.weight.requires_grad


# ---- classifiers ------------------------------------------------------------------------------------------

def save_classifier(folder, kind="qwen", labels=1, template=True):
    """A random sequence classifier with the tiny tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "tiny/chat")
    tokenizer.chat_template = tokenizer.chat_template if template else None
    torch.manual_seed(0)
    sizes = dict(vocab_size=len(tokenizer), hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, num_labels=labels, initializer_range=0.5)
    model = BertForSequenceClassification(BertConfig(**sizes)) if kind == "bert" else Qwen2ForSequenceClassification(Qwen2Config(**sizes, num_key_value_heads=1, pad_token_id=0))
    if kind == "bert":  # its template writes what the tokenizer would otherwise put before a text
        tokenizer._tokenizer.post_processor = TemplateProcessing(single="A $A", special_tokens=[("A", 40)])
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("kind", ["bert", "qwen"])
def test_an_external_classifier_reads_the_whole_conversation(kind, tmp_path):
    """Each score is that of the rendered text alone, whatever is padded around; and a short run with it goes through."""
    folder = save_classifier(tmp_path / "rm", kind)
    tokenizer, model = AutoTokenizer.from_pretrained(folder), ppo.AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32).eval()
    rows, texts = ppo.load_rows("tiny/data/prompt_train.jsonl", "train", 0, 0)[:5], ["11", "", "36 - 25 = 11", "9 9 9 9", "x"]
    scores = ppo.classifier_scores(model, tokenizer, rows, texts, 2)
    for row, text, score in zip(rows, texts, scores.tolist()):
        ids = tokenizer.apply_chat_template([*row["prompt"], {"role": "assistant", "content": text}], return_tensors="pt", return_dict=False)
        assert score == pytest.approx(model(ids).logits.item(), abs=1e-4)
    assert scores.std() > 1e-3
    logged = metrics_of(run(tmp_path, reward_model=folder, max_steps=1, epochs=1))
    assert math.isfinite(logged[0]["reward"]) and logged[0]["reward"] != 0


def test_a_classifier_without_a_pad_token_scores_too(tmp_path):
    """Many tokenizers have none; answers of unequal length must still be scored together."""
    folder = save_classifier(tmp_path / "rm")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.pad_token = None
    tokenizer.save_pretrained(folder)
    assert AutoTokenizer.from_pretrained(folder).pad_token is None
    assert math.isfinite(metrics_of(run(tmp_path, reward_model=folder, max_steps=1, epochs=1))[0]["reward"])


@pytest.mark.parametrize("wrong, words", [({"labels": 3}, "rm"), ({"template": False}, "template")])
def test_a_classifier_that_cannot_score_is_refused_in_one_line(wrong, words, tmp_path, refused):
    """Three outputs instead of one; messages but no chat template to render them."""
    assert words in refused(run, tmp_path, reward_model=save_classifier(tmp_path / "rm", **wrong))


def test_a_language_model_is_no_reward_model(tmp_path, refused):
    """transformers would give it a head of noise and say nothing."""
    assert "tiny/chat is no reward model: it has no weights for score.weight" in refused(run, tmp_path, reward_model="tiny/chat")


# ---- whole runs -------------------------------------------------------------------------------------------

SMALL = {"eval_size": 4, "max_new_tokens": 12, "batch_size": 8, "minibatch_size": 4, "max_steps": 2, "save_every": 1, "epochs": 2}


def run(tmp_path, name="run", **kwargs):
    ppo.train(ppo.Args(output_dir=str(tmp_path / name), **SMALL | kwargs))
    return tmp_path / name


def metrics_of(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def reward_file(tmp_path):
    (tmp_path / "rewards.py").write_text("""
def varied(prompts, completions, answer, **columns): return [sum(map(ord, text)) % 10 / 10 for text in completions]
def raises(prompts, completions, **columns): raise KeyError("no such thing")
def too_few(prompts, completions, **columns): return [1.0]
def nan(prompts, completions, **columns): return [float("nan")] * len(prompts)
""")
    return str(tmp_path / "rewards.py")


def test_a_run_leaves_what_it_should_and_is_its_own_reference(tmp_path):
    """Files, figures and adapter; then a second run from that adapter, whose KL starts at exactly 0 though adapters off would be another model."""
    first = run(tmp_path, max_steps=4, show_every=2, learning_rate=3e-3, warmup_ratio=0)
    summary, logged = json.loads((first / "summary.json").read_text()), metrics_of(first)
    for key in ("method", "model", "dataset", "steps", "seconds", "tokens_per_second", "peak_memory_gib", "device", "dtype"):
        assert summary[key] not in (None, ""), key
    assert {"reward", "kl", "length", "stopped"} <= set(summary["before"]) & set(summary["after"]) and summary["before"]["kl"] == 0 != summary["after"]["kl"]
    wanted = {"reward", "reward_std", "kl", "beta", "entropy", "clip_fraction", "ratio", "policy_kl", "policy_loss", "value_loss", "explained_variance", "advantage_std", "length",
              "truncated", "sampling_share", "grad_norm", "learning_rate", "updates", "tokens_per_second", "peak_memory_gib"}
    assert all(wanted <= set(m) and all(math.isfinite(x) for x in m.values()) for m in logged) and [m["step"] for m in logged] == [1, 2, 3, 4]
    assert [m["learning_rate"] for m in logged] == pytest.approx([3e-3 * (0.5 + 0.5 * math.cos(math.pi * n / 4)) for n in range(4)])
    assert logged[0]["kl"] == 0 != logged[3]["kl"] and logged[0]["updates"] <= 4
    samples = [json.loads(line) for line in (first / "samples.jsonl").read_text().splitlines()]
    assert [s["step"] for s in samples] == [1] * 8 + [2] * 8 + [4] * 8 and {"prompt", "completion", "reward"} <= set(samples[0])
    from peft import AutoPeftModelForCausalLM
    ids = torch.tensor([[5, 9, 20, 31]])
    os.chdir(ROOT)
    ours = common.load_model(str(first), trainable=False)(ids).logits
    assert torch.allclose(AutoPeftModelForCausalLM.from_pretrained(first, dtype=torch.float32)(ids).logits, ours, atol=1e-5)
    assert not torch.allclose(common.load_model("tiny/chat", trainable=False)(ids).logits, ours, atol=1e-3)
    assert not any("critic" in name or "reward" in name for name in load_file(first / "adapter_model.safetensors"))
    assert metrics_of(run(tmp_path, "second", model=str(first), max_steps=1))[0]["kl"] == 0


def test_the_ratio_is_1_at_the_start_of_every_rollout_and_not_after(tmp_path, monkeypatch):
    """The first minibatch on new samples is compared with the policy that wrote them; the log-probs were taken at the same temperature."""
    seen, original = [], ppo.clipped_loss

    def spy(*args, **kwargs):
        result = original(*args, **kwargs)
        seen.append((result[1] - 1).abs().max().item())
        return result
    monkeypatch.setattr(ppo, "clipped_loss", spy)
    run(tmp_path, temperature=1.3, learning_rate=3e-3, warmup_ratio=0, target_kl=None)
    assert len(seen) == 8 and all((away < 1e-4) == (i % 4 == 0) for i, away in enumerate(seen)), seen


def test_what_was_computed_is_what_is_learned_from(tmp_path, monkeypatch):
    """The losses get the whitened advantages and the returns of the rollout, and the values of a critic that starts as the reward model."""
    seen = {}
    for name in ("generalised_advantages", "whiten", "clipped_loss", "value_loss"):
        def spy(*args, name=name, original=getattr(ppo, name)):
            seen[name] = args, original(*args)
            return seen[name][1]
        monkeypatch.setattr(ppo, name, spy)

    def same(a, b):  # in any order of the answers
        return torch.equal(a.flatten().sort().values, b.flatten().sort().values)
    settings = {"epochs": 1, "minibatch_size": 8, "max_steps": 1}
    logged = metrics_of(run(tmp_path, **settings))
    (_, values, mask, *_), (advantages, returns) = seen["generalised_advantages"]
    assert same(seen["whiten"][0][0], advantages) and same(seen["clipped_loss"][0][2], seen["whiten"][1]) and not same(advantages, seen["whiten"][1])
    assert same(seen["value_loss"][0][2], returns) and same(seen["value_loss"][0][1], values) and (values[mask == 1] != 0).all() and logged[0]["reward_std"] > 0
    run(tmp_path, "function", reward="correct_answer", **settings)
    assert (seen["generalised_advantages"][0][1] == 0).all()  # nothing to start from: a head of zeros


def test_policy_and_critic_share_one_gradient_norm_with_the_value_weight(tmp_path):
    """‖g‖² = ‖g_policy‖² + weight² ‖g_critic‖², for they share no weight."""
    square = [metrics_of(run(tmp_path, str(w), value_weight=w, epochs=1, minibatch_size=8, max_steps=1))[0]["grad_norm"] ** 2 for w in (0.0, 1.0, 2.0)]
    assert square[1] > 1.01 * square[0] > 0 and square[2] - square[0] == pytest.approx(4 * (square[1] - square[0]), rel=1e-3)


def test_micro_batches_and_checkpointing_change_nothing(tmp_path):
    """They save memory, and the figures stay: with checkpointing, each role's layers are computed again under its own adapter."""
    settings = {"value_weight": 5.0, "max_grad_norm": 1e3, "target_kl": None}
    one = metrics_of(run(tmp_path, "one", **settings))
    for name, changed in {"micro": {"micro_batch_size": 3}, "checkpointing": {"gradient_checkpointing": "on"}}.items():
        for a, b in zip(one, metrics_of(run(tmp_path, name, **settings, **changed)), strict=True):
            for figure in ("policy_loss", "value_loss", "kl", "grad_norm", "entropy", "reward", "explained_variance"):
                assert a[figure] == pytest.approx(b[figure], rel=2e-3, abs=1e-5), (name, a["step"], figure)


def test_score_penalty_and_kl_make_up_the_reward_and_beta_adapts(tmp_path):
    """A user's reward function, less the penalty for the share cut off, less β KL, is what is learned from; β follows eq. 2.2 of Ziegler et al."""
    folder = run(tmp_path, reward=f"{reward_file(tmp_path)}:varied", missing_eos_penalty=3.0, max_new_tokens=9, adaptive_kl=0.01, beta=0.5, max_steps=5, learning_rate=3e-3, warmup_ratio=0)
    logged = metrics_of(folder)
    for m in logged:
        assert m["reward_with_kl"] == pytest.approx(m["reward"] - 3 * m["truncated"] - m["beta"] * m["kl"], abs=1e-4)
    assert 0 < statistics.fmean(m["truncated"] for m in logged) < 1 and any(abs(m["kl"]) > 1e-3 for m in logged)
    assert logged[0]["beta"] == 0.5
    for a, b in zip(logged, logged[1:]):
        assert b["beta"] == pytest.approx(a["beta"] * (1 + 0.1 * max(-0.2, min(0.2, a["kl"] / 0.01 - 1))))
    samples = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    assert all(s["reward"] == pytest.approx(sum(map(ord, s["completion"])) % 10 / 10) for s in samples)


def test_target_kl_ends_the_epochs_early(tmp_path):
    """A tiny one after the first epoch, none never: updates = epochs x minibatches."""
    early = metrics_of(run(tmp_path, "early", epochs=2, target_kl=1e-9, learning_rate=3e-3, warmup_ratio=0))
    all_of_them = metrics_of(run(tmp_path, "all", epochs=2, target_kl=None, learning_rate=3e-3, warmup_ratio=0))
    assert [m["updates"] for m in early] == [2, 2] and [m["updates"] for m in all_of_them] == [4, 4]


def process(*flags):
    env = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.Popen([sys.executable, *flags], cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def test_a_killed_run_resumes_to_the_same_numbers(tmp_path, monkeypatch):
    """Killed between two savings, the run ends bit for bit like one that was never interrupted; with a β that adapts."""
    settings, killed = {"max_steps": 7, "save_every": 3, "show_every": 2, "adaptive_kl": 0.01}, tmp_path / "killed"
    flags = [str(x) for k, v in (SMALL | settings).items() for x in ("--" + k.replace("_", "-"), v)]
    child = process("ppo.py", *flags, "--output-dir", str(killed))
    whole_run = run(tmp_path, "whole", **settings)
    while not (killed / "metrics.jsonl").exists() or len((killed / "metrics.jsonl").read_text().splitlines()) < 5:
        assert child.poll() is None, child.stdout.read()
        time.sleep(0.01)
    child.kill()
    child.wait()
    assert not (killed / "summary.json").exists()
    monkeypatch.setattr(sys, "argv", ["ppo.py", "--resume", str(killed)])
    ppo.train(ppo.parse_args(ppo.Args, ppo.__doc__))
    for a, b in zip(metrics_of(whole_run), metrics_of(killed), strict=True):
        for name in a.keys() - {"tokens_per_second", "peak_memory_gib", "sampling_share"}:
            assert a[name] == b[name], (a["step"], name)
    old, new = load_file(whole_run / "adapter_model.safetensors"), load_file(killed / "adapter_model.safetensors")
    assert all(torch.equal(old[name], new[name]) for name in old)
    assert (whole_run / "samples.jsonl").read_text() == (killed / "samples.jsonl").read_text()
    assert json.loads((whole_run / "summary.json").read_text())["after"] == json.loads((killed / "summary.json").read_text())["after"]


def sample_by_prompt(model, prompts, samples_per_prompt, max_new_tokens, temperature, stop_ids, pad_id, seed):
    """In place of sample: answers that follow from the prompt alone, however prompts are shared out."""
    draw = [random.Random(f"{prompt} {i}") for prompt in prompts for i in range(samples_per_prompt)]
    return [[d.randrange(10, 300) for _ in range(d.randint(1, 6))] + [stop_ids[-1]] for d in draw]


def test_two_processes_equal_one(tmp_path, monkeypatch):
    """torchrun with two gloo processes gives the figures of one, given the same samples; and goes through where the processes' shares are
    uneven, which must not leave one of them waiting for a minibatch that the other does not have."""
    settings = {**SMALL, "target_kl": None, "batch_size": 7, "minibatch_size": 7}
    uneven = settings | {"batch_size": 9, "minibatch_size": 3, "output_dir": str(tmp_path / "uneven")}
    child = process("-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "29542", __file__,
                    json.dumps(settings | {"output_dir": str(tmp_path / "two")}), json.dumps(uneven))
    monkeypatch.setattr(ppo, "sample", sample_by_prompt)
    run(tmp_path, "one", **settings)
    try:
        assert child.wait(timeout=60) == 0, child.stdout.read()
    except subprocess.TimeoutExpired:
        child.terminate()  # torchrun ends its processes with it
        child.wait()
    for a, b in zip(metrics_of(tmp_path / "one"), metrics_of(tmp_path / "two"), strict=True):
        for name in ("policy_loss", "value_loss", "policy_kl", "clip_fraction", "entropy", "ratio", "reward", "reward_std", "reward_with_kl", "kl", "advantage_std", "length", "truncated", "grad_norm"):
            assert a[name] == pytest.approx(b[name], rel=2e-3, abs=1e-5), (a["step"], name)
    assert (tmp_path / "uneven/summary.json").exists(), "two processes with uneven shares do not end"


# ---- bad input --------------------------------------------------------------------------------------------

@pytest.mark.parametrize("flags, words", [
    ({"reward": "correct_answer", "reward_model": "tiny/reward"}, "--reward and --reward-model exclude each other"), ({"model": "nowhere/at-all"}, "name what scores the answers"),
    ({"model": "tiny/base", "reward_model": "tiny/reward"}, "one base has to carry both"), ({"reward_model": "nowhere/at-all"}, "nowhere/at-all"),
    ({"reward": "nofile.py:f"}, "nofile.py"), ({"epochs": 0}, "--epochs"), ({"lam": 1.1}, "--lam"), ({"gamma": -0.1}, "--gamma"), ({"epsilon": 0.0}, "--epsilon"),
    ({"value_epsilon": 0.0}, "--value-epsilon"), ({"target_kl": -1.0}, "--target-kl"), ({"adaptive_kl": 0.0}, "--adaptive-kl"), ({"beta": -1.0}, "--beta"),
    ({"missing_eos_penalty": -1.0}, "--missing-eos-penalty"), ({"minibatch_size": 0}, "--minibatch-size"), ({"temperature": 0.0}, "--temperature"),
    ({"learning_rate": math.nan}, "--learning-rate"), ({"max_prompt_length": 2}, "longer than 2 tokens: raise --max-prompt-length"), ({"track": "wandb"}, "not installed"),
    ({"beta": 0.0, "adaptive_kl": 6.0}, "--adaptive-kl multiplies --beta"), ({"batch_size": 8, "minibatch_size": 3}, "no multiple of --minibatch-size 3"),
    ({"dataset": "x.jsonl", "eval_dataset": "x.jsonl"}, "is also what is trained on"),
])
def test_bad_flags_are_refused(flags, words, tmp_path, refused, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert words in refused(run, tmp_path, **flags)


@pytest.mark.parametrize("name, words", [("raises", "raised KeyError: 'no such thing'"), ("too_few", "gave 1 scores for 4 completions"), ("nan", "gave nan"), ("absent", "no function 'absent'")])
def test_a_reward_that_fails_ends_the_run_with_the_row_shown(name, words, tmp_path, refused):
    line = refused(run, tmp_path, reward=f"{reward_file(tmp_path)}:{name}")
    assert words in line and name in line and (name == "absent" or '"answer"' in line and '"completion"' in line)


if __name__ == "__main__":  # one of the two processes above
    ppo.sample = sample_by_prompt
    torch.distributed.init_process_group("gloo")
    torch.distributed.init_process_group = lambda backend: None  # once for all runs
    for settings in sys.argv[1:]:
        ppo.train(ppo.Args(**json.loads(settings)))
