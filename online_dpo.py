"""Online DPO (Guo et al. 2024, arXiv:2402.04792), with XPO and Nash-MD, which sample otherwise.

dpo.py learns from pairs that others wrote. Here each step has two new answers to every prompt x: y
from the policy π and y', token by token, from π^(1−m) π_ref^m / Z, where π_ref is π at the start.
--reward scores both: the better is y_w, the other y_l. With r(x, y) = β log[π(y|x) / π_ref(y|x)]:

    dpo      m = 0  −log σ(h), with the margin h = r(x, y_w) − r(x, y_l)
    ipo      m = 0  ( h/β − 1/(2β) )²: a target for h           Azar et al. 2023, 2310.12036, eq. 17
    xpo      m = 1  −log σ(h) + α log π(y'|x): unlearn y'               Xie et al. 2024, 2405.21046
    nash_md  m = ⅛  −( P(y ≻ y') − ½ − r(x, y) ) log π(y|x)           Munos et al. 2023, 2312.00886

P(y ≻ y') is σ of the difference of scores; no gradient flows through the bracket; m is --mixture.
Equal scores: no pair, loss 0, but for nash_md. As in DPO: the reference, the loss. New: the pairs.

    python online_dpo.py                                      # the tiny model, two minutes
    python online_dpo.py --model Qwen/Qwen2.5-0.5B-Instruct   # GSM8K in 4 bits on a 16 GB T4

What to watch: reward and margin rise, kl slowly. Many ties: the prompts are too easy or too hard.
Shapes: P prompts, B = 2P answers (all y, then all y') of T tokens, N scored; width D, vocabulary V.
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
add("--eval-size", type=common.count, default=64, help="held-out prompts, all sampled at once")
add("--loss", choices=["dpo", "ipo", "xpo", "nash_md"], default="dpo")
add("--beta", type=common.positive, default=0.1, help="price of leaving the reference; Nash-MD's τ")
add("--alpha", type=common.weight, default=1e-5, help="xpo: how much to explore")
add("--mixture", type=common.share, default=0.0, help="m, the part of π_ref in y'; Nash-MD's β")
add("--preference", choices=["sigmoid", "hard"], default="sigmoid", help="nash_md; hard: 1, ½ or 0")
add("--missing-eos-penalty", type=common.weight, default=1.0, help="score lost by not ending")
add("--batch-size", type=common.number(int, common.WORLD), default=32, help="prompts per step")
add("--micro-batch-size", type=common.count, default=2, help="pairs at a time; scoring: answers")
add("--temperature", type=common.positive, default=1.0, help="of sampling and scoring")
add("--max-length", type=common.count, default=1024, help="longest prompt + answer, in tokens")
add("--max-new-tokens", type=common.count, default=512, help="longest answer")
add("--learning-rate", type=common.positive, default=2e-5, help="the highest: it rises, then falls")
add("--max-steps", type=common.count, default=250, help="optimizer steps")
add("--lora-rank", **common.LORA_RANK, type=common.count)
add("--load-in-4bit", **common.ON_GPU, help="quantise the frozen base")
add("--gradient-checkpointing", **common.ON_GPU, help="compute activations twice, keep fewer")
add("--save-every", type=common.count, default=20, help="steps between savings, samples shown")
add("--seed", type=common.natural, default=0)
add("--track", choices=["wandb", "trackio"], help="also send the metrics there")
add("--output-dir", default="runs/online_dpo", help="the same command goes on where it stopped")
BY_LOSS = {"xpo": dict(mixture=1.0), "nash_md": dict(mixture=0.125)}  # as in their papers
TINY = dict(dataset="tiny/data/prompt_train.jsonl", eval_dataset="tiny/data/prompt_heldout.jsonl",
            batch_size=64, micro_batch_size=64, max_new_tokens=24, learning_rate=1e-3, max_steps=60)


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


def online_loss(logps, ref_logps, wins, loss, beta, alpha):
    """Losses [P] of log π, log π_ref and wins, the chance to beat the other: [2P], y before y'."""
    implicit, other = (beta * (logps - ref_logps)).chunk(2)  # [P]: r(x, y) and r(x, y')
    lead = wins.chunk(2)[0] - 0.5  # [P]: above 0 where y is better
    margin = lead.sign() * (implicit - other)  # [P]: r(x, y_w) − r(x, y_l)
    if loss == "dpo":
        losses = -F.logsigmoid(margin)  # [P]
    elif loss == "ipo":
        losses = (margin / beta - 1 / (2 * beta)) ** 2
    elif loss == "xpo":
        losses = -F.logsigmoid(margin) + alpha * logps.chunk(2)[1]
    elif loss == "nash_md":
        return -(lead - implicit).detach() * logps.chunk(2)[0]  # its value means nothing
    return losses * (lead != 0)  # equal scores: no pair, and (unlike the paper) no α term of xpo


# ---- sampling ------------------------------------------------------------------------------------

@torch.no_grad()
def sample_mixture(model, tokenizer, prompts, m, args, seed):
    """An answer to each of P prompts, as ids; token by token from exactly π^(1−m) π_ref^m / Z."""
    model.eval()  # in train mode gradient checkpointing would silently drop the cache
    causal = common.causal_lm(model)
    generator = torch.Generator(causal.device).manual_seed(seed)
    stop_ids = common.stop_token_ids(tokenizer, model.generation_config)
    batch = tokenizer.pad({"input_ids": prompts}, padding_side="left", return_tensors="pt")
    token, mask = batch["input_ids"].to(causal.device), batch["attention_mask"].to(causal.device)
    caches = [None, None]  # of π and of π_ref
    alive = answers = [[] for _ in prompts]  # alive: the same lists, but for those that ended
    for _ in range(args.max_new_tokens):
        mixed = 0  # becomes [alive, V]
        roles = common.using(model, "default"), common.reference(model)  # π, π_ref: new contexts
        for i, (role, weight) in enumerate(zip(roles, (1 - m, m), strict=True)):
            if weight > 0:
                with role:
                    logits, caches[i] = common.read(causal, token, mask, caches[i])  # [alive, V]
                mixed = mixed + weight * (logits.float() / args.temperature).log_softmax(-1)
        token = torch.multinomial(mixed.softmax(-1), 1, generator=generator)  # [alive, 1]
        for answer, new in zip(alive, token[:, 0].tolist(), strict=True):
            answer.append(new)
        going = [i for i, answer in enumerate(alive) if answer[-1] not in stop_ids]
        if not going:
            break
        alive, token = [alive[i] for i in going], token[going]  # what has ended leaves the batch
        mask = F.pad(mask[going], (0, 1), value=1)
        for cache in caches:
            if cache is not None:
                cache.reorder_cache(torch.tensor(going, device=causal.device))
    model.train()
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

def rollout(model, scorer, examples, tokenizer, args, seed):
    """Answers y to all prompts, then all y', and what is said of them, no gradients: [2P, ...]."""
    prompts = [example["prompt"] for example in examples]
    with common.autocast(model):
        answers = sample_mixture(model, tokenizer, prompts, 0, args, seed)
        answers += sample_mixture(model, tokenizer, prompts, args.mixture, args, seed + 1)
    texts = tokenizer.batch_decode(answers, skip_special_tokens=True)
    batch = join_answers(prompts * 2, answers, tokenizer, model)
    batch["scores"] = score_answers(scorer, args.reward, model, batch, examples * 2, texts, args)
    if batch["scores"].isnan().any():
        common.fail(f"the reward {args.reward} returns None: each answer needs a number here")
    penalised = batch["scores"] - args.missing_eos_penalty * ~batch["stopped"]  # [2P]
    gap = (penalised - penalised.roll(len(prompts))).double()  # fp32 would round its σ to ½
    batch["wins"] = gap.sigmoid() if args.preference == "sigmoid" else 0.5 + 0.5 * gap.sign()
    batch["logps"] = in_parts(token_logps, model, batch, args.temperature, args).sum(1)
    with common.reference(model):
        batch["ref_logps"] = in_parts(token_logps, model, batch, args.temperature, args).sum(1)
    return batch


@torch.no_grad()
def in_parts(function, model, batch, argument, args):
    """function(model, batch, argument), a micro-batch at a time."""
    parts = []
    with common.autocast(model):
        for rows in torch.arange(len(batch["input_ids"])).split(args.micro_batch_size):
            micro = {name: value[rows] for name, value in batch.items()}
            parts.append(function(model, micro, argument))
    return torch.cat(parts)


def describe(batch, args):
    """Means over all y, which π alone sampled, and over the pairs (0 without any); kl in nats."""
    wins, log_ratios = batch["wins"], batch["logps"] - batch["ref_logps"]  # [2P]
    implicit = args.beta * log_ratios  # [2P]: r(x, y), r(x, y')
    margin = implicit - implicit.roll(len(wins) // 2)  # over the other answer to the prompt
    losses = online_loss(batch["logps"], batch["ref_logps"], wins, args.loss, args.beta, args.alpha)
    y, won = slice(len(wins) // 2), wins > 0.5
    figures = {"reward": batch["scores"][y], "stopped": batch["stopped"][y], "kl": log_ratios[y],
               "length": batch["loss_mask"].sum(1)[y], "ties": wins[y] == 0.5, "loss": losses,
               "preference": wins[y], "margin": margin[won], "chosen_reward": implicit[won],
               "accuracy": (margin[won].sign() + 1) / 2, "rejected_reward": implicit[wins < 0.5]}
    sums = torch.tensor([[x.sum(), len(x)] for x in figures.values()], device=wins.device).double()
    sum_over_processes([sums])
    return dict(zip(figures, (sums[:, 0] / sums[:, 1].clamp(min=1)).tolist(), strict=True))


def train(args):
    # 1. Prompts to learn from and others to be tested on, and what scores the answers
    scorer = load_reward(args.reward, args.model)
    tokenizer = common.load_tokenizer(args.model, args.chat_template, args.template_arguments)
    encode = functools.partial(encode_row, max_new_tokens=args.max_new_tokens,
                               needs_answer=args.reward == "correct_answer")
    wanted = args.max_steps * args.batch_size
    examples, held_out = common.load_examples(args, encode, tokenizer, wanted)
    torch.manual_seed(args.seed)  # of the order, then of the LoRA matrices
    order = [torch.randperm(len(examples)) for _ in range(math.ceil(wanted / len(examples)))]
    batches = torch.cat(order).split(args.batch_size)
    # 2. A frozen base with LoRA matrices, which alone are trained
    model = common.load_model(
        args.model, args.load_in_4bit, args.lora_rank, args.gradient_checkpointing)
    scorer = scorer or common.add_role(model, args.reward, "reward")
    weights = {name: p for name, p in model.named_parameters() if p.requires_grad}
    # `update` sets the learning rate.
    optimizer = torch.optim.AdamW(weights.values(), weight_decay=0.0)
    scaler = common.grad_scaler(model)  # for fp16 (a T4), where small gradients round to 0
    print(common.settings(model))
    # 3. Where the run stands: at its start, or where it was interrupted
    open_run(args, [examples, held_out])
    state = restore(args, weights, optimizer, scaler)
    asked = model, scorer, held_out, tokenizer, args, args.seed
    state["before"] = state.get("before") or describe(rollout(*asked), args)
    progress = tqdm(range(state["step"] + 1, args.max_steps + 1), initial=state["step"],
                    total=args.max_steps, disable=common.RANK > 0)
    for step in progress:
        # 4. Two answers to each prompt of this process; all random numbers follow from the step
        began = time.time()
        mine = [examples[i] for i in batches[step - 1][common.RANK::common.WORLD]]
        seed = args.seed + 10**6 * (step * common.WORLD + common.RANK)
        batch = rollout(model, scorer, mine, tokenizer, args, seed)
        metrics = {"step": step, **describe(batch, args), "rollout_seconds": time.time() - began}
        # 5. Gradients of micro-batches and processes add up to that of the mean over all prompts
        for rows in torch.arange(2 * len(mine)).view(2, -1).split(args.micro_batch_size, dim=1):
            micro = {name: value[rows.flatten()] for name, value in batch.items()}  # y, then y'
            with common.autocast(model):
                logps = token_logps(model, micro, args.temperature).sum(1)  # [2p], with gradient
            losses = online_loss(
                logps, micro["ref_logps"], micro["wins"], args.loss, args.beta, args.alpha)  # [p]
            scaler.scale(losses.sum() / args.batch_size).backward()
        lr = learning_rate(step, args.max_steps, args.learning_rate)
        metrics |= update(optimizer, scaler, lr)
        # 6. Log, show an answer, and save what is needed to go on
        progress.set_postfix(reward=metrics["reward"], kl=metrics["kl"], refresh=False)
        log_step(args, state, metrics | {"seconds": time.time() - began})
        if step % args.save_every == 0 or step == args.max_steps:
            text = common.visible(tokenizer.decode(batch["input_ids"][0], skip_special_tokens=True))
            state["samples"] += [{"step": step, "text": text, "score": batch["scores"][0].item()}]
            save(args, state, weights, optimizer, scaler)
            print(f"\n{text}\nscore {batch['scores'][0]:.2f}")
    # 7. The same held-out prompts and random numbers once more; the adapter is saved
    finish(args, state, model, tokenizer, describe(rollout(*asked), args))


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
    with common.running("--micro-batch-size and --batch-size, then the lengths"):
        train(common.parse(flags, TINY, BY_LOSS))
