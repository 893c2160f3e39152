"""The yardstick for all methods: any number of checkpoints answer the same prompts, one table.

    python evaluate.py                            # the tiny model and every run on it in runs/
    python evaluate.py Qwen/Qwen2.5-0.5B runs/dpo --dataset openai/gsm8k:main --max-new-tokens 512
    python evaluate.py tiny/chat --best-of 8 --reward tiny/reward

A checkpoint is a saved run, a local folder or a Hub name. A dataset has `prompt` and `answer`.

    sampled   share of right answers at --temperature, with a 95% interval
    greedy    share of right answers where each token is the likeliest, with the same interval
    pass@k    chance that one of k samples is right (Chen et al. 2021, arXiv:2107.03374, eq. 1)
    reward    mean score of the sampled answers by --reward; prm.py's: p of the worst line, or with
              --outcome of the last
    kl        KL(π ‖ first checkpoint), in nats per sampled answer: mean of the log-ratio's sum
    length    tokens of a sampled answer
    stopped   share of the sampled answers that end by themselves, before --max-new-tokens

With --best-of N, shares of right answers when one of N samples is picked: the first; one with the
number that most of them end in (majority: self-consistency, Wang et al. 2022, arXiv:2203.11171);
the best by --reward (Cobbe et al. 2021, arXiv:2110.14168); and, as if one knew, a right one
(oracle).
"""
import argparse
import contextlib
import functools
import json
import math
import re
import tempfile
from decimal import Decimal
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

import common

SHARES, OTHERS = ("sampled", "greedy"), ("pass@k", "reward", "kl", "length", "stopped")
PICKS = ("first", "majority", "best", "oracle")
flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
add = flags.add_argument
add("checkpoints", nargs="*", help="without any: tiny/chat and the runs on it in runs/")
add("--dataset", default="tiny/data/prompt_heldout.jsonl", help="Hub name[:config], or a file")
add("--split", default="test", help="of a Hub dataset")
add("--columns", **common.COLUMNS, help="other names of columns: prompt=query completion=reply")
add("--chat-template", help="file with a chat template, in place of the model's own")
add("--template-arguments", **common.VARIABLES, help="variables that the chat template reads")
add("--size", type=common.count, default=300, help="prompts at most")
add("--samples-per-prompt", type=common.count, default=4, help="sampled answers to each prompt")
add("--k", type=common.count, help="k of pass@k (default: 4, or --samples-per-prompt if less)")
add("--best-of", type=common.natural, default=0, help="also pick one of so many samples")
add("--reward", default="correct_answer", help="or FILE.py:function, or a run of reward_model, prm")
add("--temperature", type=common.positive, default=1.0, help="of sampling")
add("--max-new-tokens", type=common.count, default=64, help="longest answer; GSM8K needs 512")
add("--micro-batch-size", type=common.count, default=128, help="answers at a time")
add("--load-in-4bit", **common.ON_GPU, help="quantise the base")
add("--seed", type=common.natural, default=0, help="of the samples")
add("--output", help="a new .json file for the table")


def encode_row(row, tokenizer, max_length, max_new_tokens, needs_answer):
    """The row, and the ids of its prompt. ValueError if it cannot be answered or scored."""
    prompt = common.prompt_of(row, tokenizer)
    ids = common.encode_prompt(tokenizer, prompt, row.get("tools"))
    if len(ids) + max_new_tokens > max_length:
        raise ValueError(f"prompt and answer exceed {max_length} tokens")
    if needs_answer and plain_number(row.get("answer")) is None:
        raise ValueError("no plain number as its answer: --reward examples/rewards.py:math_answer")
    return {"prompt": ids, "row": row | {"prompt": prompt}}


def join_answers(prompts, answers, tokenizer, model):
    """Prompts and answers as [B, T] tensors, padded on the right; the loss mask is 1 on answers."""
    rows = [prompt + answer for prompt, answer in zip(prompts, answers, strict=True)]
    batch = tokenizer.pad({"input_ids": rows}, padding_side="right", return_tensors="pt")
    starts = torch.tensor([[len(prompt)] for prompt in prompts])  # [B, 1]
    columns = torch.arange(batch["input_ids"].shape[1])  # [T]
    batch["loss_mask"] = batch["attention_mask"] * (columns >= starts)
    stop_ids = common.stop_token_ids(tokenizer, model.generation_config)
    batch["stopped"] = torch.tensor([ids[-1] in stop_ids for ids in answers])  # [B]
    return {name: value.to(model.device) for name, value in batch.items()}


# ---- the method ----------------------------------------------------------------------------------

def token_logps(model, batch, temperature=1.0):
    """[B, T-1]: column t is log p(token t+1 | tokens ≤ t) where the loss mask is 1, else 0."""
    causal = common.causal_lm(model)
    used = batch["attention_mask"].any(0)  # [T]: the L columns that are not padding in every row
    inputs = {name: batch[name][:, used] for name in ("input_ids", "attention_mask")}  # [B, L]
    hidden = causal.base_model(**inputs, use_cache=False)[0]  # [B, L, D]
    scored = batch["loss_mask"][:, 1:].bool()  # [B, T-1]: position t predicts token t+1
    hidden = hidden[:, :-1][scored[:, used[1:]]]  # [N, D]
    targets = batch["input_ids"][:, 1:][scored]  # [N]
    vocabulary = causal.get_output_embeddings().weight.shape[0]
    chunk = max(1, 2**24 // vocabulary)  # 64 MiB of logits: all, [N, V], would fill a T4
    logps = []
    for h, y in zip(hidden.split(chunk), targets.split(chunk), strict=True):  # [C, D], [C]
        logps.append(checkpoint(chunk_logps, h, y, causal, temperature, use_reentrant=False))
    return torch.zeros(scored.shape, device=hidden.device).masked_scatter(scored, torch.cat(logps))


def chunk_logps(hidden, targets, causal, temperature):
    # 16 bits would be too coarse
    logits = common.read_out(causal, hidden).float().div_(temperature)  # [C, V]
    return -F.cross_entropy(logits, targets, reduction="none")  # [C]


# ---- sampling ------------------------------------------------------------------------------------

@torch.no_grad()
def sample(model, tokenizer, prompts, copies, args, seed):
    """`copies` answers to each of P prompts, grouped by prompt, as lists of ids.

    From exactly softmax(logits / temperature): no top-k, no top-p, no penalties. Each answer ends
    with its stop token, unless it ran into --max-new-tokens.
    """
    was_training = model.training
    model.eval()  # in train mode gradient checkpointing would silently drop the cache
    causal = common.causal_lm(model)
    generator = torch.Generator(causal.device).manual_seed(seed)
    stop_ids = common.stop_token_ids(tokenizer, model.generation_config)
    stops = torch.tensor(stop_ids, device=causal.device)
    batch = tokenizer.pad({"input_ids": prompts}, padding_side="left", return_tensors="pt")
    mask = batch["attention_mask"].to(causal.device)  # [P, T]
    logits, cache = common.read(causal, batch["input_ids"].to(causal.device), mask)  # [P, V]
    # each prompt was read once, for all of its answers: from here on B = P × copies
    rows = torch.arange(len(mask), device=causal.device).repeat_interleave(copies)  # [B]
    cache.reorder_cache(rows)
    logits, mask = logits[rows], mask[rows]  # [B, V], [B, T]
    answers = [[] for _ in mask]
    alive = torch.arange(len(mask), device=causal.device)  # the answers that have not ended
    for length in range(1, args.max_new_tokens + 1):
        probs = (logits.float() / args.temperature).softmax(-1)  # [alive, V]
        token = torch.multinomial(probs, 1, generator=generator)  # [alive, 1]
        for i, new in zip(alive.tolist(), token[:, 0].tolist(), strict=True):
            answers[i].append(new)
        going = ~torch.isin(token[:, 0], stops)
        if length == args.max_new_tokens or not going.any():
            break
        if not going.all():  # answers that have ended leave the batch
            alive, token, mask = alive[going], token[going], mask[going]
            cache.reorder_cache(going.nonzero()[:, 0])
        mask = F.pad(mask, (0, 1), value=1)
        logits, cache = common.read(causal, token, mask, cache)  # [alive, V]
    model.train(was_training)
    return answers


# ---- what scores an answer -----------------------------------------------------------------------

def correct_answer(prompts, completions, answer, **columns):
    """1 where the last number of the completion is the row's column `answer`, else 0."""
    said = [last_number(text) for text in completions]
    truth = [plain_number(text) for text in answer]
    return [float(t is not None and s == t) for s, t in zip(said, truth, strict=True)]


# 1,000 is a number, 1,2345 are two, .5 is a half.
NUMBER = r"(?:\d{1,3}(?:,\d{3})+(?!\d)(?:\.\d+)?|\d*\.?\d+)"


def last_number(text):
    """The last number in a text, or None; 7-3 are two numbers, -$3 is one below 0."""
    found = re.findall(r"(?:(?<![\w)])[-−]\$?)?" + NUMBER, text)
    return Decimal(re.sub("[,$]", "", found[-1]).replace("−", "-")) if found else None


def plain_number(text):
    r"""The number that a row's answer is, alone or after its last ####. None for \frac{3}{4}."""
    alone = str(text).rpartition("####")[2].strip().removesuffix(".")
    is_plain = re.fullmatch(rf"([-−+]?\$?|\$[-−]){NUMBER} ?%?", alone)
    return last_number(alone) if is_plain else None


def call_reward(name, reward, examples, texts):
    """A score for each text, or None where the reward does not apply: a function of columns."""
    rows = [example["row"] for example in examples]
    columns = {key: [row.get(key) for row in rows] for key in set().union(*rows)}
    columns |= {"prompts": columns.pop("prompt"), "completions": texts}
    with common.phase(f"the reward {name} (completions are strings), on {str(rows[0]):.100}"):
        scores = [None if score is None else float(score) for score in reward(**columns)]
        # NaN fails this comparison, and so does what fp32 would turn into infinity.
        if len(scores) != len(rows) or not all(abs(score or 0) < 1e38 for score in scores):
            raise ValueError(f"not {len(rows)} numbers below 1e38 or None, but {scores}")
    return scores


def load_scorer(name, args):
    """What --reward names, as a function: a user's own, or one that asks a trained head."""
    if name == "correct_answer":
        return correct_answer
    if name.rpartition(":")[0].endswith(".py"):
        return common.load_function(name)
    with common.phase(f"loading the reward {name} ({common.ANOTHER_BASE})"):
        config = common.adapter_config(name)
        if not config or config.task_type != "SEQ_CLS":
            raise ValueError("no FILE.py:function, and no run of reward_model.py or prm.py")
        summary = Path(common.find(name), "summary.json")  # tiny/reward has none
        run = json.loads(summary.read_text()) if summary.exists() else {}
        run = run if isinstance(run, dict) else {}
    tokenizer = common.load_tokenizer(name)
    model = common.load_model(name, args.load_in_4bit, 0, "off", trainable=False, task="SEQ_CLS")
    by_steps = run.get("method") == "prm"
    return functools.partial(model_scores, model, tokenizer, by_steps, run.get("outcome"))


@torch.no_grad()
def model_scores(model, tokenizer, by_steps, outcome, /, prompts, completions, tools=None,
                 **columns):
    """r(x, y) of answers; by steps min p_k over lines, or p of the last; encoded as in training."""
    scores = []
    tools = tools or [None] * len(prompts)
    for prompt, text, tool in zip(prompts, completions, tools, strict=True):
        steps = [line.strip() for line in text.split("\n") if by_steps and line.strip()]
        text = "\n".join(steps) if by_steps else text  # as in prm.py, without empty lines
        if by_steps and isinstance(prompt, str):  # a chat, or lines below the prompt
            chat = [{"role": "user", "content": prompt}]
            prompt = chat if tokenizer.chat_template else prompt + "\n"
        said = text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]
        asked, answer = common.encode_prompt(tokenizer, prompt, tool), [tokenizer.eos_token_id]
        if text.strip():  # an empty answer is the token that ends it
            (head, _), (rest, _), (answer, _) = common.encode(tokenizer, prompt, said, tool)[0]
            asked = head + rest
        ends = step_ends(tokenizer, answer, steps)[-1 if outcome else 0:] or [len(answer) - 1]
        batch = tokenizer.pad({"input_ids": [asked + answer]}, return_tensors="pt")
        batch["step_ends"] = torch.tensor([ends]) + len(asked)  # [1, S]
        with common.autocast(model):
            logits = step_logits(model, batch.to(model.device), common.causal_lm(model).score)
        scores.append((logits.sigmoid() if by_steps else logits).min().item())
    return scores


def step_ends(tokenizer, ids, steps):
    """Where each step ends: the index in `ids`, an answer, of the token with its last character.

    Tokens may hold parts of characters, so it is decoded prefixes that tell what has been said. A
    binary search over them finds the first that says all of a step.
    """
    plain = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
    text = tokenizer.decode(ids, **plain)
    ends, low, done = [], 0, 0
    for step in steps:
        start = text.find(step, done)
        if start < 0:
            raise ValueError(f"its tokens do not spell the step {step!r:.80}")
        done, high = start + len(step), len(ids) - 1
        while low < high:
            last = middle = (low + high) // 2
            # a prefix that ends within a character is spelled wrong: then a shorter one counts
            while not text.startswith(said := tokenizer.decode(ids[:last + 1], **plain)):
                last -= 1
            if len(said) >= done:
                high = last
            else:
                low = middle + 1
        ends.append(low)
    return ends


def step_logits(model, batch, head):
    """The logit of each step, [B, S], read at its last token; rows with fewer steps are padded."""
    causal = common.causal_lm(model)
    hidden = causal.base_model(input_ids=batch["input_ids"], use_cache=False,
                               attention_mask=batch["attention_mask"])[0]  # [B, T, D]
    hidden = hidden[torch.arange(len(hidden))[:, None], batch["step_ends"]]  # [B, S, D]
    # not `@`, which autocast would round to 16 bits: too coarse to compare
    return (hidden.float() * head.weight.float()).sum(-1)  # [B, S]


# ---- the table -----------------------------------------------------------------------------------

def pass_at_k(hits, count, k):
    """One minus the chance of drawing k wrong ones, where `hits` of `count` samples were right."""
    return 1 - math.comb(count - hits, k) / math.comb(count, k)


def wilson(share, count, z=1.96):
    """The 95% interval of a share, as if all samples of a prompt were alike (Wilson 1927)."""
    center = share + z * z / (2 * count)
    spread = z * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    return tuple(min(1, max(0, (center + x) / (1 + z * z / count))) for x in (-spread, spread))


def pick(count, texts, scores, right):
    """Whether what is picked of the first samples of a prompt is right, in each way of PICKS."""
    numbers, scores, right = list(map(last_number, texts))[:count], scores[:count], right[:count]
    said = [number for number in numbers if number is not None] or [None]
    voted = numbers.index(max(said, key=said.count))  # of equals the one that was said first
    picked = (right[0], right[voted], right[scores.index(max(scores))], max(right))
    return dict(zip(PICKS, picked, strict=True))


@torch.no_grad()
def measure(name, first, tokenizer, examples, reward, args):
    """The line of a checkpoint; its KL is from the checkpoint `first`, if that is not None."""
    model = common.load_model(name, args.load_in_4bit, 0, "off", trainable=False)
    on_first = first and common.adapter_config(name) and common.base_of(name) == common.find(first)
    other = model if on_first else None  # with its adapter off it is the first checkpoint
    if first and not on_first:
        other = common.load_model(first, args.load_in_4bit, 0, "off", trainable=False)
    greedy = argparse.Namespace(**vars(args) | {"temperature": 1e-6})  # of equals, one by chance
    figures = {column: [] for column in SHARES + OTHERS + (PICKS if args.best_of else ())}
    samples = args.samples_per_prompt
    size = max(1, args.micro_batch_size // samples)
    for i in tqdm(range(0, len(examples), size), desc=common.visible(name), leave=False):
        part = examples[i:i + size]
        prompts = [example["prompt"] for example in part]
        with common.autocast(model):
            likeliest = sample(model, tokenizer, prompts, 1, greedy, args.seed)
            answers = sample(model, tokenizer, prompts, samples, args, args.seed + i)
        texts = tokenizer.batch_decode(likeliest, skip_special_tokens=True)
        figures["greedy"] += call_reward("correct_answer", correct_answer, part, texts)
        part = [example for example in part for _ in range(samples)]
        texts = tokenizer.batch_decode(answers, skip_special_tokens=True)
        right = call_reward("correct_answer", correct_answer, part, texts)
        figures["sampled"] += right
        for j in range(0, len(texts), samples):
            group = slice(j, j + samples)  # the answers to one prompt
            scores = call_reward(args.reward, reward, part[group], texts[group])
            figures["reward"] += [score for score in scores if score is not None]
            figures["pass@k"].append(pass_at_k(round(sum(right[group])), samples, args.k))
            if args.best_of:
                if None in scores:
                    common.fail(f"--best-of picks by {args.reward}, which must not return None")
                for way, share in pick(args.best_of, texts[group], scores, right[group]).items():
                    figures[way].append(share)
        batch = join_answers([example["prompt"] for example in part], answers, tokenizer, model)
        figures["length"] += [len(answer) for answer in answers]
        figures["stopped"] += batch["stopped"].tolist()
        if other:
            with common.autocast(model):
                logps = token_logps(model, batch, args.temperature)  # [B, T-1]
                with common.using(model, None) if on_first else contextlib.nullcontext():
                    first_logps = token_logps(other, batch, args.temperature)  # [B, T-1]
            figures["kl"] += (logps - first_logps).sum(1).tolist()
    line = {"checkpoint": name}
    line |= {column: sum(x) / len(x) if x else None for column, x in figures.items()}
    for column in SHARES + (PICKS if args.best_of else ()):
        line[f"{column}_interval"] = wilson(line[column], len(examples))
    return line


def tiny_runs():
    """The runs in runs/ that trained the tiny model to answer."""
    names = []
    for file in sorted(Path("runs").glob("*/summary.json")):
        with common.phase(f"reading {file}"):
            method = json.loads(file.read_text())["method"]
        if method not in ("reward_model", "prm") and common.is_tiny(str(file.parent)):
            names.append(str(file.parent))
    return names


def show_table(lines, shares, others, args):
    width = max(len(common.visible(line["checkpoint"])) for line in lines)
    titles = "".join(f"{name.replace('@k', f'@{args.k}'):>9}" for name in others)
    print(f"\n{'':<{width}}" + "".join(f"{name:>21}" for name in shares) + titles)
    for line in lines:
        row = f"{common.visible(line['checkpoint']):<{width}}"
        for column in shares:
            low, high = line[f"{column}_interval"]
            row += f"  {line[column]:.3f} ({low:.3f}–{high:.3f})"
        print(row, *("       -" if line[x] is None else f"{line[x]:8.3f}" for x in others))


def main(args):
    args.samples_per_prompt = max(args.samples_per_prompt, args.best_of)
    args.k = args.k or min(4, args.samples_per_prompt)
    if args.k > args.samples_per_prompt:
        common.fail(f"--k {args.k} needs at least as many --samples-per-prompt")
    if args.output is not None:
        output = Path(args.output)
        with common.phase(f"--output {output}, which must be a new file in a folder that is there"):
            output.open("x").close()
            output.unlink()
    names = args.checkpoints or ["tiny/chat", *tiny_runs()]
    reward = load_scorer(args.reward, args)
    rows = common.load_rows(args.dataset, args.split, args.size, args.seed, args.columns)
    rows = rows[:args.size]
    encode = functools.partial(encode_row, max_new_tokens=args.max_new_tokens, needs_answer=True)
    tokenizers, examples, used = {}, {}, {}
    for name in names:  # what is wrong with one of them shows before the first is measured
        tokenizers[name] = common.load_tokenizer(
            name, args.chat_template, args.template_arguments)
        examples[name] = common.encode_rows(args.dataset, rows, encode, tokenizers[name], 10**9)
        prompts = [example["row"]["prompt"] for example in examples[name]]
        # a prompt made of a question has the form that fits the tokenizer
        used[name] = [prompt.strip() if isinstance(prompt, str) else prompt[-1]["content"].strip()
                      for prompt in prompts]
        if used[name] != used[names[0]]:
            common.fail(f"{name} can use other rows of {args.dataset} than {names[0]}")
    lines = []
    for name in names:
        tokenizer = tokenizers[name]
        same_tokens = tokenizer.get_vocab() == tokenizers[names[0]].get_vocab()
        first = names[0] if lines and same_tokens else None
        lines.append(measure(name, first, tokenizer, examples[name], reward, args))
    if args.output is not None:
        with common.phase(f"writing {output}"):
            with tempfile.TemporaryDirectory(dir=output.parent) as folder:
                Path(folder, "table").write_text(json.dumps(lines, indent=2))
                Path(folder, "table").replace(output)
    print(f"\n{args.samples_per_prompt} samples per prompt at temperature {args.temperature}")
    show_table(lines, SHARES, OTHERS, args)
    if args.best_of:
        print(f"\none of {args.best_of} samples, the best by {common.visible(args.reward)}")
        show_table(lines, PICKS, [], args)


if __name__ == "__main__":
    with common.running("--micro-batch-size, then --max-new-tokens", resumes=""):
        flags.error = common.fail
        main(flags.parse_args())
