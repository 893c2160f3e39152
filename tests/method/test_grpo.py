"""GRPO and its variants: losses, advantages, a run by hand. Sampling is in test_sampling.py."""
import math
import re
import statistics

import by_hand
import pytest
import torch

import grpo

LOSSES = ["grpo", "dr_grpo", "dapo", "gspo", "cispo"]


# ---- the loss ------------------------------------------------------------------------------------

def plain_loss(loss, logps, old, ref, advantages, kept, beta, low, high, longest):
    """The equations, on one [N_i] tensor per completion, and the share of clipped tokens."""
    total = clipped = 0
    tokens = sum(len(x) for x, keep in zip(logps, kept, strict=True) if keep)
    for x, o, r, a, keep in zip(logps, old, ref, advantages, kept, strict=True):
        ratio = (x - o).exp()
        if loss == "gspo":
            ratio = ratio.prod().pow(1 / len(x)).expand(len(x))
        gain = torch.minimum(ratio * a, ratio.clamp(1 - low, 1 + high) * a)
        binds = ratio > 1 + high if a > 0 else (ratio < 1 - low) & (a < 0)
        if loss == "cispo":
            gain = ratio.clamp(max=high).detach() * a * x
            binds = ratio > high
        q = (r - x).exp()
        worth = (gain - beta * (q - q.log() - 1)).sum()
        if loss in ("dapo", "cispo"):
            total = total - worth / tokens if keep else total
        else:
            total = total - worth / len(logps) / (longest if loss == "dr_grpo" else len(x))
        clipped += binds.sum().item()
    return total, clipped / sum(map(len, logps))


def our_loss(logps, old, ref, advantages, mask, loss, beta=0.3):
    """The loss of a batch, put together from the functions of the script as `train` does."""
    losses, is_clipped = grpo.token_losses(logps, old, advantages, mask, loss, 0.2, 0.28)
    weights = grpo.token_weights(mask, loss, len(mask), mask.sum(), 9)
    return ((losses + beta * grpo.token_kl(logps, ref)) * weights).sum(), is_clipped


def random_batch(seed, rows=6, width=7):
    """Ragged completions, ratios on both sides of the clip, advantages of both signs."""
    g = torch.Generator().manual_seed(seed)
    start = torch.randint(0, 3, (rows, 1), generator=g)
    end = start + torch.randint(1, 5, (rows, 1), generator=g)
    mask = (torch.arange(width) >= start) & (torch.arange(width) < end)
    logps = -2 * torch.rand(rows, width, generator=g, dtype=torch.float64) - 0.1
    noise = torch.randn(2, rows, width, generator=g, dtype=torch.float64)
    # Nothing outside the mask may be read. A constant there shows if it is.
    logps, old, ref = (x.where(mask, 0.7) for x in (logps, *(logps + 0.5 * noise)))
    advantages = torch.randn(rows, generator=g, dtype=torch.float64)
    return logps.requires_grad_(), old, ref, advantages, mask.long()


def gradient(value, tensor):
    return torch.autograd.grad(value, tensor, retain_graph=True)[0]


@pytest.mark.parametrize("loss", LOSSES)
def test_each_loss_and_its_gradient_are_those_of_its_equation(loss):
    """Losses, gradients and clip fractions agree, and nothing outside the mask is read."""
    for seed in range(5):
        logps, old, ref, advantages, mask = random_batch(seed)
        lists = [[row[m.bool()] for row, m in zip(x, mask, strict=True)] for x in (logps, old, ref)]
        expected, share = plain_loss(loss, *lists, advantages, [True] * 6, 0.3, 0.2, 0.28, 9)
        value, is_clipped = our_loss(logps, old, ref, advantages, mask, loss)
        by_hand.close(value.item(), expected.item(), f"loss of {loss}")
        by_hand.same(gradient(value, logps), gradient(expected, logps), f"gradient of {loss}", 1e-7)
        by_hand.close(((is_clipped * mask).sum() / mask.sum()).item(), share, "clipped", 1e-5)
    # DAPO may drop every group, and 0 tokens must not become a division by 0.
    assert (grpo.token_weights(torch.zeros(2, 3), loss, 2, torch.tensor(0), 9) == 0).all()


def test_at_ratio_1_grpo_is_reinforce_with_a_group_baseline():
    """Apart from the KL, the loss is 0, but its gradient is the gradient of −A mean_t log π."""
    logps, _, ref, _, mask = random_batch(3)
    advantages = grpo.group_advantages(torch.rand(2, 3, dtype=torch.float64)).flatten()
    loss, _ = our_loss(logps, logps.detach(), ref, advantages, mask, "grpo", beta=0.0)
    reinforce = -(advantages * (logps * mask).sum(1) / mask.sum(1)).mean()
    assert abs(loss.item()) < 1e-7, "the advantages of a group add up to 0, so the loss must be 0"
    by_hand.same(gradient(loss, logps), gradient(reinforce, logps), "REINFORCE gradient", 1e-7)


@pytest.mark.parametrize("loss", LOSSES[:4])
@pytest.mark.parametrize("advantage, ratio, moves", [
    (1.0, 0.7, True), (1.0, 1.25, True), (1.0, 1.3, False),
    (-1.0, 0.7, False), (-1.0, 0.85, True), (-1.0, 1.3, True)])
def test_the_clip_stops_going_further_and_never_the_way_back(loss, advantage, ratio, moves):
    """With A > 0, the clip binds above 1 + ε_high; with A < 0, it binds below 1 − ε."""
    logps = torch.full((1, 1), math.log(ratio), dtype=torch.float64, requires_grad=True)
    losses, is_clipped = grpo.token_losses(
        logps, torch.zeros(1, 1), torch.tensor([advantage]), torch.ones(1, 1), loss, 0.2, 0.28)
    bound = 1.28 if ratio > 1 else 0.8
    slope = gradient(losses.sum(), logps).item()
    by_hand.close(losses.item(), -advantage * (ratio if moves else bound), "loss: min, not max?")
    by_hand.close(slope, -advantage * ratio if moves else 0, "gradient: one that leads back?")
    assert is_clipped.item() is not moves


def test_gspo_has_one_ratio_per_sequence_the_geometric_mean():
    """Ratios 4 and 1/4 are outside the clip, but their mean, 1, is not. All tokens move alike."""
    logps = torch.tensor([[math.log(4), -math.log(4), 0.7], [0.6, 0.6, 0.7]], requires_grad=True)
    mask = torch.tensor([[1, 1, 0], [1, 1, 0]])
    losses, is_clipped = grpo.token_losses(
        logps, torch.zeros(2, 3), torch.ones(2), mask, "gspo", 0.2, 0.28)
    by_hand.same(gradient((losses * mask).sum(), logps),
                 torch.tensor([[-1.0, -1, 0], [0, 0, 0]]), "gradient: a ratio per token?", 1e-6)
    assert is_clipped[:, :2].tolist() == [[False, False], [True, True]]


def test_cispo_bounds_a_weight_without_gradient_at_epsilon_high_itself():
    """Every token keeps its gradient, −min(ρ, ε_high) A. There is no bound from below."""
    logps = torch.tensor([[0.01, 0.5, 4.9, 5.1, 50.0]]).log().requires_grad_()
    losses, is_clipped = grpo.token_losses(logps, torch.zeros(1, 5), torch.tensor([-2.0]),
                                           torch.ones(1, 5), "cispo", 0.2, 5.0)
    expected = 2 * torch.tensor([[0.01, 0.5, 4.9, 5.0, 5.0]])
    by_hand.same(gradient(losses.sum(), logps), expected, "gradient: is the weight detached?", 1e-5)
    assert is_clipped.tolist() == [[False, False, False, True, True]]


def test_k3_by_enumeration():
    """E_π[k3] is KL(π ‖ π_ref), and E_π[∇k3] is the gradient of KL(π_ref ‖ π)."""
    torch.manual_seed(0)
    logits = torch.randn(5, dtype=torch.float64, requires_grad=True)
    ref = torch.randn(5, dtype=torch.float64).log_softmax(0)
    logps = logits.log_softmax(0)
    expected = (logps.exp().detach() * grpo.token_kl(logps, ref)).sum()
    reverse, forward = (logps.exp() * (logps - ref)).sum(), (ref.exp() * (ref - logps)).sum()
    by_hand.close(expected.item(), reverse.item(), "E[k3], KL(π ‖ π_ref)")
    by_hand.same(gradient(expected, logits), gradient(forward, logits), "E[∇k3], ∇KL(π_ref ‖ π)")
    assert (grpo.token_kl(logps, ref) > 0).all() and (grpo.token_kl(ref, ref) == 0).all()


# ---- advantages ----------------------------------------------------------------------------------

def plain_advantages(group, loss="grpo", baseline="group"):
    """Advantages by the statistics module, whose standard deviation divides by G − 1."""
    mean, std = statistics.fmean(group), statistics.stdev(group) + 1e-4
    others = [statistics.fmean(group[:i] + group[i + 1:]) for i in range(len(group))]
    of_group = [(r - mean) / (1 if loss == "dr_grpo" else std) for r in group]
    of_others = [r - other for r, other in zip(group, others, strict=True)]
    return {"group": of_group, "rloo": of_others, "none": group}[baseline]


def test_advantages_against_the_statistics_module():
    """With and without division by the std, with a leave-one-out baseline and with none."""
    rewards = torch.randn(4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for loss, baseline in (("grpo", "group"), ("dr_grpo", "group"), ("grpo", "rloo"), ("", "none")):
        ours = grpo.group_advantages(rewards, baseline, scale=loss == "grpo")
        plain = [plain_advantages(group, loss, baseline) for group in rewards.tolist()]
        by_hand.same(ours, torch.tensor(plain, dtype=torch.float64), f"A of {loss}, {baseline}")


@pytest.mark.parametrize("size", [2, 3, 5, 7, 11, 13])
def test_equal_rewards_give_exactly_no_advantage(size):
    """Even if rounding makes the mean of equal numbers differ from them, and 1e-4 divides it."""
    rewards = torch.tensor([0.1, 1 / 3, 0.7, -1e-3, 1e6 + 0.1])[:, None].expand(-1, size)
    for baseline, scale in (("group", True), ("group", False), ("rloo", True)):
        assert (grpo.group_advantages(rewards, baseline, scale) == 0).all(), "rounding error / 1e-4"


# ---- a run, recomputed by hand -------------------------------------------------------------------

CASES = {  # loss: baseline, epsilon, epsilon-high
    "grpo": ("group", 0.1, 0.15), "dr_grpo": ("group", 0.15, 0.1), "dapo": ("rloo", 0.1, 0.15),
    "gspo": ("group", 0.02, 0.03), "cispo": ("none", 0.1, 1.2)}
ROWS = [{"prompt": by_hand.ask(text), "answer": answer} for text, answer in (
    ("What is 5 - 2?", "3"), ("Tom has 14 figs and gets 83 more. How many figs now?", "97"),
    ("What is 9 - 8 and 12 + 9?", "21"), ("What is 6 - 4?", "2"))]
REWARD = """
def varied(prompts, completions, answer, **columns):  # the prompt with answer 3: all equal
    return [1 if x == "3" else sum(map(ord, y)) % 8 for x, y in zip(answer, completions)]
"""


def run_grpo(folder, loss, **flags):
    folder.mkdir(exist_ok=True)
    (folder / "reward.py").write_text(REWARD)
    flags |= dict(zip(("baseline", "epsilon", "epsilon_high"), CASES[loss], strict=True))
    return by_hand.Run(grpo, folder, ROWS[:3], ROWS[3:], watch=["rollout"], loss=loss, beta=0.3,
                       reward=f"{folder / 'reward.py'}:varied", batch_size=3, group_size=3,
                       updates=2, max_steps=2, temperature=1.5, max_new_tokens=20, lora_rank=4,
                       max_rounds=3, replace={"sample": by_hand.fixed_sample}, **flags)


def groups_of(call):
    """The groups of a rollout: (prompt, answers, rewards) each."""
    (batch, answers), examples = call.result, call.args[2]
    rewards = batch["rewards"].view(-1, 3).tolist()
    return [(examples[i]["prompt"], answers[3 * i:3 * i + 3], x) for i, x in enumerate(rewards)]


def run_by_hand(run, loss):
    """The same two rollouts with two updates each, computed from the equations.

    DAPO replaces groups of equal rewards, up to twice. The log describes the first groups.
    """
    hand, (baseline, *limits) = by_hand.Training(run), CASES[loss]
    for step in range(2):
        first, *rounds = [groups_of(call) for call in run.calls["rollout"][1:-1]
                          if call.update == 2 * step]
        groups, sampled = list(first), 9 + 3 * sum(map(len, rounds))
        for others in rounds:
            groups = [others.pop(0) if len(set(x[2])) == 1 else x for x in groups]
            assert not others, "a group was sampled that replaces none"
        spread = [len(set(rewards)) > 1 for _, _, rewards in groups]
        assert loss != "dapo" or all(spread) or len(rounds) == 2, "it gave up too early"
        advantages = sum([plain_advantages(rewards, loss, baseline) for *_, rewards in groups], [])
        rows = [(prompt, answer) for prompt, answers, _ in groups for answer in answers]
        kept = [loss != "dapo" or (rows[i][1][-1] == 2 and spread[i // 3]) for i in range(9)]

        def read(model, rows=rows):
            return [by_hand.logps(model, *row, 1.5) for row in rows]
        ref, old = read(hand.reference), [x.detach() for x in read(hand.model)]
        _, answers, rewards = zip(*first, strict=True)
        logged = {"ratio_error": 0, "zero_spread": 1 / 3, "stopped": 2 / 3, "loss": 0, "entropy": 0,
                  "kl": ((torch.cat(old) - torch.cat(ref)).sum() / 9).item(), "clip_fraction": 0,
                  "reward": statistics.fmean(sum(rewards, [])), "sampled_answers": sampled,
                  "length": statistics.fmean(map(len, sum(answers, []))),
                  "group_std": statistics.fmean(map(statistics.stdev, rewards))}
        for _ in range(2):
            new = read(hand.model)
            value, share = plain_loss(loss, new, old, ref, advantages, kept, 0.3, *limits, 20)
            logged["loss"] += value.item() / 2
            logged["clip_fraction"] += share / 2
            logged["entropy"] -= torch.cat(new).mean().item() / 2
            update = hand.update(value)
        hand.log(update | logged)
    assert 0 < hand.logged[0]["clip_fraction"] < 1 and abs(hand.logged[1]["kl"]) > 0.01
    return hand


@pytest.mark.parametrize("loss", LOSSES)
def test_two_rollouts_are_those_by_hand(loss, tmp_path):
    """Each logged number and weight, also with micro-batches and (dapo) with two processes."""
    run = run_grpo(tmp_path / "whole", loss, micro_batch_size=9)
    with by_hand.doubles():
        hand = run_by_hand(run, loss)
    hand.check(run)
    hand.check(run_grpo(tmp_path / "parts", loss, micro_batch_size=2,
                        processes=2 if loss == "dapo" else 1))


# ---- the worked example --------------------------------------------------------------------------

def test_the_worked_example_of_the_docstring():
    """The functions of the script give each number of the table and of the KL example."""
    for group in ([1, 0, 0, 1], [1, 0, 0, 0], [1, 1, 1, 0], [1, 1, 1, 1]):
        rewards = torch.tensor([group]).double()
        numbers = [f"{rewards.mean():.2f}", f"{rewards.std():.3f}"]
        for baseline in ("group", "rloo"):
            advantages = grpo.group_advantages(rewards, baseline)[0].tolist()
            numbers += [f"{x:.2f}".replace("-", "−") for x in advantages]
        line = " +".join(map(str, group + numbers))
        assert re.search(f"^    {line}$", grpo.__doc__, re.M), line
    for ref, k1 in ((-1.5, "0.500"), (-0.5, "−0.500")):
        k3 = grpo.token_kl(torch.tensor(-1.0), torch.tensor(ref)).item()
        text = f"log π_ref = {ref}, (it is )?k1 = {k1} and k3 = {k3:.3f}".replace("-", "−")
        assert re.search(text, grpo.__doc__.replace("\n", " ")), text
