"""DPO and its variants, in the order of dpo.py: losses, pairs with their masks, a run by hand.

Tested elsewhere, once for all scripts: the forms of rows (tests/system/test_common_rows.py),
log-probs, clipping, learning rate, data order and 16 bits (tests/system/test_loop.py).
"""
import math
from contextlib import nullcontext

import by_hand
import pytest
import torch
from by_hand import ask, close, say, tokenizer
from conftest import run_args

import common
import dpo

LOSSES = ["dpo", "ipo", "hinge", "simpo", "orpo", "cpo"]
REFERENCE_FREE = ["simpo", "orpo", "cpo"]


def pair_row(a, b, wrong, question="What is {a} + {b}?"):
    prompt = ask(question.format(a=a, b=b))
    return {"prompt": prompt, "chosen": say(f"{a} + {b} = {a + b}"), "rejected": say(wrong)}


# Lengths differ, so that means over rows, tokens and micro-batches are not equal by chance.
ROWS = [pair_row(3 * i, 7 + i, f"{3 * i} + {7 + i} = {i}" if i % 3 else "No.") for i in range(10)]
ROWS.append(pair_row(40, 2, "40 + 2 = 402 = 4", "Sam has {a} cups and gets {b} more. How many?"))
HELD_OUT = [pair_row(50 + i, i, f"{i} and {50 - i}", "Add {a} and {b}.") for i in range(5)]


def numbers(*values):
    return torch.tensor(values, dtype=torch.float64, requires_grad=True)


# ---- the losses ----------------------------------------------------------------------------------

def test_the_worked_example_of_the_docstring():
    """Every number that the docstring gives for log π = −12, −20 and log π_ref = −13, −18."""
    logps = [numbers(x) for x in (-12.0, -20.0, -13.0, -18.0)]
    loss, chosen, rejected = dpo.preference_loss(*logps, beta=0.1)
    slopes = torch.autograd.grad(loss.sum(), logps[:2])
    by_hand.documented(
        dpo, ("0.1 · (−12 + 13) = {:.1f}", chosen), ("0.1 · (−20 + 18) = {:.1f}", rejected),
        ("0.1 + 0.2 = {:.1f}", chosen - rejected), ("−log σ(0.3) = {:.3f}", loss),
        ("log π(y_w|x) is −β σ(−0.3) = {:.4f}", slopes[0]),
        ("log π(y_l|x) it is {:+.4f}", slopes[1]))


def equation(loss, c, r, ref_c, ref_r, n, m, beta, epsilon=0.0, gamma=0.0):
    """The loss of one pair, and its two rewards, from the equations of the papers."""
    def sigma(x):
        return 1 / (1 + torch.exp(-x))

    h = c - ref_c - (r - ref_r)
    if loss == "dpo":
        value = -(1 - epsilon) * sigma(beta * h).log() - epsilon * sigma(-beta * h).log()
    elif loss == "ipo":
        value = (h - 1 / (2 * beta)) ** 2
    elif loss == "hinge":
        value = torch.clamp(1 - beta * h, min=0)
    elif loss == "simpo":
        value = -sigma(beta * (c / n - r / m) - gamma).log()
    elif loss == "cpo":
        value = -sigma(beta * (c - r)).log() - c
    elif loss == "orpo":
        odds_c, odds_r = [torch.exp(x) / (1 - torch.exp(x)) for x in (c / n, r / m)]
        value = -c / n - beta * sigma(torch.log(odds_c / odds_r)).log()
    if loss in ("simpo", "orpo"):
        return value, beta * c / n, beta * r / m
    if loss == "cpo":
        return value, beta * c, beta * r
    return value, beta * (c - ref_c), beta * (r - ref_r)


@pytest.mark.parametrize("loss", LOSSES)
def test_each_loss_is_its_equation_written_out_and_differentiable(loss):
    """On two pairs whose answers differ in length."""
    c, r, lengths = numbers(-4.0, -2.5), numbers(-6.0, -7.0), [[4.0, 2.0], [3.0, 5.0]]
    refs = [torch.zeros(2).double()] * 2 if loss in REFERENCE_FREE else [
        numbers(-5.0, -2.0).detach(), numbers(-5.5, -9.0).detach()]
    n, m = (torch.tensor(x).double() for x in lengths)
    settings = 0.5, 0.2 if loss == "dpo" else 0.0, 0.3
    ours = dpo.preference_loss(c, r, *refs, n, m, loss, *settings)
    for i in range(2):
        expected = equation(loss, *(x[i] for x in (c, r, *refs, n, m)), *settings)
        for what, x, y in zip(("loss", "chosen reward", "rejected reward"), ours, expected,
                              strict=True):
            close(x[i].item(), y.item(), f"{loss}, {what} of pair {i}", 1e-12)
    assert torch.autograd.gradcheck(
        lambda c, r: dpo.preference_loss(c, r, *refs, n, m, loss, *settings)[0], (c, r))


def test_orpo_stays_finite_for_answers_that_are_certain():
    """In fp32 a log-prob of −1e-9 is a probability of 1, whose odds are infinite."""
    c = torch.tensor([-1e-9, -1.0, -1e-9], requires_grad=True)
    r = torch.tensor([-1.0, -1e-9, -1e-9], requires_grad=True)
    one, zero = torch.ones(3), torch.zeros(3)
    losses = dpo.preference_loss(c, r, zero, zero, one, one, "orpo")[0]
    losses.sum().backward()
    assert losses.isfinite().all() and c.grad.isfinite().all() and r.grad.isfinite().all()
    assert (c.grad < 0).all() and c.grad[1] < -1, "a step must still raise chosen log-probs"


@pytest.mark.parametrize("loss", LOSSES)
def test_only_losses_with_a_reference_read_it_and_without_a_gradient(loss, monkeypatch):
    calls = []
    monkeypatch.setattr(common, "reference", lambda model: calls.append(
        torch.is_grad_enabled()) or nullcontext())
    pairs = [dpo.encode_pair(row, tokenizer(), 64) for row in ROWS[:2]]
    dpo.pair_losses(common.load_model("tiny/chat"), pairs, run_args(dpo, loss=loss), 0)
    assert calls == ([] if loss in REFERENCE_FREE else [False]), "reads of π_ref (with gradient?)"


# ---- the pairs -----------------------------------------------------------------------------------

def test_both_sides_of_a_truncated_pair_keep_the_same_prompt():
    """However much of it the longer answer leaves; the masks start where the answers do."""
    row = {"prompt": ask("Add 1 and 2. " * 6), "chosen": say("1 + 2 = 3 = 3"), "rejected": say("4")}
    prompt, *answers = tokens_of(row)
    longest = length(row)
    for room in range(8, longest + 2):
        pair = dpo.encode_pair(row, tokenizer(), room)
        kept = len(pair["prompt"])
        assert pair["prompt"] == prompt[:3] + prompt[3 - kept:], "not a head of 3 and an end"
        assert pair["truncated"] == (room < longest), room
        for side, answer in zip(("chosen", "rejected"), answers, strict=True):
            assert pair[side]["input_ids"] == (pair["prompt"] + answer)[:room], (room, side)
            assert pair[side]["loss_mask"].index(1) == kept, f"{side}: the mask starts elsewhere"


# ---- a run by hand -------------------------------------------------------------------------------

def tokens_of(row):
    answers = [by_hand.answer_ids(row[side][0]["content"]) for side in ("chosen", "rejected")]
    return by_hand.prompt_ids(row["prompt"]), *answers


def length(row):
    return len(tokens_of(row)[0]) + max(map(len, tokens_of(row)[1:]))


def figures_by_hand(model, reference, rows, args):
    """The mean loss over pairs, with its gradient, and every figure that is logged."""
    lines = []
    for prompt, chosen, rejected in map(tokens_of, rows):
        c, r = [by_hand.logps(model, prompt, answer).sum() for answer in (chosen, rejected)]
        refs = [by_hand.logps(reference, prompt, answer).sum() for answer in (chosen, rejected)]
        loss, chosen_reward, rejected_reward = equation(
            args.loss, c, r, *refs, len(chosen), len(rejected), args.beta, args.label_smoothing,
            args.gamma)
        margin = chosen_reward - rejected_reward
        lines.append({"loss": loss, "accuracy": (margin.sign() + 1) / 2, "margin": margin,
                      "chosen_reward": chosen_reward, "rejected_reward": rejected_reward,
                      "chosen_logp": c, "rejected_logp": r})
    means = {name: torch.stack([line[name] for line in lines]).mean() for name in lines[0]}
    return means["loss"], {name: value.item() for name, value in means.items()}


@pytest.mark.parametrize("flags", [
    {"label_smoothing": 0.2, "micro_batch_size": 3}, {"micro_batch_size": 100, "model": "adapter"},
    *({"loss": loss, "gamma": 0.4, "micro_batch_size": 3} for loss in LOSSES[1:])], ids=str)
def test_a_run_equals_the_same_steps_by_hand(flags, tmp_path):
    """Every figure and weight of three steps, the last a short one, and all held-out figures."""
    if "model" in flags:
        flags = flags | {"model": by_hand.save_adapter(tmp_path / "adapter")}
    run = by_hand.Run(dpo, tmp_path, ROWS, HELD_OUT, ["pair_losses", "sample_answers"],
                      {"sample_answers": lambda model, _, prompts, *rest: prompts},
                      beta=0.7, epochs=1, seed=5, **flags)
    hand = by_hand.Training(run)
    order = torch.randperm(len(ROWS), generator=torch.Generator().manual_seed(5)).split(4)
    for batch, numbers in zip(run.batches("pair_losses"), order, strict=True):
        rows = sorted([ROWS[i] for i in numbers], key=length)
        prompts = [tokens_of(row)[0] for row in rows]
        assert [pair["prompt"] for pair in batch] == prompts, "order: by seed, then by length"
        loss, figures = figures_by_hand(hand.model, hand.reference, rows, run.args)
        hand.log(figures | hand.update(loss))
    hand.check(run)
    for when, model in ("before", hand.reference), ("after", hand.model):
        _, figures = figures_by_hand(model, hand.reference, HELD_OUT, run.args)
        close(run.summary[when], figures, when)
    sampled, asked = run.calls["sample_answers"], [tokens_of(row)[0] for row in HELD_OUT[:3]]
    assert [call.args[2:] for call in sampled] == [(asked, 64, 5)] * 2, "samples: prompts or seed"


def test_the_first_loss_is_log_2(tmp_path, capsys):
    """At the start the policy equals its reference, in 4 bits as well."""
    run = by_hand.Run(dpo, tmp_path, ROWS, HELD_OUT, double=False, max_steps=2, epochs=3,
                      load_in_4bit="on", eval_every=1)
    assert all(update.is_training for update in run.updates), "evaluate() left eval mode on"
    for figures in run.metrics[0], run.summary["before"]:
        close(figures["loss"], math.log(2), "first loss", 1e-6)
        assert figures["margin"] == figures["chosen_reward"] == 0 and figures["accuracy"] == 0.5
    parts = capsys.readouterr().out.split("\033[32m")[1:3]
    green = [part.split("\033[0m")[0] for part in parts]
    assert green == ["0 + 7 = 7<|im_end|>", "No.<|im_end|>"], "the examples shown in green"
