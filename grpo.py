"""GRPO: Group Relative Policy Optimization (Shao et al. 2024, DeepSeekMath, arXiv:2402.03300).

GRPO learns from prompts and a reward, as PPO does, but without a critic. The policy π writes a
group of G completions for each prompt, and every completion gets a reward. A completion becomes
more likely if its reward is above the mean of its group, and less likely if it is below.

Why it works. The policy gradient, which ppo.py derives, is the gradient of the expected reward of a
completion o with tokens o_t:

    ∇ E[r(o)] = E[Σ_t (r(o) − b) ∇ log π(o_t)]

To raise the expected reward, raise log π of each sampled token in proportion to the reward minus a
baseline b. Any b that does not depend on o leaves the mean of this estimate unchanged. A good b
lowers its variance, and the best simple choice is the reward to expect for this prompt. PPO trains
a second model, the critic, to predict it. GRPO samples G completions and takes the mean reward of
the group. (This mean includes r(o) itself, which scales the expected gradient by (G − 1)/G and
changes nothing else.)

Below, r_i is the reward of completion o_i, |o_i| its number of tokens, and o_t one of these tokens.
π_old is the policy that sampled it, and π_ref is the frozen policy that training started from. J is
maximized, so the loss is −J:

    A_i = (r_i − mean(r)) / (std(r) + 1e-4)       mean and std of its group; std over G − 1
    J = E 1/G Σ_i 1/|o_i| Σ_t { min[ρ_t A_i, clip(ρ_t, 1 − ε, 1 + ε) A_i] − β k3_t }       eq. 3
    ρ_t = π(o_t) / π_old(o_t),   k3_t = q − log q − 1 with q = π_ref(o_t) / π(o_t)         eq. 4

GRPO keeps PPO's clipped ratio. It drops the critic, and with it GAE and the value loss, so all
tokens of a completion share one advantage. The KL penalty moves from the reward into the loss, so
its estimator changes. k3 estimates KL(π ‖ π_ref) from sampled tokens and is never negative. Its
gradient is on average the gradient of KL(π_ref ‖ π), which also pulls π back to π_ref. PPO's
estimator, k1 = log π/π_ref, would do nothing in a loss, because its gradient is 0 on average.

    [P] prompts ── G samples each ──► [P·G] completions ── reward ──► rewards [P, G]
                                                                           │ − mean, / std of a row
    loss of each token ◄── the same for all tokens ── advantages [P·G] ◄───┘

Worked example: four groups with G = 4, and their advantages under two baselines.

    rewards        mean    std     A: group                         A: rloo
    1  0  0  1     0.50    0.577    0.87  −0.87  −0.87   0.87        0.67  −0.67  −0.67   0.67
    1  0  0  0     0.25    0.500    1.50  −0.50  −0.50  −0.50        1.00  −0.33  −0.33  −0.33
    1  1  1  0     0.75    0.500    0.50   0.50   0.50  −1.50        0.33   0.33   0.33  −1.00
    1  1  1  1     1.00    0.000    0.00   0.00   0.00   0.00        0.00   0.00   0.00   0.00

The rarer outcome of a group gets the advantage of larger size, and a group whose rewards are all
equal teaches nothing. For a token with log π = −1, the KL estimates are, if log π_ref = −1.5,
k1 = 0.500 and k3 = 0.107, and if log π_ref = −0.5, k1 = −0.500 and k3 = 0.149.

The variants change a line or two. --loss selects how the loss of a token is computed and weighted:

    dr_grpo  drops both divisions: dividing by std(r) favors prompts that almost all or almost no
             completions solve, and dividing by |o_i| penalizes the tokens of a long wrong
             completion less (Liu et al. 2025, 2503.20783)
    dapo     weights all tokens alike, raises the upper clip, leaves out truncated completions, and
             replaces groups of equal rewards with groups of other prompts (Yu et al. 2025,
             2503.14476; their soft length penalty is examples/rewards.py:overlong)
    gspo     has one ratio per sequence, because there is one reward per sequence (Zheng et al.
             2025, 2507.18071)
    cispo    uses the clipped ratio only as a weight without a gradient, so every token keeps the
             gradient of its log π (MiniMax 2025, 2506.13585)

--baseline selects what is subtracted from a reward: the mean of its group (group), the mean of the
others in the group (rloo), or nothing (none). Up to a constant factor, RLOO (Ahmadian et al. 2024,
2402.14740) is `--loss dr_grpo --baseline rloo`, except that RLOO has its KL penalty in the reward,
and REINFORCE is `--loss dr_grpo --baseline none`.

    python grpo.py                                            # the tiny model, two minutes
    python grpo.py --model Qwen/Qwen2.5-0.5B-Instruct         # GSM8K, in 4 bits on a GPU
    python grpo.py --reward tiny/reward correct_answer --reward-weights 0.1 1

The defaults are small on purpose, to fit a 16 GB GPU (by the estimates of docs/memory.md): 250
rollouts of 8 prompts are 2,000 prompts, with 8 completions each. DeepSeekMath sampled 64
completions per prompt and trained on 1,024 completions per batch. The learning rate, 2e-5, is twice
the 1e-5 that TRL's documentation recommends for GRPO with LoRA; neither was tested here on a large
model.

What to watch: the reward rises, group_std falls, and kl and length grow slowly. With --updates 1,
all ratios are 1, so no clip binds and gspo equals grpo. Their loss then says nothing, because the
advantages of a group add up to 0, which leaves only β k3. If zero_spread, the share of groups with
equal rewards, is near 1 from the start, the prompts are too easy or too hard. If entropy collapses
within a few steps, lower the learning rate. If the reward rises while the samples get worse, the
policy exploits a weakness of the reward. This is called reward hacking or over-optimization, and
only reading the samples reveals it.

Try `--max-steps 2 --batch-size 2 --updates 2` on the tiny model: in the second update, π is no
longer π_old, so the first step logs a clip_fraction of 0.03 instead of 0, and a loss of −0.007,
which β k3 alone could not give, because it is never negative.

Shapes: P prompts × G completions = B rows (b in a micro-batch) of T columns, of which L ≤ T hold a
token in some row; N completion tokens in all, C of them at a time; F rewards; D the width of the
model, V the size of its vocabulary, alive the completions that have not ended.
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


def make_flags():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=common.HelpFormatter)
    add = parser.add_argument
    add("--model", default="tiny/chat", help="Hub name, local folder or LoRA adapter to start from")
    add("--reward", nargs="+", default=["correct_answer"],
        help="one or more of correct_answer, FILE.py:function, output folders of reward_model.py")
    add("--reward-weights", type=common.number(float, -1e9), nargs="+", default=[1.0],
        help="weight of each --reward in the sum that is maximized")
    add("--dataset", default="openai/gsm8k:main", help="prompts: Hub name[:config] or local file")
    add("--split", default="train", help="split of a Hub dataset")
    add("--columns", **common.COLUMNS)
    add("--chat-template", help=common.TEMPLATE)
    add("--template-arguments", **common.VARIABLES)
    add("--eval-dataset", help="held-out prompts; if not given, some of --dataset are held out")
    add("--eval-size", type=common.count, default=64, help="number of held-out prompts")
    add("--loss", choices=["grpo", "dr_grpo", "dapo", "gspo", "cispo"], default="grpo",
        help="variant of the loss, which also sets the defaults of --beta and the clip range")
    add("--baseline", choices=["group", "rloo", "none"], default="group",
        help="baseline: mean reward of the group, mean of the others in it (rloo), or nothing")
    add("--beta", type=common.weight, default=0.04, help="strength of the KL penalty in the loss")
    add("--epsilon", type=common.positive, default=0.2, help="lower clip, at ratio 1 − ε")
    add("--epsilon-high", type=common.positive, default=0.2,
        help="upper clip, at ratio 1 + ε; in cispo, at this number itself")
    add("--max-rounds", type=common.count, default=10,
        help="dapo: most rounds of sampling per step, to replace groups of equal rewards")
    add("--updates", type=common.count, default=1,
        help="optimizer steps per rollout; with 1, no clip binds, and gspo equals grpo")
    add("--group-size", type=common.number(int, 2), default=8, help="completions per prompt, G")
    add("--batch-size", type=common.count, default=8, help="prompts per rollout, P")
    add("--micro-batch-size", type=common.count, default=2, help="completions per forward pass")
    add("--sample-batch-size", type=common.count, default=128, help="completions sampled at a time")
    add("--temperature", type=common.positive, default=1.0, help="sampling temperature")
    add("--max-length", type=common.count, default=1024,
        help="longest prompt + completion, in tokens")
    add("--max-new-tokens", type=common.count, default=512, help="longest completion, in tokens")
    add("--learning-rate", type=common.positive, default=2e-5, help=common.PEAK)
    add("--max-steps", type=common.count, default=250, help="number of rollouts")
    add("--lora-rank", **common.LORA_RANK, type=common.count)
    add("--load-in-4bit", **common.FOUR_BIT)
    add("--gradient-checkpointing", **common.CHECKPOINTING)
    add("--save-every", type=common.count, default=20, help="rollouts between checkpoints")
    add("--seed", type=common.natural, default=0, help="seed of data order, LoRA and samples")
    add("--output-dir", default="runs/grpo", help=common.RESUMED)
    return parser


# What the papers of the variants set differently (for cispo, 2510.13786).
BY_LOSS = {"dr_grpo": dict(beta=0.0), "dapo": dict(beta=0.0, epsilon_high=0.28),
           "gspo": dict(epsilon=3e-4, epsilon_high=4e-4), "cispo": dict(beta=0.0, epsilon_high=5.0)}
# What the tiny model needs differently.
TINY = dict(dataset="tiny/data/prompt_train.jsonl", eval_dataset="tiny/data/prompt_heldout.jsonl",
            batch_size=16, micro_batch_size=128, max_new_tokens=24, learning_rate=1e-3,
            max_steps=80)
FIGURES = ("loss", "entropy", "clip_fraction", "kl", "ratio_error")


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


def group_advantages(rewards, baseline="group", scale=True):
    """Advantages [P, G] of G completions for each of P prompts, from their rewards [P, G]."""
    if baseline == "none":  # REINFORCE (Williams 1992)
        return rewards
    # A group of equal rewards must get exactly 0. Otherwise, the rounding error in its mean would
    # be divided by about 1e-4.
    above = (rewards - rewards.mean(1, keepdim=True)) * has_spread(rewards)[:, None]  # [P, G]
    if baseline == "rloo":
        # r_i minus the mean of the G − 1 others is (r_i − mean(r)) G / (G − 1).
        return above * rewards.shape[1] / (rewards.shape[1] - 1)
    if scale:
        return above / (rewards.std(1, keepdim=True) + 1e-4)  # std over G − 1
    return above


def has_spread(rewards):
    """[P]: whether the rewards [P, G] differ within each group. If not, it teaches nothing."""
    return rewards.amax(1) > rewards.amin(1)


def token_losses(logps, old_logps, advantages, mask, loss, epsilon, epsilon_high):
    """The loss of each token, and whether the clip binds there: [B, T-1] each."""
    advantages = advantages[:, None]  # [B, 1]
    log_ratio = (logps - old_logps) * mask  # [B, T-1]
    if loss == "gspo":
        # All tokens of a sequence share one ratio, the geometric mean of theirs (GSPO, eq. 7).
        log_ratio = log_ratio.sum(1, keepdim=True) / lengths(mask) * mask
    # With one update per rollout, π is π_old and every ratio ρ is 1. But its gradient is not 0:
    # ∇ρ = ρ ∇ log π = ∇ log π, so each token is pushed by its advantage, as in REINFORCE.
    ratio = log_ratio.exp()
    if loss == "cispo":
        # The bound, 1 + ε_high in the paper, limits a weight without a gradient (CISPO, eqs. 4, 5).
        weight = ratio.clamp(max=epsilon_high).detach()
        return -weight * advantages * logps, ratio > epsilon_high
    unclipped = ratio * advantages
    clipped = ratio.clamp(1 - epsilon, 1 + epsilon_high) * advantages
    # The minimum removes the gain from moving past the clip, but never the gradient that leads back
    # (PPO, eq. 7).
    return -torch.min(unclipped, clipped), clipped < unclipped


def token_kl(logps, ref_logps):
    """k3 of each token, [B, T-1] (eq. 4), which is never negative.

    Over samples of π, the mean of k3 is KL(π ‖ π_ref), and the mean of its gradient is the gradient
    of KL(π_ref ‖ π). The mean gradient of k1 would be 0.
    """
    log_q = ref_logps - logps
    return log_q.exp() - log_q - 1


def token_weights(mask, loss, sequences, tokens, longest):
    """The weight of each token in the loss, [B, T-1].

    `sequences` and `tokens` are totals over the whole batch. `longest` is the constant by which
    Dr. GRPO divides.
    """
    if loss in ("grpo", "gspo"):
        # This is the mean over sequences of the mean over their tokens.
        return mask / (lengths(mask) * sequences)
    if loss == "dr_grpo":
        # With |o_i| in place of this constant, the longer a wrong answer is, the less each of its
        # tokens costs.
        return mask / (longest * sequences)
    # dapo and cispo take the mean over all tokens of the batch (in the papers, of a group).
    return mask / tokens.clamp(min=1)


def lengths(mask):
    """The number of tokens of each sequence, [B, 1], but at least 1, because it is a divisor."""
    return mask.sum(1, keepdim=True).clamp(min=1)


def moments(x, mask):
    """Mean and variance of x where the mask is 1, over all processes, in fp64."""
    x = x.double()
    sums = torch.stack([mask.sum(), (x * mask).sum(), (x**2 * mask).sum()])
    sum_over_processes([sums])
    count, total, squares = sums.tolist()
    return total / count, squares / count - (total / count) ** 2


def mean(x):
    """The mean of x over all processes, in fp64."""
    return moments(x, torch.ones_like(x))[0]


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


# ---- rewards: functions and reward models --------------------------------------------------------

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

def rollout(model, rewards, examples, copies, tokenizer, args, seed):
    """Samples `copies` completions per prompt, and scores them.

    Returns a batch of tensors [B, ...] with the rewards, and the ids of the completions.
    """
    answers = []
    # --sample-batch-size counts completions, and each prompt has `copies` of them.
    size = max(1, args.sample_batch_size // copies)
    for i in range(0, len(examples), size):
        prompts = [example["prompt"] for example in examples[i:i + size]]
        with common.autocast(model):
            answers += sample(model, tokenizer, prompts, copies, args, seed + i)
    texts = tokenizer.batch_decode(answers, skip_special_tokens=True)
    # From here on, there is one example per completion.
    examples = [example for example in examples for _ in range(copies)]
    batch = join_answers([example["prompt"] for example in examples], answers, tokenizer, model)
    scores = [reward(model, batch, examples, texts, args) for reward in rewards.values()]
    # Where a reward does not apply to a completion, its score is NaN and is left out of the sum.
    batch["scores"] = torch.stack(scores, 1)  # [B, F]
    applies = ~batch["scores"].isnan()  # [B, F]
    for text, has_score in zip(texts, applies.any(1).tolist(), strict=True):
        if not has_score:
            common.fail(f"every --reward returns None for the answer {text!r:.100}: one must apply")
    weights = torch.tensor(args.reward_weights, device=model.device)  # [F]
    batch["rewards"] = batch["scores"].where(applies, 0.0) @ weights  # [B]
    if not batch["rewards"].isfinite().all():
        common.fail("a weighted sum of rewards is too large: lower --reward-weights")
    with common.reference(model):
        batch["ref_logps"] = in_parts(token_logps, model, batch, args.temperature, args)
    return batch, answers


def pick_prompts(examples, order, step, number, args):
    """The prompts that this process answers in a round of sampling, and the seed of the answers.

    Both depend only on --seed, the step, the round and the process, so a resumed run sees the same
    prompts and the same random numbers. Round 0 reads `order` from the start, one batch per step.
    Round 1 begins where round 0 of the last step ends, and so on for later rounds, so no place in
    `order` is read twice.
    """
    batch = number * args.max_steps + step
    picked = order[(batch - 1) * args.batch_size:batch * args.batch_size]
    # With one process, RANK is 0 and WORLD is 1, so these are all prompts of the batch.
    mine = [examples[i] for i in picked[common.RANK::common.WORLD]]
    return mine, args.seed + 10**6 * (batch * common.WORLD + common.RANK)


def resample(model, rewards, batch, examples, order, step, tokenizer, args):
    """Replaces groups of equal rewards; returns the batch and the number of completions sampled.

    This is the dynamic sampling of DAPO (section 3.2). A group of equal rewards has no gradient, so
    the more such groups a batch contains, the noisier its gradient is. DAPO keeps sampling prompts
    until it has P groups whose rewards differ. Here, each of the P places in the batch is filled
    independently: as long as the group in a place has equal rewards, each further round replaces it
    with a group for another prompt. So the processes need not wait for each other between rounds. A
    place whose group still has equal rewards after the last round counts for nothing. Sampling the
    same prompt again, with another seed, would be a different method: prompts that are almost
    always or almost never solved would get several chances, so the batch would contain more of
    them.
    """
    count = len(batch["rewards"])
    for number in range(1, args.max_rounds):
        is_equal = ~has_spread(batch["rewards"].view(-1, args.group_size))  # [P]
        if not is_equal.any():
            break
        mine, seed = pick_prompts(examples, order, step, number, args)
        mine = [example for example, equal in zip(mine, is_equal, strict=True) if equal]
        new, _ = rollout(model, rewards, mine, args.group_size, tokenizer, args, seed)
        rows = is_equal.repeat_interleave(args.group_size).nonzero()[:, 0]
        batch = replace_rows(batch, rows, new)
        count += len(rows)
    return batch, count


def replace_rows(batch, rows, new):
    """The batch, with those of its rows whose indices are `rows` replaced by the rows of `new`."""
    replaced = {}
    for name, values in batch.items():
        others = new[name]
        if values.dim() == 2:  # both are padded to the same number of columns
            columns = max(values.shape[1], others.shape[1])
            values = F.pad(values, (0, columns - values.shape[1]))
            others = F.pad(others, (0, columns - others.shape[1]))
        replaced[name] = values.index_copy(0, rows, others)
    return replaced


@torch.no_grad()
def in_parts(function, model, batch, argument, args):
    """function(model, batch, argument) without gradients, one micro-batch at a time."""
    parts = []
    with common.autocast(model):
        for rows in torch.arange(len(batch["input_ids"])).split(args.micro_batch_size):
            micro = {name: value[rows] for name, value in batch.items()}
            parts.append(function(model, micro, argument))
    return torch.cat(parts)


def mean_where_it_applies(scores):
    """The mean over all processes of one reward's scores [B] that are not NaN, or None."""
    applies = ~scores.isnan()  # [B]
    sums = torch.stack([scores.where(applies, 0.0).double().sum(), applies.double().sum()])
    sum_over_processes([sums])
    total, count = sums.tolist()
    return total / count if count else None


def describe(batch):
    """Means over the completions of all processes."""
    return {"reward": mean(batch["rewards"]), "length": mean(batch["loss_mask"].sum(1)),
            "stopped": mean(batch["stopped"])}


def evaluate(model, rewards, held_out, tokenizer, args):
    """Means over one completion per held-out prompt. kl is KL(π ‖ π_ref), in nats per completion.

    Prompts and random numbers are the same each time, so that before and after can be compared.
    """
    batch, _ = rollout(model, rewards, held_out, 1, tokenizer, args, args.seed)
    logps = in_parts(token_logps, model, batch, args.temperature, args)  # [B, T-1]
    return describe(batch) | {"kl": mean((logps - batch["ref_logps"]).sum(1))}


def group_gradients(model, batch, scaler, args):
    """Accumulates the gradients of the completions that are kept; returns {name: mean} to log."""
    sequences = args.batch_size * args.group_size
    tokens = batch["loss_mask"].sum()
    kept_tokens = (batch["loss_mask"] * batch["kept"][:, None]).sum()
    sum_over_processes([tokens, kept_tokens])
    sums = {}
    for rows in torch.arange(len(batch["input_ids"])).split(args.micro_batch_size):
        micro = {name: value[rows] for name, value in batch.items()}
        mask = micro["loss_mask"][:, 1:]  # [b, T-1]
        with common.autocast(model):
            logps = token_logps(model, micro, args.temperature)  # [b, T-1]
        # In the only update of a rollout, π is still π_old.
        old_logps = micro["logps"] if args.updates > 1 else logps.detach()
        losses, is_clipped = token_losses(logps, old_logps, micro["advantages"], mask, args.loss,
                                          args.epsilon, args.epsilon_high)
        losses = losses + args.beta * token_kl(logps, micro["ref_logps"])
        weights = token_weights(mask, args.loss, sequences, kept_tokens, args.max_new_tokens)
        losses = losses * weights * micro["kept"][:, None]  # [b, T-1]
        scaler.scale(losses.sum()).backward()
        # In the first update, π is still π_old, so |ρ − 1| above 0 is an error, such as rounding.
        # In this script, π_old is also the policy that sampled, because the same model samples and
        # is trained. If another engine such as vLLM samples, its kernels and its precision differ,
        # and therefore its probabilities, even with the same weights. The completions then come
        # from a different policy, π_sampler, and the update is off-policy. Truncated importance
        # sampling corrects for this: it multiplies the loss of each token by the constant
        # min(π_old / π_sampler, C), where the bound C limits the variance (Yao et al. 2025, "Your
        # Efficient RL Framework Secretly Brings You Off-Policy RL Training").
        ratio_error = ((logps - old_logps).exp() - 1).abs()
        # The logged kl is the mean of k1, summed over a completion; the loss has k3 of each token.
        add_up(sums, {"loss": losses, "kl": logps - micro["ref_logps"], "entropy": -logps,
                      "clip_fraction": is_clipped, "ratio_error": ratio_error})
    figures = over_processes(sums, FIGURES, model.device)
    figures["kl"] /= sequences
    for name in ("entropy", "clip_fraction", "ratio_error"):
        figures[name] /= tokens.item()
    return figures


def some_samples(tokenizer, step, examples, answers, scores):
    """Up to four prompts with their sampled answers and scores, as text for the summary."""
    samples = []
    for example, answer, score in zip(examples[:4], answers, scores.tolist(), strict=False):
        samples.append({"step": step, "prompt": common.shown_text(tokenizer, example["prompt"]),
                        "answer": common.shown_text(tokenizer, answer), "score": score})
    return samples


def train(args):
    # 1. Check the rewards and load the prompts first, so that errors show before the model loads.
    if not len(set(args.reward)) == len(args.reward) == len(args.reward_weights):
        common.fail("each --reward may be named only once, and needs one of --reward-weights")
    if args.loss == "dapo" and args.baseline == "none":
        common.fail("--loss dapo leaves out groups of equal rewards: it needs a --baseline")
    if args.batch_size < common.WORLD:
        common.fail("--batch-size must be at least the number of processes")
    for name in args.reward:
        check_reward(name, args.model)
    tokenizer = common.load_tokenizer(args.model, args.chat_template, args.template_arguments)
    encode = functools.partial(encode_row, max_new_tokens=args.max_new_tokens,
                               needs_answer="correct_answer" in args.reward)
    wanted = args.max_steps * args.batch_size
    if args.loss == "dapo":
        wanted *= args.max_rounds
    examples, held_out = common.load_examples(args, encode, tokenizer, wanted)

    # 2. Load a frozen base with trainable LoRA matrices, and the reward models on the same base.
    torch.manual_seed(args.seed)
    model = common.load_model(
        args.model, args.load_in_4bit, args.lora_rank, args.gradient_checkpointing)
    rewards = {name: load_reward(name, model) for name in args.reward}
    weights = {name: p for name, p in model.named_parameters() if p.requires_grad}
    # `update` sets the learning rate.
    optimizer = torch.optim.AdamW(weights.values(), weight_decay=0.0)
    scaler = common.grad_scaler(model)  # for fp16 (a T4), where small gradients round to 0
    common.print_settings(model)

    # 3. Start a new run, or resume an interrupted one.
    open_run(args, [examples, held_out])
    state = restore(args, weights, optimizer, scaler)
    if "before" not in state:
        state["before"] = evaluate(model, rewards, held_out, tokenizer, args)
    # `pick_prompts` takes the prompts in this order. --loss dapo needs more of them, for the later
    # rounds of a step.
    generator = torch.Generator().manual_seed(args.seed)
    passes = range(math.ceil(wanted / len(examples)))
    order = torch.cat([torch.randperm(len(examples), generator=generator) for _ in passes])
    progress = tqdm(range(state["step"] + 1, args.max_steps + 1), initial=state["step"],
                    total=args.max_steps, disable=common.RANK > 0)
    for step in progress:
        # 4. Sample G completions for each prompt of this process, and score them.
        began = time.time()
        mine, seed = pick_prompts(examples, order, step, 0, args)
        first, answers = rollout(model, rewards, mine, args.group_size, tokenizer, args, seed)
        batch = first
        sampled = len(answers)
        if args.loss == "dapo":
            batch, sampled = resample(
                model, rewards, first, examples, order, step, tokenizer, args)
        # These metrics describe the completions of the first round, before DAPO replaces groups, so
        # that they show the policy and not the selection.
        metrics = {"step": step, **describe(first), "rollout_seconds": time.time() - began}

        # 5. Compute the advantages: how much better is each completion than its group?
        grouped = batch["rewards"].view(-1, args.group_size)  # [P, G]
        advantages = group_advantages(grouped, args.baseline, scale=args.loss != "dr_grpo")
        batch["advantages"] = advantages.flatten()  # [B]
        spread = has_spread(grouped)  # [P]
        batch["kept"] = torch.ones_like(batch["stopped"])  # [B]
        if args.loss == "dapo":
            # Truncated completions and groups that still have equal rewards count for nothing.
            batch["kept"] = batch["stopped"] & spread.repeat_interleave(args.group_size)

        # 6. Take one or more optimizer steps on these completions. After the first, π differs from
        # π_old, which sampled them.
        if args.updates > 1:
            batch["logps"] = in_parts(token_logps, model, batch, args.temperature, args)
        lr = learning_rate(step, args.max_steps, args.learning_rate)
        figures = []
        for _ in range(args.updates):
            figures.append(group_gradients(model, batch, scaler, args))
            updated = update(optimizer, scaler, lr)

        # 7. Log the means over the updates, print some completions, and save a checkpoint.
        for name in FIGURES:
            metrics[name] = sum(x[name] for x in figures) / len(figures)
        # These two come from the first update, in which π is still the policy that sampled.
        for name in ("kl", "ratio_error"):
            metrics[name] = figures[0][name]
        for name, scores in zip(rewards, first["scores"].unbind(1), strict=True):
            metrics[f"reward_{name}"] = mean_where_it_applies(scores)
        grouped = first["rewards"].view(-1, args.group_size)  # [P, G]
        metrics |= {"group_std": mean(grouped.std(1)), "zero_spread": 1 - mean(has_spread(grouped))}
        counts = torch.tensor([batch["attention_mask"].sum(), sampled], device=model.device)
        sum_over_processes([counts])
        metrics |= {"sampled_answers": counts[1].item(), **updated, "seconds": time.time() - began}
        log_step(args, state, metrics, counts[0].item(), progress, ("reward", "kl"))
        if step % args.save_every == 0 or step in (1, args.max_steps):
            # The first G answers are to the first prompt, and so on.
            prompts = [example for example in mine for _ in range(args.group_size)]
            samples = some_samples(tokenizer, step, prompts, answers, first["rewards"])
            state["samples"] += samples
            save(args, state, weights, optimizer, scaler)
            tqdm.write(f"\nsamples of step {step}, answers in green:")
            for sample in samples:
                tqdm.write("{prompt}\033[32m{answer}\033[0m\nscore {score:.2f}\n".format(**sample))

    # 8. Evaluate again on the same held-out prompts, and save the adapter.
    finish(args, state, model, tokenizer, evaluate(model, rewards, held_out, tokenizer, args))
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
    with common.running("--micro-batch-size and --sample-batch-size, then the lengths"):
        train(common.parse(make_flags(), TINY, BY_LOSS))
