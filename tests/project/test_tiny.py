"""The tiny data: labels agree with the answers, and no held-out question is trained on."""
import itertools
import json
import random
import re
import sys
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

import agent

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tiny"))
import make  # noqa: E402

STEPS = ["steps_train", "steps_sft_train", "steps_heldout", "steps_sft_heldout",
         "steps_prompt_heldout"]


def rows(name):
    text = (ROOT / f"tiny/data/{name}.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


def question(row):
    return row.get("prompt", row.get("messages"))[0]["content"]


def asked(row):
    """What a row asks: its two numbers in ascending order, and whether they are added."""
    numbers = sorted(int(number) for number in re.findall(r"\d+", question(row)))
    return *numbers, any(word in question(row) for word in ("+", "Add", "gets"))


def truth(row):
    small, large, is_sum = asked(row)
    return small + large if is_sum else large - small


def addends(row):
    """The numbers of a long sum, in the order of the question."""
    assert re.fullmatch(r"What is \d+( \+ \d+)+\?|Add \d+(, \d+)+ and \d+\.", question(row))
    return [int(number) for number in re.findall(r"\d+", question(row))]


def partial_sums(numbers):
    """The lines of a correct solution."""
    return [f"{sum(numbers[:i])} + {numbers[i]} = {sum(numbers[:i + 1])}"
            for i in range(1, len(numbers))]


@pytest.mark.parametrize("kind", ["sft", "preference", "prompt"])
def test_held_out_questions_are_in_no_training_file(kind):
    names = [f"{name}_train" for name in ("sft", "preference", "prompt")]
    trained = {asked(row) for name in names for row in rows(name)}
    held_out = {asked(row) for row in rows(f"{kind}_heldout")}
    assert len(held_out) > 250 and len(trained) > 2000 and not trained & held_out


def test_chosen_answers_are_correct_and_rejected_ones_wrong():
    for row in rows("preference_train") + rows("preference_heldout"):
        chosen, rejected = (row[side][0]["content"].split()[-1] for side in ("chosen", "rejected"))
        assert int(chosen) == truth(row) != int(rejected)
    for row in rows("prompt_heldout") + rows("prompt_train"):
        assert int(row["answer"]) == truth(row)


def test_a_step_is_correct_if_it_and_all_before_it_are_partial_sums():
    labels = []
    for row in rows("steps_train") + rows("steps_heldout"):
        steps, correct = row["completions"], partial_sums(addends(row))
        assert row["labels"] == [steps[:i + 1] == correct[:i + 1] for i in range(len(steps))]
        labels += row["labels"]
    assert 0.5 < sum(labels) / len(labels) < 0.8


def test_solutions_for_sft_are_correct_and_prompts_have_their_sums():
    for row in rows("steps_sft_train") + rows("steps_sft_heldout"):
        assert row["messages"][1]["content"].split("\n") == partial_sums(addends(row))
    for row in rows("steps_prompt_heldout"):
        assert int(row["answer"]) == sum(addends(row))


def test_held_out_long_sums_are_in_no_training_file_in_any_order():
    """No held-out sum of two numbers occurs as a step of a solution in a training file either."""
    asked_in = {name: {tuple(sorted(addends(row))) for row in rows(name)} for name in STEPS}
    trained = asked_in["steps_train"] | asked_in["steps_sft_train"]
    for name in STEPS:
        assert len(asked_in[name]) > (2000 if "train" in name else 250)
        assert "train" in name or not asked_in[name] & trained
    held_out = {asked(row) for row in rows("prompt_heldout")}
    for row in rows("steps_train") + rows("steps_sft_train"):
        steps = row["completions"] if "completions" in row else [row["messages"][1]["content"]]
        for a, b in re.findall(r"(\d+) \+ (\d+) =", "\n".join(steps)):
            assert (*sorted((int(a), int(b))), True) not in held_out


def test_questions_for_a_calculator_have_their_answers_and_are_held_out_in_both_orders():
    """Sums and products of numbers with three digits, about half of each."""
    seen = {}
    for part in ("train", "heldout"):
        found = [(*asked(row), int(row["answer"])) for row in rows(f"tools_{part}")]
        for a, b, is_sum, answer in found:
            assert 100 <= a <= b <= 999 and answer == (a + b if is_sum else a * b)
        assert 0.4 < sum(is_sum for _, _, is_sum, _ in found) / len(found) < 0.6
        seen[part] = {*found}
    assert len(seen["train"]) > 2900 and len(seen["heldout"]) > 290
    assert not seen["train"] & seen["heldout"]


def test_tiny_agent_learned_from_chats_with_the_results_that_agent_py_writes():
    """Errors included. About half of these chats end with the correct number."""
    tools, _ = agent.load_tools(["examples/tools.py:calculator"])
    rng = random.Random(0)
    correct = []
    for s in itertools.islice(make.large_sums(rng, held_out=False), 300):
        chat = make.tool_use(rng, *s)
        correct.append(chat[-1]["content"] == str(make.result(*s)))
        for said, read in zip(chat, chat[1:], strict=False):
            if read["role"] == "tool":
                calls = [json.dumps(call["function"]) for call in said.get("tool_calls", [])]
                call, = calls or agent.find_calls(said["content"])
                result, has_failed = agent.run_call(call, tools, 5.0)
                assert result == read["content"] and has_failed == (not calls)
    assert 0.5 < sum(correct) / len(correct) < 0.6


def test_the_models_have_the_size_that_the_pages_name():
    """tiny/agent has eight tokens more, for the pieces of a call."""
    for name, tokens in ("base", 0), ("chat", 0), ("agent", 8):
        model = AutoModelForCausalLM.from_pretrained(ROOT / "tiny" / name)
        assert sum(p.numel() for p in model.parameters()) == 940_800 + 128 * tokens
