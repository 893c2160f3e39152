"""The process reward model in the order of prm.py: rows, steps, loss, figures, training by hand.

tests/system/test_loop.py tests what all scripts share: the optimizer step, dtypes, processes.
test_reward_model.py tests the token at which a step is read, and tests/system/test_steps.py which
rows are refused, and `step_ends` with many tokenizers.
"""
import functools
import math
import random

import by_hand
import pytest
import torch
from by_hand import ask, close, same

import prm

PROCESS = functools.partial(prm.encode_solution, outcome=False)
ROW = {"prompt": ask("What is 1 + 2 + 3?"), "completions": ["1 + 2 = 3", "3 + 3 = 7"],
       "labels": [True, False]}


# ---- rows ----------------------------------------------------------------------------------------

def test_an_example_is_prompt_answer_ends_labels_and_masks():
    """The answer ends as a sampled one does. With --outcome, only the loss mask differs."""
    tokenizer = by_hand.tokenizer()
    example = PROCESS(ROW, tokenizer, 512)
    solution, start = example["solution"], len(example["prompt"])
    ids = solution["input_ids"]
    assert tokenizer.decode(ids[start:]) == "1 + 2 = 3\n3 + 3 = 7<|im_end|>"
    assert [tokenizer.decode(ids[:end + 1])[-3:] for end in solution["step_ends"]] == ["= 3", "= 7"]
    assert solution["labels"] == [1, 0] and solution["attention_mask"] == [1] * len(ids)
    assert solution["step_mask"] == solution["loss_mask"] == [1, 1]
    assert example["length"] == len(ids) and example["prompt"] == ids[:start]
    assert prm.encode_solution(ROW, tokenizer, 512, outcome=True) == example | {
        "solution": solution | {"loss_mask": [0, 1]}}


# ---- the loss ------------------------------------------------------------------------------------

def test_the_worked_example():
    """Each number of the docstring, computed by the script's functions."""
    logits = torch.tensor([[2.0, 1.0, -1.0]], requires_grad=True)
    labels, ones = torch.tensor([[1, 1, 0]]), torch.ones(1, 3, dtype=torch.long)
    losses = prm.step_losses(logits, labels, ones)
    losses.mean().backward()
    p = logits.detach().sigmoid()[0]
    by_hand.documented(
        prm, ("p = {:.3f},", p[0]), (" {:.3f},", p[1]), (" {:.3f};", p[2]),
        *(("{:.3f}", x) for x in [*losses[0], *logits.grad[0]]), ("/ 3 = {:.3f}", losses.mean()),
        ("min p = {:.3f}", p.min()), ("Π p = {:.3f}", p.prod()))
    counts = prm.count_steps(
        losses, logits, {"labels": labels, "step_mask": ones, "loss_mask": ones})
    assert counts["found"].all() and counts["min_correct"].all() and counts["product_correct"].all()


def test_the_loss_is_the_log_likelihood_of_the_labels():
    """It is −log p for a correct step and −log(1 − p) for a wrong one. Its gradient is p − l.

    It stays finite where p is 0 or 1 in floating point.
    """
    logits = torch.tensor([0.3, -2.0, 5.0, 0.0, 1e4, -1e4]).double().requires_grad_()
    labels, mask = torch.tensor([1, 0, 0, 1, 0, 1]), torch.tensor([1, 1, 1, 0, 1, 1])
    losses = prm.step_losses(logits, labels, mask)
    gradient, = torch.autograd.grad(losses.sum(), logits)
    x = logits.detach()
    # −log p = log(1 + exp(−r)) and −log(1 − p) = log(1 + exp(r))
    expected = torch.logaddexp(torch.where(labels == 1, -x, x), torch.zeros(6).double())
    same(losses.detach(), expected * mask, "losses: are the labels exchanged?")
    same(gradient, (x.sigmoid() - labels) * mask, "gradient: expected p − l where the mask is 1")


# ---- figures -------------------------------------------------------------------------------------

def figures_of(*batches):
    """The figures by prm.py, from batches of (logits, labels). Padded logits are arbitrary."""
    sums = {}
    for solutions in batches:
        width, logits, labels, mask = max(len(x) for _, x in solutions), [], [], []
        for row, of_row in solutions:
            padding = [0] * (width - len(row))
            logits.append([*row, *(x + (-3.0 if len(row) % 2 else 3.0) for x in padding)])
            labels.append([*of_row, *padding])
            mask.append([1] * len(row) + padding)
        batch = {"labels": torch.tensor(labels), "step_mask": torch.tensor(mask)}
        batch["loss_mask"] = batch["step_mask"]
        logits = torch.tensor(logits)
        losses = prm.step_losses(logits, batch["labels"], batch["loss_mask"])
        prm.add_up(sums, prm.count_steps(losses, logits, batch))
    return prm.step_figures(prm.over_processes(sums, prm.FIGURES, "cpu"))


def figures_by_hand(solutions):
    """Every figure from its definition, one solution at a time."""
    losses, agreed, places, verdicts = [], 0, [], {"min": 0, "product": 0, "last": 0}
    for row, labels in solutions:
        chances = [1 / (1 + math.exp(-logit)) for logit in row]
        for p, label in zip(chances, labels, strict=True):
            losses.append(-math.log(p if label else 1 - p))
            agreed += (p >= 0.5) == bool(label)
        judged = [k for k, p in enumerate(chances) if p < 0.5] + [None]
        labeled = [k for k, label in enumerate(labels) if not label] + [None]
        places.append((judged[0], labeled[0]))
        whole = {"min": min(chances), "product": math.prod(chances), "last": chances[-1]}
        for name, p in whole.items():
            verdicts[name] += (p >= 0.5) == all(labels)
    found = sum(judged is not None and judged == labeled for judged, labeled in places)
    flagged = sum(judged is not None for judged, _ in places)
    wrong = sum(labeled is not None for _, labeled in places)
    precision, recall = found / max(1, flagged), found / max(1, wrong)
    f1 = 2 * precision * recall / (precision + recall) if found else 0
    return {"loss": sum(losses) / len(losses), "step_accuracy": agreed / len(losses),
            "precision": precision, "recall": recall, "f1": f1} | {
        f"accuracy_{name}": n / len(solutions) for name, n in verdicts.items()}


def test_figures_are_those_of_their_definitions():
    """Random solutions have one to five steps, several of them wrong, in batches of any size.

    A mistake is found where the first step with p < 1/2 is the first that is labeled wrong.
    """
    draw = random.Random(0)
    for size in [1, 2, 3] * 20 + [200]:
        solutions = []
        for _ in range(size):
            labels = [int(draw.random() < 0.7) for _ in range(draw.randint(1, 5))]
            logits = [draw.choice([0.0, *[draw.gauss(2 * label - 0.6, 1)] * 9]) for label in labels]
            solutions.append((logits, labels))
        expected = figures_by_hand(solutions)
        close(figures_of(solutions), expected, f"{size} solutions", rel=1e-5)
        parts = [solutions[i:i + 3] for i in range(0, size, 3)]
        close(figures_of(*parts), expected, f"{size} solutions in batches of 3", rel=1e-5)
    assert 0.1 < expected["f1"] < 0.9 and expected["precision"] != expected["recall"]


# ---- a few steps of training by hand -------------------------------------------------------------

@pytest.mark.parametrize("outcome", [False, True])
def test_training_is_what_it_is_by_hand(outcome, tmp_path, capsys):
    """Checks each logged figure and each weight, with the loss of all steps or of the last."""
    rows = [{"prompt": ask(f"Add {i}"), "labels": [(i + k) % 3 > 0 for k in range(1 + i % 4)],
             "completions": [f"{i} + {k}" + " = 7" * (i % 3) for k in range(1 + i % 4)]}
            for i in range(13)]
    run = by_hand.Run(prm, tmp_path, rows[:9], rows[9:], watch=["solution_losses"], epochs=1,
                      micro_batch_size=3, **({"outcome": []} if outcome else {}))
    assert run.summary["outcome"] is outcome

    def compute(model, batch):
        solutions, losses = [], []
        for row in batch:
            logits = []
            for k in range(len(row["completions"])):  # step k ends a shorter solution
                text = by_hand.tokenizer()("\n".join(row["completions"][:k + 1])).input_ids
                ids = torch.tensor([by_hand.prompt_ids(row["prompt"]) + text])
                logits.append(model(input_ids=ids).logits[0, 0])
            chances = [1 / (1 + torch.exp(-logit)) for logit in logits]
            of_steps = [-torch.log(p if label else 1 - p)
                        for p, label in zip(chances, row["labels"], strict=True)]
            losses += of_steps[-1:] if outcome else of_steps
            solutions.append(([logit.item() for logit in logits], row["labels"]))
        loss = sum(losses) / len(losses)
        return loss, figures_by_hand(solutions) | {"loss": loss.item()}, solutions

    hand = by_hand.Training(run)
    close(run.summary["before"], compute(hand.model, rows[9:])[1], "held out, before")
    row_of = {tuple(PROCESS(row, by_hand.tokenizer(), 512)["prompt"]): row for row in rows}
    for batch in run.batches("solution_losses"):
        loss, figures, _ = compute(hand.model, [row_of[tuple(x["prompt"])] for x in batch])
        hand.log(figures | hand.update(loss))
    hand.check(run)
    _, figures, solutions = compute(hand.model, rows[9:])
    close(run.summary["after"], figures, "held out, after")

    shown = capsys.readouterr().out
    assert "0 + \033[32m0\033[0m" in shown, "the token at which a step is read is not green"
    for row, (logits, labels) in list(zip(rows[9:], solutions, strict=True))[:3]:
        for step, logit, label in zip(row["completions"], logits, labels, strict=True):
            verdict = "correct" if label else "wrong  "
            assert f"{1 / (1 + math.exp(-logit)):5.2f}  {verdict}  {step}" in shown
