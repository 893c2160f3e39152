"""Online DPO, XPO and Nash-MD: losses, sampler and loop, against enumeration and plain numbers."""
import functools
import itertools
import json
import math
import random
import statistics
from argparse import Namespace
from collections import Counter

import pytest
import torch
from conftest import metrics_of, run_args
from grpo_by_hand import HELD_OUT, LONGEST, RATE, ROWS, TEMPERATURE, plain_logps
from safetensors.torch import load_file
from test_sampling import CONFIGS, PROMPTS, make_model, make_tokenizer, next_logps, with_adapter

import common
import online_dpo

LOSSES = ["dpo", "ipo", "xpo", "nash_md"]
MIXTURES = {"dpo": 0.0, "ipo": 0.0, "xpo": 1.0, "nash_md": 0.125}
BETA, ALPHA, PENALTY = 0.3, 0.07, 2.5


def sums(seed, count=8):
    """Log-probs of answers, from -20 to 0, in float64."""
    generator = torch.Generator().manual_seed(seed)
    return -20 * torch.rand(count, generator=generator, dtype=torch.float64)


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


# ---- losses --------------------------------------------------------------------------------------

def plain_loss(loss, a, b, ref_a, ref_b, win, beta=BETA, alpha=ALPHA):
    """The loss of one pair: a is log π(y|x), b log π(y'|x), win is P(y ≻ y')."""
    if loss == "nash_md":
        return -(win - 0.5 - beta * (a - ref_a)) * a
    if win == 0.5:
        return 0.0
    h = (a - ref_a) - (b - ref_b)  # of y over y'
    h = h if win > 0.5 else -h
    if loss == "ipo":
        return (h - 1 / (2 * beta)) ** 2
    return -math.log(sigmoid(beta * h)) + (alpha * b if loss == "xpo" else 0)


WINS = torch.tensor([0.9, 0.2, 0.5, 1.0, 0.1, 0.8, 0.5, 0.0], dtype=torch.float64)


@pytest.mark.parametrize("loss", LOSSES)
def test_each_loss_is_its_equation_written_out(loss):
    logps, ref_logps = sums(0), sums(1)
    ours = online_dpo.online_loss(logps, ref_logps, WINS, loss, BETA, ALPHA)
    pairs = torch.stack([*logps.chunk(2), *ref_logps.chunk(2), WINS[:4]], 1).tolist()
    expected = [plain_loss(loss, *pair) for pair in pairs]
    assert ours.tolist() == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("loss", ["dpo", "ipo", "xpo"])
def test_each_loss_passes_gradcheck(loss):
    """In π and π_ref, also where there is no pair."""
    def of(logps, ref_logps):
        return online_dpo.online_loss(logps, ref_logps, WINS, loss, BETA, ALPHA)

    assert torch.autograd.gradcheck(of, (sums(0).requires_grad_(), sums(1).requires_grad_()))


def test_the_gradient_of_nash_md_is_its_bracket_on_y_alone():
    """−(P − ½ − β log-ratio) for each log π(y|x); 0 for y' and through the bracket."""
    logps, ref_logps = sums(0).requires_grad_(), sums(1).requires_grad_()
    online_dpo.online_loss(logps, ref_logps, WINS, "nash_md", BETA, 0.0).sum().backward()
    bracket = WINS[:4] - 0.5 - BETA * (logps - ref_logps)[:4]
    torch.testing.assert_close(logps.grad, torch.cat([-bracket, torch.zeros(4)]).detach())
    assert ref_logps.grad is None or not ref_logps.grad.any()


@pytest.mark.parametrize("sharp", [False, True])
@pytest.mark.parametrize("m", [0.0, 0.3, 1.0])
def test_nash_md_climbs_preference_less_kl_by_enumeration(m, sharp):
    """Expected over all y ~ π and y' ~ mixture: the gradient of E[P − ½] − β KL(π ‖ π_ref)."""
    generator = torch.Generator().manual_seed(3)
    logits, ref_logits, scores = torch.randn(3, 6, generator=generator, dtype=torch.float64)
    scores[4] = scores[1]  # equal scores are no pair, but do count here
    logits.requires_grad_()
    logps, ref_logps = logits.log_softmax(0), ref_logits.log_softmax(0)
    mixture = ((1 - m) * logps + m * ref_logps).softmax(0).detach()
    lead = scores[:, None] - scores
    wins = 0.5 + 0.5 * lead.sign() if sharp else lead.sigmoid()
    loss = 0
    for y, other in itertools.product(range(6), repeat=2):
        pair = torch.tensor([y, other])
        each = online_dpo.online_loss(
            logps[pair], ref_logps[pair], torch.stack([wins[y, other], wins[other, y]]), "nash_md",
            BETA, 0.0)
        loss = loss + (logps[y].exp().detach() * mixture[other] * each).sum()
    ours, = torch.autograd.grad(loss, logits, retain_graph=True)
    kl = (logps.exp() * (logps - ref_logps)).sum()
    value = (logps.exp()[:, None] * mixture * (wins - 0.5)).sum() - BETA * kl
    expected, = torch.autograd.grad(-value, logits)
    torch.testing.assert_close(ours, expected, atol=1e-12, rtol=1e-9)
    assert expected.norm() > 0.05


def test_xpo_without_optimism_is_dpo_and_with_it_unlearns_the_references_answer():
    """Its gradient differs by α on log π(y'), whether y' is the better or the worse one."""
    logps, ref_logps = sums(0).requires_grad_(), sums(1)
    grads = []
    for loss, alpha in ("dpo", ALPHA), ("xpo", 0.0), ("xpo", ALPHA):
        losses = online_dpo.online_loss(logps, ref_logps, WINS, loss, BETA, alpha)
        grads.append(torch.autograd.grad(losses.sum(), logps)[0])
    assert torch.equal(grads[0], grads[1])
    pairs = torch.tensor([0, 0, 0, 0, 1, 1, 0, 1])  # the third has equal scores
    torch.testing.assert_close(grads[2] - grads[0], (ALPHA * pairs).double())


@pytest.mark.parametrize("loss", ["dpo", "ipo", "xpo"])
def test_who_stands_first_changes_nothing_but_xpos_optimism(loss):
    """With equal scores there is neither loss nor gradient."""
    logps, ref_logps = sums(0).requires_grad_(), sums(1)
    losses = online_dpo.online_loss(logps, ref_logps, WINS, loss, BETA, 0.0)
    swapped = online_dpo.online_loss(
        logps.roll(4), ref_logps.roll(4), WINS.roll(4) * 0 + (1 - WINS[:4]).repeat(2), loss, BETA,
        0.0)
    torch.testing.assert_close(losses, swapped)
    tied = online_dpo.online_loss(logps, ref_logps, WINS * 0 + 0.5, loss, BETA, ALPHA)
    assert not tied.any() and not torch.autograd.grad(tied.sum(), logps)[0].any()


# ---- the sampler ---------------------------------------------------------------------------------

def draw(model, prompts=PROMPTS, m=0.0, longest=6, temperature=1.0, seed=0, tokenizer=None):
    args = Namespace(max_new_tokens=longest, temperature=temperature)
    return online_dpo.sample_mixture(model, tokenizer or make_tokenizer(), prompts, m, args, seed)


@torch.no_grad()
def mixed_logps(model, rows, m, temperature):
    """log of π^(1−m) π_ref^m / Z after rows of one length, in float64, without a cache."""
    model.eval()
    policy = next_logps(model, rows, temperature)
    with model.disable_adapter():
        reference = next_logps(model, rows, temperature)
    return ((1 - m) * policy + m * reference).log_softmax(-1)


@pytest.fixture
def moved(tmp_path):
    """A random model with an adapter that matters."""
    make_model().save_pretrained(tmp_path)
    return with_adapter(tmp_path)


@pytest.mark.parametrize("shape", ["qwen2", "mistral", "gemma3", "gpt2"])
@pytest.mark.parametrize("m", [0.0, 0.3, 1.0])
def test_every_token_is_drawn_from_exactly_the_mixture(shape, m, monkeypatch, tmp_path):
    """At 0 it is π, at 1 π_ref: whatever the padding, after others left the batch, at T = 1.5."""
    assert shape in CONFIGS
    make_model(shape).save_pretrained(tmp_path)
    model, given = with_adapter(tmp_path), []

    def spy(probs, number, generator):
        given.append(probs.double())
        return multinomial(probs, number, generator=generator)

    multinomial = torch.multinomial
    monkeypatch.setattr(torch, "multinomial", spy)
    prompts = PROMPTS * 3
    answers = draw(model, prompts, m, 9, 1.5)
    assert len({len(answer) for answer in answers}) > 2 and max(map(len, answers)) == 9
    model.eval()
    apart = []
    for row, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        ids = torch.tensor([prompt + answer])
        with torch.no_grad():
            policy = (model(ids).logits[0].double() / 1.5).log_softmax(-1)
            with model.disable_adapter():
                reference = (model(ids).logits[0].double() / 1.5).log_softmax(-1)
        expected = ((1 - m) * policy + m * reference).softmax(-1)
        apart.append((policy.exp() - reference.exp()).abs().max())
        for t in range(len(answer)):
            alive = [i for i in range(len(answers)) if len(answers[i]) > t]
            torch.testing.assert_close(given[t][alive.index(row)], expected[len(prompt) - 1 + t],
                                       atol=2e-5, rtol=0)
    assert min(apart) > 0.02  # or a mixture would be nothing


@pytest.mark.parametrize("m", [0.0, 0.4, 1.0])
def test_answers_come_as_often_as_the_mixture_says(m, tmp_path):
    """Up to three tokens, by enumeration and chi-squared; the mixture is of tokens, not answers."""
    make_model(vocab_size=6).save_pretrained(tmp_path)
    model, tokenizer, count = with_adapter(tmp_path), make_tokenizer(eos=5), 6000
    logps = {(): 0.0}
    for _ in range(3):
        going = [answer for answer in logps if not answer or answer[-1] != 5]
        nexts = mixed_logps(model, [[3, 1, *answer] for answer in going], m, 1.3)
        for answer, row in zip(going, nexts.tolist(), strict=True):
            before = logps.pop(answer)
            logps |= {answer + (token,): before + logp for token, logp in enumerate(row)}
    expected = {answer: count * math.exp(logp) for answer, logp in logps.items()}
    seen = Counter(map(tuple, draw(model, [[3, 1]] * count, m, 3, 1.3, tokenizer=tokenizer)))
    often = [answer for answer in expected if expected[answer] >= 5]
    cells = [(seen[answer], expected[answer]) for answer in often]
    cells.append((count - sum(x for x, _ in cells), count - sum(x for _, x in cells)))
    chi2, degrees = sum((x - mean) ** 2 / mean for x, mean in cells), len(cells) - 1
    assert seen.keys() <= expected.keys()
    assert degrees > 15 and chi2 < degrees + 4 * math.sqrt(2 * degrees), (chi2, degrees)


@pytest.mark.parametrize("start", ["base", "adapter"])
def test_what_the_reference_says_does_not_move_with_the_adapter(start, tmp_path):
    """At m = 1 samples are those of the base, or of the adapter that training started from."""
    make_model().save_pretrained(tmp_path / "base")
    model = with_adapter(tmp_path / "base")
    if start == "adapter":
        model.save_pretrained(tmp_path / "adapter")
        model = common.load_model(str(tmp_path / "adapter"))
    before = {m: draw(model, PROMPTS * 4, m) for m in (0.0, 0.5, 1.0)}
    if start == "adapter":
        assert before[0.0] == before[1.0]  # π is π_ref at the start
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and "lora_B" in name:
            parameter.data += 0.5 * torch.randn(
                parameter.shape, generator=torch.Generator().manual_seed(len(name)))
    assert draw(model, PROMPTS * 4, 1.0) == before[1.0]
    assert draw(model, PROMPTS * 4, 0.0) != before[0.0]
    assert draw(model, PROMPTS * 4, 0.5) != before[0.5]


def test_each_stop_token_ends_an_answer_and_belongs_to_it(moved):
    """Eos, the template's end of turn and both that the generation config names; no other."""
    tokenizer = make_tokenizer(eos=11, end_of_turn=10)
    common.causal_lm(moved).generation_config.eos_token_id = [8, 9]
    answers = draw(moved, PROMPTS * 32, 0.5, 5, tokenizer=tokenizer)
    stops = {8, 9, 10, 11}
    for answer in answers:
        assert 1 <= len(answer) <= 5 and not stops & set(answer[:-1])
        assert answer[-1] in stops or len(answer) == 5
    assert {answer[-1] for answer in answers if len(answer) < 5} == stops
    assert {len(answer) for answer in answers} == {1, 2, 3, 4, 5}


@pytest.mark.parametrize("m, reads", [(0.0, 1), (0.5, 2), (1.0, 1)])
def test_answers_that_ended_are_read_no_more_and_nothing_is_left_changed(m, reads, moved):
    """One token a pass for each role that has a share; mode, adapter and random numbers stay."""
    moved.gradient_checkpointing_enable({"use_reentrant": False})
    moved.train()

    def state():
        return ([x.training for x in moved.modules()], moved.active_adapter,
                [p.requires_grad for p in moved.parameters()], torch.get_rng_state().tolist(),
                random.getstate(), [p.clone() for p in moved.parameters()])

    before, shapes = state(), []
    hook = common.causal_lm(moved).base_model.register_forward_pre_hook(
        lambda module, args, kwargs: shapes.append(tuple(kwargs["input_ids"].shape)),
        with_kwargs=True)
    answers = draw(moved, PROMPTS * 4, m, 12)
    hook.remove()
    after = state()
    assert after[:-1] == before[:-1] and all(map(torch.equal, after[-1], before[-1]))
    lengths = [len(answer) for answer in answers]
    going = [sum(length > t for length in lengths) for t in range(1, 12)]
    assert len(set(going)) > 2
    assert shapes == [shape for number in [(16, 7)] + [(n, 1) for n in going if n]
                      for shape in [number] * reads]
    assert draw(moved, PROMPTS * 4, m, 12) == answers != draw(moved, PROMPTS * 4, m, 12, seed=1)


# ---- a whole run against a plain forward pass in float64 -----------------------------------------

REWARDS = """
def varied(prompts, completions, **columns): return [sum(map(ord, x)) % 3 for x in completions]
def constant(prompts, completions, **columns): return [0.7] * len(completions)
def length(prompts, completions, **columns): return [len(text) for text in completions]
"""


@pytest.fixture
def reward_file(tmp_path):
    path = tmp_path / "rewards.py"
    path.write_text(REWARDS)
    return str(path)


def answer_to(tokenizer, prompt, second):
    """It follows from the prompt and from which draw it is; some never stop."""
    pick = random.Random(f"{prompt} {second}")
    text = f"{pick.randrange(100)} + {pick.randrange(10)} = {pick.randrange(1000)}"
    ids = tokenizer(text[pick.randrange(6):])["input_ids"]
    return ids + [tokenizer.eos_token_id] * (pick.random() < 0.6)


def fixed_draws(model, tokenizer, prompts, m, args, seed):
    """In place of `sample_mixture`: the two draws of a step have an even and an odd seed."""
    return [answer_to(tokenizer, prompt, seed % 2) for prompt in prompts]


@pytest.fixture
def run(tmp_path, write_jsonl, reward_file):
    """Trains on the three ROWS and one more, and returns the folder of the run."""
    def train(name="run", **flags):
        rows = [*ROWS, ROWS[0] | {"prompt": [{"role": "user", "content": "What is 4 - 1?"}]}]
        defaults = dict(dataset=write_jsonl(rows, "train.jsonl"), max_new_tokens=LONGEST,
                        eval_dataset=write_jsonl(HELD_OUT, "held_out.jsonl"), batch_size=4,
                        max_steps=2, temperature=TEMPERATURE, learning_rate=RATE, beta=BETA,
                        alpha=ALPHA, missing_eos_penalty=PENALTY, output_dir=tmp_path / name,
                        reward=f"{reward_file}:varied")
        online_dpo.train(run_args(online_dpo, **defaults | flags))
        return tmp_path / name
    return train


def figures_by_hand(loss, sharp, tokenizer, answers, logps, ref_logps):
    """The loss of the answers to all prompts, pairs (y, y'), and what has to be logged."""
    losses, pairs, wins, of_y = [], [], [], []
    for (y, other), (a, b), (ref_a, ref_b) in zip(answers, logps, ref_logps, strict=True):
        scores = []
        for ids in (y, other):
            text = tokenizer.decode(ids, skip_special_tokens=True)
            ended = ids[-1] == tokenizer.eos_token_id
            scores.append((sum(map(ord, text)) % 3, ended))
        lead = (scores[0][0] - PENALTY * (not scores[0][1])
                - scores[1][0] + PENALTY * (not scores[1][1]))
        wins.append((lead > 0) + 0.5 * (lead == 0) if sharp else sigmoid(lead))
        of_y.append((*scores[0], len(y), (a - ref_a).item()))
        r, other_r = (BETA * (x - ref).item() for x, ref in ((a, ref_a), (b, ref_b)))
        h = a - ref_a - b + ref_b if lead > 0 else b - ref_b - a + ref_a
        if loss == "nash_md":
            losses.append(-(wins[-1] - 0.5 - r) * a)
        elif lead:
            losses.append((h - 1 / (2 * BETA)) ** 2 if loss == "ipo" else
                          torch.log1p(torch.exp(-BETA * h)) + (ALPHA * b if loss == "xpo" else 0))
        if lead:
            pairs.append((r, other_r) if lead > 0 else (other_r, r))
    value = sum(losses) / len(answers)
    return value, {
        "reward": statistics.fmean(x[0] for x in of_y), "stopped": statistics.fmean(
            x[1] for x in of_y), "length": statistics.fmean(x[2] for x in of_y),
        "kl": statistics.fmean(x[3] for x in of_y), "ties": 1 - len(pairs) / len(answers),
        "preference": statistics.fmean(wins), "loss": value.item(),
        "margin": statistics.fmean(c - r for c, r in pairs),
        "accuracy": statistics.fmean((c > r) + 0.5 * (c == r) for c, r in pairs),
        "chosen_reward": statistics.fmean(c for c, _ in pairs),
        "rejected_reward": statistics.fmean(r for _, r in pairs)}


@functools.cache
def by_hand(loss, sharp):
    """Two steps: what has to be logged, and the weights at the end."""
    tokenizer = common.load_tokenizer("tiny/chat")
    torch.manual_seed(0)
    torch.randperm(4), torch.randperm(4)  # the order of the prompts is drawn before LoRA matrices
    model = common.load_model("tiny/chat").double()
    weights = {name: p for name, p in model.named_parameters() if p.requires_grad}
    start = {name: p.detach().clone() for name, p in weights.items()}
    optimizer = torch.optim.Adam(weights.values())

    def read(rows):
        prompts = [common.encode_prompt(tokenizer, row["prompt"]) for row in rows]
        answers = [[answer_to(tokenizer, prompt, second) for second in (0, 1)]
                   for prompt in prompts]
        asked = [(prompt, ids) for prompt, two in zip(prompts, answers, strict=True) for ids in two]

        def logps():
            flat = [x.sum() for x in plain_logps(model, asked)]
            return list(zip(flat[::2], flat[1::2], strict=True))

        with torch.no_grad(), model.disable_adapter():
            ref_logps = logps()
        return lambda: figures_by_hand(loss, sharp, tokenizer, answers, logps(), ref_logps)

    rows = [*ROWS, ROWS[0] | {"prompt": [{"role": "user", "content": "What is 4 - 1?"}]}]
    trained, held_out, steps = read(rows), read(HELD_OUT), []
    for rate in (RATE, RATE / 2):  # a cosine, and two steps are too few for a warm-up
        value, figures = trained()
        optimizer.zero_grad()
        value.backward()
        norm = sum(p.grad.square().sum() for p in weights.values()).sqrt().item()
        for p in weights.values():
            p.grad *= min(1, 1 / norm)
        optimizer.param_groups[0]["lr"] = rate
        optimizer.step()
        steps.append(figures | {"step": len(steps) + 1, "grad_norm": norm, "learning_rate": rate,
                                "loss_scale": 1})
    with torch.no_grad():
        after = held_out()[1]
    return steps, after, start, {name: p.detach() for name, p in weights.items()}


def check_run(folder, loss, sharp):
    steps, after, start, weights = by_hand(loss, sharp)
    for logged, expected in zip(metrics_of(folder), steps, strict=True):
        assert logged.keys() - {"seconds", "rollout_seconds", "peak_memory_gib"} == expected.keys()
        for name, value in expected.items():
            assert logged[name] == pytest.approx(value, rel=1e-4, abs=1e-5), (logged["step"], name)
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["after"] == pytest.approx(after, rel=1e-3, abs=1e-5)
    saved = load_file(folder / "adapter_model.safetensors")
    away, moved = [], []
    for name, weight in weights.items():
        away.append((saved[name.replace(".default", "")] - weight).norm())
        moved.append((weight - start[name]).norm())
    # of tiny gradients Adam takes the sign, and that may be rounding
    assert torch.stack(away).norm() < 0.005 * torch.stack(moved).norm()


@pytest.mark.parametrize("loss, preference, micro_batch_size", [
    ("dpo", "sigmoid", 1), ("dpo", "hard", 4), ("ipo", "sigmoid", 3), ("xpo", "sigmoid", 2),
    ("nash_md", "sigmoid", 3), ("nash_md", "hard", 4)])
def test_a_run_equals_plain_arithmetic_in_float64(
        loss, preference, micro_batch_size, run, monkeypatch):
    """Every logged number, the held-out figures and the weights, whatever the micro-batch."""
    monkeypatch.setattr(online_dpo, "sample_mixture", fixed_draws)
    folder = run(loss=loss, preference=preference, micro_batch_size=micro_batch_size)
    check_run(folder, loss, preference == "hard")


def test_the_run_by_hand_is_a_telling_one():
    """It has ties, wins of both sides, answers without an end, and moves π."""
    steps, after, _, _ = by_hand("nash_md", True)
    for figures in (*steps, after):
        assert 0 < figures["stopped"] < 1
    assert 0 < steps[0]["ties"] < 1 and 0 < steps[0]["preference"] < 1
    assert abs(steps[1]["kl"]) > 0.05 and steps[1]["margin"] != 0


# ---- what the loop hands to whom -----------------------------------------------------------------

def saved_weights(folder):
    return load_file(folder / "adapter_model.safetensors")


def results(folder):
    steps = [{k: x for k, x in step.items() if not k.endswith("seconds")}
             for step in metrics_of(folder)]
    return steps, json.loads((folder / "summary.json").read_text())["after"]


def test_xpo_without_optimism_is_online_dpo_with_a_reference_sample(run, reward_file):
    """The same samples, numbers and weights, to the last bit; with α it is not."""
    run = functools.partial(
        run, max_new_tokens=6, temperature=5, reward=f"{reward_file}:length")
    xpo = run("xpo", loss="xpo", alpha=0)
    dpo = run("dpo", loss="dpo", mixture=1)
    assert results(xpo) == results(dpo) and all(step["ties"] < 1 for step in results(xpo)[0])
    for name, weight in saved_weights(xpo).items():
        assert torch.equal(weight, saved_weights(dpo)[name])
    assert results(run("other", loss="xpo", max_steps=1))[0] != results(xpo)[0][:1]


@pytest.mark.parametrize("loss", LOSSES)
def test_who_is_asked_for_the_two_answers(loss, run, monkeypatch):
    """y is always from π; y' from π, π_ref or a mixture; no seed but the held-out ones repeats."""
    asked, sample = [], online_dpo.sample_mixture

    def spy(model, tokenizer, prompts, m, args, seed):
        asked.append((len(prompts), m, seed))
        return sample(model, tokenizer, prompts, m, args, seed)

    monkeypatch.setattr(online_dpo, "sample_mixture", spy)
    run(loss=loss, max_new_tokens=2)
    assert [number for number, _, _ in asked] == [3, 3, 4, 4, 4, 4, 3, 3]
    assert [m for _, m, _ in asked] == [0.0, MIXTURES[loss]] * 4
    assert asked[:2] == asked[-2:] and len({seed for _, _, seed in asked[:-2]}) == 6


def test_the_mixture_of_training_is_that_of_the_moved_policy(run, monkeypatch):
    """In every step the sampler has the adapter of that step: π moves, π_ref does not."""
    seen, sample = [], online_dpo.sample_mixture

    def spy(model, tokenizer, prompts, m, args, seed):
        seen.append([sample(model, tokenizer, [[5, 9, 17]] * 20, share, args, 0)
                     for share in (0.0, 1.0)])
        return sample(model, tokenizer, prompts, m, args, seed)

    monkeypatch.setattr(online_dpo, "sample_mixture", spy)
    run(loss="xpo", learning_rate=0.02, max_new_tokens=3)
    assert all(x[1] == seen[0][1] for x in seen) and seen[0][0] == seen[0][1]
    assert seen[-1][0] != seen[0][0]


@pytest.mark.parametrize("loss", LOSSES)
def test_equal_scores_teach_nothing_and_are_counted(loss, run, reward_file, monkeypatch):
    """A reward that is the same for all leaves weights and figures as they were."""
    monkeypatch.setattr(online_dpo, "sample_mixture", fixed_draws)
    folder = run(loss=loss, reward=f"{reward_file}:constant", missing_eos_penalty=0)
    for step in metrics_of(folder):
        assert step["ties"] == 1 and step["preference"] == 0.5 and step["kl"] == 0
        assert step["loss"] == step["grad_norm"] == step["margin"] == step["accuracy"] == 0
    assert not any(x.any() for name, x in saved_weights(folder).items() if "lora_B" in name)


@pytest.mark.parametrize("penalty", [0.0, 1.0, 100.0])
def test_an_answer_without_an_end_loses_the_penalty_in_its_pair_alone(
        penalty, reward_file, monkeypatch):
    """A stop token of the prompt ends no answer; the logged reward is without the penalty."""
    tokenizer = common.load_tokenizer("tiny/chat")
    model, eos = common.load_model("tiny/chat"), tokenizer.eos_token_id
    prompt = common.encode_prompt(tokenizer, ROWS[0]["prompt"])
    assert set(common.stop_token_ids(tokenizer, model.generation_config)) & set(prompt)
    drawn = iter([[[40, 41, 42, 43, 44], [40, eos], [40, 41]],
                  [[40, eos], [40, 41, 42, 43, eos], [41, 40]]])
    monkeypatch.setattr(online_dpo, "sample_mixture", lambda *args: next(drawn))
    args = run_args(online_dpo, reward=f"{reward_file}:length", missing_eos_penalty=penalty,
                    preference="hard")
    examples = [{"prompt": prompt, "row": {"prompt": ROWS[0]["prompt"]}}] * 3
    reward = online_dpo.load_reward(args.reward, model)
    batch = online_dpo.rollout(model, reward, examples, tokenizer, args, 0)
    assert batch["stopped"].tolist() == [False, True, False, True, True, False]
    texts = [tokenizer.decode(ids) for ids in ([40, 41, 42, 43, 44], [40], [40, 41, 42, 43])]
    long, short, longer = map(len, texts)
    assert batch["scores"][[0, 1, 3, 4]].tolist() == [long, short, short, longer]
    lead = long - penalty - short
    assert batch["wins"].tolist() == [float(lead > 0), 0.0, 0.5, float(lead < 0), 1.0, 0.5]
    figures = online_dpo.describe(batch, args)
    assert figures["reward"] == pytest.approx(batch["scores"][:3].mean().item())


def test_preferences_are_those_of_score_differences_and_add_up_to_1(reward_file, monkeypatch):
    """σ of the difference, or 1, ½ and 0; nearly equal scores are not equal."""
    tokenizer, model = common.load_tokenizer("tiny/chat"), common.load_model("tiny/chat")
    prompt = common.encode_prompt(tokenizer, ROWS[0]["prompt"])
    scores = torch.tensor([0.3, -2.0, 1.0, 1e-9, 0.3 - 1.5, 40.0, 1.0, 0.0])
    monkeypatch.setattr(online_dpo, "sample_mixture", fixed_draws)
    examples = [{"prompt": prompt, "row": {"prompt": ROWS[0]["prompt"]}}] * 4
    for kind, expected in (("sigmoid", [sigmoid(1.5), sigmoid(-42), 0.5, sigmoid(1e-9)]),
                           ("hard", [1, 0, 0.5, 1])):
        args = run_args(online_dpo, missing_eos_penalty=0, preference=kind)
        batch = online_dpo.rollout(model, lambda *args: scores, examples, tokenizer, args, 0)
        assert batch["wins"][:4].tolist() == pytest.approx(expected, rel=1e-6)
        assert (batch["wins"] + batch["wins"].roll(4)).tolist() == pytest.approx([1] * 8)
        assert (batch["wins"] == 0.5).tolist() == [False, False, True, False] * 2


def test_prompts_cover_the_data_once_per_epoch(run, monkeypatch):
    """In an order that follows from the seed, whatever random numbers came before."""
    asked = []

    def spy(model, tokenizer, prompts, m, args, seed):
        asked.append([str(prompt) for prompt in prompts])
        return fixed_draws(model, tokenizer, prompts, m, args, seed)

    monkeypatch.setattr(online_dpo, "sample_mixture", spy)
    orders = []
    for name in "ab":
        asked.clear()
        torch.manual_seed(len(orders))
        run(name, batch_size=2, max_steps=4)
        assert all(asked[i] == asked[i + 1] for i in range(0, len(asked), 2))
        orders.append([prompt for batch in asked[2:-2:2] for prompt in batch])
        assert sorted(orders[-1][:4]) == sorted(orders[-1][4:]) and len(set(orders[-1])) == 4
    assert orders[0] == orders[1] and orders[0][:4] != orders[0][4:]


@pytest.mark.parametrize("flags, words", [
    ({"mixture": 1.5}, "--mixture: 1.5 is not within 0 and 1"), ({"beta": 0}, "--beta"),
    ({"alpha": -1}, "--alpha"), ({"missing_eos_penalty": -1}, "--missing-eos-penalty"),
    ({"preference": "soft"}, "--preference"), ({"loss": "grpo"}, "--loss"),
    ({"reward": "shortness"}, "the reward model shortness")])
def test_bad_flags_are_refused_before_the_policy_is_loaded(flags, words, run, refused, monkeypatch):
    monkeypatch.setattr(common, "load_model", None)
    assert words in refused(run, **flags)


# ---- real input ----------------------------------------------------------------------------------

CAT = """
import re
def cat(prompts, completions, **columns):
    return [float(bool(re.search(r"\\\\bcats?\\\\b", x, re.I))) for x in completions]
"""


@pytest.mark.parametrize("loss", ["ipo", "nash_md"])
def test_a_real_model_trains_on_real_prompts(loss, shared, tmp_path, write_jsonl):
    """Two steps of stories260K on TinyStories prompts, with a reward of one's own."""
    (tmp_path / "cat.py").write_text(CAT)
    file = shared / "data/prompt_tinystories.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()[:16]]
    online_dpo.train(run_args(
        online_dpo, model=shared / "models/stories260K", dataset=write_jsonl(rows), batch_size=4,
        reward=f"{tmp_path}/cat.py:cat", max_steps=2, max_new_tokens=8, loss=loss, eval_size=3,
        missing_eos_penalty=0.5, output_dir=tmp_path / "run"))
    assert len(metrics_of(tmp_path / "run")) == 2
