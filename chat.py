"""Chat with checkpoints side by side: all of them get your prompts, each keeps its own history.

    python chat.py                               # tiny/chat
    python chat.py runs/sft runs/dpo             # both answer each prompt
    python chat.py runs/dpo --base --tokens      # what DPO has changed, token by token

Metrics say how much a model has changed, but not how. To see that, read its answers. A checkpoint
is a saved run, a local folder or a Hub name. What you type is a prompt, or one of these commands:

    /reset          starts a new conversation with the same system message
    /system TEXT    starts a new conversation with the system message TEXT; without TEXT, with none
    /quit           ends the program, as does Ctrl-D; Ctrl-C only stops an answer

A model without a chat template continues the text of all prompts and of its answers so far.

--tokens colors every sampled token y_t by its log-ratio to the first checkpoint, in nats:

    log π(y_t | x, y_<t) − log π_first(y_t | x, y_<t)

Here x is the history of π, which both models read, and the temperature is the same. Blue tokens
have become likelier, orange ones less likely; +0.7 means twice as likely, since log 2 = 0.69. If
several tokens spell one character, they share the color of their sum. The sum over an answer is
printed after it. It estimates KL(π ‖ π_first) from one sample; evaluate.py reports its mean over
many answers.

Change one thing: with `--temperature 1e-6` tiny/chat makes hardly any mistakes, while at 1.0 four
in ten of its answers are wrong. Its likeliest answer is nearly always correct, so post-training
mostly has to move probability to that answer.
"""
import argparse
import contextlib
import itertools
import os
import sys
import unicodedata

import torch

import common

with contextlib.suppress(ImportError):  # Windows has no readline
    import readline  # noqa: F401  gives input() the arrow keys

COMMANDS = ("commands: /reset, /system TEXT, /quit; Ctrl-C stops an answer, "
            "Ctrl-D is the same as /quit")
TINY_HINT = ("The tiny models can only add and subtract numbers up to 99: try  What is 12 + 7?  "
             "or  Take 8 from 30.")
LEVELS = (0.1, 0.5, 2.0)  # log-ratios, in nats, at which a color is pale, medium, strong
# Codes of a 256-color terminal. Many people cannot tell red from green, so neither is used.
BLUE = (153, 111, 69)
ORANGE = (223, 215, 208)


def make_flags():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=common.HelpFormatter)
    add = parser.add_argument
    add("checkpoints", nargs="*", default=["tiny/chat"], help="saved runs, folders or Hub names")
    add("--base", action="store_true",
        help="put the base model of the first checkpoint before the others")
    add("--tokens", action="store_true",
        help="color tokens by their log-ratio to the first checkpoint")
    add("--temperature", type=common.positive, default=1.0,
        help="sampling temperature; 1e-6 is greedy")
    add("--max-new-tokens", type=common.count, default=512, help="longest answer, in tokens")
    add("--chat-template", help=common.TEMPLATE)
    add("--template-arguments", **common.VARIABLES)
    add("--load-in-4bit", **common.ON_GPU, help="quantize the models to 4 bits (NF4)")
    add("--seed", type=common.natural, default=0, help="seed of the samples")
    return parser


def load_checkpoints(args):
    """One dict per checkpoint. Each has its own model, so two runs on one base load it twice."""
    runs = args.checkpoints
    checkpoints = [{"name": run, "run": run, "weights": run} for run in runs]
    if args.base:
        with common.phase(f"--base of {runs[0]}"):
            base = common.base_of(runs[0])
        # The base gets the run's tokenizer, so that both read the same tokens.
        checkpoints.insert(0, {"name": f"base of {runs[0]}", "run": runs[0], "weights": base})
    if args.tokens and len(checkpoints) == 1:
        common.fail("--tokens compares with the first checkpoint: name a second one, or add --base")
    # Load all tokenizers first, so that errors show before a model is loaded.
    for checkpoint in checkpoints:
        tokenizer = common.load_tokenizer(
            checkpoint["run"], args.chat_template, args.template_arguments)
        checkpoint["tokenizer"] = tokenizer
        if args.tokens and tokenizer.get_vocab() != checkpoints[0]["tokenizer"].get_vocab():
            common.fail(f"--tokens: {checkpoint['name']} does not have the vocabulary of {runs[0]}")
    if args.base and not common.adapter_config(runs[0]):
        common.fail(f"--base: {runs[0]} has no adapter to leave out")
    for checkpoint in checkpoints:
        model = common.load_model(
            checkpoint["weights"], args.load_in_4bit, 0, "off", trainable=False)
        checkpoint["model"] = model
        checkpoint["stops"] = common.stop_token_ids(
            checkpoint["tokenizer"], model.generation_config)
        checkpoint["history"] = []
    return checkpoints


# ---- from messages to sampled tokens -------------------------------------------------------------

def encode_history(tokenizer, history):
    """The ids that precede the next answer: those of the chat, or of plain text if no template."""
    if tokenizer.chat_template:
        return common.encode_prompt(tokenizer, history)
    text = ""
    for message in history:
        if message["role"] == "user":
            text += "\n"  # a prompt begins a new line
        text += message["content"]
    return common.encode_prompt(tokenizer, text.removeprefix("\n"))


def read_logps(model, unread, mask, cache, temperature):
    """Log-probs [V] of the token after `unread`, and the KV cache, now with `unread` in it."""
    with common.autocast(model):
        logits, cache = common.read(common.causal_lm(model), unread, mask, cache)  # [1, V]
    return (logits[0].float() / temperature).log_softmax(-1), cache


@torch.no_grad()
def sample_tokens(model, first, ids, length, stops, temperature, seed):
    """Appends up to `length` sampled tokens to `ids` and yields, after each, its log-ratio.

    Samples come from exactly softmax(logits / temperature): no top-k, no top-p, no penalties. The
    log-ratio compares with the model `first`; if that is None, it is 0.
    """
    generator = torch.Generator(model.device).manual_seed(seed)
    unread = torch.tensor([ids], device=model.device)  # [1, T], then [1, 1]
    cache = None
    first_cache = None
    for _ in range(length):
        mask = torch.ones(1, len(ids), dtype=torch.long, device=model.device)
        logps, cache = read_logps(model, unread, mask, cache, temperature)  # [V]
        token = torch.multinomial(logps.exp(), 1, generator=generator)  # [1]
        log_ratio = 0.0
        if first:
            first_logps, first_cache = read_logps(first, unread, mask, first_cache, temperature)
            log_ratio = (logps[token] - first_logps[token]).item()
        ids.append(token.item())
        yield log_ratio
        if ids[-1] in stops:
            return
        unread = token[None]


# ---- from tokens to the screen -------------------------------------------------------------------

def text_from(tokenizer, ids, start, skip_special_tokens=False):
    """The text of the tokens from `start` on.

    Some tokenizers drop a leading space when they decode. An answer in a chat has none. A model
    without a template continues a text, so that text is decoded too, and the space remains.
    """
    options = {"skip_special_tokens": skip_special_tokens, "clean_up_tokenization_spaces": False}
    begin = start if tokenizer.chat_template else 0
    before = tokenizer.decode(ids[begin:start], **options)
    return tokenizer.decode(ids[begin:], **options)[len(before):]


def stream_text(tokenizer, ids, log_ratios, hidden):
    """Yields the new text and its log-ratio for each token; `ids` grows as `log_ratios` is read.

    Part of a character decodes to �. Text and log-ratio then wait for the rest of the character.
    Tokens in `hidden` are not shown: they are the stop tokens.
    """
    start = len(ids)
    text = ""
    shown = 0  # how many of its characters have been yielded
    waiting = 0.0  # the sum of the log-ratios since then
    for log_ratio in log_ratios:
        waiting += log_ratio
        if ids[-1] not in hidden:
            text = text_from(tokenizer, ids, start)
        if not text.endswith("\ufffd"):
            yield text[shown:], waiting
            shown = len(text)
            waiting = 0.0
    yield text[shown:], waiting  # bytes that never became a character


def printable(text):
    """Like common.visible, but tabs, the spaces of all scripts, and joiners remain."""
    shown = ""
    for character in text:
        remains = character in "\t\u200c\u200d" or unicodedata.category(character) == "Zs"
        shown += character if remains else common.visible(character)
    return shown


def paint(text, log_ratio, colors):
    """A token in the color of its log-ratio or, without colors, followed by the number."""
    strength = sum(abs(log_ratio) >= level for level in LEVELS)
    if not strength or not text:
        return text
    if not colors:
        return f"{text}[{log_ratio:+.1f}]"
    shades = BLUE if log_ratio > 0 else ORANGE
    on = f"\033[30;48;5;{shades[strength - 1]}m"
    off = "\033[0m"
    # The color stops at a line break, or it would fill the whole next line.
    return on + text.replace("\n", f"↵{off}\n{on}") + off


def legend(name, colors):
    """The key to the log-ratios, in one line."""
    if not colors:
        return f"[+0.0] after a token: its log-ratio to {name} in nats, if beyond ±{LEVELS[0]}"
    steps = [-level for level in reversed(LEVELS)] + [0.0, *LEVELS]
    scale = " ".join(paint(f" {step:+g} ", step, True) for step in steps)
    return f"log-ratio to {name} in nats: {scale}"


def respond(checkpoint, prompt, first, args, seed, colors):
    """Samples the answer to a prompt, prints it as it grows, and adds both to the history.

    The model reads the whole history again for each answer, because the KV cache is not kept.
    """
    tokenizer = checkpoint["tokenizer"]
    stops = checkpoint["stops"]
    asked = checkpoint["history"] + [{"role": "user", "content": prompt}]
    full = (f"the context of {tokenizer.model_max_length} tokens is full: "
            "/reset begins a new conversation")
    try:
        ids = encode_history(tokenizer, asked)
        start = len(ids)
        room = tokenizer.model_max_length - start
        if room < 1:
            raise ValueError(full)
    except Exception as error:  # templates raise exceptions of their own types
        print(f"[not asked: {printable(str(error))}]")
        return
    compared = first["model"] if args.tokens and first is not checkpoint else None
    log_ratios = sample_tokens(checkpoint["model"], compared, ids, min(args.max_new_tokens, room),
                               stops, args.temperature, seed)
    hidden = () if args.tokens else stops
    total = 0.0
    note = ""
    try:
        for text, log_ratio in stream_text(tokenizer, ids, log_ratios, hidden):
            print(paint(printable(text), log_ratio, colors), end="", flush=True)
            total += log_ratio
        if ids[-1] not in stops:
            note = full if len(ids) == start + room else "cut off by --max-new-tokens"
    except KeyboardInterrupt:
        note = "stopped"
    if len(ids) > start:
        end = len(ids) - 1 if ids[-1] in stops else len(ids)
        text = text_from(tokenizer, ids[:end], start, skip_special_tokens=True)
        checkpoint["history"] = asked + [{"role": "assistant", "content": text}]
    if compared:
        print(f"  [{total:+.2f} nats]", end="")
    print(f"  [{note}]" if note else "")


# ---- the conversation ----------------------------------------------------------------------------

def read_line():
    """The next line of input. It is printed if no terminal shows it as it is typed."""
    line = input("> ")
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        print(printable(line))
    return line


def ask_all(checkpoints, prompt, args, seed, colors):
    """Prints all answers to a prompt. They share their random numbers: only the models differ."""
    width = max(len(printable(checkpoint["name"])) for checkpoint in checkpoints)
    for checkpoint in checkpoints:
        name = f"{printable(checkpoint['name']):<{width}}"
        print(f"\033[1m{name}\033[0m" if colors else name, end="  ", flush=True)
        respond(checkpoint, prompt, checkpoints[0], args, seed, colors)


def main(args):
    checkpoints = load_checkpoints(args)
    colors = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    if any(common.is_tiny(name) for name in args.checkpoints):
        print(TINY_HINT)
    print(COMMANDS)
    if args.tokens:
        print(legend(printable(checkpoints[0]["name"]), colors))
    system = []
    for turn in itertools.count():
        try:
            line = read_line()
            command, _, text = line.partition(" ")
            if command == "/quit":
                return
            if command == "/system":
                system = [{"role": "system", "content": text}] if text.strip() else []
            if command in ("/system", "/reset"):
                for checkpoint in checkpoints:
                    checkpoint["history"] = system
            elif line.startswith("/"):
                print(COMMANDS)
            elif line.strip():
                ask_all(checkpoints, line, args, args.seed + turn, colors)
        except KeyboardInterrupt:
            print(f"\n{COMMANDS}")
        except EOFError:
            print()
            return


if __name__ == "__main__":
    with common.running("the number of checkpoints, then --max-new-tokens", resumes=""):
        sys.stdin.reconfigure(errors="replace")
        main(common.parse(make_flags()))
