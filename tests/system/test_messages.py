"""Messages, columns and files as users have them: trained correctly, or refused with the reason.

The inputs are small versions of those in reports by users of training libraries.
"""
import argparse
import functools
import gzip
import json

import pyarrow
import pyarrow.parquet
import pytest
from chats_helper import chatml, encode_rows, talk, texts, tiny_tokenizer, trained
from conftest import ROOT, encoded, run_args
from test_templates import tokenizer_of
from tokenizers.processors import TemplateProcessing

import common
import dpo
import grpo
import kto
import sft

# As in DeepSeek-R1 and Qwen3.5, the header opens a thought, and finished turns lose it.
ASKS = """{%- for message in messages -%}{%- set text = message.content -%}
{%- if message.role == "assistant" -%}{%- set text = text.split("</think>")[-1].strip() -%}
{%- endif -%}{{ "<|im_start|>" + message.role + "\\n" + text + "<|im_end|>\\n" }}{%- endfor -%}
{%- if add_generation_prompt -%}{{ "<|im_start|>assistant\\n<think>\\n" }}{%- endif -%}"""
USER, = talk("U Hi")
SAYS, = talk("A Hi")
TOOL = {"type": "function", "function": {"name": "add", "parameters": {}}}


def calls(function):
    return {"role": "assistant", "content": "", "tool_calls": [function]}


FUNCTION = {"name": "add", "arguments": {"a": "one"}}
CALL = calls({"type": "function", "function": FUNCTION})

# ---- the standard form of a message --------------------------------------------------------------

@pytest.mark.parametrize("message, standard", [
    ({"from": "human", "value": "Hi"}, USER), ({"from": "gpt", "value": "Hi"}, SAYS),
    ({"role": "developer", "content": "Hi"}, {"role": "system", "content": "Hi"}),
    ({"role": "model", "content": "Hi", "weight": 0}, SAYS),
    (USER | {"content": [{"type": "text", "text": "H"}, {"type": "text", "text": "i"}]}, USER),
    (calls({"function": {"name": "add", "arguments": '{"a": "one"}'}}) | {"content": None}, CALL),
    (calls(FUNCTION), calls(FUNCTION | {"type": "function", "function": FUNCTION}))])
def test_messages_are_brought_into_one_form(message, standard):
    assert common.standard_message(message) == standard
    assert common.standard_message(standard) == standard


@pytest.mark.parametrize("message, words", [
    ("Hi", "an object with role and content"), ({"role": "narrator", "content": "x"}, "narrator"),
    (USER | {"content": [{"type": "image", "url": "x"}]}, "not text"),
    (USER | {"content": 3}, "a string"), ({"role": "user"}, "needs content"),
    (SAYS | {"function_call": {"name": "f"}}, "an object"),
    (calls({"function": {"name": "f", "arguments": "[1]"}}), "must be an object")])
def test_a_message_that_no_template_understands_is_refused(message, words):
    with pytest.raises(ValueError, match=words):
        common.standard_message(message)


def test_tools_have_many_forms():
    for tools in (TOOL, [TOOL], json.dumps(TOOL), json.dumps([TOOL])):
        assert common.standard_tools(tools) == [TOOL]
    assert [common.standard_tools(none) for none in ("", "[]", "null", None, [])] == [None] * 5


# ---- a row is refused if the template drops a part of it -----------------------------------------

@pytest.mark.parametrize("chat, tools, words", [
    ([USER, SAYS | {"reasoning_content": "four"}], None, "reasoning_content of message 2"),
    ([USER, SAYS | {"reasoning_content": "four"}, USER, SAYS], None, "reasoning_content of mess"),
    ([USER, CALL, *talk("T 3", "A 3")], None, r"the tool call of message 2 \(assistant\)"),
    ([USER, SAYS], [TOOL], "the tools")])
def test_what_a_plain_template_does_not_print_is_refused(chat, tools, words):
    with pytest.raises(ValueError, match=f"does not print (the )?{words}"):
        common.encode(tokenizer_of("chatml"), [], chat, tools)
    if "tool" in words:
        with pytest.raises(ValueError, match="does not print"):
            common.encode_prompt(tokenizer_of("chatml"), chat[:-1], tools)


@pytest.mark.parametrize("role", ["system", "user", "tool"])
def test_a_role_that_a_template_ignores_is_refused(role):
    """Even if another message has the same text, because every text is marked before the search."""
    drop = f"{{% set messages = messages | rejectattr('role', 'equalto', '{role}') | list %}}"
    chat = [{"role": role, "content": "4"}, *talk("U 4", "A 4")[role == "user":]]
    with pytest.raises(ValueError, match=rf"the content of message 1 \({role}\)"):
        common.encode(tiny_tokenizer(drop + tiny_tokenizer().chat_template), [], chat)


# ---- which turns are trained ---------------------------------------------------------------------

@pytest.mark.parametrize("skip", [{"weight": 0}, {"train": False}, {"weight": 0.0}])
def test_a_turn_of_weight_0_is_context_and_not_trained(skip):
    tokenizer, chat = tiny_tokenizer(), talk("U 1", "A 2", "U 3", "A 4")
    chat[1] |= skip
    example, = encoded(tokenizer, [], chat)
    assert texts(tokenizer, example) == [chatml("U 1", "A 2", "U 3", ask=True), "4<|im_end|>"]
    for weight, words in (0.5, "weight of a message must be 0 or 1"), (0, "no assistant message"):
        with pytest.raises(ValueError, match=words):
            common.encode(tokenizer, [], [*chat[:3], chat[3] | {"weight": weight}])


@pytest.mark.parametrize("name", ["chatml", "llama3.2", "refuses"])
def test_a_greeting_is_trained_where_the_template_renders_it_alone(name):
    """With another template, it is context."""
    refuse = "{% if messages | length == 1 %}{{ raise_exception('no question') }}{% endif %}"
    tokenizer = tiny_tokenizer(refuse + tiny_tokenizer().chat_template)
    tokenizer = tokenizer if name == "refuses" else tokenizer_of(name)
    example, = encoded(tokenizer, [], talk("A Hello!", "U Hi.", "A Yes?"))
    end = tokenizer.convert_ids_to_tokens(common.end_of_turn_id(tokenizer))
    said = [tokenizer.decode(ids) for ids, is_answer in example if is_answer]
    assert said == (["Hello!" + end] if name != "refuses" else []) + ["Yes?" + end]
    assert "Hello!" in "".join(texts(tokenizer, example))


def test_a_template_without_an_end_of_turn_gets_eos():
    """GLM-4 only starts the next turn. Eos then ends an example, so each answer becomes one."""
    template = "{% for m in messages %}{{ '[' + m.role + ']' + m.content }}{% endfor %}"
    tokenizer = tiny_tokenizer(template + "{% if add_generation_prompt %}[assistant]{% endif %}")
    examples = encoded(tokenizer, [], talk("U 1", "A 2", "U 3", "A 4"))
    assert [texts(tokenizer, example) for example in examples] == [
        ["[user]1[assistant]", "2<|im_end|>"],
        ["[user]1[assistant]2[user]3[assistant]", "4<|im_end|>"]]


# ---- prefills ------------------------------------------------------------------------------------

@pytest.mark.parametrize("template", [None, ASKS])
def test_a_prompt_that_ends_in_the_assistant_is_continued(template):
    """Its text is context. If the prefill opens a thought, the template opens no second one."""
    tokenizer = tiny_tokenizer(template)
    for prefill in ("Let me see.\n<think>", "<think>\nHm"):
        ids = common.encode_prompt(tokenizer, talk("U 4?", "A " + prefill))
        assert tokenizer.decode(ids) == chatml("U 4?", ask=True) + prefill
    with pytest.raises(ValueError, match="cannot end in a tool call"):
        common.encode_prompt(tokenizer_of("qwen2.5"), [USER, CALL])


@pytest.mark.parametrize("answer", [" 4.", talk("A  4.")])
def test_an_answer_to_a_prefill_is_trained_and_the_prefill_is_not(answer):
    """As pairs.py writes such rows. The context is the one that sampling continues."""
    tokenizer, prompt = tiny_tokenizer(), talk("U 4?", "A It is")
    asked = chatml("U 4?", ask=True) + "It is"
    example, = encoded(tokenizer, prompt, answer)
    assert texts(tokenizer, example) == [asked, " 4.<|im_end|>"]
    assert example[0][0] == common.encode_prompt(tokenizer, prompt)
    pair = dpo.encode_pair({"prompt": prompt, "chosen": answer, "rejected": talk("A  5.")},
                           tokenizer, 400)
    assert tokenizer.decode(pair["prompt"]) == asked
    assert trained(tokenizer, pair["chosen"]) == [" 4.<|im_end|>"]
    assert trained(tokenizer, pair["rejected"]) == [" 5.<|im_end|>"]
    example, = encoded(tokenizer, prompt, talk("A  4.", "U 5?", "A Yes."))
    assert texts(tokenizer, example)[1::2] == [" 4.<|im_end|>", "Yes.<|im_end|>"]
    with pytest.raises(ValueError, match="does not print the prefill as it is"):
        encoded(tiny_tokenizer(ASKS), prompt, answer)  # it opens a thought before the prefill


# ---- strings, truncation, templates of the user --------------------------------------------------

def test_bos_and_the_end_of_a_turn_appear_once_in_a_rendered_string():
    tokenizer, bos = tokenizer_of("llama3.2"), "<|begin_of_text|>"
    tokenizer._tokenizer.post_processor = TemplateProcessing(
        bos + " $A", None, [(bos, tokenizer.bos_token_id)])
    rendered = tokenizer.apply_chat_template(talk("U 1", "A 2"), tokenize=False)
    plain = tokenizer("2", add_special_tokens=False)["input_ids"]
    for text in (rendered, rendered + "\n", rendered.removeprefix(bos)):
        ids = [token for piece, _ in common.encode(tokenizer, "", text)[0] for token in piece]
        assert ids.count(tokenizer.bos_token_id) == 1
        assert ids[-2:] == [*plain, tokenizer.eos_token_id]
    assert common.encode_prompt(tokenizer, rendered).count(tokenizer.bos_token_id) == 1


def test_truncation_keeps_the_system_message_and_is_counted(capsys):
    tokenizer, long = tiny_tokenizer(), "word " * 60
    row = {"messages": talk("S Be brief.", f"U {long}which?", "A that")}
    example, = encode_rows(sft.encode_conversation, [row], tokenizer, 60)
    text = tokenizer.decode(example["tokens"]["input_ids"])
    assert text.startswith(chatml("S Be brief.") + "<|im_start|>user\n")
    assert text.endswith("which?<|im_end|>\n<|im_start|>assistant\nthat<|im_end|>")
    assert len(example["tokens"]["input_ids"]) == 60
    assert "1 examples; 1 are truncated" in capsys.readouterr().out
    with pytest.raises(ValueError, match="system message leaves no room"):
        sft.encode_conversation({"messages": talk("S " + long, "U 1", "A that")}, tokenizer, 60)


def test_a_template_file_and_its_arguments_become_part_of_the_template(tmp_path, refused):
    """They are in the saved tokenizer as well, so a saved run is prompted as it was trained."""
    file = tmp_path / "mine.jinja"
    file.write_text(ASKS + "{% if enable_thinking is defined and not enable_thinking %}"
                    "{{ '</think>\\n' + note }}{% endif %}")
    arguments = common.variables('{"enable_thinking": false, "note": "it\'s {} off"}')
    tokenizer = common.load_tokenizer(str(ROOT / "tiny/chat"), str(file), arguments)
    ids = common.encode_prompt(tokenizer, [USER])
    assert tokenizer.decode(ids).endswith("<think>\n</think>\nit's {} off")
    tokenizer.save_pretrained(tmp_path / "run")
    (tmp_path / "run/config.json").write_text((ROOT / "tiny/chat/config.json").read_text())
    assert common.encode_prompt(common.load_tokenizer(str(tmp_path / "run")), [USER]) == ids
    assert "none.jinja" in refused(common.load_tokenizer, "tiny/chat", "none.jinja")
    for bad in ("[]", '{"a b": 1}'):
        with pytest.raises(argparse.ArgumentTypeError):
            common.variables(bad)


# ---- columns -------------------------------------------------------------------------------------

@pytest.mark.parametrize("row, asked, answer", [
    ({"question": "2+2?", "answer": "4"}, "2+2?", "4"),
    ({"instruction": "Add", "context": "1, 2", "response": "3"}, "Add\n\n1, 2", "3"),
    ({"instruction": "Add", "input": "1, 2", "output": "3"}, "Add\n\n1, 2", "3"),
    ({"input": "6+6", "output": "12"}, "6+6", "12"),
    ({"query": "3+3?", "response": 6}, "3+3?", "6"),
    ({"problem": "1+1", "solution": "It is 2", "answer": "2"}, "1+1", "It is 2")])
def test_usual_names_of_columns_are_known(row, asked, answer):
    """With a column `system` or without it. For a base model, the same row becomes plain text."""
    tokenizer, lines = tiny_tokenizer(), ["U " + asked, "A " + answer]
    for given, chat in (row, talk(*lines)), (row | {"system": "Be."}, talk("S Be.", *lines)):
        example, = encode_rows(sft.encode_conversation, [given], tokenizer)
        expected, = sft.encode_conversation({"messages": chat}, tokenizer, 400)
        assert example["tokens"] == expected["tokens"]
    tokenizer.chat_template = None
    example, = encode_rows(sft.encode_conversation, [row], tokenizer)
    text = tokenizer.decode(example["tokens"]["input_ids"])
    assert text == f"{asked}\n\n{answer}{tokenizer.eos_token}"


def test_conversations_of_sharegpt_are_read():
    turns = [{"from": "system", "value": "Be."}, {"from": "human", "value": "1"},
             {"from": "gpt", "value": "2"}]
    rows = [{"messages": talk("S Be.", "U 1", "A 2")}, {"conversations": turns},
            {"conversations": json.dumps(turns)}, {"conversations": turns[1:], "system": "Be."}]
    example, *others = encode_rows(sft.encode_conversation, rows)
    assert others == [example] * 3


LONG = talk("A a", "U 2?", "A b")


@pytest.mark.parametrize("row, asked, chosen", [
    ({"system": "Be.", "question": "1?", "chosen": "b c", "rejected": "b d"}, "S Be.", "b c"),
    ({"prompt": "1?", "chosen": talk("A b c"), "rejected": talk("A b d")}, None, "b c"),
    *((row | {"system": "Be."}, "S Be.", None) for row in (
        {"prompt": talk("U 1?"), "chosen": LONG, "rejected": talk("A b d")},
        {"chosen": talk("U 1?") + LONG, "rejected": talk("U 1?", "A b d")},
        {"prompt": "1?", "chosen": LONG, "rejected": talk("A b d")}))])
def test_a_question_under_any_name_is_the_prompt_of_a_pair(row, asked, chosen):
    """With the column `system` once before it. A common start of answers is not the prompt."""
    tokenizer, prompt = tiny_tokenizer(), [asked, "U 1?"] if asked else ["U 1?"]
    pair, = encode_rows(dpo.encode_pair, [row], tokenizer)
    assert tokenizer.decode(pair["prompt"]) == chatml(*prompt, ask=True)
    for side, lines in ("chosen", [f"A {chosen}"] if chosen else ["A a", "U 2?", "A b"]), (
            "rejected", ["A b d"]):
        text = tokenizer.decode(pair[side]["input_ids"])
        assert text == chatml(*prompt, *lines).removesuffix("\n"), side
        assert trained(tokenizer, pair[side]) == [line[2:] + "<|im_end|>" for line in lines
                                                  if line[0] == "A"]


def test_columns_can_be_named(write_jsonl, refused):
    """A pair with a question under a name that is not known asks for it."""
    row = {"ask": "1", "reply": "2", "prompt": "old"}
    rows = common.load_rows(write_jsonl([row]), "train", 9, 0, ["prompt=ask", "completion=reply"])
    assert rows == [{"prompt": "1", "completion": "2"}]
    for wrong in "prompt=nope", "prompt":
        line = refused(common.load_rows, write_jsonl([row]), "train", 9, 0, [wrong])
        assert "there is no column" in line and f"for --columns {wrong}" in line
    with pytest.raises(ValueError, match="--columns prompt=ask"):
        row = {"ask": "A fruit?", "chosen": "The pear.", "rejected": "The stone."}
        dpo.encode_pair(row, tiny_tokenizer(), 400)


def test_a_column_of_the_conversation_that_is_not_used_is_named(capsys):
    row = {"messages": talk("U 1", "A 2"), "prompt": "1", "chosen": "x", "source": "a b"}
    encode_rows(sft.encode_conversation, [row, row])
    assert capsys.readouterr().out.endswith("columns not used: chosen, prompt\n")
    encode = functools.partial(grpo.encode_row, max_new_tokens=4, needs_answer=True)
    encode_rows(encode, [{"problem": "1", "solution": "1 = 1", "answer": "1"}])
    assert "not used" not in capsys.readouterr().out


# ---- files ---------------------------------------------------------------------------------------

def test_all_file_types_hold_the_same_rows(tmp_path, write_jsonl):
    """All values in .csv and .tsv files are strings, even those that look like numbers or None."""
    content = 'prompt,completion,label\n"Say ""x""",0123,1\nWho é?,None,0\n'
    rows = [{"prompt": 'Say "x"', "completion": "0123", "label": "1"},
            {"prompt": "Who é?", "completion": "None", "label": "0"}]
    (tmp_path / "rows.csv").write_text("\ufeff" + content)
    (tmp_path / "rows.tsv").write_text(content.replace(",", "\t"))
    (tmp_path / "rows.csv.gz").write_bytes(gzip.compress(content.encode()))
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "rows.parquet")
    write_jsonl(rows)
    for ending in "csv", "tsv", "csv.gz", "json", "parquet", "jsonl":
        assert common.load_rows(str(tmp_path / f"rows.{ending}"), "train", 1, 0) == rows, ending
    examples = encode_rows(kto.encode_labeled, rows)
    assert [example["label"] for example in examples] == [True, False]


@pytest.mark.parametrize("name, content, words", [
    ("x.txt", "x", "its name must end in .json"),
    ("x.csv", "prompt,completion\n1,2\na, b,c\n", "row 2 does not have as many cells"),
    ("x.tsv", "prompt\tcompletion\nonly\n", "row 1 does not have as many cells"),
    ("x.jsonl", '{"a": 1}\n{"a": oops}\n', "line 2"),
    pytest.param("x.json", "[" * 100_000 + "]" * 100_000, "reading", id="nested too deeply"),
    ("x.json", "null", "not an object"), ("x.jsonl", "[1, 2]", "not an object")])
def test_a_broken_file_is_refused_with_the_place(tmp_path, refused, name, content, words):
    """For example, an unquoted comma would shift values into the wrong columns."""
    (tmp_path / name).write_text(content)
    assert words in refused(common.load_rows, str(tmp_path / name), "train", 9, 0)


# ---- held-out rows -------------------------------------------------------------------------------

def test_chats_that_begin_alike_are_not_left_out(write_jsonl, capsys):
    """Conversations are compared up to their last answer: a single question by the question."""
    def divide(*lines, size):
        rows = [{"messages": talk(*(x.format(i, i % 10) for x in lines))} for i in range(40)]
        args = run_args(sft, dataset=write_jsonl(rows), eval_size=size)
        return common.load_examples(args, sft.encode_conversation, tiny_tokenizer(), 99)

    training, held_out = divide("U Hello", "A Hi, {0}.", "U And {0}?", "A Yes.", size=8)
    assert (len(training), len(held_out)) == (32, 8)
    assert "32 to train on, 8 held out; 0 left out" in capsys.readouterr().out
    training, held_out = divide("U Hello {1}", "A Hi, {0}.", size=4)
    assert not {tuple(x["prompt"]) for x in training} & {tuple(x["prompt"]) for x in held_out}
    assert f"{len(training)} to train on, 4 held out" in capsys.readouterr().out
