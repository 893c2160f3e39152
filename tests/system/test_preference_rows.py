"""Rows of preferences: tools (in all scripts), labels, truncation; and the plan of KTO's steps.

The forms of rows that can be read are tested in test_common_rows.py.
"""
import math
from collections import Counter
from types import SimpleNamespace

import by_hand
import pytest
import torch
from by_hand import ask, say, tokenizer
from conftest import run_args

import common
import dpo
import grpo
import kto
import online_dpo
import prm
import sft

ROW = {"prompt": ask("Add 1 and 2."), "completion": say("1 + 2 = 3"), "label": True}
OTHER = {"prompt": ask("Add 7."), "completion": say("7 + 7 = 7 = 7"), "label": False}


def encoded(rows, max_length=64):
    return common.encode_rows("rows", rows, kto.encode_labeled, tokenizer(), max_length)


@pytest.mark.parametrize("tools", [[{"name": "add"}], '[{"name": "add"}]'])
def test_tools_of_a_row_reach_the_template(tools, monkeypatch):
    """As a list or as a JSON string, in every script that encodes rows."""
    shown = "{% if tools %}<|im_start|>{{ tools[0].name }}<|im_end|>{% endif %}"
    monkeypatch.setattr(tokenizer(), "chat_template", shown + tokenizer().chat_template)
    row = ROW | {"answer": "3", "tools": tools}
    pair = {"prompt": row["prompt"], "chosen": say("3"), "rejected": say("4"), "tools": tools}
    steps = {"prompt": row["prompt"], "completions": ["3"], "labels": [True], "tools": tools}
    for example in (*sft.encode_conversation(row, tokenizer(), 99), *encoded([row, pair]),
                    dpo.encode_pair(pair, tokenizer(), 99),
                    *(script.encode_row(row, tokenizer(), 99, 9, True)
                      for script in (online_dpo, grpo)),
                    prm.encode_solution(steps, tokenizer(), 99, False)):
        text = tokenizer().decode(example["prompt"])
        assert text.startswith("<|im_start|>add<|im_end|><|im_start|>user"), sorted(example)


def test_labels_are_true_and_false_or_1_and_0_as_numbers_or_words(capsys):
    """Words come from .csv files. Rows with any other label, or an empty column, are dropped."""
    for label in 0, 1, "0", "1", "true", "False", False:
        assert encoded([ROW | {"label": label}])[0]["label"] == (label in (1, "1", "true"))
    bad = [{"label": label} for label in (None, 0.5, 2, -1, "yes", "", [True], {"a": True})]
    for part in *bad, {"prompt": None}, {"completion": ""}, {"completion": None}:
        capsys.readouterr()
        assert len(encoded([ROW, ROW | part])) == 1, part
        assert "first is row 2: no prompt, completion and label (true" in capsys.readouterr().out


def test_an_answer_after_any_prompt_is_truncated_as_everything_is():
    """The prompt keeps its end, at least half of the room, and the answer its start."""
    long, short = encoded([ROW | {"prompt": ask("Add 1 and 2. " * 9)}, OTHER], 1000)
    for answer, asked in (long, long), (short, long), (long, short):
        example = answer | {"prompt": asked["prompt"], "head": 3}
        prompt, ids = asked["prompt"], [token for part, _ in answer["answer"] for token in part]
        length = len(prompt) + len(ids)
        for room in range(8, length + 2):
            tokens = kto.tokens_of(example, SimpleNamespace(max_length=room), tokenizer())
            kept = tokens["loss_mask"].index(1)
            expected = prompt[:3] + prompt[len(prompt) - kept + 3:] + ids
            assert tokens["input_ids"] == expected[:room], f"--max-length {room}"
            assert kept == len(prompt) or kept >= room // 2 and len(tokens["input_ids"]) == room
    huge, args = long | {"prompt": long["prompt"] * 200}, SimpleNamespace(max_length=10**6)
    tokens = kto.tokens_of(huge, args, tokenizer())
    assert len(tokens["input_ids"]) == tokenizer().model_max_length, "longer than the context"


# ---- the steps of kto.py ------------------------------------------------------------------------

def plan(good, bad, size, **flags):
    labels = [i % (good + bad) < good for i in range(good + bad)]
    flags = {"max_steps": 40, "epochs": 7} | flags
    return labels, kto.plan_batches(labels, run_args(kto, batch_size=size, **flags))


@pytest.mark.parametrize("good, bad, size", [
    (1, 50, 32), (50, 1, 32), (3, 100, 16), (7, 7, 2), (1, 1, 8), (40, 60, 10), (5, 2, 100)])
def test_each_step_has_both_labels_in_their_share(good, bad, size):
    """As close as whole numbers allow, and at least one of each."""
    labels, batches = plan(good, bad, size)
    size = min(size, good + bad)
    assert batches.shape == (min(40, math.ceil(7 * (good + bad) / size)), size)
    for batch in batches.tolist():
        desirable, exact = sum(labels[i] for i in batch), size * good / (good + bad)
        assert 1 <= desirable <= size - 1, "a step has only one label"
        assert abs(desirable - exact) <= 0.5 or desirable in (1, size - 1)


def test_each_label_has_an_order_of_its_own_that_follows_from_the_seed():
    """Each answer with a label comes once before any comes again, in a new order each time."""
    labels, batches = plan(10, 20, 6, epochs=4)
    assert set(Counter(batches.flatten().tolist()).values()) == {4}
    good = [i for i in batches.flatten().tolist() if labels[i]]
    rounds = [good[i:i + 10] for i in range(0, 40, 10)]
    assert all(sorted(order) == list(range(10)) for order in rounds)
    assert len({tuple(order) for order in [*rounds, range(10)]}) == 5, "an order repeats"
    assert torch.equal(batches, plan(10, 20, 6, epochs=4)[1])
    assert not torch.equal(batches, plan(10, 20, 6, epochs=4, seed=1)[1])


def test_a_line_says_where_one_label_outweighs_the_other_and_what_mends_it(capsys):
    """Nothing is printed within [1, 3/2], or with the weight that the line recommends."""
    def said(good, bad, desirable=1.0, undesirable=1.0):
        plan(good, bad, 10**6, desirable_weight=desirable, undesirable_weight=undesirable)
        return capsys.readouterr().out

    assert said(5, 5) == said(3, 2) == said(1, 3, 3.0) == said(3, 1, 1.0, 2.0) == ""
    for case in (4, 5), (46, 30), (1, 50), (50, 1), (5, 5, 0.9), (5, 5, 1.6), (7, 90, 1.7, 0.3):
        good, bad, desirable, undesirable = (*case, 1.0, 1.0)[:4]
        line, ratio = said(*case), good * desirable / (bad * undesirable)
        assert f"n_D λ_D / (n_U λ_U) is {ratio:.3g} " in line, case
        assert said(good, bad, float(line.split("--desirable-weight ")[1]), undesirable) == ""


@pytest.mark.parametrize("module, flags, rows, held_out, words", [
    (kto, {}, [ROW] * 2, [ROW, OTHER], "all answers to train on have the same label"),
    (kto, {}, [ROW, OTHER], [OTHER] * 2, "all answers held out have the same label"),
    (online_dpo, {"mixture": 1.5}, [ROW], [OTHER], "--mixture: 1.5 is not between 0 and 1"),
    (online_dpo, {"beta": 0}, [ROW], [OTHER], "--beta")])
def test_data_of_one_label_only_and_bad_flags_are_refused_before_a_model_is_loaded(
        module, flags, rows, held_out, words, tmp_path, refused, monkeypatch):
    monkeypatch.setattr(common, "load_model", lambda *args: pytest.fail("the model was loaded"))
    assert words in refused(by_hand.Run, module, tmp_path, rows, held_out, **flags)
