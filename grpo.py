"""GRPO: Group Relative Policy Optimization (Shao et al. 2024, DeepSeekMath, arXiv:2402.03300).

Learns from its own samples. For each prompt the model writes G completions, functions score them, and a completion is
reinforced as far as it beats the others of its group. With the group as the baseline no critic has to be learned (eqs. 3 and 4):

    A_i = (r_i − mean(r)) / std(r)          for every token of completion i
    J = E 1/G Σ_i 1/|o_i| Σ_t { min[ρ_t A_i, clip(ρ_t, 1 − ε, 1 + ε) A_i] − β KL_t },   ρ_t = π(o_t) / π_old(o_t)

KL_t is estimated by k3 = r − 1 − log r with r = π_ref/π, where k1 would be −log r (Schulman 2020, "Approximating KL divergence").
Kept from PPO: the clipped ratio. Dropped: the critic, GAE and the value loss; the KL moves from the reward into the loss.
`--loss` selects a relative (dr_grpo, dapo, gspo, cispo), `--baseline` what a reward is compared with (group, rloo, none).

    python grpo.py                                            # the embedded tiny model learns to answer right, about two minutes
    python grpo.py --model Qwen/Qwen2.5-0.5B-Instruct         # 4-bit LoRA on a 16 GB T4, DeepMath from the Hub
    python grpo.py --model runs/sft --reward my_rewards.py:shortness correct_answer --reward-weights 0.1 1
    python grpo.py --reward-model runs/reward_model           # a learned reward on the same base

Healthy curves: the reward rises, its spread within groups shrinks, KL (nats a token) and length grow slowly. The loss says nothing: with one
update a rollout it is β KL. If most groups have no spread, the prompts are too easy or too hard; if entropy collapses while the reward stalls, lower the rate.
"""
import importlib.util
import json
import math
import os
import re
import resource
import sys
import time
from dataclasses import asdict, dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import List, Literal, Optional

import common  # first, because it quiets what the others import
import datasets
import pyarrow.parquet
import torch
import torch.distributed as dist
from tqdm import tqdm
from transformers import DynamicCache, HfArgumentParser

OnOff = Literal["auto", "on", "off"]
FIGURES = ("loss", "kl", "entropy", "ratio", "clip_fraction")


def arg(default, help):
    return field(default=default, metadata={"help": help})


@dataclass
class Args:
    model: str = arg("tiny/chat", "Hub name, local folder or saved LoRA adapter to start from")
    dataset: Optional[str] = arg(None, "Hub name or .json, .jsonl or .parquet file with a prompt (default: tiny/data, other models trl-lib/DeepMath-103K)")
    split: str = arg("train", "split of a Hub dataset")
    eval_dataset: Optional[str] = arg(None, "held-out prompts, like --dataset (default: rows kept out of it)")
    eval_size: int = arg(64, "number of held-out prompts")
    reward: Optional[List[str]] = arg(None, "any of correct_answer, well_formed, concise, FILE.py:function (default: correct_answer; none with --reward-model)")
    reward_weights: Optional[List[float]] = arg(None, "a weight for each of --reward (default: all 1)")
    reward_model: Optional[str] = arg(None, "a run of reward_model.py on the same base: its score is added with weight 1")
    loss: Literal["grpo", "dr_grpo", "dapo", "gspo", "cispo"] = arg("grpo", "which policy loss; ratios and clips matter only with --updates above 1")
    baseline: Literal["group", "rloo", "none"] = arg("group", "what a reward is compared with: its group standardised, the others' mean, nothing")
    beta: Optional[float] = arg(None, "weight of the KL to the reference; 0 computes no reference (default: grpo and gspo 0.04, the others 0)")
    epsilon: float = arg(0.2, "how far below 1 the ratio counts (gspo: try 3e-4)")
    epsilon_high: Optional[float] = arg(None, "how far above 1 the ratio counts (default: epsilon; dapo 0.28, cispo 5)")
    updates: int = arg(1, "optimizer steps on the same samples")
    group_size: int = arg(8, "completions of a prompt, G")
    batch_size: Optional[int] = arg(None, "prompts in a step, over all GPUs (default: 8, tiny model 16)")
    micro_batch_size: Optional[int] = arg(None, "completions in a training forward pass (default: 2, tiny model 128)")
    sample_batch_size: int = arg(128, "completions generated at a time")
    temperature: float = arg(1.0, "of sampling, and of scoring what was sampled")
    max_prompt_length: int = arg(512, "longer prompts are dropped")
    max_new_tokens: Optional[int] = arg(None, "longest completion (default: 512, tiny model 24)")
    learning_rate: Optional[float] = arg(None, "highest learning rate (default: 2e-5, tiny model 1e-3)")
    warmup_ratio: float = arg(0.1, "share of the steps in which the learning rate rises, before it falls along a cosine")
    max_grad_norm: float = arg(1.0, "longer gradients are scaled down to this norm")
    max_steps: Optional[int] = arg(None, "rollouts (default: 250, tiny model 80)")
    lora_rank: int = arg(16, "rank of new LoRA matrices; an adapter given as --model keeps its own")
    load_in_4bit: OnOff = arg("auto", "quantise the frozen base; auto: on CUDA")
    gradient_checkpointing: OnOff = arg("auto", "save memory by computing activations twice; auto: on CUDA")
    show_every: int = arg(20, "steps between samples shown with their rewards, also in samples.jsonl")
    save_every: int = arg(20, "steps between savings of what --resume needs")
    seed: int = arg(0, "fixes prompt order, LoRA initialisation and sampling")
    output_dir: Optional[str] = arg(None, "a new folder (default: runs/grpo, or the next free one of runs/grpo-2, runs/grpo-3, ...)")
    resume: Optional[str] = arg(None, "finish the interrupted run in this folder, with the settings it was started with")
    track: Optional[Literal["wandb", "trackio"]] = arg(None, "also send the metrics there")


def check(args):
    """Fills in the defaults that depend on the model or the loss; refuses flags out of range or in contradiction."""
    tiny = common.is_tiny(args.model)
    if tiny and not args.dataset:
        args.dataset, args.eval_dataset = "tiny/data/prompt_train.jsonl", args.eval_dataset or "tiny/data/prompt_heldout.jsonl"
    defaults = {
        "dataset": "trl-lib/DeepMath-103K", "batch_size": 16 if tiny else 8, "micro_batch_size": 128 if tiny else 2, "max_new_tokens": 24 if tiny else 512,
        "learning_rate": 1e-3 if tiny else 2e-5, "max_steps": 80 if tiny else 250, "reward": [] if args.reward_model else ["correct_answer"],
        "epsilon_high": {"dapo": 0.28, "cispo": 5.0}.get(args.loss, args.epsilon), "beta": 0.04 if args.loss in ("grpo", "gspo") else 0.0}
    vars(args).update({name: value for name, value in defaults.items() if getattr(args, name) is None})
    args.reward_weights = args.reward_weights if args.reward_weights is not None else [1.0] * len(args.reward)
    if not all(map(math.isfinite, args.reward_weights)):
        common.fail(f"--reward-weights must be finite numbers, not {' '.join(map(str, args.reward_weights))}")
    if len(args.reward_weights) != len(args.reward):
        common.fail(f"--reward-weights has {len(args.reward_weights)} numbers for the {len(args.reward)} functions of --reward")
    if len({name.rpartition(":")[2] for name in args.reward}) < len(args.reward):
        common.fail(f"--reward {' '.join(args.reward)} has a function, or the name of one, twice: their figures could not be told apart")
    if args.loss == "dapo" and args.baseline == "none":
        common.fail("--loss dapo leaves groups of equal rewards out, which without a baseline teach as much as others: choose --baseline group or rloo")
    if args.eval_dataset == args.dataset:
        common.fail(f"--eval-dataset {args.dataset} is also what is trained on: leave it out, and some of its rows are held out")
    for names, low, high in (
        ("batch_size micro_batch_size sample_batch_size updates max_new_tokens max_prompt_length max_steps lora_rank eval_size", 1, sys.maxsize),
        ("show_every save_every", 1, sys.maxsize),
        ("group_size", 1 if args.baseline == "none" else 2, sys.maxsize), ("seed beta", 0, sys.maxsize), ("warmup_ratio", 0, 1),
        ("temperature learning_rate max_grad_norm epsilon epsilon_high", 1e-9, 1e9),
    ):
        for name in names.split():
            if not low <= getattr(args, name) <= high:
                common.fail(f"--{name.replace('_', '-')} {getattr(args, name)} is out of range: from {low} to {high}")
    if args.track and not importlib.util.find_spec(args.track):
        common.fail(f"--track {args.track}: that package is not installed (pip install {args.track})")


# ---- data and rewards -------------------------------------------------------------------------------------

def load_rows(source, split, limit, seed):
    """The rows of a local .json, .jsonl or .parquet file, or up to `limit` shuffled ones of a Hub dataset, as dicts."""
    path, where = Path(common.find(source)), source
    try:
        if path.suffix == ".parquet":
            rows = pyarrow.parquet.read_table(path).to_pylist()
        elif path.suffix in (".json", ".jsonl"):
            rows, text = [], path.read_text(encoding="utf-8-sig")
            if text.lstrip().startswith("[") and path.suffix == ".json":
                rows, text = json.loads(text), ""
            for number, line in enumerate(text.split("\n"), 1):
                where = f"{source}, line {number},"
                rows += [json.loads(line)] if line.strip() else []
        else:
            where = f"{source} is no .json, .jsonl or .parquet file, and as a dataset of the Hub, split {split}, it"
            rows = datasets.load_dataset(source, split=split).shuffle(seed=seed)
            rows = rows.select(range(min(limit, len(rows)))).to_list()
    except Exception as error:  # of the disk, the parser or the Hub, each with types of its own
        common.fail(f"{where} cannot be read: {' '.join(str(error).split()):.200}")
    if not rows or not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        common.fail(f"{source} " + ("must hold one JSON object per row" if rows else "is empty"))
    return rows


def encode_prompts(rows, tokenizer, source, max_prompt_length, needs_answer):
    """The rows with their token ids under "prompt_ids". Too long prompts are dropped and counted; none left, or a bad row, ends the run."""
    for number, row in enumerate(rows, 1):
        if row.get("prompt") is None or not isinstance(row["prompt"], (str, list)):
            common.fail(f"{source}, row {number}, has no prompt that is a string or a list of messages: it has {', '.join(row)}")
        try:
            row["prompt_ids"] = common.encode_prompt(tokenizer, row["prompt"])
        except ValueError as error:
            common.fail(f"{source}, row {number}: {error}")
        if not row["prompt_ids"]:
            common.fail(f"{source}, row {number}: the prompt is empty")
        columns = [name for name in row if name != "prompt_ids"]
        if needs_answer and row.get("answer") in (None, "") and row.get("solution") in (None, ""):
            common.fail(f"{source}, row {number}, has no answer and no solution, which the reward correct_answer reads: it has {', '.join(columns)}")
    kept = [row for row in rows if len(row["prompt_ids"]) <= max_prompt_length]
    if len(kept) < len(rows):
        print(f"{source}: {len(rows) - len(kept)} of {len(rows)} rows dropped: prompt longer than {max_prompt_length} tokens")
    if not kept:
        common.fail(f"{source}: no row is left to use; all prompts are longer than {max_prompt_length} tokens: raise --max-prompt-length, or "
                    "lower --max-new-tokens if the model can read no more")
    return kept


def read_prompts(args, tokenizer, needs_answer):
    """The prompts to train on, and the held-out ones: those of --eval-dataset, or rows that share no prompt with the rest."""
    longest = min(args.max_prompt_length, tokenizer.model_max_length - args.max_new_tokens)

    def read(source, limit):
        return encode_prompts(load_rows(source, args.split, limit, args.seed), tokenizer, source, longest, needs_answer)

    rows = read(args.dataset, args.eval_size + args.max_steps * args.batch_size)
    if args.eval_dataset:
        return rows, read(args.eval_dataset, args.eval_size)[:args.eval_size]
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(args.seed)).tolist()
    held_out = [rows[i] for i in order[:min(args.eval_size, len(rows) // 5)]]  # a fifth at most
    prompts = {tuple(row["prompt_ids"]) for row in held_out}
    rows = [row for row in rows if tuple(row["prompt_ids"]) not in prompts]
    if not rows or not held_out:
        common.fail(f"{args.dataset}: too few different prompts to hold some out; add rows, or name an --eval-dataset")
    return rows, held_out


def last_words(prompt):
    """A prompt as one short line for the screen."""
    return " ".join((prompt if isinstance(prompt, str) else prompt[-1]["content"]).split())[-80:]


def final_answer(text):
    """What a text says in the end: the content of its last \\boxed{}, else its last number, else None. Numbers are Fractions, so that 3.0 is 3."""
    def parse(digits):
        over, _, under = digits.replace(",", "").partition("/")
        try:
            return Fraction(over) / Fraction(under or 1)
        except (ValueError, ZeroDivisionError):  # 1/0, or thousands of digits
            return digits

    number = r"-?(?:(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)(?![0-9])(?:\.[0-9]+)?|\.[0-9]+)(?:[eE][+-]?[0-9]{1,3})?(?:/[0-9]+)?"  # 1,000 but not 1,2
    text = text.replace("−", "-")
    start = text.rfind("\\boxed{")
    if start < 0:
        numbers = re.findall(r"(?<![\w.])" + number, text)
        return parse(numbers[-1]) if numbers else None
    depth, end = 1, start + len("\\boxed{")
    while end < len(text) and depth:
        depth, end = depth + (text[end] == "{") - (text[end] == "}"), end + 1
    inside = text[start + len("\\boxed{"):end - (depth == 0)]
    inside = re.sub(r"\\[$!,]", "", inside)  # \$18, 1\,000
    alone = re.fullmatch(rf"[\s$]*({number})[\s$.%]*", re.sub(r"\\text\{[^}]*\}", "", inside))  # 21 \text{ apples}
    return parse(alone[1]) if alone else "".join(re.sub(r"\\text\{([^}]*)\}", r"\1", inside).split()).strip("$") or None  # a formula, or words


def correct_answer(prompts, completions, answer=None, solution=None, **columns):
    """1.0 where the completion's last \\boxed{} or number is the row's `answer` (or `solution`, as some datasets call it), else 0.0."""
    def final_truth(truth):  # a sentence is compared by its last number, a bare formula or words without a number as a whole
        truth = str(truth).split("####")[-1]  # where GSM8K puts its answer
        sentence = "\\boxed{" in truth or " " in truth.strip() and "\\" not in truth
        said = final_answer(truth) if sentence else None
        return final_answer(f"\\boxed{{{truth}}}") if said is None else said

    nothing = [None] * len(completions)
    truths = [solution if answer is None else answer for answer, solution in zip(answer or nothing, solution or nothing)]
    pairs = [(final_answer(text), final_truth(truth)) for text, truth in zip(completions, truths)]
    return [float(given is not None and given == truth) for given, truth in pairs]


def well_formed(prompts, completions, **columns):
    """1.0 where the completion ends with its answer, a number or \\boxed{}, and nothing but punctuation after it."""
    return [float(bool(re.search(r"(\\boxed\{.*\}|\d)[\s.$)%]*$", text))) for text in completions]


def concise(prompts, completions, **columns):
    """1 for an empty completion, falling to 0 at 1000 characters."""
    return [1 - min(1.0, len(text) / 1000) for text in completions]


def load_function(spec):
    """The function that `FILE.py:function` names."""
    file, _, name = spec.rpartition(":")
    if not Path(file).is_file() or Path(file).suffix != ".py":
        common.fail(f"--reward {spec}: no Python file {file!r}; write it as FILE.py:function")
    module_spec = importlib.util.spec_from_file_location(f"reward_{Path(file).stem}", file)
    module = sys.modules[module_spec.name] = importlib.util.module_from_spec(module_spec)
    try:
        module_spec.loader.exec_module(module)
    except Exception as error:  # the user's code may raise anything
        common.fail(f"--reward {spec}: {file} cannot be imported: {type(error).__name__}: {error}")
    if not callable(getattr(module, name, None)):
        common.fail(f"--reward {spec}: {file} has no function {name!r}")
    return getattr(module, name)


def call_rewards(functions, rows, completions):
    """Scores of each function for each completion, [functions, rows]. A function that fails ends the run with a row shown."""
    names = {name for row in rows for name in row} - {"prompt", "prompt_ids", "prompts", "completions"}
    columns = {name: [row.get(name) for row in rows] for name in sorted(names)}
    scores = []
    for name, function in functions.items():
        try:
            given = [float(score) for score in function(prompts=[row["prompt"] for row in rows], completions=completions, **columns)]
            problem = f"gave {len(given)} scores for {len(rows)} completions" if len(given) != len(rows) else ""
        except Exception as error:  # the user's code may raise anything
            given, problem = [], f"raised {type(error).__name__}: {error}"
        bad = [i for i, score in enumerate(given) if not math.isfinite(score)]
        if problem or bad:
            i = bad[0] if bad else 0
            shown = {k: v for k, v in rows[i].items() if k != "prompt_ids"} | {"completion": completions[i]}
            common.fail(f"the reward {name} {problem or f'gave {given[i]}, no finite number'}; row: {json.dumps(shown, default=str):.500}")
        scores.append(given)
    return torch.tensor(scores, dtype=torch.float64)


@torch.no_grad()
def role_scores(model, head, role, batch, micro_batch_size):
    """Scores [B] of a reward model that is one more adapter on the policy's base, read at the last token, as reward_model.py trained it."""
    scores = []
    with common.using(model, role):
        for i in range(0, len(batch["input_ids"]), micro_batch_size):
            ids, attention_mask = (batch[name][i:i + micro_batch_size] for name in ("input_ids", "attention_mask"))
            hidden = common.causal_lm(model).base_model(input_ids=ids, attention_mask=attention_mask, use_cache=False).last_hidden_state  # [b, T, D]
            hidden = hidden[torch.arange(len(ids)), attention_mask.sum(-1) - 1]  # [b, D]
            scores.append((hidden.float() * head.weight[0]).sum(-1))  # in fp32, also under autocast
    return torch.cat(scores)


def collate(prompts, completions, pad_id, device):
    """B prompts with their completions as one batch [B, T], padded on the right; the mask is on what was sampled."""
    rows = [prompt + completion for prompt, completion in zip(prompts, completions)]
    width = max(map(len, rows))
    batch = {
        "input_ids": [row + [pad_id] * (width - len(row)) for row in rows],
        "attention_mask": [[1] * len(row) + [0] * (width - len(row)) for row in rows],
        "loss_mask": [[0] * len(p) + [1] * len(c) + [0] * (width - len(p) - len(c)) for p, c in zip(prompts, completions)],
    }
    return {name: torch.tensor(value, device=device) for name, value in batch.items()}


# ---- log-probs --------------------------------------------------------------------------------------------

class ChunkedLogps(torch.autograd.Function):
    """log softmax(hidden @ head.T / temperature)[targets] for a frozen head, without ever holding all logits.

    For logits z = hidden @ head.T / temperature and a target y, d log p(y) / d hidden = (head[y] − softmax(z) @ head) / temperature
    does not depend on the loss: it is computed together with the log-prob, one chunk at a time, and `backward` only multiplies.
    """

    @staticmethod
    def forward(ctx, hidden, head, targets, temperature, chunk):
        logps, slopes = [], []
        for h, y in zip(hidden.split(chunk), targets.split(chunk)):  # [C, D], [C]
            logits = h @ head.T  # [C, V]
            logp = (logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature).log_softmax(-1)  # [C, V]
            logps.append(logp.gather(1, y[:, None])[:, 0])  # [C]
            if ctx.needs_input_grad[0]:
                slopes.append(((head[y] - logp.exp().to(head.dtype) @ head) / temperature).to(h.dtype))  # [C, D]
        ctx.save_for_backward(*([torch.cat(slopes)] if slopes else []))
        return torch.cat(logps)

    @staticmethod
    def backward(ctx, grad_logps):
        (slopes,) = ctx.saved_tensors  # [N, D]
        return (grad_logps[:, None] * slopes).to(slopes.dtype), None, None, None, None


def completion_logps(model, input_ids, attention_mask, loss_mask, temperature=1.0):
    """logps [B, T-1]: column t is log p(token t+1 | tokens ≤ t), 0 outside the mask; and the hidden states [N, D] of the N scored positions."""
    causal = common.causal_lm(model)
    scored = loss_mask[:, 1:].bool()  # [B, T-1]: position t predicts token t+1
    if not scored.any():
        raise ValueError("a batch without a single trained token")
    hidden = causal.base_model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).last_hidden_state  # [B, T, D]
    hidden, head = hidden[:, :-1][scored], causal.get_output_embeddings().weight  # [N, D], [V, D]
    chunk = max(1, 2**25 // len(head))  # 128 MiB of fp32 logits at a time
    flat = ChunkedLogps.apply(hidden, head, input_ids[:, 1:][scored], temperature, chunk)  # [N]
    return torch.zeros(scored.shape, dtype=flat.dtype, device=flat.device).masked_scatter(scored, flat), hidden


# ---- the loss ---------------------------------------------------------------------------------------------

def group_advantages(rewards, baseline="group", scale=True):
    """Advantages [P, G] of the rewards [P, G] of G completions to each of P prompts. Equal rewards give exactly 0, but for baseline none."""
    if baseline == "none":  # REINFORCE (Williams 1992)
        return rewards
    spread = rewards.amax(-1, keepdim=True) > rewards.amin(-1, keepdim=True)  # [P, 1]: without it, rounding of the mean would be divided by 1e-4
    above = (rewards - rewards.mean(-1, keepdim=True)) * spread  # [P, G]
    if baseline == "rloo":  # the mean of the other G − 1 (Ahmadian et al. 2024, arXiv:2402.14740): r_i − mean_{j≠i} r_j = G/(G−1) (r_i − mean r)
        return above * rewards.shape[1] / (rewards.shape[1] - 1)
    return above / (rewards.std(-1, keepdim=True) + 1e-4) if scale else above


def policy_loss(logps, old_logps, ref_logps, advantages, mask, sequences, tokens, loss="grpo", beta=0.04, epsilon=0.2, epsilon_high=0.2, max_new_tokens=512):
    """The loss of B completions, as their share of a batch of `sequences` completions with `tokens` sampled tokens: micro-batches just add up.

    logps, old_logps, ref_logps, mask: [B, T-1]; advantages: [B]. Also returns ratio and KL of each token, [B, T-1], for the log.
    """
    advantages, length = advantages[:, None], mask.sum(-1, keepdim=True).clamp(min=1)  # [B, 1]
    log_ratio = (logps - old_logps) * mask  # [B, T-1]
    if loss == "gspo":  # Zheng et al. 2025, arXiv:2507.18071, eqs. 5 and 7: one ratio a sequence, the geometric mean of its tokens'
        log_ratio = (log_ratio.sum(-1, keepdim=True) / length).expand_as(mask)
    # With one update a rollout π is π_old: the ratio is 1, and as the advantages of a group add up to 0, so do the means of its sequences: the
    # loss of grpo and gspo is 0 but for the KL. The gradient is not: d ratio = d log π, each token is pushed by its advantage, as in REINFORCE.
    ratio = log_ratio.exp()
    clipped = ratio.clamp(1 - epsilon, 1 + epsilon_high)
    if loss == "cispo":  # MiniMax-M1 2025, arXiv:2506.13585, eqs. 4 and 5: REINFORCE with a clipped, detached weight; no token loses its gradient
        objective = ratio.clamp(max=1 + epsilon_high).detach() * advantages * logps
    else:  # min: the clip takes away the gain of going further, never the way back (PPO eq. 7)
        objective = torch.minimum(ratio * advantages, clipped * advantages)  # [B, T-1]
    kl = torch.zeros_like(logps)
    if beta > 0:  # k3, DeepSeekMath eq. 4. Its value is unbiased for KL(π ‖ π_ref) and never negative; its gradient is that of KL(π_ref ‖ π)
        log_r = (ref_logps - logps) * mask
        kl = log_r.exp() - log_r - 1  # [B, T-1]
    weight = {  # what a token counts
        "grpo": 1 / (length * sequences), "gspo": 1 / (length * sequences),  # mean of the sequences' means
        "dr_grpo": 1 / (max_new_tokens * sequences),  # Liu et al. 2025, arXiv:2503.20783: a constant, or long wrong answers would cost less a token
        "dapo": 1 / tokens, "cispo": 1 / tokens,  # Yu et al. 2025, arXiv:2503.14476, eq. 8: all tokens alike
    }[loss]
    return -((objective - beta * kl) * mask * weight).sum(), ratio, kl


# ---- sampling ---------------------------------------------------------------------------------------------

@torch.no_grad()
def sample(model, prompts, samples_per_prompt, max_new_tokens, temperature, stop_ids, pad_id, seed):
    """Completions from exactly softmax(logits / temperature): no top-k, no top-p, no penalties. Temperature 0 takes the likeliest token.

    prompts: P lists of ids. Returns P × samples_per_prompt lists of new ids, grouped by prompt; each ends with its stop token
    unless it ran into max_new_tokens. A row's random numbers are its own, whatever happens in the other rows.
    """
    was_training = model.training
    model.eval()  # in train mode gradient checkpointing would silently drop the cache
    causal = common.causal_lm(model)
    rows, width = len(prompts) * samples_per_prompt, max(map(len, prompts))
    input_ids = torch.tensor([[pad_id] * (width - len(ids)) + ids for ids in prompts], device=causal.device)  # [P, T], padded on the left
    mask = torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids in prompts], device=causal.device)  # [P, T]
    noise = torch.rand(rows, max_new_tokens, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(causal.device)
    new_ids = torch.full((rows, max_new_tokens), -1, device=causal.device)
    alive = torch.arange(rows, device=causal.device)  # rows that have not stopped

    cache = DynamicCache(config=causal.config)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    logits = causal(input_ids=input_ids, attention_mask=mask, position_ids=positions, past_key_values=cache, logits_to_keep=1).logits[:, -1]  # [P, V]
    cache.batch_repeat_interleave(samples_per_prompt)  # each prompt was read once, for all of its samples
    logits, mask = logits.repeat_interleave(samples_per_prompt, 0), mask.repeat_interleave(samples_per_prompt, 0)
    for step in range(max_new_tokens):
        if temperature == 0:
            token = logits.argmax(-1)  # [alive]
        else:  # the first token at which the cumulative probability exceeds the noise; fp64, or rare tokens at the end get lost
            cumulative = (logits.float() / temperature).softmax(-1).double().cumsum(-1)  # [alive, V]
            token = torch.searchsorted(cumulative, noise[alive, step, None] * cumulative[:, -1:], right=True)[:, 0]
        new_ids[alive, step] = token
        going = ~torch.isin(token, torch.tensor(stop_ids, device=causal.device))
        if step == max_new_tokens - 1 or not going.any():
            break
        if not going.all():  # finished rows leave the batch
            alive, token, mask = alive[going], token[going], mask[going]
            cache.batch_select_indices(going.nonzero()[:, 0])
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
        logits = causal(input_ids=token[:, None], attention_mask=mask, position_ids=mask.sum(-1, keepdim=True) - 1, past_key_values=cache).logits[:, -1]
    model.train(was_training)
    return [[i for i in row if i >= 0] for row in new_ids.tolist()]


# ---- the run ----------------------------------------------------------------------------------------------

def parse_args(kind, doc):
    """The command line; with `--resume DIR` the settings of the run that it continues."""
    parser = HfArgumentParser(kind, description=doc.split("\n")[0])
    parser.error = lambda message: common.fail(f"{message} (--help lists all flags)")
    args, unknown = parser.parse_args_into_dataclasses(return_remaining_strings=True)
    if unknown:
        parser.error(f"there is no flag {unknown[0]}")
    if args.resume is None:
        return args
    saved = Path(args.resume, "args.json")
    if args != kind(resume=args.resume):
        common.fail("--resume takes its settings from the run that it continues: leave all other flags out")
    if saved.with_name("summary.json").exists() or not saved.exists():
        common.fail(f"--resume {args.resume}: " + ("no run was started there" if not saved.exists() else "that run is finished"))
    try:
        return kind(**json.loads(saved.read_text()) | {"resume": args.resume})
    except (ValueError, TypeError) as error:
        common.fail(f"--resume {args.resume}: its args.json was not written by this script ({error})")


def new_folder(wanted, default):
    """Creates the folder of a run: --output-dir, which may exist if it is empty, else the first free one of runs/x, runs/x-2, ..."""
    folder, number = Path(wanted or default), 1
    while not (wanted and folder.is_dir() and not any(folder.iterdir())):
        try:
            folder.mkdir(parents=True)  # not if it is there: of two runs that start at once, one takes the next name
            break
        except OSError as error:
            if wanted:
                common.fail(f"--output-dir {wanted} is in use, or cannot be created: name a new folder, or --resume what is in it ({error})")
            if not folder.exists():
                common.fail(f"{folder} cannot be created: name an --output-dir ({error})")
            number += 1
            folder = Path(f"{default}-{number}")
    if number > 1:
        print(f"{default} is in use: this run goes to {folder}")
    return folder


def peak_memory_gib(device):
    """Of the GPU, or of this process where there is none (Linux counts it in KiB)."""
    return torch.cuda.max_memory_allocated(device) / 2**30 if device.type == "cuda" else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def add_over_ranks(tensors):
    """Replaces every tensor by its sum over all processes, with one message for all."""
    if dist.is_initialized():
        flat = torch.cat([t.flatten() for t in tensors])
        dist.all_reduce(flat)
        for t, total in zip(tensors, flat.split([t.numel() for t in tensors])):
            t.copy_(total.view_as(t))


def rollout(model, tokenizer, rows, functions, head, args, repeats, seed):
    """Samples `repeats` completions of every row's prompt and scores them: step 2 of a training step, and the evaluation.

    Returns rows and completions (ids), one entry a sample; texts; scores [functions, samples]; what stopped by itself [samples]; the batch for training.
    """
    device, stop_ids = common.causal_lm(model).device, common.stop_token_ids(tokenizer, model.generation_config)
    size, ids = max(1, args.sample_batch_size // repeats), []
    with torch.autocast(device.type, common.choose_dtype(device), enabled=device.type == "cuda"):
        for i in range(0, len(rows), size):
            ids += sample(model, [row["prompt_ids"] for row in rows[i:i + size]], repeats, args.max_new_tokens, args.temperature,
                          stop_ids, tokenizer.pad_token_id, seed + i)
        rows = [row for row in rows for _ in range(repeats)]
        texts = tokenizer.batch_decode(ids, skip_special_tokens=True)
        batch = collate([row["prompt_ids"] for row in rows], ids, tokenizer.pad_token_id, device)
        scores = call_rewards(functions, rows, texts)
        if head is not None:
            scores = torch.cat([scores, role_scores(model, head, "reward", batch, args.micro_batch_size).cpu().double()[None]])
    stopped = torch.tensor([row[-1] in stop_ids for row in ids])
    return rows, ids, texts, scores, stopped, batch


def evaluate(model, tokenizer, rows, functions, head, args):
    """Mean reward, length and share that stop by themselves of one sample for each held-out prompt."""
    _, ids, _, scores, stopped, _ = rollout(model, tokenizer, rows, functions, head, args, 1, args.seed)
    weights = torch.tensor(args.reward_weights + [1.0] * (head is not None))
    return {"reward": (weights[:, None] * scores).sum(0).mean().item(), "length": sum(map(len, ids)) / len(ids), "stopped": stopped.float().mean().item()}


def train(args):
    check(args)
    rank, world, device = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1)), common.choose_device()
    if world > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
        sys.stdout = sys.stdout if rank == 0 else open(os.devnull, "w")
    if world > args.batch_size:
        common.fail(f"--batch-size {args.batch_size} leaves some of the {world} processes without a prompt")

    # data, rewards, then the model
    functions = {name: globals()[name] if name in ("correct_answer", "well_formed", "concise") else load_function(name) for name in args.reward}
    tokenizer = common.load_tokenizer(args.model)
    rows, held_out = read_prompts(args, tokenizer, "correct_answer" in args.reward)
    folder = Path(args.resume) if args.resume else new_folder(args.output_dir, "runs/grpo") if rank == 0 else None
    torch.manual_seed(args.seed)
    model = common.load_model(args.model, load_in_4bit=args.load_in_4bit, lora_rank=args.lora_rank, gradient_checkpointing=args.gradient_checkpointing)
    weights = torch.nn.ParameterList(p for p in model.parameters() if p.requires_grad)
    for p in weights if world > 1 else ():
        dist.broadcast(p.data, 0)
    head = common.add_role(model, args.reward_model, "reward") if args.reward_model else None
    names = [name.rpartition(":")[2] for name in args.reward] + ["reward_model"] * (head is not None)
    reward_weights = torch.tensor(args.reward_weights + [1.0] * (head is not None), dtype=torch.float64)[:, None]  # [functions, 1]
    optimizer = torch.optim.AdamW(weights, lr=args.learning_rate, weight_decay=0.0)
    steps = args.max_steps * args.updates
    warmup = round(args.warmup_ratio * steps)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda n: min((n + 1) / (warmup + 1), 0.5 + 0.5 * math.cos(math.pi * n / steps)))  # n from 0
    # small fp16 gradients would round to 0 without a scale; with bf16 and fp32 the scaler is off and passes everything through
    scaler = torch.amp.GradScaler(device.type, enabled=common.choose_dtype(device) == torch.float16)
    # the state of the run: its start, or where it was interrupted
    parts = {"weights": weights, "optimizer": optimizer, "schedule": schedule, "scaler": scaler}
    state = {"step": 0, "seconds": 0.0, "before": None}
    if args.resume and (folder / "resume.pt").exists():
        state = torch.load(folder / "resume.pt", map_location=device, weights_only=True)
        for name, part in parts.items():
            part.load_state_dict(state.pop(name))  # not kept twice in memory
    if rank == 0:
        for file in ("metrics.jsonl", "samples.jsonl"):
            lines = (folder / file).read_text().splitlines(keepends=True) if state["step"] else []
            (folder / file).write_text("".join(line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= state["step"]))
        (folder / "args.json").write_text(json.dumps(asdict(args), indent=2))
    tracker = importlib.import_module(args.track) if args.track and rank == 0 else None
    if tracker:
        tracker.init(project="grpo", name=folder.name, config=asdict(args))
    settings = {"method": "grpo", "model": args.model, "dataset": args.dataset, **common.describe(model)}
    for name, value in (settings | {"prompts": f"{len(rows)}, and {len(held_out)} held out", "loss": f"{args.loss}, baseline {args.baseline}, beta {args.beta}",
                                    "reward": " + ".join(names), "steps": f"{args.max_steps} of {args.batch_size} prompts x {args.group_size} completions",
                                    "results": folder}).items():
        print(f"{name:>24}  {value}")

    state["before"] = state["before"] or evaluate(model, tokenizer, held_out, functions, head, args)
    clock = time.time() - state["seconds"]
    bar = tqdm(range(state["step"] + 1, args.max_steps + 1), desc="grpo", initial=state["step"], total=args.max_steps, disable=rank > 0)
    for step in bar:
        # 1. prompts, which follow from the seed and the step alone, so that a resumed run sees the same ones; each rank takes its share
        began, picked = time.time(), range((step - 1) * args.batch_size, step * args.batch_size)
        epochs = {i // len(rows) for i in picked}
        orders = {e: torch.randperm(len(rows), generator=torch.Generator().manual_seed(args.seed + e)).tolist() for e in epochs}
        mine = [rows[orders[i // len(rows)][i % len(rows)]] for i in picked][rank::world]

        # 2. G completions each, and their rewards. Random numbers, too, follow from seed, step and rank
        samples, ids, texts, scores, stopped, batch = rollout(model, tokenizer, mine, functions, head, args, args.group_size,
                                                              args.seed + 10**6 * (step * world + rank))
        sampling_seconds = time.time() - began
        rewards = (reward_weights * scores).sum(0).view(len(mine), args.group_size)  # [P, G]

        # 3. advantages within the groups. DAPO leaves truncated answers out (overlong filtering), and groups without spread, for
        # which it would sample others: here they are dropped, so that only the tokens of the rest count in the mean
        advantages = group_advantages(rewards, args.baseline, scale=args.loss != "dr_grpo").flatten().float().to(device)  # [B]
        spread = (rewards.amax(-1) > rewards.amin(-1))  # [P]
        if args.loss == "dapo":
            used = stopped & spread.repeat_interleave(args.group_size)
            batch["loss_mask"] = batch["loss_mask"] * used[:, None].to(device)
        sequences, tokens = args.batch_size * args.group_size, batch["loss_mask"][:, 1:].sum().double()
        add_over_ranks([tokens])

        # 4. log-probs of the samples by the policy that wrote them and by the reference, before anything moves
        micros = [slice(i, i + args.micro_batch_size) for i in range(0, len(ids), args.micro_batch_size)]
        micros = [micro for micro in micros if batch["loss_mask"][micro].any()]

        def score(micro):
            with torch.autocast(device.type, common.choose_dtype(device), enabled=device.type == "cuda"):
                return completion_logps(model, **{name: value[micro] for name, value in batch.items()}, temperature=args.temperature)[0]

        model.train()
        with torch.no_grad():
            old_logps = [score(micro) if args.updates > 1 else None for micro in micros]
            with common.reference(model):
                ref_logps = [score(micro) if args.beta > 0 else None for micro in micros]

        # 5. the updates: gradients add up over micro-batches and ranks
        means = torch.zeros(len(FIGURES), dtype=torch.float64, device=device)
        for update in range(args.updates):
            totals = torch.zeros(len(FIGURES), dtype=torch.float64, device=device)
            for micro, old, ref in zip(micros, old_logps, ref_logps):
                logps, mask, advantage = score(micro), batch["loss_mask"][micro][:, 1:], advantages[micro]  # [b, T-1], [b, T-1], [b]
                loss, ratio, kl = policy_loss(
                    logps, logps.detach() if old is None else old, ref, advantage, mask, sequences, tokens.item(),
                    args.loss, args.beta, args.epsilon, args.epsilon_high, args.max_new_tokens)
                scaler.scale(loss).backward()
                high, low = ratio > 1 + args.epsilon_high, ratio < 1 - args.epsilon
                clipped = high if args.loss == "cispo" else high & (advantage[:, None] > 0) | low & (advantage[:, None] < 0)
                figures = [kl, -logps, ratio, clipped]  # −log π of a sample is an unbiased estimate of the entropy while π is the sampler
                totals += torch.stack([loss.detach()] + [(figure.detach() * mask).sum() / tokens for figure in figures]).double()
            add_over_ranks([totals])
            for p in weights:
                p.grad = torch.zeros_like(p) if p.grad is None else p.grad
            add_over_ranks([p.grad for p in weights])
            scaler.unscale_(optimizer)
            grad_norm = torch.nn.utils.clip_grad_norm_(weights, args.max_grad_norm).item()
            loss, means = totals[0].item(), means + totals / args.updates
            if not math.isfinite(loss) or not (math.isfinite(grad_norm) or scaler.is_enabled() and scaler.get_scale() > 1):
                bar.close()
                common.fail(f"step {step}: the loss is {loss} and the gradient norm {grad_norm} in {settings['dtype']}: most likely --learning-rate "
                            f"{args.learning_rate} is too high" + (", or activations exceed what fp16 can hold" if scaler.is_enabled() else ""))
            learning_rate = schedule.get_last_lr()[0]
            scaler.step(optimizer)
            scaler.update()
            schedule.step()
            optimizer.zero_grad()

        # 6. what happened, over all ranks
        counts = torch.tensor([len(mine), (~spread).sum(), rewards.sum(), rewards.square().sum(), advantages.sum(), advantages.square().sum(),
                               sum(map(len, ids)), (~stopped).sum(), *scores.sum(1), *scores.square().sum(1)], dtype=torch.float64, device=device)
        add_over_ranks([counts])
        prompts, flat, reward, square, advantage, advantage_square, length, truncated, *sums = counts.tolist()
        count = prompts * args.group_size

        def spread_of(total, squares):
            return math.sqrt(max(0.0, squares / count - (total / count) ** 2))

        seconds = time.time() - began
        metrics = {
            "step": step, "reward": reward / count, "reward_std": spread_of(reward, square),
            **{f"reward_{name}": total / count for name, total in zip(names, sums)},
            **{f"reward_{name}_std": spread_of(total, squares) for name, total, squares in zip(names, sums, sums[len(names):])},
            "zero_spread": flat / prompts, **dict(zip(FIGURES, means.tolist())), "advantage_std": spread_of(advantage, advantage_square),
            "length": length / count, "truncated": truncated / count, "grad_norm": grad_norm, "learning_rate": learning_rate,
            "sampling_share": sampling_seconds / seconds, "tokens_per_second": length / seconds, "peak_memory_gib": peak_memory_gib(device)}
        if args.beta == 0:
            del metrics["kl"]  # not measured
        bar.set_postfix({name: f"{metrics[name]:.3f}" for name in ("reward", "kl", "length") if name in metrics}, refresh=False)
        if rank > 0:
            continue
        with open(folder / "metrics.jsonl", "a") as file:
            file.write(json.dumps(metrics) + "\n")
        if step % args.show_every == 0 or step == 1:
            shown = [{"step": step, "prompt": row["prompt"], "completion": text, "rewards": dict(zip(names, values)), "advantage": advantage}
                     for row, text, values, advantage in zip(samples, texts, scores.T.tolist(), advantages.tolist())][:args.group_size]
            with open(folder / "samples.jsonl", "a") as file:
                file.write("".join(json.dumps(sample) + "\n" for sample in shown))
            lines = [f"\n  {value:6.2f}  {' '.join(s['completion'].split()):.120}" for s, value in zip(shown[:4], rewards.flatten().tolist())]
            bar.write(f"\nstep {step}: {last_words(shown[0]['prompt'])}{''.join(lines)}")
        if tracker:
            tracker.log({name: value for name, value in metrics.items() if name != "step"}, step=step)
        if step % args.save_every == 0:
            torch.save(state | {"step": step, "seconds": time.time() - clock} | {name: part.state_dict() for name, part in parts.items()}, folder / "new.pt")
            os.replace(folder / "new.pt", folder / "resume.pt")  # whole or not at all, whenever the run is killed

    # the end: the same held-out prompts once more
    seconds, after = time.time() - clock, evaluate(model, tokenizer, held_out, functions, head, args)
    if tracker:
        tracker.finish()
    if rank > 0:
        return
    print("\nheld out    before     after\n" + "\n".join(f"{name:<9}{state['before'][name]:9.3f} {after[name]:9.3f}" for name in after))
    model.save_pretrained(folder, selected_adapters=["default"], save_embedding_layers=False)
    tokenizer.save_pretrained(folder)
    trained = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    speed = sum(m["tokens_per_second"] for m in trained) / len(trained)
    summary = settings | {"steps": args.max_steps, "seconds": round(seconds, 1), "tokens_per_second": round(speed),
                          "peak_memory_gib": round(peak_memory_gib(device), 2), "before": state["before"], "after": after}
    (folder / "summary.json").write_text(json.dumps(summary, indent=2))
    print(f"\nresults: {folder}\ncurves:  python plot.py {folder}\ncompare: python evaluate.py {args.model} {folder}")


if __name__ == "__main__":
    train(parse_args(Args, __doc__))
