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
    """The row and the token ids of its prompt. A row that cannot be used raises ValueError."""
    prompt = common.prompt_of(row, tokenizer)
    ids = common.encode_prompt(tokenizer, prompt, row.get("tools"))
    if len(ids) + max_new_tokens > max_length:
        raise ValueError(f"prompt and answer exceed {max_length} tokens")
    if needs_answer and plain_number(row.get("answer")) is None:
        raise ValueError("no plain number as its answer: --reward examples/rewards.py:math_answer")
    return {"prompt": ids, "row": row | {"prompt": prompt}}


def join_answers(prompts, answers, tokenizer, model):
    """Prompts and answers as tensors [B, T], padded on the right. The loss mask is 1 on answers."""
    rows = [prompt + answer for prompt, answer in zip(prompts, answers, strict=True)]
    batch = tokenizer.pad({"input_ids": rows}, padding_side="right", return_tensors="pt")
    # The mask follows from lengths, because the pad token may also be a token of an answer.
    starts = torch.tensor([[len(prompt)] for prompt in prompts])  # [B, 1]
    columns = torch.arange(batch["input_ids"].shape[1])  # [T]
    batch["loss_mask"] = batch["attention_mask"] * (columns >= starts)  # [B, T]
    stop_ids = common.stop_token_ids(tokenizer, model.generation_config)
    batch["stopped"] = torch.tensor([ids[-1] in stop_ids for ids in answers])  # [B]
    return {name: value.to(model.device) for name, value in batch.items()}


# ---- the method ----------------------------------------------------------------------------------

def token_logps(model, batch, temperature=1.0):
    """[B, T-1]: column t is log p(token t+1 | tokens ≤ t) where the loss mask is 1, else 0.

    The same as these two lines, which would hold the logits of all positions in memory at once:

        logps = (model(input_ids).logits[:, :-1] / temperature).log_softmax(-1)     # [B, T-1, V]
        return logps.gather(2, input_ids[:, 1:, None])[:, :, 0] * loss_mask[:, 1:]  # [B, T-1]

    Here logits are computed only where the mask is 1, for C positions at a time, and `checkpoint`
    computes them once more in the backward pass instead of storing them.
    """
    causal = common.causal_lm(model)
    # Columns that are padding in every row are not read. L ≤ T columns remain.
    used = batch["attention_mask"].any(0)  # [T]
    inputs = {name: batch[name][:, used] for name in ("input_ids", "attention_mask")}  # [B, L]
    hidden = causal.base_model(**inputs, use_cache=False)[0]  # [B, L, D]
    # The hidden state at position t predicts token t+1, so targets start at the second token.
    is_target = batch["loss_mask"][:, 1:].bool()  # [B, T-1]
    targets = batch["input_ids"][:, 1:][is_target]  # [N]
    hidden = hidden[:, :-1][is_target[:, used[1:]]]  # [N, D]
    # The logits of one chunk take 64 MiB. All of them, [N, V], would fill a T4.
    vocabulary = causal.get_output_embeddings().weight.shape[0]
    chunk = max(1, 2**24 // vocabulary)
    logps = []
    for piece, target in zip(hidden.split(chunk), targets.split(chunk), strict=True):
        logps.append(checkpoint(
            chunk_logps, piece, target, causal, temperature, use_reentrant=False))  # [C]
    zeros = torch.zeros(is_target.shape, device=hidden.device)  # [B, T-1]
    return zeros.masked_scatter(is_target, torch.cat(logps))


def chunk_logps(hidden, targets, causal, temperature):
    """The log-probs [C] of C target tokens, from the hidden states [C, D] that predict them."""
    # The softmax is computed in fp32, because 16 bits would be too coarse.
    logits = common.read_out(causal, hidden).float().div_(temperature)  # [C, V]
    return -F.cross_entropy(logits, targets, reduction="none")  # [C]


# ---- sampling ------------------------------------------------------------------------------------

@torch.no_grad()
def sample(model, tokenizer, prompts, copies, args, seed):
    """Samples `copies` answers to each of P prompts; returns lists of ids, grouped by prompt.

    Tokens are drawn from exactly softmax(logits / temperature): no top-k, no top-p, no penalties.
    An answer ends with its stop token, unless it reached --max-new-tokens.
    """
    was_training = model.training
    model.eval()  # in train mode, gradient checkpointing would silently drop the KV cache
    causal = common.causal_lm(model)
    generator = torch.Generator(causal.device).manual_seed(seed)
    stop_ids = common.stop_token_ids(tokenizer, model.generation_config)
    stops = torch.tensor(stop_ids, device=causal.device)
    # Left padding: all prompts end in the last column, where the first token is predicted.
    batch = tokenizer.pad({"input_ids": prompts}, padding_side="left", return_tensors="pt")
    mask = batch["attention_mask"].to(causal.device)  # [P, T]
    logits, cache = common.read(causal, batch["input_ids"].to(causal.device), mask)  # [P, V]
    # Each prompt is read once. Its KV cache is then repeated, so that B = P × copies rows follow.
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
        going = ~torch.isin(token[:, 0], stops)  # [alive]
        if length == args.max_new_tokens or not going.any():
            break
        # Answers that have ended leave the batch, and their rows leave the KV cache.
        if not going.all():
            alive, token, mask = alive[going], token[going], mask[going]
            cache.reorder_cache(going.nonzero()[:, 0])
        mask = F.pad(mask, (0, 1), value=1)
        logits, cache = common.read(causal, token, mask, cache)  # [alive, V]
    model.train(was_training)
    return answers


# ---- what scores an answer -----------------------------------------------------------------------

def correct_answer(prompts, completions, answer, **columns):
    """1 where the last number of the completion equals the row's column `answer`, else 0."""
    scores = []
    for completion, truth in zip(completions, answer, strict=True):
        number = plain_number(truth)
        scores.append(float(number is not None and last_number(completion) == number))
    return scores


# 1,000 is a number, 1,2345 are two, .5 is a half.
NUMBER = r"(?:\d{1,3}(?:,\d{3})+(?!\d)(?:\.\d+)?|\d*\.?\d+)"


def last_number(text):
    """The last number in a string, or None. "7-3" holds 7 and 3; "-$3" is a negative number."""
    found = re.findall(r"(?:(?<![\w)])[-−]\$?)?" + NUMBER, text)
    if not found:
        return None
    return Decimal(re.sub("[,$]", "", found[-1]).replace("−", "-"))


def plain_number(text):
    r"""The answer of a row, alone or after its last ####, as a number. None for \frac{3}{4}."""
    alone = str(text).rpartition("####")[2].strip().removesuffix(".")
    is_plain = re.fullmatch(rf"([-−+]?\$?|\$[-−]){NUMBER} ?%?", alone)
    return last_number(alone) if is_plain else None


def call_reward(name, function, examples, texts):
    """Calls a reward function with the columns of the rows: a score per text, or None for some.

    None means that the reward does not apply to an answer.
    """
    rows = [example["row"] for example in examples]
    columns = {key: [row.get(key) for row in rows] for key in set().union(*rows)}
    columns |= {"prompts": columns.pop("prompt"), "completions": texts}
    with common.phase(f"the reward {name} (completions are strings), on {str(rows[0]):.100}"):
        scores = [None if score is None else float(score) for score in function(**columns)]
        # NaN fails this comparison, and so does a number that would be infinite in fp32.
        if len(scores) != len(rows) or not all(abs(score or 0) < 1e38 for score in scores):
            raise ValueError(f"not {len(rows)} numbers below 1e38 or None, but {scores}")
    return scores


def load_scorer(name, args):
    """What --reward names, as a function of columns: the user's own, or one that asks a model."""
    if name == "correct_answer":
        return correct_answer
    if name.rpartition(":")[0].endswith(".py"):
        return common.load_function(name)
    with common.phase(f"loading the reward {name} ({common.ANOTHER_BASE})"):
        config = common.adapter_config(name)
        if not config or config.task_type != "SEQ_CLS":
            raise ValueError("no FILE.py:function, and no run of reward_model.py or prm.py")
        # summary.json says which script trained it. Without one, as in tiny/reward, or if it has
        # another form, it is a reward model.
        summary = Path(common.find(name), "summary.json")
        run = json.loads(summary.read_text()) if summary.exists() else {}
        run = run if isinstance(run, dict) else {}
    tokenizer = common.load_tokenizer(name)
    model = common.load_model(name, args.load_in_4bit, 0, "off", trainable=False, task="SEQ_CLS")
    by_steps = run.get("method") == "prm"
    return functools.partial(model_scores, model, tokenizer, by_steps, run.get("outcome"))


@torch.no_grad()
def model_scores(model, tokenizer, by_steps, outcome, /, prompts, completions, tools=None,
                 **columns):
    """Scores of answers by a reward model, r(x, y), or by steps: min p_k over the steps of y.

    With `outcome`, the model of the steps was trained on the last step alone: then p of that one.
    """
    scores = []
    tools = tools or [None] * len(prompts)
    for prompt, text, tool in zip(prompts, completions, tools, strict=True):
        steps = []
        # Each line is a step. Prompt and steps are joined as prm.py joins them in training.
        if by_steps:
            steps = [line.strip() for line in text.split("\n") if line.strip()]
            text = "\n".join(steps)
            if isinstance(prompt, str):
                chat = [{"role": "user", "content": prompt}]
                prompt = chat if tokenizer.chat_template else prompt + "\n"
        if text.strip():
            said = text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]
            (head, _), (rest, _), (answer, _) = common.encode(tokenizer, prompt, said, tool)[0]
            asked = head + rest
        else:  # an empty answer is the token that ends it
            asked = common.encode_prompt(tokenizer, prompt, tool)
            answer = [tokenizer.eos_token_id]
        ends = step_ends(tokenizer, answer, steps)[-1 if outcome else 0:] or [len(answer) - 1]
        batch = tokenizer.pad({"input_ids": [asked + answer]}, return_tensors="pt")
        batch["step_ends"] = torch.tensor([ends]) + len(asked)  # [1, S]
        with common.autocast(model):
            logits = step_logits(model, batch.to(model.device), common.causal_lm(model).score)
        scores.append((logits.sigmoid() if by_steps else logits).min().item())
    return scores


def step_ends(tokenizer, ids, steps):
    """The index in `ids`, an answer, of the token that completes each step of its text.

    A token may hold a part of a character, so the text is known for prefixes of the ids only.
    """
    plain = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
    text = tokenizer.decode(ids, **plain)
    ends = []
    end = 0  # the token that is looked at
    done = 0  # how many characters of the text it has to complete
    for step in steps:
        start = text.find(step, done)
        if start < 0:
            raise ValueError(f"its tokens do not spell the step {step!r:.80}")
        done = start + len(step)
        said = tokenizer.decode(ids[:end + 1], **plain)
        # A prefix that ends inside a character is spelled wrong: then the next token is needed.
        while len(said) < done or not text.startswith(said):
            end += 1
            said = tokenizer.decode(ids[:end + 1], **plain)
        ends.append(end)
    return ends


def step_logits(model, batch, head):
    """The logit of each step [B, S], read at its last token. Rows with fewer steps are padded."""
    causal = common.causal_lm(model)
    hidden = causal.base_model(input_ids=batch["input_ids"], use_cache=False,
                               attention_mask=batch["attention_mask"])[0]  # [B, T, D]
    hidden = hidden[torch.arange(len(hidden))[:, None], batch["step_ends"]]  # [B, S, D]
    # `@` would run in 16 bits under autocast, which is too coarse to compare two rewards.
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
