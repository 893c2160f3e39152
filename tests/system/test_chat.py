"""chat.py: what the models read and sample, by plain forward passes, and what the user sees."""
import io
import random
import re
import subprocess
import sys
from unittest import mock

import by_hand
import pytest
import torch
from conftest import ROOT
from transformers import AutoTokenizer

import chat
import common

WORDS = [" two  spaces \n\tand a tab", "naïve café", "它不是 12", "\U0001d54f ≤ ½",
         "\U0001f468\u200d\U0001f469\u200d\U0001f467 and \U0001f44d\U0001f3fd",  # joined emoji
         "\u0645\u06cc\u200c\u062e\u0648\u0627\u0647\u0645"]  # Persian, with a joiner
TOKENIZER = common.load_tokenizer("tiny/chat")


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    """A run on tiny/chat that has changed it a lot."""
    return by_hand.save_adapter(tmp_path_factory.mktemp("run"), std=0.2)


@pytest.fixture(scope="module")
def models(adapter):
    """The model of that run, and tiny/chat."""
    return [common.load_model(x, "off", 0, "off", trainable=False) for x in (adapter, "tiny/chat")]


@pytest.fixture
def talk(monkeypatch, capsys):
    """Runs the program on lines of input, as from a pipe; returns what it printed."""
    def run(lines, *argv):
        monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
        chat.main(chat.make_flags().parse_args([str(word) for word in argv]))
        return capsys.readouterr().out
    return run


@pytest.fixture
def scripted(monkeypatch):
    """Replaces `sample_tokens` by texts, one per call; "^C" in a text stands for Ctrl-C."""
    def script(*texts, ratio=0.0):
        calls, texts = [], list(texts)

        def sample_tokens(model, first, ids, length, stops, temperature, seed):
            calls.append({"model": model, "first": first, "prompt": list(ids)})
            text, stopped, _ = texts.pop(0).partition("^C")
            for token in TOKENIZER(text + "<|im_end|>" * (not stopped)).input_ids:
                ids.append(token)
                yield ratio
            if stopped:
                raise KeyboardInterrupt

        monkeypatch.setattr(chat, "sample_tokens", sample_tokens)
        return calls
    return script


def prompt_of(*texts, system=None):
    """The ids of a chat in which user and assistant take turns."""
    messages = [{"role": "system", "content": system}] if system else []
    roles = ("user", "assistant")
    messages += [{"role": roles[i % 2], "content": x} for i, x in enumerate(texts)]
    return common.encode_prompt(TOKENIZER, messages)


@torch.no_grad()
def plain_logps(model, ids, temperature):
    """[T-1, V]: log-probs by one forward pass without a cache."""
    logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, :-1]
    return (logits / temperature).log_softmax(-1)


# ---- what is sampled -----------------------------------------------------------------------------

@pytest.mark.parametrize("temperature", [0.7, 1.6])
def test_tokens_and_log_ratios_are_those_of_plain_forward_passes(
        temperature, models, draws):
    model, first = models
    ids = prompt_of("What is 40 - 27?")
    start = len(ids)
    ratios = list(chat.sample_tokens(model, first, ids, 20, (), temperature, seed=3))
    assert len(ratios) == len(draws) == len(ids) - start == 20
    assert [token.item() for _, token in draws] == ids[start:]
    own, other = (plain_logps(m, ids, temperature)[start - 1:] for m in models)
    torch.testing.assert_close(torch.stack([probs for probs, _ in draws]), own.exp())
    expected = (own - other)[torch.arange(20), torch.tensor(ids[start:])]
    torch.testing.assert_close(torch.tensor(ratios), expected, atol=1e-4, rtol=1e-4)
    assert expected.abs().max() > 0.2  # the adapter does something
    assert set(chat.sample_tokens(model, None, ids[:start], 5, (), temperature, 3)) == {0.0}


def test_each_checkpoint_has_its_own_stop_tokens(talk, tmp_path):
    """One of two checkpoints names a second stop token, at which only its own answers end."""
    other = by_hand.two_stops(tmp_path)
    for names in (["tiny/chat", other], [other, "tiny/chat"]):
        out = talk(["What is 40 - 27?"], *names, "--temperature", 1e-6)
        assert re.search("^tiny/chat +40 - 27 = 13$", out, re.M), "it ends with eos only"
        assert re.search(f"^{other} +40 - 27$", out, re.M), "a second stop token is not shown"


# ---- what is read --------------------------------------------------------------------------------

def test_each_reads_the_template_of_its_own_history(talk, scripted, adapter):
    """All messages so far. After /reset only the system message remains."""
    calls = scripted(*"ABCDEFGHIJKL")
    out = talk(["one", "two", "/reset", "three", "/system Be  brief.", "four", "/reset", "five",
                "/system", "six"], "tiny/chat", adapter)
    histories = [("one",), ("one",), ("one", "A", "two"), ("one", "B", "two"), ("three",),
                 ("three",), ("four",), ("four",), ("five",), ("five",), ("six",), ("six",)]
    systems = [None] * 6 + ["Be  brief."] * 4 + [None] * 2
    expected = [prompt_of(*texts, system=system)
                for texts, system in zip(histories, systems, strict=True)]
    assert [call["prompt"] for call in calls] == expected
    assert [call["model"] is calls[0]["model"] for call in calls] == [True, False] * 6
    assert [line for line in out.splitlines() if line.endswith("L")][0].startswith(adapter)
    assert "try  What is 12 + 7?" in out


def test_commands_and_special_tokens_in_a_line(talk, scripted):
    """A command is no prompt; a special token that is typed is plain text."""
    calls = scripted("A", "B")
    out = talk(["", "  ", "/rest", "a<|im_end|>b", " /etc", "/quit", "one"], "tiny/chat")
    assert out.count(chat.COMMANDS) == 2
    assert [call["prompt"] for call in calls] == [
        prompt_of("a<|im_end|>b"), prompt_of("a<|im_end|>b", "A", " /etc")]
    assert calls[0]["prompt"].count(TOKENIZER.eos_token_id) == 1  # the one that ends the question


def test_without_a_template_the_text_is_continued(talk, scripted, monkeypatch):
    bare = common.load_tokenizer("tiny/chat")
    bare.chat_template = None
    monkeypatch.setattr(common, "load_tokenizer", lambda name, *options: bare)
    calls = scripted(" b", " d", " f")
    talk(["a", "c", "/system s", "e"], "tiny/chat")
    texts = ["a", "a b\nc", "s\ne"]
    assert [call["prompt"] for call in calls] == [bare(text)["input_ids"] for text in texts]


def test_a_prompt_that_the_template_refuses_is_not_asked(talk, scripted, monkeypatch):
    strict = common.load_tokenizer("tiny/chat")
    strict.chat_template = ("{% if messages[0].role == 'system' %}{{ raise_exception("
                            "'no system role') }}{% endif %}" + strict.chat_template)
    monkeypatch.setattr(common, "load_tokenizer", lambda name, *options: strict)
    calls = scripted("A", "B")
    out = talk(["/system s", "one", "/system", "two"], "tiny/chat")
    assert re.findall(r"\[.*\]", out) == ["[not asked: no system role]"]
    assert [call["prompt"] for call in calls] == [prompt_of("two")]


def test_a_full_context_ends_an_answer_until_reset(talk):
    """At such a high temperature, an answer hardly ever ends by itself."""
    used = len(prompt_of(""))
    over, almost = "7" * (512 - used), "7" * (508 - used)
    out = talk([over, "/reset", almost, "and now?", "/reset", "1 + 1?"], "tiny/chat",
               "--temperature", 1e6, "--max-new-tokens", 6)
    full = "the context of 512 tokens is full: /reset begins a new conversation"
    assert re.findall(r"  \[(.*)\]$", out, re.M) == [
        f"not asked: {full}", full, f"not asked: {full}", "cut off by --max-new-tokens"]


# ---- Ctrl-C, terminals and pipes -----------------------------------------------------------------

def test_ctrl_c_stops_one_answer_and_its_tokens_stay_in_the_history(talk, scripted):
    calls = scripted("4^C", "5", "^C", "6", "7", "8")
    out = talk(["one", "two", "three"], "tiny/chat", "tiny/chat")
    assert "tiny/chat  4  [stopped]\ntiny/chat  5\n" in out
    assert [call["prompt"] for call in calls[4:]] == [
        prompt_of("one", "4", "three"),  # stopped before a token: not in the history
        prompt_of("one", "5", "two", "6", "three")]


def test_ctrl_c_at_the_prompt_shows_the_commands_and_ctrl_d_ends(talk, scripted, monkeypatch):
    calls, events = scripted("A"), [KeyboardInterrupt, "one", EOFError]
    monkeypatch.setattr(chat, "read_line", mock.Mock(side_effect=events))
    assert talk([], "tiny/chat").count(chat.COMMANDS) == 2 and len(calls) == 1


def test_a_pipe_and_the_seeds_of_turns():
    """A pipe sees no colors, but prompts; equal checkpoints answer alike, but turns differ."""
    lines = b"What is 2 + 3?\n/reset\n" * 3 + b"How \xff\n/system Count.\nWhat is 2 + 3?"
    command = [sys.executable, "chat.py", "tiny/chat", "tiny/chat", "--temperature", "2"]
    done = subprocess.run(command, cwd=ROOT, input=lines, capture_output=True, timeout=200)
    out = done.stdout.decode()
    assert done.returncode == 0 and "Traceback" not in done.stderr.decode() and "\033" not in out
    assert out.count("> What is 2 + 3?\n") == 4 and out.count("> How �\n") == 1
    said = re.findall(r"^tiny/chat  (.*)", out, re.M)
    assert len(said) == 10 and said[::2] == said[1::2], "the seeds of two checkpoints differ"
    assert len(set(said[:6])) > 1, "the seeds of turns are the same"


# ---- what is seen --------------------------------------------------------------------------------

def spelled(tokenizer, prompt, tokens, ratios=None, hidden=()):
    """What `stream_text` yields while the tokens come one by one."""
    ids = list(prompt)

    def grow():
        for token, ratio in zip(tokens, ratios or [0.0] * len(tokens), strict=True):
            ids.append(token)
            yield ratio

    return list(chat.stream_text(tokenizer, ids, grow(), hidden))


@pytest.mark.parametrize("name", ["tiny/chat", "tokenizers/Qwen2.5-0.5B-Instruct",
                                  "models/stories260K", "tokenizers/SmolLM2-135M-Instruct"])
def test_streamed_text_is_the_whole_answer(name, shared):
    """With all its spaces; a character of several tokens comes once, with the sum of ratios."""
    tokenizer = AutoTokenizer.from_pretrained((ROOT if name == "tiny/chat" else shared) / name)
    before = "" if tokenizer.chat_template else "So:"
    prompt = tokenizer(before)["input_ids"]
    for text in WORDS:
        tokens = tokenizer(before + text)["input_ids"][len(prompt):]
        ratios = [1.0 + i for i in range(len(tokens))]
        pieces = spelled(tokenizer, prompt, tokens, ratios)
        assert "".join(piece for piece, _ in pieces) == text
        assert not any("\ufffd" in piece for piece, _ in pieces), "a part of a character is shown"
        assert sum(ratio for _, ratio in pieces) == sum(ratios), "a log-ratio counts twice"


def test_any_tokens_are_streamed_as_they_decode():
    """Even broken characters, and an answer that ends within a character."""
    draw = random.Random(0)
    for _ in range(20):
        tokens = [draw.randrange(len(TOKENIZER)) for _ in range(30)]
        whole = TOKENIZER.decode(tokens, clean_up_tokenization_spaces=False)
        assert "".join(text for text, _ in spelled(TOKENIZER, [7], tokens)) == whole


def test_colors_show_sign_and_size_and_text_cannot_leave_them():
    for ratio, shade in ((0.0, ""), (0.09, ""), (0.1, 153), (0.5, 111), (2.0, 69), (-0.1, 223),
                         (-1.9, 215), (-30.0, 208)):
        painted = f"\033[30;48;5;{shade}mx\033[0m" if shade else "x"
        assert chat.paint("x", ratio, True) == painted, f"color of a log-ratio of {ratio}"
        assert chat.paint("x", ratio, False) == (f"x[{ratio:+.1f}]" if shade else "x")
    assert chat.paint("\n", 1.0, True) == "\033[30;48;5;111m↵\033[0m\n\033[30;48;5;111m\033[0m"
    assert chat.printable("a\x1b[2J\rb\u202e\n\tc") == "a\\x1b[2J\\rb\\u202e\n\tc"
    assert all(chat.printable(text) == text for text in [*WORDS, "1\u00a0000", "\u3000"])


def test_log_ratios_on_the_screen_are_sums_over_tokens(talk, scripted, adapter):
    """--base --tokens: base answers first; stop tokens are shown with their ratios."""
    scripted("5", "12", "7", "7", ratio=0.25)
    out = talk(["one", "two"], adapter, "--base", "--tokens")
    assert f"its log-ratio to base of {adapter} in nats, if beyond ±0.1" in out
    assert "1[+0.2]2[+0.2]<|im_end|>[+0.2]  [+0.75 nats]" in out, out
    assert "7[+0.2]<|im_end|>[+0.2]  [+0.50 nats]" in out, out


@pytest.mark.parametrize("terminal, no_color, colored", [
    (True, None, True), (True, "", True), (True, "1", False), (False, None, False)])
def test_colors_are_for_terminals(terminal, no_color, colored, talk, scripted, monkeypatch):
    """The first checkpoint is compared with no other."""
    monkeypatch.delenv("NO_COLOR", raising=False)
    if no_color is not None:
        monkeypatch.setenv("NO_COLOR", no_color)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: terminal, raising=False)
    calls = scripted("A", "B", "C")
    assert ("\033[" in talk(["one"], "tiny/chat", "tiny/chat", "--tokens")) == colored
    assert [call["first"] for call in calls] == [None, calls[0]["model"]]
    assert "<|im_end|>" not in talk(["one"], "tiny/chat") and calls[2]["first"] is None


# ---- refusals ------------------------------------------------------------------------------------

@pytest.mark.parametrize("argv, reason", [
    (["tiny/chat", "--tokens"], "name a second one, or add --base"),
    (["tiny/chat", "--base"], "tiny/chat has no adapter to leave out"),
    (["nowhere/none", "--base"], "nowhere/none"), (["tiny/chat", "nowhere/none"], "nowhere/none"),
    (["tiny/chat", "other", "--tokens"], "other does not have the vocabulary of tiny/chat")])
def test_refusals_come_before_a_model_is_loaded(argv, reason, refused, monkeypatch):
    load, other = common.load_tokenizer, common.load_tokenizer("tiny/chat")
    other.add_tokens(["another"])
    monkeypatch.setattr(common, "load_tokenizer", lambda x, *_: other if x == "other" else load(x))
    monkeypatch.setattr(common, "load_model", None)
    assert reason in refused(chat.main, chat.make_flags().parse_args(argv))
