"""The shared functions around an answer: its number, its reward, and the row of its prompt.

Functions of the same name are identical in all scripts; those of grpo.py are tested here.
"""
import functools
from decimal import Decimal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import common
import grpo

# ---- numbers -------------------------------------------------------------------------------------

@pytest.mark.parametrize("text, answer, score", [
    ("36 - 25 = 11", "11", 1), ("11 cups", "11", 1), ("11.", "11", 1), ("11", "12", 0),
    ("11", 11, 1), ("", "0", 0), ("none", "none", 0), ("so 1,234.50", "1234.5", 1),
    ("$1,234,567", "1234567", 1), ("3.0", "3", 1), ("-3", "3", 0), ("x = -3", "-3", 1),
    ("x=−3", "-3", 1), ("7-3", "3", 1), ("(5)-3", "3", 1), ("GPT-3", "3", 1), ("50%", "50", 1),
    ("**7**", "7", 1), ("1.21", "21", 0), ("210", "21", 0), ("first 3, then 21", "21", 1),
    ("21 is less than 22", "21", 0), ("5", "2 + 3 = 5\n#### 5", 1), ("6", "#### 5", 0),
    (r"12, so \boxed{7}", "7", 1), (r"\boxed{(1, 2)}", "(1, 2)", 0), ("(1, 2345)", "(1,2345)", 0),
    ("4", r"\frac{3}{4}", 0), ("-$5", "$-5", 1), ("$5", "-$5", 0), ("it is -$1,000.", "-1000", 1),
    ("it costs $.50", "0.5", 1), ("9" * 5000, "9" * 5000, 1), ("½ ² ٣", "3", 1)])
def test_correct_answer_compares_the_last_numbers(text, answer, score):
    assert grpo.correct_answer(None, [text], answer=[answer], other=["x"]) == [score]


@given(st.text(max_size=9), st.decimals(-10**7, 10**7, places=2) | st.integers(-10**9, 10**9),
       st.booleans(), st.text(st.characters(exclude_categories=["N"], exclude_characters=".,")))
@settings(deadline=None, derandomize=True)
def test_the_last_number_is_found_in_any_text(before, number, commas, after):
    """With any text before it and any text without digits after it, with commas or without."""
    text = f"{number:,}" if commas else f"{number}"
    assert grpo.last_number(f"{before} {text}{after}") == Decimal(str(number))


@given(st.text(max_size=9) | st.text("0123456789.,-()[]{}\\$%/ xe−", max_size=12))
@settings(deadline=None, derandomize=True, max_examples=200)
def test_a_correct_answer_is_correct_in_any_wrapping(answer):
    """Any text gets a score, and a box around the correct answer changes nothing."""
    has_number = float(grpo.plain_number(answer) is not None)
    for said in (answer, rf"\boxed{{{answer}}}", f"It is: {answer}, I think."):
        assert grpo.correct_answer(None, [said], [answer]) == [has_number], said


# ---- rows ----------------------------------------------------------------------------------------

def test_rows_that_cannot_be_used_are_dropped_and_counted(capsys):
    """Rows without a number are dropped only for correct_answer. GSM8K's prompt is `question`."""
    tokenizer = common.load_tokenizer("tiny/chat")
    rows = [{"prompt": "1 + 1 =", "answer": "2"}, {"prompt": "x", "answer": None}, {"prompt": "x"},
            {"prompt": "y", "answer": "many"}, {"prompt": "", "answer": "2"}, {"prompt": 5},
            {"question": "What is 3?", "answer": "1 + 2 = 3\n#### 3"},
            {"prompt": "word " * 40, "answer": "2"}]
    encode = functools.partial(grpo.encode_row, max_new_tokens=8)
    strict, free = (common.encode_rows("rows", rows, functools.partial(encode, needs_answer=needs),
                                       tokenizer, 40) for needs in (True, False))
    report = "8 rows, 2 examples; 6 rows cannot be used, the first is row 2"
    assert report in capsys.readouterr().out
    chat = [{"role": "user", "content": "What is 3?"}]
    assert [x["row"]["prompt"] for x in strict] == ["1 + 1 =", chat]
    assert strict[1]["prompt"] == common.encode_prompt(tokenizer, chat)
    assert len(free) == 6 and free[4]["row"]["prompt"] == "5"
