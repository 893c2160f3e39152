"""Rewards that a user might write, for --reward of every script that has one.

    python grpo.py --reward correct_answer examples/rewards.py:shortness --reward-weights 1 0.1
    python ppo.py --reward examples/rewards.py:classifier

A reward is a function. It gets `prompts` (texts or lists of messages), `completions` (texts) and
every other column of the dataset under its own name, each a list with an item per completion, and
returns a number for each of them.
"""
import functools
import os

import torch


def shortness(prompts, completions, **columns):
    """1 for an empty completion, falling to 0 at 1000 characters: a length penalty."""
    return [1 - min(1.0, len(text) / 1000) for text in completions]


def math_answer(prompts, completions, answer, **columns):
    """1 where math-verify finds the completion equal to the row's answer: LaTeX, units, sets.

    pip install math-verify
    """
    from math_verify import parse, verify

    def in_latex(text):
        return text if "\\boxed" in text or "$" in text else f"${text}$"

    pairs = zip(completions, answer, strict=True)
    return [float(verify(parse(in_latex(str(truth))), parse(text))) for text, truth in pairs]


@functools.lru_cache
def load_classifier(name):
    """Any sequence classifier with one output, from the Hub or a folder, in 16 bits on a GPU."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.float16 if device == "cuda" else torch.float32
    model = AutoModelForSequenceClassification.from_pretrained(name, dtype=dtype).to(device)
    return model.eval(), AutoTokenizer.from_pretrained(name)


@torch.no_grad()
def classifier(prompts, completions, **columns):
    """The score of a reward model that has another base than the policy.

    REWARD_MODEL in the environment names it; it should have a chat template of its own.
    """
    name = os.environ.get("REWARD_MODEL", "Skywork/Skywork-Reward-V2-Qwen3-0.6B")
    model, tokenizer = load_classifier(name)
    scores = []
    for prompt, text in zip(prompts, completions, strict=True):
        if isinstance(prompt, str):
            ids = tokenizer(prompt + text, return_tensors="pt")["input_ids"]
        else:
            chat = [*prompt, {"role": "assistant", "content": text}]
            ids = tokenizer.apply_chat_template(chat, return_tensors="pt", return_dict=False)
        scores.append(model(input_ids=ids.to(model.device)).logits[0, 0].item())
    return scores
