"""Online DPO, XPO and Nash-MD, as in online_dpo.py: losses, preferences, and a run by hand.

The sampler of y' has a file of its own, test_mixture.py.
"""
import itertools
import math
import statistics

import by_hand
import pytest
import torch
from by_hand import answer_to, ask, close, prompt_ids, same, tokenizer
from conftest import run_args

import common
import online_dpo

LOSSES = ["dpo", "ipo", "xpo", "nash_md"]
BETA, ALPHA, PENALTY, TEMPERATURE = 0.3, 0.07, 2.5, 1.5


def sums(seed, count=4):
    """Log-probs of answers, from −20 to 0, in float64."""
    generator = torch.Generator().manual_seed(seed)
    return -20 * torch.rand(count, generator=generator, dtype=torch.float64)


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


# ---- the losses ----------------------------------------------------------------------------------

def test_the_worked_example_of_the_docstring():
    """Every number that it gives for log π = −12, −20, log π_ref = −13, −18 and scores 1, 0."""
    logps = [torch.tensor([x], requires_grad=True) for x in (-12.0, -20.0, -13.0, -18.0)]
    win = torch.tensor([1.0]).sigmoid()
    value = {loss: online_dpo.online_loss(*logps, win, loss, 0.1, 0.01) for loss in LOSSES}
    lost = online_dpo.online_loss(*logps, 1 - win, "dpo", 0.1, 0.0)
    pull, = torch.autograd.grad(value["nash_md"], logps[0])
    by_hand.documented(
        online_dpo, ("P(y ≻ y') = σ(1) = {:.3f}", win), ("−log σ(0.3) = {:.3f}", value["dpo"]),
        ("−log σ(−0.3) = {:.3f}", lost), ("(3 − 5)² = {:.0f}", value["ipo"]),
        ("0.554 + 0.01 · (−20) = {:.3f}", value["xpo"]), ("−(0.731 − 0.5 − 0.1) = {:.3f}", pull))


def equation(loss, a, b, ref_a, ref_b, win):
    """The loss of one pair: a is log π(y|x), b is log π(y'|x), win is P(y ≻ y')."""
    if loss == "nash_md":
        return -(win - 0.5 - BETA * (a - ref_a).item()) * a
    if win == 0.5:
        return 0.0 * a
    h = (a - ref_a) - (b - ref_b)  # of y over y'
    h = h if win > 0.5 else -h
    if loss == "ipo":
        return (h - 1 / (2 * BETA)) ** 2
    return torch.log1p(torch.exp(-BETA * h)) + (ALPHA * b if loss == "xpo" else 0)


WINS = torch.tensor([0.9, 0.2, 0.5, 1.0], dtype=torch.float64)  # the third is a tie


@pytest.mark.parametrize("loss", LOSSES)
def test_each_loss_is_its_equation_written_out_with_that_gradient(loss):
    logps = [sums(seed).requires_grad_() for seed in range(4)]
    ours = online_dpo.online_loss(*logps, WINS, loss, BETA, ALPHA)
    for i, pair in enumerate(zip(*logps, WINS.tolist(), strict=True)):
        close(ours[i].item(), equation(loss, *pair).item(), f"{loss}, pair {i}")
    gradients = torch.autograd.grad(ours.sum(), logps, allow_unused=True, materialize_grads=True)
    if loss == "nash_md":  # the bracket is a constant, so y' and the reference get no gradient
        bracket = WINS - 0.5 - BETA * (logps[0] - logps[2])
        same(gradients[0], -bracket.detach(), "gradient w.r.t. log π(y|x): expected −bracket")
        assert not any(g.any() for g in gradients[1:]), "a gradient flows through the bracket"
        return
    assert torch.autograd.gradcheck(
        lambda *x: online_dpo.online_loss(*x, WINS, loss, BETA, ALPHA), logps)
    assert not any(g[2] for g in gradients), "a tie has a gradient"


@pytest.mark.parametrize("is_hard", [False, True])
@pytest.mark.parametrize("m", [0.0, 0.3])
def test_nash_md_climbs_preference_minus_kl_by_enumeration(m, is_hard):
    """Expected over y ~ π, y' ~ mixture, the loss has the gradient of β KL(π ‖ π_ref) − E[P]."""
    generator = torch.Generator().manual_seed(3)
    logits, ref_logits, scores = torch.randn(3, 6, generator=generator, dtype=torch.float64)
    scores[4] = scores[1]  # equal scores count as well
    logits.requires_grad_()
    logps, ref_logps = logits.log_softmax(0), ref_logits.log_softmax(0)
    mixture = ((1 - m) * logps + m * ref_logps).softmax(0).detach()
    lead = scores[:, None] - scores
    wins = 0.5 + 0.5 * lead.sign() if is_hard else lead.sigmoid()
    loss = 0
    for y, other in itertools.product(range(6), repeat=2):
        each = online_dpo.online_loss(
            *(x[None] for x in (logps[y], logps[other], ref_logps[y], ref_logps[other],
                                wins[y, other])), "nash_md", BETA, 0.0)
        loss = loss + logps[y].exp().detach() * mixture[other] * each.sum()
    ours, = torch.autograd.grad(loss, logits, retain_graph=True)
    kl = (logps.exp() * (logps - ref_logps)).sum()
    value = (logps.exp()[:, None] * mixture * (wins - 0.5)).sum() - BETA * kl
    expected, = torch.autograd.grad(-value, logits)
    same(ours, expected, "gradient of Nash-MD: is a sign of the bracket flipped?")
    assert expected.norm() > 0.05


# ---- scores and preferences ----------------------------------------------------------------------

def row(question, answer, **more):
    return {"prompt": ask(question), "answer": str(answer)} | more


ROWS = [row("What is 5 - 2?", 3), row("Tom has 14 figs and gets 83 more. How many figs now?", 97),
        row("What is 9 - 8 and 12 + 9?", 21), row("What is 4 - 1?", 3)]
HELD_OUT = [row(f"What is {n} - 4?", n - 4) for n in (6, 11, 400)]
REWARDS = ("def varied(prompts, completions, **columns):\n"
           "    return [sum(map(ord, x)) % 3 for x in completions]\n")


def fixed_draws(model, words, prompts, m, args, seed):
    """Replaces sample_mixture. Seeds are even for y, odd for y'. Some answers do not stop."""
    return [answer_to(prompt, seed % 2 + 2 * (len(prompt) % 2)) for prompt in prompts]


def test_preferences_compare_penalized_scores_of_the_same_prompt(monkeypatch):
    """P is σ of the gap, or 1, ½ or 0. A tiny gap is no tie. Logged scores have no penalty."""
    eos, prompt = tokenizer().eos_token_id, prompt_ids(ask("1 + 1?"))
    model = common.load_model("tiny/chat")
    assert set(common.stop_token_ids(tokenizer(), model.generation_config)) & set(prompt)
    y, other = [[40, eos], [40, eos], [40, 41], [40, eos]], [[41, eos], [41], [40, 42], [42, eos]]
    scores = torch.tensor([0.3, -2.0, 1.0, 1e-9, -1.2, 0.0, 1.0, 0.0])
    gaps = [1.5, -2 - (0 - PENALTY), 0, 1e-9]
    for kind, expected in ("sigmoid", list(map(sigmoid, gaps))), ("hard", [1, 1, 0.5, 1]):
        drawn = iter([y, other])
        monkeypatch.setattr(online_dpo, "sample_mixture", lambda *args, drawn=drawn: next(drawn))
        args = run_args(online_dpo, missing_eos_penalty=PENALTY, preference=kind)
        examples = [{"prompt": prompt, "row": {}}] * 4
        batch, answers = online_dpo.rollout(
            model, lambda *args: scores.clone(), examples, tokenizer(), args, 0)
        assert answers == y + other and batch["stopped"].tolist() == [1, 1, 0, 1, 1, 0, 0, 1]
        first, second = batch["wins"].tolist()[:4], batch["wins"].tolist()[4:]
        assert first == pytest.approx(expected, rel=1e-6), f"{kind}: P(y ≻ y')"
        assert [x + z for x, z in zip(first, second, strict=True)] == pytest.approx([1] * 4)
        assert [x == 0.5 for x in first] == [False, False, True, False], "ties"
        assert torch.equal(batch["scores"], scores), "logged scores include the penalty"
        close(online_dpo.describe(batch, args)["reward"], -0.175, "reward: mean over y", 1e-5)


# ---- a run by hand -------------------------------------------------------------------------------

def figures_by_hand(model, reference, rows, args):
    """The mean loss over prompts, with its gradient, and every figure that is logged."""
    losses, pairs, lines = [], [], []
    for prompt in (prompt_ids(row["prompt"]) for row in rows):
        answers = [fixed_draws(None, None, [prompt], 0, None, seed)[0] for seed in (0, 1)]
        (a, b), (ref_a, ref_b) = ([by_hand.logps(m, prompt, ids, TEMPERATURE).sum()
                                   for ids in answers] for m in (model, reference))
        texts = tokenizer().batch_decode(answers, skip_special_tokens=True)
        scores = [sum(map(ord, text)) % 3 for text in texts]
        ended = [ids[-1] == tokenizer().eos_token_id for ids in answers]
        lead = scores[0] - scores[1] - PENALTY * (ended[1] - ended[0])
        win = sigmoid(lead) if args.preference == "sigmoid" else (lead > 0) + 0.5 * (lead == 0)
        losses.append(equation(args.loss, a, b, ref_a, ref_b, win))
        r, other_r = BETA * (a - ref_a).item(), BETA * (b - ref_b).item()
        pairs += [(r, other_r) if lead > 0 else (other_r, r)] if lead else []
        lines.append({"reward": scores[0], "stopped": ended[0], "length": len(answers[0]),
                      "kl": r / BETA, "ties": lead == 0, "preference": win})
    loss = torch.stack(losses).mean()
    figures = {name: statistics.fmean(line[name] for line in lines) for name in lines[0]}
    figures |= {"loss": loss.item(), "margin": statistics.fmean(c - r for c, r in pairs),
                "accuracy": statistics.fmean((c > r) + 0.5 * (c == r) for c, r in pairs),
                "chosen_reward": statistics.fmean(c for c, _ in pairs),
                "rejected_reward": statistics.fmean(r for _, r in pairs)}
    return loss, figures


@pytest.fixture
def run(tmp_path):
    """A function that trains for two steps on ROWS, with the reward `varied`."""
    def train(name="run", replace=None, reward="varied", **flags):
        (tmp_path / "rewards.py").write_text(REWARDS)
        flags = dict(max_new_tokens=20, max_steps=2, temperature=TEMPERATURE, beta=BETA,
                     alpha=ALPHA, missing_eos_penalty=PENALTY) | flags
        return by_hand.Run(online_dpo, tmp_path / name, ROWS, HELD_OUT, ["sample_mixture"], replace,
                           reward=f"{tmp_path}/rewards.py:{reward}", **flags)
    return train


@pytest.mark.parametrize("loss, preference, size", [
    ("dpo", "sigmoid", 1), ("ipo", "sigmoid", 3), ("xpo", "sigmoid", 2), ("nash_md", "hard", 4),
    ("nash_md", "sigmoid", 3)])
def test_a_run_equals_the_same_steps_by_hand(loss, preference, size, run):
    """Every figure and weight of two steps, and all held-out figures, for any micro-batch size."""
    run = run(replace={"sample_mixture": fixed_draws}, loss=loss, preference=preference,
              micro_batch_size=size)
    hand = by_hand.Training(run)
    for _ in range(2):  # each step has all four prompts
        value, figures = figures_by_hand(hand.model, hand.reference, ROWS, run.args)
        hand.log(figures | hand.update(value))
    hand.check(run)
    _, figures = figures_by_hand(hand.model, hand.reference, HELD_OUT, run.args)
    close(run.summary["after"], figures, "held out")
    asked = {tokenizer().decode(ids): ids for ids in (prompt_ids(row["prompt"]) for row in ROWS)}
    assert {sample["prompt"] for sample in run.summary["samples"]} == set(asked)
    for sample in run.summary["samples"]:
        ids = fixed_draws(None, None, [asked[sample["prompt"]]], 0, None, 0)[0]
        text = tokenizer().decode(ids, skip_special_tokens=True)
        assert sample["score"] == sum(map(ord, text)) % 3
        assert sample["answer"] == tokenizer().decode(ids), "samples show the answer y, whole"
    first, second = run.metrics
    assert 0 < first["ties"] < 1 and 0 < first["stopped"] < 1 and abs(second["kl"]) > 0.05, (
        "this test needs a tie, an answer that does not stop, and a policy that moves")


@pytest.mark.parametrize("loss, m", zip(LOSSES, [0.0, 0.0, 1.0, 0.125], strict=True))
def test_y_is_from_the_policy_and_the_other_from_its_mixture(
        loss, m, tmp_path, write_jsonl, monkeypatch):
    """Sampled in parts by two processes, and no two parts of training samples share a seed."""
    calls, seeds = [], []
    monkeypatch.setattr(common, "WORLD", 2)
    monkeypatch.setattr(online_dpo, "sample_mixture", lambda model, words, prompts, m, args, seed:
                        calls.append((prompts, m, seed)) or [[40, 2]] * len(prompts))
    held_out = [prompt_ids(row["prompt"]) for row in HELD_OUT]
    for rank in 0, 1:
        calls.clear()
        monkeypatch.setattr(common, "RANK", rank)
        online_dpo.train(run_args(
            online_dpo, loss=loss, dataset=write_jsonl(ROWS), sample_batch_size=2, batch_size=4,
            eval_dataset=write_jsonl(HELD_OUT, "held_out.jsonl"), max_steps=2, max_new_tokens=2,
            output_dir=tmp_path / str(rank)))
        mixtures = [mixture for _, mixture, _ in calls]
        assert mixtures == [0.0, 0.0, m, m] + [0.0, m] * 2 + [0.0, 0.0, m, m], "y, then y'"
        assert calls[:4] == calls[-4:] and [x for x, _, _ in calls[:4]] == [
            held_out[:2], held_out[2:]] * 2, "held-out prompts, before and after"
        seeds += [seed for _, _, seed in calls[4 * rank:-4]]
    assert len(set(seeds)) == len(seeds) == 12, f"two parts share a seed: {seeds}"
