"""Online DPO (Guo et al. 2024, arXiv:2402.04792) and its variants XPO and Nash-MD.

dpo.py learns from a fixed dataset of pairs. As the policy π changes, the answers in it resemble π's
own less and less, and say nothing about the mistakes that π makes now. Online DPO makes its own
pairs: in each step π samples two new answers y and y' to every prompt x, a reward (--reward)
scores both, and DPO's loss trains π to prefer the one with the higher score.

From the scores s of two answers, the probability that y beats y' is modeled as

    P(y ≻ y') = σ(s(y) − s(y'))                                        Bradley and Terry (1952)

and the implicit reward, as in dpo.py, compares π with π_ref, the model that training started from:

    r(x, y) = β log[π(y|x) / π_ref(y|x)]                        eq. 5 of DPO (arXiv:2305.18290)

The answer with the higher score is y_w, the other is y_l, and h = r(x, y_w) − r(x, y_l) is the
margin. --loss selects one of four losses. The answer y is always sampled from π. Each token of y'
is sampled from a geometric mixture of both models, π^(1−m) π_ref^m / Z, where Z normalizes the
probabilities. The table gives the default of m (--mixture):

    dpo      −log σ(h)                                 m = 0   Guo et al. 2024
    ipo      (h/β − 1/(2β))²                           m = 0   Azar et al. 2023, 2310.12036, eq. 17
    xpo      −log σ(h) + α log π(y'|x)                 m = 1   Xie et al. 2024, 2405.21046
    nash_md  −(P(y ≻ y') − ½ − r(x, y)) log π(y|x)     m = ⅛   Munos et al. 2023, 2312.00886

IPO pulls the margin to a target, while DPO pushes it up forever. XPO explores: y' is sampled from
π_ref, and the term with α makes it less likely, so that π tries answers that π_ref would not give.
Nash-MD does not assume that a score explains all preferences, because people may prefer A to B, B
to C and C to A. It needs only P, which need not come from scores (although it does here). It seeks
a policy that no other policy beats, the Nash equilibrium of a game. Its gradient is a policy
gradient: the bracket is treated as a constant that says how strongly to raise or lower log π(y|x).
It is the amount by which P(y ≻ y') exceeds ½, minus the KL penalty r(x, y).

If both scores are equal, there is no better answer, so dpo, ipo and xpo give such a tie the loss 0.
Compared with dpo.py, the implicit reward, the reference and the loss stay; sampling and scoring
take the place of the dataset. Compared with ppo.py and grpo.py, there is no advantage and no ratio
of probabilities.

A worked example. Let log π be −12 for y and −20 for y', and log π_ref −13 and −18. With β = 0.1,
r(x, y) = 0.1 and r(x, y') = −0.2. The scores are 1 for y and 0 for y', so P(y ≻ y') = σ(1) = 0.731,
y is y_w, and h = 0.3:

    dpo       −log σ(0.3) = 0.554; if y' had the higher score, −log σ(−0.3) = 0.854
    ipo       (3 − 5)² = 4: the log-ratios are 3 apart and should be 1/(2β) = 5 apart
    xpo       0.554 + 0.01 · (−20) = 0.354, with α = 0.01
    nash_md   gradient w.r.t. log π(y|x): −(0.731 − 0.5 − 0.1) = −0.131, so y becomes likelier

    python online_dpo.py                                      # the tiny model, two minutes
    python online_dpo.py --model Qwen/Qwen2.5-0.5B-Instruct   # GSM8K, 4 bits, for a 16 GB T4

What to watch: `reward` and `margin` rise while `kl` rises slowly. `ties` is the share of prompts
from which dpo, ipo and xpo learn nothing: if it is high, the prompts are too easy or too hard.

Change one thing: with `--temperature 0.3` the tiny model gives the same correct answer twice to
nearly every prompt. `ties` is 0.98 from the first step on (0.6 at temperature 1) and almost nothing
is learned, because a preference needs two answers that differ.

The default learning rate, 2e-5, is that of dpo.py. TRL suggests 5e-6 for DPO and 1e-5 for GRPO with
LoRA and has no figure for online DPO. If `kl` jumps up on your data, try one of these first.

Shapes: P prompts have B = 2P answers, first all y, then all y', in rows of T tokens; p ≤ P prompts
make a micro-batch. L ≤ T columns hold tokens (the rest are padding in every row), N positions
predict a token of an answer, and C of these are processed at a time. While sampling, A ≤ P answers
have not ended yet. D is the width of the model and V the size of its vocabulary.
"""
import argparse
import functools
import hashlib
import json
import math
import re
import time
from decimal import Decimal
from pathlib import Path

import filelock
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

import common

BY_LOSS = {"xpo": dict(mixture=1.0), "nash_md": dict(mixture=0.125)}  # as in their papers
TINY = dict(dataset="tiny/data/prompt_train.jsonl", eval_dataset="tiny/data/prompt_heldout.jsonl",
            batch_size=64, micro_batch_size=64, max_new_tokens=24, learning_rate=1e-3, max_steps=60)


def make_flags():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=common.HelpFormatter)
    add = parser.add_argument
    add("--model", default="tiny/chat", help="Hub name, local folder or LoRA adapter to start from")
    add("--reward", default="correct_answer",
        help="reward: correct_answer, FILE.py:function, or an output folder of reward_model.py")
    add("--dataset", default="openai/gsm8k:main", help="prompts: Hub name[:config] or local file")
    add("--split", default="train", help="split of a Hub dataset")
    add("--columns", **common.COLUMNS)
    add("--chat-template", help=common.TEMPLATE)
    add("--template-arguments", **common.VARIABLES)
    add("--eval-dataset", help="held-out prompts; if not given, some of --dataset are held out")
    add("--eval-size", type=common.count, default=64, help="number of held-out prompts")
    add("--loss", choices=["dpo", "ipo", "xpo", "nash_md"], default="dpo",
        help="loss function: online DPO or one of its variants")
    add("--beta", type=common.positive, default=0.1,
        help="KL penalty strength (τ in Nash-MD's paper)")
    add("--alpha", type=common.weight, default=1e-5, help="strength of xpo's exploration")
    add("--mixture", type=common.share, default=0.0,
        help="m, weight of π_ref in the mixture that y' is sampled from (β in Nash-MD's paper)")
    add("--preference", choices=["sigmoid", "hard"], default="sigmoid",
        help="nash_md: P(y ≻ y') as σ of the difference of scores, or hard: 1, ½ or 0")
    add("--missing-eos-penalty", type=common.weight, default=1.0,
        help="score deducted, in comparisons only, from an answer that does not stop")
    add("--batch-size", type=common.number(int, common.WORLD), default=32,
        help="prompts per optimizer step")
    add("--sample-batch-size", type=common.count, default=128, help="answers sampled at a time")
    add("--micro-batch-size", type=common.count, default=2,
        help="pairs per forward pass of training; answers per forward pass of scoring")
    add("--temperature", type=common.positive, default=1.0,
        help="sampling temperature; the loss divides the logits by it, too")
    add("--max-length", type=common.count, default=1024, help="longest prompt + answer, in tokens")
    add("--max-new-tokens", type=common.count, default=512, help="longest answer, in tokens")
    add("--learning-rate", type=common.positive, default=2e-5, help=common.PEAK)
    add("--max-steps", type=common.count, default=250, help="number of optimizer steps")
    add("--lora-rank", **common.LORA_RANK, type=common.count)
    add("--load-in-4bit", **common.FOUR_BIT)
    add("--gradient-checkpointing", **common.CHECKPOINTING)
    add("--save-every", type=common.count, default=20,
        help="steps between checkpoints, at which samples are shown as well")
    add("--seed", type=common.natural, default=0, help="seed of data order, LoRA and samples")
    add("--output-dir", default="runs/online_dpo", help=common.RESUMED)
    return parser


# ---- data: prompts, and answers with a mask on what is trained -----------------------------------

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


def online_loss(logps, other_logps, ref_logps, other_ref_logps, wins, loss, beta, alpha):
    """The losses of P pairs, [P].

    `logps` and `ref_logps` are log π(y|x) and log π_ref(y|x), `other_logps` and `other_ref_logps`
    the same for y', and `wins` is P(y ≻ y'): [P] each.
    """
    reward = beta * (logps - ref_logps)  # [P], r(x, y)
    other_reward = beta * (other_logps - other_ref_logps)  # [P], r(x, y')
    lead = wins - 0.5  # [P], positive where y has the higher score, negative where y' does
    margin = lead.sign() * (reward - other_reward)  # [P], h = r(x, y_w) − r(x, y_l)
    if loss == "nash_md":
        # Only the gradient is meaningful, not the value. Equal scores are no special case here.
        return -(lead - reward).detach() * logps  # [P]
    if loss == "dpo":
        losses = -F.logsigmoid(margin)  # [P]
    elif loss == "ipo":
        losses = (margin / beta - 1 / (2 * beta)) ** 2  # [P]
    elif loss == "xpo":
        losses = -F.logsigmoid(margin) + alpha * other_logps  # [P]
    # A tie makes no pair. (XPO's paper has no ties; here a tie loses the term with α, too.)
    return losses * (lead != 0)  # [P]


def batch_losses(logps, batch, args):
    """online_loss for a batch that holds all y, then all y'. `logps` are log π, [2P]."""
    y_logps, other_logps = logps.chunk(2)  # [P] each
    ref_logps, other_ref_logps = batch["ref_logps"].chunk(2)
    wins, _ = batch["wins"].chunk(2)
    return online_loss(y_logps, other_logps, ref_logps, other_ref_logps, wins, args.loss, args.beta,
                       args.alpha)  # [P]


# ---- sampling ------------------------------------------------------------------------------------

@torch.no_grad()
def sample_mixture(model, tokenizer, prompts, m, args, seed):
    """Samples an answer to each of P prompts, as ids, each token from π^(1−m) π_ref^m / Z.

    Each of π and π_ref has a KV cache with the keys and values of earlier tokens.
    """
    model.eval()  # in train mode, gradient checkpointing would silently drop the cache
    causal = common.causal_lm(model)
    generator = torch.Generator(causal.device).manual_seed(seed)
    stop_ids = common.stop_token_ids(tokenizer, model.generation_config)
    # With padding on the left, all prompts end in the same column. The first pass reads all tokens,
    # [P, T]; each later pass reads one token per answer, [A, 1].
    batch = tokenizer.pad({"input_ids": prompts}, padding_side="left", return_tensors="pt")
    tokens, mask = batch["input_ids"].to(causal.device), batch["attention_mask"].to(causal.device)
    cache = ref_cache = None
    answers = [[] for _ in prompts]
    # The A answers that have not ended. They are the same list objects as in `answers`, so that
    # appending to one extends its answer.
    alive = list(answers)
    for _ in range(args.max_new_tokens):
        mixed = 0.0
        if m < 1:
            logps, cache = next_logps(causal, tokens, mask, cache, args.temperature)
            mixed = mixed + (1 - m) * logps  # [A, V]
        if m > 0:
            with common.reference(model):
                ref_logps, ref_cache = next_logps(causal, tokens, mask, ref_cache, args.temperature)
            mixed = mixed + m * ref_logps  # [A, V]
        # The softmax divides by Z.
        tokens = torch.multinomial(mixed.softmax(-1), 1, generator=generator)  # [A, 1]
        for answer, token in zip(alive, tokens[:, 0].tolist(), strict=True):
            answer.append(token)
        going = [i for i, answer in enumerate(alive) if answer[-1] not in stop_ids]
        if not going:
            break
        # Answers that ended leave the batch, and their rows leave the caches.
        alive = [alive[i] for i in going]
        tokens = tokens[going]  # [A, 1]
        mask = F.pad(mask[going], (0, 1), value=1)
        for each in cache, ref_cache:
            if each is not None:
                each.reorder_cache(torch.tensor(going, device=causal.device))
    model.train()
    return answers


def next_logps(causal, tokens, mask, cache, temperature):
    """The log-probs of the next token of each answer, [A, V], and the cache."""
    logits, cache = common.read(causal, tokens, mask, cache)  # [A, V]
    return (logits.float() / temperature).log_softmax(-1), cache


def sample_in_parts(model, tokenizer, prompts, m, args, seed):
    """Samples --sample-batch-size answers at a time, to limit the memory of the KV caches."""
    answers = []
    for i in range(0, len(prompts), args.sample_batch_size):
        part = prompts[i:i + args.sample_batch_size]
        with common.autocast(model):
            # The seeds of y and y' differ by 1 (see `rollout`). Steps of 2 make all seeds differ.
            answers += sample_mixture(model, tokenizer, part, m, args, seed + 2 * i)
    return answers


# ---- rewards: scores of answers ------------------------------------------------------------------

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


def check_reward(name, policy):
    """Ends the program if --reward names neither a function nor a reward model for the policy."""
    if name.rpartition(":")[0].endswith(".py"):
        common.load_function(name)
    elif name != "correct_answer":
        common.reward_config(name, policy)


def load_reward(name, model):
    """The reward as a function (model, batch, examples, texts, args), which returns scores [B]."""
    if name == "correct_answer":
        return functools.partial(scores_of_function, name, correct_answer)
    if name.rpartition(":")[0].endswith(".py"):
        return functools.partial(scores_of_function, name, common.load_function(name))
    # A reward model is another adapter on the policy's base, plus a scalar head.
    head = common.add_role(model, name, "reward")
    return functools.partial(scores_of_model, name, head)


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


def scores_of_function(name, function, model, batch, examples, texts, args):
    """Scores [B] by a reward function; NaN where it returns None because it does not apply."""
    scores = call_reward(name, function, examples, texts)
    scores = [math.nan if score is None else score for score in scores]
    return torch.tensor(scores, device=model.device)


def scores_of_model(name, head, model, batch, examples, texts, args):
    """Scores [B] by a reward model, which reads the token ids as they were sampled."""
    with common.using(model, "reward"):
        scores = in_parts(sequence_rewards, model, batch, head, args)
    if not scores.isfinite().all():
        common.fail(f"the reward model {name} gives scores that are not finite numbers")
    return scores


def sequence_rewards(model, batch, head):
    """The reward [B] of each sequence, read at its last token. Padding is on the right."""
    # Columns that are padding in every row are not read. L ≤ T columns remain.
    used = batch["attention_mask"].any(0)  # [T]
    inputs = {name: batch[name][:, used] for name in ("input_ids", "attention_mask")}  # [B, L]
    hidden = common.causal_lm(model).base_model(**inputs, use_cache=False)[0]  # [B, L, D]
    last = inputs["attention_mask"].sum(-1) - 1  # [B]
    hidden = hidden[torch.arange(len(hidden)), last]  # [B, D]
    # `@` would run in 16 bits under autocast, which is too coarse to compare two rewards.
    return (hidden.float() * head.weight.float()).sum(-1)  # [B]


# ---- the run -------------------------------------------------------------------------------------

def rollout(model, reward, examples, tokenizer, args, seed):
    """Samples two answers to each of P prompts, and adds scores, preferences and log-probs.

    Returns a batch of tensors [2P, ...] without gradients, and the answers as ids: all y first,
    then all y'.
    """
    prompts = [example["prompt"] for example in examples]
    answers = sample_in_parts(model, tokenizer, prompts, 0, args, seed)
    answers += sample_in_parts(model, tokenizer, prompts, args.mixture, args, seed + 1)
    texts = tokenizer.batch_decode(answers, skip_special_tokens=True)
    batch = join_answers(prompts * 2, answers, tokenizer, model)
    batch["scores"] = reward(model, batch, examples * 2, texts, args)
    if batch["scores"].isnan().any():
        common.fail(f"the reward {args.reward} returns None: each answer needs a number here")
    # The penalty is for the comparison only; the scores are logged without it.
    penalized = batch["scores"] - args.missing_eos_penalty * ~batch["stopped"]  # [2P]
    other = penalized.roll(len(prompts))  # [2P], of the other answer to the same prompt
    gap = (penalized - other).double()  # in fp32, σ of a tiny gap would round to ½, a tie
    if args.preference == "sigmoid":
        batch["wins"] = gap.sigmoid()  # [2P], the probability that an answer beats the other
    else:
        batch["wins"] = 0.5 + 0.5 * gap.sign()
    batch["logps"] = in_parts(token_logps, model, batch, args.temperature, args).sum(1)  # [2P]
    with common.reference(model):
        batch["ref_logps"] = in_parts(token_logps, model, batch, args.temperature, args).sum(1)
    return batch, answers


@torch.no_grad()
def in_parts(function, model, batch, argument, args):
    """function(model, batch, argument) without gradients, one micro-batch at a time."""
    parts = []
    with common.autocast(model):
        for rows in torch.arange(len(batch["input_ids"])).split(args.micro_batch_size):
            micro = {name: value[rows] for name, value in batch.items()}
            parts.append(function(model, micro, argument))
    return torch.cat(parts)


def describe(batch, args):
    """The figures to log: means over the answers y, which π sampled, and means over the pairs.

    kl is in nats per answer. The means over pairs leave out ties, and are 0 if there is no pair.
    """
    prompts = len(batch["wins"]) // 2  # P
    first = {name: value[:prompts] for name, value in batch.items()}  # [P, ...] of y
    log_ratios = batch["logps"] - batch["ref_logps"]  # [2P]
    rewards, other_rewards = (args.beta * log_ratios).chunk(2)  # [P], r(x, y) and r(x, y')
    of_answers = {
        "reward": first["scores"], "stopped": first["stopped"], "kl": log_ratios[:prompts],
        "length": first["loss_mask"].sum(1), "ties": first["wins"] == 0.5,
        "preference": first["wins"], "loss": batch_losses(batch["logps"], batch, args)}
    y_won = first["wins"] > 0.5  # [P]
    chosen = torch.where(y_won, rewards, other_rewards)  # [P], r(x, y_w)
    rejected = torch.where(y_won, other_rewards, rewards)  # [P], r(x, y_l)
    of_pairs = {
        "margin": chosen - rejected, "accuracy": ((chosen - rejected).sign() + 1) / 2,
        "chosen_reward": chosen, "rejected_reward": rejected}
    is_pair = first["wins"] != 0.5  # [P]

    sums = {"answers": prompts, "pairs": is_pair.sum()}
    add_up(sums, of_answers)
    add_up(sums, {name: values * is_pair for name, values in of_pairs.items()})
    totals = over_processes(sums, list(sums), batch["wins"].device)
    metrics = {name: totals[name] / totals["answers"] for name in of_answers}
    return metrics | {name: totals[name] / max(1, totals["pairs"]) for name in of_pairs}


def some_samples(tokenizer, step, examples, answers, scores):
    """Up to four prompts with their sampled answers and scores, as text for the summary."""
    samples = []
    for example, answer, score in zip(examples[:4], answers, scores.tolist(), strict=False):
        samples.append({"step": step, "prompt": common.shown_text(tokenizer, example["prompt"]),
                        "answer": common.shown_text(tokenizer, answer), "score": score})
    return samples


def train(args):
    # 1. Load the reward and the prompts first, so that bad data fails before the model is loaded.
    check_reward(args.reward, args.model)
    tokenizer = common.load_tokenizer(args.model, args.chat_template, args.template_arguments)
    encode = functools.partial(encode_row, max_new_tokens=args.max_new_tokens,
                               needs_answer=args.reward == "correct_answer")
    wanted = args.max_steps * args.batch_size
    examples, held_out = common.load_examples(args, encode, tokenizer, wanted)
    torch.manual_seed(args.seed)  # for the order of the prompts, then for the LoRA matrices
    epochs = math.ceil(wanted / len(examples))
    order = [torch.randperm(len(examples)) for _ in range(epochs)]
    batches = torch.cat(order).split(args.batch_size)

    # 2. Load the model: a frozen base with trainable LoRA matrices.
    model = common.load_model(
        args.model, args.load_in_4bit, args.lora_rank, args.gradient_checkpointing)
    reward = load_reward(args.reward, model)
    weights = {name: p for name, p in model.named_parameters() if p.requires_grad}
    # `update` sets the learning rate.
    optimizer = torch.optim.AdamW(weights.values(), weight_decay=0.0)
    scaler = common.grad_scaler(model)  # for fp16 (a T4), where small gradients round to 0
    common.print_settings(model)

    # 3. Start a new run, or resume an interrupted one.
    open_run(args, [examples, held_out])
    state = restore(args, weights, optimizer, scaler)
    if "before" not in state:
        batch, _ = rollout(model, reward, held_out, tokenizer, args, args.seed)
        state["before"] = describe(batch, args)

    progress = tqdm(range(state["step"] + 1, args.max_steps + 1), initial=state["step"],
                    total=args.max_steps, disable=common.RANK > 0)
    for step in progress:
        # 4. Sample and score two answers to each prompt of this process. The seed depends on the
        #    step and the process, so that no seed repeats and a resumed run draws the same answers.
        began = time.time()
        mine = [examples[i] for i in batches[step - 1][common.RANK::common.WORLD]]
        seed = args.seed + 10**6 * (step * common.WORLD + common.RANK)
        batch, answers = rollout(model, reward, mine, tokenizer, args, seed)
        metrics = {"step": step, **describe(batch, args), "rollout_seconds": time.time() - began}

        # 5. Accumulate the gradients of the micro-batches. Each prompt has the weight 1 / batch
        #    size, so that the sum over micro-batches and processes is the gradient of the mean.
        for firsts in torch.arange(len(mine)).split(args.micro_batch_size):  # [p], rows of y
            rows = torch.cat([firsts, firsts + len(mine)])  # [2p], the rows of y, then those of y'
            micro = {name: value[rows] for name, value in batch.items()}
            with common.autocast(model):
                logps = token_logps(model, micro, args.temperature).sum(1)  # [2p], with a gradient
            losses = batch_losses(logps, micro, args)  # [p]
            scaler.scale(losses.sum() / args.batch_size).backward()

        # 6. Take one optimizer step with the gradients of all processes, summed and clipped.
        lr = learning_rate(step, args.max_steps, args.learning_rate)
        metrics |= update(optimizer, scaler, lr)

        # 7. Log the step; from time to time, show some samples and save a checkpoint.
        tokens = batch["attention_mask"].sum()
        sum_over_processes([tokens])
        metrics["seconds"] = time.time() - began
        log_step(args, state, metrics, tokens.item(), progress, ("reward", "kl"))
        if step % args.save_every == 0 or step == args.max_steps:
            firsts = answers[:len(mine)]
            state["samples"] += some_samples(tokenizer, step, mine, firsts, batch["scores"])
            save(args, state, weights, optimizer, scaler)
            tqdm.write(f"\nsamples of step {step}, answers in green:")
            for sample in state["samples"][-4:]:
                tqdm.write("{prompt}\033[32m{answer}\033[0m\nscore {score:.2f}\n".format(**sample))

    # 8. Evaluate again on the same held-out prompts with the same seed, and save the adapter.
    batch, _ = rollout(model, reward, held_out, tokenizer, args, args.seed)
    finish(args, state, model, tokenizer, describe(batch, args))
    show_next(args)


# ---- the optimizer step --------------------------------------------------------------------------

def learning_rate(step, steps, peak):
    """Linear warm-up to `peak` over 10% of the steps, then cosine decay; never exactly 0."""
    warm_up = step / (round(0.1 * steps) + 1)
    decay = 0.5 + 0.5 * math.cos(math.pi * (step - 1) / steps)
    return peak * min(warm_up, decay)


def update(optimizer, scaler, lr):
    """Sums the gradients over all processes, clips them and takes a step; returns what to log."""
    weights = optimizer.param_groups[0]["params"]
    # A process without a share of the batch has no gradients, but takes part in the sum.
    for weight in weights:
        if weight.grad is None:
            weight.grad = torch.zeros_like(weight)
    sum_over_processes([weight.grad for weight in weights])
    # Clipping limits the norm of the gradient over all weights to 1.
    scaler.unscale_(optimizer)
    norm = torch.nn.utils.clip_grad_norm_(weights, 1.0).item()
    # If fp16 gradients overflow, the scaler skips the step and halves its scale, down to 1.
    if not math.isfinite(norm) and scaler.get_scale() <= 1:
        common.fail(f"the gradient is {norm}: most likely the --learning-rate is too high")
    optimizer.param_groups[0]["lr"] = lr
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad()
    return {"grad_norm": norm if math.isfinite(norm) else None, "learning_rate": lr,
            "loss_scale": scaler.get_scale()}


# ---- housekeeping: nothing below is about the method, and it is the same in every script ---------

def sum_over_processes(tensors):
    """Replaces each tensor by its sum over all processes. With one process, it changes nothing."""
    if dist.is_initialized():
        for tensor in tensors:
            dist.all_reduce(tensor)


def add_up(sums, figures):
    """Adds the sum of each figure, {name: [B]}, to `sums`, in fp64."""
    for name, values in figures.items():
        sums[name] = sums.get(name, 0.0) + values.detach().double().sum()


def over_processes(sums, names, device):
    """{name: float}: the sums of all processes. A process without a share of the rows adds 0."""
    totals = {name: torch.as_tensor(sums.get(name, 0.0), dtype=torch.float64, device=device)
              for name in names}
    sum_over_processes(list(totals.values()))
    return {name: total.item() for name, total in totals.items()}


def open_run(args, examples):
    """Opens --output-dir: a new folder, or the folder of an interrupted run of the same command.

    args.json records the flags, a hash of the examples, and a hash of the files of models and
    rewards. A run is resumed only if all of them are the same.
    """
    if common.RANK > 0:
        return
    folder = Path(args.output_dir)
    file = folder / "args.json"
    data = hashlib.sha256(json.dumps(examples, default=str).encode()).hexdigest()
    loaded = [args.model]
    for flag in ("reward", "teacher"):
        value = getattr(args, flag, [])
        loaded += [value] if isinstance(value, str) else value
    files = common.fingerprint(*loaded)
    text = json.dumps(vars(args) | {"data": data, "files": files}, indent=2)
    with common.phase(f"--output-dir {folder}, which is for one run at a time"):
        folder.mkdir(parents=True, exist_ok=True)
        # The lock is released when the process ends, in whatever way. Its file may stay.
        open_run.lock = filelock.FileLock(folder / "run.lock")
        open_run.lock.acquire(blocking=False)
        ignored = (".new", ".log", ".txt", ".out", ".lock")
        names = {path.name for path in folder.iterdir() if path.suffix not in ignored}
        is_new = not names
        # A run that failed before its first checkpoint has nothing to lose, so it starts anew.
        if names == {file.name}:
            is_new = '"output_dir"' in file.read_text()
        if is_new:
            write(file, text)
        if "summary.json" in names or not file.exists() or file.read_text() != text:
            raise ValueError("it holds a finished run, a run with other flags, data, weights or "
                             "rewards, or unrelated files: name another folder")


def write(file, text):
    """Writes atomically: a killed run leaves either the old file or the new one."""
    file.with_suffix(".new").write_text(text)
    file.with_suffix(".new").replace(file)


def restore(args, weights, optimizer, scaler):
    """The state of a new run, or of an interrupted one from its checkpoint, resume.pt.

    A checkpoint also holds the trained weights, {name: parameter}, and the states of optimizer
    and scaler, which are loaded here.
    """
    state = {"step": 0, "metrics": [], "samples": []}
    file = Path(args.output_dir, "resume.pt")
    if file.exists():
        with common.phase(f"reading {file}"):
            saved = torch.load(file, map_location="cpu", weights_only=True)
            common.copy_weights(saved.pop("weights"), weights)
            optimizer.load_state_dict(saved.pop("optimizer"))
            scaler.load_state_dict(saved.pop("scaler"))
            state = {name: saved.pop(name) for name in state} | saved
    # Each process initialized its own LoRA matrices. All of them train those of the first one.
    if dist.is_initialized():
        for weight in weights.values():
            dist.broadcast(weight.data, 0)
    return state


def save(args, state, weights, optimizer, scaler):
    """Writes a checkpoint, from which the same command resumes the run."""
    if common.RANK == 0:
        parts = {"optimizer": optimizer.state_dict(), "scaler": scaler.state_dict()}
        parts["weights"] = {name: weight.data for name, weight in weights.items()}
        torch.save(state | parts, Path(args.output_dir, "resume.new"))
        Path(args.output_dir, "resume.new").replace(Path(args.output_dir, "resume.pt"))


def log_step(args, state, metrics, tokens, progress, shown):
    """Logs a step, in which all processes read `tokens` tokens, and shows some of its metrics."""
    metrics["tokens_per_second"] = round(tokens / metrics["seconds"], 1)
    metrics["peak_memory_gib"] = common.peak_memory()
    postfix = {name: metrics[name] for name in shown}
    postfix |= {"tokens/s": metrics["tokens_per_second"], "GiB": metrics["peak_memory_gib"]}
    progress.set_postfix(postfix, refresh=False)
    state["step"] = metrics["step"]
    state["metrics"].append(metrics)
    if common.RANK == 0:
        lines = [json.dumps(step) + "\n" for step in state["metrics"]]
        write(Path(args.output_dir, "metrics.jsonl"), "".join(lines))


def finish(args, state, model, tokenizer, after):
    """Saves the adapter, the model card and the summary. Printing, which can fail, comes last."""
    if common.RANK == 0:
        common.save_model(model, tokenizer, args.output_dir)
        summary = {"method": Path(__file__).stem} | vars(args) | common.settings(model)
        summary["seconds"] = sum(metrics["seconds"] for metrics in state["metrics"])
        summary |= {name: state[name] for name in ("step", "before", "samples")} | {"after": after}
        common.write_card(args.output_dir, summary)
        write(Path(args.output_dir, "summary.json"), json.dumps(summary, indent=2))
        Path(args.output_dir, "resume.pt").unlink(missing_ok=True)
    print(f"\n{'held out':<20}{'before':>9}{'after':>9}")
    for name, value in after.items():
        print(f"{common.visible(name):<20}{state['before'][name]:9.3f}{value:9.3f}")


def show_next(args):
    """Prints where the results are, and what can be done with them next."""
    use = "chat.py"
    if Path(__file__).stem in ("reward_model", "prm"):
        use = "pairs.py --output pairs.jsonl --reward"
    print(common.visible(f"\nresults: {args.output_dir}\ncurves:  python plot.py {args.output_dir}"
                         f"\ntry it:  python {use} {args.output_dir}"))


if __name__ == "__main__":
    with common.running("--micro-batch-size and --batch-size, then the lengths"):
        train(common.parse(make_flags(), TINY, BY_LOSS))
