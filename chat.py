"""A talk with checkpoints, side by side: each gets the same prompts and keeps its own history.

    python chat.py                               # tiny/chat
    python chat.py runs/sft runs/dpo             # one answer after the other
    python chat.py runs/dpo --base --tokens      # what DPO has changed, token by token

A checkpoint is a saved run, a local folder or a Hub name. A line is a prompt, or a command:

    /reset          a new conversation, below the same system message
    /system TEXT    a new conversation below the system message TEXT, or below none
    /quit           the end, as is Ctrl-D; Ctrl-C only stops an answer

A model without a chat template goes on with the text: all lines and its answers so far.

--tokens colours every sampled token y_t by its log-ratio to the first checkpoint, in nats:

    log π(y_t | x, y_<t) − log π_first(y_t | x, y_<t)

Both read the same x, the history of π, at the same temperature. Blue is what tuning made likelier,
orange what it made rarer; tokens that only together spell a character share the colour of their
sum. At the end of an answer stands the sum over it: its mean over samples is KL(π ‖ π_first).
"""
import argparse
import contextlib
import itertools
import os
import sys
import unicodedata

import torch

import common

with contextlib.suppress(ImportError):  # Windows has none
    import readline  # noqa: F401  gives input() the arrow keys

COMMANDS = "/reset, /system TEXT, /quit; Ctrl-C stops an answer, Ctrl-D is /quit"
LEVELS = (0.1, 0.5, 2.0)  # nats from which on a colour is pale, middling, strong
BLUE, ORANGE = (153, 111, 69), (223, 215, 208)  # of a terminal's 256, and not red and green
flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
add = flags.add_argument
add("checkpoints", nargs="*", default=["tiny/chat"], help="without any: tiny/chat")
add("--base", action="store_true", help="begin with the first checkpoint without its adapter")
add("--tokens", action="store_true", help="colour tokens by their log-ratio to the first one")
add("--temperature", type=common.positive, default=1.0, help="of sampling; 1e-6 is greedy")
add("--max-new-tokens", type=common.count, default=512, help="longest answer")
add("--chat-template", help="file with a chat template, in place of the model's own")
add("--template-arguments", **common.VARIABLES, help="variables that the chat template reads")
add("--load-in-4bit", **common.ON_GPU, help="quantise the base")
add("--seed", type=common.natural, default=0, help="of the samples")


def load_checkpoints(args):
    """A dict each, with a model of its own: two runs on one base take its memory twice."""
    runs = args.checkpoints
    checkpoints = [{"name": run, "run": run, "weights": run} for run in runs]
    if args.base:  # with the tokenizer of the run, so that both read the same
        with common.phase(f"--base of {runs[0]}"):
            base = common.base_of(runs[0])
        checkpoints.insert(0, {"name": f"base of {runs[0]}", "run": runs[0], "weights": base})
    if args.tokens and len(checkpoints) == 1:
        common.fail("--tokens compares with the first checkpoint: name a second one, or add --base")
    for checkpoint in checkpoints:  # what is wrong shows before the first model is loaded
        tokenizer = checkpoint["tokenizer"] = common.load_tokenizer(
            checkpoint["run"], args.chat_template, args.template_arguments)
        if args.tokens and tokenizer.get_vocab() != checkpoints[0]["tokenizer"].get_vocab():
            common.fail(f"--tokens: {checkpoint['name']} has other tokens than {runs[0]}")
    if args.base and not common.adapter_config(runs[0]):
        common.fail(f"--base: {runs[0]} has no adapter to leave out")
    for checkpoint in checkpoints:
        model = checkpoint["model"] = common.load_model(
            checkpoint["weights"], args.load_in_4bit, 0, "off", trainable=False)
        checkpoint["stops"] = common.stop_token_ids(
            checkpoint["tokenizer"], model.generation_config)
        checkpoint["history"] = []
    return checkpoints


# ---- from messages to sampled tokens -------------------------------------------------------------

def encode_history(tokenizer, history):
    """The ids up to the next answer: by the chat template, or without one of the text so far."""
    if tokenizer.chat_template:
        return common.encode_prompt(tokenizer, history)
    text = ""
    for message in history:  # what the user says begins a line
        text += "\n" + message["content"] if message["role"] == "user" else message["content"]
    return common.encode_prompt(tokenizer, text.removeprefix("\n"))


@torch.no_grad()
def answer(model, compared, ids, length, stops, temperature, seed):
    """Appends up to `length` sampled tokens to `ids`, and yields after each its log-ratio.

    From exactly softmax(logits / temperature): no top-k, no top-p, no penalties. The log-ratio is
    to the model `compared`, or 0 without one.
    """
    models = [model, compared] if compared else [model]
    caches = [None for _ in models]
    generator = torch.Generator(model.device).manual_seed(seed)
    unread = torch.tensor([ids], device=model.device)  # [1, T], later [1, 1]
    for _ in range(length):
        logps = []
        mask = torch.ones(1, len(ids), dtype=torch.long, device=model.device)
        for i, m in enumerate(models):
            with common.autocast(m):
                logits, caches[i] = common.read(common.causal_lm(m), unread, mask, caches[i])
            logps.append((logits[0].float() / temperature).log_softmax(-1))  # [V]
        token = torch.multinomial(logps[0].exp(), 1, generator=generator)  # [1]
        ids.append(token.item())
        yield (logps[0][token] - logps[-1][token]).item()
        if ids[-1] in stops:
            return
        unread = token[None]


# ---- from tokens to the screen -------------------------------------------------------------------

def said(tokenizer, ids, start, skip_special_tokens=False):
    """What the tokens from `start` on say.

    Some tokenizers drop the space that a text begins with. An answer of a chat has none; to find
    that of a continued text, all of the text is decoded.
    """
    options = {"skip_special_tokens": skip_special_tokens, "clean_up_tokenization_spaces": False}
    begin = start if tokenizer.chat_template else 0
    before = tokenizer.decode(ids[begin:start], **options)
    return tokenizer.decode(ids[begin:], **options)[len(before):]


def spell(tokenizer, ids, ratios, hidden):
    """Yields what is new in the text of `ids`, and its log-ratio, as `ratios` makes them longer.

    Part of a character decodes to �: then both wait for the rest. A last token in `hidden` is mute.
    """
    start, done, text, waiting = len(ids), 0, "", 0.0
    for ratio in ratios:
        waiting += ratio
        if ids[-1] not in hidden:
            text = said(tokenizer, ids, start)
        if not text.endswith("\ufffd"):
            yield text[done:], waiting
            done, waiting = len(text), 0.0
    yield text[done:], waiting  # what never became a character


def printable(text):
    """common.visible, but tabs, spaces of all scripts and joiners of letters and emoji stay."""
    return "".join(c if c in "\t\u200c\u200d" or unicodedata.category(c) == "Zs"
                   else common.visible(c) for c in text)


def paint(text, ratio, colours):
    """A token in the colour of its log-ratio, or followed by it where there are no colours."""
    strength = sum(abs(ratio) >= step for step in LEVELS)
    if not strength or not text:
        return text
    if not colours:
        return f"{text}[{ratio:+.1f}]"
    on = f"\033[30;48;5;{(BLUE if ratio > 0 else ORANGE)[strength - 1]}m"
    return on + text.replace("\n", f"↵\033[0m\n{on}") + "\033[0m"  # or it would fill the next line


def legend(name, colours):
    """The scale of the log-ratios, in one line."""
    if not colours:
        return f"[+0.0] after a token: its log-ratio to {name} in nats, if beyond ±{LEVELS[0]}"
    steps = [-step for step in reversed(LEVELS)] + [0.0, *LEVELS]
    return f"log-ratio to {name} in nats: {' '.join(paint(f' {x:+g} ', x, True) for x in steps)}"


def speak(checkpoint, prompt, first, args, seed, colours):
    """Prints the answer to a prompt while it is sampled; if it has a token, both join the history.

    The whole history is read anew for each answer: a cache does not outlive one.
    """
    tokenizer, stops = checkpoint["tokenizer"], checkpoint["stops"]
    asked = checkpoint["history"] + [{"role": "user", "content": prompt}]
    full = f"the context of {tokenizer.model_max_length} tokens is full: /reset begins a new talk"
    try:
        ids = encode_history(tokenizer, asked)
        start, room = len(ids), tokenizer.model_max_length - len(ids)
        if room < 1:
            raise ValueError(full)
    except Exception as error:  # templates raise types of their own
        print(f"[not asked: {printable(str(error))}]")
        return
    compared = first["model"] if args.tokens and first is not checkpoint else None
    ratios = answer(checkpoint["model"], compared, ids, min(args.max_new_tokens, room), stops,
                    args.temperature, seed)
    total, note = 0.0, ""
    try:
        for text, ratio in spell(tokenizer, ids, ratios, () if args.tokens else stops):
            print(paint(printable(text), ratio, colours), end="", flush=True)
            total += ratio
        if ids[-1] not in stops:
            note = full if len(ids) == start + room else "cut off by --max-new-tokens"
    except KeyboardInterrupt:
        note = "stopped"
    if len(ids) > start:
        end = len(ids) - (ids[-1] in stops)
        text = said(tokenizer, ids[:end], start, skip_special_tokens=True)
        checkpoint["history"] = asked + [{"role": "assistant", "content": text}]
    notes = [f"{total:+.2f} nats" if compared else "", note]
    print("".join(f"  [{text}]" for text in notes if text))


# ---- the talk ------------------------------------------------------------------------------------

def main(args):
    checkpoints = load_checkpoints(args)
    width = max(len(printable(checkpoint["name"])) for checkpoint in checkpoints)
    colours = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    print(COMMANDS)
    if args.tokens:
        print(legend(printable(checkpoints[0]["name"]), colours))
    system = []
    for turn in itertools.count():
        try:
            line = input("> ")
            if not (sys.stdin.isatty() and sys.stdout.isatty()):  # a terminal shows it
                print(printable(line))
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
                for checkpoint in checkpoints:
                    name = f"{printable(checkpoint['name']):<{width}}"
                    print(f"\033[1m{name}\033[0m" if colours else name, end="  ", flush=True)
                    # the same random numbers for all: what differs is the tuning
                    speak(checkpoint, line, checkpoints[0], args, args.seed + turn, colours)
        except KeyboardInterrupt:
            print(f"\n{COMMANDS}")
        except EOFError:
            print()
            return


if __name__ == "__main__":
    with common.running("the number of checkpoints, then --max-new-tokens", resumes=""):
        sys.stdin.reconfigure(errors="replace")
        flags.error = common.fail
        main(flags.parse_args())
