"""PPO for language models (Schulman et al. 2017, arXiv:1707.06347; Ouyang et al. 2022, 2203.02155).

The policy π answers prompts, the answers are scored, and tokens that did better than the critic V
expected become likelier. Each token y_t is an action. Four roles share one frozen base: policy and
critic (with LoRA matrices that are trained), reward model (its own) and reference (π at the start).

    r_t = −β log(π(y_t) / π_ref(y_t)),  and the score of the answer on top at its last token
    δ_t = r_t + γ V_{t+1} − V_t,   A_t = Σ_l (γλ)^l δ_{t+l},   R_t = A_t + V_t        GAE, eq. 16
    policy loss = −E min[ρ_t A_t, clip(ρ_t, 1 − ε, 1 + ε) A_t]                        PPO, eq. 7
    critic loss = ½ E max[(V_t − R_t)², (clip(V_t, V_old − ε, V_old + ε) − R_t)²]

V_t: what the critic expects of the rewards from y_t on. A_t, the advantage: how far y_t beat that.
R_t, the return: what V_t should have been. Both use V_old, the V of sampling time (generalized
advantage estimation, 1506.02438: λ = 1 trusts the rewards, λ = 0 the next V). The clip of ρ_t =
π(y_t) / π_old(y_t) makes several updates on a rollout safe. Dropped: PPO's entropy bonus (eq. 9),
Ziegler's adaptive β and whitened rewards. What makes it work on language models:

    [1] each token pays β log π/π_ref (Ziegler et al. 2019, 1909.08593; their eq. 2 is per answer)
    [2] the score comes at the last token (Ziegler et al.'s code)
    [3] an unended answer loses score (in Huang et al. 2024, 2403.17031, it gets a fixed low one)
    [4] the critic starts as a copy of the reward model, if any (Ouyang et al. 2022, appendix C.4)
    [5] advantages get mean 0 and variance 1 over the tokens of a rollout (Huang et al. 2024)
    [6] the value loss is clipped (Ziegler et al.'s code)
    [7] several epochs of minibatches on the same samples (PPO, algorithm 1)
    [8] the epochs end once the policy is --target-kl away from the sampler (Dossa et al. 2021)
    [9] sampling and scoring use the same temperature and no dropout: the samples are those of π_old

    python ppo.py                                              # the tiny model, three minutes
    python ppo.py --model runs/sft --reward runs/sft-reward    # both on one base
    python ppo.py --model Qwen/Qwen2.5-0.5B-Instruct           # GSM8K, scored by the last number

What to watch: reward up, kl up slowly and below ten nats, explained variance towards 1, clip
fraction below 0.2. If the reward rises with the kl while samples get odd, raise --beta.

Shapes: B answers (b in a micro-batch), T tokens, N of them answer tokens, width D, vocabulary V.
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
add("--reward", default="correct_answer", help="or FILE.py:function, or a run of reward_model.py")
add("--dataset", default="openai/gsm8k:main", help="prompts: Hub name or local file")
add("--split", default="train", help="of a Hub dataset")
add("--columns", **common.COLUMNS, help="other names of columns: prompt=query completion=reply")
add("--chat-template", help="file with a chat template, in place of the model's own")
add("--template-arguments", **common.VARIABLES, help="variables that the chat template reads")
add("--eval-dataset", help="held-out prompts, else some of --dataset")
add("--eval-size", type=common.count, default=64, help="held-out prompts")
add("--beta", type=common.weight, default=0.05, help="of the KL penalty [1]")
add("--missing-eos-penalty", type=common.weight, default=1.0, help="score lost by not ending [3]")
add("--gamma", type=common.share, default=1.0, help="discount")
add("--lam", type=common.share, default=0.95, help="λ of the advantages")
add("--epsilon", type=common.positive, default=0.2, help="clip range of ratio and value [6]")
add("--value-weight", type=common.weight, default=0.5, help="of the critic loss")
add("--epochs", type=common.count, default=4, help="passes over the same samples, at most [7]")
add("--target-kl", type=common.positive, default=0.1, help="KL that ends them, nats per token [8]")
add("--batch-size", type=common.count, default=64, help="answers in a rollout")
add("--minibatches", type=common.count, default=4, help="optimizer steps in an epoch")
add("--micro-batch-size", type=common.count, default=2, help="answers in a forward pass")
add("--sample-batch-size", type=common.count, default=128, help="answers sampled at a time")
add("--temperature", type=common.positive, default=1.0, help="of sampling and scoring [9]")
add("--max-length", type=common.count, default=768, help="longest prompt + answer, in tokens")
add("--max-new-tokens", type=common.count, default=256, help="longest answer")
add("--learning-rate", type=common.positive, default=1e-5, help="the highest: it rises, then falls")
add("--max-steps", type=common.count, default=200, help="rollouts")
add("--lora-rank", **common.LORA_RANK, type=common.count)
add("--load-in-4bit", **common.ON_GPU, help="quantise the frozen base")
add("--gradient-checkpointing", **common.ON_GPU, help="compute activations twice, keep fewer")
add("--save-every", type=common.count, default=10, help="rollouts between savings, samples shown")
add("--seed", type=common.natural, default=0)
add("--track", choices=["wandb", "trackio"], help="also send the metrics there")
add("--output-dir", default="runs/ppo", help="the same command again goes on where it stopped")
# at β = 0.05 the tiny model finds what its reward model overlooks: right sums that nobody asked for
TINY = dict(dataset="tiny/data/prompt_train.jsonl", eval_dataset="tiny/data/prompt_heldout.jsonl",
            reward="tiny/reward", beta=0.5, batch_size=128, minibatches=2, micro_batch_size=64,
            max_new_tokens=24, learning_rate=5e-4, max_steps=25)
FIGURES = ("policy_loss", "value_loss", "sampler_kl", "clip_fraction", "entropy", "ratio_error")


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


def token_values(model, batch, head):
    """[B, T-1]: column t is the critic's V before token t+1 where the loss mask is 1, else 0."""
    used = batch["attention_mask"].any(0)  # [T]: the L columns that are not padding in every row
    inputs = {name: batch[name][:, used] for name in ("input_ids", "attention_mask")}  # [B, L]
    hidden = common.causal_lm(model).base_model(**inputs, use_cache=False)[0]  # [B, L, D]
    values = (hidden[:, :-1].float() * head.weight).sum(-1)  # [B, L-1]
    return F.pad(values, (0, int((~used).sum()))) * batch["loss_mask"][:, 1:]


def token_rewards(scores, logps, ref_logps, mask, beta):
    """Rewards [B, T-1]: the KL penalty at each token [1], the score [B] at the last one [2]."""
    # log π/π_ref is k1 of joschu.net/blog/kl-approx.html; as a reward, k3 has another gradient
    rewards = -beta * (logps - ref_logps) * mask
    last = (mask * torch.arange(mask.shape[1], device=mask.device)).argmax(1)  # [B]: its last 1
    rewards[torch.arange(len(last)), last] += scores
    return rewards


def gae(rewards, values, mask, gamma, lam):
    """Advantages and returns, [B, T-1] each, from the last token to the first."""
    advantages = torch.zeros_like(rewards)
    next_value = next_advantage = torch.zeros_like(rewards[:, 0])  # [B]: nothing follows the last
    for t in reversed(range(rewards.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        advantages[:, t] = (delta + gamma * lam * next_advantage) * mask[:, t]
        next_value = values[:, t] * mask[:, t]
        next_advantage = advantages[:, t]
    return advantages, advantages + values


def whiten(x, mask):
    """x [B, T-1] with mean 0 and variance 1 over the answers' tokens of all processes [5]."""
    center, variance = moments(x, mask)
    return (x - center) * mask / math.sqrt(max(variance, 0) + 1e-8)


def policy_loss(logps, old_logps, advantages, epsilon):
    """PPO eq. 7 for each token, and where the clip binds, [B, T-1] each."""
    ratio = (logps - old_logps).exp()
    free = ratio * advantages
    bound = ratio.clamp(1 - epsilon, 1 + epsilon) * advantages
    # min: the clip takes away what going further would gain, and never the way back
    return -torch.min(free, bound), bound < free


def value_loss(values, old_values, returns, epsilon):
    """Half the squared error of each value [B, T-1], or that of the clipped one if larger [6]."""
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

def rollout(roles, examples, tokenizer, args, seed):
    """Answers of the policy as ids, and what all roles say of them: a batch, [B, ...] each."""
    model, scorer, critic_head = roles
    prompts = [example["prompt"] for example in examples]
    answers = []
    for i in range(0, len(prompts), args.sample_batch_size):
        part = prompts[i:i + args.sample_batch_size]
        with common.autocast(model):
            answers += sample(model, tokenizer, part, 1, args, seed + i)
    texts = tokenizer.batch_decode(answers, skip_special_tokens=True)
    batch = join_answers(prompts, answers, tokenizer, model)
    batch["logps"] = in_parts(token_logps, model, batch, args.temperature, args)  # [B, T-1]
    with common.reference(model):
        batch["ref_logps"] = in_parts(token_logps, model, batch, args.temperature, args)
    with common.using(model, "critic"):
        batch["values"] = in_parts(token_values, model, batch, critic_head, args)  # [B, T-1]
    batch["scores"] = score_answers(scorer, args.reward, model, batch, examples, texts, args)
    if batch["scores"].isnan().any():
        common.fail(f"the reward {args.reward} returns None: each answer needs a number here")
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


def describe(batch):
    """Means over the answers of all processes; kl is that to the reference, in nats per answer."""
    kl = (batch["logps"] - batch["ref_logps"]).sum(1)  # [B]
    return {"reward": mean(batch["scores"]), "kl": mean(kl),
            "length": mean(batch["loss_mask"].sum(1)), "stopped": mean(batch["stopped"])}


def minibatch_gradients(roles, batch, rows, scaler, args):
    """Adds up the gradients of policy and critic on these rows; returns the FIGURES in order."""
    model, _, critic_head = roles
    tokens = batch["loss_mask"][rows].sum()
    sum_over_processes([tokens])  # each counts 1 / tokens, whatever micro-batch it is in
    sums = torch.zeros(len(FIGURES), dtype=torch.float64, device=model.device)
    for i in range(0, len(rows), args.micro_batch_size):
        micro = {name: x[rows[i:i + args.micro_batch_size]] for name, x in batch.items()}
        mask = micro["loss_mask"][:, 1:]  # [b, T-1]
        with common.autocast(model):
            logps = token_logps(model, micro, args.temperature)  # [b, T-1]
        policy, clipped = policy_loss(logps, micro["logps"], micro["advantages"], args.epsilon)
        scaler.scale((policy * mask).sum() / tokens).backward()
        with common.using(model, "critic"):  # also in backward: checkpointing runs forward again
            with common.autocast(model):
                values = token_values(model, micro, critic_head)  # [b, T-1]
            value = value_loss(values, micro["values"], micro["returns"], args.epsilon)
            scaler.scale(args.value_weight * (value * mask).sum() / tokens).backward()
        log_ratio = logps - micro["logps"]
        error = log_ratio.exp() - 1
        k3 = error - log_ratio  # never negative, its mean is KL(π_old ‖ π)
        per_token = torch.stack([policy, value, k3, clipped.float(), -logps, error.abs()])
        sums += (per_token * mask).sum((1, 2)).detach() / tokens
    sum_over_processes([sums])
    return sums


def some_samples(tokenizer, step, examples, answers, scores):
    """A few prompts, what the policy answers, and what that is worth."""
    some = list(zip(examples, answers, scores.tolist(), strict=False))[:4]
    return [{"step": step, "prompt": common.visible(tokenizer.decode(example["prompt"])),
             "answer": common.visible(tokenizer.decode(answer)), "score": score}
            for example, answer, score in some]


def train(args):
    # 1. Prompts to learn from and others to be tested on, and what scores the answers
    scorer = load_reward(args.reward, args.model)
    if args.batch_size < max(args.minibatches, common.WORLD):
        common.fail("--batch-size must not be below --minibatches or the number of processes")
    tokenizer = common.load_tokenizer(args.model, args.chat_template, args.template_arguments)
    encode = functools.partial(encode_row, max_new_tokens=args.max_new_tokens,
                               needs_answer=args.reward == "correct_answer")
    wanted = args.max_steps * args.batch_size
    examples, held_out = common.load_examples(args, encode, tokenizer, wanted)

    # 2. One base, four roles: policy, reference, critic [4], reward (a function or an adapter)
    torch.manual_seed(args.seed)
    model = common.load_model(
        args.model, args.load_in_4bit, args.lora_rank, args.gradient_checkpointing)
    critic_head = common.add_role(model, None if scorer else args.reward, "critic", trainable=True)
    scorer = scorer or common.add_role(model, args.reward, "reward")
    roles = model, scorer, critic_head
    weights = {name: p for name, p in model.named_parameters() if p.requires_grad}
    weights["critic_head"] = critic_head.weight
    # `update` sets the learning rate.
    optimizer = torch.optim.AdamW(weights.values(), weight_decay=0.0)
    scaler = common.grad_scaler(model)  # for fp16 (a T4), where small gradients round to 0
    print(common.settings(model))

    # 3. Where the run stands: at its start, or where it was interrupted
    open_run(args, [examples, held_out])
    state = restore(args, weights, optimizer, scaler)
    if "before" not in state:
        state["before"] = describe(rollout(roles, held_out, tokenizer, args, args.seed)[0])
    # prompts and random numbers follow from seed and step, so that a run that goes on sees the same
    generator = torch.Generator().manual_seed(args.seed)
    passes = range(math.ceil(wanted / len(examples)))
    order = torch.cat([torch.randperm(len(examples), generator=generator) for _ in passes])
    progress = tqdm(range(state["step"] + 1, args.max_steps + 1), initial=state["step"],
                    total=args.max_steps, disable=common.RANK > 0)
    for step in progress:
        # 4. The policy answers the prompts of this process, and all roles read the answers
        began = time.time()
        picked = order[(step - 1) * args.batch_size:step * args.batch_size]
        mine = [examples[i] for i in picked[common.RANK::common.WORLD]]
        seed = args.seed + 10**6 * (step * common.WORLD + common.RANK)
        batch, answers = rollout(roles, mine, tokenizer, args, seed)
        metrics = {"step": step, **describe(batch), "rollout_seconds": time.time() - began}
        mask = batch["loss_mask"][:, 1:]  # [B, T-1]

        # 5. Rewards of the tokens, and how much better than the critic expected each of them was
        penalised = batch["scores"] - args.missing_eos_penalty * ~batch["stopped"]  # [B], [3]
        rewards = token_rewards(penalised, batch["logps"], batch["ref_logps"], mask, args.beta)
        advantages, returns = gae(rewards, batch["values"], mask, args.gamma, args.lam)
        unexplained = moments(advantages, mask)[1] / (moments(returns, mask)[1] + 1e-8)  # A = R−V
        batch |= {"advantages": whiten(advantages, mask), "returns": returns}

        # 6. Epochs of minibatches on these samples, an optimizer step for each [7]
        lr = learning_rate(step, args.max_steps, args.learning_rate)
        figures = []
        for epoch in range(args.epochs):
            generator.manual_seed(args.seed + step * args.epochs + epoch)
            shuffled = torch.randperm(args.batch_size, generator=generator)
            for minibatch in shuffled.tensor_split(args.minibatches):
                # answer i of the batch is row i // WORLD of process i % WORLD
                rows = minibatch[minibatch % common.WORLD == common.RANK] // common.WORLD
                figures.append(minibatch_gradients(roles, batch, rows, scaler, args))
                updated = update(optimizer, scaler, lr)
            epoch_figures = torch.stack(figures[-args.minibatches:]).mean(0)
            if epoch_figures[FIGURES.index("sampler_kl")] > args.target_kl:  # [8]
                break

        # 7. Log, show some answers, and save what is needed to go on
        metrics |= dict(zip(FIGURES, torch.stack(figures).mean(0).tolist(), strict=True))
        metrics["ratio_error"] = figures[0][-1].item()  # of the first update, where π is π_old
        metrics |= {"explained_variance": 1 - unexplained, "updates": len(figures), **updated}
        progress.set_postfix(reward=metrics["reward"], kl=metrics["kl"], refresh=False)
        log_step(args, state, metrics | {"seconds": time.time() - began})
        if step % args.save_every == 0 or step in (1, args.max_steps):
            state["samples"] += some_samples(tokenizer, step, mine, answers, batch["scores"])
            save(args, state, weights, optimizer, scaler)
            for sample in state["samples"][-4:]:  # the answers in green
                tqdm.write("{prompt}\033[32m{answer}\033[0m\nscore {score:.2f}\n".format(**sample))

    # 8. The same held-out prompts and random numbers once more; the policy's adapter is saved
    after = describe(rollout(roles, held_out, tokenizer, args, args.seed)[0])
    finish(args, state, model, tokenizer, after)


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
        train(common.parse(flags, TINY))
