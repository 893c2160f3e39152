"""Short conversations, and what the scripts make of them, for several test files."""
import itertools

import transformers
from conftest import ROOT

import common

ROLES = {"S": "system", "U": "user", "A": "assistant", "T": "tool"}


def talk(*lines):
    """A conversation: talk("S Add.", "U 1 + 1?", "A 2")."""
    return [{"role": ROLES[line[0]], "content": line[2:]} for line in lines]


def chatml(*lines, ask=False):
    """The text of a conversation in the tiny model's template, perhaps with the next header."""
    text = "".join(f"<|im_start|>{turn['role']}\n{turn['content']}<|im_end|>\n"
                   for turn in talk(*lines))
    return text + "<|im_start|>assistant\n" * ask


def tiny_tokenizer(template=None):
    tokenizer = transformers.AutoTokenizer.from_pretrained(ROOT / "tiny/chat")
    tokenizer.chat_template = template or tokenizer.chat_template
    return tokenizer


def texts(tokenizer, pieces):
    """The texts of an example's pieces, which alternate between context and answers."""
    return [tokenizer.decode(ids) for ids, _ in pieces]


def trained(tokenizer, tokens):
    """The trained tokens of an example, as one text per contiguous part."""
    pairs = zip(tokens["input_ids"], tokens["loss_mask"], strict=True)
    parts = [(mask, list(part)) for mask, part in itertools.groupby(pairs, lambda pair: pair[1])]
    return [tokenizer.decode([token for token, _ in part]) for mask, part in parts if mask]


def encode_rows(make, rows, tokenizer=None, max_length=400):
    return common.encode_rows("rows", rows, make, tokenizer or tiny_tokenizer(), max_length)
