"""KTO: its loss, its reference point, its rows and steps, and the loop, against numbers by hand."""
import copy
import json
import math
from collections import Counter
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
import transformers
from conftest import metrics_of, run_args
from safetensors.torch import load_file

import common
import dpo
import kto

pytestmark = pytest.mark.filterwarnings("ignore")

CLOCK = {"seconds", "tokens_per_second", "peak_memory_gib"}

def ask(text):
    return [{"role": "user", "content": text}]


def say(text):
    return [{"role": "assistant", "content": text}]


def row(prompt, answer, label):
    return {"prompt": ask(prompt), "completion": say(answer), "label": label}


# prompts and answers of different lengths, some prompts several times; four good answers, seven bad
ROWS = [row("Add 1 and 2.", "1 + 2 = 3", True), row("Add 1 and 2.", "No.", False),
        row("Add 1 and 2.", "1 + 2 = 12 = 3 = 4", False), row("What is 9 - 4?", "9 - 4 = 5", True),
        row("What is 9 - 4?", "5 or 6", False), row("Sam has 40 figs and gets 2.", "42", True),
        row("Sam has 40 figs and gets 2.", "40 + 2 = 402", False), row("Add 7.", "7 + 7", False),
        row("Add 30 and 3.", "30 + 3 = 33", True), row("What is 5 + 5?", "5 + 5 = 0", False),
        row("Add 8 and 80.", "8", False)]
HELD_OUT = [row("Add 6 and 1.", "6 + 1 = 7", True), row("Add 6 and 1.", "6 + 1 = 8 + 1", False),
            row("What is 8 - 8?", "8 - 8 = 1", False)]


@pytest.fixture(scope="module")
def tokenizer():
    return common.load_tokenizer("tiny/chat")


@pytest.fixture(scope="module")
def adapter(tmp_path_factory, tokenizer):
    """A saved adapter that is far from doing nothing."""
    torch.manual_seed(5)
    model = common.load_model("tiny/chat", lora_rank=4)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.02)
    folder = tmp_path_factory.mktemp("adapter")
    common.save_model(model, tokenizer, folder)
    return str(folder)


@pytest.fixture(scope="module")
def drifted(adapter):
    """A policy that has moved away from its reference: log-ratios are of every size and sign."""
    torch.manual_seed(6)
    model = common.load_model(adapter)
    for name, weight in model.named_parameters():
        if "lora_B.default" in name:
            weight.data += 0.04 * torch.randn_like(weight)
    return model


def encoded(rows, tokenizer, max_length=64):
    return common.encode_rows("rows", rows, kto.encode_labelled, tokenizer, max_length)


@pytest.fixture
def run(tmp_path, write_jsonl, monkeypatch):
    """Runs kto.py's train in this process on few rows; returns what it did and left behind."""
    def start(name="run", rows=ROWS, held_out=HELD_OUT, scoring=True, **flags):
        seen = SimpleNamespace(folder=tmp_path / name, batches=[])
        load, score = common.load_model, kto.score_step

        def load_and_keep(*args, **kwargs):
            seen.model = load(*args, **kwargs)
            seen.start = copy.deepcopy(seen.model).double()
            return seen.model

        def score_and_keep(model, examples, z, args, tokenizer, scaler=None):
            if scaler:
                seen.batches.append(examples)
            if scoring:
                return score(model, examples, z, args, tokenizer, scaler)
            return torch.zeros(3, len(examples), dtype=torch.float64)

        flags = {"batch_size": 5, "micro_batch_size": 3, "learning_rate": 2e-3, "eval_size": 9,
                 "dataset": write_jsonl(rows), "output_dir": seen.folder} | flags
        if held_out:
            flags["eval_dataset"] = write_jsonl(held_out, "held_out.jsonl")
        with monkeypatch.context() as patch:
            patch.setattr(common, "load_model", load_and_keep)
            patch.setattr(kto, "score_step", score_and_keep)
            patch.setattr(kto, "sample_answers", lambda model, _, prompts, *rest: prompts)
            seen.args = run_args(kto, **flags)
            kto.train(seen.args)
        seen.metrics = metrics_of(seen.folder)
        seen.summary = json.loads((seen.folder / "summary.json").read_text())
        seen.saved = load_file(seen.folder / "adapter_model.safetensors")
        return seen
    return start


# ---- the loss ------------------------------------------------------------------------------------

RATIOS = torch.tensor([-4.0, -0.3, 0.0, 0.7, 2.5, 6.0], dtype=torch.float64)
LABELS = torch.tensor([True, False, True, False, True, False])


def sigma(x):
    return 1 / (1 + math.exp(-x))


def test_the_loss_is_its_equation():
    """λ_D (1 − σ(β(ρ − z))) and λ_U (1 − σ(β(z − ρ))), also where z is not 0 and λ are not 1."""
    losses = kto.kto_loss(RATIOS, LABELS, 0.4, 0.7, 1.3, 0.6)
    for loss, ratio, label in zip(losses.tolist(), RATIOS.tolist(), LABELS.tolist(), strict=True):
        hand = (1.3 * (1 - sigma(0.7 * (ratio - 0.4))) if label
                else 0.6 * (1 - sigma(0.7 * (0.4 - ratio))))
        assert loss == pytest.approx(hand, rel=1e-12)


def test_the_gradient_has_its_closed_form():
    """−λ_D β σ(1 − σ) of a desirable answer, +λ_U β σ(1 − σ) of the other, σ at β(ρ − z)."""
    ratios = RATIOS.clone().requires_grad_()

    def loss(x):
        return kto.kto_loss(x, LABELS, 0.4, 0.7, 1.3, 0.6)

    assert torch.autograd.gradcheck(loss, ratios)
    loss(ratios).sum().backward()
    slope = 0.7 * torch.sigmoid(0.7 * (RATIOS - 0.4)) * (1 - torch.sigmoid(0.7 * (RATIOS - 0.4)))
    hand = torch.where(LABELS, -1.3 * slope, 0.6 * slope)
    assert torch.allclose(ratios.grad, hand, rtol=1e-10, atol=0)


def test_an_answer_that_is_far_on_the_wrong_side_is_let_go():
    """The pull is strongest at z, and fades on both sides; DPO's is strongest there."""
    ratios = torch.tensor([-30.0, 0.0, 30.0], requires_grad=True)
    kto.kto_loss(ratios, torch.ones(3).bool(), 0.0, 1.0, 1.0, 1.0).sum().backward()
    assert ratios.grad[1] == -0.25 and ratios.grad[[0, 2]].abs().max() < 1e-12
    logps = torch.tensor([-30.0, 0.0], requires_grad=True)
    dpo.preference_loss(logps, torch.zeros(2), None, beta=1.0)[0].backward()
    assert logps.grad[0] == pytest.approx(-1)


# ---- rows ----------------------------------------------------------------------------------------

def text_of(tokenizer, example):
    answer = [token for ids, is_answer in example["answer"] for token in ids if is_answer]
    return tokenizer.decode(example["prompt"]), tokenizer.decode(answer), example["label"]


def test_a_pair_taken_apart_is_two_labelled_rows(tokenizer):
    """The same examples, of messages with and without an explicit prompt, and of texts."""
    single = encoded(ROWS[:2], tokenizer)
    pair = {"prompt": ask("Add 1 and 2."), "chosen": say("1 + 2 = 3"), "rejected": say("No.")}
    whole = {side: pair["prompt"] + pair[side] for side in ("chosen", "rejected")}
    assert encoded([pair], tokenizer) == encoded([whole], tokenizer) == single
    header = "<|im_start|>user\nAdd 1 and 2.<|im_end|>\n<|im_start|>assistant\n"
    assert text_of(tokenizer, single[0]) == (header, "1 + 2 = 3<|im_end|>", True)
    assert text_of(tokenizer, single[1]) == (header, "No.<|im_end|>", False)
    texts = [{"prompt": "1 + 1", "completion": " = 2", "label": True},
             {"prompt": "1 + 1", "completion": " = 3", "label": False}]
    pair = {"prompt": "1 + 1", "chosen": " = 2", "rejected": " = 3"}
    single = encoded(texts, tokenizer)
    assert encoded([pair], tokenizer) == single
    assert text_of(tokenizer, single[0]) == ("1 + 1", " = 2" + tokenizer.eos_token, True)


@pytest.mark.parametrize("label", [0, 1, "0", "1", "true", "False", False])
def test_a_label_may_be_a_number_or_a_word(label, tokenizer):
    """As files of comma-separated values have them."""
    good, other = encoded([ROWS[0], ROWS[0] | {"label": label}], tokenizer)
    assert other == good | {"label": label in (1, "1", "true")}


@pytest.mark.parametrize("label", [None, 0.5, 2, -1, "yes", "", [True], {"a": True}])
def test_a_label_must_be_true_or_false(label, tokenizer, capsys):
    """Anything else makes the row unusable, and the report says why."""
    assert len(encoded([ROWS[0], ROWS[0] | {"label": label}], tokenizer)) == 1
    assert "first is row 2: no prompt, completion and label (true or f" in capsys.readouterr().out


@pytest.mark.parametrize("bad", [
    {"label": True}, {"prompt": "x", "label": True}, {"completion": "x", "label": True},
    {"prompt": "", "completion": "x", "label": True}, {"prompt": [], "completion": [], "label": 1},
    {"prompt": "x", "completion": "", "label": True}, {"prompt": "x", "completion": 5},
    {"prompt": ask("x"), "completion": "y", "label": 3},
    {"prompt": ask("x"), "completion": ask("y"), "label": False},
    {"prompt": ask("x"), "completion": say(""), "label": False},
    {"prompt": [], "completion": say("y"), "label": True},
    {"prompt": "x", "chosen": "y", "label": True}, {"prompt": "x", "rejected": "y"}])
def test_other_rows_that_cannot_be_used_are_dropped_and_counted(bad, tokenizer, capsys):
    assert len(encoded([ROWS[0], bad], tokenizer)) == 1
    out = capsys.readouterr().out
    assert "1 rows cannot be used, the first is row 2: " in out
    assert "has no attribute" not in out and "subscript" not in out


def test_every_turn_of_a_completion_is_trained_and_nothing_of_the_prompt(tokenizer):
    """Earlier turns of the assistant are prompt; what the user says in between is not learned."""
    prompt = ask("Add 1 and 2.") + say("3") + ask("And 4?")
    several = {"prompt": prompt, "completion": say("7") + ask("And 1?") + say("8"), "label": False}
    example, = encoded([several], tokenizer)
    assert text_of(tokenizer, example)[1:] == ("7<|im_end|>8<|im_end|>", False)
    assert tokenizer.decode(example["prompt"]).count("<|im_start|>assistant") == 2


def test_an_answer_behind_any_prompt_is_shortened_as_everything_is(tokenizer):
    """The prompt keeps its end, at least half the room; the answer its start; a mask is never 0."""
    examples = encoded([row("Add 1 and 2. " * 9, "1 + 2 = 3", True), ROWS[2]], tokenizer, 1000)
    for prompt, answer in (0, 0), (0, 1), (1, 0), (1, 1):
        example = examples[answer] | {"prompt": examples[prompt]["prompt"], "head": 3}
        ids = [token for part, _ in example["answer"] for token in part]
        length = len(example["prompt"]) + len(ids)
        for longest in range(8, length + 2):
            args = SimpleNamespace(max_length=longest)
            tokens = kto.tokens_of(example, args, tokenizer)
            asked = example["prompt"]
            room = max(longest // 2, 3 + longest // 4)
            kept = max(min(len(asked), room), len(asked) - max(0, length - longest))
            expected = (asked[:3] + asked[len(asked) - kept + 3:] + ids)[:longest]
            assert tokens["input_ids"] == expected
            answered = tokens["loss_mask"].index(1)
            assert answered == kept and len(tokens["loss_mask"]) == len(expected)
            assert tokens["attention_mask"] == [1] * len(expected)
    args = SimpleNamespace(max_length=10**6)  # beyond what the model can read
    long = examples[0] | {"prompt": examples[0]["prompt"] * 200}
    assert len(kto.tokens_of(long, args, tokenizer)["input_ids"]) == tokenizer.model_max_length


# ---- steps ---------------------------------------------------------------------------------------

@pytest.mark.parametrize("good, bad, size", [
    (1, 50, 32), (50, 1, 32), (3, 100, 16), (7, 7, 2), (1, 1, 8), (40, 60, 10), (5, 2, 100)])
def test_each_step_has_both_labels_in_their_share(good, bad, size):
    """As near as whole numbers allow, also at 1:50, and no step has an answer twice by chance."""
    labels = [True] * good + [False] * bad
    args = SimpleNamespace(batch_size=size, max_steps=40, epochs=7, seed=3, desirable_weight=1,
                           undesirable_weight=1)
    batches = kto.plan_batches(labels, args).tolist()
    size = min(size, good + bad)
    assert len(batches) == min(40, math.ceil(7 * (good + bad) / size))
    for batch in batches:
        assert len(batch) == size
        desirable = sum(labels[i] for i in batch)
        assert 1 <= desirable <= size - 1
        exact = size * good / (good + bad)
        assert abs(desirable - exact) <= 0.5 or desirable in (1, size - 1)


def test_each_label_has_an_order_of_its_own_that_follows_from_the_seed():
    """Every answer of a label comes as often as any other, give or take one; rounds differ."""
    labels = [i % 3 == 0 for i in range(30)]
    args = SimpleNamespace(batch_size=6, max_steps=500, epochs=4, desirable_weight=1,
                           undesirable_weight=1, seed=0)
    batches = kto.plan_batches(labels, args)
    assert torch.equal(batches, kto.plan_batches(labels, args))
    counts = Counter(batches.flatten().tolist())
    assert set(counts.values()) == {4} and len(counts) == 30
    good = [i for i in batches.flatten().tolist() if labels[i]]
    rounds = [good[i:i + 10] for i in range(0, 40, 10)]
    assert all(sorted(each) == sorted(rounds[0]) for each in rounds)
    assert len({tuple(each) for each in rounds}) == 4 and rounds[0] != sorted(rounds[0])
    args.seed = 1
    assert not torch.equal(batches, kto.plan_batches(labels, args))
    args.max_steps = 3
    assert len(kto.plan_batches(labels, args)) == 3


def test_a_line_says_where_one_label_outweighs_the_other_and_what_mends_it(capsys):
    """Outside 1 to 4/3, bounds included; with the weight that it names, it is silent."""
    def said(good, bad, desirable_weight=1.0, undesirable_weight=1.0):
        args = SimpleNamespace(batch_size=10**6, max_steps=1, epochs=1, seed=0,
                               desirable_weight=desirable_weight,
                               undesirable_weight=undesirable_weight)
        kto.plan_batches([True] * good + [False] * bad, args)
        return capsys.readouterr().out

    assert said(5, 5) == said(4, 3) == said(1, 3, 3.0) == said(3, 1, 1.0, 2.25) == ""
    for good, bad, weights in [(4, 5, ()), (41, 30, ()), (1, 50, ()), (50, 1, ()), (5, 5, (0.9,)),
                               (5, 5, (1.0, 1.1)), (5, 5, (1.4,)), (7, 90, (1.7, 0.3))]:
        line = said(good, bad, *weights)
        ratio = good / bad * (weights or (1,))[0] / (*weights, 1, 1)[1]
        assert f"n_D λ_D / (n_U λ_U) is {ratio:.3g} " in line, (good, bad, weights)
        mended = float(line.split("--desirable-weight ")[1])
        assert said(good, bad, mended, *weights[1:]) == ""


@pytest.mark.parametrize("label", [True, False])
@pytest.mark.parametrize("where", ["rows", "held_out"])
def test_data_of_one_label_only_are_refused_before_a_model_is_loaded(
        where, label, run, refused, monkeypatch):
    """To train on or held out."""
    monkeypatch.setattr(common, "load_model", lambda *args: pytest.fail("the model was loaded"))
    line = refused(run, **{where: [each for each in ROWS if each["label"] == label]})
    assert "same label" in line and ("train" if where == "rows" else "held out") in line


# ---- the reference point -------------------------------------------------------------------------

def answer_logp(model, prompt, answer):
    """log p(answer | prompt), from all logits of one sequence without padding."""
    ids = torch.tensor([prompt + answer])
    logps = model(input_ids=ids).logits[0, :-1].log_softmax(-1)
    return logps.gather(1, ids[0, 1:, None])[len(prompt) - 1:, 0].sum()


def log_ratio(model, reference, prompt, answer):
    with torch.no_grad():
        ref_logp = answer_logp(reference, prompt, answer)
    return answer_logp(model, prompt, answer) - ref_logp


def bare_reference(model):
    """The reference of an adapter, as a model of its own in float64."""
    model = copy.deepcopy(model)
    model.set_adapter("reference")
    return model.double()


def mismatched(prompts):
    """Which prompt each answer gets: that of the next example in a circle whose prompt differs."""
    count = len(prompts)
    chosen = []
    for i in range(count):
        others = [(i + step) % count for step in range(1, count)]
        chosen.append(next((j for j in others if prompts[j] != prompts[i]), None))
    return chosen


def answer_ids(example):
    return [token for ids, _ in example["answer"] for token in ids]


def test_z_is_the_mean_over_mismatched_pairs_for_any_micro_batch(drifted, tokenizer):
    """By brute force in float64, one pair at a time: never its own prompt; and z is at least 0."""
    examples = encoded(ROWS, tokenizer)
    policy, reference = copy.deepcopy(drifted).double(), bare_reference(drifted)
    partners = mismatched([example["prompt"] for example in examples])
    assert partners[:3] == [3, 3, 3]  # three answers to one prompt
    total = 0.0
    for example, partner in zip(examples, partners, strict=True):
        prompt = examples[partner]["prompt"]
        assert prompt != example["prompt"]
        total += log_ratio(policy, reference, prompt, answer_ids(example)).item()
    mean = total / len(examples)
    assert abs(mean) > 0.1
    for size in 1, 2, 3, 4, 11, 100:
        args = run_args(kto, micro_batch_size=size)
        z = kto.reference_point(drifted, examples, args, tokenizer).item()
        assert z == pytest.approx(max(0.0, mean), abs=1e-4), size
    with torch.no_grad():  # the mirror image of the policy: every log-ratio has the other sign
        swapped = copy.deepcopy(drifted)
        for name, weight in drifted.named_parameters():
            if ".default" in name:
                swapped.get_parameter(name.replace(".default", ".reference")).copy_(weight)
                other = drifted.get_parameter(name.replace(".default", ".reference"))
                swapped.get_parameter(name).copy_(other)
    z = kto.reference_point(swapped, examples, run_args(kto), tokenizer).item()
    assert z == pytest.approx(max(0.0, -mean), abs=1e-4)


def paired_with(examples, tokenizer, monkeypatch):
    """The examples that are scored for z: each answer, and the prompt that it was put behind."""
    pairs = []

    def keep(model, examples, *rest):
        pairs.extend(examples)
        return torch.ones(3, len(examples), dtype=torch.float64)

    monkeypatch.setattr(kto, "score_step", keep)
    z = kto.reference_point(None, examples, run_args(kto), tokenizer).item()
    return pairs, z


def test_a_prompt_is_not_another_one_because_a_token_spans_its_end(tokenizer, monkeypatch):
    """"1 + 1" and "1 + " before "12": one is the beginning of the other, so neither is used."""
    prompts = [[5, 6, 7], [5, 6], [5, 6, 7], [8, 9], [5, 6, 7, 8]]
    examples = [{"prompt": ids, "head": 0, "answer": [([10 + i], True)], "label": i < 2}
                for i, ids in enumerate(prompts)]
    pairs, z = paired_with(examples, tokenizer, monkeypatch)
    assert [pair["prompt"] for pair in pairs] == [[8, 9], [8, 9], [8, 9], [5, 6, 7, 8], [8, 9]]
    assert [pair["answer"] for pair in pairs] == [example["answer"] for example in examples]
    assert z == 1


def test_z_is_0_where_all_answers_have_the_same_prompt(drifted, tokenizer):
    """There is no mismatch, and no division by nothing."""
    examples = encoded(ROWS[:3], tokenizer)
    assert kto.reference_point(drifted, examples, run_args(kto), tokenizer).item() == 0


def last_of_processes(world, call):
    """call() in one process after the other; what the last has, which finds all others' sums."""
    sums = [0]

    def add(tensors):
        tensors[0] += sums[-1]
        sums.append(tensors[0].clone())

    with mock.patch.object(kto, "sum_over_processes", add), \
            mock.patch.object(common, "WORLD", world):
        for rank in range(world):
            with mock.patch.object(common, "RANK", rank):
                result = call()
    return result


@pytest.mark.parametrize("world", [2, 3])
def test_processes_share_a_step_and_have_its_z_and_gradient(world, drifted, tokenizer):
    """Scores, gradients and z are those of one process, though each reads other answers."""
    examples = encoded(ROWS[:4], tokenizer)
    args = run_args(kto, micro_batch_size=1, beta=0.7, desirable_weight=1.3)
    weights = [p for p in drifted.parameters() if p.requires_grad]

    def gradients():
        found = [weight.grad.clone() for weight in weights]
        drifted.zero_grad()
        return found

    def score():
        scaler = torch.amp.GradScaler("cpu", enabled=False)
        return kto.score_step(drifted, examples, 0.3, args, tokenizer, scaler)

    alone, expected = score(), gradients()
    assert torch.allclose(last_of_processes(world, score), alone, rtol=1e-5, atol=1e-6)
    for ours, hand in zip(gradients(), expected, strict=True):
        assert torch.allclose(ours, hand, rtol=1e-4, atol=1e-6)
    z = kto.reference_point(drifted, examples, args, tokenizer).item()
    shared = last_of_processes(
        world, lambda: kto.reference_point(drifted, examples, args, tokenizer)).item()
    assert z > 0.1 and shared == pytest.approx(z, abs=1e-5)


# ---- the loop, against a plain one in float64 ----------------------------------------------------

def hand_examples(tokenizer, rows):
    """What the template prints: prompt ids, answer ids with their end of turn, the label."""
    examples = []
    for each in rows:
        prompt = tokenizer.apply_chat_template(
            each["prompt"], add_generation_prompt=True, return_dict=False)
        answer = tokenizer(each["completion"][0]["content"] + "<|im_end|>").input_ids
        examples.append((prompt, answer, each["label"]))
    return examples


def figures_by_hand(model, reference, examples, args):
    """The loss as a tensor, and all that is logged, from sequences one by one."""
    partners = mismatched([prompt for prompt, _, _ in examples])
    with torch.no_grad():
        z = sum(log_ratio(model, reference, examples[partner][0], answer).item()
                for (_, answer, _), partner in zip(examples, partners, strict=True))
    z = max(0.0, z / len(examples))
    losses, logged = [], {True: [], False: []}
    for prompt, answer, label in examples:
        ratio = log_ratio(model, reference, prompt, answer)
        if label:
            losses.append(args.desirable_weight * (1 - torch.sigmoid(args.beta * (ratio - z))))
        else:
            losses.append(args.undesirable_weight * (1 - torch.sigmoid(args.beta * (z - ratio))))
        with torch.no_grad():
            logp = answer_logp(model, prompt, answer).item()
        logged[label].append((args.beta * ratio.item(), logp))
    loss = torch.stack(losses).mean()
    (chosen, chosen_logp), (rejected, rejected_logp) = (
        torch.tensor(logged[label]).mean(0).tolist() for label in (True, False))
    return loss, {"loss": loss.item(), "z": z, "margin": chosen - rejected, "chosen_reward": chosen,
                  "rejected_reward": rejected, "chosen_logp": chosen_logp,
                  "rejected_logp": rejected_logp}


def train_by_hand(seen, tokenizer):
    """The steps that the loop took, with Adam as in its paper: figures per step, and the model."""
    by_ids = {tuple(prompt + answer): (prompt, answer, label)
              for prompt, answer, label in hand_examples(tokenizer, ROWS)}
    model, reference = seen.start, copy.deepcopy(seen.start)
    weights = {name: p for name, p in model.named_parameters() if p.requires_grad}
    first = {name: torch.zeros_like(p) for name, p in weights.items()}
    second = {name: torch.zeros_like(p) for name, p in weights.items()}
    logged = []
    # three steps: the cosine of 0, 60 and 120 degrees
    for t, (batch, rate) in enumerate(zip(seen.batches, (1, 0.75, 0.25), strict=True), 1):
        batch = [by_ids[tuple(example["prompt"] + answer_ids(example))] for example in batch]
        assert sorted(label for _, _, label in batch) == [False] * 3 + [True] * 2
        loss, figures = figures_by_hand(model, reference, batch, seen.args)
        gradients = torch.autograd.grad(loss, weights.values())
        norm = torch.stack([g.square().sum() for g in gradients]).sum().sqrt()
        rate *= seen.args.learning_rate
        logged.append(figures | {"step": t, "grad_norm": norm.item(), "learning_rate": rate})
        for (name, p), g in zip(weights.items(), gradients, strict=True):
            g = g * min(1, 1 / norm)
            first[name] = 0.9 * first[name] + 0.1 * g
            second[name] = 0.999 * second[name] + 0.001 * g**2
            step = first[name] / (1 - 0.9**t) / ((second[name] / (1 - 0.999**t)).sqrt() + 1e-8)
            p.data -= rate * step
    return logged, model, reference


@pytest.mark.parametrize("flags", [
    {"micro_batch_size": 1}, {"micro_batch_size": 3, "model": "adapter", "learning_rate": 5e-3},
    {"micro_batch_size": 100, "undesirable_weight": 0.3}], ids=str)
def test_the_loop_does_what_a_plain_one_does_by_hand(flags, run, adapter, tokenizer):
    """Every figure of every step, gradient norms, the weights at the end, and what is held out.

    β and λ other than the default, unequal lengths, prompts that repeat, z that is not 0.
    """
    flags = {"beta": 0.7, "desirable_weight": 1.7, "undesirable_weight": 1.2} | flags
    if "model" in flags:
        flags["model"] = adapter
    seen = run(**flags)
    before = {name: p.clone() for name, p in seen.start.named_parameters()}
    logged, model, reference = train_by_hand(seen, tokenizer)
    for ours, hand in zip(seen.metrics, logged, strict=True):
        for name, value in hand.items():
            assert ours[name] == pytest.approx(value, rel=2e-4, abs=5e-5), (ours["step"], name)
    for name, p in seen.model.named_parameters():
        moved, wrong = model.get_parameter(name) - before[name], p - model.get_parameter(name)
        assert ("lora" in name and "default" in name) == bool(moved.abs().max() > 0), name
        # the median, because Adam's step for a gradient that is all but 0 has the sign of its noise
        assert wrong.abs().median() <= 1e-4 * moved.abs().median() + 1e-9, name
        assert wrong.abs().mean() <= 5e-3 * moved.abs().mean() + 1e-9, name
    held_out = hand_examples(tokenizer, HELD_OUT)
    for when, policy in ("before", reference), ("after", model):
        with torch.no_grad():
            _, hand = figures_by_hand(policy, reference, held_out, seen.args)
        assert seen.summary[when].keys() == hand.keys()
        for name, value in hand.items():
            ours = seen.summary[when][name]
            assert ours == pytest.approx(value, rel=1e-3, abs=2e-4), (when, name)
    assert max(x["z"] for x in logged) > 0.1 and max(x["grad_norm"] for x in logged) > 1


def test_training_starts_at_half_the_weights_and_at_z_0(run, adapter):
    """The policy is its own reference at first, though what it starts from is an adapter."""
    for name, model in ("base", "tiny/chat"), ("adapter", adapter):
        seen = run(name, model=model, max_steps=1, desirable_weight=1.5, undesirable_weight=0.8,
                   load_in_4bit="on" if name == "base" else "off")
        assert seen.metrics[0]["loss"] == pytest.approx((2 * 1.5 + 3 * 0.8) / 10, abs=1e-6)
        assert seen.summary["before"]["loss"] == pytest.approx((1.5 + 2 * 0.8) / 6, abs=1e-6)
        for figures in seen.metrics[0], seen.summary["before"]:
            assert figures["margin"] == figures["z"] == figures["chosen_reward"] == 0


def test_no_gradient_flows_through_z_or_the_reference(drifted, tokenizer, monkeypatch):
    """z is a number; the reference keeps nothing for a backward pass, and has no gradient."""
    examples = encoded(ROWS[:4], tokenizer)
    args, reference, modes = run_args(kto), common.reference, []

    def keep_mode(model):
        modes.append(torch.is_grad_enabled())
        return reference(model)

    monkeypatch.setattr(common, "reference", keep_mode)
    assert not kto.reference_point(drifted, examples, args, tokenizer).requires_grad
    kto.score_labelled(drifted, examples, 0.0, args, tokenizer)[0].sum().backward()
    for name, p in drifted.named_parameters():
        assert (p.grad is not None) == (".default." in name), name
    assert modes == [False, False]
    drifted.zero_grad()


def test_a_run_with_evaluations_trains_to_the_same_weights(run):
    """What it logs of the last step is what it reports; a model is left in the mode it had."""
    without, with_them = run("without"), run("with", eval_every=3)
    for name, weight in without.saved.items():
        assert torch.equal(weight, with_them.saved[name]), name
    for a, b in zip(without.metrics, with_them.metrics, strict=True):
        assert all(a[name] == b[name] for name in a.keys() - CLOCK)
        assert ("eval_loss" in b) == (b["step"] == 3)
    for name, value in with_them.summary["after"].items():
        assert with_them.metrics[-1][f"eval_{name}"] == value
    assert with_them.model.training


def test_a_run_with_a_loss_scale_agrees_with_one_without(run, monkeypatch):
    """Scaling by a power of two is exact: all figures, norms before clipping, and weights."""
    plain = run("plain", beta=0.7, max_steps=2)
    monkeypatch.setattr(
        common, "grad_scaler", lambda model: torch.amp.GradScaler("cpu", init_scale=2.0**13))
    scaled = run("scaled", beta=0.7, max_steps=2)
    for a, b in zip(scaled.metrics, plain.metrics, strict=True):
        for name in b.keys() - {*CLOCK, "loss_scale"}:
            assert a[name] == pytest.approx(b[name], rel=1e-6, abs=1e-9), name
        assert a["loss_scale"] == 2.0**13 and b["loss_scale"] == 1
    for name, weight in scaled.saved.items():
        assert torch.allclose(weight, plain.saved[name], rtol=1e-5, atol=1e-8), name


def test_runs_in_16_bits_agree_with_one_in_fp32(run, monkeypatch):
    """Base and forward passes in 16 bits; the loss starts at 1/2, and z at 0, to the last bit."""
    full, scaler = run("fp32", beta=0.1, max_steps=2), torch.amp.GradScaler
    monkeypatch.setattr(torch.amp, "GradScaler", lambda *args, **kwargs: scaler(
        *args, **kwargs, init_scale=2.0**8))  # at its default, it first has to skip some steps
    for dtype in torch.float16, torch.bfloat16:
        with monkeypatch.context() as patch:
            patch.setattr(common, "choose_dtype", lambda device, dtype=dtype: dtype)
            patch.setattr(common, "autocast", lambda _, dtype=dtype: torch.autocast("cpu", dtype))
            half = run(str(dtype), beta=0.1, max_steps=2)
        assert half.metrics[0]["loss"] == 0.5 and half.metrics[0]["z"] == 0
        for a, b in zip(full.metrics, half.metrics, strict=True):
            for name in "loss", "chosen_logp", "rejected_logp", "grad_norm":
                assert a[name] == pytest.approx(b[name], rel=0.05), (a["step"], name)
        assert {weight.dtype for weight in half.saved.values()} == {torch.float32}


def test_the_run_shows_an_answer_of_either_label_in_green(run, capsys):
    """With its end of turn, and nothing of the prompt."""
    run(rows=ROWS[3:5], max_steps=1)
    green = [part.split("\033[0m")[0] for part in capsys.readouterr().out.split("\033[32m")[1:]]
    assert green == ["9 - 4 = 5<|im_end|>", "5 or 6<|im_end|>"]


# ---- real data -----------------------------------------------------------------------------------

def rows_of(shared, name, count):
    with open(shared / f"data/{name}.jsonl") as file:
        return [json.loads(line) for line in list(file)[:count]]


def test_real_conversations_become_labelled_answers(shared):
    """With Qwen2.5's tokenizer, what is trained is the completion and the token that ends it."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(
        shared / "tokenizers/Qwen2.5-0.5B-Instruct")
    rows = rows_of(shared, "unpaired_kto_mix_conversational", 40)
    for each, example in zip(rows, encoded(rows, tokenizer, 10**6), strict=True):
        prompt, answer, label = text_of(tokenizer, example)
        assert answer == each["completion"][0]["content"] + "<|im_end|>"
        assert label is each["label"] and prompt.endswith("<|im_start|>assistant\n")
        assert each["prompt"][-1]["content"] in prompt


def test_real_strings_train_a_real_model(shared, run):
    """Labelled solutions on a small Llama: the loss starts at 1/2, the step holds both labels."""
    rows = rows_of(shared, "unpaired_gsm8k_solutions_string", 40)
    seen = run(model=shared / "models/stories260K", rows=rows, held_out=[], max_steps=1,
               max_length=128)
    assert seen.metrics[0]["loss"] == pytest.approx(0.5, abs=1e-5)
    assert {example["label"] for example in seen.batches[0]} == {True, False}
