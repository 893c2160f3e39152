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
import transformers
from conftest import ROOT, encoded, run_args
from test_templates import tokenizer_of

import common
import dpo
import grpo
import kto
import sft

ASKS = """{%- for message in messages -%}{%- set text = message.content -%}
{%- if message.role == "assistant" -%}{%- set text = text.split("</think>")[-1].strip() -%}
{%- endif -%}{{ "<|im_start|>" + message.role + "\\n" + text + "<|im_end|>\\n" }}{%- endfor -%}
{%- if add_generation_prompt -%}{{ "<|im_start|>assistant\\n<think>\\n" }}{%- endif -%}"""


def user(text):
    return {"role": "user", "content": text}


def says(text, **more):
    return {"role": "assistant", "content": text} | more


def tiny_tokenizer(template=None):
    tokenizer = transformers.AutoTokenizer.from_pretrained(ROOT / "tiny/chat")
    tokenizer.chat_template = template or tokenizer.chat_template
    return tokenizer


def texts(tokenizer, pieces):
    """The texts of the pieces, which alternate between context and answers."""
    return [tokenizer.decode(ids) for ids, _ in pieces]


def trained(tokenizer, tokens):
    """The trained tokens of an example, as one text per contiguous part."""
    parts, last = [], 0
    for token, mask in zip(tokens["input_ids"], tokens["loss_mask"], strict=True):
        if mask and not last:
            parts.append([])
        if mask:
            parts[-1].append(token)
        last = mask
    return [tokenizer.decode(part) for part in parts]


def encode_rows(make, rows, tokenizer, max_length=400):
    return common.encode_rows("rows", rows, make, tokenizer, max_length)


# ---- the standard form of a message --------------------------------------------------------------

@pytest.mark.parametrize("message, standard", [
    ({"from": "human", "value": "Hi"}, user("Hi")), ({"from": "gpt", "value": "Hi"}, says("Hi")),
    ({"role": "developer", "content": "Hi"}, {"role": "system", "content": "Hi"}),
    ({"role": "model", "content": "Hi", "weight": 0}, says("Hi")),
    (user([{"type": "text", "text": "a "}, {"type": "text", "text": "b"}]), user("a b")),
    (says(None, tool_calls=[{"function": {"name": "f", "arguments": '{"a": 1}'}}]),
     says("", tool_calls=[{"type": "function", "function": {"name": "f", "arguments": {"a": 1}}}])),
    (says("x", tool_calls=[{"name": "f", "arguments": {}}]), None),
])
def test_messages_are_brought_into_one_form(message, standard):
    made = common.standard_message(message)
    if standard is None:  # the call has no wrapper "function", and gets one
        assert made["tool_calls"][0]["function"]["name"] == "f"
    else:
        assert made == standard
    assert common.standard_message(made) == made


@pytest.mark.parametrize("message, words", [
    ("Hi", "an object with role and content"), ({"role": "narrator", "content": "x"}, "narrator"),
    (user([{"type": "image", "url": "x"}]), "not text"), (user(3), "a string"),
    ({"role": "user"}, "needs content"), (says("", function_call={"name": "f"}), "an object"),
    (says("", tool_calls=[{"function": {"name": "f", "arguments": "[1]"}}]), "must be an object"),
])
def test_a_message_that_no_template_understands_is_refused(message, words):
    with pytest.raises(ValueError, match=words):
        common.standard_message(message)


def test_tools_have_many_forms():
    tool = {"type": "function", "function": {"name": "f"}}
    for tools in (tool, [tool], json.dumps(tool), json.dumps([tool])):
        assert common.standard_tools(tools) == [tool]
    for tools in ("", "[]", "null", None, []):
        assert common.standard_tools(tools) is None


# ---- a row is refused if the template drops a part of it -----------------------------------------

CALL = says("", tool_calls=[{"function": {"name": "add", "arguments": {"a": "one"}}}])
RESULT = {"role": "tool", "content": "3"}
TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {}}}]


@pytest.mark.parametrize("chat, tools, words", [
    ([user("4"), says("4", reasoning_content="four")], None, "reasoning_content of message 2"),
    ([user("4"), says("4", reasoning_content="four"), user("5"), says("5")], None,
     "reasoning_content of message 2"),
    ([user("4"), CALL, RESULT, says("3")], None, r"the tool call of message 2 \(assistant\)"),
    ([user("4"), says("3")], TOOLS, "the tools"),
])
def test_what_a_plain_template_does_not_print_is_refused(chat, tools, words):
    with pytest.raises(ValueError, match=f"does not print (the )?{words}"):
        common.encode(tokenizer_of("chatml"), [], chat, tools)
    if tools or chat[-2] is RESULT:
        with pytest.raises(ValueError, match="does not print"):
            common.encode_prompt(tokenizer_of("chatml"), chat[:-1], tools)


@pytest.mark.parametrize("role", ["system", "user", "tool"])
def test_a_role_that_a_template_ignores_is_refused(role):
    """Even if another message has the same text, because every text is marked before the search."""
    template = tiny_tokenizer().chat_template
    drop = "{% set messages = messages | rejectattr('role', 'equalto', 'ROLE') | list %}"
    tokenizer = tiny_tokenizer(drop.replace("ROLE", role) + template)
    chat = [{"role": role, "content": "4"}, *([] if role == "user" else [user("4")]), says("4")]
    with pytest.raises(ValueError, match=rf"the content of message 1 \({role}\)"):
        common.encode(tokenizer, [], chat)


# ---- which turns are trained ---------------------------------------------------------------------

@pytest.mark.parametrize("skip", [{"weight": 0}, {"train": False}, {"weight": 0.0}])
def test_a_turn_of_weight_0_is_context_and_not_trained(skip):
    tokenizer = tiny_tokenizer()
    chat = [user("1"), says("2", **skip), user("3"), says("4", weight=1)]
    example, = encoded(tokenizer, [], chat)
    read, said = texts(tokenizer, example)
    assert said == "4<|im_end|>" and "assistant\n2<|im_end|>" in read
    chat[3]["weight"] = 0.5
    with pytest.raises(ValueError, match="weight of a message must be 0 or 1"):
        common.encode(tokenizer, [], chat)
    chat[3]["weight"] = 0
    with pytest.raises(ValueError, match="no assistant message to train on"):
        common.encode(tokenizer, [], chat)


@pytest.mark.parametrize("name", ["chatml", "llama3.2", "refuses"])
def test_a_greeting_is_trained_where_the_template_renders_it_alone(name):
    """With another template, it is context."""
    refuse = "{% if messages | length == 1 %}{{ raise_exception('no question') }}{% endif %}"
    tokenizer = tiny_tokenizer(refuse + tiny_tokenizer().chat_template)
    tokenizer = tokenizer if name == "refuses" else tokenizer_of(name)
    example, = encoded(tokenizer, [], [says("Hello!"), user("Hi."), says("Yes?")])
    end = tokenizer.convert_ids_to_tokens(common.end_of_turn_id(tokenizer))
    trained = [tokenizer.decode(ids) for ids, is_answer in example if is_answer]
    assert trained == (["Hello!" + end] if name != "refuses" else []) + ["Yes?" + end]
    assert "Hello!" in "".join(texts(tokenizer, example))


def test_a_template_without_an_end_of_turn_gets_eos():
    """GLM-4 only starts the next turn. Eos then ends an example, so each answer becomes one."""
    template = "{% for m in messages %}{{ '[' + m.role + ']' + m.content }}{% endfor %}"
    tokenizer = tiny_tokenizer(template + "{% if add_generation_prompt %}[assistant]{% endif %}")
    first, second = [encoded(tokenizer, [], [user("1"), says("2"), user("3"), says("4")])[i]
                     for i in (0, 1)]
    assert texts(tokenizer, first) == ["[user]1[assistant]", "2<|im_end|>"]
    assert texts(tokenizer, second) == ["[user]1[assistant]2[user]3[assistant]", "4<|im_end|>"]


# ---- prefills ------------------------------------------------------------------------------------

@pytest.mark.parametrize("template", [None, ASKS])
def test_a_prompt_that_ends_in_the_assistant_is_continued(template):
    """Its text is context. If the prefill opens a thought, the template opens no second one."""
    tokenizer = tiny_tokenizer(template)
    asked = "<|im_start|>user\n4?<|im_end|>\n<|im_start|>assistant\n"
    for prefill in ("Let me see.\n<think>", "<think>\nHm"):
        ids = common.encode_prompt(tokenizer, [user("4?"), says(prefill)])
        assert tokenizer.decode(ids) == asked + prefill
    with pytest.raises(ValueError, match="cannot end in a tool call"):
        common.encode_prompt(tokenizer_of("qwen2.5"), [user("4?"), CALL])


@pytest.mark.parametrize("answer", [" 4.", [says(" 4.")]])
def test_an_answer_to_a_prefill_is_trained_and_the_prefill_is_not(answer):
    """As pairs.py writes such rows. The context is the one that sampling continues."""
    tokenizer, prompt = tiny_tokenizer(), [user("4?"), says("It is")]
    asked = "<|im_start|>user\n4?<|im_end|>\n<|im_start|>assistant\nIt is"
    example, = encoded(tokenizer, prompt, answer)
    assert texts(tokenizer, example) == [asked, " 4.<|im_end|>"]
    assert example[0][0] == common.encode_prompt(tokenizer, prompt)
    pair = dpo.encode_pair({"prompt": prompt, "chosen": answer, "rejected": [says(" 5.")]},
                           tokenizer, 400)
    assert tokenizer.decode(pair["prompt"]) == asked
    assert trained(tokenizer, pair["chosen"]) == [" 4.<|im_end|>"]
    assert trained(tokenizer, pair["rejected"]) == [" 5.<|im_end|>"]
    later = [*([says(answer)] if isinstance(answer, str) else answer), user("5?"), says("Yes.")]
    example, = encoded(tokenizer, prompt, later)
    assert texts(tokenizer, example)[1::2] == [" 4.<|im_end|>", "Yes.<|im_end|>"]
    with pytest.raises(ValueError, match="does not print the prefill as it is"):
        encoded(tiny_tokenizer(ASKS), prompt, answer)  # it opens a thought before the prefill


# ---- strings -------------------------------------------------------------------------------------

def test_bos_and_the_end_of_a_turn_appear_once_in_a_rendered_string():
    tokenizer = tokenizer_of("llama3.2")
    tokenizer._tokenizer.post_processor = transformers.tokenization_utils_tokenizers.processors \
        .TemplateProcessing("<|begin_of_text|> $A", None, [
            ("<|begin_of_text|>", tokenizer.bos_token_id)])
    rendered = tokenizer.apply_chat_template([user("1"), says("2")], tokenize=False)
    plain = tokenizer("2", add_special_tokens=False)["input_ids"]
    for text in (rendered, rendered + "\n", rendered.removeprefix("<|begin_of_text|>")):
        ids = [token for piece, _ in common.encode(tokenizer, "", text)[0] for token in piece]
        assert ids.count(tokenizer.bos_token_id) == 1
        assert ids[-2:] == [*plain, tokenizer.eos_token_id]
    assert common.encode_prompt(tokenizer, rendered).count(tokenizer.bos_token_id) == 1


# ---- truncation ----------------------------------------------------------------------------------

def test_truncation_keeps_the_system_message_and_is_counted(capsys):
    tokenizer = tiny_tokenizer()
    system = {"role": "system", "content": "Be brief."}
    row = {"messages": [system, user("word " * 60 + "which?"), says("that")]}
    example, = encode_rows(sft.encode_conversation, [row], tokenizer, 60)
    text = tokenizer.decode(example["tokens"]["input_ids"])
    assert text.startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n")
    assert text.endswith("which?<|im_end|>\n<|im_start|>assistant\nthat<|im_end|>")
    assert len(example["tokens"]["input_ids"]) == 60
    assert "1 examples; 1 are truncated" in capsys.readouterr().out
    row = {"messages": [system | {"content": "word " * 60}, user("1"), says("that")]}
    with pytest.raises(ValueError, match="system message leaves no room"):
        sft.encode_conversation(row, tokenizer, 60)


# ---- templates of the user -----------------------------------------------------------------------

def test_a_template_file_and_its_arguments_become_part_of_the_template(tmp_path, refused):
    """They are in the saved tokenizer as well, so a saved run is prompted as it was trained."""
    file = tmp_path / "mine.jinja"
    file.write_text(ASKS + "{% if enable_thinking is defined and not enable_thinking %}"
                    "{{ '</think>\\n' + note }}{% endif %}")
    arguments = common.variables('{"enable_thinking": false, "note": "it\'s {} off"}')
    tokenizer = common.load_tokenizer(str(ROOT / "tiny/chat"), str(file), arguments)
    ids = common.encode_prompt(tokenizer, [user("4?")])
    assert tokenizer.decode(ids).endswith("<think>\n</think>\nit's {} off")
    tokenizer.save_pretrained(tmp_path / "run")
    (tmp_path / "run/config.json").write_text((ROOT / "tiny/chat/config.json").read_text())
    assert common.encode_prompt(common.load_tokenizer(str(tmp_path / "run")), [user("4?")]) == ids
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
    ({"problem": "1+1", "solution": "It is 2", "answer": "2"}, "1+1", "It is 2"),
])
def test_usual_names_of_columns_are_known(row, asked, answer):
    tokenizer = tiny_tokenizer()
    example, = encode_rows(sft.encode_conversation, [row], tokenizer)
    expected, = sft.encode_conversation({"messages": [user(asked), says(answer)]}, tokenizer, 400)
    assert example["tokens"] == expected["tokens"]
    system = {"role": "system", "content": "Be brief."}
    example, = encode_rows(sft.encode_conversation, [row | {"system": "Be brief."}], tokenizer)
    chat = {"messages": [system, user(asked), says(answer)]}
    assert example["tokens"] == sft.encode_conversation(chat, tokenizer, 400)[0]["tokens"]
    tokenizer.chat_template = None  # for a base model, the same row becomes plain text
    example, = encode_rows(sft.encode_conversation, [row], tokenizer)
    text = tokenizer.decode(example["tokens"]["input_ids"])
    assert text == f"{asked}\n\n{answer}{tokenizer.eos_token}"


def test_conversations_of_sharegpt_are_read():
    tokenizer = tiny_tokenizer()
    row = {"conversations": [{"from": "system", "value": "Be."}, {"from": "human", "value": "1"},
                             {"from": "gpt", "value": "2"}]}
    chat = {"messages": [{"role": "system", "content": "Be."}, user("1"), says("2")]}
    for other in (row, row | {"conversations": json.dumps(row["conversations"])},
                  {"conversations": row["conversations"][1:], "system": "Be."}):
        example, = encode_rows(sft.encode_conversation, [other], tokenizer)
        assert example == sft.encode_conversation(chat, tokenizer, 400)[0]


def test_a_question_under_any_name_is_the_prompt_of_a_pair():
    """The common start of both answers is not taken for the prompt."""
    tokenizer = tiny_tokenizer()
    row = {"system": "Be.", "question": "A fruit?", "chosen": "The pear.", "rejected": "The stone."}
    pair, = encode_rows(dpo.encode_pair, [row], tokenizer)
    header = ("<|im_start|>system\nBe.<|im_end|>\n<|im_start|>user\nA fruit?<|im_end|>\n"
              "<|im_start|>assistant\n")
    assert tokenizer.decode(pair["prompt"]) == header
    assert trained(tokenizer, pair["chosen"]) == ["The pear.<|im_end|>"]
    row = {"ask": "A fruit?", "chosen": "The pear.", "rejected": "The stone."}
    with pytest.raises(ValueError, match="--columns prompt=ask"):
        dpo.encode_pair(row, tokenizer, 400)
    pair = dpo.encode_pair({"prompt": "1 + 1?", "chosen": [says("2")], "rejected": [says("3")]},
                           tokenizer, 400)
    header = "<|im_start|>user\n1 + 1?<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.decode(pair["prompt"]) == header


@pytest.mark.parametrize("row", [
    {"prompt": [user("1?")], "chosen": [says("a"), user("2?"), says("b")], "rejected": [says("c")]},
    {"chosen": [user("1?"), says("a"), user("2?"), says("b")], "rejected": [user("1?"), says("c")]},
    {"prompt": "1?", "chosen": [says("a"), user("2?"), says("b")], "rejected": [says("c")]},
])
def test_the_column_system_stands_once_before_a_pair(row):
    tokenizer = tiny_tokenizer()
    pair, = encode_rows(dpo.encode_pair, [row | {"system": "Be."}], tokenizer)
    chosen = tokenizer.decode(pair["chosen"]["input_ids"])
    rejected = tokenizer.decode(pair["rejected"]["input_ids"])
    start = "<|im_start|>system\nBe.<|im_end|>\n<|im_start|>user\n1?<|im_end|>\n"
    assert chosen == start + ("<|im_start|>assistant\na<|im_end|>\n<|im_start|>user\n2?<|im_end|>"
                              "\n<|im_start|>assistant\nb<|im_end|>")
    assert rejected == start + "<|im_start|>assistant\nc<|im_end|>"
    assert trained(tokenizer, pair["chosen"]) == ["a<|im_end|>", "b<|im_end|>"]


def test_columns_can_be_named(write_jsonl, refused):
    file = write_jsonl([{"ask": "1", "reply": "2", "prompt": "old"}])
    rows = common.load_rows(file, "train", 9, 0, ["prompt=ask", "completion=reply"])
    assert rows == [{"prompt": "1", "completion": "2"}]
    for wrong in "prompt=nope", "prompt":
        line = refused(common.load_rows, file, "train", 9, 0, [wrong])
        assert "there is no column" in line and f"for --columns {wrong}" in line


def test_a_column_of_the_conversation_that_is_not_used_is_named(capsys):
    tokenizer = tiny_tokenizer()
    row = {"messages": [user("1"), says("2")], "prompt": "1", "chosen": "x", "source": "a b"}
    encode_rows(sft.encode_conversation, [row, row], tokenizer)
    assert capsys.readouterr().out.endswith("columns not used: chosen, prompt\n")
    encode = functools.partial(grpo.encode_row, max_new_tokens=4, needs_answer=True)
    encode_rows(encode, [{"problem": "1", "solution": "1 = 1", "answer": "1"}], tokenizer)
    assert "not used" not in capsys.readouterr().out


# ---- files ---------------------------------------------------------------------------------------

def test_all_file_types_hold_the_same_rows(tmp_path, write_jsonl):
    """All values in .csv and .tsv files are strings, even those that look like numbers or None."""
    content = 'prompt,completion,label\n"Say ""x""",0123,1\nWho é?,None,0\n'
    rows = [{"prompt": 'Say "x"', "completion": "0123", "label": "1"},
            {"prompt": "Who é?", "completion": "None", "label": "0"}]
    (tmp_path / "rows.csv").write_text("\ufeff" + content)
    (tmp_path / "rows.tsv").write_text(content.replace(",", "\t"))
    with gzip.open(tmp_path / "rows.csv.gz", "wt") as file:
        file.write(content)
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "rows.parquet")
    write_jsonl(rows)
    for ending in "csv", "tsv", "csv.gz", "json", "parquet", "jsonl":
        assert common.load_rows(str(tmp_path / f"rows.{ending}"), "train", 1, 0) == rows, ending
    examples = encode_rows(kto.encode_labeled, rows, tiny_tokenizer())
    assert [example["label"] for example in examples] == [True, False]


@pytest.mark.parametrize("name, content, words", [
    ("x.txt", "x", "its name must end in .json"),
    ("x.csv", "prompt,completion\n1,2\na, b,c\n", "row 2 does not have as many cells"),
    ("x.tsv", "prompt\tcompletion\nonly\n", "row 1 does not have as many cells"),
    ("x.jsonl", '{"a": 1}\n{"a": oops}\n', "line 2"),
    ("x.json", "null", "not an object"), ("x.jsonl", "[1, 2]", "not an object")])
def test_a_broken_file_is_refused_with_the_place(tmp_path, refused, name, content, words):
    """For example, an unquoted comma would shift values into the wrong columns."""
    (tmp_path / name).write_text(content)
    assert words in refused(common.load_rows, str(tmp_path / name), "train", 9, 0)


# ---- held-out rows -------------------------------------------------------------------------------

def test_chats_that_begin_alike_are_not_left_out(write_jsonl, capsys):
    """Conversations are compared up to their last answer: a single question by the question."""
    rows = [{"messages": [user("Hello"), says(f"Hi, {i}."), user(f"And {i}?"), says("Yes.")]}
            for i in range(40)]
    args = run_args(sft, dataset=write_jsonl(rows), eval_size=8)
    training, held_out = common.load_examples(args, sft.encode_conversation, tiny_tokenizer(), 99)
    assert (len(training), len(held_out)) == (32, 8)
    assert "32 to train on, 8 held out; 0 left out" in capsys.readouterr().out
    rows = [{"messages": [user(f"Hello {i % 10}"), says(f"Hi, {i}.")]} for i in range(40)]
    args = run_args(sft, dataset=write_jsonl(rows), eval_size=4)
    training, held_out = common.load_examples(args, sft.encode_conversation, tiny_tokenizer(), 99)
    assert not {tuple(x["prompt"]) for x in training} & {tuple(x["prompt"]) for x in held_out}
    assert f"{len(training)} to train on, 4 held out" in capsys.readouterr().out
