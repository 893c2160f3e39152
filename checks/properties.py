"""What must be true of each exercise: the properties that `python exercise.py --check` prints.

A function gets the student's file as a module m. It yields a sentence, in which {} stands for the
true value, then what the student's function says, the true value, and sometimes a tolerance. True
values come from closed forms, limits, invariances, enumeration and plain Python, never from the
solved script, so that every correct solution passes, whatever its form.
"""
import copy
import functools
import math
import statistics
from types import SimpleNamespace
from unittest import mock

import torch

import common


def t(*values):
    """A tensor in float64 with a gradient, so that rounding hides no mistake."""
    return torch.tensor(values, dtype=torch.float64, requires_grad=True)


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def sigma(x):
    return 1 / (1 + math.exp(-x))


def cost(margin):
    """−log σ(margin), and log 2 at 0."""
    return -math.log(sigma(margin))


def slope(output, *inputs):
    """The gradient of the sum of the output with respect to an input, or several; 0 if none."""
    slopes = [torch.zeros_like(x) for x in inputs]
    if isinstance(output, torch.Tensor) and output.requires_grad:
        slopes = torch.autograd.grad(output.sum(), inputs, retain_graph=True, allow_unused=True,
                                     materialize_grads=True)
    return slopes[0] if len(slopes) == 1 else slopes


def mean_over(policy, values):
    """The mean of `values` over samples of a policy. The weights π are constants."""
    return (policy.detach().exp() * values).sum()


# ---- sequences and a model to read them ----------------------------------------------------------

@functools.cache
def tiny_model():
    """A random model of one layer with a vocabulary of 11 tokens."""
    from transformers import Qwen2Config, Qwen2ForCausalLM  # takes a second
    sizes = dict(vocab_size=11, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
                 num_attention_heads=2, num_key_value_heads=1, initializer_range=0.5)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Qwen2ForCausalLM(Qwen2Config(**sizes)).eval()


class InRun(torch.nn.Module):
    """The model as a run hands it over: inside a wrapper, as peft's, whose `model` has the head."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def get_base_model(self):
        return self.model

    def forward(self, *args, **kwargs):
        return self.model(*args, **kwargs)


ROWS = [[1, 2, 3, 4, 5], [6, 7, 8], [9, 1, 10, 3]]
RAGGED = torch.tensor([[0, 0, 1, 1, 1, 0], [1, 1, 0, 0, 0, 0], [0, 1, 1, 1, 1, 1]])  # a loss mask
NOTHING = torch.zeros(3, 6).double()


def padded(rows, pad=2, **columns):
    """Rows of ids as a batch, padded on the right with a token that also occurs in the rows."""
    columns |= {"input_ids": rows, "attention_mask": [[1] * len(row) for row in rows]}
    width = max(map(len, rows))
    return {name: torch.tensor([row + [pad if name == "input_ids" else 0] * (width - len(row))
                                for row in values]) for name, values in columns.items()}


def read_alone(row, head):
    """The head times the last hidden state of a row, which is read alone and without padding."""
    return head.weight[0] @ tiny_model().model(input_ids=torch.tensor([row]))[0][0, -1]


def make_head(size=1.0):
    head = torch.nn.Linear(8, 1, bias=False)
    head.weight.data = size * normal(1, 8, seed=3).float()
    return head


def rounding(function, batch, columns):
    """A property: under autocast, the product of hidden states and a large head is in fp32."""
    head = make_head(1000.0)
    with torch.autocast("cpu", torch.bfloat16):
        ids = {name: batch[name] for name in ("input_ids", "attention_mask")}
        hidden = tiny_model().model(**ids, use_cache=False)[0][:, columns]
        ours = function(InRun(tiny_model()), batch, head)
    return ("under autocast, the product is still in fp32, so that close numbers can be compared",
            ours, (hidden.float() * head.weight[0]).sum(-1), 1e-2)


# ---- sft.py --------------------------------------------------------------------------------------

def sft_with_mask(m):
    chat = [([], False), ([1, 2], False), ([3, 4, 5], True), ([6], False), ([7, 8], True)]
    made = m.with_mask(chat)
    yield ("each of the three is a {}, because rows of different lengths are padded later",
           ", ".join({type(value).__name__ for value in made.values()}), "list")
    yield "the pieces are joined in order: {}", made["input_ids"], [1, 2, 3, 4, 5, 6, 7, 8]
    yield ("the loss mask is 1 on both answers and 0 on all context: {}",
           made["loss_mask"], [0, 0, 1, 1, 1, 0, 1, 1])
    yield "the model reads all tokens: {}", made["attention_mask"], [1] * 8
    yield ("a prompt without an answer trains nothing: {}",
           m.with_mask([([4, 5], False)])["loss_mask"], [0, 0])


def sft_token_logps(m):
    model, loss_mask = tiny_model(), [[0, 0, 0, 1, 1], [0, 1, 1], [0, 1, 0, 1]]
    batch = padded(ROWS, loss_mask=loss_mask)

    def one_by_one(temperature):
        logps = torch.zeros(3, 4)
        for row, ids in enumerate(ROWS):
            for end in range(1, len(ids)):
                logits = model(torch.tensor([ids[:end]])).logits[0, -1] / temperature
                logps[row, end - 1] = logits.log_softmax(-1)[ids[end]] * loss_mask[row][end]
        return logps
    even = copy.deepcopy(model)
    even.lm_head.weight.data.zero_()
    yield ("if all 11 tokens are equally likely, a trained token has log 1/11 = −2.398, others 0",
           m.token_logps(InRun(even), batch),
           -math.log(11) * torch.tensor([[0, 0, 1, 1], [1, 1, 0, 0], [1, 0, 1, 0.0]]), 1e-5)
    logps, true = m.token_logps(InRun(model), batch), one_by_one(1)
    yield "column t is the log-prob of token t + 1 after the tokens up to t", logps, true, 1e-4
    every = padded([[1, 2, last] for last in range(11)], loss_mask=[[0, 0, 1]] * 11)
    yield ("the probabilities of all 11 possible last tokens add up to {}",
           m.token_logps(InRun(model), every)[:, 1].exp().sum(), torch.tensor(1.0), 1e-4)
    yield ("at temperature 2, logits are halved before the softmax",
           m.token_logps(InRun(model), batch, 2.0), one_by_one(2), 1e-4)
    yield ("the gradient reaches the weights of the model",
           slope(logps, model.lm_head.weight), slope(true, model.lm_head.weight), 1e-3)


def sft_sft_loss(m):
    p = t([0.9, 0.5, 0.8, 0.6, 0.6], [0.25, 0.5, 0.5, 0.8, 0.6])
    mask = torch.tensor([[0, 0, 1, 1, 0, 0], [1, 1, 1, 1, 1, 0]])
    logps, true = p.log(), -math.log(0.5 * 0.8 * 0.25 * 0.5 * 0.5 * 0.8) / 6
    loss = m.sft_loss(logps, mask, 6)
    yield "the worked example of the docstring has the loss {}", loss, true
    first, second = (m.sft_loss(logps[i:i + 1], mask[i:i + 1], 6) for i in range(2))
    yield "the losses of two micro-batches add up to the loss of the step, {}", first + second, true
    yield ("the gradient is −1/N = −1/6 at each trained token and 0 elsewhere",
           slope(loss, logps), -mask[:, 1:].double() / 6)


# ---- reward_model.py -----------------------------------------------------------------------------

def reward_model_sequence_rewards(m):
    model, head, batch = InRun(tiny_model()), make_head(), padded(ROWS)
    true = torch.stack([read_alone(row, head) for row in ROWS])
    rewards = m.sequence_rewards(model, batch, head)
    yield "the reward is the head times the last real hidden state: {}", rewards, true, 1e-4
    yield ("another pad token changes nothing",
           m.sequence_rewards(model, padded(ROWS, pad=7), head), true, 1e-4)
    wider = {name: torch.nn.functional.pad(x, (0, 3)) for name, x in batch.items()}
    yield "more padding changes nothing", m.sequence_rewards(model, wider, head), true, 1e-4
    yield rounding(m.sequence_rewards, padded([row[:3] for row in ROWS]), -1)
    yield ("the gradient reaches the head", slope(rewards, head.weight),
           slope(true, head.weight), 1e-4)


def reward_model_reward_loss(m):
    chosen, rejected, none = t(1.2, 0.2, 0.5), t(0.2, 1.2, 0.5), torch.zeros(3).double()
    losses = m.reward_loss(chosen, rejected, none, 0.0)
    yield ("leads of 1, −1 and 0 cost −log σ(1), −log σ(−1) and log 2: {}", losses,
           [cost(1), cost(-1), cost(0)])
    yield ("adding 10 to all rewards changes nothing without centering",
           m.reward_loss(chosen + 10, rejected + 10, none, 0.0), losses)
    yield ("a lead that equals the margin costs log 2 = {}",
           m.reward_loss(chosen[:1], rejected[:1], t(1.0), 0.0), [cost(0)])
    yield ("centering adds λ times the square of the sum: 0.01 · 1.4² = {}",
           m.reward_loss(chosen, rejected, none, 0.01)[:1] - losses[:1], [0.0196])
    yield ("the gradient in the chosen reward is −σ(−lead): {}", slope(losses, chosen),
           [-sigma(-1), -sigma(1), -0.5])
    yield ("a pair that is wrong by 1000 costs {}, which is finite",
           m.reward_loss(t(0.0), t(1000.0), none[:1], 0.0), [1000.0])


# ---- dpo.py --------------------------------------------------------------------------------------

def dpo_preference_loss(m):
    c, r, ref_c, ref_r = t(-12.0, -3.0), t(-20.0, -4.0), t(-13.0, -1.0), t(-18.0, -5.0)
    yield ("at the start policy and reference agree, so the loss is log 2 = {}",
           m.preference_loss(c, r, c, r)[0], [cost(0), cost(0)])
    losses, chosen, rejected = m.preference_loss(c, r, ref_c, ref_r)
    yield "the implicit rewards of the chosen answers are β log π/π_ref = {}", chosen, [0.1, -0.2]
    yield "those of the rejected answers are {}", rejected, [-0.2, 0.1]
    yield "margins of 0.3 and −0.3 cost −log σ(margin) = {}", losses, [cost(0.3), cost(-0.3)]
    yield ("with β = 0.2, the margins double: {}",
           m.preference_loss(c, r, ref_c, ref_r, beta=0.2)[0], [cost(0.6), cost(-0.6)])
    yield ("the gradient in log π(y_w) is −β σ(−margin), so y_w becomes likelier: {}",
           slope(losses, c), [-0.1 * sigma(-0.3), -0.1 * sigma(0.3)])
    yield "in log π(y_l) it is +β σ(−margin): {}", slope(losses, r), [
        0.1 * sigma(-0.3), 0.1 * sigma(0.3)]
    # The expected loss is least where σ(margin) is the share of correct labels.
    at, zero = t(math.log(4)), t(0.0)
    smooth = m.preference_loss(at, zero, zero, zero, beta=1.0, label_smoothing=0.2)[0]
    yield ("with 20% wrong labels, the best margin is log 4, as σ(log 4) = 0.8: gradient {}",
           slope(smooth, at), [0.0])
    yield ("a margin of −2000 costs {}, which is finite",
           m.preference_loss(t(-2000.0), zero, zero, zero, beta=1.0)[0], [2000.0])


def dpo_ipo(m):
    ratios, zero = t(5.0, 6.0, 4.0, 0.0), torch.zeros(4).double()
    losses = m.preference_loss(ratios, zero, zero, zero, loss="ipo", beta=0.1)[0]
    yield ("log-ratios that are 5, 6, 4 and 0 apart, with the target 1/(2β) = 5, cost {}", losses,
           [0.0, 1.0, 1.0, 25.0])
    yield "at the start, the loss is 1/(4β²) = {}", losses[3], 25.0
    yield ("the gradient in the log-ratio is twice the distance to the target: {}",
           slope(losses, ratios), [0.0, 2.0, -2.0, -10.0])


def dpo_simpo(m):
    def simpo(c, r, n, k, gamma=1.0):
        lengths, zero = (torch.tensor(n), torch.tensor(k)), torch.zeros_like(c)
        return m.preference_loss(c, r, zero, zero, *lengths, "simpo", beta=2.0, gamma=gamma)
    c, r = t(-4.0, -4.0), t(-5.0, -6.0)
    losses, chosen, _ = simpo(c, r, [4, 4], [10, 3])
    yield "the rewards of chosen answers are β times the mean log-prob: {}", chosen, [-2.0, -2.0]
    yield ("the loss is −log σ(β (−1 + 0.5) − γ) and −log σ(β (−1 + 2) − γ): {}", losses,
           [cost(-2), cost(1)])
    yield ("a margin that equals γ = 2 costs log 2 = {}",
           simpo(c, r, [4, 4], [10, 3], gamma=2.0)[0][1], cost(0))
    yield ("answers of twice the length with the same mean cost the same",
           simpo(2 * c, 2 * r, [8, 8], [20, 6])[0], losses)
    yield ("the gradient in the summed log-prob of y_w is −β/|y_w| σ(γ − margin): {}",
           slope(losses, c), [-0.5 * sigma(2), -0.5 * sigma(-1)])


def dpo_orpo(m):
    def orpo(c, r, n, k, beta=0.1):
        lengths, zero = (torch.tensor([n]), torch.tensor([k])), torch.zeros_like(c)
        return m.preference_loss(c, r, zero, zero, *lengths, "orpo", beta)[0]
    c, r = t(3 * math.log(0.5)), t(2 * math.log(0.2))
    yield ("odds of 1 and 1/4 have the ratio 4: −log ½ − β log σ(log 4) = {}",
           orpo(c, r, 3, 2), [math.log(2) - 0.1 * math.log(0.8)])
    yield "equal answers cost −log ½ + β log 2 = {}", orpo(c, c, 3, 3), [1.1 * math.log(2)]
    yield ("the gradient in the summed log-prob of y_w is −(1 + β · 0.2 / (1 − ½)) / 3 = {}",
           slope(orpo(c, r, 3, 2), c), [-(1 + 0.1 * 0.2 / 0.5) / 3])
    certain = torch.tensor([-1e-9], requires_grad=True)
    loss = orpo(certain, torch.tensor([-1.0]), 1, 1)
    yield ("an answer that is certain has a finite loss and gradient",
           [loss.isfinite().item(), slope(loss, certain).isfinite().item()], [True, True])


# ---- kto.py --------------------------------------------------------------------------------------

def answers_to(*prompts):
    return [{"prompt": prompt, "head": i, "answer": [([90 + i], True)], "label": i % 2 == 0}
            for i, prompt in enumerate(prompts)]


def kto_mismatched(m):
    a, b, c = [1, 2, 3], [1, 5], [7]
    pairs = m.mismatched(answers_to(a, b, c))
    yield ("each answer gets the next prompt, and the last one the first: {}",
           [pair["prompt"] for pair in pairs], [b, c, a])
    yield ("the answers stay what they are", [pair["answer"] for pair in pairs],
           [[([90], True)], [([91], True)], [([92], True)]])
    yield ("`head`, the part of a prompt that truncation keeps, goes with its prompt: {}",
           [pair["head"] for pair in pairs], [1, 2, 0])
    yield ("the next prompt that differs is taken: {}",
           [pair["prompt"] for pair in m.mismatched(answers_to(a, a, b, b))], [b, b, a, a])
    yield ("a prompt that continues another does not differ, so nothing is left: {}",
           m.mismatched(answers_to(a, [*a, 4])), [])


def kto_reference_point(m):
    examples, read = answers_to([1], [2], [3], [4], [5]), []

    def z(*ratios, size=2):
        """z, where the mismatched answers have these log-ratios."""
        def answer_logps(model, rows, args, tokenizer):
            read.extend((row["prompt"], row["answer"]) for row in rows)
            found = [ratios[row["answer"][0][0][0] - 90] for row in rows]
            return torch.tensor(found).double() - 20, torch.full((len(found),), -20.0).double()
        model, args = SimpleNamespace(device="cpu"), SimpleNamespace(micro_batch_size=size)
        with mock.patch.object(m, "answer_logps", answer_logps):
            return m.reference_point(model, examples[:len(ratios)], args, None)
    yield "z is the mean of the log-ratios 1, 2, 3, 4 and 10: {}", z(1.0, 2.0, 3.0, 4.0, 10.0), 4.0
    others = [*examples[1:], examples[0]]
    pairs = [(other["prompt"], one["answer"]) for one, other in zip(examples, others, strict=True)]
    yield "each answer is read once, after another prompt", sorted(read), sorted(pairs)
    yield "other micro-batches change nothing: {}", z(1.0, 2.0, 3.0, 4.0, 10.0, size=3), 4.0
    yield "a KL is never negative, so a mean of −2 becomes {}", z(-2.0, -2.0), 0.0
    yield "only the mean is clamped: 5, −4, 0, 0 and 0 give {}", z(5.0, -4.0, 0.0, 0.0, 0.0), 0.2
    yield "without mismatched answers, z is {}", z(3.0), 0.0


def kto_kto_loss(m):
    def kto(ratios, z=1.0, beta=0.1, good=1.0, bad=1.0):
        return m.kto_loss(ratios, torch.tensor([True, False]), z, beta, good, bad)
    ratios, far, curve = t(3.0, 3.0), t(-500.0, 500.0), 0.1 * sigma(0.2) * sigma(-0.2)
    losses = kto(ratios)
    yield "at the reference point σ is ½, so both losses are λ/2: {}", kto(t(1.0, 1.0)), [0.5, 0.5]
    yield ("a log-ratio of 3 with z = 1 costs 1 − σ(0.2) if desirable, 1 − σ(−0.2) if not: {}",
           losses, [1 - sigma(0.2), 1 - sigma(-0.2)])
    yield ("λ_D is the weight of desirable answers, λ_U of the others: λ/2 for 3 and 5 is {}",
           kto(t(1.0, 1.0), good=3.0, bad=5.0), [1.5, 2.5])
    yield "adding 2 to the log-ratios and to z changes nothing", kto(ratios + 2, z=3.0), losses
    yield ("the gradient is −β σ(0.2) σ(−0.2) if desirable, + if not: {}",
           slope(losses, ratios), [-curve, curve])
    yield "far from z, there is no gradient: {}", slope(kto(far, beta=1.0), far), [0.0, 0.0]


# ---- online_dpo.py -------------------------------------------------------------------------------

def online_dpo_nash_md(m):
    def nash(y, other, ref, other_ref, wins, beta=0.1):
        return m.online_loss(y, other, ref, other_ref, wins, "nash_md", beta, 0.01)
    y, other, ref, other_ref = t(-12.0, -7.0), t(-20.0, -9.0), t(-13.0, -7.0), t(-18.0, -9.0)
    loss = nash(y, other, ref, other_ref, t(sigma(1), 0.9).detach())
    yield ("the gradient in log π(y) is −(P − ½ − r), so a likely winner becomes likelier: {}",
           slope(loss, y), [0.6 - sigma(1), -0.4])
    yield "y' gets no gradient: {}", slope(loss, other), [0.0, 0.0]
    yield ("at P = ½, only the KL penalty r(x, y) is left, which leads back to π_ref: {}",
           slope(nash(y, other, ref, other_ref, t(0.5, 0.5).detach()), y), [0.1, 0.0])
    logits, ref = normal(3).requires_grad_(), normal(3, seed=1).log_softmax(0)
    policy, wins = logits.log_softmax(0), t(0.9, 0.4, 0.2)
    climbs = (policy.exp() * (wins - 0.3 * (policy - ref))).sum()
    yield ("averaged over three possible answers, it is the gradient of −(E[P] − β KL)",
           slope(mean_over(policy, nash(policy, policy, ref, ref, wins.detach(), 0.3)), logits),
           -slope(climbs, logits))


def online_dpo_xpo(m):
    def xpo(y, wins=0.7, beta=0.1, alpha=0.01):
        return m.online_loss(y, other, t(-13.0), t(-18.0), t(wins), "xpo", beta, alpha)
    y, other, far = t(-12.0), t(-20.0), t(500.0)
    yield "the worked example costs −log σ(0.3) + 0.01 · (−20) = {}", xpo(y), [cost(0.3) - 0.2]
    yield "with α = 0, it is DPO's loss: {}", xpo(y, alpha=0.0), [cost(0.3)]
    yield "if y' wins, the margin is −0.3: {}", xpo(y, wins=0.3), [cost(-0.3) - 0.2]
    yield ("at a huge margin, only α is left, to push y' down: gradient {}",
           slope(xpo(far, beta=1.0), other), [0.01])


# ---- ppo.py --------------------------------------------------------------------------------------

def ppo_token_rewards(m):
    logps, ref, at_end = normal(3, 6), normal(3, 6, seed=1), NOTHING.clone()
    scores = t(1.0, 2.0, -3.0).detach()
    at_end[[0, 1, 2], [4, 1, 5]] = scores
    yield ("at the start π is π_ref, so only the score is paid, at the last token of an answer",
           m.token_rewards(scores, logps, logps, RAGGED, 0.05), at_end)
    gap = t([9.0, 0.2, -0.4, 0.2]).detach()
    yield ("the worked example, after a prompt: {}", m.token_rewards(
        scores[:1], gap, 0 * gap, torch.tensor([[0, 1, 1, 1]]), 0.05), [[0.0, -0.01, 0.02, 0.99]])
    yield ("the rewards of an answer add up to its score − β Σ log π/π_ref",
           m.token_rewards(scores, logps, ref, RAGGED, 0.3).sum(1),
           scores - 0.3 * ((logps - ref) * RAGGED).sum(1))


def ppo_gae(m):
    rewards, values = t([-0.01, 0.02, 0.99]).detach(), t([0.5, 0.6, 0.8]).detach()
    ones = torch.ones(1, 3).long()
    yield "with λ = 0, A is δ: {}", m.gae(rewards, values, ones, 1.0, 0.0)[0], [[0.09, 0.22, 0.19]]
    yield ("with λ = 1, the return A + V is the sum of the rewards to come, {}",
           m.gae(rewards, values, ones, 1.0, 1.0)[1], [[1.0, 1.01, 0.99]])
    rewards, values = normal(3, 6) * RAGGED, normal(3, 6, seed=1)
    true, right = NOTHING.clone(), NOTHING.clone()
    for row in range(3):
        inside = RAGGED[row].nonzero()[:, 0].tolist()
        for i, start in enumerate(inside):
            for step, k in enumerate(inside[i:]):
                following = values[row, k + 1] if k + 1 in inside else 0
                delta = rewards[row, k] + 0.9 * following - values[row, k]
                true[row, start] += (0.9 * 0.7) ** step * delta
                right[row, start] += 0.9 ** step * rewards[row, k]
    advantages, returns = m.gae(rewards, values, RAGGED, 0.9, 0.7)
    yield ("A is the double sum of (γλ)^l δ over each answer; V is 0 after its end",
           advantages * RAGGED, true)
    yield "outside the answers, A is 0", advantages * (1 - RAGGED), NOTHING
    yield "the return is A + V", returns * RAGGED, true + values * RAGGED
    yield ("where the critic is right, no token is a surprise: all A are 0, for any λ",
           m.gae(rewards, right, RAGGED, 0.9, 0.7)[0], NOTHING)


def ppo_whiten(m):
    x = 3 * normal(3, 6) + 5
    white = m.whiten(x, RAGGED)
    inside = white[RAGGED > 0].tolist()
    yield "the mean over the answer tokens is {}", statistics.fmean(inside), 0.0, 1e-6
    yield "their variance, divided by N, is {}", statistics.pvariance(inside), 1.0, 1e-6
    yield "outside the answers, there are zeros", white * (1 - RAGGED), NOTHING
    yield "stretching and shifting x changes nothing", m.whiten(7 * x - 2, RAGGED), white, 1e-6
    yield "equal advantages become 0, not 0/0", m.whiten(NOTHING + 2, RAGGED), NOTHING, 1e-3


def clip_cells(loss_of, high):
    """Properties of a clipped loss: value and gradient for each sign of A, inside and outside."""
    for advantage, ratio, bound in ((2.0, 1.0, None), (2.0, 0.5, None), (2.0, 1.5, 1 + high),
                                    (-2.0, 0.5, 0.8), (-2.0, 1.5, None)):
        logps = t([math.log(ratio)])
        loss, is_clipped = loss_of(logps, torch.zeros(1, 1).double(), advantage)
        why = "only the bound counts, and there is no gradient" if bound else "the gradient is −A ρ"
        where = f"A = {advantage:.0f} and ρ = {ratio}".replace("-", "−")
        yield f"{where}: the loss is {{}}", loss, [[-advantage * (bound or ratio)]]
        yield f"{where}: {why}: {{}}", slope(loss, logps), [[0.0 if bound else -advantage * ratio]]
        yield f"{where}: whether the clip binds: {{}}", is_clipped, [[bool(bound)]]


def ppo_policy_loss(m):
    yield from clip_cells(lambda logps, old, advantage: m.policy_loss(
        logps, old, torch.full_like(logps, advantage).detach(), 0.2), 0.2)


def ppo_value_loss(m):
    values, returns = t(0.5, -0.5, 0.1, 0.5, 3.0), t(1.0, -1, 1, 0, 1).detach()
    losses = m.value_loss(values, torch.zeros(5).double(), returns, 0.2)
    yield ("values 0.5 −0.5 0.1 0.5 3, which were 0, with returns 1 −1 1 0 1 cost {}", losses,
           [0.32, 0.32, 0.405, 0.125, 2.0])
    yield ("the gradient is V − R, but 0 where the bound counts: {}",
           slope(losses, values), [0.0, 0.0, -0.9, 0.5, 2.0])
    yield ("the bound is around the old value: from 10 to 10.1, it does not bind: {}",
           m.value_loss(t(10.1), t(10.0), t(11.1), 0.2), [0.5])


# ---- grpo.py -------------------------------------------------------------------------------------

def grpo_group_advantages(m):
    rewards = t([1.0, 0, 0, 1], [1, 0, 0, 0], [2, 3, 5, 9]).detach()
    above = [[r - statistics.fmean(row) for r in row] for row in rewards.tolist()]
    scaled = [[x / (statistics.stdev(row) + 1e-4) for x in row] for row in above]
    yield ("the groups 1 0 0 1, 1 0 0 0 and 2 3 5 9, with std over G − 1, have {}",
           m.group_advantages(rewards), scaled)
    yield ("without `scale` (Dr. GRPO), they are the rewards minus the mean: {}",
           m.group_advantages(rewards, scale=False), above)
    yield ("rloo subtracts the mean of the others: {}", m.group_advantages(rewards, "rloo")[2],
           [2 - 17 / 3, 3 - 16 / 3, 5 - 14 / 3, 9 - 10 / 3])
    yield "none subtracts nothing: {}", m.group_advantages(rewards, "none")[0], [1.0, 0.0, 0.0, 1.0]
    equal = torch.full((1, 7), 0.1)  # whose mean is not exactly 0.1
    yield ("equal rewards give exactly 0, not a rounding error divided by 1e-4",
           [m.group_advantages(equal, baseline).tolist() for baseline in ("group", "rloo")],
           [[[0.0] * 7]] * 2)


def grpo_token_losses(m):
    yield from clip_cells(lambda logps, old, advantage: m.token_losses(
        logps, old, t(advantage).detach(), torch.ones(1, 1).long(), "grpo", 0.2, 0.28), 0.28)
    logps, advantages = normal(3, 6), t(1.0, -1.0, 2.0).detach()
    yield ("all tokens of a completion share its advantage: with ratio 1, all losses are −A",
           m.token_losses(logps, logps, advantages, RAGGED * 0 + 1, "grpo", 0.2, 0.2)[0],
           -advantages[:, None].expand(3, 6))


def grpo_gspo(m):
    def gspo(logps, old, advantages, mask):
        return m.token_losses(logps, old, advantages, mask, "gspo", 9.0, 9.0)[0] * mask
    logps, old, advantages = normal(3, 6) / 9, normal(3, 6, seed=1) / 9, t(1.0, -1.0, 2.0).detach()
    ratios = (((logps - old) * RAGGED).sum(1) / RAGGED.sum(1)).exp()
    yield ("all tokens share one ratio, the geometric mean of the ratios of the answer's tokens",
           gspo(logps, old, advantages, RAGGED), -(advantages * ratios)[:, None] * RAGGED)
    yield ("log-probs outside the mask are not read",
           gspo(logps.where(RAGGED > 0, 5.0), old, advantages, RAGGED),
           -(advantages * ratios)[:, None] * RAGGED)
    for count in 1, 4:
        equal = t([0.1] * count)
        yield (f"equal ratios of {count} tokens are that ratio: a loss of −e^0.1 = {{}}",
               gspo(equal, 0 * equal, t(1.0), torch.ones(1, count).long()),
               [[-math.exp(0.1)] * count])


def grpo_cispo(m):
    logps = t([math.log(3.0), math.log(9.0), math.log(0.01)])
    losses, is_clipped = m.token_losses(
        logps, 0 * logps.detach(), t(2.0), torch.ones(1, 3).long(), "cispo", 0.2, 5.0)
    yield ("the weight of log π is the ratio, at most ε_high = 5: −w A log π = {}", losses,
           [[-6 * math.log(3), -10 * math.log(9), -0.02 * math.log(0.01)]])
    yield ("the weight is a constant, so the gradient is −w A, even past the bound: {}",
           slope(losses, logps), [[-6.0, -10.0, -0.02]])
    yield "the bound binds above, never below: {}", is_clipped, [[False, True, False]]


def grpo_token_kl(m):
    ours = m.token_kl(t([-1.0, -1.0, -1.0]), t([-1.0, -1.5, -0.5]))
    yield ("the worked example: log π_ref − log π of 0, −0.5 and 0.5 give {}", ours,
           [[0.0, math.exp(-0.5) + 0.5 - 1, math.exp(0.5) - 0.5 - 1]])
    logits, ref = normal(5).requires_grad_(), normal(5, seed=1).log_softmax(0)
    policy = logits.log_softmax(0)
    mean = mean_over(policy, m.token_kl(policy[None], ref[None])[0])
    yield "its mean over samples of π is KL(π ‖ π_ref) = {}", mean, mean_over(policy, policy - ref)
    yield ("the mean of its gradient is that of KL(π_ref ‖ π): π − π_ref in the logits",
           slope(mean, logits), policy.exp() - ref.exp())


def grpo_token_weights(m):
    def weights(loss, mask=RAGGED, sequences=3, tokens=10):
        return m.token_weights(mask, loss, sequences, torch.tensor(tokens), 8).double()
    mean = RAGGED / (3 * torch.tensor([[3.0], [2.0], [5.0]]).double())
    for loss, true, why in (
            ("grpo", mean, "each completion weighs 1/3, each of its tokens alike"),
            ("gspo", mean, "it is the same"),
            ("dr_grpo", RAGGED.double() / 24, "each token weighs 1/(longest · sequences) = 1/24"),
            ("dapo", RAGGED.double() / 10, "each of the 10 tokens of the batch weighs 1/10")):
        yield f"{loss}: {why}", weights(loss), true, 1e-6
    yield ("grpo: in a micro-batch of one, a completion still weighs {}",
           weights("grpo", RAGGED[:1]).sum(), 1 / 3, 1e-6)
    yield ("a completion without tokens weighs 0, not 0/0",
           [weights(x, RAGGED[:1] * 0, 1, 0).sum().item() for x in ("grpo", "dapo")], [0.0, 0.0])


class Cache:
    """A KV cache that only knows which prompt each of its rows belongs to."""

    def __init__(self, rows):
        self.rows = rows

    def reorder_cache(self, index):
        self.rows = self.rows[index]


def play(m, scripts, copies, longest):
    """Samples from a model that says a given script after each prompt; 8 and 9 are stop tokens.

    Returns the answers, the number of rows in each pass, and whether each row that was read had its
    own last token, mask and cache.
    """
    passes, in_order = [], []

    def read(causal, ids, mask, cache=None):
        cache, place = cache or Cache(torch.arange(len(ids))), len(passes)
        rows = cache.rows.tolist()
        said = [[scripts[row][place - 1]] for row in rows] if place else ids.tolist()
        in_order.append(ids.tolist() == said and len(mask) == len(rows))
        passes.append(len(ids))
        following = torch.tensor([scripts[row][place] for row in rows])
        return 1e4 * torch.nn.functional.one_hot(following, 10), cache
    model = SimpleNamespace(training=True, eval=lambda: None, train=lambda mode=True: None,
                            device=torch.device("cpu"), generation_config=None)
    batch = {name: torch.ones(len(scripts), 2).long() for name in ("input_ids", "attention_mask")}
    tokenizer = SimpleNamespace(pad=lambda *_, **__: batch)
    args = SimpleNamespace(max_new_tokens=longest, temperature=1.0)
    with mock.patch.multiple(common, read=read, stop_token_ids=lambda *_: [8, 9]):
        answers = m.sample(model, tokenizer, [[1, 1]] * len(scripts), copies, args, 0)
    return answers, passes, all(in_order)


def grpo_sample(m):
    scripts = [[1, 9, 5, 5, 5, 5], [2, 3, 8, 5, 5, 5], [4, 4, 4, 4, 4, 4], [9, 5, 5, 5, 5, 5]]
    answers, passes, in_order = play(m, scripts, 1, 5)
    yield ("an answer ends with its first stop token (8 or 9), which is part of it, or after 5: {}",
           answers, [[1, 9], [2, 3, 8], [4, 4, 4, 4, 4], [9]])
    yield "an answer that has ended is not read any more: rows per pass {}", passes, [4, 3, 2, 1, 1]
    yield "each answer that goes on keeps its own token, mask and KV cache", in_order, True
    answers, passes, _ = play(m, scripts[:2], 2, 5)
    yield "two answers per prompt stay together: {}", answers, [[1, 9]] * 2 + [[2, 3, 8]] * 2
    yield "sampling stops when all have ended: rows per pass {}", passes, [2, 4, 2]


# ---- prm.py --------------------------------------------------------------------------------------

def prm_step_logits(m):
    head, ends = make_head(), [[1, 2, 4], [2, 2, 2], [0, 1, 3]]
    batch = padded(ROWS) | {"step_ends": torch.tensor(ends)}
    true = torch.stack([read_alone(ids[:end + 1], head)
                        for ids, row in zip(ROWS, ends, strict=True) for end in row]).view(3, 3)
    logits = m.step_logits(InRun(tiny_model()), batch, head)
    yield "a logit is the head times the hidden state at its step's end: {}", logits, true, 1e-4
    batch["input_ids"][0, 3] = 7
    moved = (m.step_logits(InRun(tiny_model()), batch, head)[0] - logits[0]).abs() > 1e-4
    yield "a token of the third step changes the third logit only: {}", moved, [False, False, True]
    short = padded([row[:3] for row in ROWS]) | {"step_ends": torch.tensor([[0, 2]] * 3)}
    yield rounding(m.step_logits, short, [0, 2])


def prm_step_losses(m):
    logits, labels = t([2.0, 1.0, -1.0, 5.0, 0.0]), torch.tensor([[1, 1, 0, 0, 1]])
    losses = m.step_losses(logits, labels, torch.tensor([[1, 1, 1, 0, 1]]))
    yield ("p = σ(2), σ(1), σ(−1), σ(5), ½ with labels 1 1 0 0 1, mask 1 1 1 0 1 cost {}", losses,
           [[cost(2), cost(1), cost(1), 0.0, cost(0)]])
    yield "the gradient is p − l where the mask is 1: {}", slope(losses, logits), [
        [sigma(2) - 1, sigma(1) - 1, sigma(-1), 0.0, -0.5]]
    yield ("being wrong by a logit of 1000 costs 1000, which is finite: {}", m.step_losses(
        t([1000.0, -1000.0]), torch.tensor([[0, 1]]), torch.ones(1, 2).long()), [[1000.0, 1000.0]])


# ---- distill.py ----------------------------------------------------------------------------------

def distill_divergences(m):
    logits, teacher = normal(1, 5).requires_grad_(), normal(1, 5, seed=1).log_softmax(-1)
    student = logits.log_softmax(-1)
    p, q, gap = student.exp(), teacher.exp(), student - teacher
    forward, reverse, tiny = (q * -gap).sum(-1), (p * gap).sum(-1), 1e-6

    def d(name, student=student, teacher=teacher, beta=0.5):
        return m.divergences(student, teacher, name, beta)
    yield "reverse: Σ π log π/π_T = {}", d("reverse"), reverse
    yield "forward: Σ π_T log π_T/π = {}", d("forward"), forward
    yield "jsd: equal distributions are {} apart", d("jsd", student, student, 0.3), [0.0]
    yield ("reverse: the gradient in the logits is π (log π/π_T − KL)", slope(d("reverse"), logits),
           p * (gap - reverse))
    yield "forward: the gradient in the logits is π − π_T", slope(d("forward"), logits), p - q
    yield "JSD / β tends to the forward KL for β → 0: {}", d("jsd", beta=tiny) / tiny, forward, 1e-4
    yield ("JSD / (1 − β) tends to the reverse KL for β → 1: {}",
           d("jsd", beta=1 - tiny) / tiny, reverse, 1e-4)
    apart = -0.3 * math.log(0.3) - 0.7 * math.log(0.7)
    yield ("distributions that share nothing are the entropy of β = 0.3 apart, {}",
           d("jsd", t([0.0, -99.0]), t([-99.0, 0.0]), 0.3), [apart])


def distill_sampled_losses(m):
    student, teacher = t(math.log(0.5), math.log(0.5)), t(math.log(0.9), math.log(0.1))
    a, b = math.log(0.9 / 0.5), math.log(0.1 / 0.5)
    losses = m.sampled_losses(student, teacher.detach())
    yield "the loss is −A log π: {}", losses, [-a * math.log(0.5), -b * math.log(0.5)]
    yield ("the gradient is −A: a token that the teacher says more becomes likelier: {}",
           slope(losses, student), [-a, -b])
    logits, teacher = normal(5).requires_grad_(), normal(5, seed=1).log_softmax(0)
    policy = logits.log_softmax(0)
    yield ("over all tokens, its mean gradient is the gradient of the reverse KL",
           slope(mean_over(policy, m.sampled_losses(policy, teacher)), logits),
           slope((policy.exp() * (policy - teacher)).sum(), logits))


# ---- agent.py ------------------------------------------------------------------------------------

def agent_add_turn(m):
    def talk_after(*turns):
        """A conversation whose prompt is 1 2. Token 7 calls a tool, whose result is 5 6."""
        talk = {"ids": [1, 2], "mask": [0, 0]} | dict.fromkeys(m.COUNTS, 0)
        args = SimpleNamespace(max_turns=9, tool_seconds=1, max_length=99, max_new_tokens=9)
        tokenizer = SimpleNamespace(model_max_length=99, decode=lambda ids, **_: str(ids))
        with mock.patch.multiple(
                m, find_calls=lambda text: ["call"] * ("7" in text),
                run_call=lambda *_: ("56", False), environment_ids=lambda *_: [5, 6]):
            goes_on = [m.add_turn(talk, list(ids), [9], tokenizer, None, args) for ids in turns]
        return talk, goes_on
    talk, goes_on = talk_after([3, 4, 9])
    yield "an answer is appended to its prompt: {}", talk["ids"], [1, 2, 3, 4, 9]
    yield "what the policy wrote is trained, its prompt is not: {}", talk["mask"], [0, 0, 1, 1, 1]
    talk, goes_on = talk_after([3, 7, 9], [4, 9])
    yield ("the result of a tool, 5 6, stands between the turns: {}",
           talk["ids"], [1, 2, 3, 7, 9, 5, 6, 4, 9])
    yield "it is not trained, but the turns on both sides are: {}", talk["mask"], [
        0, 0, 1, 1, 1, 0, 0, 1, 1]
    yield "another turn follows after a call, and none after an answer: {}", goes_on, [True, False]
