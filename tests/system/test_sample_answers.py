"""sample_answers, which sft.py, dpo.py and kto.py share: tokens drawn from softmax(logits)."""
import by_hand
import pytest
import torch
from by_hand import ask

import common
import sft


@pytest.fixture
def tokenizer():
    """That of tiny/chat: eos is the end of a turn, and pad is another token."""
    return common.load_tokenizer("tiny/chat")


@pytest.fixture(scope="module")
def model():
    return common.load_model("tiny/chat", trainable=False)


@pytest.fixture
def sharpness(model):
    """Scales the logits by the weight of the last norm: large is greedy, near 0 is uniform."""
    weight = common.causal_lm(model).model.norm.weight
    kept = weight.data.clone()
    yield lambda factor: weight.data.copy_(kept * factor)
    weight.data.copy_(kept)


def test_an_answer_does_not_depend_on_the_prompts_beside_it(model, tokenizer, sharpness):
    """Where sampling is greedy, it is the argmax of its own prompt, token by token."""
    sharpness(1e4)
    prompts = [by_hand.prompt_ids(ask(text)) for text in
               ("What is 12 + 5?", "Tom has 31 figs and gets 16 more. How many figs now?")]
    answers = sft.sample_answers(model, tokenizer, prompts, 16, 0)
    for prompt, answer in zip(prompts, answers, strict=True):
        ids = list(prompt)
        while ids[-1] != tokenizer.eos_token_id or len(ids) == len(prompt):
            with torch.no_grad():
                ids.append(model(torch.tensor([ids])).logits[0, -1].argmax().item())
        size = len(ids) - len(prompt)
        assert answer[:size] == ids[len(prompt):], "is the padding on the left, and not attended?"
        assert set(answer[size:]) <= {tokenizer.pad_token_id}


def test_the_models_own_generation_config_only_adds_stop_tokens(
        model, tokenizer, sharpness, monkeypatch):
    """Its top-k, penalties and so on change nothing, and every token can be sampled."""
    sharpness(0.02)
    prompts = [[5, 6, 7, 8]] * 1500
    answers = sft.sample_answers(model, tokenizer, prompts, 1, seed=0)
    assert len({token for token, in answers}) > 330, "some of the 369 tokens are never sampled"
    sharpness(0.4)
    plain = sft.sample_answers(model, tokenizer, prompts[:4], 12, seed=0)
    for name, value in {"top_k": 3, "top_p": 0.1, "min_p": 0.5, "typical_p": 0.1, "do_sample": 0,
                        "temperature": 0.1, "repetition_penalty": 9.0}.items():
        monkeypatch.setattr(model.generation_config, name, value)
    assert sft.sample_answers(model, tokenizer, prompts[:4], 12, seed=0) == plain
    assert sft.sample_answers(model, tokenizer, prompts[:4], 12, seed=1) != plain
    ends = {tokenizer.eos_token_id, tokenizer.pad_token_id}
    row = next(i for i in range(4) if not ends & set(plain[i][:8]))
    stop = plain[row][3]
    monkeypatch.setattr(model.generation_config, "eos_token_id", [tokenizer.eos_token_id, stop])
    stopped = sft.sample_answers(model, tokenizer, prompts[:4], 12, seed=0)[row]
    end = plain[row].index(stop) + 1
    assert stopped[:end] == plain[row][:end], "an answer changes before its stop token"
    assert set(stopped[end:]) <= {tokenizer.pad_token_id}, "an answer continues behind its stop"
