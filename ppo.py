"""PPO for language models (Schulman et al. 2017, arXiv:1707.06347; Ouyang et al. 2022, 2203.02155).

PPO learns from prompts and a reward. The policy π answers each prompt, and a reward model or a
function scores the answer. Each token of the answer becomes more likely if things turned out better
than the critic V expected before that token, and less likely if they turned out worse.

Why it works. SFT follows ∇ log π(y) of an answer y that somebody else wrote. Here the model writes
y itself, and no gradient flows back through a sampled token. But because ∇π = π ∇ log π, samples
can still estimate the gradient of the expected reward R(y). Write π(y_t) for the probability of
token y_t given the prompt and the tokens before y_t, so that log π(y) = Σ_t log π(y_t). Then

    ∇ E[R(y)] = Σ_y R(y) ∇π(y) = Σ_y π(y) R(y) ∇ log π(y) = E[R(y) ∇ log π(y)]
              = E[Σ_t (R(y) − b_t) ∇ log π(y_t)]

This is the policy gradient. Following it with b_t = 0 is REINFORCE (Williams 1992), which is SFT on
the model's own answers, each weighted by its reward. The baseline b_t may be any function of the
prompt and of the tokens before y_t, because the term that it adds is 0 on average:

    E[∇ log π(y_t)] = Σ π(y_t) ∇ log π(y_t) = ∇ Σ π(y_t) = ∇ 1 = 0     summed over the vocabulary

So a baseline does not change the mean of the estimate, but it changes the variance, which matters.
Take two answers with rewards 10 and 11. Without a baseline, sampling either answer makes it more
likely, and only the average over many samples favors the second. With b = 10.5, sampling the first
makes it less likely. For the same reason, rewards paid before y_t can be left out. What remains,
the sum of the rewards from y_t on minus a baseline, estimates the advantage A_t of y_t. PPO's
baseline is a trained model, the critic. (GRPO takes the mean reward of several answers to the same
prompt instead. If critics are new to you, read grpo.py first.)

In the language of RL, each token y_t is an action. A rollout is a batch of answers, sampled from
the current policy, which is π_old from then on. The equations are

    r_t = −β log(π(y_t) / π_ref(y_t)), plus the score of the answer at its last token
    δ_t = r_t + γ V_{t+1} − V_t
    A_t = Σ_l (γλ)^l δ_{t+l}                                          GAE, 1506.02438, eq. 16
    R_t = A_t + V_t
    policy loss = −E min[ρ_t A_t, clip(ρ_t, 1 − ε, 1 + ε) A_t]        PPO, eq. 7
    critic loss = ½ E max[(V_t − R_t)², (clip(V_t, V_old − ε, V_old + ε) − R_t)²]

- V_t is the critic's prediction of the sum of the rewards from y_t on, made before it sees y_t. A_t
  says how much better y_t turned out, and R_t, the return, is the critic's target. r_t, A_t and R_t
  are computed once per rollout, from π_old and its critic V_old, and are constants in the losses.
- The λ of generalized advantage estimation (GAE) trades bias against variance. With λ = 1 (and
  γ = 1), A_t is the sum of the rewards from y_t on, minus V_t, which is unbiased but noisy. With
  λ = 0, A_t is δ_t, which is much less noisy, but biased wherever the critic's V_{t+1} is wrong.
  γ discounts later rewards; γ = 1 means no discount.
- After the last token, V is 0, even if --max-new-tokens truncated the answer: a truncated answer
  counts as ended, without a bootstrap from the critic's V. It pays a penalty instead [3].
- The ratio ρ_t = π(y_t) / π_old(y_t) says how far the policy has moved since the rollout. (The PPO
  paper calls it r_t.) The clip makes several updates per rollout safer: once ρ_t has moved past
  1 ± ε in the direction that A_t favors, there is nothing to gain from moving it further.

One frozen base carries four roles, which differ in the LoRA adapter that is switched on:

                     ┌── adapter "default" ── policy: samples answers, log π       trained
    frozen base ─────┼── no adapter ───────── reference: log π_ref                 frozen
                     ├── adapter "critic" ─── critic: V, one value per token       trained
                     └── adapter "reward" ─── reward model: one score per answer   frozen

If training starts from an adapter, the reference is a frozen copy of that adapter. If a function
takes the place of the reward model, the critic starts as the base with a head of zeros. PPO's
entropy bonus (eq. 9) is left out, and so are the adaptive β and the whitened rewards of Ziegler et
al. These details make PPO work on language models:

    [1] each token pays β log π/π_ref (Ziegler et al. 2019, 1909.08593; their eq. 2 is per answer)
    [2] the score comes at the last token (Ziegler et al.'s code)
    [3] a truncated answer loses score (Huang et al. 2024, 2403.17031, give it a fixed low score)
    [4] the critic starts as a copy of the reward model, if any (Ouyang et al. 2022, appendix C.4)
    [5] advantages are whitened: mean 0, variance 1 over the tokens of a rollout (Huang et al. 2024)
    [6] the value loss is clipped (Ziegler et al.'s code)
    [7] several epochs of minibatches on the same samples (PPO, algorithm 1)
    [8] early stopping: no further epoch once π is --target-kl from π_old (Dossa et al. 2021)
    [9] sampling and scoring use the same temperature and no dropout, so the samples are from π_old

The KL penalty [1] keeps the policy near π_ref. Without it, the policy drifts toward whatever the
reward happens to favor. In the *reward*, the KL estimator has to be k1 = log π/π_ref, because the
policy gradient of k1 is exactly the gradient of KL(π ‖ π_ref), while the policy gradient of k3 (see
grpo.py) may point in almost the opposite direction. In a *loss*, k1 would be useless, because its
gradient is 0 on average.

Worked example: an answer of three tokens with score 1, β = 0.05, γ = 1, λ = 0.95, not whitened.

    log π − log π_ref      0.20   −0.40    0.20
    r                     −0.01    0.02    0.99     the KL penalty, and the score at the end
    V                      0.50    0.60    0.80     0 after the last token
    δ                      0.09    0.22    0.19
    A                      0.47    0.40    0.19     λ = 1: 0.50, 0.41, 0.19;  λ = 0: δ
    R                      0.97    1.00    0.99
    ρ after an update      1.30    1.10    0.90
    policy loss           −0.56   −0.44   −0.17     the first ρ is clipped at 1.2: no gradient

    python ppo.py                                              # the tiny model, three minutes
    python ppo.py --model runs/sft --reward runs/sft-reward    # both on one base
    python ppo.py --model Qwen/Qwen2.5-0.5B-Instruct           # GSM8K, scored by the last number

The default learning rate, 1e-5, comes from published PPO runs that train all weights (1e-6 to
1e-5). LoRA usually needs one several times as high, so try a higher one on a large model.

What to watch: the reward rises, kl rises slowly and stays below ten nats per answer, the critic's
explained_variance rises toward 1, and clip_fraction stays below 0.2. If reward and kl rise together
while the samples get worse, the policy exploits mistakes of its reward model. This is called reward
hacking or over-optimization. A larger --beta, fewer steps or a better reward model reduce it.

Try `--target-kl 0.1` on the tiny model: early stopping [8] never acts (updates is 8 in all 25
rollouts; by default it is 6 in two of them). The policy ends further from the reference, with a kl
of 0.51 instead of 0.45 by evaluate.py, and is no more accurate: 0.948 instead of 0.953.

Shapes: B answers (b in a micro-batch) of T columns, of which L ≤ T hold a token in some row; N
answer tokens in all, C of them at a time; D the width of the model, V the size of its vocabulary
(elsewhere, V is the critic's value); P the prompts that `sample` reads, alive the answers that have
not ended.
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
    add("--reward", default="correct_answer",
        help="reward: correct_answer, FILE.py:function, or an output folder of reward_model.py")
    add("--dataset", default="openai/gsm8k:main", help="prompts: Hub name[:config] or local file")
    add("--split", default="train", help="split of a Hub dataset")
    add("--columns", **common.COLUMNS)
    add("--chat-template", help=common.TEMPLATE)
    add("--template-arguments", **common.VARIABLES)
    add("--eval-dataset", help="held-out prompts; if not given, some of --dataset are held out")
    add("--eval-size", type=common.count, default=64, help="number of held-out prompts")
    add("--beta", type=common.weight, default=0.05, help="KL penalty strength, per token [1]")
    add("--missing-eos-penalty", type=common.weight, default=1.0,
        help="score deducted from a truncated answer [3]")
    add("--gamma", type=common.share, default=1.0, help="discount factor per token")
    add("--lam", type=common.share, default=0.95,
        help="λ of GAE: 1 is unbiased but noisy, 0 trusts the critic")
    add("--epsilon", type=common.positive, default=0.2, help="clip range ε of ratio and value [6]")
    add("--value-weight", type=common.weight, default=0.5,
        help="weight of the critic loss; 0 freezes the critic. Policy and critic share no trained\n"
             "weights, and Adam cancels a constant factor, so other values matter only through\n"
             "the gradient clipping, which is over both")
    add("--epochs", type=common.count, default=4, help="maximum passes over a rollout [7]")
    add("--target-kl", type=common.positive, default=0.02,
        help="early stopping: an epoch whose KL(π_old ‖ π), in nats per token, exceeds this value\n"
             "is the last one on its rollout [8]")
    add("--batch-size", type=common.count, default=64, help="answers per rollout")
    add("--minibatches", type=common.count, default=4, help="optimizer steps per epoch")
    add("--micro-batch-size", type=common.count, default=2, help="answers per forward pass")
    add("--sample-batch-size", type=common.count, default=128, help="answers sampled at a time")
    add("--temperature", type=common.positive, default=1.0, help="sampling temperature [9]")
    add("--max-length", type=common.count, default=768, help="longest prompt + answer, in tokens")
    add("--max-new-tokens", type=common.count, default=256, help="longest answer, in tokens")
    add("--learning-rate", type=common.positive, default=1e-5, help=common.PEAK)
    add("--max-steps", type=common.count, default=200, help="number of rollouts")
    add("--lora-rank", **common.LORA_RANK, type=common.count)
    add("--load-in-4bit", **common.FOUR_BIT)
    add("--gradient-checkpointing", **common.CHECKPOINTING)
    add("--save-every", type=common.count, default=10, help="rollouts between checkpoints")
    add("--seed", type=common.natural, default=0, help="seed of data order, LoRA and samples")
    add("--output-dir", default="runs/ppo", help=common.RESUMED)
    return parser


# At β = 0.05, the policy would exploit a weakness of the tiny reward model and write correct sums
# that answer a different question from the one asked.
TINY = dict(dataset="tiny/data/prompt_train.jsonl", eval_dataset="tiny/data/prompt_heldout.jsonl",
            reward="tiny/reward", beta=0.5, batch_size=128, minibatches=2, micro_batch_size=64,
            max_new_tokens=24, learning_rate=5e-4, max_steps=25)
FIGURES = ("policy_loss", "value_loss", "sampler_kl", "clip_fraction", "entropy", "ratio_error")


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


def token_values(model, batch, head):
    """[B, T-1]: column t is the critic's V before token t+1 where the loss mask is 1, else 0."""
    # Columns that are padding in every row are not read. L ≤ T columns remain.
    used = batch["attention_mask"].any(0)  # [T]
    inputs = {name: batch[name][:, used] for name in ("input_ids", "attention_mask")}  # [B, L]
    hidden = common.causal_lm(model).base_model(**inputs, use_cache=False)[0]  # [B, L, D]
    values = (hidden[:, :-1].float() * head.weight).sum(-1)  # [B, L-1]
    padding = int((~used).sum())
    return F.pad(values, (0, padding)) * batch["loss_mask"][:, 1:]  # [B, T-1]


def token_rewards(scores, logps, ref_logps, mask, beta):
    """Rewards [B, T-1]: a KL penalty at each token [1], and the score [B] at the last one [2]."""
    # This has to be k1, because its policy gradient is the gradient of the KL. That of k3 is not.
    rewards = -beta * (logps - ref_logps) * mask  # [B, T-1]
    # The last token of an answer is in the last column where its mask is 1.
    columns = torch.arange(mask.shape[1], device=mask.device)  # [T-1]
    last = (mask * columns).argmax(1)  # [B]
    rewards[torch.arange(len(last)), last] += scores
    return rewards


def gae(rewards, values, mask, gamma, lam):
    """Advantages and returns, [B, T-1] each (GAE, eq. 16), from the last token to the first."""
    advantages = torch.zeros_like(rewards)
    # Nothing follows the last token, so V and A are 0 after it. An answer that --max-new-tokens
    # truncated counts as ended, too: there is no bootstrap from the critic.
    next_value = torch.zeros_like(rewards[:, 0])  # [B]
    next_advantage = torch.zeros_like(rewards[:, 0])  # [B]
    for t in reversed(range(rewards.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]  # [B]
        # Σ_l (γλ)^l δ_{t+l} is δ_t plus γλ times the same sum from t+1 on.
        advantages[:, t] = (delta + gamma * lam * next_advantage) * mask[:, t]
        next_value = values[:, t] * mask[:, t]
        next_advantage = advantages[:, t]
    return advantages, advantages + values


def whiten(x, mask):
    """x [B, T-1] with mean 0 and variance 1 over the answer tokens of all processes [5]."""
    center, variance = moments(x, mask)
    return (x - center) * mask / math.sqrt(max(variance, 0) + 1e-8)


def policy_loss(logps, old_logps, advantages, epsilon):
    """The loss of each token (PPO, eq. 7), and whether the clip binds there: [B, T-1] each."""
    ratio = (logps - old_logps).exp()
    unclipped = ratio * advantages
    clipped = ratio.clamp(1 - epsilon, 1 + epsilon) * advantages
    # The minimum removes the gain from moving past the clip, but never the gradient that leads
    # back.
    return -torch.min(unclipped, clipped), clipped < unclipped


def value_loss(values, old_values, returns, epsilon):
    """Half the squared error of each value, or of the clipped value if that is larger [6]."""
    clipped = old_values + (values - old_values).clamp(-epsilon, epsilon)
    return 0.5 * torch.max((values - returns) ** 2, (clipped - returns) ** 2)


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

def rollout(roles, examples, tokenizer, args, seed):
    """Samples one answer per prompt, and reads it in all roles.

    Returns a batch of tensors [B, ...] with the outputs of all roles, and the ids of the answers.
    """
    model, reward, critic_head = roles
    prompts = [example["prompt"] for example in examples]
    answers = []
    for i in range(0, len(prompts), args.sample_batch_size):
        some = prompts[i:i + args.sample_batch_size]
        with common.autocast(model):
            answers += sample(model, tokenizer, some, 1, args, seed + i)
    texts = tokenizer.batch_decode(answers, skip_special_tokens=True)
    batch = join_answers(prompts, answers, tokenizer, model)
    # All roles read the sampled ids, because decoding and re-tokenizing may give other ids.
    batch["logps"] = in_parts(token_logps, model, batch, args.temperature, args)  # [B, T-1]
    with common.reference(model):
        batch["ref_logps"] = in_parts(token_logps, model, batch, args.temperature, args)
    with common.using(model, "critic"):
        batch["values"] = in_parts(token_values, model, batch, critic_head, args)  # [B, T-1]
    batch["scores"] = reward(model, batch, examples, texts, args)
    if batch["scores"].isnan().any():
        common.fail(f"the reward {args.reward} returns None, but each answer needs a number in PPO")
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


def describe(batch):
    """Means over the answers of all processes. kl is KL(π ‖ π_ref), in nats per answer."""
    kl = (batch["logps"] - batch["ref_logps"]).sum(1)  # [B]
    return {"reward": mean(batch["scores"]), "kl": mean(kl),
            "length": mean(batch["loss_mask"].sum(1)), "stopped": mean(batch["stopped"])}


def evaluate(roles, held_out, tokenizer, args):
    """Means over one answer per held-out prompt.

    Prompts and random numbers are the same each time, so that before and after can be compared.
    """
    batch, _ = rollout(roles, held_out, tokenizer, args, args.seed)
    return describe(batch)


def local_rows(indices):
    """The rows of this process that hold the answers `indices` of the whole rollout.

    Answer i of the rollout is row i // WORLD of process i % WORLD. With one process, RANK is 0 and
    WORLD is 1, so this returns `indices`.
    """
    return indices[indices % common.WORLD == common.RANK] // common.WORLD


def minibatch_gradients(roles, batch, rows, scaler, args):
    """Accumulates the gradients of policy and critic over `rows`, this process's share.

    Returns {name: mean} of the FIGURES, over the tokens of the minibatch in all processes.
    """
    model, _, critic_head = roles
    # Each token has weight 1 / tokens, whichever micro-batch or process it is in.
    tokens = batch["loss_mask"][rows].sum()
    sum_over_processes([tokens])
    sums = {}
    for i in range(0, len(rows), args.micro_batch_size):
        micro_rows = rows[i:i + args.micro_batch_size]
        micro = {name: x[micro_rows] for name, x in batch.items()}
        mask = micro["loss_mask"][:, 1:]  # [b, T-1]
        with common.autocast(model):
            logps = token_logps(model, micro, args.temperature)  # [b, T-1]
        policy_losses, is_clipped = policy_loss(
            logps, micro["logps"], micro["advantages"], args.epsilon)
        scaler.scale((policy_losses * mask).sum() / tokens).backward()
        # The critic's adapter stays on in the backward pass, because gradient checkpointing repeats
        # the forward pass there.
        with common.using(model, "critic"):
            with common.autocast(model):
                values = token_values(model, micro, critic_head)  # [b, T-1]
            value_losses = value_loss(values, micro["values"], micro["returns"], args.epsilon)
            scaler.scale(args.value_weight * (value_losses * mask).sum() / tokens).backward()
        log_ratio = logps - micro["logps"]
        error = log_ratio.exp() - 1
        # The samples come from π_old, so the mean of this k3 estimates KL(π_old ‖ π).
        k3 = error - log_ratio
        figures = {"policy_loss": policy_losses, "value_loss": value_losses, "sampler_kl": k3,
                   "clip_fraction": is_clipped, "entropy": -logps, "ratio_error": error.abs()}
        add_up(sums, {name: x * mask for name, x in figures.items()})
    totals = over_processes(sums, FIGURES, model.device)
    return {name: total / tokens.item() for name, total in totals.items()}


def some_samples(tokenizer, step, examples, answers, scores):
    """Up to four prompts with their sampled answers and scores, as text for the summary."""
    samples = []
    for example, answer, score in zip(examples[:4], answers, scores.tolist(), strict=False):
        samples.append({"step": step, "prompt": common.shown_text(tokenizer, example["prompt"]),
                        "answer": common.shown_text(tokenizer, answer), "score": score})
    return samples


def train(args):
    # 1. Check the reward and load the prompts first, so that errors show before the model loads.
    check_reward(args.reward, args.model)
    if args.batch_size < max(args.minibatches, common.WORLD):
        common.fail("--batch-size must be at least --minibatches and the number of processes")
    tokenizer = common.load_tokenizer(args.model, args.chat_template, args.template_arguments)
    encode = functools.partial(encode_row, max_new_tokens=args.max_new_tokens,
                               needs_answer=args.reward == "correct_answer")
    wanted = args.max_steps * args.batch_size
    examples, held_out = common.load_examples(args, encode, tokenizer, wanted)

    # 2. Load one frozen base with its roles: policy, reference, critic [4] and reward model.
    torch.manual_seed(args.seed)
    model = common.load_model(
        args.model, args.load_in_4bit, args.lora_rank, args.gradient_checkpointing)
    reward = load_reward(args.reward, model)
    # The critic starts from the reward model, if there is one.
    critic_start = args.reward if "reward" in model.peft_config else None
    critic_head = common.add_role(model, critic_start, "critic", trainable=True)
    roles = model, reward, critic_head
    weights = {name: p for name, p in model.named_parameters() if p.requires_grad}
    weights["critic_head"] = critic_head.weight
    # `update` sets the learning rate.
    optimizer = torch.optim.AdamW(weights.values(), weight_decay=0.0)
    scaler = common.grad_scaler(model)  # for fp16 (a T4), where small gradients round to 0
    common.print_settings(model)

    # 3. Start a new run, or resume an interrupted one.
    open_run(args, [examples, held_out])
    state = restore(args, weights, optimizer, scaler)
    if "before" not in state:
        state["before"] = evaluate(roles, held_out, tokenizer, args)
    # Prompts and random numbers depend only on seed and step, so a resumed run sees the same ones.
    generator = torch.Generator().manual_seed(args.seed)
    passes = range(math.ceil(wanted / len(examples)))
    order = torch.cat([torch.randperm(len(examples), generator=generator) for _ in passes])
    progress = tqdm(range(state["step"] + 1, args.max_steps + 1), initial=state["step"],
                    total=args.max_steps, disable=common.RANK > 0)
    for step in progress:
        # 4. Sample an answer to each prompt of this process, and read it in all roles. With one
        # process, RANK is 0 and WORLD is 1, so `mine` holds all prompts of the step.
        began = time.time()
        picked = order[(step - 1) * args.batch_size:step * args.batch_size]
        mine = [examples[i] for i in picked[common.RANK::common.WORLD]]
        seed = args.seed + 10**6 * (step * common.WORLD + common.RANK)
        batch, answers = rollout(roles, mine, tokenizer, args, seed)
        metrics = {"step": step, **describe(batch), "rollout_seconds": time.time() - began}
        mask = batch["loss_mask"][:, 1:]  # [B, T-1]

        # 5. Compute the reward of each token, then advantages and returns (GAE).
        penalized = batch["scores"] - args.missing_eos_penalty * ~batch["stopped"]  # [B], [3]
        rewards = token_rewards(penalized, batch["logps"], batch["ref_logps"], mask, args.beta)
        advantages, returns = gae(rewards, batch["values"], mask, args.gamma, args.lam)
        batch["advantages"] = whiten(advantages, mask)
        batch["returns"] = returns
        # A = R − V is the part of the returns that the critic does not explain.
        _, unexplained = moments(advantages, mask)
        _, variance = moments(returns, mask)
        metrics["explained_variance"] = 1 - unexplained / (variance + 1e-8)

        # 6. Train for several epochs on these answers, with one optimizer step per minibatch [7].
        lr = learning_rate(step, args.max_steps, args.learning_rate)
        figures = []
        for epoch in range(args.epochs):
            generator.manual_seed(args.seed + step * args.epochs + epoch)
            shuffled = torch.randperm(args.batch_size, generator=generator)
            for minibatch in shuffled.tensor_split(args.minibatches):
                rows = local_rows(minibatch)
                figures.append(minibatch_gradients(roles, batch, rows, scaler, args))
                updated = update(optimizer, scaler, lr)
            # Stop early [8], because samples of π_old say little about a π that is far from it.
            epoch_kl = [x["sampler_kl"] for x in figures[-args.minibatches:]]
            if sum(epoch_kl) / len(epoch_kl) > args.target_kl:
                break

        # 7. Log the means over all updates, print some answers, and save a checkpoint.
        for name in FIGURES:
            metrics[name] = sum(x[name] for x in figures) / len(figures)
        # In the first update, π is still π_old, so the ratio differs from 1 only by rounding error.
        metrics["ratio_error"] = figures[0]["ratio_error"]
        metrics |= {"updates": len(figures), **updated}
        tokens = batch["attention_mask"].sum()
        sum_over_processes([tokens])
        metrics["seconds"] = time.time() - began
        log_step(args, state, metrics, tokens.item(), progress, ("reward", "kl"))
        if step % args.save_every == 0 or step in (1, args.max_steps):
            samples = some_samples(tokenizer, step, mine, answers, batch["scores"])
            state["samples"] += samples
            save(args, state, weights, optimizer, scaler)
            tqdm.write(f"\nsamples of step {step}, answers in green:")
            for sample in samples:
                tqdm.write("{prompt}\033[32m{answer}\033[0m\nscore {score:.2f}\n".format(**sample))

    # 8. Evaluate again on the same held-out prompts, and save the policy's adapter.
    finish(args, state, model, tokenizer, evaluate(roles, held_out, tokenizer, args))
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
        train(common.parse(make_flags(), TINY))
