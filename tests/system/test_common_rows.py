"""Rows to token ids: texts, conversations, preferences, files, and rows that cannot be used."""
import json
import random
import shutil
from types import SimpleNamespace

import datasets
import pytest
import tokenizers
import torch
import transformers
from chats_helper import talk, texts, tiny_tokenizer
from conftest import ROOT, encoded, encoded_preference, joined, run_args

import common
import dpo

TINY, BASE = str(ROOT / "tiny/chat"), str(ROOT / "tiny/base")


CHAT = talk("S Add.", "U 1 + 1?", "A 2", "U And\n2 + 2?")


def save(folder, tokenizer, model, *files):
    """Saves a tokenizer with the config of an embedded model."""
    tokenizer.save_pretrained(folder)
    for file in ("config.json", *files):
        shutil.copy(f"{model}/{file}", folder)
    return str(folder)


@pytest.fixture(scope="module")
def chat():
    return common.load_tokenizer(TINY)


@pytest.fixture(scope="module")
def llama():
    """As in Llama 2, a text starts with <s> and a space, and merges include the space of a word."""
    story = ["Once upon a time there was a little girl named Lily."] * 20
    model = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token="<unk>"))
    model.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace(prepend_scheme="first")
    model.decoder = tokenizers.decoders.Metaspace(prepend_scheme="first")
    model.train_from_iterator(story, tokenizers.trainers.BpeTrainer(
        vocab_size=100, show_progress=False, special_tokens=["<unk>", "<s>", "</s>"]))
    model.post_processor = tokenizers.processors.TemplateProcessing("<s> $A", None, [("<s>", 1)])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=model, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


# ---- texts ---------------------------------------------------------------------------------------

@pytest.mark.parametrize("prompt, answer, first", [
    ("Once upon a time", " there was", "there"),
    ("Once upon a ti", "me there was", "time"),  # a token that spans the border is the answer's
    ("", "Once upon", "Once"),
])
def test_text_is_tokenized_as_one_and_split_between_tokens(llama, prompt, answer, first):
    """The ids are those of the whole text and eos; the prompt is the prefix that both share."""
    (asked, _), (said, is_answer) = joined(common.encode_text(llama, prompt, answer))
    assert asked + said == llama(prompt + answer)["input_ids"] + [llama.eos_token_id]
    assert asked == llama(prompt)["input_ids"][:len(asked)] and asked[0] == llama.bos_token_id
    assert llama.decode(said[:1]) == first and is_answer
    assert common.encode_prompt(llama, "Once") == llama("Once")["input_ids"]


@pytest.mark.parametrize("ending", ["", "</s>"])
def test_a_text_ends_in_eos_once(llama, ending):
    """A string that already ends in eos keeps one: a reward model reads the last token."""
    (example,) = encoded(llama, "Once upon", " a time" + ending)
    assert example[1][0][-2:] == [llama(" time")["input_ids"][-1], llama.eos_token_id]
    row = {"prompt": "Once", "chosen": " upon" + ending, "rejected": " a" + ending}
    for side in encoded_preference(llama, row):
        assert side[1][0].index(llama.eos_token_id) == len(side[1][0]) - 1
    (example,) = encoded(llama, "Once upon", " a time€")  # <unk> is special, but no end
    assert example[1][0][-2:] == [llama.unk_token_id, llama.eos_token_id]


def test_pad_that_is_eos_does_not_shorten_an_answer(tmp_path, chat):
    """A tokenizer without a pad token pads with eos, but its examples still end in eos."""
    plain = tiny_tokenizer()
    plain.pad_token = None
    padded = common.load_tokenizer(save(tmp_path, plain, TINY))
    assert padded.pad_token_id == padded.eos_token_id != chat.pad_token_id
    for prompt, answer in (("Add 1", " and 2."), (talk("U 1?"), talk("A 1"))):
        assert encoded(padded, prompt, answer) == encoded(chat, prompt, answer)


# ---- conversations -------------------------------------------------------------------------------

def test_only_turns_of_the_answer_are_trained(chat):
    """Answers in the prompt are context; the ids do not depend on where the answer starts."""
    whole = [*CHAT, *talk("A 4", "U Thanks.", "A Bye.")]
    ids = []
    for start, said in ((0, ["2", "4", "Bye."]), (4, ["4", "Bye."]), (6, ["Bye."])):
        (example,) = encoded(chat, whole[:start], whole[start:])
        assert texts(chat, example)[1::2] == [text + "<|im_end|>" for text in said]
        assert [is_answer for _, is_answer in example] == [False, True] * len(said)
        ids.append(sum((ids for ids, _ in example), []))
    assert ids[0] == ids[1] == ids[2]
    # The newline that the template writes after an end of turn belongs to the next prompt.
    assert texts(chat, example)[0].startswith("<|im_start|>system\nAdd.<|im_end|>\n<|im_start|>")
    assert example[0][0] == common.encode_prompt(chat, whole[:6])


def test_messages_need_a_template(llama):
    """A model without a chat template accepts strings but refuses messages."""
    for call in (common.encode_prompt, lambda *args: encoded(*args, talk("A 2"))):
        with pytest.raises(ValueError, match="no chat template for messages: --chat-template"):
            call(llama, CHAT)
    assert common.end_of_turn_id(llama) is None
    for prompt in ("", [], None, 3, {"role": "user"}):
        with pytest.raises(ValueError, match="a prompt must be"):
            common.encode_prompt(llama, prompt)


# ---- preferences ---------------------------------------------------------------------------------

def test_texts_share_their_prompt_as_tokens(llama):
    """Without a prompt column, answers start at the first token that differs."""
    prompt, cat, dog = "Once upon a ti", "me there was a girl", "le was a little girl"
    explicit = encoded_preference(llama, {"prompt": prompt, "chosen": cat, "rejected": dog})
    implicit = encoded_preference(llama, {"chosen": prompt + cat, "rejected": prompt + dog})
    for first, second, text in zip(explicit, implicit, (cat, dog), strict=True):
        whole = llama(prompt + text)["input_ids"] + [llama.eos_token_id]
        assert first[0][0] + first[1][0] == second[0][0] + second[1][0] == whole
        assert texts(llama, second)[0] == "<s> Once upon a"
    assert implicit[0][1][0][0] != implicit[1][1][0][0]


# ---- tokenizers ----------------------------------------------------------------------------------

def test_stop_tokens_come_from_all_three_sources():
    """eos, the template's end of turn, and the tokens in generation_config, of any number."""
    plain = transformers.AutoTokenizer.from_pretrained(BASE)
    eos, end = 0, 2
    for own, expected in ((7, [7]), ([11, 7], [7, 11]), (None, []), (eos, [])):
        generation = SimpleNamespace(eos_token_id=own)
        assert common.stop_token_ids(plain, generation) == sorted([eos, end, *expected])
        assert common.stop_token_ids(plain, generation, template=False) == [eos, *expected]


@pytest.mark.parametrize("template", ["chatml", "qwen2.5"])
def test_a_base_model_ends_answers_with_a_token_it_knows(tmp_path, capsys, template):
    """Only assistant turns change, a line says so, and saving and loading keep the template."""
    plain = transformers.AutoTokenizer.from_pretrained(BASE)
    plain.chat_template = (ROOT / f"tests/system/templates/{template}.jinja").read_text()
    tokenizer = common.load_tokenizer(save(tmp_path, plain, BASE, "generation_config.json"))
    assert "answers end with <|endoftext|>" in capsys.readouterr().out
    assert common.end_of_turn_id(tokenizer) == tokenizer.eos_token_id
    assert common.end_of_turn_id(plain) != plain.eos_token_id
    tricky = "U 'a' \\n {{ x }} {% y %} \"q\" assistant\n"
    for messages in [*CHAT, *talk("A 4")], talk(tricky, "A 4", "U x"), talk(tricky):
        text = plain.apply_chat_template(messages, tokenize=False)
        for turn in (f"<|im_start|>assistant\n{x}" for x in "24"):
            text = text.replace(turn + "<|im_end|>", turn + "<|endoftext|>")
        assert tokenizer.apply_chat_template(messages, tokenize=False) == text
    tokenizer.save_pretrained(tmp_path)
    assert common.load_tokenizer(str(tmp_path)).chat_template == tokenizer.chat_template
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("own", [[2, 0], 2, None])
def test_a_model_that_knows_its_end_of_turn_keeps_its_template(tmp_path, own):
    """If the generation config, which is optional, contains the end of turn, nothing changes."""
    plain = transformers.AutoTokenizer.from_pretrained(BASE)
    if own:
        config = json.dumps({"eos_token_id": own})
        (tmp_path / "generation_config.json").write_text(config)
    loaded = common.load_tokenizer(save(tmp_path, plain, BASE))
    assert (loaded.chat_template == plain.chat_template) == (own is not None)


def test_tokenizers_that_do_not_fit_their_model_are_refused(tmp_path, refused):
    """Without eos, nothing ends an answer; every token that text can become needs an embedding."""
    def load(change):
        tokenizer = tiny_tokenizer()
        change(tokenizer)
        return common.load_tokenizer(save(tmp_path, tokenizer, TINY))

    assert "369" in refused(load, lambda x: x.add_tokens(["newword"]))
    assert "no eos token" in refused(load, lambda x: setattr(x, "eos_token", None))
    load(lambda x: x.add_tokens(["newword"], special_tokens=True))  # no text becomes this token


# ---- files ---------------------------------------------------------------------------------------

def test_keys_that_a_row_lacks_are_absent(write_jsonl):
    """Even if other rows have them, and in messages too: templates test if tool_calls exists."""
    call = {"function": {"name": "add", "arguments": {"a": 1}}}
    rows = [{"messages": [*talk("U Add."), {"role": "assistant", "tool_calls": [call]}], "n": 0},
            {"messages": talk("U 2?", "A "), "tools": []}]
    assert common.load_rows(write_jsonl(rows), "train", 9, 0) == rows


def test_hub_rows_are_a_random_choice(monkeypatch):
    """A name may include a configuration; split, limit and seed determine the rows."""
    asked = []

    def load_dataset(*args, **kwargs):
        asked.append((args, kwargs))
        return datasets.Dataset.from_list([{"n": n} for n in range(50)])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    rows = common.load_rows("openai/gsm8k:main", "test", 20, 0)
    assert asked == [(("openai/gsm8k", "main"), {"split": "test"})]
    assert len({row["n"] for row in rows}) == 20
    assert common.load_rows("trl-lib/x", "train", 20, 0) == rows
    assert asked[1][0] == ("trl-lib/x", None)
    assert common.load_rows("trl-lib/x", "train", 20, 1) != rows
    assert len(common.load_rows("trl-lib/x", "train", 99, 0)) == 50


# ---- rows that cannot be used --------------------------------------------------------------------

def encode(source, rows, max_length=100, tokenizer=None):
    """Encodes rows of messages as a script does."""
    return common.encode_rows(source, rows, lambda row, tokenizer, max_length: {
        "pieces": encoded(tokenizer, [], row["messages"])[0], "max_length": max_length},
        tokenizer or tiny_tokenizer(), max_length)


GOOD = {"messages": talk("U 1?", "A 1")}
BAD = {
    "no column": {}, "no message": {"messages": ["1?"]}, "a number": {"messages": 3},
    "lone surrogate": {"messages": talk("U \ud800", "A 1")},
    "unknown type": {"messages": [*talk("U 1?"), {"role": "assistant", "content": object()}]},
}


@pytest.mark.parametrize("case", BAD)
def test_rows_that_cannot_be_used_are_dropped_and_counted(case, chat, capsys, refused):
    """For any reason. The first is reported with its number; without examples, the run ends."""
    examples = encode("rows.jsonl", [GOOD, BAD[case], GOOD, {}], tokenizer=chat)
    assert len(examples) == 2 and examples[0] == examples[1]
    out = capsys.readouterr().out
    assert "rows.jsonl: 4 rows, 2 examples; 2 rows cannot be used, the first is row 2: " in out
    line = refused(encode, "rows.jsonl", [BAD[case]], tokenizer=chat)
    assert "rows.jsonl: 1 rows, 0 examples; 1 rows cannot be used, the first is row 1: " in line
    assert "none" in refused(encode, "rows.jsonl", [], tokenizer=chat)


def test_a_template_that_raises_drops_the_row_and_not_the_run(capsys):
    """The template's message is reported as the reason."""
    refuse = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    tokenizer = tiny_tokenizer(refuse + tiny_tokenizer().chat_template)
    rows = [GOOD, {"messages": [*CHAT, *talk("A 4")]}]
    assert len(encode("x", rows, tokenizer=tokenizer)) == 1
    assert "the first is row 2: no system" in capsys.readouterr().out


def test_examples_are_at_most_as_long_as_the_model_takes(chat):
    """--max-length is limited by the tokenizer's model_max_length: 512 for the tiny model."""
    assert [x["max_length"] for x in encode("x", [GOOD], 100, chat)] == [100]
    assert [x["max_length"] for x in encode("x", [GOOD], 9999, chat)] == [512]


def test_a_row_may_become_several_examples(chat, capsys):
    """As when a template rewrites earlier turns; the number of such rows is reported."""
    rows = [{"n": n} for n in (1, 3, 2)]
    examples = common.encode_rows("x", rows, lambda row, *_: [row] * row["n"], chat, 9)
    assert [x["n"] for x in examples] == [1, 3, 3, 3, 2, 2]
    assert "x: 3 rows, 6 examples; 2 rows became one example per answer" in capsys.readouterr().out


def test_an_example_is_shown_with_its_trained_tokens_in_green(chat, capsys):
    """Every token once and in order; green exactly where the mask is 1."""
    (example,) = encoded(chat, [], [*CHAT, *talk("A 4 =\n4")])
    ids, mask = [], []
    for piece, is_answer in example:
        ids += piece
        mask += [int(is_answer)] * len(piece)
    common.show(chat, ids, mask, "an example:")
    heading, out = capsys.readouterr().out.split("\n", 1)
    assert heading == "an example:"
    assert out.replace("\033[32m", "").replace("\033[0m", "") == chat.decode(ids) + "\n"
    green = [part.split("\033[0m")[0] for part in out.split("\033[32m")[1:]]
    assert green == ["2<|im_end|>", "4 =\n4<|im_end|>"]


# ---- held out ------------------------------------------------------------------------------------

@pytest.fixture
def hold_out(monkeypatch, chat):
    """Splits given examples as load_examples does without an --eval-dataset."""
    def divide(examples, size, seed):
        monkeypatch.setattr(common, "load_rows", lambda *_: examples)
        args = run_args(dpo, dataset="x", eval_size=size, seed=seed)
        return common.load_examples(args, lambda row, *_: row, chat, 10**6)

    return divide


def test_no_prompt_is_both_trained_on_and_held_out(hold_out):
    """For 30 seeds: no shared prompt, the requested size, at most a fifth, different rows."""
    examples = [{"prompt": [n // 3], "n": n} for n in range(60)]
    seen = set()
    for seed in range(30):
        training, held_out = hold_out(examples, 7, seed)
        prompts = {example["prompt"][0] for example in held_out}
        assert len(held_out) == 7
        assert training == [example for example in examples if example["n"] // 3 not in prompts]
        assert hold_out(examples, 7, seed) == (training, held_out)
        seen |= {example["n"] for example in held_out}
        assert len(hold_out(examples, 999, seed)[1]) == 12
    assert len(seen) > 50


@pytest.mark.parametrize("prompts", [[1], [1, 2, 3, 4], [1] * 20])
def test_too_few_prompts_to_hold_some_out_are_refused(prompts, refused, hold_out):
    """Both parts need at least one row."""
    assert "--eval-dataset" in refused(hold_out, [{"prompt": [n]} for n in prompts], 5, 0)


def test_training_and_held_out_rows_come_from_where_they_should(write_jsonl, chat, refused):
    """The first --eval-size rows of --eval-dataset; without that flag, some rows of --dataset."""
    numbers = random.Random(0).sample(range(100), 30)
    files = [write_jsonl([{"n": n} for n in part], f"{len(part)}.jsonl")
             for part in (numbers[:20], numbers[20:])]

    def load(**flags):
        args = run_args(dpo, dataset=files[0], eval_size=4, **flags)
        return common.load_examples(args, lambda row, *_: {"prompt": [row["n"]]}, chat, 5)

    parts = [[x["prompt"][0] for x in part] for part in load(eval_dataset=files[1])]
    assert parts == [numbers[:20], numbers[20:24]]
    assert [len(part) for part in load()] == [16, 4]
    assert "trained on" in refused(load, eval_dataset=files[0])


def test_without_nones_keeps_false_values():
    """0, "", [] and False stay; None is dropped at any depth."""
    value = {"a": None, "b": [0, "", False, {"c": None, "d": []}], "e": torch.inf}
    assert common.without_nones(value) == {"b": [0, "", False, {"d": []}], "e": torch.inf}
