"""PPO: rewards, advantages, losses, gradients, a run by hand. Sampling is in test_sampling.py."""
import math
import re
from types import SimpleNamespace

import by_hand
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT
from safetensors.torch import load_file

import common
import ppo


def random_batch(count, seed=0, rows=6, width=9):
    """`count` random tensors [B, T-1], and a mask of ragged answers after ragged prompts."""
    g = torch.Generator().manual_seed(seed)
    start = torch.randint(0, 4, (rows, 1), generator=g)
    end = start + torch.randint(1, 6, (rows, 1), generator=g)
    mask = (torch.arange(width) >= start) & (torch.arange(width) < end)
    tensors = [torch.randn(rows, width, generator=g, dtype=torch.float64) for _ in range(count)]
    # Nothing outside the mask may be read. A constant there shows if it is.
    return [x.where(mask, 0.7) for x in tensors] + [mask.long()]


# ---- rewards and advantages ----------------------------------------------------------------------

def test_each_token_pays_its_kl_and_the_last_one_gets_the_score():
    """The reward is −β (log π − log π_ref), plus the score at the last generated token only."""
    logps, ref, mask = random_batch(2)
    scores = torch.arange(10.0, 16.0, dtype=torch.float64)
    expected = -0.3 * (logps - ref) * mask
    for row, score in enumerate(scores):
        expected[row, mask[row].nonzero()[-1]] += score
    by_hand.same(ppo.token_rewards(scores, logps, ref, mask, 0.3), expected,
         "token rewards: is the sign of the KL flipped, or the score not at the last token?")


@pytest.mark.parametrize("gamma, lam", [(1, 0.95), (0.9, 0.7), (0.9, 0), (0.8, 1)])
def test_advantages_are_the_double_sum_of_the_paper(gamma, lam):
    """A_t = Σ_l (γλ)^l δ_{t+l} within the answer, and R = A + V."""
    rewards, values, mask = random_batch(2, seed=1)
    advantages, returns = ppo.gae(rewards, values, mask, gamma, lam)
    for row, inside in enumerate(mask.bool()):
        r, v = rewards[row, inside], values[row, inside]
        deltas = r + gamma * F.pad(v[1:], (0, 1)) - v
        powers = (gamma * lam) ** torch.arange(len(r), dtype=torch.float64)
        sums = [(powers[:len(r) - t] * deltas[t:]).sum() for t in range(len(r))]
        by_hand.same(advantages[row, inside], torch.stack(sums), "A: is V after the end not 0?")
        by_hand.same(returns[row, inside], torch.stack(sums) + v, "returns, A + V")
    assert (advantages[mask == 0] == 0).all(), "advantages outside the answers must be 0"


# ---- the losses ----------------------------------------------------------------------------------

@pytest.mark.parametrize("advantage, ratio, clipped_to", [
    (2, 0.7, None), (2, 1.1, None), (2, 1.3, 1.2), (-2, 0.7, 0.8), (-2, 1.3, None)])
def test_the_clip_cells(advantage, ratio, clipped_to):
    """Past the clip, there is no gradient in the direction of A, but always one that leads back."""
    logps = torch.tensor([[math.log(ratio)]], dtype=torch.float64, requires_grad=True)
    advantages = torch.tensor([[advantage]], dtype=torch.float64)
    loss, is_clipped = ppo.policy_loss(logps, torch.zeros(1, 1), advantages, 0.2)
    gradient, = torch.autograd.grad(loss.sum(), logps)
    by_hand.close(loss.item(), -advantage * (clipped_to or ratio), "policy loss (min, not max?)")
    by_hand.close(gradient.item(), 0 if clipped_to else -advantage * ratio, "policy gradient")
    assert is_clipped.item() == bool(clipped_to), "where the clip binds"


@pytest.mark.parametrize("value, target, moves", [
    (0.5, 1, False), (-0.5, -1, False), (0.1, 1, True), (0.5, 0, True), (3, 1, True)])
def test_the_value_clip(value, target, moves):
    """A value over 0.2 from the old one, 0, stops moving toward its target, unless it overshot."""
    values = torch.tensor([[value]], dtype=torch.float64, requires_grad=True)
    loss = ppo.value_loss(values, torch.zeros(1, 1), torch.full((1, 1), target), 0.2)
    gradient, = torch.autograd.grad(loss.sum(), values)
    read = value if moves else math.copysign(0.2, value)
    by_hand.close(loss.item(), 0.5 * (read - target) ** 2, "value loss (max, not min?)")
    by_hand.close(gradient.item(), value - target if moves else 0, "gradient of the value loss")


# ---- the gradient, by enumeration ----------------------------------------------------------------

@pytest.fixture
def enumerated():
    """All answers of at most two tokens from {stop, 1, 2}, and two policies: [7, 2] each."""
    g = torch.Generator().manual_seed(0)
    tables = [torch.randn(n, 3, generator=g, dtype=torch.float64) for n in (1, 3, 1, 3)]
    first, last = torch.tensor([0, 1, 1, 1, 2, 2, 2]), torch.tensor([0, 0, 1, 2, 0, 1, 2])
    mask = (torch.stack([torch.ones(7), first], 1) > 0).long()
    policy = [table.requires_grad_() for table in tables[:2]]
    new, ref = (torch.stack([start.log_softmax(1)[0, first], then.log_softmax(1)[first, last]], 1)
                * mask for start, then in (policy, tables[2:]))
    probs = new.sum(1).exp()

    def gradient(expected):
        parts = torch.autograd.grad(expected, policy, retain_graph=True)
        return torch.cat([part.flatten() for part in parts])
    return SimpleNamespace(new=new, ref=ref, mask=mask, first=first, probs=probs.detach(),
                           scores=10 + torch.randn(7, generator=g).double(), gradient=gradient,
                           true_probs=probs, kl=(probs * (new - ref).sum(1)).sum())


def test_k1_belongs_in_the_reward_and_not_in_the_loss(enumerated):
    """As a reward, k1 gives exactly −β ∇KL, and k3 does not. As a loss, k1 does nothing."""
    e = enumerated
    truth = -0.3 * e.gradient(e.kl)
    k1 = ppo.token_rewards(torch.zeros(7).double(), e.new, e.ref, e.mask, 0.3).sum(1)
    k3 = -0.3 * ((e.ref - e.new).exp() - (e.ref - e.new) - 1).sum(1)
    as_reward, other = (e.gradient((e.probs * x.detach() * e.new.sum(1)).sum()) for x in (k1, k3))
    by_hand.same(as_reward, truth, "policy gradient of the KL penalty: is its sign flipped?")
    assert F.cosine_similarity(other, truth, dim=0) < -0.5, "k3 as a reward: nearly opposite to ∇KL"
    as_loss = e.gradient((e.probs * k1).sum())
    by_hand.same(as_loss, torch.zeros_like(truth), "expected gradient of k1 as a loss")


def test_the_whole_chain_follows_the_true_gradient_whatever_the_critic(enumerated):
    """The mean gradient at ratio 1 is exactly ∇ (E[score] − β KL), even if the critic is wrong."""
    e = enumerated
    truth = e.gradient((e.true_probs * e.scores).sum() - 0.3 * e.kl)
    rewards = ppo.token_rewards(e.scores, e.new.detach(), e.ref, e.mask, 0.3)
    same_first = (e.first[:, None] == e.first).double() * e.probs  # [7, 7]
    after = same_first @ rewards[:, 1] / same_first.sum(1)
    true = torch.stack([(e.probs @ rewards.sum(1)).expand(7), after], 1) * e.mask
    wrong = torch.stack([torch.full((7,), 0.3), 1.1 * e.first - 0.8], 1).double() * e.mask
    squares = []
    for values in (torch.zeros_like(true), wrong, true):
        advantages, _ = ppo.gae(rewards, values, e.mask, 1.0, 1.0)
        losses, _ = ppo.policy_loss(e.new, e.new.detach(), advantages, 0.2)
        samples = torch.stack([-e.gradient(loss.sum()) for loss in losses * e.mask])
        by_hand.same(e.probs @ samples, truth, "policy gradient: is it biased by the baseline?")
        squares.append((e.probs @ samples**2).sum().item())
    assert squares[2] < squares[0], "the true critic must lower the variance"


# ---- a run, recomputed by hand -------------------------------------------------------------------

ROWS = [{"prompt": by_hand.ask(text), "answer": "7"} for text in (
    "What is 36 - 25?", "Tom has 14 figs and gets 83 more. How many figs now?", "Add 2 and 5.",
    "What is 9 - 8 and 12 + 9?", "What is 5 + 5?", "Mia has 66 eggs.", "7 - 1?", "4 + 4?")]


def run_ppo(folder, **flags):
    """A run in which each answer is a function of its prompt, not a sample. Some do not stop."""
    sample = {"sample": lambda *args: [by_hand.answer_to(ids, sum(ids)) for ids in args[2]]}
    flags = dict(batch_size=5, max_steps=2, epochs=2, minibatches=2, micro_batch_size=5, beta=0.3,
                 gamma=0.9, lam=0.7, epsilon=0.1, value_weight=0.7, missing_eos_penalty=0.8,
                 temperature=1.5, target_kl=1e6, lora_rank=4, learning_rate=4e-4) | flags
    return by_hand.Run(ppo, folder, ROWS[3:], ROWS[:3], replace=sample,
                       watch=["rollout", "minibatch_gradients"], **flags)


def read(hand, prompt, ids):
    """Log-probs and values [N] of an answer, read alone and without padding."""
    with common.using(hand.model, "critic"):
        hidden = by_hand.hidden_states(hand.model, prompt + ids)[len(prompt) - 1:-1]
    return by_hand.logps(hand.model, prompt, ids, 1.5), hidden @ hand.weights[-1][0]


@torch.no_grad()
def rollout_by_hand(hand, call):
    """The outputs of all roles for each answer, and the figures that a step logs about them."""
    file = load_file(ROOT / "tiny/reward/adapter_model.safetensors")
    answers = []
    for example, ids in zip(call.args[1], call.result[1], strict=True):
        old, values = read(hand, example["prompt"], ids)
        log_ratio = old - by_hand.logps(hand.reference, example["prompt"], ids, 1.5)
        with common.using(hand.model, "reward"):
            hidden = by_hand.hidden_states(hand.model, example["prompt"] + ids)[-1]
        score = hidden @ file["base_model.model.score.weight"][0].double()
        stopped = float(ids[-1] == by_hand.tokenizer().eos_token_id)
        rewards = -0.3 * log_ratio
        rewards[-1] += score - 0.8 * (1 - stopped)
        deltas = rewards + 0.9 * F.pad(values[1:], (0, 1)) - values
        advantages = torch.stack([sum(0.63 ** i * delta for i, delta in enumerate(deltas[t:]))
                                  for t in range(len(ids))])
        answers.append(dict(
            pair=(example["prompt"], ids), old=old, values=values, advantages=advantages,
            returns=advantages + values, reward=score, kl=log_ratio.sum(), length=len(ids),
            stopped=stopped))
    logged = {name: float(sum(x[name] for x in answers)) / len(answers)
              for name in ("reward", "kl", "length", "stopped")}
    every, returns = (torch.cat([x[name] for x in answers]) for name in ("advantages", "returns"))
    for x in answers:
        x["advantages"] = (x["advantages"] - every.mean()) / every.std(correction=0)
    return answers, logged | {"explained_variance": 1 - every.var() / returns.var()}


def minibatch_by_hand(hand, answers):
    """The figures, as means over the tokens of the minibatch, with gradients."""
    white, returns, old, v_old = (torch.cat([x[name] for x in answers])
                                  for name in ("advantages", "returns", "old", "values"))
    new, values = torch.cat([torch.stack(read(hand, *x["pair"])) for x in answers], 1)
    ratio = (new - old).exp()
    binds = torch.where(white > 0, ratio > 1.1, ratio < 0.9)
    near = v_old + (values - v_old).clamp(-0.1, 0.1)
    columns = {"policy_loss": -torch.where(binds, 1 + 0.1 * white.sign(), ratio) * white,
               "value_loss": torch.maximum((values - returns) ** 2, (near - returns) ** 2) / 2,
               "sampler_kl": ratio - 1 - ratio.log(), "clip_fraction": binds.double(),
               "entropy": -new, "ratio_error": (ratio - 1).abs()}
    return {name: column.mean() for name, column in columns.items()}


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    """Two rollouts with four updates each, in which every part has an effect; the same by hand."""
    run = run_ppo(tmp_path_factory.mktemp("first"))
    _, *rollouts, _ = run.calls["rollout"]
    minibatches = [call.args[2].tolist() for call in run.calls["minibatch_gradients"]]
    with by_hand.doubles():
        hand = by_hand.Training(run)
        for step, call in enumerate(rollouts):
            answers, logged = rollout_by_hand(hand, call)
            every = []
            for rows in minibatches[4 * step:4 * step + 4]:
                figures = minibatch_by_hand(hand, [answers[row] for row in rows])
                update = hand.update(figures["policy_loss"] + 0.7 * figures["value_loss"])
                every.append(figures)
            del update["loss"]
            means = {name: sum(x[name].item() for x in every) / 4 for name in figures}
            means["ratio_error"] = every[0]["ratio_error"]
            hand.log(logged | means | update | {"updates": 4})
    assert all(0 < x["clip_fraction"] < 1 and 0 < x["stopped"] < 1 for x in hand.logged)
    assert abs(hand.logged[1]["kl"]) > 0.01 and hand.logged[1]["grad_norm"] > 1
    return run, hand


@pytest.mark.parametrize("flags", [{}, dict(micro_batch_size=1, sample_batch_size=2,
                                            gradient_checkpointing="on")], ids=str)
def test_two_rollouts_are_those_by_hand(flags, first, tmp_path):
    """Each logged number and weight, also in micro-batches with gradient checkpointing."""
    run, hand = first
    hand.check(run_ppo(tmp_path, **flags) if flags else run)


def test_the_worked_example_of_the_docstring():
    """The functions of the script give each number of the table."""
    kl, rho = torch.tensor([[0.2, -0.4, 0.2]]), torch.tensor([[1.3, 1.1, 0.9]])
    values, mask, zero = torch.tensor([[0.5, 0.6, 0.8]]), torch.ones(1, 3), torch.zeros(1, 3)
    rewards = ppo.token_rewards(torch.ones(1), kl, zero, mask, 0.05)
    lines = {"log π − log π_ref": kl, "r": rewards, "V": values, "ρ after an update": rho}
    lines["δ"], _ = ppo.gae(rewards, values, mask, 1.0, 0.0)
    lines["A"], lines["R"] = ppo.gae(rewards, values, mask, 1.0, 0.95)
    lines["policy loss"], _ = ppo.policy_loss(rho.log(), zero, lines["A"], 0.2)
    for name, numbers in lines.items():
        text = " +".join(f"{x:.2f}".replace("-", "−") for x in numbers[0].tolist())
        assert re.search(f"^    {name} +{text}( |$)", ppo.__doc__, re.M), f"{name}: {text}"
    unbiased, _ = ppo.gae(rewards, values, mask, 1.0, 1.0)
    assert f"λ = 1: {', '.join(f'{x:.2f}' for x in unbiased[0])}" in ppo.__doc__
