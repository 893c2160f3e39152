"""GRPO: Group Relative Policy Optimization (Shao et al. 2024, DeepSeekMath, arXiv:2402.03300).

The policy π writes G completions to each prompt, they are scored, and a completion becomes likelier
the more it beats the others of its group. r_i is the reward of completion o_i, o_t one of its
tokens, π_old the policy that sampled, π_ref the frozen one that training began from; J is to grow:

    A_i = (r_i − mean(r)) / std(r)              the baseline of a reward is the mean of its group
    J = E 1/G Σ_i 1/|o_i| Σ_t { min[ρ_t A_i, clip(ρ_t, 1 − ε, 1 + ε) A_i] − β k3_t }       eq. 3
    ρ_t = π(o_t) / π_old(o_t),   k3_t = q − log q − 1 with q = π_ref(o_t) / π(o_t)         eq. 4

Kept from PPO: the clipped ratio. Dropped: the critic, GAE and the value loss, as all tokens of a
completion share its advantage. The KL, estimated by k3, moves from the reward into the loss.

The relatives change a line or two. --loss names how the loss of a token is made and weighted:

    dr_grpo  neither std(r), which favours prompts that nearly all or no answers solve, nor 1/|o_i|,
             which lets long failures off (Liu et al. 2025, 2503.20783)
    dapo     all tokens count alike, the upper clip is wider, groups without spread and truncated
             completions do not count (Yu et al. 2025, 2503.14476, without its soft length penalty)
    gspo     one ratio for a whole sequence, as it has one reward (Zheng et al. 2025, 2507.18071)
    cispo    the bounded ratio is a mere weight: no token drops out (MiniMax 2025, 2506.13585)

and --baseline what is taken off a reward: the mean of its group, that of the others (rloo: RLOO,
Ahmadian et al. 2024, 2402.14740, with --loss dr_grpo, but for its KL) or nothing (none: REINFORCE).

    python grpo.py                                            # the tiny model, two minutes
    python grpo.py --model Qwen/Qwen2.5-0.5B-Instruct         # GSM8K in 4 bits on a 16 GB T4
    python grpo.py --reward tiny/reward correct_answer --reward-weights 0.1 1

What to watch: the reward rises, group_std falls, kl and length grow slowly. With --updates 1 all ρ
are 1: no clip binds, gspo is grpo, and their loss says nothing: as the advantages of a group add up
to 0, it is β k3. High zero_spread: prompts too easy or hard. Entropy collapses: lower the rate.

Shapes: P prompts × G completions = B rows of T tokens, N of completions; width D, vocabulary V.
"""
import argparse
import functools
import hashlib
import importlib
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

flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
add = flags.add_argument
add("--model", default="tiny/chat", help="Hub name, local folder or LoRA adapter")
add("--reward", nargs="+", default=["correct_answer"],
    help="or FILE.py:function, or a run of reward_model.py; several with --reward-weights")
add("--reward-weights", type=common.number(float, -1e9), nargs="+", default=[1.0])
add("--dataset", default="openai/gsm8k:main", help="prompts: Hub name or local file")
add("--split", default="train", help="of a Hub dataset")
add("--columns", **common.COLUMNS, help="other names of columns: prompt=query completion=reply")
add("--chat-template", help="file with a chat template, in place of the model's own")
add("--template-arguments", **common.VARIABLES, help="variables that the chat template reads")
add("--eval-dataset", help="held-out prompts, else some of --dataset")
add("--eval-size", type=common.count, default=64, help="held-out prompts")
add("--loss", choices=["grpo", "dr_grpo", "dapo", "gspo", "cispo"], default="grpo")
add("--baseline", choices=["group", "rloo", "none"], default="group")
add("--beta", type=common.weight, default=0.04, help="of the KL to the reference")
add("--epsilon", type=common.positive, default=0.2, help="how far below 1 the ratio counts")
add("--epsilon-high", type=common.positive, default=0.2, help="above 1; cispo: the bound itself")
add("--updates", type=common.count, default=1, help="steps on the same samples; gspo, cispo: > 1")
add("--group-size", type=common.number(int, 2), default=8, help="completions per prompt, G")
add("--batch-size", type=common.count, default=8, help="prompts in a rollout")
add("--micro-batch-size", type=common.count, default=2, help="completions in a forward pass")
add("--sample-batch-size", type=common.count, default=128, help="completions sampled at a time")
add("--temperature", type=common.positive, default=1.0, help="of sampling and scoring")
add("--max-length", type=common.count, default=1024, help="longest prompt + completion, in tokens")
add("--max-new-tokens", type=common.count, default=512, help="longest completion")
add("--learning-rate", type=common.positive, default=2e-5, help="the highest: it rises, then falls")
add("--max-steps", type=common.count, default=250, help="rollouts")
add("--lora-rank", **common.LORA_RANK, type=common.count)
add("--load-in-4bit", **common.ON_GPU, help="quantise the frozen base")
add("--gradient-checkpointing", **common.ON_GPU, help="compute activations twice, keep fewer")
add("--save-every", type=common.count, default=20, help="rollouts between savings, samples shown")
add("--seed", type=common.natural, default=0)
add("--track", choices=["wandb", "trackio"], help="also send the metrics there")
add("--output-dir", default="runs/grpo", help="the same command again goes on where it stopped")
# what papers set otherwise (cispo: 2510.13786), and what the tiny model needs otherwise
BY_LOSS = {"dr_grpo": dict(beta=0.0), "dapo": dict(beta=0.0, epsilon_high=0.28),
           "gspo": dict(epsilon=3e-4, epsilon_high=4e-4), "cispo": dict(beta=0.0, epsilon_high=5.0)}
TINY = dict(dataset="tiny/data/prompt_train.jsonl", eval_dataset="tiny/data/prompt_heldout.jsonl",
            batch_size=16, micro_batch_size=128, max_new_tokens=24, learning_rate=1e-3,
            max_steps=80)
FIGURES = ("loss", "entropy", "clip_fraction", "kl", "ratio_error")


# ---- data: prompts, and answers with a mask on what is trained -----------------------------------

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


def group_advantages(rewards, baseline="group", scale=True):
    """Advantages [P, G] of G completions to each of P prompts, from their rewards [P, G]."""
    if baseline == "none":  # REINFORCE (Williams 1992)
        return rewards
    # equal rewards teach nothing: exactly 0, or the rounding of their mean is divided by 1e-4
    above = (rewards - rewards.mean(1, keepdim=True)) * has_spread(rewards)[:, None]
    if baseline == "rloo":  # r_i − the mean of the G − 1 others = G/(G−1) (r_i − mean(r))
        return above * rewards.shape[1] / (rewards.shape[1] - 1)
    return above / (rewards.std(1, keepdim=True) + 1e-4) if scale else above


def has_spread(rewards):
    """The groups [P] that can teach something: those whose rewards [P, G] are not all the same."""
    return rewards.amax(1) > rewards.amin(1)


def token_losses(logps, old_logps, advantages, mask, loss, epsilon, epsilon_high):
    """The loss of each token, and where the clip binds, [B, T-1] each; advantages are [B]."""
    advantages = advantages[:, None]  # [B, 1]
    log_ratio = (logps - old_logps) * mask  # [B, T-1]
    if loss == "gspo":  # its eq. 7: for all tokens, the geometric mean of the sequence's ratios
        log_ratio = log_ratio.sum(1, keepdim=True) / lengths(mask) * mask
    # With one update per rollout π is π_old and all ratios are 1, but the gradient is not 0: that
    # of ρ is that of log π, and each token is pushed by its advantage, as in REINFORCE
    ratio = log_ratio.exp()
    if loss == "cispo":  # its eqs. 4 and 5; the bound, there 1 + ε_high, is on a weight only
        weight = ratio.clamp(max=epsilon_high).detach()
        return -weight * advantages * logps, ratio > epsilon_high
    free = ratio * advantages
    bound = ratio.clamp(1 - epsilon, 1 + epsilon_high) * advantages
    # min: the clip takes away what going further would gain, and never the way back (PPO eq. 7)
    return -torch.min(free, bound), bound < free


def token_kl(logps, ref_logps):
    """k3 of each token [B, T-1], eq. 4: never negative; its mean over samples of π is the KL.

    Its gradient, on policy and in the mean, is that of KL(π_ref ‖ π): both pull π back to π_ref.
    """
    log_q = ref_logps - logps
    return log_q.exp() - log_q - 1


def token_weights(mask, loss, sequences, tokens, longest):
    """What each token counts, [B, T-1], among so many sequences and tokens; longest: a limit."""
    if loss in ("grpo", "gspo"):  # the mean of the sequences' means
        return mask / (lengths(mask) * sequences)
    if loss == "dr_grpo":  # a constant: with 1/|o_i|, a wrong answer costs less the longer it is
        return mask / (longest * sequences)
    return mask / tokens.clamp(min=1)  # dapo, cispo: the mean of all tokens (papers: of a group's)


def lengths(mask):
    """How many tokens of each sequence count, [B, 1]."""
    return mask.sum(1, keepdim=True).clamp(min=1)


def moments(x, mask):
    """Mean and variance of x where the mask is 1, over all processes, in fp64."""
    x = x.double()
    sums = torch.stack([mask.sum(), (x * mask).sum(), (x**2 * mask).sum()])
    sum_over_processes([sums])
    count, total, squares = sums.tolist()
    return total / count, squares / count - (total / count) ** 2


def mean(x):
    """Over all processes."""
    return moments(x, torch.ones_like(x))[0]


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


def load_reward(name, policy):
    """What --reward names: a function, or None for a reward model on the base of the policy."""
    if name == "correct_answer":
        return correct_answer
    if name.rpartition(":")[0].endswith(".py"):
        return common.load_function(name)
    common.reward_config(name, policy)  # ends the program if it is none
    return None


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


def score_answers(scorer, name, model, batch, examples, texts, args):
    """Scores [B] of answers, by a reward model's head or a function; NaN where it says None."""
    if not isinstance(scorer, torch.nn.Linear):
        scores = call_reward(name, scorer, examples, texts)
        scores = [math.nan if score is None else score for score in scores]
        return torch.tensor(scores, device=model.device)
    with common.using(model, "reward"):
        scores = in_parts(sequence_rewards, model, batch, scorer, args)
    if not scores.isfinite().all():
        common.fail(f"the reward model {name} gives scores that are not finite numbers")
    return scores


def sequence_rewards(model, batch, head):
    """The reward of each sequence, [B], read at its last real token; padding is on the right."""
    used = batch["attention_mask"].any(0)  # [T]: the L columns that are not padding in every row
    inputs = {name: batch[name][:, used] for name in ("input_ids", "attention_mask")}  # [B, L]
    hidden = common.causal_lm(model).base_model(**inputs, use_cache=False)[0]  # [B, L, D]
    last = inputs["attention_mask"].sum(-1) - 1  # [B]
    hidden = hidden[torch.arange(len(hidden)), last]  # [B, D]
    # not `@`, which autocast would round to 16 bits: too coarse to compare
    return (hidden.float() * head.weight.float()).sum(-1)  # [B]


# ---- the run -------------------------------------------------------------------------------------

def rollout(model, scorers, examples, copies, tokenizer, args, seed):
    """`copies` completions per prompt as ids, and what is said of them: a batch, [B, ...] each."""
    answers = []
    size = max(1, args.sample_batch_size // copies)
    for i in range(0, len(examples), size):
        prompts = [example["prompt"] for example in examples[i:i + size]]
        with common.autocast(model):
            answers += sample(model, tokenizer, prompts, copies, args, seed + i)
    texts = tokenizer.batch_decode(answers, skip_special_tokens=True)
    examples = [example for example in examples for _ in range(copies)]  # as the answers
    batch = join_answers([example["prompt"] for example in examples], answers, tokenizer, model)
    scores = [score_answers(scorer, name, model, batch, examples, texts, args)
              for name, scorer in scorers.items()]
    batch["scores"] = torch.stack(scores, 1)  # [B, F] of F rewards, NaN where one does not apply
    applies = ~batch["scores"].isnan()  # [B, F]
    for text, some in zip(texts, applies.any(1).tolist(), strict=True):
        if not some:
            common.fail(f"every --reward returns None for the answer {text!r:.100}: one must apply")
    # A reward that does not apply to a completion is no part of its sum.
    weights = torch.tensor(args.reward_weights, device=model.device)  # [F]
    batch["rewards"] = batch["scores"].where(applies, 0.0) @ weights  # [B]
    if not batch["rewards"].isfinite().all():
        common.fail("a weighted sum of rewards is too large: lower --reward-weights")
    with common.reference(model):
        batch["ref_logps"] = in_parts(token_logps, model, batch, args.temperature, args)
    return batch, answers


@torch.no_grad()
def in_parts(function, model, batch, argument, args):
    """function(model, batch, argument), a micro-batch at a time."""
    parts = []
    with common.autocast(model):
        for rows in torch.arange(len(batch["input_ids"])).split(args.micro_batch_size):
            micro = {name: value[rows] for name, value in batch.items()}
            parts.append(function(model, micro, argument))
    return torch.cat(parts)


def mean_where_it_applies(scores):
    """Of all processes' scores [B] of one reward, without NaN; None if it applies to no answer."""
    applies = ~scores.isnan()  # [B]
    sums = torch.stack([scores.where(applies, 0.0).double().sum(), applies.double().sum()])
    sum_over_processes([sums])
    total, count = sums.tolist()
    return total / count if count else None


def describe(batch):
    """Means over the completions of all processes."""
    return {"reward": mean(batch["rewards"]), "length": mean(batch["loss_mask"].sum(1)),
            "stopped": mean(batch["stopped"])}


def evaluate(model, scorers, examples, tokenizer, args):
    """One completion to each held-out prompt; kl to the reference, in nats per completion."""
    batch, _ = rollout(model, scorers, examples, 1, tokenizer, args, args.seed)
    logps = in_parts(token_logps, model, batch, args.temperature, args)
    return describe(batch) | {"kl": mean((logps - batch["ref_logps"]).sum(1))}


def group_gradients(model, batch, scaler, args):
    """Adds up the gradients of the completions that are kept; returns the FIGURES."""
    sequences = args.batch_size * args.group_size
    tokens = batch["loss_mask"].sum()
    kept_tokens = (batch["loss_mask"] * batch["kept"][:, None]).sum()
    sum_over_processes([tokens, kept_tokens])
    sums = torch.zeros(len(FIGURES), dtype=torch.float64, device=model.device)
    for rows in torch.arange(len(batch["input_ids"])).split(args.micro_batch_size):
        micro = {name: value[rows] for name, value in batch.items()}
        mask = micro["loss_mask"][:, 1:]  # [b, T-1]
        with common.autocast(model):
            logps = token_logps(model, micro, args.temperature)  # [b, T-1]
        old_logps = micro.get("logps", logps.detach())  # in the only update π is still π_old
        losses, clipped = token_losses(logps, old_logps, micro["advantages"], mask, args.loss,
                                       args.epsilon, args.epsilon_high)
        losses = losses + args.beta * token_kl(logps, micro["ref_logps"])
        weights = token_weights(mask, args.loss, sequences, kept_tokens, args.max_new_tokens)
        loss = (losses * weights * micro["kept"][:, None]).sum()
        scaler.scale(loss).backward()
        kl = (logps - micro["ref_logps"]).sum() / sequences  # k1 here, k3 in the loss
        entropy = -logps.sum() / tokens
        clip_fraction = (clipped * mask).sum() / tokens
        error = ((logps - old_logps).exp() - 1).abs().sum() / tokens
        sums += torch.stack([loss, entropy, clip_fraction, kl, error]).detach()  # as FIGURES
    sum_over_processes([sums])
    return sums


def some_samples(tokenizer, step, examples, answers, scores):
    """A few prompts, what the policy answers, and what that is worth."""
    some = list(zip(examples, answers, scores.tolist(), strict=False))[:4]
    return [{"step": step, "prompt": common.visible(tokenizer.decode(example["prompt"])),
             "answer": common.visible(tokenizer.decode(answer)), "score": score}
            for example, answer, score in some]


def train(args):
    # 1. Prompts to learn from and others to be tested on, and what scores the completions
    if not len(set(args.reward)) == len(args.reward) == len(args.reward_weights):
        common.fail("--reward must differ from each other, with a --reward-weights for each")
    if args.loss == "dapo" and args.baseline == "none":
        common.fail("--loss dapo leaves out groups of equal rewards: it needs a --baseline")
    if args.batch_size < common.WORLD:
        common.fail("--batch-size must not be below the number of processes")
    scorers = {name: load_reward(name, args.model) for name in args.reward}
    tokenizer = common.load_tokenizer(args.model, args.chat_template, args.template_arguments)
    encode = functools.partial(encode_row, max_new_tokens=args.max_new_tokens,
                               needs_answer="correct_answer" in scorers)
    wanted = args.max_steps * args.batch_size
    examples, held_out = common.load_examples(args, encode, tokenizer, wanted)

    # 2. A frozen base with LoRA matrices, which alone are trained
    torch.manual_seed(args.seed)
    model = common.load_model(
        args.model, args.load_in_4bit, args.lora_rank, args.gradient_checkpointing)
    for name, scorer in scorers.items():
        scorers[name] = scorer or common.add_role(model, name, "reward")
    weights = {name: p for name, p in model.named_parameters() if p.requires_grad}
    # `update` sets the learning rate.
    optimizer = torch.optim.AdamW(weights.values(), weight_decay=0.0)
    scaler = common.grad_scaler(model)  # for fp16 (a T4), where small gradients round to 0
    print(common.settings(model))

    # 3. Where the run stands: at its start, or where it was interrupted
    open_run(args, [examples, held_out])
    state = restore(args, weights, optimizer, scaler)
    if "before" not in state:
        state["before"] = evaluate(model, scorers, held_out, tokenizer, args)
    # prompts and random numbers follow from seed and step, so that a run that goes on sees the same
    generator = torch.Generator().manual_seed(args.seed)
    passes = range(math.ceil(wanted / len(examples)))
    order = torch.cat([torch.randperm(len(examples), generator=generator) for _ in passes])
    progress = tqdm(range(state["step"] + 1, args.max_steps + 1), initial=state["step"],
                    total=args.max_steps, disable=common.RANK > 0)
    for step in progress:
        # 4. The prompts of this process get G completions each, and each completion its reward
        began = time.time()
        picked = order[(step - 1) * args.batch_size:step * args.batch_size]
        mine = [examples[i] for i in picked[common.RANK::common.WORLD]]
        seed = args.seed + 10**6 * (step * common.WORLD + common.RANK)
        batch, answers = rollout(model, scorers, mine, args.group_size, tokenizer, args, seed)
        metrics = {"step": step, **describe(batch), "rollout_seconds": time.time() - began}

        # 5. How much better than its group is each of them?
        grouped = batch["rewards"].view(-1, args.group_size)  # [P, G]
        advantages = group_advantages(grouped, args.baseline, scale=args.loss != "dr_grpo")
        batch["advantages"] = advantages.flatten()  # [B]
        spread = has_spread(grouped)  # [P]
        batch["kept"] = torch.ones_like(batch["stopped"])  # [B], what the loss is made of
        if args.loss == "dapo":  # the paper samples others instead; here the mean is of the rest
            batch["kept"] = batch["stopped"] & spread.repeat_interleave(args.group_size)

        # 6. Optimizer steps on these completions: after the first, π is not the sampler π_old
        if args.updates > 1:
            batch["logps"] = in_parts(token_logps, model, batch, args.temperature, args)
        lr = learning_rate(step, args.max_steps, args.learning_rate)
        figures = []
        for _ in range(args.updates):
            figures.append(group_gradients(model, batch, scaler, args))
            updated = update(optimizer, scaler, lr)

        # 7. Log, show some completions, and save what is needed to go on
        metrics |= dict(zip(FIGURES, torch.stack(figures).mean(0).tolist(), strict=True))
        metrics["kl"], metrics["ratio_error"] = figures[0][-2:].tolist()  # while π is the sampler
        for name, scores in zip(scorers, batch["scores"].unbind(1), strict=True):
            metrics[f"reward_{name}"] = mean_where_it_applies(scores)
        metrics |= {"group_std": mean(grouped.std(1)), "zero_spread": 1 - mean(spread)}
        metrics |= {**updated, "seconds": time.time() - began}
        progress.set_postfix(reward=metrics["reward"], kl=metrics["kl"], refresh=False)
        log_step(args, state, metrics)
        if step % args.save_every == 0 or step in (1, args.max_steps):
            group = mine[:1] * args.group_size  # the first G answers are to the first prompt
            state["samples"] += some_samples(tokenizer, step, group, answers, batch["rewards"])
            save(args, state, weights, optimizer, scaler)
            for sample in state["samples"][-4:]:  # the answers in green
                tqdm.write("{prompt}\033[32m{answer}\033[0m\nscore {score:.2f}\n".format(**sample))

    # 8. The same held-out prompts and random numbers once more; the adapter is saved
    finish(args, state, model, tokenizer, evaluate(model, scorers, held_out, tokenizer, args))


# ---- the optimizer step --------------------------------------------------------------------------

def learning_rate(step, steps, peak):
    """Linear warm-up to `peak` over 10% of the steps, then cosine decay; never exactly 0."""
    warm_up = step / (round(0.1 * steps) + 1)
    decay = 0.5 + 0.5 * math.cos(math.pi * (step - 1) / steps)
    return peak * min(warm_up, decay)


def update(optimizer, scaler, lr):
    """Sums the gradients over all processes, clips them and takes one step; returns its figures."""
    weights = optimizer.param_groups[0]["params"]
    # A process without a share of the batch has no gradients, but takes part in the sum.
    for weight in weights:
        if weight.grad is None:
            weight.grad = torch.zeros_like(weight)
    sum_over_processes([weight.grad for weight in weights])
    # Clipping limits the length of the whole gradient, all weights taken as one vector, to 1.
    scaler.unscale_(optimizer)
    norm = torch.nn.utils.clip_grad_norm_(weights, 1.0).item()
    # Where fp16 gradients overflow, the scaler skips the step and halves its scale, down to 1.
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
    """Replaces each tensor by its sum over all processes; with a single process nothing changes."""
    if dist.is_initialized():
        for tensor in tensors:
            dist.all_reduce(tensor)


def add_up(sums, figures):
    """Adds the sum over each figure, {name: [B]}, to `sums`, in fp64."""
    for name, values in figures.items():
        sums[name] = sums.get(name, 0.0) + values.detach().double().sum()


def over_processes(sums, names, device):
    """{name: float}: the sums of all processes. A process without a share of the rows adds 0."""
    totals = {}
    for name in names:
        totals[name] = torch.as_tensor(sums.get(name, 0.0), dtype=torch.float64, device=device)
    sum_over_processes(list(totals.values()))
    return {name: total.item() for name, total in totals.items()}


def open_run(args, examples):
    """--output-dir: a new folder, or that of an interrupted run with the same flags and inputs."""
    if common.RANK > 0:
        return
    folder = Path(args.output_dir)
    file = folder / "args.json"
    data = hashlib.sha256(json.dumps(examples, default=str).encode()).hexdigest()
    rewards = getattr(args, "reward", [])
    files = common.fingerprint(args.model, *([rewards] if isinstance(rewards, str) else rewards))
    text = json.dumps(vars(args) | {"data": data, "files": files}, indent=2)
    if args.track:
        with common.phase(f"--track {args.track}"):
            tracker = importlib.import_module(args.track)
            tracker.init(project=Path(__file__).stem, name=folder.name, config=vars(args))
    with common.phase(f"--output-dir {folder}, which is for one run at a time"):
        folder.mkdir(parents=True, exist_ok=True)
        # the lock ends with the process, however that ends; its file may stay
        open_run.lock = filelock.FileLock(folder / "run.lock")
        open_run.lock.acquire(blocking=False)
        ignored = (".new", ".log", ".txt", ".out", ".lock")
        names = {path.name for path in folder.iterdir() if path.suffix not in ignored}
        is_new = not names
        if names == {file.name}:  # a start that failed before its first step has nothing to lose
            is_new = '"output_dir"' in file.read_text()
        if is_new:
            write(file, text)
        if "summary.json" in names or not file.exists() or file.read_text() != text:
            raise ValueError("it holds a finished run, or one with other flags, data, weights or "
                             "rewards, or other files: name another")


def write(file, text):
    """Whole or not at all, whenever the run is killed."""
    file.with_suffix(".new").write_text(text)
    file.with_suffix(".new").replace(file)


def restore(args, weights, optimizer, scaler):
    """The state of a run: a new one, or that of an interrupted run, as `save` left it.

    The weights, {name: parameter}, are those that are trained. Other processes get those of the
    first, because each has drawn LoRA matrices of its own.
    """
    state = {"step": 0, "metrics": [], "samples": []}
    file = Path(args.output_dir, "resume.pt")
    if file.exists():
        with common.phase(f"reading {file}"):
            saved = torch.load(file, map_location="cpu", weights_only=True)
            missing = {*state, "weights", "optimizer", "scaler"} - saved.keys()
            if missing:
                raise ValueError(f"it lacks {', '.join(sorted(missing))}")
            load_weights(weights, saved.pop("weights"))
            optimizer.load_state_dict(saved.pop("optimizer"))
            scaler.load_state_dict(saved.pop("scaler"))
            state = saved
    if dist.is_initialized():
        for weight in weights.values():
            dist.broadcast(weight.data, 0)
    return state


def load_weights(weights, saved):
    """Copies saved weights into the parameters of the same names."""
    shapes = {name: weight.shape for name, weight in weights.items()}
    saved_shapes = {name: value.shape for name, value in saved.items()}
    differing = shapes.items() ^ saved_shapes.items()
    if differing:
        name = min(differing)[0]
        raise ValueError(f"its weights are those of another model: {name} differs or is missing")
    for name, value in saved.items():
        if not value.isfinite().all():
            raise ValueError(f"its weight {name} has values that are not finite numbers")
        weights[name].data.copy_(value)


def save(args, state, weights, optimizer, scaler):
    """Writes a checkpoint, resume.pt: all that the same command needs to resume this run."""
    if common.RANK == 0:
        saved = {"weights": {name: weight.data for name, weight in weights.items()},
                 "optimizer": optimizer.state_dict(), "scaler": scaler.state_dict()}
        torch.save(state | saved, Path(args.output_dir, "resume.new"))
        Path(args.output_dir, "resume.new").replace(Path(args.output_dir, "resume.pt"))


def log_step(args, state, metrics):
    if torch.cuda.is_available():
        metrics["peak_memory_gib"] = torch.cuda.max_memory_allocated() / 2**30
    state["step"] = metrics["step"]
    state["metrics"].append(metrics)
    if common.RANK == 0:
        lines = [json.dumps(step) + "\n" for step in state["metrics"]]
        write(Path(args.output_dir, "metrics.jsonl"), "".join(lines))
        if args.track:
            importlib.import_module(args.track).log(metrics, step=metrics["step"])


def finish(args, state, model, tokenizer, after):
    """Saves the adapter and the summary; only then is anything printed that could fail."""
    if common.RANK == 0:
        common.save_model(model, tokenizer, args.output_dir)
        summary = {"method": Path(__file__).stem} | vars(args) | common.settings(model)
        summary["seconds"] = sum(metrics["seconds"] for metrics in state["metrics"])
        summary |= {name: state[name] for name in ("step", "before", "samples")} | {"after": after}
        write(Path(args.output_dir, "summary.json"), json.dumps(summary, indent=2))
        Path(args.output_dir, "resume.pt").unlink(missing_ok=True)
        if args.track:
            importlib.import_module(args.track).finish()
    print(f"\n{'held out':<16}{'before':>9}{'after':>9}")
    for name, value in after.items():
        print(f"{common.visible(name):<16}{state['before'][name]:9.3f}{value:9.3f}")
    where = f"results: {args.output_dir}\ncurves:  python plot.py {args.output_dir}"
    print(f"\n{common.visible(where)}")


if __name__ == "__main__":
    with common.running("--micro-batch-size and --sample-batch-size, then the lengths"):
        train(common.parse(flags, TINY, BY_LOSS))
