"""distill.py: the divergences, the policy gradient that estimates one of them, the two models."""
import copy
import itertools
import math
from types import SimpleNamespace
from unittest import mock

import by_hand
import pytest
import record_trl
import torch
from conftest import run_args
from test_trl import TRL

import common
import distill

DIVERGENCES = {"reverse": 0.5, "forward": 0.5, "jsd": 0.3}
each_divergence = pytest.mark.parametrize("name", DIVERGENCES)


def logits(seed, *shape):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def gradient(loss, leaf):
    return torch.autograd.grad(loss, leaf, retain_graph=True)[0]


# ---- the divergences -----------------------------------------------------------------------------

def test_the_worked_example_of_the_docstring():
    student = torch.tensor([[0.5, 0.5]], dtype=torch.float64).log()
    teacher = torch.tensor([[0.9, 0.1]], dtype=torch.float64).log()
    reverse, forward, jsd = (distill.divergences(student, teacher, x, 0.5) for x in DIVERGENCES)
    first, second = (teacher - student)[0]
    by_hand.documented(
        distill, ("reverse KL is {:.3f}", reverse), ("forward KL is {:.3f}", forward),
        ("JSD with β = 0.5 is {:.3f}", jsd), ("A = log 0.9 − log 0.5 = {:.3f}", first),
        ("if the second is, A is {:.3f}", second), ("their mean is {:.3f}", (first + second) / 2))
    by_hand.close((first + second) / 2, -reverse, "the mean advantage is minus the reverse KL")


@each_divergence
def test_each_divergence_is_its_equation_as_a_sum_of_plain_numbers(name):
    """A model has no divergence from itself."""
    beta = DIVERGENCES[name]
    student, teacher = logits(0, 1, 6).log_softmax(-1), logits(1, 1, 6).log_softmax(-1)
    expected = 0.0
    for a, b in zip(student.exp()[0].tolist(), teacher.exp()[0].tolist(), strict=True):
        middle = beta * b + (1 - beta) * a
        expected += {"reverse": a * math.log(a / b), "forward": b * math.log(b / a),
                     "jsd": beta * b * math.log(b / middle)
                     + (1 - beta) * a * math.log(a / middle)}[name]
    found = distill.divergences(student, teacher, name, beta)
    by_hand.close(found, expected, f"{name}: are student and teacher exchanged?")
    by_hand.close(distill.divergences(student, student, name, beta), 0, name, absolute=1e-12)


@each_divergence
def test_the_gradient_of_each_divergence(name):
    """It is 0 where the student is the teacher."""
    def loss(student, teacher):
        return distill.divergences(student.log_softmax(-1), teacher.log_softmax(-1), name,
                                   DIVERGENCES[name])
    student = logits(0, 3, 5).requires_grad_()
    assert torch.autograd.gradcheck(loss, (student, logits(1, 3, 5)))
    assert gradient(loss(student, student.detach()).sum(), student).abs().max() < 1e-12


@pytest.mark.parametrize("beta, name", [(1e-6, "forward"), (1 - 1e-6, "reverse")])
def test_the_limits_of_the_jensen_shannon_divergence_are_the_two_kls(beta, name):
    student, teacher = logits(0, 4, 5).log_softmax(-1), logits(1, 4, 5).log_softmax(-1)
    found = distill.divergences(student, teacher, "jsd", beta) / 1e-6
    by_hand.same(found, distill.divergences(student, teacher, name, beta), "JSD / 1e-6", 1e-4)


@pytest.mark.parametrize("name", record_trl.DIVERGENCES)
def test_the_divergences_are_those_of_trl(name):
    student, teacher = record_trl.student_and_teacher()
    losses = distill.divergences((student / 0.7).log_softmax(-1), (teacher / 0.7).log_softmax(-1),
                                 name.split()[0], record_trl.DIVERGENCES[name])
    ours = record_trl.loss_and_norm(losses.sum(), student)
    by_hand.close(ours, TRL["distillation"][name], name, 1e-4)


def test_the_sampled_estimator_has_the_expected_gradient_of_the_reverse_kl():
    """By enumeration of all tokens, each weighted by the student's probability of it."""
    student, teacher = logits(0, 1, 5).requires_grad_(), logits(1, 1, 5).log_softmax(-1)
    student_logps = student.log_softmax(-1)
    full = gradient(distill.divergences(student_logps, teacher, "reverse", 0.5).sum(), student)
    expected = torch.zeros_like(full)
    for token in range(5):
        loss = distill.sampled_losses(student_logps[:, token], teacher[:, token]).sum()
        expected += student_logps[0, token].exp().item() * gradient(loss, student)
    by_hand.same(expected, full, "gradient: the sign of A? is A a constant?")


def test_the_kl_of_whole_sequences_has_another_gradient():
    """Two steps over three tokens; the second distribution depends on the first token.

    The gradient of the sequence KL also credits the first token with the divergence that it leads
    to. The loss of distill.py leaves that out: it is the expectation of the KL at each prefix, with
    the prefixes held fixed.
    """
    first, second = logits(0, 3).requires_grad_(), logits(1, 3, 3).requires_grad_()
    teacher_first, teacher_second = logits(2, 3).log_softmax(-1), logits(3, 3, 3).log_softmax(-1)
    p1, p2 = first.log_softmax(-1), second.log_softmax(-1)
    sequence_kl = torch.zeros((), dtype=torch.float64)
    for a, b in itertools.product(range(3), range(3)):
        logp = p1[a] + p2[a, b]
        sequence_kl = sequence_kl + logp.exp() * (logp - teacher_first[a] - teacher_second[a, b])
    at_first = distill.divergences(p1[None], teacher_first[None], "reverse", 0.5)[0]
    at_second = distill.divergences(p2, teacher_second, "reverse", 0.5)  # [3], after each token
    ours = at_first + (p1.exp().detach() * at_second).sum()
    by_hand.close(ours.item(), sequence_kl.item(), "the chain rule of the KL")
    by_hand.same(gradient(ours, second), gradient(sequence_kl, second), "gradient, second token")
    assert (gradient(ours, first) - gradient(sequence_kl, first)).abs().max() > 0.01


# ---- a teacher of its own ------------------------------------------------------------------------

@pytest.fixture(scope="module")
def pair():
    """tiny/chat as a student with LoRA matrices that are not 0, and as a teacher the bare model."""
    torch.manual_seed(0)
    student = common.load_model("tiny/chat", "off", 4, "off")
    by_hand.move(student, std=0.1)
    teacher = common.load_model("tiny/chat", "off", gradient_checkpointing="off", trainable=False)
    ids = by_hand.tokenizer().encode
    batch = distill.join_answers([ids("What is 12 + 9?"), ids("Add 3")],
                                 [ids("12 + 9 = 21"), ids("7")], by_hand.tokenizer(), student)
    return SimpleNamespace(student=student, teacher=teacher, batch=batch)


def all_logps(model, batch, temperature):
    """log π [B, T-1, V] at every position, with all logits at once."""
    output = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    return (output.logits[:, :-1].double() / temperature).log_softmax(-1)


@each_divergence
def test_losses_are_those_of_both_models_at_the_answers_tokens(pair, name, monkeypatch):
    """Also for a few positions at a time, and with more padding. Only the student learns."""
    args = run_args(distill, divergence=name, beta=DIVERGENCES[name], temperature=0.8)
    is_answer = pair.batch["loss_mask"][:, 1:].bool()
    expected = distill.divergences(all_logps(pair.student, pair.batch, 0.8),
                                   all_logps(pair.teacher, pair.batch, 0.8), name, args.beta)
    wide = {key: torch.nn.functional.pad(x, (0, 3)) if x.dim() == 2 else x
            for key, x in pair.batch.items()}
    monkeypatch.setattr(distill, "checkpoint", counted := mock.Mock(wraps=distill.checkpoint))
    monkeypatch.setattr(distill, "LOGITS_PER_CHUNK", 3 * pair.student.config.vocab_size)
    losses, figures = distill.distillation_losses(pair.student, pair.teacher, wide, args)
    assert counted.call_count == math.ceil(is_answer.sum().item() / 3), "chunks of 3 positions"
    by_hand.same(losses.double(), expected[is_answer], f"{name} of each token", 1e-4)
    by_hand.same(figures["divergence"], losses.detach(), "the logged divergence")
    losses.sum().backward()
    assert all(p.grad is None for p in pair.teacher.parameters()), "the teacher is trained, too"


def test_a_teacher_with_another_vocabulary_is_refused(pair, shared, refused):
    args = run_args(distill, teacher=shared / "models/stories260K")
    line = refused(distill.load_teacher, args, pair.student, by_hand.tokenizer())
    assert "its vocabulary is not the student's" in line and "the first is" in line


@pytest.mark.parametrize("flags", [{"divergence": "jsd"}, {"on_policy": 0.5}])
def test_the_sampled_estimator_needs_the_students_own_tokens_and_the_reverse_kl(flags, refused):
    line = refused(distill.train, run_args(distill, estimator="sampled", **flags))
    assert "--divergence reverse and --on-policy 1" in line


# ---- one run by hand, whose teacher is an adapter on the student's base --------------------------

ROWS = [{"prompt": by_hand.ask(f"What is {a} + {b}?"), "answer": str(a + b),
         "completion": f"{a} + {b} = {a + b}"} for a, b in [(1, 2), (30, 4), (5, 60), (7, 8)]]


def figures_by_hand(hand, teacher, pairs, args):
    """The loss of a step, and its figures, of (prompt, answer)s read one at a time."""
    tokens = sum(len(answer) for _, answer in pairs)
    loss, figures = 0.0, dict.fromkeys(
        "divergence agreement student_entropy teacher_entropy kl length".split(), 0.0)
    for prompt, answer in pairs:
        outputs = [model(input_ids=torch.tensor([prompt + answer])).logits[0, len(prompt) - 1:-1]
                   for model in (hand.model, teacher, hand.reference)]
        student, theirs, start = [(x / args.temperature).log_softmax(-1) for x in outputs]  # [N, V]
        theirs, spoken = theirs.detach(), (range(len(answer)), answer)
        reverse = (student.exp() * (student - theirs)).sum()
        sampled = -((theirs - student)[spoken].detach() * student[spoken]).sum()
        loss = loss + {"full": reverse, "sampled": sampled}[args.estimator] / tokens
        same = student.argmax(-1) == theirs.argmax(-1)
        for name, value in (
                ("divergence", reverse), ("agreement", same.sum()),
                ("student_entropy", -(student.exp() * student).sum()),
                ("teacher_entropy", -(theirs.exp() * theirs).sum())):
            figures[name] += value.item() / tokens
        figures["kl"] += (student[spoken] - start[spoken]).sum().item() / len(pairs)
        figures["length"] += len(answer) / len(pairs)
    return loss, figures


@pytest.mark.parametrize("flags", [{}, {"estimator": "sampled"}, {"on_policy": 0}], ids=str)
def test_two_steps_by_hand(flags, tmp_path):
    """Each token counts the same, whichever answer it is in."""
    student = by_hand.save_adapter(tmp_path / "student", seed=1)
    teacher = by_hand.save_adapter(tmp_path / "teacher", seed=2, std=0.05)
    run = by_hand.Run(
        distill, tmp_path, ROWS, ROWS[:2], watch=["join_answers"], model=student, teacher=teacher,
        replace={"sample": by_hand.fixed_sample}, max_steps=2, temperature=0.8, **flags)
    hand = by_hand.Training(run)
    teacher = copy.deepcopy(hand.reference)
    teacher.set_adapter("teacher")
    completions = [by_hand.answer_ids(row["completion"]) for row in ROWS]
    for call in run.calls["join_answers"]:
        pairs = list(zip(*call.args[:2], strict=True))
        own = flags.get("on_policy") != 0 or not call.is_training
        assert all(answer == by_hand.answer_to(prompt) if own else answer in completions
                   for prompt, answer in pairs), "the student's own answers, or those of the rows"
        if call.is_training:
            loss, figures = figures_by_hand(hand, teacher, pairs, run.args)
            hand.log(figures | hand.update(loss))
    hand.check(run)
    by_hand.close(run.summary["after"], figures_by_hand(hand, teacher, pairs, run.args)[1], "after")
    for name, weight in run.start[0].named_parameters():
        is_same = torch.equal(weight, run.model.get_parameter(name))
        assert is_same or ".default." in name, f"{name} is trained, too"


def test_answers_of_rows_are_read_where_they_are_needed_and_cut():
    def encode(row, limit=24, needed=True):
        return distill.encode_example(row, by_hand.tokenizer(), 512, limit, needs_answer=needed)
    row, ids = ROWS[1], by_hand.answer_ids("30 + 4 = 34")
    assert "answer" not in encode(row, needed=False)
    assert encode(row)["answer"] == ids and encode(row, limit=5)["answer"] == ids[:5]
    assert encode(row)["prompt"] == by_hand.prompt_ids(row["prompt"])
    turns = by_hand.say("34") + by_hand.ask("And 1 + 1?") + by_hand.say("2")
    for changed, words in ((row | {"completion": turns}, "several turns"),
                           ({"prompt": row["prompt"]}, "no answer")):
        with pytest.raises(ValueError, match=words):
            encode(changed)


def test_rewards_are_logged_where_the_row_has_a_number(pair):
    examples = [{"prompt": [1], "row": row} for row in ({"answer": "7"}, {"answer": "seven"}, {})]
    answers = [by_hand.tokenizer().encode("It is 7")] * 3
    batch = distill.make_batch(pair.student, examples, answers, by_hand.tokenizer())
    assert batch["rewards"][0] == 1 and batch["rewards"][1:].isnan().all()
