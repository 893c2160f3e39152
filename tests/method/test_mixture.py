"""The sampler of online_dpo.py draws every token from exactly π^(1−m) π_ref^m / Z."""
import math
from argparse import Namespace
from collections import Counter

import by_hand
import pytest
import torch
from test_sampling import PROMPTS, make_model, make_tokenizer, next_logps, with_adapter

import common
import online_dpo


def draw(model, prompts=PROMPTS, m=0.0, longest=6, temperature=1.0, seed=0, words=None):
    args = Namespace(max_new_tokens=longest, temperature=temperature)
    return online_dpo.sample_mixture(model, words or make_tokenizer(), prompts, m, args, seed)


@pytest.fixture
def moved(tmp_path):
    """A random model with an adapter that matters."""
    make_model().save_pretrained(tmp_path)
    return with_adapter(tmp_path)


@pytest.mark.parametrize("shape", ["qwen2", "gemma3", "gpt2"])
@pytest.mark.parametrize("m", [0.0, 0.3, 1.0])
def test_every_token_is_drawn_from_exactly_the_mixture(shape, m, monkeypatch, tmp_path):
    """At 0 it is π, at 1 π_ref: whatever the padding, after others left the batch, at T = 1.5."""
    make_model(shape).save_pretrained(tmp_path)
    model, given, multinomial = with_adapter(tmp_path), [], torch.multinomial
    monkeypatch.setattr(torch, "multinomial", lambda probs, number, generator: given.append(
        probs.double()) or multinomial(probs, number, generator=generator))
    prompts = PROMPTS * 3
    answers = draw(model, prompts, m, 9, 1.5)
    assert len({len(answer) for answer in answers}) > 2 and max(map(len, answers)) == 9
    model.eval()
    for row, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        ids = torch.tensor([prompt + answer])
        with torch.no_grad():
            policy = (model(ids).logits[0].double() / 1.5).log_softmax(-1)
            with model.disable_adapter():
                reference = (model(ids).logits[0].double() / 1.5).log_softmax(-1)
        expected = ((1 - m) * policy + m * reference).softmax(-1)
        assert (policy.exp() - reference.exp()).abs().max() > 0.02, "π and π_ref are the same"
        for t in range(len(answer)):
            alive = [i for i in range(len(answers)) if len(answers[i]) > t]
            torch.testing.assert_close(given[t][alive.index(row)], expected[len(prompt) - 1 + t],
                                       atol=2e-5, rtol=0, msg=f"token {t} of answer {row}")


@pytest.mark.parametrize("m", [0.0, 0.4])
def test_answers_come_as_often_as_the_mixture_of_tokens_says(m, tmp_path):
    """Up to three tokens, by enumeration and chi-squared; the mixture is of tokens, not answers."""
    make_model(vocab_size=6).save_pretrained(tmp_path)
    model, count, logps = with_adapter(tmp_path), 6000, {(): 0.0}
    model.eval()
    for _ in range(3):
        going = [answer for answer in logps if not answer or answer[-1] != 5]
        rows = [[3, 1, *answer] for answer in going]
        policy = next_logps(model, rows, 1.3)
        with model.disable_adapter():
            mixed = ((1 - m) * policy + m * next_logps(model, rows, 1.3)).log_softmax(-1)
        for answer, row in zip(going, mixed.tolist(), strict=True):
            before = logps.pop(answer)
            logps |= {answer + (token,): before + logp for token, logp in enumerate(row)}
    drawn = draw(model, [[3, 1]] * count, m, 3, 1.3, words=make_tokenizer(eos=5))
    seen = Counter(map(tuple, drawn))
    expected = {answer: count * math.exp(logp) for answer, logp in logps.items()}
    often = [answer for answer in expected if expected[answer] >= 5]
    cells = [(seen[answer], expected[answer]) for answer in often]
    cells.append((count - sum(x for x, _ in cells), count - sum(x for _, x in cells)))
    chi2, degrees = sum((x - mean) ** 2 / mean for x, mean in cells), len(cells) - 1
    assert seen.keys() <= expected.keys() and degrees > 15
    assert chi2 < degrees + 4 * math.sqrt(2 * degrees), f"chi-squared {chi2} of {degrees} degrees"


@pytest.mark.parametrize("m, reads", [(0.0, 1), (0.5, 2), (1.0, 1)])
def test_one_token_per_pass_and_answers_that_ended_leave_the_batch(m, reads, moved):
    """For each model that has a share. Every stop token ends an answer; mode and seeds stay."""
    words = make_tokenizer(eos=11, end_of_turn=10)
    common.causal_lm(moved).generation_config.eos_token_id = [8, 9]
    moved.train()
    state, shapes = torch.get_rng_state(), []
    hook = common.causal_lm(moved).base_model.register_forward_pre_hook(
        lambda module, args, kwargs: shapes.append(tuple(kwargs["input_ids"].shape)),
        with_kwargs=True)
    answers = draw(moved, PROMPTS * 16, m, 5, words=words)
    hook.remove()
    assert moved.training and torch.equal(state, torch.get_rng_state())
    going = [sum(len(answer) > t for answer in answers) for t in range(1, 5)]
    expected = [(64, 7)] + [(number, 1) for number in going]
    assert shapes == [shape for shape in expected for _ in range(reads)], "rows and tokens read"
    for answer in answers:
        assert not {8, 9, 10, 11} & set(answer[:-1]), "a stop token inside an answer"
        assert answer[-1] in (8, 9, 10, 11) or len(answer) == 5
    assert {answer[-1] for answer in answers if len(answer) < 5} == {8, 9, 10, 11}
    assert draw(moved, PROMPTS, m) == draw(moved, PROMPTS, m) != draw(moved, PROMPTS, m, seed=1)


def test_the_reference_is_what_training_started_from(moved, tmp_path):
    """At m = 1 samples do not move with the policy, even if training started from an adapter."""
    moved.save_pretrained(tmp_path / "adapter")
    model = common.load_model(str(tmp_path / "adapter"))
    before = draw(model, PROMPTS * 4, 1.0)
    assert before == draw(model, PROMPTS * 4, 0.0), "at the start π is π_ref"
    by_hand.move(model, std=0.5)
    assert draw(model, PROMPTS * 4, 1.0) == before != draw(model, PROMPTS * 4, 0.0)
