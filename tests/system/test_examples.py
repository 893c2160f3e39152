"""examples/rewards.py: each reward by its definition or by a plain forward pass."""
import sys

import pytest
import torch
from by_hand import ask, say
from conftest import ROOT
from transformers import Qwen2ForSequenceClassification

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
def test_math_answers_are_compared_by_their_meaning(rewards, answer, right, wrong):
    pytest.importorskip("math_verify")
    scores = rewards.math_answer(["q"] * 2, [right, wrong], answer=[answer] * 2)
    assert scores == [1.0, 0.0]


def test_a_foreign_classifier_scores_the_whole_conversation(rewards, tmp_path, monkeypatch):
    """With its own tokenizer and template: the logit of a plain forward pass."""
    torch.manual_seed(0)  # of the new head
    tokenizer = common.load_tokenizer("tiny/chat")
    model = Qwen2ForSequenceClassification.from_pretrained(
        ROOT / "tiny/chat", num_labels=1, pad_token_id=tokenizer.pad_token_id,
        dtype=torch.float32).eval()
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    monkeypatch.setenv("REWARD_MODEL", str(tmp_path))
    prompts = [ask("1 + 1?"), "1 + 1 ="]
    scores = rewards.classifier(prompts, ["2", " 2"])
    chat = [*prompts[0], *say("2")]
    for score, ids in zip(scores, [common.to_ids(tokenizer, common.render(tokenizer, chat)),
                                   tokenizer("1 + 1 = 2")["input_ids"]], strict=True):
        with torch.no_grad():
            logit = model(input_ids=torch.tensor([ids])).logits[0, 0].item()
        assert score == pytest.approx(logit, abs=1e-5)


def test_the_overlong_penalty_is_equation_13(rewards, monkeypatch):
    tokenizer = common.load_tokenizer("tiny/chat")
    ids = tokenizer("What is 1 + 1? " * 9)["input_ids"]
    texts = [tokenizer.decode(ids[:count]) for count in range(len(ids))]
    lengths = [len(tokenizer(text)["input_ids"]) for text in texts]
    expected = [0.0 if n <= 12 else (12 - n) / 8 if n <= 20 else -1.0 for n in lengths]
    assert {0.0, -0.125, -0.5, -1.0} <= set(expected)
    for name, value in ("LENGTH_TOKENIZER", "tiny/chat"), ("LENGTH_MAX", 20), ("LENGTH_CACHE", 8):
        monkeypatch.setenv(name, str(value))
    assert rewards.overlong(["q"] * len(texts), texts, answer=[1]) == expected
    monkeypatch.setenv("LENGTH_CACHE", "21")
    with pytest.raises(ValueError, match="LENGTH_CACHE"):
        rewards.overlong(["q"], [""])


def test_a_rubric_is_the_weighted_share_of_criteria_that_are_met(rewards, monkeypatch):
    """By one plain forward pass per criterion, although the judge reads padded batches."""
    monkeypatch.setenv("RUBRIC_JUDGE", "tiny/chat")
    own = [{"criterion": "It is 2.", "weight": 3}, {"criterion": "Short.", "weight": 0.5}]
    prompts = [ask("What is 1 + 1?"), "1 + 1 =", "2 + 1 ="]
    texts, rubrics = ["2", " 3, I think", "<|im_end|>"], [own, None, []]
    scores = rewards.rubric(prompts, texts, rubric=rubrics, answer=["2"] * 3)
    assert scores[2] is None
    assert rewards.rubric(prompts[1:2], texts[1:2]) == pytest.approx(scores[1:2], abs=1e-5)
    tokenizer = common.load_tokenizer("tiny/chat")
    model = common.load_model("tiny/chat", trainable=False, lora_rank=0)
    yes, no = (tokenizer(word)["input_ids"][0] for word in ("Yes", "No"))
    for prompt, text, criteria, score in zip(
            prompts[:2], texts[:2], [own, rewards.RUBRIC], scores[:2], strict=True):
        reached = 0
        for item in criteria:
            ids = rewards.encode_criterion(tokenizer, prompt, text, item["criterion"])
            read = tokenizer.decode(ids)
            assert item["criterion"] in read and f"[answer] {text}" in read and "1" in read
            with torch.no_grad():
                logits = model(torch.tensor([ids])).logits[0, -1]
            reached += item["weight"] * logits[[yes, no]].softmax(0)[0].item()
        assert score == pytest.approx(reached / sum(x["weight"] for x in criteria), abs=1e-5)
    with pytest.raises(ValueError, match="weight"):
        rewards.rubric(prompts[:1], texts[:1], rubric=[[own[0] | {"weight": -1}]])
