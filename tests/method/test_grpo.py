"""GRPO and its relatives: losses, advantages, and the reward of right answers."""
import math
import statistics
from decimal import Decimal
from types import SimpleNamespace

import pytest
import torch
import transformers
from grpo_by_hand import plain_loss
from hypothesis import given, settings
from hypothesis import strategies as st

import grpo

LOSSES = ["grpo", "dr_grpo", "dapo", "gspo", "cispo"]
GARBAGE = 0.7  # stands outside the mask, where nothing may be read


# ---- the loss ------------------------------------------------------------------------------------

def our_loss(logps, old, ref, advantages, mask, loss, sequences=None, tokens=None, beta=0.3,
             low=0.2, high=0.28, longest=9):
    """The loss of a batch, as the script puts its functions together."""
    losses, clipped = grpo.token_losses(logps, old, advantages, mask, loss, low, high)
    tokens = mask.sum() if tokens is None else tokens
    weights = grpo.token_weights(mask, loss, sequences or len(mask), tokens, longest)
    return ((losses + beta * grpo.token_kl(logps, ref)) * weights).sum(), clipped


def random_batch(seed=0, rows=6, width=7):
    """Ragged completions, ratios on both sides of the clip, advantages of both signs."""
    g = torch.Generator().manual_seed(seed)
    start = torch.randint(0, 3, (rows, 1), generator=g)
    end = start + torch.randint(1, 5, (rows, 1), generator=g)
    mask = ((torch.arange(width) >= start) & (torch.arange(width) < end)).long()
    logps = -2 * torch.rand(rows, width, generator=g, dtype=torch.float64) - 0.1
    noise = torch.randn(2, rows, width, generator=g, dtype=torch.float64)
    old, ref = torch.where(mask.bool(), logps + 0.5 * noise, GARBAGE)
    advantages = torch.randn(rows, generator=g, dtype=torch.float64)
    return torch.where(mask.bool(), logps, GARBAGE).requires_grad_(), old, ref, advantages, mask


def gradient(value, tensor):
    return torch.autograd.grad(value, tensor, retain_graph=True)[0]


@pytest.mark.parametrize("loss", LOSSES)
def test_each_loss_and_its_gradient_are_those_of_its_equation(loss):
    """Value, gradient and clip; nothing is read outside the mask."""
    for seed in range(5):
        logps, old, ref, advantages, mask = random_batch(seed)
        lists = [[row[m.bool()] for row, m in zip(x, mask, strict=True)] for x in (logps, old, ref)]
        expected, clipped = plain_loss(
            loss, *lists, advantages, [True] * 6, 0.3, 0.2, 0.28, longest=9)
        value, where = our_loss(logps, old, ref, advantages, mask, loss)
        assert value.item() == pytest.approx(expected.item(), abs=1e-7)  # 1 / length is fp32
        assert torch.allclose(gradient(value, logps), gradient(expected, logps), atol=1e-7)
        assert (where * mask).sum().item() / mask.sum().item() == pytest.approx(clipped)
        assert (gradient(value, logps)[mask == 0] == 0).all()


@pytest.mark.parametrize("loss", LOSSES[:4])  # the weight of cispo has no gradient
def test_each_loss_passes_gradcheck(loss):
    logps, *rest = random_batch(1)
    assert torch.autograd.gradcheck(lambda x: our_loss(x, *rest, loss)[0], logps)


@pytest.mark.parametrize("loss", LOSSES)
def test_micro_batches_add_up_to_the_batch(loss):
    """Value and gradient, for uneven parts."""
    batch = random_batch(2)
    value, tokens = our_loss(*batch, loss)[0], batch[4].sum()
    parts = [our_loss(*(x[rows] for x in batch), loss, sequences=6, tokens=tokens)[0]
             for rows in (slice(0, 1), slice(1, 4), slice(4, 6))]
    assert sum(parts).item() == pytest.approx(value.item(), abs=1e-12)
    assert torch.allclose(gradient(sum(parts), batch[0]), gradient(value, batch[0]), atol=1e-12)


def test_at_ratio_1_grpo_is_reinforce_with_a_group_baseline():
    """The loss is 0 but for the KL, its gradient is that of −A mean_t log π."""
    logps, _, ref, _, mask = random_batch(3)
    advantages = grpo.group_advantages(torch.rand(2, 3, dtype=torch.float64)).flatten()
    loss = our_loss(logps, logps.detach(), ref, advantages, mask, "grpo", beta=0.0)[0]
    reinforce = -(advantages * (logps * mask).sum(1) / mask.sum(1)).mean()
    assert abs(loss.item()) < 1e-7 and abs(reinforce.item()) > 1e-3
    assert torch.allclose(gradient(loss, logps), gradient(reinforce, logps), atol=1e-7)


@pytest.mark.parametrize("loss, weights", [
    ("grpo", (1 / 3, 1 / 6, 1 / 12)), ("gspo", (1 / 3, 1 / 6, 1 / 12)),
    ("dr_grpo", (1 / 30, 1 / 30, 1 / 30)), ("dapo", (1 / 7, 1 / 7, 1 / 7)),
    ("cispo", (1 / 7, 1 / 7, 1 / 7))])
def test_what_a_token_counts(loss, weights):
    """Slopes at ratio 1 and A = 1 for lengths 1, 2, 4: only in grpo and gspo length matters."""
    mask = torch.tensor([[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 1]])
    logps = torch.full((3, 4), -1.0, dtype=torch.float64, requires_grad=True)
    old = logps.detach()
    value = our_loss(logps, old, old, torch.ones(3), mask, loss, high=5.0, longest=10)[0]
    expected = -mask * torch.tensor(weights)[:, None]
    assert torch.allclose(gradient(value, logps).float(), expected, atol=1e-6)


def test_a_completion_of_no_tokens_has_no_weight_and_no_nan():
    """Nor does a batch of none, as when DAPO drops every group."""
    for loss in LOSSES:
        weights = grpo.token_weights(torch.zeros(2, 3), loss, 2, torch.tensor(0), 9)
        assert (weights == 0).all()


@pytest.mark.parametrize("loss", LOSSES[:4])
@pytest.mark.parametrize("advantage, ratio, moves", [
    (1.0, 0.7, True), (1.0, 1.25, True), (1.0, 1.3, False),
    (-1.0, 0.7, False), (-1.0, 0.85, True), (-1.0, 1.3, True)])
def test_the_clip_stops_going_further_and_never_the_way_back(loss, advantage, ratio, moves):
    """Up with A > 0 it binds beyond 1 + ε_high, down with A < 0 below 1 − ε."""
    logps = torch.full((1, 1), math.log(ratio), dtype=torch.float64, requires_grad=True)
    zero, one = torch.zeros(1, 1), torch.ones(1, 1)
    losses, clipped = grpo.token_losses(
        logps, zero, torch.tensor([advantage]), one, loss, 0.2, 0.28)
    bound = 1.28 if ratio > 1 else 0.8
    assert losses.item() == pytest.approx(-advantage * (ratio if moves else bound))
    slope = -advantage * ratio if moves else 0.0
    assert gradient(losses.sum(), logps).item() == pytest.approx(slope, abs=1e-9)
    assert clipped.item() is not moves


def test_gspo_has_one_ratio_per_sequence_the_geometric_mean():
    """Token ratios 4 and 1/4 are far outside the clip, their mean is not; all tokens move alike."""
    logps = torch.tensor([[math.log(4), -math.log(4), GARBAGE], [0.6, 0.6, GARBAGE]],
                         dtype=torch.float64, requires_grad=True)
    mask = torch.tensor([[1, 1, 0], [1, 1, 0]])
    losses, clipped = grpo.token_losses(
        logps, torch.zeros(2, 3), torch.ones(2), mask, "gspo", 0.2, 0.28)
    assert losses[:, :2].tolist() == [pytest.approx([-1, -1]), pytest.approx([-1.28, -1.28])]
    slopes = gradient((losses * mask).sum(), logps)
    assert torch.allclose(slopes, torch.tensor([[-1.0, -1, 0], [0, 0, 0]], dtype=torch.float64))
    assert clipped[:, :2].tolist() == [[False, False], [True, True]]


def test_cispo_bounds_a_weight_without_gradient_at_epsilon_high_itself():
    """Every token keeps a gradient, −min(ρ, ε_high) A; there is no bound from below."""
    ratios = torch.tensor([[0.01, 0.5, 4.9, 5.1, 50.0]], dtype=torch.float64)
    for advantage in (2.0, -2.0):
        logps = ratios.log().requires_grad_()
        losses, clipped = grpo.token_losses(logps, torch.zeros(1, 5), torch.tensor([advantage]),
                                            torch.ones(1, 5), "cispo", 0.2, 5.0)
        weights = torch.tensor([[0.01, 0.5, 4.9, 5.0, 5.0]], dtype=torch.float64)
        assert torch.allclose(gradient(losses.sum(), logps), -weights * advantage)
        assert clipped.tolist() == [[False, False, False, True, True]]


def test_k3_by_enumeration():
    """E_π k3 is KL(π ‖ π_ref); on policy its expected gradient is that of KL(π_ref ‖ π)."""
    torch.manual_seed(0)
    logits = torch.randn(5, dtype=torch.float64, requires_grad=True)
    ref = torch.randn(5, dtype=torch.float64).log_softmax(0)
    logps = logits.log_softmax(0)
    expected = (logps.exp().detach() * grpo.token_kl(logps, ref)).sum()
    forward = (logps.exp() * (logps - ref)).sum()
    reverse = (ref.exp() * (ref - logps)).sum()
    assert expected.item() == pytest.approx(forward.item(), abs=1e-12)
    assert abs(forward.item() - reverse.item()) > 0.01
    assert torch.allclose(gradient(expected, logits), gradient(reverse, logits), atol=1e-12)
    assert (grpo.token_kl(logps, ref) > 0).all() and (grpo.token_kl(ref, ref) == 0).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_confident_tokens_keep_their_gradient_in_16_bits(dtype):
    """For p from 0.9 to 0.99999 within 1% of fp32, per token and in sum, under autocast."""
    p = torch.tensor([0.9, 0.99, 0.999, 0.9988, 0.9999, 0.99999])
    hidden = torch.zeros(6, 8)
    hidden[:, 0] = (7 * p / (1 - p)).log().to(dtype).float()
    slopes = []
    for enabled in (False, True):
        head = torch.nn.Linear(8, 8, bias=False)
        head.weight.data.copy_(torch.eye(8))
        model = SimpleNamespace(get_output_embeddings=lambda head=head: head,
                                config=transformers.PreTrainedConfig())
        inputs = hidden.clone().requires_grad_()
        with torch.autocast("cpu", dtype, enabled=enabled):
            logps = grpo.chunk_logps(inputs, torch.zeros(6, dtype=torch.long), model, 1.0)
        (logps * 2.0**10).sum().backward()
        assert logps.dtype == torch.float32
        slopes.append((inputs.grad, head.weight.grad))
    for exact, ours in zip(*slopes, strict=True):
        assert ((ours - exact).norm(dim=1) <= 0.01 * exact.norm(dim=1)).all()
        assert (ours - exact).norm() < 0.01 * exact.norm()


# ---- advantages ----------------------------------------------------------------------------------

def test_advantages_against_the_statistics_module():
    """Standardised with ddof 1 and 1e-4; without the std; leave-one-out; the bare reward."""
    rewards = torch.randn(4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for i, group in enumerate(rewards.tolist()):
        mean, std = statistics.fmean(group), statistics.stdev(group)
        others = [statistics.fmean(group[:j] + group[j + 1:]) for j in range(5)]
        for advantages, expected in (
                (grpo.group_advantages(rewards), [(r - mean) / (std + 1e-4) for r in group]),
                (grpo.group_advantages(rewards, scale=False), [r - mean for r in group]),
                (grpo.group_advantages(rewards, "rloo"),
                 [r - other for r, other in zip(group, others, strict=True)]),
                (grpo.group_advantages(rewards, "none"), group)):
            assert advantages[i].tolist() == pytest.approx(expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", [2, 3, 5, 7, 11, 13])
def test_equal_rewards_give_exactly_no_advantage(size, dtype):
    """Also where the rounded mean of equal numbers is another, which 1e-4 would blow up."""
    rewards = torch.tensor([0.1, 1 / 3, 0.7, -1e-3, 1e6 + 0.1, 0.0], dtype=dtype)
    rewards = rewards[:, None].expand(-1, size)
    assert not grpo.has_spread(rewards).any()
    for baseline, scale in (("group", True), ("group", False), ("rloo", True)):
        assert (grpo.group_advantages(rewards, baseline, scale) == 0).all()


# ---- what scores an answer -----------------------------------------------------------------------

@pytest.mark.parametrize("text, answer, score", [
    ("36 - 25 = 11", "11", 1), ("11 cups", "11", 1), ("11.", "11", 1), ("11", "12", 0),
    ("11", 11, 1), ("", "0", 0), ("none", "none", 0), ("so 1,234.50", "1234.5", 1),
    ("$1,234,567", "1234567", 1), ("3.0", "3", 1), ("-3", "3", 0), ("x = -3", "-3", 1),
    ("x=−3", "-3", 1), ("7-3", "3", 1), ("(5)-3", "3", 1), ("GPT-3", "3", 1), ("50%", "50", 1),
    ("**7**", "7", 1), ("1.21", "21", 0), ("210", "21", 0), ("first 3, then 21", "21", 1),
    ("21 is less than 22", "21", 0), ("5", "2 + 3 = 5\n#### 5", 1), ("6", "#### 5", 0),
    (r"12, so \boxed{7}", "7", 1), (r"\boxed{(1, 2)}", "(1, 2)", 0), ("(1, 2345)", "(1,2345)", 0),
    ("4", r"\frac{3}{4}", 0), ("-$5", "$-5", 1), ("$5", "-$5", 0), ("it is -$1,000.", "-1000", 1),
    ("it costs $.50", "0.5", 1), ("9" * 5000, "9" * 5000, 1), ("½ ² ٣", "3", 1)])
def test_correct_answer_compares_the_last_numbers(text, answer, score):
    assert grpo.correct_answer(None, [text], answer=[answer], other=["x"]) == [score]


@given(st.text(max_size=9), st.decimals(-10**7, 10**7, places=2) | st.integers(-10**9, 10**9),
       st.booleans(), st.text(st.characters(exclude_categories=["N"], exclude_characters=".,")))
@settings(deadline=None, derandomize=True)
def test_the_last_number_is_found_in_any_text(before, number, commas, after):
    """Whatever stands before it and whatever without a digit behind it, with commas or not."""
    text = f"{number:,}" if commas else f"{number}"
    assert grpo.last_number(f"{before} {text}{after}") == Decimal(str(number))


@given(st.text(max_size=9) | st.text("0123456789.,-()[]{}\\$%/ xe−", max_size=12))
@settings(deadline=None, derandomize=True, max_examples=200)
def test_a_right_answer_is_right_in_whatever_it_is_wrapped(answer):
    """Any text is scored without an error, and a box around the row's answer changes nothing."""
    has_number = float(grpo.plain_number(answer) is not None)
    for said in (answer, rf"\boxed{{{answer}}}", f"It is: {answer}, I think."):
        assert grpo.correct_answer(None, [said], [answer]) == [has_number], said
