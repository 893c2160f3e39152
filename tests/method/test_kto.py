"""KTO: the loss, the mask, the reference point z, and a run by hand, in the order of kto.py.

Labels and the plan of the steps are tested in tests/system/test_preference_rows.py.
"""
import copy
import statistics

import by_hand
import pytest
import torch
from by_hand import answer_ids, ask, close, prompt_ids, same, say, tokenizer
from conftest import run_args

import common
import kto


def row(prompt, answer, label):
    return {"prompt": ask(prompt), "completion": say(answer), "label": label}


# Prompts and answers differ in length, and some prompts repeat. Four answers are desirable.
ROWS = [row("Add 1 and 2.", "1 + 2 = 3", True), row("Add 1 and 2.", "No.", False),
        row("Add 1 and 2.", "1 + 2 = 12 = 3 = 4", False), row("Add 30 and 3.", "30 + 3 = 33", True),
        row("What is 9 - 4?", "9 - 4 = 5", True), row("What is 9 - 4?", "5 or 6", False),
        row("Sam has 40 figs and gets 2.", "42", True),
        row("Sam has 40 figs and gets 2.", "40 + 2 = 402", False), row("Add 7.", "7 + 7", False),
        row("What is 5 + 5?", "5 + 5 = 0", False), row("Add 8 and 80.", "8", False)]
HELD_OUT = [row("Add 6 and 1.", "6 + 1 = 7", True), row("Add 6 and 1.", "6 + 1 = 8 + 1", False),
            row("What is 8 - 8?", "8 - 8 = 1", False)]
PAIR = {"prompt": ask("Add 1 and 2."), "chosen": say("1 + 2 = 3"), "rejected": say("No.")}


def encoded(rows, max_length=64):
    return common.encode_rows("rows", rows, kto.encode_labeled, tokenizer(), max_length)


# ---- the loss ------------------------------------------------------------------------------------

RATIOS = torch.tensor([-4.0, -0.3, 0.0, 0.7, 2.5, 6.0], dtype=torch.float64)
LABELS = torch.tensor([True, False, True, False, True, False])


def test_the_worked_example_of_the_docstring():
    """Every number that the docstring gives for the log-ratio 3, z = 1 and β = 0.1."""
    ratios = torch.tensor([3.0, 3.0], requires_grad=True)
    losses = kto.kto_loss(ratios, torch.tensor([True, False]), 1.0, 0.1, 1.0, 1.0)
    slopes = torch.autograd.grad(losses.sum(), ratios)[0]
    by_hand.documented(
        kto, ("loss is 1 − 0.550 = {:.3f}", losses[0]), ("1 − σ(−0.2) = {:.3f}", losses[1]),
        ("= {:.4f} if y is desirable", slopes[0]), ("{:+.4f} if not", slopes[1]))


def loss_by_hand(ratio, label, z, beta, desirable_weight, undesirable_weight):
    """λ_D (1 − σ(β(ρ − z))) or λ_U (1 − σ(β(z − ρ))), where ρ is the log-ratio."""
    if label:
        return desirable_weight * (1 - 1 / (1 + torch.exp(-beta * (ratio - z))))
    return undesirable_weight * (1 - 1 / (1 + torch.exp(-beta * (z - ratio))))


def test_the_loss_is_its_equation_and_its_gradient_is_largest_at_z():
    """The gradient is −λ_D β σ(1 − σ) or +λ_U β σ(1 − σ), which vanishes far from z."""
    ratios = RATIOS.clone().requires_grad_()
    settings = 0.4, 0.7, 1.3, 0.6  # z, β, λ_D, λ_U
    losses = kto.kto_loss(ratios, LABELS, *settings)
    for i, label in enumerate(LABELS.tolist()):
        close(losses[i].item(), loss_by_hand(RATIOS[i], label, *settings), f"loss, label {label}")
    assert torch.autograd.gradcheck(lambda x: kto.kto_loss(x, LABELS, *settings), ratios)
    gradient, = torch.autograd.grad(losses.sum(), ratios)
    sigma = torch.sigmoid(0.7 * (RATIOS - 0.4))
    weights = torch.tensor([-1.3 if label else 0.6 for label in LABELS], dtype=torch.float64)
    expected = weights * 0.7 * sigma * (1 - sigma)
    same(gradient, expected, "gradient: is a λ, β or sign wrong?")
    far = torch.tensor([-30.0, 0.0, 30.0], requires_grad=True)
    kto.kto_loss(far, torch.ones(3).bool(), 0.0, 1.0, 1.0, 1.0).sum().backward()
    assert far.grad[1] == -0.25 and far.grad[[0, 2]].abs().max() < 1e-12, "σ is flat far from z"


# ---- rows ----------------------------------------------------------------------------------------

def text_of(example):
    trained = [token for ids, is_answer in example["answer"] for token in ids if is_answer]
    return tokenizer().decode(example["prompt"]), tokenizer().decode(trained), example["label"]


def test_a_pair_taken_apart_is_two_labeled_rows():
    """Its prompt is a column, the start of both sides, or both; or all are strings."""
    single = encoded(ROWS[:2])
    whole = {side: PAIR["prompt"] + PAIR[side] for side in ("chosen", "rejected")}
    for pair in PAIR, whole, PAIR | whole:
        assert encoded([pair]) == single
    header = "<|im_start|>user\nAdd 1 and 2.<|im_end|>\n<|im_start|>assistant\n"
    assert text_of(single[0]) == (header, "1 + 2 = 3<|im_end|>", True), "chosen: desirable"
    assert text_of(single[1]) == (header, "No.<|im_end|>", False), "rejected: undesirable"
    chosen, _ = encoded([{"prompt": "1 + 1", "chosen": " = 2", "rejected": " = 3"}])
    assert text_of(chosen) == ("1 + 1", " = 2" + tokenizer().eos_token, True)


# ---- the reference point -------------------------------------------------------------------------

def partners(prompts):
    """For each answer, the index of its prompt for z: the next one, cyclically, that differs."""
    circle = [[(i + step) % len(prompts) for step in range(1, len(prompts))]
              for i in range(len(prompts))]
    return [next(j for j in others if prompts[j] != prompts[i]) for i, others in enumerate(circle)]


def log_ratio(model, reference, prompt, answer):
    logp, ref_logp = (by_hand.logps(each, prompt, answer).sum() for each in (model, reference))
    return logp - ref_logp


def tokens_of(row):
    return prompt_ids(row["prompt"]), answer_ids(row["completion"][0]["content"]), row["label"]


def z_by_hand(model, reference, rows):
    """The mean log-ratio of mismatched answers, not yet clamped at 0."""
    prompts, answers, _ = zip(*map(tokens_of, rows), strict=True)
    with torch.no_grad():
        return sum(log_ratio(model, reference, prompts[j], answer).item()
                   for j, answer in zip(partners(prompts), answers, strict=True)) / len(rows)


@pytest.mark.parametrize("std, sign", [(0.02, 1), (-0.01, -1)])
def test_z_is_the_mean_over_mismatched_answers_but_not_below_0(std, sign):
    """By brute force, one answer at a time, for several micro-batch sizes."""
    torch.manual_seed(0)
    with by_hand.doubles():
        model = common.load_model("tiny/chat")
        reference = copy.deepcopy(model)
        by_hand.move(model, seed=3, std=std)
        mean = z_by_hand(model, reference, ROWS)
        for size in 1, 3, 4, 100:
            args = run_args(kto, micro_batch_size=size)
            z = kto.reference_point(model, encoded(ROWS), args, tokenizer())
            close(z, max(0.0, mean), f"z with micro-batches of {size}; the mean is {mean:.3f}")
        assert mean * sign > 0.03, f"this test needs a mean above 0 and one below, not {mean}"
        assert kto.reference_point(model, encoded(ROWS[:3]), args, tokenizer()) == 0, "one prompt"


def test_a_prompt_is_not_another_one_because_a_token_spans_its_end():
    """A token "12" can span prompt "1 + 1" and answer "2", so a prefix is the same prompt."""
    prompts = [[5, 6, 7], [5, 6], [5, 6, 7], [8, 9], [5, 6, 7, 8]]
    examples = [{"prompt": ids, "head": i, "answer": i} for i, ids in enumerate(prompts)]
    pairs = kto.mismatched(examples)
    assert [pair["prompt"] for pair in pairs] == [[8, 9], [8, 9], [8, 9], [5, 6, 7, 8], [8, 9]]
    assert [pair["head"] for pair in pairs] == [3, 3, 3, 4, 3], "head: that of the other prompt"
    assert [pair["answer"] for pair in pairs] == [0, 1, 2, 3, 4]


# ---- a run by hand -------------------------------------------------------------------------------

def figures_by_hand(model, reference, rows, args):
    """The mean loss over answers, with its gradient, and every figure that is logged."""
    z = max(0.0, z_by_hand(model, reference, rows))
    losses, of_label = [], {True: [], False: []}
    for prompt, answer, label in map(tokens_of, rows):
        ratio = log_ratio(model, reference, prompt, answer)
        losses.append(loss_by_hand(
            ratio, label, z, args.beta, args.desirable_weight, args.undesirable_weight))
        logp = by_hand.logps(model, prompt, answer).sum().item()
        of_label[label].append((args.beta * ratio.item(), logp))
    (chosen, chosen_logp), (rejected, rejected_logp) = (
        map(statistics.fmean, zip(*of_label[label], strict=True)) for label in (True, False))
    loss = torch.stack(losses).mean()
    return loss, {"loss": loss.item(), "z": z, "margin": chosen - rejected, "chosen_reward": chosen,
                  "rejected_reward": rejected, "chosen_logp": chosen_logp,
                  "rejected_logp": rejected_logp}


@pytest.mark.parametrize("flags", [
    {"micro_batch_size": 3}, {"micro_batch_size": 100, "model": "adapter", "learning_rate": 5e-3},
    ], ids=str)
def test_a_run_equals_the_same_steps_by_hand(flags, tmp_path):
    """Every figure and weight of three steps, and all held-out figures, with a z above 0."""
    if "model" in flags:
        flags = flags | {"model": by_hand.save_adapter(tmp_path / "adapter")}
    run = by_hand.Run(
        kto, tmp_path, ROWS, HELD_OUT, batch_size=5, beta=0.7, desirable_weight=1.7,
        undesirable_weight=1.2, **flags, replace={
            "sample_answers": lambda model, _, prompts, *rest: prompts})
    hand = by_hand.Training(run)
    for batch in kto.plan_batches([row["label"] for row in ROWS], run.args):
        rows = [ROWS[i] for i in batch]
        loss, figures = figures_by_hand(hand.model, hand.reference, rows, run.args)
        hand.log(figures | hand.update(loss))
    hand.check(run)
    for when, model in ("before", hand.reference), ("after", hand.model):
        _, figures = figures_by_hand(model, hand.reference, HELD_OUT, run.args)
        close(run.summary[when], figures, when)
    assert max(line["z"] for line in run.metrics) > 0.05, "this test needs a z above 0"


def test_a_run_starts_at_half_the_weights_and_at_z_0_and_reads_no_reference_gradient(
        tmp_path, monkeypatch):
    """At the start the policy equals its reference, in 4 bits as well."""
    modes, reference = [], common.reference
    monkeypatch.setattr(common, "reference", lambda model: modes.append(
        torch.is_grad_enabled()) or reference(model))
    run = by_hand.Run(kto, tmp_path, ROWS[3:8], HELD_OUT, desirable_weight=1.5, eval_every=1,
                      undesirable_weight=0.8, load_in_4bit="on", double=False)
    assert all(update.is_training for update in run.updates), "evaluate() left eval mode on"
    for figures, count, desirable in (run.metrics[0], 4, 2), (run.summary["before"], 3, 1):
        expected = (1.5 * desirable + 0.8 * (count - desirable)) / count / 2
        close(figures["loss"], expected, "first loss: (n_D λ_D + n_U λ_U) / 2n", 1e-6)
        assert figures["margin"] == figures["z"] == figures["chosen_reward"] == 0
    assert modes and not any(modes), "the reference is run with a gradient"
