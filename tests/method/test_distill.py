"""distill.py: the divergences, the policy gradient that estimates one of them, the two models."""
import copy
import itertools
import math
from types import SimpleNamespace

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
    found = [distill.divergences(student, teacher, name, 0.5).item() for name in DIVERGENCES]
    assert [f"{value:.3f}" for value in found] == ["0.511", "0.368", "0.102"]
    advantages = [f"{value:.3f}" for value in (teacher - student)[0].tolist()]
    assert advantages == ["0.588", "-1.609"]
    text = distill.__doc__.replace("−", "-").replace("\n", " ")
    assert "Reverse KL 0.511, forward KL 0.368, JSD with β = 0.5 0.102" in text
    assert "0.588, a second one -1.609; their mean is -0.511" in text


@each_divergence
def test_each_divergence_is_its_equation_as_a_sum_of_plain_numbers(name):
    beta = DIVERGENCES[name]
    student = logits(0, 1, 6).log_softmax(-1)
    teacher = logits(1, 1, 6).log_softmax(-1)
    p = student.exp()[0].tolist()
    q = teacher.exp()[0].tolist()
    expected = 0.0
    for a, b in zip(p, q, strict=True):
        middle = beta * b + (1 - beta) * a
        expected += {"reverse": a * math.log(a / b), "forward": b * math.log(b / a),
                     "jsd": beta * b * math.log(b / middle)
                     + (1 - beta) * a * math.log(a / middle)}[name]
    found = distill.divergences(student, teacher, name, beta).item()
    assert found == pytest.approx(expected), f"{name}: are student and teacher exchanged?"


@each_divergence
def test_the_gradient_of_each_divergence(name):
    teacher = logits(1, 3, 5).log_softmax(-1)

    def loss(student):
        return distill.divergences(student.log_softmax(-1), teacher, name, DIVERGENCES[name])

    assert torch.autograd.gradcheck(loss, logits(0, 3, 5).requires_grad_())


@each_divergence
def test_a_student_that_is_the_teacher_has_no_loss_and_no_gradient(name):
    student = logits(0, 3, 5).requires_grad_()
    losses = distill.divergences(student.log_softmax(-1), student.detach().log_softmax(-1), name,
                                 DIVERGENCES[name])
    assert losses.abs().max() < 1e-12, "the divergence of a model from itself is 0"
    assert gradient(losses.sum(), student).abs().max() < 1e-12


@pytest.mark.parametrize("beta, name", [(1e-6, "forward"), (1 - 1e-6, "reverse")])
def test_the_limits_of_the_jensen_shannon_divergence_are_the_two_kls(beta, name):
    student = logits(0, 4, 5).log_softmax(-1)
    teacher = logits(1, 4, 5).log_softmax(-1)
    found = distill.divergences(student, teacher, "jsd", beta) / 1e-6
    expected = distill.divergences(student, teacher, name, beta)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", record_trl.DIVERGENCES)
def test_the_divergences_are_those_of_trl(name):
    theirs = TRL["distillation"][name]
    student, teacher = record_trl.student_and_teacher()
    losses = distill.divergences((student / 0.7).log_softmax(-1), (teacher / 0.7).log_softmax(-1),
                                 name.split()[0], record_trl.DIVERGENCES[name])
    ours = record_trl.loss_and_norm(losses.sum(), student)
    assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
    assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-4)


# ---- the sampled estimator -----------------------------------------------------------------------

def test_the_sampled_estimator_has_the_expected_gradient_of_the_reverse_kl():
    """By enumeration of all tokens, each weighted by the student's probability of it."""
    student = logits(0, 1, 5).requires_grad_()
    teacher = logits(1, 1, 5).log_softmax(-1)
    student_logps = student.log_softmax(-1)
    full = gradient(distill.divergences(student_logps, teacher, "reverse", 0.5).sum(), student)
    expected = torch.zeros_like(full)
    for token in range(5):
        loss = distill.sampled_losses(student_logps[:, token], teacher[:, token]).sum()
        expected += student_logps[0, token].exp().item() * gradient(loss, student)
    torch.testing.assert_close(expected, full, msg="is the sign of the advantage flipped?")


def test_the_kl_of_whole_sequences_has_another_gradient():
    """Two steps over three tokens; the second distribution depends on the first token.

    The gradient of the sequence KL also credits the first token with the divergence that it leads
    to. The loss of distill.py leaves that out: it is the expectation of the KL at each prefix, with
    the prefixes held fixed.
    """
    first = logits(0, 3).requires_grad_()
    second = logits(1, 3, 3).requires_grad_()
    teacher_first = logits(2, 3).log_softmax(-1)
    teacher_second = logits(3, 3, 3).log_softmax(-1)
    p1 = first.log_softmax(-1)
    p2 = second.log_softmax(-1)
    sequence_kl = torch.zeros((), dtype=torch.float64)
    for a, b in itertools.product(range(3), range(3)):
        logp = p1[a] + p2[a, b]
        sequence_kl = sequence_kl + logp.exp() * (logp - teacher_first[a] - teacher_second[a, b])
    at_first = distill.divergences(p1[None], teacher_first[None], "reverse", 0.5)[0]
    at_second = distill.divergences(p2, teacher_second, "reverse", 0.5)  # [3], after each token
    ours = at_first + (p1.exp().detach() * at_second).sum()
    torch.testing.assert_close(ours, sequence_kl)  # the same value by the chain rule
    torch.testing.assert_close(gradient(ours, second), gradient(sequence_kl, second))
    assert (gradient(ours, first) - gradient(sequence_kl, first)).abs().max() > 0.01


def test_the_advantage_is_a_constant():
    student = torch.tensor([-1.0, -2.0], requires_grad=True)
    loss = distill.sampled_losses(student, torch.tensor([-0.5, -3.0]))
    assert gradient(loss.sum(), student).tolist() == pytest.approx([-0.5, 1.0])


# ---- two models ----------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def pair():
    """tiny/chat as a student with LoRA matrices that are not 0, and as a teacher the bare model."""
    torch.manual_seed(0)
    student = common.load_model("tiny/chat", "off", 4, "off")
    for name, weight in student.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.1)
    teacher = common.load_model("tiny/chat", "off", gradient_checkpointing="off", trainable=False)
    tokenizer = common.load_tokenizer("tiny/chat")
    prompts = [tokenizer.encode("What is 12 + 9?"), tokenizer.encode("Add 3")]
    answers = [tokenizer.encode("12 + 9 = 21"), tokenizer.encode("7")]
    batch = distill.join_answers(prompts, answers, tokenizer, student)
    return SimpleNamespace(student=student, teacher=teacher, tokenizer=tokenizer, batch=batch)


def settings(**changes):
    return run_args(distill, **changes)


def naive(model, batch, temperature):
    """log π [B, T-1, V] at every position, with all logits at once."""
    output = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    return (output.logits[:, :-1].double() / temperature).log_softmax(-1)


@each_divergence
def test_losses_are_those_of_both_models_at_the_answers_tokens(pair, name, monkeypatch):
    """Also where the distributions are computed for a few positions at a time."""
    args = settings(divergence=name, beta=DIVERGENCES[name], temperature=0.8)
    is_answer = pair.batch["loss_mask"][:, 1:].bool()
    expected = distill.divergences(naive(pair.student, pair.batch, 0.8),
                                   naive(pair.teacher, pair.batch, 0.8), name, args.beta)
    monkeypatch.setattr(distill, "checkpoint", count_calls := CountCalls(distill.checkpoint))
    monkeypatch.setattr(distill, "LOGITS_PER_CHUNK", 3 * pair.student.config.vocab_size)
    losses, figures = distill.distillation_losses(pair.student, pair.teacher, pair.batch, args)
    assert count_calls.calls == math.ceil(is_answer.sum().item() / 3)
    torch.testing.assert_close(losses.double(), expected[is_answer], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(figures["divergence"], losses.detach())


class CountCalls:
    """A function that counts its calls."""

    def __init__(self, function):
        self.function = function
        self.calls = 0

    def __call__(self, *args, **kwargs):
        self.calls += 1
        return self.function(*args, **kwargs)


def test_the_figures_of_each_token(pair):
    args = settings()
    _, figures = distill.distillation_losses(pair.student, pair.teacher, pair.batch, args)
    is_answer = pair.batch["loss_mask"][:, 1:].bool()
    student = naive(pair.student, pair.batch, 1.0)[is_answer]
    teacher = naive(pair.teacher, pair.batch, 1.0)[is_answer]
    targets = pair.batch["input_ids"][:, 1:][is_answer]
    expected = {"student_entropy": -(student.exp() * student).sum(-1),
                "teacher_entropy": -(teacher.exp() * teacher).sum(-1),
                "agreement": (student.argmax(-1) == teacher.argmax(-1)).double(),
                "logp": student.gather(1, targets[:, None])[:, 0]}
    for name, values in expected.items():
        torch.testing.assert_close(figures[name].double(), values, rtol=1e-4, atol=1e-5, msg=name)


def test_only_the_student_learns_and_padding_does_not_matter(pair):
    args = settings()
    losses, _ = distill.distillation_losses(pair.student, pair.teacher, pair.batch, args)
    losses.sum().backward()
    assert all(p.grad is None for p in pair.teacher.parameters()), "the teacher is trained, too"
    assert any(p.grad is not None and p.grad.any() for p in pair.student.parameters())
    pair.student.zero_grad()
    wide = {name: torch.nn.functional.pad(x, (0, 3)) if x.dim() == 2 else x
            for name, x in pair.batch.items()}
    padded, _ = distill.distillation_losses(pair.student, pair.teacher, wide, args)
    torch.testing.assert_close(padded, losses)


def test_a_teacher_on_the_students_base_is_one_more_role(pair, tmp_path):
    """It reads as the adapter that was loaded, and the student's own adapter is active after it."""
    common.save_model(pair.student, pair.tokenizer, tmp_path)
    torch.manual_seed(1)
    student = common.load_model("tiny/chat", "off", 4, "off")
    args = settings(teacher=tmp_path)
    teacher = distill.load_teacher(args, student, pair.tokenizer)
    assert teacher is student
    losses, _ = distill.distillation_losses(student, teacher, pair.batch, args)
    is_answer = pair.batch["loss_mask"][:, 1:].bool()
    expected = distill.divergences(naive(pair.teacher, pair.batch, 1.0),  # B is 0: the bare model
                                   naive(pair.student, pair.batch, 1.0), "reverse", 0.5)
    torch.testing.assert_close(losses.double(), expected[is_answer], rtol=1e-4, atol=1e-5)
    losses.sum().backward()
    grown = [name for name, p in student.named_parameters() if p.grad is not None and p.grad.any()]
    assert grown and all(".default." in name for name in grown), "another role is trained, too"


def test_a_teacher_with_another_vocabulary_is_refused(pair, shared, refused):
    args = settings(teacher=shared / "models/stories260K")
    line = refused(distill.load_teacher, args, pair.student, pair.tokenizer)
    assert "its vocabulary is not the student's" in line and "the first is" in line


@pytest.mark.parametrize("flags", [{"divergence": "jsd"}, {"on_policy": 0.5}])
def test_the_sampled_estimator_needs_the_students_own_tokens_and_the_reverse_kl(flags, refused):
    line = refused(distill.train, settings(estimator="sampled", **flags))
    assert "--divergence reverse and --on-policy 1" in line


# ---- one run by hand -----------------------------------------------------------------------------

ROWS = [{"prompt": by_hand.ask(f"What is {a} + {b}?"), "answer": str(a + b),
         "completion": f"{a} + {b} = {a + b}"} for a, b in [(1, 2), (30, 4), (5, 60), (7, 8)]]


def distributions(model, prompt, answer, temperature):
    """log π [N, V] at each token of an answer."""
    logits = model(input_ids=torch.tensor([prompt + answer])).logits[0, len(prompt) - 1:-1]
    return (logits / temperature).log_softmax(-1)


def figures_by_hand(hand, teacher, pairs, args):
    """The loss of a step, and its figures, of (prompt, answer)s read one at a time."""
    tokens = sum(len(answer) for _, answer in pairs)
    figures = dict.fromkeys(("divergence", "agreement", "teacher_entropy", "kl", "length"), 0.0)
    loss = 0.0
    for prompt, answer in pairs:
        student = distributions(hand.model, prompt, answer, args.temperature)
        theirs = distributions(teacher, prompt, answer, args.temperature).detach()
        start = distributions(hand.reference, prompt, answer, args.temperature)
        spoken = range(len(answer)), answer
        reverse = (student.exp() * (student - theirs)).sum()
        if args.estimator == "sampled":
            advantages = (theirs[spoken] - student[spoken]).detach()
            loss = loss - (advantages * student[spoken]).sum() / tokens
        else:
            loss = loss + reverse / tokens
        figures["divergence"] += reverse.item() / tokens
        same = student.argmax(-1) == theirs.argmax(-1)
        figures["agreement"] += same.sum().item() / tokens
        figures["teacher_entropy"] -= (theirs.exp() * theirs).sum().item() / tokens
        figures["kl"] += (student[spoken] - start[spoken]).sum().item() / len(pairs)
        figures["length"] += len(answer) / len(pairs)
    return loss, figures


@pytest.mark.parametrize("flags", [
    {}, {"estimator": "sampled"}, {"on_policy": 0},
    {"micro_batch_size": 1, "sample_batch_size": 3, "gradient_checkpointing": "on"}], ids=str)
def test_two_steps_by_hand(flags, tmp_path):
    """Each token counts the same, whichever answer, micro-batch or chunk it is in."""
    student = by_hand.save_adapter(tmp_path / "student", seed=1)
    teacher = by_hand.save_adapter(tmp_path / "teacher", seed=2, std=0.05)
    run = by_hand.Run(
        distill, tmp_path, ROWS, ROWS[:2], watch=["join_answers"], model=student, teacher=teacher,
        replace={"sample": by_hand.fixed_sample}, max_steps=2, temperature=0.8, **flags)
    hand = by_hand.Training(run)
    teacher = copy.deepcopy(hand.reference)
    teacher.set_adapter("teacher")
    steps = [call.args[:2] for call in run.calls["join_answers"] if call.is_training]
    for prompts, answers in steps:
        pairs = list(zip(prompts, answers, strict=True))
        if flags.get("on_policy") == 0:
            texts = [by_hand.tokenizer().decode(answer) for answer in answers]
            assert set(texts) <= {row["completion"] + "<|im_end|>" for row in ROWS}
        else:
            assert answers == [by_hand.answer_to(prompt) for prompt in prompts]
        loss, figures = figures_by_hand(hand, teacher, pairs, run.args)
        hand.log(figures | hand.update(loss))
    assert len(steps) == 2
    hand.check(run)
    prompts = [by_hand.prompt_ids(row["prompt"]) for row in ROWS[:2]]
    pairs = [(prompt, by_hand.answer_to(prompt)) for prompt in prompts]
    _, figures = figures_by_hand(hand, teacher, pairs, run.args)
    by_hand.close(run.summary["after"], figures, "held out")


# ---- rows ----------------------------------------------------------------------------------------

def test_answers_of_rows_are_read_where_they_are_needed_and_cut():
    tokenizer = by_hand.tokenizer()
    row = ROWS[1]
    make = distill.encode_example
    assert "answer" not in make(row, tokenizer, 512, 24, needs_answer=False)
    example = make(row, tokenizer, 512, 24, needs_answer=True)
    assert tokenizer.decode(example["answer"]) == "30 + 4 = 34<|im_end|>"
    assert example["prompt"] == by_hand.prompt_ids(row["prompt"])
    assert make(row, tokenizer, 512, 5, needs_answer=True)["answer"] == example["answer"][:5]
    turns = by_hand.say("34") + by_hand.ask("And 1 + 1?") + by_hand.say("2")
    with pytest.raises(ValueError, match="several turns"):
        make(row | {"completion": turns}, tokenizer, 512, 24, needs_answer=True)
    with pytest.raises(ValueError, match="no answer"):
        make({"prompt": row["prompt"]}, tokenizer, 512, 24, needs_answer=True)


def test_rewards_are_logged_where_the_row_has_a_number(pair):
    rows = [{"answer": "7"}, {"answer": "seven"}, {}]
    examples = [{"prompt": [1], "row": row} for row in rows]
    answers = [pair.tokenizer.encode("It is 7")] * 3
    rewards = distill.make_batch(pair.student, examples, answers, pair.tokenizer)["rewards"]
    assert rewards[0] == 1 and rewards[1:].isnan().all()


def test_the_distributions_are_in_fp32(pair):
    """Logits that differ by less than bf16 can tell give different log-probs."""
    head = SimpleNamespace(get_output_embeddings=lambda: lambda hidden: hidden,
                           config=pair.student.config)
    hidden = torch.tensor([[100.0, 100.1, 90.0]])
    losses, _ = distill.chunk_losses(
        hidden, hidden + torch.tensor([[0.1, 0.0, 0.0]]), torch.tensor([0]), head, head, settings())
    expected = distill.divergences(
        hidden.double().log_softmax(-1),
        (hidden + torch.tensor([[0.1, 0.0, 0.0]])).double().log_softmax(-1), "reverse", 0.5)
    torch.testing.assert_close(losses.double(), expected, rtol=1e-2, atol=0)
