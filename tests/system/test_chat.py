"""The talk: what is read, sampled and coloured, against plain forward passes; what one sees."""
import io
import os
import pty
import random
import re
import select
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT
from transformers import AutoTokenizer

import chat
import common

WORDS = ["a b  c", " two  spaces \n\tand a tab", "naïve café", "它不是 12", "\U0001d54f ≤ ½",
         "\U0001f468\u200d\U0001f469\u200d\U0001f467 and \U0001f44d\U0001f3fd",  # joined emoji
         "\u0645\u06cc\u200c\u062e\u0648\u0627\u0647\u0645"]  # Persian, with a joiner


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    """A run on tiny/chat: an adapter with some noise."""
    folder = str(tmp_path_factory.mktemp("run"))
    torch.manual_seed(0)
    model = common.load_model("tiny/chat")
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.1)
    common.save_model(model, common.load_tokenizer("tiny/chat"), folder)
    return folder


@pytest.fixture(scope="module")
def models(adapter):
    """That run and tiny/chat."""
    return [common.load_model(x, "off", 0, "off", trainable=False) for x in (adapter, "tiny/chat")]


@pytest.fixture(scope="module")
def tokenizer():
    return common.load_tokenizer("tiny/chat")


@pytest.fixture
def talk(monkeypatch, capsys):
    """Runs the program on lines of input, as from a pipe, and returns what it printed."""
    def run(lines, *argv):
        monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
        chat.main(chat.make_flags().parse_args([str(word) for word in argv]))
        return capsys.readouterr().out
    return run


@pytest.fixture
def scripted(monkeypatch, tokenizer):
    """In place of `answer`: texts in the order of the calls; "^C" in one is a Ctrl-C there."""
    def script(*texts, end=True):
        calls, texts = [], list(texts)

        def answer(model, first, ids, length, stops, temperature, seed):
            calls.append({"model": model, "first": first, "prompt": list(ids), "seed": seed})
            text, stopped, _ = texts.pop(0).partition("^C")
            for token in tokenizer(text)["input_ids"]:
                ids.append(token)
                yield 0.0
            if stopped:
                raise KeyboardInterrupt
            ids.append(tokenizer.eos_token_id)
            yield 0.0

        monkeypatch.setattr(chat, "sample_tokens", answer)
        return calls
    return script


def chat_of(*texts, system=None):
    """Messages of user and assistant in turn."""
    messages = [{"role": "system", "content": system}] if system else []
    roles = ("user", "assistant")
    return messages + [{"role": roles[i % 2], "content": x} for i, x in enumerate(texts)]


def prompt_of(tokenizer, length):
    """A question of so many tokens, its template included."""
    text = "7"
    while len(common.encode_prompt(tokenizer, chat_of(text))) < length:
        text += "7"
    assert len(common.encode_prompt(tokenizer, chat_of(text))) == length
    return text


# ---- what is sampled -----------------------------------------------------------------------------

@torch.no_grad()
def plain_logps(model, ids, temperature):
    """[T-1, V]: log-probs by one forward pass without a cache."""
    logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, :-1]
    return (logits / temperature).log_softmax(-1)


@pytest.mark.parametrize("temperature", [0.7, 1.6])
def test_tokens_and_log_ratios_are_those_of_plain_forward_passes(
        temperature, models, tokenizer, monkeypatch):
    """Each is drawn from softmax(logits / temperature) of all before it; so is its log-ratio."""
    draws, multinomial = [], torch.multinomial

    def draw(probs, *args, **kwargs):
        draws.append((probs, multinomial(probs, *args, **kwargs)))
        return draws[-1][1]

    monkeypatch.setattr(torch, "multinomial", draw)
    model, first = models
    ids = common.encode_prompt(tokenizer, chat_of("What is 40 - 27?"))
    start = len(ids)
    ratios = list(chat.sample_tokens(model, first, ids, 20, (), temperature, seed=3))
    assert len(ratios) == len(draws) == len(ids) - start == 20
    assert [token.item() for _, token in draws] == ids[start:]
    own, other = (plain_logps(m, ids, temperature)[start - 1:] for m in models)
    torch.testing.assert_close(torch.stack([probs for probs, _ in draws]), own.exp())
    rows = torch.arange(20), torch.tensor(ids[start:])
    expected = (own - other)[rows]
    torch.testing.assert_close(torch.tensor(ratios), expected, atol=1e-4, rtol=1e-4)
    assert expected.abs().max() > 0.2  # the adapter does something
    assert set(chat.sample_tokens(model, None, ids[:start], 5, (), temperature, seed=3)) == {0.0}


def test_draws_follow_the_distribution(models, tokenizer):
    """First tokens over many seeds, against their probabilities: 5 standard deviations at most."""
    start = common.encode_prompt(tokenizer, chat_of("What is 40 - 27?"))
    counts, size = torch.zeros(len(tokenizer)), 300
    for seed in range(size):
        ids = list(start)
        list(chat.sample_tokens(models[0], None, ids, 1, (), 1.5, seed))
        counts[ids[-1]] += 1
    probs = plain_logps(models[0], start + [0], 1.5)[-1].exp()
    assert (((counts - size * probs) / (size * probs * (1 - probs)).sqrt().clamp(min=1)) < 5).all()
    assert (counts > 0).sum() > 3


def test_an_answer_ends_with_a_stop_token_or_at_its_length(models, tokenizer):
    start = common.encode_prompt(tokenizer, chat_of("What is 1 + 1?"))
    free = list(start)
    list(chat.sample_tokens(models[0], None, free, 8, (), 3.0, seed=0))
    assert len(free) == len(start) + 8
    stop = free[len(start) + 3]
    ids = list(start)
    list(chat.sample_tokens(models[0], None, ids, 8, [stop], 3.0, seed=0))
    assert ids == free[:free.index(stop, len(start)) + 1] and ids[-1] == stop
    other = list(start)
    list(chat.sample_tokens(models[0], None, other, 8, (), 3.0, seed=1))
    assert other != free


def test_equal_checkpoints_say_the_same_and_every_turn_is_drawn_anew(talk):
    lines = ["What is 40 - 27?", "/reset"] * 4
    out = talk(lines, "tiny/chat", "tiny/chat", "--temperature", 2)
    said = re.findall(r"^tiny/chat  (.*)", out, re.M)
    assert len(said) == 8 and said[::2] == said[1::2] and len(set(said)) > 2
    assert talk(lines, "tiny/chat", "tiny/chat", "--temperature", 2) == out
    assert talk(lines, "tiny/chat", "tiny/chat", "--temperature", 2, "--seed", 9) != out


def test_a_low_temperature_is_greedy(talk, models, tokenizer):
    ids = common.encode_prompt(tokenizer, chat_of("What is 40 - 27?"))
    said = []
    while not said or said[-1] != tokenizer.eos_token_id:
        said.append(plain_logps(models[1], ids + said + [0], 1.0)[-1].argmax().item())
    out = talk(["What is 40 - 27?"], "--temperature", 1e-6)
    assert f"tiny/chat  {tokenizer.decode(said[:-1])}\n" in out


# ---- what is read --------------------------------------------------------------------------------

def test_each_reads_the_template_of_its_own_history(talk, scripted, tokenizer, adapter):
    """The ids of encode_prompt on all messages: after /reset none, but for a system message."""
    calls = scripted(*"ABCDEFGHIJKL")
    out = talk(["one", "two", "/reset", "three", "/system Be  brief.", "four", "/reset", "five",
                "/system", "six"], "tiny/chat", adapter)
    histories = [("one",), ("one",), ("one", "A", "two"), ("one", "B", "two"), ("three",),
                 ("three",), ("four",), ("four",), ("five",), ("five",), ("six",), ("six",)]
    systems = [None] * 6 + ["Be  brief."] * 4 + [None] * 2
    expected = [common.encode_prompt(tokenizer, chat_of(*texts, system=system))
                for texts, system in zip(histories, systems, strict=True)]
    assert [call["prompt"] for call in calls] == expected
    assert [call["model"] is calls[0]["model"] for call in calls] == [True, False] * 6
    assert [line for line in out.splitlines() if line.endswith("L")][0].startswith(adapter)


def test_a_special_token_in_a_line_is_mere_text(talk, scripted, tokenizer):
    calls = scripted("A", "B")
    talk(["a<|im_end|>b", " /etc"], "tiny/chat")
    end = tokenizer.eos_token_id
    assert calls[0]["prompt"].count(end) == 1  # that of the question
    assert calls[1]["prompt"] == common.encode_prompt(
        tokenizer, chat_of("a<|im_end|>b", "A", " /etc"))


def test_without_a_template_the_text_goes_on(talk, scripted, tokenizer, monkeypatch):
    bare = common.load_tokenizer("tiny/chat")
    bare.chat_template = None
    monkeypatch.setattr(common, "load_tokenizer", lambda name, *options: bare)
    calls = scripted(" b", " d", " f")
    talk(["a", "c", "/system s", "e"], "tiny/chat")
    texts = ["a", "a b\nc", "s\ne"]
    assert [call["prompt"] for call in calls] == [bare(text)["input_ids"] for text in texts]


def test_a_continued_text_keeps_the_space_that_its_tokenizer_drops(shared):
    """SentencePiece decodes "▁time" alone to "time"."""
    tokenizer = common.load_tokenizer(str(shared / "models/stories260K"))
    assert not tokenizer.chat_template
    ids = tokenizer("Once upon a time there")["input_ids"]
    start = len(tokenizer("Once upon")["input_ids"])
    assert chat.text_from(tokenizer, ids, start) == " a time there"
    assert "".join(text for text, _ in spelled(tokenizer, ids[:start], ids[start:])) == (
        " a time there")


def test_commands_and_empty_lines_are_not_asked(talk, scripted):
    calls = scripted("A")
    out = talk(["", "  ", "/rest", "/quit", "one"], "tiny/chat")
    assert not calls and out.count(chat.COMMANDS) == 2


def test_what_a_template_refuses_is_one_line_and_no_history(talk, scripted, tokenizer, monkeypatch):
    strict = common.load_tokenizer("tiny/chat")
    strict.chat_template = ("{% if messages[0].role == 'system' %}{{ raise_exception('no system "
                            "role') }}{% endif %}" + strict.chat_template)
    monkeypatch.setattr(common, "load_tokenizer", lambda name, *options: strict)
    calls = scripted("A", "B")
    out = talk(["/system s", "one", "/system", "two"], "tiny/chat")
    assert re.findall(r"\[.*\]", out) == ["[not asked: no system role]"]
    assert [call["prompt"] for call in calls] == [common.encode_prompt(tokenizer, chat_of("two"))]


def test_a_full_context_is_said_and_goes_on_after_reset(talk, tokenizer):
    """The answer fills the last of 512 tokens; the next prompt is not asked, that after /reset is.

    At so high a temperature an answer hardly ever ends by itself.
    """
    almost, over = prompt_of(tokenizer, 508), prompt_of(tokenizer, 512)
    out = talk([over, "/reset", almost, "and now?", "/reset", "1 + 1?"], "tiny/chat",
               "--temperature", 1e6, "--max-new-tokens", 6)
    notes = re.findall(r"  \[(.*)\]$", out, re.M)
    full = "the context of 512 tokens is full: /reset begins a new conversation"
    refused, cut = f"not asked: {full}", "cut off by --max-new-tokens"
    assert notes == [refused, full, refused, cut]


# ---- Ctrl-C --------------------------------------------------------------------------------------

def test_ctrl_c_stops_one_answer_and_what_was_said_stays(talk, scripted, tokenizer):
    calls = scripted("4^C", "5", "6", "7")
    out = talk(["one", "two"], "tiny/chat", "tiny/chat")
    assert "tiny/chat  4  [stopped]\ntiny/chat  5\n" in out
    assert [call["prompt"] for call in calls[2:]] == [
        common.encode_prompt(tokenizer, chat_of("one", said, "two")) for said in "45"]


def test_ctrl_c_before_the_first_token_leaves_no_history(talk, scripted, tokenizer):
    calls = scripted("^C", "6")
    talk(["one", "two"], "tiny/chat")
    assert calls[1]["prompt"] == common.encode_prompt(tokenizer, chat_of("two"))


SLOW = """
import sys, time
import chat
answer = chat.sample_tokens
def slow(*args):
    for count, ratio in enumerate(answer(*args)):
        yield ratio
        time.sleep(200 * (count == 5))  # until Ctrl-C
chat.sample_tokens = slow
chat.main(chat.make_flags().parse_args(sys.argv[1:]))
"""


def test_ctrl_c_in_a_terminal():
    """A real one: Ctrl-C while an answer is sampled and at the prompt, an answer, Ctrl-D."""
    pid, screen = pty.fork()
    if pid == 0:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # a test in the background ignores it
        signal.pthread_sigmask(signal.SIG_SETMASK, [])
        os.chdir(ROOT)
        argv = [sys.executable, "-c", SLOW, "tiny/chat", "--temperature", "1e6"]
        os.execve(sys.executable, argv, os.environ | {"TERM": "xterm-256color", "NO_COLOR": ""})
    seen = b""

    def expect(pattern, then):
        nonlocal seen
        while not (found := re.search(pattern, seen)):
            assert select.select([screen], [], [], 100)[0], f"nothing follows {seen}"
            seen += os.read(screen, 4096)
        seen = seen[found.end():]
        os.write(screen, then)

    expect(rb"> $", b"What is 2 + 3?\n")
    expect(rb"tiny/chat\x1b\[0m  [^\x00]{3,}", b"\x03")
    expect(rb"\[stopped\]\r\n> ", b"")
    time.sleep(0.5)  # readline shows its prompt before it can see a Ctrl-C
    os.write(screen, b"\x03")
    expect(rb"Ctrl-D is /quit\r\n> ", b"/reset\n")
    expect(rb"> ", b"What is 2 + 3?\n")
    expect(rb"tiny/chat\x1b\[0m  [^\x00]{3,}", b"\x03")
    expect(rb"\[stopped\]\r\n> ", b"\x04")
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    os.close(screen)


def test_a_pipe():
    """Every question once, no colours, no complaint about bytes that are no text; it ends."""
    lines = b"What is 2 + 3?\nHow \xff\n/system Count.\nWhat is 2 + 3?"
    done = subprocess.run([sys.executable, "chat.py", "tiny/chat"], cwd=ROOT, input=lines,
                          capture_output=True, timeout=200)
    out = done.stdout.decode()
    assert done.returncode == 0 and not done.stderr and "\033" not in out
    assert out.count("> What is 2 + 3?\n") == out.count("What is 2 + 3?") == 2
    assert out.count("> How �\n") == 1 and out.count("\ntiny/chat  ") == 3


# ---- what is seen --------------------------------------------------------------------------------

def spelled(tokenizer, prompt, tokens, ratios=None, hidden=()):
    """What `spell` yields while the tokens come one by one."""
    ids = list(prompt)

    def grow():
        for token, ratio in zip(tokens, ratios or [0.0] * len(tokens), strict=True):
            ids.append(token)
            yield ratio

    return list(chat.stream_text(tokenizer, ids, grow(), hidden))


def check_spelling(tokenizer, text, before=""):
    prompt = tokenizer(before)["input_ids"]
    tokens = tokenizer(before + text)["input_ids"][len(prompt):]
    ratios = [1.0 + i for i in range(len(tokens))]
    pieces = spelled(tokenizer, prompt, tokens, ratios)
    whole = chat.text_from(tokenizer, prompt + tokens, len(prompt))
    assert whole == text and "".join(piece for piece, _ in pieces) == text
    assert not any("\ufffd" in piece for piece, _ in pieces)
    assert sum(ratio for _, ratio in pieces) == sum(ratios)
    return len(pieces)


@pytest.mark.parametrize("text", WORDS)
def test_what_is_streamed_is_the_whole_answer(text, tokenizer):
    """Spaces, and characters of several tokens, which come whole and with the sum of their ratios.

    The tokenizer of the tiny model spells what is not ASCII byte by byte.
    """
    assert check_spelling(tokenizer, text) > 3


@pytest.mark.parametrize("name", ["tokenizers/Qwen2.5-0.5B-Instruct", "models/stories260K",
                                  "tokenizers/SmolLM2-135M-Instruct"])
def test_what_is_streamed_by_real_tokenizers(name, shared):
    """Byte-level ones, and SentencePiece, with which a text is continued."""
    tokenizer = AutoTokenizer.from_pretrained(shared / name)
    for text in WORDS:
        check_spelling(tokenizer, text, before="" if tokenizer.chat_template else "So:")


def test_a_character_has_the_sum_of_its_tokens(tokenizer):
    tokens = tokenizer("a👍b")["input_ids"]
    assert len(tokens) == 6
    pieces = spelled(tokenizer, [5, 6], tokens, [1.0, 0.1, 0.2, 0.3, 0.4, 2.0])
    assert [text for text, _ in pieces] == ["a", "👍", "b", ""]
    assert [ratio for _, ratio in pieces] == pytest.approx([1.0, 1.0, 2.0, 0.0])


@pytest.mark.parametrize("seed", range(20))
def test_any_tokens_are_streamed_as_they_decode(seed, tokenizer):
    """Broken characters included, and one that the answer breaks off in."""
    draw = random.Random(seed)
    tokens = [draw.randrange(len(tokenizer)) for _ in range(30)]
    whole = tokenizer.decode(tokens, clean_up_tokenization_spaces=False)
    assert "".join(text for text, _ in spelled(tokenizer, [7], tokens)) == whole


def test_the_stop_token_shows_with_tokens_only(talk):
    line = ["What is 40 - 27?"]
    assert "<|im_end|>" not in talk(line, "tiny/chat", "tiny/chat")
    shown = talk(line, "tiny/chat", "tiny/chat", "--tokens")
    assert shown.count("<|im_end|>") == 2 and shown.count("[+0.00 nats]") == 1


@pytest.mark.parametrize("ratio, strength", [(0.0, 0), (0.09, 0), (0.1, 1), (0.49, 1), (0.5, 2),
                                             (1.9, 2), (2.0, 3), (30.0, 3)])
def test_a_colour_says_sign_and_size(ratio, strength):
    for sign, colours in (1, chat.BLUE), (-1, chat.ORANGE):
        painted = chat.paint("x", sign * ratio, True)
        shade = f"\033[30;48;5;{colours[strength - 1]}mx\033[0m"
        assert painted == (shade if strength else "x")
        number = f"x[{sign * ratio:+.1f}]"
        assert chat.paint("x", sign * ratio, False) == (number if strength else "x")


def test_a_colour_ends_with_its_line():
    assert chat.paint("\n", 1.0, True) == (
        "\033[30;48;5;111m↵\033[0m\n\033[30;48;5;111m\033[0m")


def test_control_characters_are_spelled_out():
    assert chat.printable("a\x1b[2J\rb\u202e\n\tc") == "a\\x1b[2J\\rb\\u202e\n\tc"
    for text in WORDS + ["1\u00a0000", "\u3000"]:
        assert chat.printable(text) == text


def test_log_ratios_on_the_screen_are_exact(talk, adapter, models, monkeypatch):
    """--base --tokens: the sum at the end of the answer, and all that is painted."""
    said, painted = [], []
    answer, paint = chat.sample_tokens, chat.paint

    def spy(model, first, ids, *args):
        start = len(ids)
        yield from answer(model, first, ids, *args)
        said.append((start, list(ids)))

    monkeypatch.setattr(chat, "sample_tokens", spy)
    monkeypatch.setattr(chat, "paint", lambda text, ratio, colours: painted.append(ratio) or
                        paint(text, ratio, colours))
    out = talk(["What is 40 - 27?", "And 7?"], adapter, "--base", "--tokens", "--temperature", 0.8)
    assert f"its log-ratio to base of {adapter} in nats, if beyond ±0.1" in out
    sums = [float(number) for number in re.findall(r"\[([-+.\d]+) nats\]", out)]
    assert len(said) == 4 and len(sums) == 2
    total = 0.0
    for (start, ids), shown in zip(said[1::2], sums, strict=True):
        own, base = (plain_logps(m, ids, 0.8) for m in models)
        rows = torch.arange(start - 1, len(ids) - 1), torch.tensor(ids[start:])
        assert shown == pytest.approx((own - base)[rows].sum().item(), abs=0.006)
        total += (own - base)[rows].sum().item()
    assert sum(painted) == pytest.approx(total, abs=1e-3)
    assert abs(total) > 0.1


def test_the_first_checkpoint_is_compared_with_nobody(talk, scripted, adapter):
    calls = scripted(*"ABCD")
    talk(["one"], "tiny/chat", adapter, "--tokens")
    assert [call["first"] for call in calls] == [None, calls[0]["model"]]
    talk(["one"], "tiny/chat", adapter)
    assert [call["first"] for call in calls[2:]] == [None, None]


def test_the_base_is_the_run_without_its_adapter(adapter, models):
    args = chat.make_flags().parse_args([adapter, "--base"])
    base, run = chat.load_checkpoints(args)
    ids = torch.arange(9)[None]
    with torch.no_grad():
        own = [m(input_ids=ids).logits for m in (run["model"], base["model"])]
        expected = [m(input_ids=ids).logits for m in models]
    assert torch.equal(own[0], expected[0]) and torch.equal(own[1], expected[1])
    assert not torch.equal(own[0], own[1])
    assert [base["name"], run["name"]] == [f"base of {adapter}", adapter]


@pytest.mark.parametrize("terminal, no_color, coloured", [
    (True, None, True), (True, "", True), (True, "1", False), (False, None, False)])
def test_colours_are_for_terminals_and_who_wants_them(
        terminal, no_color, coloured, talk, scripted, monkeypatch):
    monkeypatch.delenv("NO_COLOR", raising=False)
    if no_color is not None:
        monkeypatch.setenv("NO_COLOR", no_color)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: terminal, raising=False)
    scripted("A", "B")
    assert ("\033[" in talk(["one"], "tiny/chat", "tiny/chat", "--tokens")) == coloured


# ---- refusals ------------------------------------------------------------------------------------

@pytest.mark.parametrize("argv, reason", [
    (["tiny/chat", "--tokens"], "name a second one, or add --base"),
    (["tiny/chat", "--base"], "tiny/chat has no adapter to leave out"),
    (["nowhere/none", "--base"], "nowhere/none"), (["tiny/chat", "nowhere/none"], "nowhere/none"),
    (["tiny/reward"], "an adapter for SEQ_CLS")])
def test_what_cannot_be_talked_with_is_refused(argv, reason, refused):
    assert reason in refused(chat.main, chat.make_flags().parse_args(argv))


def test_other_tokens_cannot_be_compared(refused, tmp_path, monkeypatch):
    """Before any model is loaded."""
    load, other = common.load_tokenizer, common.load_tokenizer("tiny/chat")
    other.add_tokens(["another"])
    monkeypatch.setattr(common, "load_tokenizer", lambda x, *_: other if x == "o" else load(x))
    monkeypatch.setattr(common, "load_model", lambda *args, **kwargs: pytest.fail("loads a model"))
    args = chat.make_flags().parse_args(["tiny/chat", "o", "--tokens"])
    assert "--tokens: o has other tokens than tiny/chat" in refused(chat.main, args)
