"""`step_ends`, which prm.py, pairs.py and evaluate.py share, and the rows that prm.py refuses.

A step ends at the first token that completes its text. Here that token is found by decoding every
prefix of the ids.
"""
import functools
import random

import pytest
from by_hand import ask
from conftest import ROOT, SHARED
from hypothesis import given
from hypothesis import strategies as st
from test_templates import FAMILIES, QUICK, tokenizer_of
from transformers import AutoTokenizer

import common
import prm

PLAIN = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
PROCESS = functools.partial(prm.encode_solution, outcome=False)
ASK = ask("What is 1 + 2 + 3?")
ROW = {"prompt": ASK, "completions": ["1 + 2 = 3", "3 + 3 = 7"], "labels": [True, False]}
REAL = {"qwen2.5": "tokenizers/Qwen2.5-0.5B-Instruct",
        "smollm2": "tokenizers/SmolLM2-135M-Instruct", "sentencepiece": "models/stories260K"}


@pytest.fixture
def tokenizer():
    """The tokenizer of tiny/chat, whose eos token ends a turn and is not the pad token."""
    return common.load_tokenizer(str(ROOT / "tiny/chat"))


def real_tokenizer(name):
    if not SHARED.is_dir():
        pytest.skip("needs the folder ../shared with real tokenizers")
    return AutoTokenizer.from_pretrained(SHARED / REAL[name])


PARTS = ["words", "2 + 2", " ", "\n", "\n\n", "\t", "\xe9\u4f60\u597d", "\U0001f642", "\u2028",
         "\\n", '"', "{{ x }}", "{% if %}", " .", "Assistant:", "\U0001f469\u200d\U0001f467", "1",
         "'s"]
STEPS = st.lists(st.lists(st.sampled_from(PARTS), min_size=1, max_size=4).map("".join),
                 min_size=1, max_size=5).filter(lambda steps: all(step.strip() for step in steps))


def ends_by_prefixes(tokenizer, ids, steps):
    """For each step, the last token of the shortest prefix that contains all of it."""
    text = tokenizer.decode(ids, **PLAIN)
    prefixes = [tokenizer.decode(ids[:n + 1], **PLAIN) for n in range(len(ids))]
    done, ends = 0, []
    for step in steps:
        done = text.index(step, done) + len(step)
        ends.append(next(n for n, said in enumerate(prefixes) if said[:done] == text[:done]))
    return ends


@pytest.mark.parametrize("read, name", [
    *((tokenizer_of, name) for name in FAMILIES), (real_tokenizer, "qwen2.5"),
    (real_tokenizer, "smollm2")])
def test_a_step_is_read_at_its_last_token_in_every_template(read, name):
    """Steps may contain newlines or each other, and a token may end inside a character.

    The ids are those of the whole conversation. A token such as ".\\n" extends beyond its step.
    """
    tokenizer = read(name)

    @QUICK
    @given(STEPS)
    def check(steps):
        row = {"prompt": ASK, "completions": steps, "labels": [True] * len(steps)}
        example = PROCESS(row, tokenizer, 10**6)
        ids, steps = example["solution"]["input_ids"], [step.strip() for step in steps]
        answer = {"role": "assistant", "content": "\n".join(steps)}
        text = common.render(tokenizer, [*ASK, answer])
        assert ids == tokenizer(text, add_special_tokens=False)["input_ids"][:len(ids)]
        pieces = [tokenizer.decode(example["prompt"], **PLAIN), *steps]
        assert example["solution"]["step_ends"] == ends_by_prefixes(tokenizer, ids, pieces)[1:]

    check()


@pytest.mark.parametrize("name", ["tiny", *REAL])
def test_lines_that_were_sampled_end_where_the_first_prefix_says_them(name, tokenizer):
    """The ids hold cut or unfinished characters, special tokens, empty lines, or no line at all."""
    tokenizer = tokenizer if name == "tiny" else real_tokenizer(name)
    draw = random.Random(0)
    newline = tokenizer("a\nb", add_special_tokens=False)["input_ids"][-2]
    letters = tokenizer("\U0001f642 \u4f60\u597d", add_special_tokens=False)["input_ids"]
    for _ in range(60):
        ids = []
        for _ in range(draw.randrange(1, 12)):
            several = [[draw.randrange(len(tokenizer))], [newline], letters, letters[:-1]]
            ids += draw.choice(several + [[tokenizer.eos_token_id]])
        lines = tokenizer.decode(ids, **PLAIN).split("\n")
        steps = [line.strip() for line in lines if line.strip()]
        assert prm.step_ends(tokenizer, ids, steps) == ends_by_prefixes(tokenizer, ids, steps)


def test_steps_that_repeat_or_contain_each_other_are_told_apart(tokenizer):
    """The search for a step starts where the step before it ends, and may find nothing."""
    steps = ["2", "2", "2 + 2 = 4", "4", "2"]
    ids = tokenizer("\n".join(steps))["input_ids"]
    ends = prm.step_ends(tokenizer, ids, steps)
    assert [tokenizer.decode(ids[i]) for i in ends] == ["2", "2", "4", "4", "2"]
    assert ends == sorted(set(ends)), "a step is found in another line"
    for steps in ["5"], ["4", "2 + 2"], ["2", "2", "2 + 2 = 4", "4", "4"]:
        with pytest.raises(ValueError, match="do not spell the step"):
            prm.step_ends(tokenizer, ids, steps)


# ---- rows ----------------------------------------------------------------------------------------

def test_a_string_as_the_prompt_is_a_question_if_there_is_a_template(tokenizer):
    """Without a template, the solution starts on the line below the prompt."""
    text = ROW | {"prompt": ROW["prompt"][0]["content"]}
    assert PROCESS(text, tokenizer, 512) == PROCESS(ROW, tokenizer, 512)
    tokenizer.chat_template = None
    ids = PROCESS(text, tokenizer, 512)["solution"]["input_ids"]
    assert tokenizer.decode(ids) == "What is 1 + 2 + 3?\n1 + 2 = 3\n3 + 3 = 7<|im_end|>"


def test_blanks_around_a_step_are_no_part_of_it_and_special_tokens_in_it_are_text(tokenizer):
    row = ROW | {"completions": [" 1 + 2 = 3 \n", "\n3\n\n+ 3 = 7\t"]}
    said = tokenizer.decode(PROCESS(row, tokenizer, 512)["solution"]["input_ids"])
    assert said.endswith("assistant\n1 + 2 = 3\n3\n\n+ 3 = 7<|im_end|>")
    row = ROW | {"completions": ["so <|im_end|>", "and <|im_start|>"]}
    solution = PROCESS(row, tokenizer, 512)["solution"]
    ids = solution["input_ids"]
    assert ids.count(tokenizer.eos_token_id) == 2, "a spelled special token became a real one"
    assert [tokenizer.decode(ids[end]) for end in solution["step_ends"]] == [">", ">"]


@pytest.mark.parametrize("change", [
    {"labels": [True]}, {"labels": [True, 0]}, {"labels": [1, 0]}, {"labels": ["true", "false"]},
    {"labels": None}, {"labels": True}, {"labels": [True, False, True]}, {"prompt": ""},
    {"completions": "1 + 2 = 3", "labels": [True]}, {"completions": [], "labels": []},
    {"completions": ["1 + 2 = 3", " "]}, {"completions": ["1 + 2 = 3", 3]},
    {"completions": [ROW["prompt"][0]] * 2}, {"prompt": []}, {"prompt": 0.5}, {"prompt": ["?"]}])
def test_a_row_without_a_label_for_each_step_is_refused(change, tokenizer):
    with pytest.raises(ValueError):
        PROCESS(ROW | change, tokenizer, 512)


def test_a_solution_is_never_truncated(tokenizer):
    length = PROCESS(ROW, tokenizer, 512)["length"]
    assert PROCESS(ROW, tokenizer, length) == PROCESS(ROW, tokenizer, 512)
    with pytest.raises(ValueError, match=f"longer than {length - 1} tokens"):
        PROCESS(ROW, tokenizer, length - 1)
