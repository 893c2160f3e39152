"""PPO for language models (Schulman et al. 2017, arXiv:1707.06347; for RLHF: Ouyang et al. 2022, InstructGPT, arXiv:2203.02155).

Learns from its own samples and a learned reward. Four roles share one base: the policy, the frozen reference that it must stay near,
the reward model that scores whole answers, and the critic that predicts the return from every token on. Each token is an action:

    r_t = −β (log π(y_t) − log π_ref(y_t))   and the score of the answer on top at its last token
    δ_t = r_t + γ V_{t+1} − V_t,   A_t = Σ_l (γλ)^l δ_{t+l}            generalised advantages, Schulman et al. 2015, arXiv:1506.02438, eq. 16
    J = E min[ρ_t A_t, clip(ρ_t, 1 − ε, 1 + ε) A_t],   ρ_t = π(y_t) / π_old(y_t)                        PPO, eq. 7

Against REINFORCE it adds the critic, which tells good tokens from bad ones within an answer, and the clip, which makes several updates on the
same samples safe. GRPO drops the critic again. What makes it work on language models, and where it stands below:

    [1] the KL penalty is per token, in the reward, by log π − log π_ref at samples of π (Ziegler et al. 2019, arXiv:1909.08593, eq. 2)
    [2] the score is given at the last generated token only (Ziegler et al. 2019)
    [3] answers that do not end by themselves lose --missing-eos-penalty (a milder EOS trick: in Huang et al. 2024, arXiv:2403.17031, they score −1)
    [4] the critic starts from the reward model (Ouyang et al. 2022, appendix C.4), with weights of its own
    [5] advantages are whitened over all real tokens of the batch (Ziegler et al.'s code; Huang et al. 2024)
    [6] the value loss is clipped around the old values (Ziegler et al.'s code)
    [7] several epochs of minibatches on the same samples, each with an optimizer step (Schulman et al. 2017, algorithm 1)
    [8] the epochs end early once the policy is --target-kl away from the sampler (studied by Dossa et al. 2021, IEEE Access)
    [9] the coefficient β can adapt to a KL target (Ziegler et al. 2019, section 2.2)
    [10] sampling and scoring use the same temperature and no dropout, so that the ratio is 1 at the start of the first epoch

    python ppo.py                                                     # the tiny model and its reward model, about three minutes
    python ppo.py --model runs/sft --reward-model runs/reward_model   # the whole pipeline on your own adapters
    python ppo.py --model Qwen/Qwen2.5-0.5B-Instruct --reward-model runs/reward_model --dataset prompts.jsonl

Healthy curves: reward up, KL up slowly and below ten nats an answer, explained variance from below 0 towards 1, clip fraction under 0.2. A reward that
rises with the KL while the samples get odd is reward hacking: raise --beta.
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
from typing import Literal, Optional

import common  # first, because it quiets what the others import
import datasets
import pyarrow.parquet
import torch
import torch.distributed as dist
from tqdm import tqdm
from transformers import AutoModelForSequenceClassification, AutoTokenizer, DynamicCache, HfArgumentParser

OnOff = Literal["auto", "on", "off"]
FIGURES = ("policy_loss", "value_loss", "policy_kl", "clip_fraction", "entropy", "ratio")


def arg(default, help):
    return field(default=default, metadata={"help": help})


@dataclass
class Args:
    model: str = arg("tiny/chat", "Hub name, local folder or saved LoRA adapter to start from")
    dataset: Optional[str] = arg(None, "Hub name or .json, .jsonl or .parquet file with a prompt (default: tiny/data, other models trl-lib/DeepMath-103K)")
    split: str = arg("train", "split of a Hub dataset")
    eval_dataset: Optional[str] = arg(None, "held-out prompts, like --dataset (default: rows kept out of it)")
    eval_size: int = arg(64, "number of held-out prompts")
    reward_model: Optional[str] = arg(None, "a run of reward_model.py on the same base, or any sequence classifier (default: tiny/reward for the tiny model)")
    reward: Optional[str] = arg(None, "instead of a reward model, correct_answer or FILE.py:function")
    beta: Optional[float] = arg(None, "coefficient of the KL penalty in the reward (default: 0.05, tiny model 0.5)")
    adaptive_kl: Optional[float] = arg(None, "adapt beta so that the KL of an answer approaches this many nats (default: beta stays)")
    missing_eos_penalty: float = arg(1.0, "taken from the score of an answer that does not end by itself")
    gamma: float = arg(1.0, "discount γ")
    lam: float = arg(0.95, "λ of the generalised advantages")
    epsilon: float = arg(0.2, "how far from 1 the ratio counts")
    value_epsilon: float = arg(0.2, "how far from the old value the new one counts")
    value_weight: float = arg(0.5, "weight of the value loss")
    epochs: int = arg(4, "passes over the same samples, at most")
    target_kl: Optional[float] = arg(0.1, "end the epochs when the mean KL to the sampler exceeds this, in nats a token")
    batch_size: Optional[int] = arg(None, "prompts in a step, one answer each, over all GPUs (default: 64, tiny model 128)")
    minibatch_size: Optional[int] = arg(None, "answers in an optimizer step, over all GPUs (default: 16, tiny model 64)")
    micro_batch_size: Optional[int] = arg(None, "answers in a training forward pass (default: 2, tiny model 64)")
    sample_batch_size: int = arg(128, "answers generated at a time")
    temperature: float = arg(1.0, "of sampling, and of scoring what was sampled")
    max_prompt_length: int = arg(512, "longer prompts are dropped")
    max_new_tokens: Optional[int] = arg(None, "longest answer (default: 256, tiny model 24)")
    learning_rate: Optional[float] = arg(None, "highest learning rate of policy and critic (default: 1e-5, tiny model 5e-4)")
    warmup_ratio: float = arg(0.1, "share of the steps in which the learning rate rises, before it falls along a cosine")
    max_grad_norm: float = arg(1.0, "longer gradients are scaled down to this norm")
    max_steps: Optional[int] = arg(None, "rollouts (default: 200, tiny model 25)")
    lora_rank: int = arg(16, "rank of new LoRA matrices; an adapter given as --model keeps its own")
    load_in_4bit: OnOff = arg("auto", "quantise the frozen base; auto: on CUDA")
    gradient_checkpointing: OnOff = arg("auto", "save memory by computing activations twice; auto: on CUDA")
    show_every: int = arg(10, "steps between samples shown with their rewards, also in samples.jsonl")
    save_every: int = arg(10, "steps between savings of what --resume needs")
    seed: int = arg(0, "fixes prompt order, LoRA initialisation and sampling")
    output_dir: Optional[str] = arg(None, "a new folder (default: runs/ppo, or the next free one of runs/ppo-2, runs/ppo-3, ...)")
    resume: Optional[str] = arg(None, "finish the interrupted run in this folder, with the settings it was started with")
    track: Optional[Literal["wandb", "trackio"]] = arg(None, "also send the metrics there")


def check(args):
    """Fills in the defaults that depend on the model; refuses flags out of range or in contradiction."""
    tiny = common.is_tiny(args.model)
    if tiny and not args.dataset:
        args.dataset, args.eval_dataset = "tiny/data/prompt_train.jsonl", args.eval_dataset or "tiny/data/prompt_heldout.jsonl"
    if args.adaptive_kl and args.beta == 0:
        common.fail("--adaptive-kl multiplies --beta, and 0 stays 0: start from a small one")
    if args.reward and args.reward_model:
        common.fail("--reward and --reward-model exclude each other: the score of an answer is the one or the other")
    if not args.reward and not args.reward_model and not tiny:
        common.fail("name what scores the answers: --reward-model, a run of reward_model.py or a sequence classifier, or --reward FILE.py:function")
    defaults = {
        "dataset": "trl-lib/DeepMath-103K", "reward_model": None if args.reward else "tiny/reward", "batch_size": 128 if tiny else 64,
        "minibatch_size": 64 if tiny else 16, "micro_batch_size": 64 if tiny else 2, "max_new_tokens": 24 if tiny else 256,
        "learning_rate": 5e-4 if tiny else 1e-5, "max_steps": 25 if tiny else 200,
        # at 0.05 the tiny model finds what its reward model overlooks: right equations that were not asked for
        "beta": 0.5 if tiny else 0.05}
    vars(args).update({name: value for name, value in defaults.items() if getattr(args, name) is None})
    if args.eval_dataset == args.dataset:
        common.fail(f"--eval-dataset {args.dataset} is also what is trained on: leave it out, and some of its rows are held out")
    for names, low, high in (
        ("batch_size minibatch_size micro_batch_size sample_batch_size epochs max_new_tokens max_prompt_length max_steps lora_rank eval_size", 1, sys.maxsize),
        ("show_every save_every", 1, sys.maxsize), ("seed beta missing_eos_penalty value_weight", 0, sys.maxsize), ("warmup_ratio gamma lam", 0, 1),
        ("temperature learning_rate max_grad_norm epsilon value_epsilon target_kl adaptive_kl", 1e-9, 1e9),
    ):
        for name in names.split():
            if getattr(args, name) is not None and not low <= getattr(args, name) <= high:
                common.fail(f"--{name.replace('_', '-')} {getattr(args, name)} is out of range: from {low} to {high}")
    if args.batch_size % args.minibatch_size:
        common.fail(f"--batch-size {args.batch_size} is no multiple of --minibatch-size {args.minibatch_size}")
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


@torch.no_grad()
def classifier_scores(classifier, tokenizer, rows, texts, micro_batch_size):
    """Scores [B] of a sequence classifier that has nothing to do with the policy: it gets the text, by its own template and tokenizer."""
    conversations = [row["prompt"] + text if isinstance(row["prompt"], str) else tokenizer.apply_chat_template(
        [*row["prompt"], {"role": "assistant", "content": text}], tokenize=False) for row, text in zip(rows, texts)]
    scores = []
    for i in range(0, len(rows), micro_batch_size):
        batch = tokenizer(conversations[i:i + micro_batch_size], return_tensors="pt", padding=True, truncation=True, padding_side="right",
                          add_special_tokens=isinstance(rows[0]["prompt"], str))
        scores.append(classifier(**batch.to(classifier.device)).logits[:, 0].float())
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


# ---- log-probs and values ---------------------------------------------------------------------------------

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


def token_values(model, head, input_ids, attention_mask, loss_mask):
    """The critic's values [B, T-1]: column t is the return expected before token t+1 is written, 0 outside the mask."""
    with common.using(model, "critic"):
        hidden = common.causal_lm(model).base_model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).last_hidden_state
    return (hidden[:, :-1].float() * head.weight[0]).sum(-1) * loss_mask[:, 1:]


# ---- the losses -------------------------------------------------------------------------------------------

def token_rewards(scores, logps, ref_logps, mask, beta):
    """Rewards [B, T-1] of the tokens: the KL penalty for each [1], and the scores [B] at the last token of each answer [2]."""
    # log π − log π_ref is the estimator k1 of the KL (Schulman 2020). k3 has the same mean, but as a reward only k1 has the gradient of the KL:
    # that of k3 nearly vanishes close to the reference, and can point away from it further off
    rewards = -beta * (logps - ref_logps) * mask  # [B, T-1]
    last = mask.shape[1] - 1 - mask.flip(1).argmax(1)  # [B]
    rewards[torch.arange(len(last)), last] += scores
    return rewards


def generalised_advantages(rewards, values, mask, gamma, lam):
    """Advantages and returns, [B, T-1] each, 0 outside the mask (Schulman et al. 2015, eq. 16): from the last token to the first."""
    values, running = values * mask, torch.zeros_like(rewards[:, 0])
    advantages, next_value = torch.zeros_like(rewards), torch.zeros_like(rewards[:, 0])  # behind the last token there is nothing to come
    for t in reversed(range(rewards.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]  # [B]
        running = (delta + gamma * lam * running) * mask[:, t]
        advantages[:, t], next_value = running, values[:, t]
    return advantages, advantages + values


def whiten(values, mask):
    """Shifted and scaled to mean 0 and variance 1 over the tokens in the mask, of all ranks; 0 outside [5]."""
    sums = torch.stack([mask.sum(), (values * mask).sum(), (values**2 * mask).sum()]).double()
    add_over_ranks([sums])
    count, total, squares = sums.tolist()
    mean = total / count
    return (values - mean) * mask / math.sqrt(max(squares / count - mean**2, 0.0) + 1e-8)


def clipped_loss(logps, old_logps, advantages, mask, tokens, epsilon):
    """PPO eq. 7 as a loss, summed over the answers given and divided by the `tokens` of the whole minibatch; and the ratios [B, T-1]."""
    ratio = ((logps - old_logps) * mask).exp()  # [B, T-1]
    # min: the clip takes away the gain of going further, above 1 + ε if A > 0 and below 1 − ε if A < 0, never the way back
    objective = torch.minimum(ratio * advantages, ratio.clamp(1 - epsilon, 1 + epsilon) * advantages)  # [B, T-1]
    return -(objective * mask).sum() / tokens, ratio


def value_loss(values, old_values, returns, mask, tokens, epsilon):
    """Half the squared error of the critic, summed and divided likewise; the larger of it and that of the value clipped around the old one [6]."""
    clipped = old_values + (values - old_values).clamp(-epsilon, epsilon)  # [B, T-1]
    return 0.5 * (torch.maximum((values - returns) ** 2, (clipped - returns) ** 2) * mask).sum() / tokens


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


def train(args):
    check(args)
    rank, world, device = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1)), common.choose_device()
    if world > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
        sys.stdout = sys.stdout if rank == 0 else open(os.devnull, "w")
    if world > min(args.minibatch_size, args.batch_size):
        common.fail(f"--minibatch-size {args.minibatch_size} leaves some of the {world} processes without an answer")

    # data first, then one base with its roles
    functions = {args.reward: correct_answer if args.reward == "correct_answer" else load_function(args.reward)} if args.reward else {}
    tokenizer = common.load_tokenizer(args.model)
    rows, held_out = read_prompts(args, tokenizer, args.reward == "correct_answer")
    folder = Path(args.resume) if args.resume else new_folder(args.output_dir, "runs/ppo") if rank == 0 else None
    torch.manual_seed(args.seed)
    model = common.load_model(args.model, load_in_4bit=args.load_in_4bit, lora_rank=args.lora_rank, gradient_checkpointing=args.gradient_checkpointing)
    classifier, reward_head, own_reward_model = None, None, args.reward_model and common.adapter_config(args.reward_model)
    if own_reward_model:
        reward_head = common.add_role(model, args.reward_model, "reward")
    elif args.reward_model:
        with common.loading(args.reward_model):
            name = common.find(args.reward_model)
            classifier_tokenizer = AutoTokenizer.from_pretrained(name, truncation_side="left")  # keeps the answer
            classifier, report = AutoModelForSequenceClassification.from_pretrained(
                name, num_labels=1, dtype=common.choose_dtype(device), output_loading_info=True)
            classifier = classifier.to(device).eval()
        if report["missing_keys"]:
            common.fail(f"{args.reward_model} is no reward model: it has no weights for {', '.join(sorted(report['missing_keys']))}")
        if not classifier_tokenizer.chat_template and any(isinstance(row["prompt"], list) for row in rows + held_out):
            common.fail(f"the prompts are messages, but {args.reward_model} has no chat template to read them with")
        classifier_tokenizer.pad_token = classifier_tokenizer.pad_token or classifier_tokenizer.eos_token
        classifier.config.pad_token_id = classifier_tokenizer.pad_token_id
    critic_head = common.add_role(model, args.reward_model if own_reward_model else None, "critic", trainable=True)  # [4]
    weights = torch.nn.ParameterList([*(p for p in model.parameters() if p.requires_grad), critic_head.weight])
    for p in weights if world > 1 else ():
        dist.broadcast(p.data, 0)
    optimizer = torch.optim.AdamW(weights, lr=args.learning_rate, weight_decay=0.0)
    # one step of the schedule a rollout, as the number of updates in it may vary
    steps, warmup = args.max_steps, round(args.warmup_ratio * args.max_steps)
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
        tracker.init(project="ppo", name=folder.name, config=asdict(args))
    settings = {"method": "ppo", "model": args.model, "dataset": args.dataset, **common.describe(model)}
    for name, value in (settings | {"prompts": f"{len(rows)}, and {len(held_out)} held out", "reward": args.reward or args.reward_model,
                                    "steps": f"{args.max_steps} of {args.batch_size} answers, up to {args.epochs} epochs of {args.minibatch_size}",
                                    "results": folder}).items():
        print(f"{name:>24}  {value}")
    autocast = torch.autocast(device.type, common.choose_dtype(device), enabled=device.type == "cuda")
    stop_ids = common.stop_token_ids(tokenizer, model.generation_config)

    def rollout(rows, seed):
        """Step 1 and what 2 needs, also for the evaluation: ids, texts, scores [B], what stopped [B], the batch, log-probs of policy and reference."""
        ids = []
        with torch.no_grad(), autocast:
            for i in range(0, len(rows), args.sample_batch_size):
                ids += sample(model, [row["prompt_ids"] for row in rows[i:i + args.sample_batch_size]], 1, args.max_new_tokens, args.temperature,
                              stop_ids, tokenizer.pad_token_id, seed + i)
            texts = tokenizer.batch_decode(ids, skip_special_tokens=True)
            batch = collate([row["prompt_ids"] for row in rows], ids, tokenizer.pad_token_id, device)
            if args.reward:
                scores = call_rewards(functions, rows, texts)[0].float().to(device)
            elif classifier is not None:
                scores = classifier_scores(classifier, classifier_tokenizer, rows, texts, args.micro_batch_size)
            else:
                scores = role_scores(model, reward_head, "reward", batch, args.micro_batch_size)
            stopped = torch.tensor([row[-1] in stop_ids for row in ids], device=device)
            logps = torch.cat([policy_logps(part(batch, i)) for i in range(0, len(ids), args.micro_batch_size)])
            with common.reference(model):
                ref_logps = torch.cat([policy_logps(part(batch, i)) for i in range(0, len(ids), args.micro_batch_size)])
        return ids, texts, scores, stopped, batch, logps, ref_logps

    def part(batch, i):
        return {name: value[i:i + args.micro_batch_size] for name, value in batch.items()}

    def policy_logps(batch):
        return completion_logps(model, **batch, temperature=args.temperature)[0]  # [10]

    def evaluate(rows):
        ids, _, scores, stopped, _, logps, ref_logps = rollout(rows, args.seed)
        return {"reward": scores.mean().item(), "kl": (logps - ref_logps).sum(-1).mean().item(), "length": sum(map(len, ids)) / len(ids),
                "stopped": stopped.float().mean().item()}

    state["before"], state["beta"] = state["before"] or evaluate(held_out), state.get("beta", args.beta)
    clock = time.time() - state["seconds"]
    bar = tqdm(range(state["step"] + 1, args.max_steps + 1), desc="ppo", initial=state["step"], total=args.max_steps, disable=rank > 0)
    for step in bar:
        # 1. sample: prompts and random numbers follow from seed, step and rank alone, so that a resumed run sees the same ones
        began, picked = time.time(), range((step - 1) * args.batch_size, step * args.batch_size)
        orders = {e: torch.randperm(len(rows), generator=torch.Generator().manual_seed(args.seed + e)).tolist() for e in {i // len(rows) for i in picked}}
        mine = [rows[orders[i // len(rows)][i % len(rows)]] for i in picked][rank::world]
        ids, texts, scores, stopped, batch, old_logps, ref_logps = rollout(mine, args.seed + 10**6 * (step * world + rank))
        sampling_seconds = time.time() - began

        # 2. score: the answer as a whole, less a penalty if it was cut off [3]; then the KL penalty for each of its tokens [1]
        mask = batch["loss_mask"][:, 1:]  # [B, T-1]
        final_scores = scores - args.missing_eos_penalty * ~stopped  # [B]
        rewards = token_rewards(final_scores, old_logps, ref_logps, mask, state["beta"])  # [B, T-1]

        # 3. what the critic expected, the advantages over it, whitened
        with torch.no_grad(), autocast:
            old_values = torch.cat([token_values(model, critic_head, **part(batch, i)) for i in range(0, len(ids), args.micro_batch_size)])
        advantages, returns = generalised_advantages(rewards, old_values, mask, args.gamma, args.lam)
        raw_advantages, advantages = advantages, whiten(advantages, mask)

        # 4. epochs of minibatches on these samples, an optimizer step each [7]
        model.train()
        totals, updates = torch.zeros(len(FIGURES), dtype=torch.float64, device=device), 0
        for epoch in range(args.epochs):
            order = torch.randperm(len(ids), generator=torch.Generator().manual_seed(args.seed + step * args.epochs + epoch))
            epoch_kl, minibatches = 0.0, order.tensor_split(args.batch_size // args.minibatch_size)  # as many on every rank
            for minibatch in minibatches:
                tokens = mask[minibatch].sum().double()
                add_over_ranks([tokens])
                figures = torch.zeros(len(FIGURES), dtype=torch.float64, device=device)
                for pick in minibatch.split(args.micro_batch_size):
                    micro = {name: value[pick] for name, value in batch.items()}
                    with autocast:
                        logps = policy_logps(micro)  # [b, T-1]
                    policy, ratio = clipped_loss(logps, old_logps[pick], advantages[pick], mask[pick], tokens.item(), args.epsilon)
                    scaler.scale(policy).backward()
                    # each role's backward runs while its adapter is on: gradient checkpointing computes the forward pass again
                    with common.using(model, "critic"):
                        with autocast:
                            values = token_values(model, critic_head, **micro)  # [b, T-1]
                        value = value_loss(values, old_values[pick], returns[pick], mask[pick], tokens.item(), args.value_epsilon)
                        scaler.scale(args.value_weight * value).backward()
                    log_ratio = ((logps - old_logps[pick]) * mask[pick]).detach()
                    clipped = (ratio > 1 + args.epsilon) & (advantages[pick] > 0) | (ratio < 1 - args.epsilon) & (advantages[pick] < 0)
                    sums = [ratio - 1 - log_ratio, clipped, -logps, ratio]  # k3 of KL(π_old ‖ π); the entropy is exact in the mean only while π is π_old
                    figures += torch.stack([policy.detach(), value.detach()] + [(figure.detach() * mask[pick]).sum() / tokens for figure in sums]).double()
                add_over_ranks([figures])
                for p in weights:
                    p.grad = torch.zeros_like(p) if p.grad is None else p.grad
                add_over_ranks([p.grad for p in weights])
                scaler.unscale_(optimizer)
                grad_norm = torch.nn.utils.clip_grad_norm_(weights, args.max_grad_norm).item()
                if not figures[:2].isfinite().all() or not (math.isfinite(grad_norm) or scaler.is_enabled() and scaler.get_scale() > 1):
                    bar.close()
                    common.fail(f"step {step}: the losses are {figures[:2].tolist()} and the gradient norm {grad_norm} in {settings['dtype']}: most "
                                f"likely --learning-rate {args.learning_rate} is too high"
                                + (", or activations exceed what fp16 can hold" if scaler.is_enabled() else ""))
                learning_rate = schedule.get_last_lr()[0]
                scaler.step(optimizer)
                scaler.update()
                optimizer.zero_grad()
                totals, updates, epoch_kl = totals + figures, updates + 1, epoch_kl + figures[2].item() / len(minibatches)
            if args.target_kl and epoch_kl > args.target_kl:  # [8], by the mean over the epoch, each minibatch measured before its update
                break
        schedule.step()

        # 5. what happened, over all ranks
        variance = [((x - (x * mask).sum() / mask.sum()) ** 2 * mask).sum() / mask.sum() for x in (returns - old_values, returns)]
        kl = (old_logps - ref_logps).sum(-1)  # [B] k1 summed over the answer
        explained = len(ids) * (1 - variance[0] / variance[1].clamp(min=1e-8))
        counts = torch.tensor([len(ids), scores.double().sum(), scores.double().square().sum(), kl.sum(), mask.sum(), (~stopped).sum(), (rewards * mask).sum(),
                               (raw_advantages * mask).sum(), (raw_advantages.square() * mask).sum(), explained], dtype=torch.float64, device=device)
        add_over_ranks([counts])
        count, score, square, kl, length, truncated, total, advantage, spread, explained = counts.tolist()
        seconds = time.time() - began
        metrics = {
            "step": step, "reward": score / count, "reward_std": math.sqrt(max(0.0, square / count - (score / count) ** 2)), "reward_with_kl": total / count,
            "kl": kl / count, "beta": state["beta"], **dict(zip(FIGURES, (totals / updates).tolist())), "explained_variance": explained / count,
            "advantage_std": math.sqrt(max(0.0, spread / length - (advantage / length) ** 2)), "length": length / count, "truncated": truncated / count,
            "updates": updates, "grad_norm": grad_norm, "learning_rate": learning_rate, "sampling_share": sampling_seconds / seconds,
            "tokens_per_second": length / seconds, "peak_memory_gib": peak_memory_gib(device)}
        if args.adaptive_kl:  # [9]
            state["beta"] *= 1 + 0.1 * max(-0.2, min(0.2, metrics["kl"] / args.adaptive_kl - 1))
        bar.set_postfix({name: f"{metrics[name]:.3f}" for name in ("reward", "kl", "explained_variance")}, refresh=False)
        if rank > 0:
            continue
        with open(folder / "metrics.jsonl", "a") as file:
            file.write(json.dumps(metrics) + "\n")
        if step % args.show_every == 0 or step == 1:
            shown = [{"step": step, "prompt": row["prompt"], "completion": text, "reward": value} for row, text, value in zip(mine, texts, scores.tolist())][:8]
            with open(folder / "samples.jsonl", "a") as file:
                file.write("".join(json.dumps(sample) + "\n" for sample in shown))
            lines = [f"\n  {s['reward']:6.2f}  {last_words(s['prompt'])} → {' '.join(s['completion'].split()):.100}" for s in shown[:4]]
            bar.write(f"\nstep {step}:{''.join(lines)}")
        if tracker:
            tracker.log({name: value for name, value in metrics.items() if name != "step"}, step=step)
        if step % args.save_every == 0:
            torch.save(state | {"step": step, "seconds": time.time() - clock} | {name: part.state_dict() for name, part in parts.items()}, folder / "new.pt")
            os.replace(folder / "new.pt", folder / "resume.pt")  # whole or not at all, whenever the run is killed

    # the end: the same held-out prompts once more
    seconds, after = time.time() - clock, evaluate(held_out)
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
