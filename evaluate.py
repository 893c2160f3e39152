"""Compares checkpoints: all of them answer the same prompts, and one table shows the results.

Losses and training rewards do not show which of two models is better, because each method defines
its own. This script measures the models of all methods in the same way: how often their answers to
held-out prompts are correct, and how far they have moved from the first checkpoint. A checkpoint is
a saved run, a local folder or a Hub name. Each row of the dataset needs a `prompt`, and a number as
its `answer`.

    sampled   accuracy of answers sampled at --temperature, with a 95% interval
    greedy    accuracy of greedy answers, which take the likeliest token each time; same interval
    pass@k    probability that at least one of k samples is correct
    reward    mean --reward of the sampled answers (a run of prm.py gives p of the worst line, or of
              the last line if it was trained with --outcome)
    kl        KL(π ‖ π_first), where π_first is the first checkpoint, in nats per answer
    length    tokens per sampled answer
    stopped   share of the sampled answers that end before --max-new-tokens

The figures are estimated from n samples y_1 … y_n ~ π(·|x) for each of P prompts x. Let c of the n
samples be correct, and let p be an accuracy over all prompts. Then

    pass@k   = 1 − C(n − c, k) / C(n, k)      (Chen et al. 2021, arXiv:2107.03374, eq. 1)
    kl       = mean of log π(y|x) − log π_first(y|x)
    interval = (p + z²/2P ± z √(p (1 − p) / P + z²/4P²)) / (1 + z²/P),  z = 1.96   (Wilson 1927)

C(n − c, k) / C(n, k) is the probability that k of the n samples, drawn without replacement, are all
wrong. This makes the estimate unbiased; 1 − (1 − c/n)^k is biased. The mean of the log-ratios is an
unbiased estimate of the KL because the samples come from π, but a single log-ratio can be negative.
The interval counts prompts, not samples, because samples for one prompt are not independent.

With --best-of N, a second table shows the accuracy if one of N samples is picked:

    first      the first sample
    majority   a sample with the most frequent number (self-consistency, Wang et al. 2022,
               arXiv:2203.11171)
    best       the sample with the highest --reward (Cobbe et al. 2021, arXiv:2110.14168)
    oracle     a correct sample if there is one: an upper bound for every way of picking

A worked example: the answer to one prompt is 7, and four samples end in 8, 7, 8 and no number.

    c = 1 of n = 4    pass@1 = 1 − 3/4 = 0.25    pass@2 = 1 − 3/6 = 0.5    pass@4 = 1
    rewards 0.2, 0.9, 0.4, 0.1: first and majority (8) are wrong, best (7) and oracle are correct
    two answers with log π −2.0, −3.0 and log π_first −4.0, −3.5: kl = (2.0 + 0.5) / 2 = 1.25
    180 correct answers to 300 prompts: accuracy 0.600, interval 0.544 to 0.654

    python evaluate.py                            # the tiny model and every run on it in runs/
    python evaluate.py Qwen/Qwen2.5-0.5B runs/dpo --dataset openai/gsm8k:main --max-new-tokens 512
    python evaluate.py tiny/chat --best-of 8 --reward tiny/reward

What to watch. If `sampled` rises while pass@k falls, the policy has become more certain but not
more capable: its samples are less diverse. If `reward` rises while `sampled` falls, the policy
exploits the reward (reward hacking). Of two runs with the same accuracy, prefer the one with the
smaller `kl`: it has changed the model less. Differences within the intervals may be noise.

Change one thing: with `--best-of 8 --reward tiny/reward` the accuracy of tiny/chat is 0.543 for the
first sample, 0.923 for the majority, 0.937 for the best, and 0.993 for the oracle. The policy can
answer nearly all prompts; it only has to learn which of its samples to prefer.

Shapes: P prompts with n samples each; B rows of T tokens, of which L ≤ T columns hold tokens; N
answer tokens in a batch, read C at a time; width D, vocabulary V; S steps in an answer.
"""
import argparse
import collections
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

SHARES = ("sampled", "greedy")  # columns with an interval
OTHERS = ("pass@k", "reward", "kl", "length", "stopped")
PICKS = ("first", "majority", "best", "oracle")  # columns of --best-of


def make_flags():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=common.HelpFormatter)
    add = parser.add_argument
    add("checkpoints", nargs="*",
        help="saved runs, folders or Hub names; by default tiny/chat and its runs in runs/")
    add("--dataset", default="tiny/data/prompt_heldout.jsonl", help="Hub name[:config] or file")
    add("--split", default="test", help="split of a Hub dataset")
    add("--columns", **common.COLUMNS)
    add("--chat-template", help=common.TEMPLATE)
    add("--template-arguments", **common.VARIABLES)
    add("--size", type=common.count, default=300, help="maximum number of prompts")
    add("--samples-per-prompt", type=common.count, default=4,
        help="sampled answers per prompt, n; raised to --best-of if that is larger")
    add("--k", type=common.count, help="k of pass@k; by default 4, or n if that is less")
    add("--best-of", type=common.natural, default=0,
        help="number of samples, N, from which one is picked; 0 picks none")
    add("--reward", default="correct_answer",
        help="correct_answer, FILE.py:function, or a run of reward_model.py or prm.py")
    add("--temperature", type=common.positive, default=1.0, help="sampling temperature")
    add("--max-new-tokens", type=common.count, default=64,
        help="longest answer, in tokens; GSM8K needs 512")
    add("--micro-batch-size", type=common.count, default=128, help="answers sampled at a time")
    add("--load-in-4bit", **common.ON_GPU, help="quantize the models to 4 bits (NF4)")
    add("--seed", type=common.natural, default=0, help="seed of the samples")
    add("--output", help="new .json file for the table")
    return parser


# ---- data ----------------------------------------------------------------------------------------

def encode_row(row, tokenizer, max_length, max_new_tokens, needs_answer):
    """The row and the token ids of its prompt. A row that cannot be used raises ValueError."""
    prompt = common.prompt_of(row, tokenizer)
    ids = common.encode_prompt(tokenizer, prompt, row.get("tools"))
    if len(ids) + max_new_tokens > max_length:
        raise ValueError(f"prompt and answer exceed {max_length} tokens")
    if needs_answer and plain_number(row.get("answer")) is None:
        raise ValueError("its answer is not a plain number; for others, use --reward "
                         "examples/rewards.py:math_answer")
    return {"prompt": ids, "row": row | {"prompt": prompt}}


def join_answers(prompts, answers, tokenizer, model):
    """Prompts and answers as tensors [B, T], padded on the right. The loss mask is 1 on answers."""
    rows = [prompt + answer for prompt, answer in zip(prompts, answers, strict=True)]
    batch = tokenizer.pad({"input_ids": rows}, padding_side="right", return_tensors="pt")
    # The mask is built from lengths, because the pad token may also be a token of an answer.
    starts = torch.tensor([[len(prompt)] for prompt in prompts])  # [B, 1]
    columns = torch.arange(batch["input_ids"].shape[1])  # [T]
    batch["loss_mask"] = batch["attention_mask"] * (columns >= starts)  # [B, T]
    stop_ids = common.stop_token_ids(tokenizer, model.generation_config)
    batch["stopped"] = torch.tensor([ids[-1] in stop_ids for ids in answers])  # [B]
    return {name: value.to(model.device) for name, value in batch.items()}


# ---- the method ----------------------------------------------------------------------------------

def token_logps(model, batch, temperature=1.0):
    """[B, T-1]: column t is log p(token t+1 | tokens ≤ t) where the loss mask is 1, else 0.

    Equivalent to these two lines, which would hold the logits of all positions in memory at once:

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
    # The logits of one chunk take 64 MiB. All of them, [N, V], could fill a T4.
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
    # The softmax is computed in fp32, because 16-bit numbers are too coarse.
    logits = common.read_out(causal, hidden).float().div_(temperature)  # [C, V]
    return -F.cross_entropy(logits, targets, reduction="none")  # [C]


# ---- sampling ------------------------------------------------------------------------------------

@torch.no_grad()
def sample(model, tokenizer, prompts, copies, args, seed):
    """Samples `copies` answers to each of P prompts; returns lists of ids, grouped by prompt.

    Tokens are drawn from exactly softmax(logits / temperature): no top-k, no top-p, no penalties.
    An answer ends with its stop token, unless it was truncated at --max-new-tokens.
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


# ---- rewards -------------------------------------------------------------------------------------

def correct_answer(prompts, completions, answer, **columns):
    """1 where the last number of the completion equals the row's column `answer`, else 0."""
    scores = []
    for completion, truth in zip(completions, answer, strict=True):
        number = plain_number(truth)
        scores.append(float(number is not None and last_number(completion) == number))
    return scores


# 1,000 is one number, 1,2345 is two numbers, and .5 is one half.
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
    """Calls a reward function with the columns of the rows.

    Returns a score per text, or None where the reward does not apply.
    """
    rows = [example["row"] for example in examples]
    columns = {key: [row.get(key) for row in rows] for key in set().union(*rows)}
    columns |= {"prompts": columns.pop("prompt"), "completions": texts}
    with common.phase(f"the reward {name} (completions are strings), on {str(rows[0]):.100}"):
        scores = [None if score is None else float(score) for score in function(**columns)]
        # NaN fails this comparison, and so does a number that would be infinite in fp32.
        if len(scores) != len(rows) or not all(abs(score or 0) < 1e38 for score in scores):
            raise ValueError(f"expected {len(rows)} numbers below 1e38 (or None), got {scores}")
    return scores


def load_scorer(name, args):
    """The reward as a function of columns: the user's own, or the score of a trained model."""
    if name == "correct_answer":
        return correct_answer
    if name.rpartition(":")[0].endswith(".py"):
        return common.load_function(name)
    with common.phase(f"loading the reward {name} ({common.ANOTHER_BASE})"):
        config = common.adapter_config(name)
        if not config or config.task_type != "SEQ_CLS":
            raise ValueError("neither FILE.py:function nor a run of reward_model.py or prm.py")
        # summary.json says which script trained the model. If there is none, as in tiny/reward, or
        # if it has another form, the model is taken to be a reward model.
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
    """Scores by a reward model, r(x, y), or by a process reward model, min p_k over steps k.

    With `outcome`, the process reward model was trained on last steps only, and p of the last step
    is the score.
    """
    scores = []
    tools = tools or [None] * len(prompts)
    for prompt, text, tool in zip(prompts, completions, tools, strict=True):
        steps = []
        # Each line is a step. Prompt and steps are joined in the same way as prm.py trains on them.
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
        else:  # an empty answer consists of its end token
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
    """For each step, the index in the answer's `ids` of the token that completes it."""
    plain = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
    text = tokenizer.decode(ids, **plain)

    def spelled(last):
        """How many characters of the text the tokens up to index `last` spell."""
        said = tokenizer.decode(ids[:last + 1], **plain)
        # A token may end inside a character, which is then decoded wrong.
        while not text.startswith(said):
            said = said[:-1]
        return len(said)

    ends = []
    end = 0
    done = 0
    for step in steps:
        start = text.find(step, done)
        if start < 0:
            raise ValueError(f"its tokens do not spell the step {step!r:.80}")
        done = start + len(step)
        while spelled(end) < done:
            end += 1
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


# ---- the figures ---------------------------------------------------------------------------------

def pass_at_k(correct, count, k):
    """The probability that k draws from `count` samples include one of the `correct` ones."""
    return 1 - math.comb(count - correct, k) / math.comb(count, k)


def wilson(share, count, z=1.96):
    """The 95% interval of a share of `count` prompts (Wilson 1927)."""
    center = share + z**2 / (2 * count)
    spread = z * math.sqrt(share * (1 - share) / count + z**2 / (4 * count**2))
    low = (center - spread) / (1 + z**2 / count)
    high = (center + spread) / (1 + z**2 / count)
    return max(0.0, low), min(1.0, high)


def pick(count, texts, scores, correct):
    """For each of PICKS, whether its choice among the first `count` answers is correct: 1 or 0."""
    scores = scores[:count]
    correct = correct[:count]
    numbers = [last_number(text) for text in texts[:count]]
    # Answers without a number have no vote. Ties go to the number that came first.
    votes = collections.Counter(number for number in numbers if number is not None)
    elected = max(votes, key=votes.get) if votes else None
    return {"first": correct[0], "majority": correct[numbers.index(elected)],
            "best": correct[scores.index(max(scores))], "oracle": max(correct)}


def answer_log_ratios(model, first, batch, temperature):
    """log π(y|x) − log π_first(y|x) of each answer, [B]; its mean estimates KL(π ‖ π_first).

    If `first` is `model` itself, π_first is the model without its adapter.
    """
    logps = token_logps(model, batch, temperature)  # [B, T-1]
    if first is model:
        with common.using(model, None):
            first_logps = token_logps(model, batch, temperature)  # [B, T-1]
    else:
        first_logps = token_logps(first, batch, temperature)  # [B, T-1]
    return (logps - first_logps).sum(1)


@torch.no_grad()
def measure(name, model, first, tokenizer, examples, reward, args):
    """The table's row for one checkpoint. For `first`, see answer_log_ratios; None means no KL."""
    # At a temperature near 0 the likeliest token is drawn, and ties are broken at random.
    greedy_args = argparse.Namespace(**vars(args) | {"temperature": 1e-6})
    picks = PICKS if args.best_of else ()
    figures = {column: [] for column in SHARES + OTHERS + picks}
    samples = args.samples_per_prompt
    size = max(1, args.micro_batch_size // samples)
    for i in tqdm(range(0, len(examples), size), desc=common.visible(name), leave=False):
        # Sample one greedy answer and n others to each of a few prompts.
        part = examples[i:i + size]
        prompts = [example["prompt"] for example in part]
        with common.autocast(model):
            greedy = sample(model, tokenizer, prompts, 1, greedy_args, args.seed)
            answers = sample(model, tokenizer, prompts, samples, args, args.seed + i)

        # Which of them are correct?
        texts = tokenizer.batch_decode(greedy, skip_special_tokens=True)
        figures["greedy"] += call_reward("correct_answer", correct_answer, part, texts)
        part = [example for example in part for _ in range(samples)]  # one per answer
        texts = tokenizer.batch_decode(answers, skip_special_tokens=True)
        correct = call_reward("correct_answer", correct_answer, part, texts)
        figures["sampled"] += correct

        # Compute the figures of each prompt's n samples.
        for j in range(0, len(texts), samples):
            group = slice(j, j + samples)
            scores = call_reward(args.reward, reward, part[group], texts[group])
            figures["reward"] += [score for score in scores if score is not None]
            hits = round(sum(correct[group]))
            figures["pass@k"].append(pass_at_k(hits, samples, args.k))
            if args.best_of:
                if None in scores:
                    common.fail(f"--best-of picks by {args.reward}, which must not return None")
                picked = pick(args.best_of, texts[group], scores, correct[group])
                for way, is_correct in picked.items():
                    figures[way].append(is_correct)

        # Measure the lengths and the KL to the first checkpoint.
        prompts = [example["prompt"] for example in part]
        batch = join_answers(prompts, answers, tokenizer, model)
        figures["length"] += [len(answer) for answer in answers]
        figures["stopped"] += batch["stopped"].tolist()
        if first:
            with common.autocast(model):
                ratios = answer_log_ratios(model, first, batch, args.temperature)  # [B]
            figures["kl"] += ratios.tolist()
    line = {"checkpoint": name}
    for column, values in figures.items():
        line[column] = sum(values) / len(values) if values else None
    for column in SHARES + picks:
        line[f"{column}_interval"] = wilson(line[column], len(examples))
    return line


# ---- the program ---------------------------------------------------------------------------------

def tiny_runs():
    """The finished runs in runs/ in which the tiny model learned to answer."""
    names = []
    for file in sorted(Path("runs").glob("*/summary.json")):
        with common.phase(f"reading {file}"):
            method = json.loads(file.read_text())["method"]
        # The answers of agent.py's runs need tools, which this script does not have.
        answers = method not in ("reward_model", "prm", "agent")
        if answers and common.is_tiny(str(file.parent)):
            names.append(str(file.parent))
    return names


def is_adapter_on(name, base):
    """Whether the checkpoint `name` is an adapter on the checkpoint `base`."""
    return bool(common.adapter_config(name)) and common.base_of(name) == common.find(base)


def questions_of(examples):
    """The last message of each prompt, whose text does not depend on the tokenizer."""
    questions = []
    for example in examples:
        prompt = example["row"]["prompt"]
        text = prompt if isinstance(prompt, str) else prompt[-1]["content"]
        questions.append(text.strip())
    return questions


def show_table(lines, shares, others, args):
    """Prints one line per checkpoint: shares with their intervals, then the other columns."""
    width = max(len(common.visible(line["checkpoint"])) for line in lines)
    head = " " * width
    for column in shares:
        head += f"{column:>21}"
    for column in others:
        head += f"{column.replace('@k', f'@{args.k}'):>9}"
    print(f"\n{head}")
    for line in lines:
        row = f"{common.visible(line['checkpoint']):<{width}}"
        for column in shares:
            low, high = line[f"{column}_interval"]
            row += f"  {line[column]:.3f} ({low:.3f}–{high:.3f})"
        for column in others:
            row += f"{'-':>9}" if line[column] is None else f"{line[column]:9.3f}"
        print(row)


def main(args):
    # 1. Check the flags and load all the data, so that errors show before anything is measured.
    args.samples_per_prompt = max(args.samples_per_prompt, args.best_of)
    args.k = args.k or min(4, args.samples_per_prompt)
    if args.k > args.samples_per_prompt:
        common.fail(f"--k {args.k} is above --samples-per-prompt {args.samples_per_prompt}")
    if args.output is not None:
        output = Path(args.output)
        with common.phase(f"--output {output}, which must be a new file in an existing folder"):
            output.open("x").close()
            output.unlink()
    names = args.checkpoints or ["tiny/chat", *tiny_runs()]
    first_name = names[0]
    reward = load_scorer(args.reward, args)
    rows = common.load_rows(args.dataset, args.split, args.size, args.seed, args.columns)
    encode = functools.partial(encode_row, max_new_tokens=args.max_new_tokens, needs_answer=True)
    tokenizers = {}
    examples = {}
    for name in names:
        tokenizers[name] = common.load_tokenizer(
            name, args.chat_template, args.template_arguments)
        examples[name] = common.encode_rows(
            args.dataset, rows[:args.size], encode, tokenizers[name], 10**9)
        if questions_of(examples[name]) != questions_of(examples[first_name]):
            common.fail(f"{name} and {first_name} can use different rows of {args.dataset}")

    # 2. Measure the first checkpoint, which stays in memory if others are compared with it.
    options = (args.load_in_4bit, 0, "off", False)
    first_model = common.load_model(first_name, *options)
    lines = [measure(first_name, first_model, None, tokenizers[first_name], examples[first_name],
                     reward, args)]
    if all(is_adapter_on(name, first_name) for name in names[1:]):
        first_model = None  # every other checkpoint becomes the first when its adapter is off

    # 3. Measure the others.
    for name in names[1:]:
        model = common.load_model(name, *options)
        first = model if is_adapter_on(name, first_name) else first_model
        if tokenizers[name].get_vocab() != tokenizers[first_name].get_vocab():
            first = None  # log-probs over different vocabularies cannot be compared
        lines.append(measure(name, model, first, tokenizers[name], examples[name], reward, args))
        del model, first  # free the memory before the next one is loaded

    # 4. Save the table in one atomic write, and print it.
    if args.output is not None:
        with common.phase(f"writing {output}"):
            with tempfile.TemporaryDirectory(dir=output.parent) as folder:
                Path(folder, "table").write_text(json.dumps(lines, indent=2))
                Path(folder, "table").replace(output)
    print(f"\n{args.samples_per_prompt} samples per prompt at temperature {args.temperature}; "
          "95% intervals in parentheses")
    show_table(lines, SHARES, OTHERS, args)
    if args.best_of:
        reward_name = common.visible(args.reward)
        print(f"\naccuracy if one of {args.best_of} samples is picked; best: by {reward_name}")
        show_table(lines, PICKS, [], args)


if __name__ == "__main__":
    with common.running("--micro-batch-size, then --max-new-tokens", resumes=""):
        main(common.parse(make_flags()))
