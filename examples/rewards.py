"""Example reward functions, for the flag --reward of every script that has it.

    python grpo.py --reward correct_answer examples/rewards.py:shortness --reward-weights 1 0.1
    python ppo.py --reward examples/rewards.py:classifier
    RUBRIC_JUDGE=Qwen/Qwen2.5-1.5B-Instruct python grpo.py --reward examples/rewards.py:rubric
    LENGTH_TOKENIZER=tiny/chat LENGTH_MAX=24 LENGTH_CACHE=8 python grpo.py --reward correct_answer \
        examples/rewards.py:overlong --reward-weights 1 1

A reward function gets `prompts` (strings or lists of messages), `completions` (strings) and every
other column of the dataset under its own name, each as a list with one item per completion. It
returns a list with one number per completion, or None for a completion to which it does not apply.
"""
import functools
import itertools
import math
import os

import torch

import common

load_tokenizer = functools.lru_cache(common.load_tokenizer)
BATCH_SIZE = 16  # number of texts that a model reads at a time
# The criteria for rows without a column `rubric`, with the weights of Gunjal et al. (2025).
RUBRIC = [{"criterion": "The answer is correct.", "weight": 1.0},
          {"criterion": "The answer responds to what was asked.", "weight": 0.7},
          {"criterion": "The answer is no longer than it needs to be.", "weight": 0.3}]


def shortness(prompts, completions, **columns):
    """A length penalty: 1 for an empty completion, falling linearly to 0 at 1000 characters."""
    return [1 - min(1.0, len(text) / 1000) for text in completions]


def overlong(prompts, completions, **columns):
    """The soft overlong punishment of DAPO (Yu et al. 2025, arXiv:2503.14476, eq. 13).

    The penalty is 0 up to LENGTH_MAX - LENGTH_CACHE tokens and then falls linearly to -1 at
    LENGTH_MAX, which should equal the run's --max-new-tokens. LENGTH_TOKENIZER names the model
    whose tokenizer counts. The end-of-turn token, which no completion contains, is not counted.
    """
    tokenizer = load_tokenizer(os.environ["LENGTH_TOKENIZER"])
    longest = int(os.environ["LENGTH_MAX"])
    cache = int(os.environ["LENGTH_CACHE"])
    if not 0 < cache <= longest:
        raise ValueError("LENGTH_CACHE must be above 0 and at most LENGTH_MAX")
    penalties = []
    for text in completions:
        length = len(tokenizer(text, add_special_tokens=False)["input_ids"])
        penalty = (longest - cache - length) / cache
        penalties.append(max(-1.0, min(0.0, penalty)))
    return penalties


def math_answer(prompts, completions, answer, **columns):
    """1 where math-verify finds the completion equal to the row's `answer`, else 0.

    It understands LaTeX, fractions, units and sets. It needs: pip install math-verify
    """
    from math_verify import parse, verify

    def in_latex(text):
        return text if "\\boxed" in text or "$" in text else f"${text}$"

    scores = []
    for text, truth in zip(completions, answer, strict=True):
        is_equal = verify(parse(in_latex(str(truth))), parse(text))
        scores.append(float(is_equal))
    return scores


@functools.lru_cache
def load_judge(name):
    """A frozen language model, in 4 bits on a GPU."""
    return common.load_model(name, lora_rank=0, gradient_checkpointing="off", trainable=False)


def rubric(prompts, completions, rubric=None, **columns):
    """The share of a rubric that an answer meets (Gunjal et al. 2025, arXiv:2507.17746, eq. 1).

    The score is Σ w_j c_j / Σ w_j, where w_j is the weight of criterion j. A local model,
    RUBRIC_JUDGE, reads the prompt, the answer and one criterion at a time. c_j is its probability
    p(Yes) / (p(Yes) + p(No)); in the paper it is 0 or 1. A row may have its own criteria in a
    column `rubric`, in the form of RUBRIC. If that list is empty, the reward does not apply to the
    row, and the score is None.
    """
    name = os.environ["RUBRIC_JUDGE"]
    tokenizer = load_tokenizer(name)
    own_rubrics = rubric or [None] * len(completions)
    rubrics = [RUBRIC if own is None else own for own in own_rubrics]
    questions = []
    for prompt, text, criteria in zip(prompts, completions, rubrics, strict=True):
        if any(not 0 < item["weight"] < math.inf for item in criteria):
            raise ValueError(f"each weight must be a number above 0: {criteria}")
        for item in criteria:
            questions.append(encode_criterion(tokenizer, prompt, text, item["criterion"]))
    fulfilled = iter(chances_of_yes(load_judge(name), tokenizer, questions))
    scores = []
    for criteria in rubrics:
        total = sum(item["weight"] for item in criteria)
        reached = sum(item["weight"] * next(fulfilled) for item in criteria)
        scores.append(reached / total if criteria else None)
    return scores


def encode_criterion(tokenizer, prompt, text, criterion):
    """The ids of a prompt that asks whether an answer meets a criterion."""
    if not isinstance(prompt, str):
        turns = [f"[{message['role']}] {message.get('content', '')}" for message in prompt]
        prompt = "\n".join(turns)
    question = (f"Here is a conversation and an answer to it.\n\n{prompt}\n\n[answer] {text}\n\n"
                f"Criterion: {criterion}\nDoes the answer fulfill it? Say Yes or No.\n")
    if tokenizer.chat_template:
        question = [{"role": "user", "content": question}]
    return common.encode_prompt(tokenizer, question)


@torch.no_grad()
def chances_of_yes(model, tokenizer, questions):
    """p(Yes) / (p(Yes) + p(No)) for the token that follows each question."""
    yes = tokenizer("Yes", add_special_tokens=False)["input_ids"][0]
    no = tokenizer("No", add_special_tokens=False)["input_ids"][0]
    if yes == no:
        raise ValueError("Yes and No begin with the same token: RUBRIC_JUDGE needs another model")
    chances = []
    for start in range(0, len(questions), BATCH_SIZE):
        batch = tokenizer.pad({"input_ids": questions[start:start + BATCH_SIZE]},
                              padding_side="left", return_tensors="pt").to(model.device)
        positions = (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)
        with common.autocast(model):
            logits = model(**batch, position_ids=positions, logits_to_keep=1).logits  # [B, 1, V]
        logits = logits[:, -1, [yes, no]].float()  # [B, 2]
        chances += logits.softmax(-1)[:, 0].tolist()
    return chances


@functools.lru_cache
def load_classifier(name):
    """A sequence classifier with one output, from the Hub or a folder, in 16 bits on a GPU."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.float16 if device == "cuda" else torch.float32
    model = AutoModelForSequenceClassification.from_pretrained(
        name, dtype=dtype, trust_remote_code=False).to(device)
    return model.eval(), AutoTokenizer.from_pretrained(name, trust_remote_code=False)


@torch.no_grad()
def classifier(prompts, completions, **columns):
    """The score of a reward model whose base differs from the policy's.

    The environment variable REWARD_MODEL names it. It should have a chat template of its own.
    """
    name = os.environ.get("REWARD_MODEL", "Skywork/Skywork-Reward-V2-Qwen3-0.6B")
    model, tokenizer = load_classifier(name)
    rows = []
    for prompt, text in zip(prompts, completions, strict=True):
        if isinstance(prompt, str):
            rows.append(tokenizer(prompt + text)["input_ids"])
        else:
            chat = [*prompt, {"role": "assistant", "content": text}]
            rows.append(tokenizer.apply_chat_template(chat, return_dict=False))
    own_pad = model.config.pad_token_id
    pad = own_pad
    if pad is None:
        # The model reads the last token that is not padding, so no row may contain the pad token.
        used = set(itertools.chain(*rows))
        pad = next(i for i in itertools.count() if i not in used)
    model.config.pad_token_id = pad
    scores = []
    for start in range(0, len(rows), BATCH_SIZE):
        some = [torch.tensor(ids) for ids in rows[start:start + BATCH_SIZE]]
        input_ids = torch.nn.utils.rnn.pad_sequence(some, batch_first=True, padding_value=pad)
        lengths = torch.tensor([len(ids) for ids in some])  # [B]
        mask = (torch.arange(input_ids.shape[1]) < lengths[:, None]).long()  # [B, T]
        logits = model(input_ids=input_ids.to(model.device),
                       attention_mask=mask.to(model.device)).logits  # [B, 1]
        scores += logits[:, 0].tolist()
    model.config.pad_token_id = own_pad
    return scores
