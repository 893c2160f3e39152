"""The process reward model in the order of prm.py: rows, steps, loss, figures, training by hand.

tests/system/test_loop.py tests what all scripts share: the optimizer step, dtypes, processes.
tests/system/test_steps.py tests which rows are refused, and `step_ends` with many tokenizers.
"""
import functools
import math
import random
from types import SimpleNamespace

import by_hand
import pytest
import torch
from by_hand import ask, close

import common
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


def test_tools_reach_the_template():
    tokenizer = common.load_tokenizer("tiny/chat")
    tokenizer.chat_template = "{{ tools | tojson if tools }}" + tokenizer.chat_template
    example = PROCESS(ROW | {"tools": [{"name": "add"}]}, tokenizer, 512)
    assert tokenizer.decode(example["prompt"]).startswith('[{"name": "add"}]')


# ---- the token at which a step is read -----------------------------------------------------------

@pytest.mark.parametrize("pad", [0, 7, 40])
def test_padding_changes_no_logit(pad):
    """Rows have padded tokens and padded steps. Each logit depends only on the tokens up to it."""
    model = common.load_model("tiny/chat", lora_rank=1, task="SEQ_CLS").eval()
    head = common.causal_lm(model).score
    rows = ([3, 9, 12, pad], [1, 3]), ([pad, 3, pad, pad, 8, 1], [0, 2, 3]), ([5], [0])
    examples = [{"input_ids": ids, "attention_mask": [1] * len(ids), "step_ends": ends}
                for ids, ends in rows]
    logits = prm.step_logits(model, prm.collate(examples, pad, "cpu"), head)  # [B, S]
    assert logits.shape == (3, 3)
    for ours, (ids, ends) in zip(logits, rows, strict=True):
        for k, end in enumerate(ends):
            alone = by_hand.hidden_states(model, ids[:end + 1])[-1] @ head.weight[0]
            close(ours[k], alone, f"logit of step {k}", rel=1e-4, absolute=1e-5)


@pytest.mark.parametrize("outcome", [False, True])
def test_only_the_last_tokens_of_trained_steps_get_a_gradient(outcome):
    """Their gradient is (p − l) times the head's weight. --outcome trains only the last steps."""
    torch.manual_seed(0)
    hidden, head = torch.randn(3, 6, 4, requires_grad=True), torch.nn.Linear(4, 1, bias=False)
    model = SimpleNamespace(base_model=lambda **_: (hidden,), score=head, device=hidden.device)
    ends, examples, expected = [[1, 2, 4], [5], [0, 3]], [], torch.zeros(3, 6, 4)
    for row, places in enumerate(ends):
        labels = [(row + k) % 2 for k in range(len(places))]
        mask = [int(place == places[-1] or not outcome) for place in places]
        examples.append({"solution": {
            "input_ids": [1] * 6, "attention_mask": [1] * 6, "step_ends": places,
            "labels": labels, "step_mask": [1] * len(places), "loss_mask": mask}})
        for place, label, trained in zip(places, labels, mask, strict=True):
            p = torch.sigmoid(hidden[row, place] @ head.weight[0])
            expected[row, place] = trained * (p - label) * head.weight[0]
    losses, _ = prm.solution_losses(model, examples, 0)
    losses.sum().backward()
    assert torch.allclose(hidden.grad, expected, atol=1e-6)
    assert torch.equal(hidden.grad != 0, expected != 0), "a wrong token is trained"


# ---- the loss ------------------------------------------------------------------------------------

def test_the_worked_example():
    """Each number of the docstring, computed by the script's functions."""
    logits = torch.tensor([[2.0, 1.0, -1.0]], requires_grad=True)
    labels, ones = torch.tensor([[1, 1, 0]]), torch.ones(1, 3, dtype=torch.long)
    losses = prm.step_losses(logits, labels, ones)
    losses.mean().backward()
    p = logits.detach().sigmoid()[0]
    for values in p, losses[0], [losses.mean()], logits.grad[0], [p.min()], [p.prod()]:
        for value in values:
            text = f"{value.item():.3f}".replace("-", "−")
            assert text in prm.__doc__, f"the docstring does not contain {text}"
    counts = prm.count_steps(losses, logits, {"labels": labels, "step_mask": ones,
                                              "loss_mask": ones})
    assert counts["found"].all() and counts["min_correct"].all() and counts["product_correct"].all()


def test_the_loss_is_the_log_likelihood_of_the_labels():
    """It is −log p for a correct step and −log(1 − p) for a wrong one. Its gradient is p − l."""
    logits = torch.tensor([0.3, -2.0, 5.0, 0.0], dtype=torch.float64, requires_grad=True)
    labels, mask = torch.tensor([1, 0, 0, 1]), torch.tensor([1, 1, 1, 0])
    losses = prm.step_losses(logits, labels, mask)
    p = 1 / (1 + torch.exp(-logits.detach()))
    expected = -torch.stack([p[0], 1 - p[1], 1 - p[2], p[3]]).log() * mask
    assert torch.allclose(losses, expected, atol=1e-12), "are the labels exchanged?"
    losses.sum().backward()
    assert torch.allclose(logits.grad, (p - labels) * mask, atol=1e-12)
    assert torch.autograd.gradcheck(lambda r: prm.step_losses(r, labels, mask), (logits,))


def test_the_loss_stays_finite_far_away():
    logits = torch.tensor([1e4, -1e4], requires_grad=True)
    losses = prm.step_losses(logits, torch.tensor([0, 1]), torch.ones(2))
    losses.sum().backward()
    assert losses.tolist() == pytest.approx([1e4, 1e4]) and logits.grad.tolist() == [1, -1]


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
    """Random solutions have one to five steps, several of them wrong, in batches of any size."""
    draw = random.Random(0)
    for size in [1, 2, 3] * 20 + [200]:
        solutions = []
        for _ in range(size):
            labels = [int(draw.random() < 0.7) for _ in range(draw.randint(1, 5))]
            solutions.append(([draw.gauss(2 * label - 0.6, 1) for label in labels], labels))
        expected = figures_by_hand(solutions)
        close(figures_of(solutions), expected, f"{size} solutions", rel=1e-5)
        parts = [solutions[i:i + 3] for i in range(0, size, 3)]
        close(figures_of(*parts), expected, f"{size} solutions in batches of 3", rel=1e-5)
    assert 0.1 < expected["f1"] < 0.9 and expected["precision"] != expected["recall"]


def test_only_the_first_wrong_step_counts_as_found():
    """The mistake is found, flagged too early, too late or not at all, or there is none."""
    good, bad = 2.0, -2.0
    found, early, late = ([good, bad, bad], [1, 0, 0]), ([bad, bad], [1, 0]), ([good, bad], [0, 0])
    missed, flagged = ([good, good], [1, 0]), ([good, bad], [1, 1])
    for solutions, precision, recall, f1 in [
            ([found, early, late, missed, flagged], 1 / 4, 1 / 4, 1 / 4),
            ([found, missed], 1, 1 / 2, 2 / 3), ([found, flagged], 1 / 2, 1, 2 / 3),
            ([([good, good], [1, 1])], 0, 0, 0)]:
        expected = {"precision": precision, "recall": recall, "f1": f1}
        close(figures_of(solutions), expected, f"{len(solutions)} solutions")


def test_many_small_doubts_make_a_solution_wrong_by_the_product_alone():
    """0.9^7 = 0.478 is below 1/2. A step with p = 1/2 still counts as correct."""
    short, long = ([math.log(9)] * 6, [1] * 6), ([math.log(9)] * 7, [1] * 7)
    figures = figures_of([short, long, ([-math.log(9)], [0])])
    close(figures, {"accuracy_product": 2 / 3, "accuracy_min": 1}, "two correct solutions")
    figures = figures_of([([0.0], [1]), ([-1e-6], [0])])
    assert {value for name, value in figures.items() if "accuracy" in name} == {1}


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
