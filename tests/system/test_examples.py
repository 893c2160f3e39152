"""examples/rewards.py: the rewards that need neither a judge nor a training run."""
import sys

import pytest
import torch
from conftest import ROOT
from transformers import Qwen2Config, Qwen2ForSequenceClassification

import common


@pytest.fixture
def rewards(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "examples")
    sys.modules.pop("rewards", None)
    import rewards
    return rewards


def test_shortness_falls_with_the_length(rewards):
    assert rewards.shortness(["q"] * 3, ["", "x" * 250, "x" * 2000]) == [1.0, 0.75, 0.0]


@pytest.mark.parametrize("answer, right, wrong", [
    ("(1, 2)", r"so \boxed{(1, 2)}", r"\boxed{2}"), (r"\frac{14}{3}", r"$\frac{28}{6}$", "it is 3"),
    (r"\{2, 1\}", r"\boxed{\{1, 2\}}", r"\boxed{1}"), ("3", "the answer is 3.", "the answer is 4")])
def test_math_answers_are_compared_as_what_they_mean(rewards, answer, right, wrong):
    pytest.importorskip("math_verify")
    scores = rewards.math_answer(["q"] * 2, [right, wrong], answer=[answer] * 2)
    assert scores == [1.0, 0.0]


def test_a_foreign_classifier_scores_the_whole_conversation(rewards, tmp_path, monkeypatch):
    """Its own tokenizer and template, texts and messages; the logit of a plain forward pass."""
    torch.manual_seed(0)
    tokenizer = common.load_tokenizer("tiny/chat")
    config = Qwen2Config(vocab_size=len(tokenizer), hidden_size=16, intermediate_size=24,
                         num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1,
                         num_labels=1, pad_token_id=tokenizer.pad_token_id)
    model = Qwen2ForSequenceClassification(config).eval()
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    monkeypatch.setenv("REWARD_MODEL", str(tmp_path))
    prompts = [[{"role": "user", "content": "1 + 1?"}], "1 + 1 ="]
    scores = rewards.classifier(prompts, ["2", " 2"])
    chat = [*prompts[0], {"role": "assistant", "content": "2"}]
    for score, ids in zip(scores, [common.to_ids(tokenizer, common.render(tokenizer, chat)),
                                   tokenizer("1 + 1 = 2")["input_ids"]], strict=True):
        with torch.no_grad():
            logit = model(input_ids=torch.tensor([ids])).logits[0, 0].item()
        assert score == pytest.approx(logit, abs=1e-5)
