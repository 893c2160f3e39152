"""The sampler of online_dpo.py draws every token from exactly π^(1−m) π_ref^m / Z."""
from argparse import Namespace

import by_hand
import pytest
import torch
from test_sampling import PROMPTS, make_model, make_tokenizer, with_adapter

import common
import online_dpo


def draw(model, prompts=PROMPTS, m=0.0, longest=6, temperature=1.0, seed=0, words=None):
    args = Namespace(max_new_tokens=longest, temperature=temperature)
    return online_dpo.sample_mixture(model, words or make_tokenizer(), prompts, m, args, seed)


@pytest.fixture
def moved(tmp_path):
    """A random model with an adapter that changes its output."""
    make_model().save_pretrained(tmp_path)
    return with_adapter(tmp_path)


@pytest.mark.parametrize("shape", ["qwen2", "gemma3", "gpt2"])
@pytest.mark.parametrize("m", [0.0, 0.3, 1.0])
def test_every_token_is_drawn_from_exactly_the_mixture(shape, m, draws, tmp_path):
    """With any padding, even after other answers have left the batch, at temperature 1.5."""
    make_model(shape).save_pretrained(tmp_path)
    model = with_adapter(tmp_path)
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
        expected = ((1 - m) * policy + m * reference).softmax(-1).float()
        assert (policy.exp() - reference.exp()).abs().max() > 0.02, "π and π_ref must differ here"
        for t in range(len(answer)):
            alive = [i for i in range(len(answers)) if len(answers[i]) > t]
            probs, drawn = (each[alive.index(row)] for each in draws[t])
            by_hand.same(probs, expected[len(prompt) - 1 + t], f"token {t} of answer {row}", 2e-5)
            assert drawn.item() == answer[t], "the token is not the one that was drawn"


@pytest.mark.parametrize("m, reads", [(0.0, 1), (0.5, 2), (1.0, 1)])
def test_one_token_per_pass_and_answers_that_ended_leave_the_batch(m, reads, moved):
    """Every stop token ends an answer. Training mode and the global random state are kept."""
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
    assert shapes == [shape for shape in expected for _ in range(reads)], "rows, columns per pass"
    for answer in answers:
        assert not {8, 9, 10, 11} & set(answer[:-1]), "a stop token inside an answer"
        assert answer[-1] in (8, 9, 10, 11) or len(answer) == 5
    assert {answer[-1] for answer in answers if len(answer) < 5} == {8, 9, 10, 11}
    assert draw(moved, PROMPTS, m) == draw(moved, PROMPTS, m) != draw(moved, PROMPTS, m, seed=1)


def test_the_reference_is_what_training_started_from(moved, tmp_path):
    """At m = 1 samples do not depend on the policy, even if training started from an adapter."""
    moved.save_pretrained(tmp_path / "adapter")
    model = common.load_model(str(tmp_path / "adapter"))
    before = draw(model, PROMPTS * 4, 1.0)
    assert before == draw(model, PROMPTS * 4, 0.0), "at the start π is π_ref"
    by_hand.move(model, std=0.5)
    assert draw(model, PROMPTS * 4, 1.0) == before != draw(model, PROMPTS * 4, 0.0)
