"""PPO for language models (Schulman et al. 2017, arXiv:1707.06347; Ouyang et al. 2022, 2203.02155).

PPO learns from prompts and a reward. The policy π answers each prompt, a reward model or a function
scores the answer, and a token becomes more likely if its answer went better than the critic V
expected, and less likely if it went worse.

Why it works. SFT follows ∇ log π of answers that somebody else wrote. Here the model writes the
answers itself, and no gradient flows back through a sampled token. But ∇π = π ∇ log π, so samples
can still estimate the gradient of the expected reward R of an answer y:

    ∇ E[R(y)] = Σ_y R(y) ∇π(y) = Σ_y π(y) R(y) ∇ log π(y) = E[R(y) ∇ log π(y)]
              = E[Σ_t (R(y) − b_t) ∇ log π(y_t)]

This is the policy gradient, and following it with b = 0 is REINFORCE (Williams 1992). It is SFT on
the model's own answers, each weighted by its reward: raising log π of the sampled tokens in
proportion to R raises the expected R. The baseline b_t may be anything that does not depend on y_t,
because E[∇ log π(y_t)] = Σ π(y_t) ∇ log π(y_t) = ∇ Σ π(y_t) = ∇ 1 = 0. So a baseline changes the
variance of the estimate and not its mean, and the variance is what matters: with rewards 10 and 11
and no baseline, both answers become more likely, and only the average over many samples favors
the second; with b = 10.5, the first becomes less likely. For the same reason, rewards
that were paid before y_t need not count. What remains, the rewards from y_t on minus a baseline, is
the advantage A_t of y_t. PPO learns its baseline, the critic. (grpo.py has none to learn: it takes
the mean reward of several answers to the prompt. If critics are new to you, read grpo.py first.)

Each token y_t is an action, and these are the equations:

    r_t = −β log(π(y_t) / π_ref(y_t)), plus the score of the answer at its last token
    δ_t = r_t + γ V_{t+1} − V_t
    A_t = Σ_l (γλ)^l δ_{t+l}                                          GAE, 1506.02438, eq. 16
    R_t = A_t + V_t
    policy loss = −E min[ρ_t A_t, clip(ρ_t, 1 − ε, 1 + ε) A_t]        PPO, eq. 7
    critic loss = ½ E max[(V_t − R_t)², (clip(V_t, V_old − ε, V_old + ε) − R_t)²]

- V_t is the sum that the critic expects of the rewards from y_t on, before it has seen y_t. A_t is
  how much better y_t turned out, and R_t, the return, is what V_t should have been. Both are
  computed once, from the values of sampling time, V_old, and are constants in the losses.
- The λ of generalized advantage estimation (GAE) trades bias for variance. At one end, λ = 1, A_t
  is the sum of the rewards from t on, minus V_t: unbiased but noisy. At the other, λ = 0, A_t is
  δ_t: hardly noisy, but as wrong as the critic is about the next token. (γ = 1 means no discount.)
- After the last token, V is 0. This holds for an answer that --max-new-tokens truncated, too: it
  counts as ended, and is not bootstrapped from the critic's V. It pays a penalty instead, see [3].
- The ratio ρ_t = π(y_t) / π_old(y_t) says how far the policy has moved since it sampled. Its clip
  makes several updates on one rollout safe: beyond a factor of 1 ± ε there is nothing to gain.

One frozen base carries four roles, as LoRA adapters that are switched on and off:

                     ┌── adapter "default" ── policy: samples answers, log π       trained
    frozen base ─────┼── no adapter ───────── reference: log π_ref                 frozen
                     ├── adapter "critic" ─── critic: V, one value per token       trained
                     └── adapter "reward" ─── reward model: one score per answer   frozen

If training starts from an adapter, the reference is a frozen copy of it. A reward function takes
the place of the reward model, and then the critic's head starts at 0. Dropped are PPO's entropy
bonus (eq. 9), Ziegler's adaptive β and Ziegler's whitened rewards. These details make PPO work on
language models:

    [1] each token pays β log π/π_ref (Ziegler et al. 2019, 1909.08593; their eq. 2 is per answer)
    [2] the score comes at the last token (Ziegler et al.'s code)
    [3] an unended answer loses score (in Huang et al. 2024, 2403.17031, it gets a fixed low one)
    [4] the critic starts as a copy of the reward model, if any (Ouyang et al. 2022, appendix C.4)
    [5] advantages get mean 0 and variance 1 over the tokens of a rollout (Huang et al. 2024)
    [6] the value loss is clipped (Ziegler et al.'s code)
    [7] several epochs of minibatches on the same samples (PPO, algorithm 1)
    [8] early stopping: no further epoch once π is --target-kl from π_old (Dossa et al. 2021)
    [9] sampling and scoring use the same temperature and no dropout: the samples are those of π_old

The KL penalty [1] keeps the policy near π_ref; without it, the policy drifts to whatever the reward
happens to like. In the *reward*, its estimator has to be k1 = log π/π_ref: as a reward, k1 follows
exactly the gradient of KL(π ‖ π_ref), while k3 (see grpo.py) may point almost the opposite way. In
a *loss* it is the other way round: there the gradient of k1 is 0 on average.

Worked example: an answer of three tokens with score 1, β = 0.05, γ = 1, λ = 0.95.

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

The learning rate, 1e-5, is that of published PPO runs which train all weights (1e-6 to 1e-5); LoRA
usually takes several times as much, so that a higher one is worth a try on a large model.

What to watch: the reward rises, kl rises slowly and stays below ten nats per answer, the critic's
explained_variance rises towards 1, and clip_fraction stays below 0.2. If reward and kl rise
together while the samples get worse, the policy exploits mistakes of its reward model. This is
called reward hacking or over-optimization. A larger --beta, fewer steps or a better reward model
prevent it.

Try `--target-kl 0.1` on the tiny model: no epoch is cut short any more (updates is 8 in all 25
rollouts; by default it is 6 in two of them). The policy ends further from the reference, kl 0.51
instead of 0.45 by evaluate.py, and no more accurate, 0.948 instead of 0.953.

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
        help="correct_answer, FILE.py:function, or the folder of a run of reward_model.py")
    add("--dataset", default="openai/gsm8k:main", help="prompts: Hub name[:config] or local file")
    add("--split", default="train", help="split of a Hub dataset")
    add("--columns", **common.COLUMNS)
    add("--chat-template", help="file with a chat template that replaces the model's own")
    add("--template-arguments", **common.VARIABLES, help="variables that the chat template reads")
    add("--eval-dataset", help="held-out prompts; without it, some of --dataset are held out")
    add("--eval-size", type=common.count, default=64, help="number of held-out prompts")
    add("--beta", type=common.weight, default=0.05, help="KL penalty strength, per token [1]")
    add("--missing-eos-penalty", type=common.weight, default=1.0, help="penalty for truncation [3]")
    add("--gamma", type=common.share, default=1.0, help="discount factor per token")
    add("--lam", type=common.share, default=0.95, help="λ of GAE: 1 is noisy, 0 trusts the critic")
    add("--epsilon", type=common.positive, default=0.2, help="clip range of ratio and value [6]")
    add("--value-weight", type=common.weight, default=0.5,
        help="weight of the critic loss; 0 freezes the critic. Policy and critic share no trained\n"
             "weight, and Adam cancels a constant factor, so a weight above 0 matters only\n"
             "through the gradient clipping that both share")
    add("--epochs", type=common.count, default=4, help="passes over one rollout at most [7]")
    add("--target-kl", type=common.positive, default=0.02,
        help="KL(π_old ‖ π) in nats per token: an epoch that exceeds it is the rollout's last [8]")
    add("--batch-size", type=common.count, default=64, help="answers per rollout")
    add("--minibatches", type=common.count, default=4, help="optimizer steps per epoch")
    add("--micro-batch-size", type=common.count, default=2, help="answers per forward pass")
    add("--sample-batch-size", type=common.count, default=128, help="answers sampled at a time")
    add("--temperature", type=common.positive, default=1.0, help="sampling temperature [9]")
    add("--max-length", type=common.count, default=768, help="longest prompt + answer, in tokens")
    add("--max-new-tokens", type=common.count, default=256, help="longest answer, in tokens")
    add("--learning-rate", type=common.positive, default=1e-5,
        help="peak learning rate (linear warm-up over 10%% of the steps, then cosine decay)")
    add("--max-steps", type=common.count, default=200, help="number of rollouts")
    add("--lora-rank", **common.LORA_RANK, type=common.count)
    add("--load-in-4bit", **common.ON_GPU, help="4-bit quantization of the frozen base")
    add("--gradient-checkpointing", **common.ON_GPU, help="recomputed activations, to save memory")
    add("--save-every", type=common.count, default=10, help="rollouts between two checkpoints")
    add("--seed", type=common.natural, default=0, help="seed of data order, LoRA and samples")
    add("--output-dir", default="runs/ppo", help="run folder; the same command resumes a run")
    return parser


# At β = 0.05, the policy exploits a gap in the tiny reward model: correct sums that answer another
# question than the one asked.
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


def token_values(model, batch, head):
    """[B, T-1]: column t is the critic's V before token t+1 where the loss mask is 1, else 0."""
    # Only the L columns that are not padding in every row are computed.
    used = batch["attention_mask"].any(0)  # [T]
    inputs = {name: batch[name][:, used] for name in ("input_ids", "attention_mask")}  # [B, L]
    hidden = common.causal_lm(model).base_model(**inputs, use_cache=False)[0]  # [B, L, D]
    values = (hidden[:, :-1].float() * head.weight).sum(-1)  # [B, L-1]
    padding = int((~used).sum())
    return F.pad(values, (0, padding)) * batch["loss_mask"][:, 1:]  # [B, T-1]


def token_rewards(scores, logps, ref_logps, mask, beta):
    """Rewards [B, T-1]: a KL penalty at each token [1], and the score [B] at the last one [2]."""
    # This is k1 on purpose: the policy gradient of k1 is that of the KL, and that of k3 is not.
    rewards = -beta * (logps - ref_logps) * mask  # [B, T-1]
    # An answer's last token is in the last column in which its mask is 1.
    columns = torch.arange(mask.shape[1], device=mask.device)  # [T-1]
    last = (mask * columns).argmax(1)  # [B]
    rewards[torch.arange(len(last)), last] += scores
    return rewards


def gae(rewards, values, mask, gamma, lam):
    """Advantages and returns, [B, T-1] each (GAE, eq. 16), from the last token to the first."""
    advantages = torch.zeros_like(rewards)
    # Nothing follows the last token, so V and A are 0 there. An answer that --max-new-tokens cut
    # off counts as ended as well: there is no bootstrap from the critic.
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
    # The minimum takes away what going further would gain, and never the way back.
    return -torch.min(unclipped, clipped), clipped < unclipped


def value_loss(values, old_values, returns, epsilon):
    """Half the squared error of each value, or of the clipped value if larger [6]: [B, T-1]."""
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


# ---- rewards: functions and reward models --------------------------------------------------------

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
    # A reward model is one more adapter on the base of the policy, and a head.
    head = common.add_role(model, name, "reward")
    return functools.partial(scores_of_model, name, head)


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


def scores_of_function(name, function, model, batch, examples, texts, args):
    """Scores [B] by a function of rows and texts; NaN where it returns None: it does not apply."""
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
    """One answer per prompt: a batch, [B, ...] each, with the outputs of all roles; and the ids."""
    model, reward, critic_head = roles
    prompts = [example["prompt"] for example in examples]
    answers = []
    for i in range(0, len(prompts), args.sample_batch_size):
        some = prompts[i:i + args.sample_batch_size]
        with common.autocast(model):
            answers += sample(model, tokenizer, some, 1, args, seed + i)
    texts = tokenizer.batch_decode(answers, skip_special_tokens=True)
    batch = join_answers(prompts, answers, tokenizer, model)
    # Policy, reference, critic and reward model read the sampled ids, never a text made of them.
    batch["logps"] = in_parts(token_logps, model, batch, args.temperature, args)  # [B, T-1]
    with common.reference(model):
        batch["ref_logps"] = in_parts(token_logps, model, batch, args.temperature, args)
    with common.using(model, "critic"):
        batch["values"] = in_parts(token_values, model, batch, critic_head, args)  # [B, T-1]
    batch["scores"] = reward(model, batch, examples, texts, args)
    if batch["scores"].isnan().any():
        common.fail(f"the reward {args.reward} returns None: each answer needs a number here")
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
    """Means over the answers of all processes; kl is KL(π ‖ π_ref) in nats per answer."""
    kl = (batch["logps"] - batch["ref_logps"]).sum(1)  # [B]
    return {"reward": mean(batch["scores"]), "kl": mean(kl),
            "length": mean(batch["loss_mask"].sum(1)), "stopped": mean(batch["stopped"])}


def evaluate(roles, held_out, tokenizer, args):
    """The same prompts and random numbers each time, so that before and after can be compared."""
    batch, _ = rollout(roles, held_out, tokenizer, args, args.seed)
    return describe(batch)


def local_rows(indices):
    """Which rows of this process hold the answers `indices` of the whole rollout.

    Answer i of the rollout is row i // WORLD of process i % WORLD. With one process, RANK is 0 and
    WORLD is 1, so that this changes nothing.
    """
    return indices[indices % common.WORLD == common.RANK] // common.WORLD


def minibatch_gradients(roles, batch, rows, scaler, args):
    """Accumulates the gradients of policy and critic over these rows of all processes.

    Returns {name: mean over their tokens} of the FIGURES.
    """
    model, _, critic_head = roles
    # Each token counts 1 / tokens, whichever micro-batch or process it is in.
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
        # The critic stays on in the backward pass, where checkpointing repeats the forward pass.
        with common.using(model, "critic"):
            with common.autocast(model):
                values = token_values(model, micro, critic_head)  # [b, T-1]
            value_losses = value_loss(values, micro["values"], micro["returns"], args.epsilon)
            scaler.scale(args.value_weight * (value_losses * mask).sum() / tokens).backward()
        log_ratio = logps - micro["logps"]
        error = log_ratio.exp() - 1
        # The samples are those of π_old, so the mean of this k3 is KL(π_old ‖ π).
        k3 = error - log_ratio
        figures = {"policy_loss": policy_losses, "value_loss": value_losses, "sampler_kl": k3,
                   "clip_fraction": is_clipped, "entropy": -logps, "ratio_error": error.abs()}
        add_up(sums, {name: x * mask for name, x in figures.items()})
    totals = over_processes(sums, FIGURES, model.device)
    return {name: total / tokens.item() for name, total in totals.items()}


def some_samples(tokenizer, step, examples, answers, scores):
    """Up to four prompts with their sampled answers and scores, as text for the report."""
    samples = []
    for example, answer, score in zip(examples[:4], answers, scores.tolist(), strict=False):
        samples.append({"step": step, "prompt": common.shown_text(tokenizer, example["prompt"]),
                        "answer": common.shown_text(tokenizer, answer), "score": score})
    return samples


def train(args):
    # 1. Check the reward and load the prompts first: errors there show before the model is loaded.
    check_reward(args.reward, args.model)
    if args.batch_size < max(args.minibatches, common.WORLD):
        common.fail("--batch-size must not be below --minibatches or the number of processes")
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
        # 4. Sample an answer to each prompt of this process; all roles read the answers.
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
        # A = R − V is the part of the returns that the critic did not explain.
        _, unexplained = moments(advantages, mask)
        _, variance = moments(returns, mask)
        metrics["explained_variance"] = 1 - unexplained / (variance + 1e-8)

        # 6. Take several epochs over these answers, with an optimizer step per minibatch [7].
        lr = learning_rate(step, args.max_steps, args.learning_rate)
        figures = []
        for epoch in range(args.epochs):
            generator.manual_seed(args.seed + step * args.epochs + epoch)
            shuffled = torch.randperm(args.batch_size, generator=generator)
            for minibatch in shuffled.tensor_split(args.minibatches):
                rows = local_rows(minibatch)
                figures.append(minibatch_gradients(roles, batch, rows, scaler, args))
                updated = update(optimizer, scaler, lr)
            # Early stopping: samples of π_old say little about a π that is far from it [8].
            epoch_kl = [x["sampler_kl"] for x in figures[-args.minibatches:]]
            if sum(epoch_kl) / len(epoch_kl) > args.target_kl:
                break

        # 7. Log the means over all updates, print some answers, and save a checkpoint.
        for name in FIGURES:
            metrics[name] = sum(x[name] for x in figures) / len(figures)
        # In the first update, π still is π_old, so the ratio differs from 1 by rounding alone.
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
    # Clipping limits the norm of the whole gradient, all weights taken as one vector, to 1.
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
    """Replaces each tensor by its sum over all processes. One process changes nothing."""
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
        # The lock ends with the process, however the process ends. Its file may stay.
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
    print(f"\n{'held out':<16}{'before':>9}{'after':>9}")
    for name, value in after.items():
        print(f"{common.visible(name):<16}{state['before'][name]:9.3f}{value:9.3f}")


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
