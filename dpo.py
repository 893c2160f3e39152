"""DPO: Direct Preference Optimization (Rafailov et al. 2023, arXiv:2305.18290).

Learns from pairs (a prompt x, a better answer y_w, a worse answer y_l) without a reward model and without sampling.
RLHF wants the policy π of highest reward r that stays near a reference: max E r − β KL(π ‖ π_ref), where β is the price of leaving it (eq. 3).
That policy has a closed form, π(y|x) ∝ π_ref(y|x) exp(r(x, y) / β), so r(x, y) = β log π(y|x) / π_ref(y|x) + a term in x alone (eq. 5). In the
Bradley–Terry model of preferences only the difference of two rewards counts, the term in x drops out, and a classification loss is left (eq. 7):

    L = −E log σ( β [log π(y_w|x) − log π_ref(y_w|x)] − β [log π(y_l|x) − log π_ref(y_l|x)] )

Kept from reward modelling: the loss, with the log-ratio in place of the scalar head. Dropped from PPO: reward model, critic and
sampling. `--loss` selects a relative: ipo and hinge, or simpo, orpo and cpo, which need no reference.

    python dpo.py                                            # the embedded tiny model, about a minute on a laptop
    python dpo.py --model Qwen/Qwen2.5-0.5B                  # 4-bit LoRA on a 16 GB T4, UltraFeedback from the Hub
    python dpo.py --model runs/sft --dataset pairs.jsonl     # go on from an SFT adapter, which is then also the reference
    torchrun --nproc-per-node 2 dpo.py --model Qwen/Qwen2.5-7B-Instruct

Healthy curves: the loss starts at log 2 = 0.693 (with --loss dpo) and falls, the accuracy climbs from 0.5, the margin grows steadily. The log-prob of
the chosen answer often falls too, only less than that of the rejected one: the loss asks for nothing but their difference.
A KL that keeps growing while the accuracy stands still is over-optimisation: raise --beta or stop earlier.
"""
import importlib.util
import json
import math
import os
import resource
import sys
import time
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal, Optional

import common  # first, because it quiets what the others import
import datasets
import pyarrow.parquet
import torch
import torch.distributed as dist
import torch.nn.functional as F
from tqdm import tqdm
from transformers import GenerationConfig, HfArgumentParser

FIGURES = ("loss", "margin", "accuracy", "chosen_reward", "rejected_reward", "chosen_logp", "rejected_logp")
REFERENCE_FREE = ("simpo", "orpo", "cpo")
OnOff = Literal["auto", "on", "off"]


def arg(default, help):
    return field(default=default, metadata={"help": help})


@dataclass
class Args:
    model: str = arg("tiny/chat", "Hub name, local folder or saved LoRA adapter to start from")
    dataset: Optional[str] = arg(None, "Hub name or .json, .jsonl or .parquet file (default: tiny/data, for other models trl-lib/ultrafeedback_binarized)")
    split: str = arg("train", "split of a Hub dataset")
    eval_dataset: Optional[str] = arg(None, "held-out pairs, like --dataset (default: rows kept out of it that share no prompt with the rest)")
    eval_size: int = arg(100, "number of held-out pairs")
    loss: Literal["dpo", "ipo", "hinge", "simpo", "orpo", "cpo"] = arg("dpo", "which preference loss")
    beta: Optional[float] = arg(None, "pull towards the reference, or the scale of a loss without one (default: 0.1, simpo 2, tiny model 2)")
    gamma: Optional[float] = arg(None, "simpo only: the margin γ that the rewards must exceed (default: 1)")
    label_smoothing: float = arg(0.0, "dpo only: the share of pairs assumed to be labelled the wrong way round")
    max_length: int = arg(1024, "longest prompt + answer, in tokens")
    batch_size: int = arg(32, "pairs in an optimizer step, over all micro-batches and GPUs")
    micro_batch_size: Optional[int] = arg(None, "pairs in a forward pass; changes speed and memory, not the result (default: 2, tiny model 32)")
    learning_rate: Optional[float] = arg(None, "highest learning rate (default: 2e-5, tiny model 1e-3)")
    warmup_ratio: float = arg(0.1, "share of the steps in which the learning rate rises, before it falls along a cosine")
    max_grad_norm: float = arg(1.0, "longer gradients are scaled down to this norm")
    epochs: Optional[int] = arg(None, "passes over the pairs (default: 1, tiny model 2)")
    max_steps: int = arg(500, "most optimizer steps, even if the epochs are not over (0: no limit)")
    lora_rank: int = arg(16, "rank of new LoRA matrices; an adapter given as --model keeps its own")
    load_in_4bit: OnOff = arg("auto", "quantise the frozen base; auto: on CUDA")
    gradient_checkpointing: OnOff = arg("auto", "save memory by computing activations twice; auto: on CUDA")
    eval_every: int = arg(0, "steps between evaluations during training (0: only before and after)")
    save_every: int = arg(50, "steps between savings of what --resume needs")
    max_new_tokens: int = arg(64, "longest answer shown before and after")
    seed: int = arg(0, "fixes data order, LoRA initialisation and shown answers")
    output_dir: Optional[str] = arg(None, "a new folder (default: runs/dpo, or the next free one of runs/dpo-2, runs/dpo-3, ...)")
    resume: Optional[str] = arg(None, "finish the interrupted run in this folder, with the settings it was started with")
    track: Optional[Literal["wandb", "trackio"]] = arg(None, "also send the metrics there")
    show_batch: bool = arg(False, "print one tokenised pair with its trained tokens in green, and exit")


def check(args):
    """Fills in the defaults that depend on the model or the loss; refuses flags out of range or in contradiction."""
    for flag, loss in (("gamma", "simpo"), ("label_smoothing", "dpo")):
        if getattr(args, flag) and args.loss != loss:
            common.fail(f"--{flag.replace('_', '-')} belongs to --loss {loss} and does nothing for --loss {args.loss}")
    tiny = common.is_tiny(args.model)
    if tiny and not args.dataset:
        args.dataset, args.eval_dataset = "tiny/data/preference_train.jsonl", args.eval_dataset or "tiny/data/preference_heldout.jsonl"
    # the tiny model's answers differ in a digit or two: at β = 0.1 it would be cheapest to unlearn ending a wrong answer
    beta = {"simpo": 2.0}.get(args.loss, 2.0 if tiny else 0.1)
    defaults = {"dataset": "trl-lib/ultrafeedback_binarized", "micro_batch_size": 32 if tiny else 2, "learning_rate": 1e-3 if tiny else 2e-5,
                "epochs": 2 if tiny else 1, "beta": beta, "gamma": 1.0 if args.loss == "simpo" else 0.0}
    vars(args).update({name: value for name, value in defaults.items() if getattr(args, name) is None})
    if args.eval_dataset == args.dataset:
        common.fail(f"--eval-dataset {args.dataset} is also what is trained on: leave it out, and some of its rows are held out")
    for names, low, high in (
        ("batch_size micro_batch_size epochs lora_rank eval_size save_every max_new_tokens", 1, sys.maxsize), ("label_smoothing", 0, 0.5),
        ("max_length", 2, sys.maxsize), ("max_steps eval_every seed gamma", 0, sys.maxsize), ("beta learning_rate max_grad_norm", 1e-9, 1e9),
        ("warmup_ratio", 0, 1),
    ):
        for name in names.split():
            if not low <= getattr(args, name) <= high:
                common.fail(f"--{name.replace('_', '-')} {getattr(args, name)} is out of range: from {low} to {high}")
    if args.track and not importlib.util.find_spec(args.track):
        common.fail(f"--track {args.track}: that package is not installed (pip install {args.track})")


# ---- data -------------------------------------------------------------------------------------------------

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


def encode_rows(rows, encode, wanted, source, max_length):
    """Encodes rows, and reports those cut or dropped. A bad row ends the run in a local file; in a Hub dataset it is dropped."""
    examples, notes = [], Counter()
    for number, row in enumerate(rows, 1):
        try:
            if missing := [column for column in wanted if row.get(column) is None]:
                raise ValueError(f"it has no {' and no '.join(missing)}; it has {', '.join(row)}, and wanted are {', '.join(wanted)}")
            example = encode(row)
            note = "dropped as too long for" if example is None else "cut to" if example["cut"] else "within"
            note = f"{note} --max-length {max_length}"
        except ValueError as error:
            if Path(source).suffix in (".json", ".jsonl", ".parquet"):
                common.fail(f"{source}, row {number}: {error}")
            example, note = None, f"dropped, {error}"
        examples += [example] if example else []
        notes[note] += 1
    report = f"{source}, {len(rows)} rows: " + "; ".join(f"{count} {note}" for note, count in notes.items())
    if not examples:
        common.fail(f"{report}: no row is left to use")
    print(report)
    return examples


def encode_pair(row, tokenizer, max_length):
    """A row of preferences as ids and masks: {"chosen", "chosen_mask", "rejected", "rejected_mask", "prompt", "cut"}.

    Strings or lists of messages; the prompt in a column of its own, or whatever chosen and rejected share at their start.
    `chosen` and `rejected` begin with the prompt's ids. None if no answer token fits into max_length; ValueError for an unusable row.
    """
    prompt, chosen, rejected = row.get("prompt"), row["chosen"], row["rejected"]
    if {type(chosen), type(rejected), type(prompt)} - {type(None)} not in ({str}, {list}):  # no prompt, or one of the same type
        raise ValueError("prompt, chosen and rejected must all be strings or all be lists of messages")
    if chosen == rejected:
        raise ValueError("chosen equals rejected, so there is nothing to prefer")
    if isinstance(chosen, str):
        encoded = [common.encode_text(tokenizer, prompt or "", answer) for answer in (chosen, rejected)]
        if not prompt:  # what they share in tokens, not in characters: a cut inside a word would give tokens the model does not know
            shared = common.shared_length(*(ids for ids, _ in encoded))
            encoded = [(ids, [0] * shared + [1] * (len(ids) - shared)) for ids, _ in encoded]
    else:
        prompt = prompt or chosen[:common.shared_length(chosen, rejected)]
        conversations = [answer if answer[:len(prompt)] == prompt else prompt + answer for answer in (chosen, rejected)]
        encoded = [common.encode_chat(tokenizer, messages, first_trained=len(prompt)) for messages in conversations]
    (chosen, chosen_mask), (rejected, rejected_mask) = encoded
    if 1 not in chosen_mask or 1 not in rejected_mask:
        raise ValueError("chosen or rejected holds no answer after the prompt")
    start, excess = min(chosen_mask.index(1), rejected_mask.index(1)), max(len(chosen), len(rejected)) - max_length
    if start == 0 or chosen[:start] != rejected[:start]:
        raise ValueError("chosen and rejected do not answer the same prompt: add it as a column, or let both begin with it")
    # a prompt of max_length tokens or more is dropped. A shorter one loses its start, down to half of max_length; then the answers lose their ends
    cut = max(0, min(excess, start - max_length // 2))
    pair = {"chosen": chosen, "chosen_mask": chosen_mask, "rejected": rejected, "rejected_mask": rejected_mask, "prompt": chosen[:start]}
    pair = {name: ids[cut:cut + max_length] for name, ids in pair.items()}
    fits = start < max_length and 1 in pair["chosen_mask"] and 1 in pair["rejected_mask"]
    return pair | {"cut": excess > 0} if fits else None


def collate(pairs, pad_id, device):
    """P pairs, padded on the right, as one batch [2P, T]: the chosen answers first, the rejected ones below."""
    rows = [(pair[side], pair[side + "_mask"]) for side in ("chosen", "rejected") for pair in pairs]
    width = max(len(ids) for ids, _ in rows)
    batch = {
        "input_ids": [ids + [pad_id] * (width - len(ids)) for ids, _ in rows],
        "attention_mask": [[1] * len(ids) + [0] * (width - len(ids)) for ids, _ in rows],  # from lengths: pad may be eos
        "loss_mask": [mask + [0] * (width - len(mask)) for _, mask in rows],
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


@torch.no_grad()
def exact_kl(hidden, ref_hidden, head, positions=64):
    """KL(π ‖ π_ref) of the next token, over the whole vocabulary: its mean at up to `positions` of the N scored places [N, D] of the data."""
    pick = torch.linspace(0, len(hidden) - 1, min(positions, len(hidden)), device=hidden.device).long()
    logp, ref_logp = ((h[pick].to(head.dtype) @ head.T).float().log_softmax(-1) for h in (hidden, ref_hidden))  # [positions, V]
    return (logp.exp() * (logp - ref_logp)).sum(-1).mean()


# ---- the loss ---------------------------------------------------------------------------------------------

def preference_loss(chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps, chosen_length, rejected_length,
                    loss="dpo", beta=0.1, label_smoothing=0.0, gamma=1.0):
    """Loss, chosen reward and rejected reward of each pair, all [P], from log π(y|x) summed over the answer's tokens, [P].

    The reference's sums are None for simpo, orpo and cpo; the lengths [P] count the summed tokens. TRL 1.16 departs from the
    papers in two: its ipo takes mean log-probs, its cpo the mean NLL over the tokens of the batch.
    """
    if loss == "cpo":  # Xu et al. 2024, arXiv:2401.08417: DPO with a uniform reference, which drops out
        chosen_rewards, rejected_rewards = beta * chosen_logps, beta * rejected_logps
    elif loss in ("simpo", "orpo"):  # the mean log-prob is the reward, so length earns nothing
        chosen_mean, rejected_mean = chosen_logps / chosen_length, rejected_logps / rejected_length
        chosen_rewards, rejected_rewards = beta * chosen_mean, beta * rejected_mean
    else:  # DPO eq. 5: the implicit reward is β log π/π_ref
        chosen_rewards, rejected_rewards = beta * (chosen_logps - ref_chosen_logps), beta * (rejected_logps - ref_rejected_logps)
    margin = chosen_rewards - rejected_rewards  # [P]

    if loss == "dpo":  # eq. 7; with smoothing ε conservative DPO (Mitchell 2023): a label is wrong with probability ε
        losses = -(1 - label_smoothing) * F.logsigmoid(margin) - label_smoothing * F.logsigmoid(-margin)
    elif loss == "ipo":  # Azar et al. 2023, arXiv:2310.12036, eq. 17: log-ratios apart by 1/(2β), not by ever more
        losses = (margin / beta - 1 / (2 * beta)) ** 2
    elif loss == "hinge":  # SLiC's loss (Zhao et al. 2023, arXiv:2305.10425) on DPO's margin, as in Liu et al. 2023, arXiv:2309.06657
        losses = F.relu(1 - margin)
    elif loss == "simpo":  # Meng et al. 2024, arXiv:2405.14734, eq. 6
        losses = -F.logsigmoid(margin - gamma)
    elif loss == "orpo":  # Hong et al. 2024, arXiv:2403.07691, eqs. 6 and 7, with odds = p / (1 − p) and their λ as β
        p_w, p_l = chosen_mean.clamp(max=-1e-6), rejected_mean.clamp(max=-1e-6)  # as a certain answer has infinite odds
        log_odds = (p_w - p_l) - (torch.log1p(-p_w.exp()) - torch.log1p(-p_l.exp()))
        losses = -chosen_mean - beta * F.logsigmoid(log_odds)
    else:  # cpo: the preference loss, and the NLL of the chosen answer to keep it likely
        losses = -F.logsigmoid(margin) - chosen_logps
    return losses, chosen_rewards.detach(), rejected_rewards.detach()


def score_pairs(model, pairs, args, pad_id):
    """Policy and reference on some pairs: the summed loss, the summed FIGURES, and both models' hidden states for `exact_kl`."""
    device = common.causal_lm(model).device
    batch = collate(pairs, pad_id, device)
    with torch.autocast(device.type, common.choose_dtype(device), enabled=device.type == "cuda"):
        logps, hidden = completion_logps(model, **batch)  # [2P, T-1]
        ref_chosen, ref_rejected, ref_hidden = None, None, None
        if args.loss not in REFERENCE_FREE:
            with torch.no_grad(), common.reference(model):
                ref_logps, ref_hidden = completion_logps(model, **batch)
            ref_chosen, ref_rejected = ref_logps.sum(-1).chunk(2)  # [P] each
    (chosen, rejected), lengths = logps.sum(-1).chunk(2), batch["loss_mask"][:, 1:].sum(-1).chunk(2)  # [P] each
    losses, chosen_rewards, rejected_rewards = preference_loss(
        chosen, rejected, ref_chosen, ref_rejected, *lengths, args.loss, args.beta, args.label_smoothing, args.gamma)
    margin = chosen_rewards - rejected_rewards
    accuracy = (margin > 0) + 0.5 * (margin == 0)  # a tie, as at the start, is half right
    figures = torch.stack([losses, margin, accuracy, chosen_rewards, rejected_rewards, chosen, rejected]).detach()  # [FIGURES, P]
    return losses.sum(), figures.double().sum(-1), hidden.detach(), ref_hidden


# ---- the run ----------------------------------------------------------------------------------------------

@torch.no_grad()
def evaluate(model, pairs, args, pad_id, rank, world):
    """Mean loss, margin and accuracy on the held-out pairs, which the ranks share between them."""
    totals = torch.zeros(len(FIGURES), dtype=torch.float64, device=common.causal_lm(model).device)
    model.eval()
    for i in range(rank * args.micro_batch_size, len(pairs), world * args.micro_batch_size):
        totals += score_pairs(model, pairs[i:i + args.micro_batch_size], args, pad_id)[1]
    model.train()
    add_over_ranks([totals])
    return {name: total / len(pairs) for name, total in zip(FIGURES[:3], totals.tolist())}


@torch.no_grad()
def sample_answers(model, tokenizer, prompts, args):
    """One answer a prompt from the model's own distribution: every field is set that its generation_config might set otherwise."""
    config = GenerationConfig(
        do_sample=True, temperature=1.0, top_k=0, top_p=1.0, repetition_penalty=1.0, max_new_tokens=args.max_new_tokens,
        eos_token_id=common.stop_token_ids(tokenizer, model.generation_config), pad_token_id=tokenizer.pad_token_id)
    model.eval()  # in train mode gradient checkpointing drops the cache, and the tokens change
    torch.manual_seed(args.seed)
    ids = [model.generate(input_ids=torch.tensor([prompt], device=model.device), generation_config=config)[0, len(prompt):] for prompt in prompts]
    model.train()
    return [answer.strip() for answer in tokenizer.batch_decode(ids, skip_special_tokens=True)]


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

    # 1. data first: whatever is wrong with it shows before the model is loaded
    tokenizer = common.load_tokenizer(args.model)
    max_length, pad_id = min(args.max_length, tokenizer.model_max_length), tokenizer.pad_token_id

    def read(source, limit):
        rows = load_rows(source, args.split, limit, args.seed)
        return encode_rows(rows, lambda row: encode_pair(row, tokenizer, max_length), ("chosen", "rejected"), source, max_length)

    pairs = read(args.dataset, args.eval_size + args.max_steps * args.batch_size if args.max_steps else sys.maxsize)
    if args.eval_dataset:
        held_out = read(args.eval_dataset, args.eval_size)[:args.eval_size]
    else:  # a random fifth at most
        order = torch.randperm(len(pairs), generator=torch.Generator().manual_seed(args.seed)).tolist()
        held_out = [pairs[i] for i in order[:min(args.eval_size, len(pairs) // 5)]]
        prompts = {tuple(pair["prompt"]) for pair in held_out}
        pairs = [pair for pair in pairs if tuple(pair["prompt"]) not in prompts]
    if not pairs or not held_out:
        common.fail(f"{args.dataset}: too few different prompts to hold some out; add rows, or name an --eval-dataset")
    if args.show_batch:
        for side in ("chosen", "rejected"):
            print(f"\n{side}:\n" + "".join(f"\033[32m{tokenizer.decode([i])}\033[0m" if trained else tokenizer.decode([i])
                                           for i, trained in zip(pairs[0][side], pairs[0][side + "_mask"])))
        return

    # 2. model, optimizer, schedule
    folder = Path(args.resume) if args.resume else new_folder(args.output_dir, "runs/dpo") if rank == 0 else None
    torch.manual_seed(args.seed)
    model = common.load_model(args.model, load_in_4bit=args.load_in_4bit, lora_rank=args.lora_rank, gradient_checkpointing=args.gradient_checkpointing)
    weights = torch.nn.ParameterList(p for p in model.parameters() if p.requires_grad)
    for p in weights if world > 1 else ():
        dist.broadcast(p.data, 0)
    optimizer = torch.optim.AdamW(weights, lr=args.learning_rate, weight_decay=0.0)
    per_epoch = math.ceil(len(pairs) / args.batch_size)
    steps = min(args.epochs * per_epoch, args.max_steps or sys.maxsize)
    warmup = round(args.warmup_ratio * steps)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda n: min((n + 1) / (warmup + 1), 0.5 + 0.5 * math.cos(math.pi * n / steps)))  # n from 0
    # small fp16 gradients would round to 0 without a scale; with bf16 and fp32 the scaler is off and passes everything through
    scaler = torch.amp.GradScaler(device.type, enabled=common.choose_dtype(device) == torch.float16)

    # 3. the state of the run: its start, or where it was interrupted
    parts = {"weights": weights, "optimizer": optimizer, "schedule": schedule, "scaler": scaler}
    state = {"step": 0, "seconds": 0.0, "before": None, "shown": None}
    if args.resume and (folder / "resume.pt").exists():
        state = torch.load(folder / "resume.pt", map_location=device, weights_only=True)
        for name, part in parts.items():
            part.load_state_dict(state.pop(name))  # not kept twice in memory
    if rank == 0:
        lines = (folder / "metrics.jsonl").read_text().splitlines(keepends=True) if state["step"] else []
        (folder / "metrics.jsonl").write_text("".join(line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= state["step"]))
        (folder / "args.json").write_text(json.dumps(asdict(args), indent=2))
    tracker = importlib.import_module(args.track) if args.track and rank == 0 else None
    if tracker:
        tracker.init(project="dpo", name=folder.name, config=asdict(args))
    settings = {"method": "dpo", "model": args.model, "dataset": args.dataset, **common.describe(model)}
    for name, value in (settings | {"pairs": f"{len(pairs)}, and {len(held_out)} held out", "loss": f"{args.loss} with beta {args.beta}",
                                    "steps": f"{steps} of {args.batch_size} pairs, {per_epoch} an epoch", "results": folder}).items():
        print(f"{name:>24}  {value}")

    # 4. the start, to compare the end with
    examples = [pair["prompt"] for pair in held_out[:3]]
    if state["before"] is None:
        state["before"] = evaluate(model, held_out, args, pad_id, rank, world)
        state["shown"] = sample_answers(model, tokenizer, examples, args)
    clock = time.time() - state["seconds"]
    model.train()
    bar = tqdm(range(state["step"] + 1, steps + 1), desc="dpo", initial=state["step"], total=steps, disable=rank > 0)
    for step in bar:
        # 5. the pairs of a step follow from the seed and its number alone, so that a resumed run sees the same ones
        began, (epoch, index) = time.time(), divmod(step - 1, per_epoch)
        order = torch.randperm(len(pairs), generator=torch.Generator().manual_seed(args.seed + epoch)).tolist()
        window = [pairs[i] for i in order[index * args.batch_size:(index + 1) * args.batch_size]]
        mine = window[rank::world]

        # 6. gradients add up over micro-batches and ranks; a pair weighs 1 / window, so the sum is the gradient of the whole batch
        totals, kl = torch.zeros(len(FIGURES), dtype=torch.float64, device=device), {}
        for i in range(0, len(mine), args.micro_batch_size):
            loss, figures, hidden, ref_hidden = score_pairs(model, mine[i:i + args.micro_batch_size], args, pad_id)
            scaler.scale(loss / len(window)).backward()
            totals += figures
            if i == 0 and ref_hidden is not None:  # a diagnostic: one micro-batch is enough
                kl = {"kl": exact_kl(hidden, ref_hidden, common.causal_lm(model).get_output_embeddings().weight).item()}
        for p in weights:
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad  # a rank may be without pairs in the last window
        add_over_ranks([totals])
        add_over_ranks([p.grad for p in weights])
        means = dict(zip(FIGURES, (totals / len(window)).tolist()))

        # 7. unscale, clip, step. Where fp16 gradients overflowed, the scaler skips the step and lowers its scale: no error until it is at 1
        scaler.unscale_(optimizer)
        grad_norm = torch.nn.utils.clip_grad_norm_(weights, args.max_grad_norm).item()
        if not math.isfinite(means["loss"]) or not (math.isfinite(grad_norm) or scaler.is_enabled() and scaler.get_scale() > 1):
            bar.close()
            common.fail(f"step {step}: the loss is {means['loss']} and the gradient norm {grad_norm} in {settings['dtype']}: most likely --learning-rate "
                        f"{args.learning_rate} is too high" + (", or activations exceed what fp16 can hold" if scaler.is_enabled() else ""))
        learning_rate = schedule.get_last_lr()[0]
        scaler.step(optimizer)
        scaler.update()
        schedule.step()
        optimizer.zero_grad()

        # 8. what happened
        seconds, tokens = time.time() - began, sum(len(pair["chosen"]) + len(pair["rejected"]) for pair in window)
        evaluated = evaluate(model, held_out, args, pad_id, rank, world) if args.eval_every and step % args.eval_every == 0 else {}
        metrics = {"step": step, **means, **kl, "grad_norm": grad_norm, "learning_rate": learning_rate, "tokens_per_second": tokens / seconds,
                   "peak_memory_gib": peak_memory_gib(device), **{f"eval_{k}": v for k, v in evaluated.items()}}
        bar.set_postfix({name: f"{means[name]:.3f}" for name in ("loss", "margin", "accuracy")}, refresh=False)
        if rank > 0:
            continue
        with open(folder / "metrics.jsonl", "a") as file:
            file.write(json.dumps(metrics) + "\n")
        if tracker:
            tracker.log({name: value for name, value in metrics.items() if name != "step"}, step=step)
        if step % args.save_every == 0:
            torch.save(state | {"step": step, "seconds": time.time() - clock} | {name: part.state_dict() for name, part in parts.items()}, folder / "new.pt")
            os.replace(folder / "new.pt", folder / "resume.pt")  # whole or not at all, whenever the run is killed

    # 9. the end: the same held-out pairs and prompts once more
    seconds = time.time() - clock
    after, shown = evaluate(model, held_out, args, pad_id, rank, world), sample_answers(model, tokenizer, examples, args)
    if tracker:
        tracker.finish()
    if rank > 0:
        return
    for prompt, old, new in zip(examples, state["shown"], shown):
        print(f"\nprompt: {' '.join(tokenizer.decode(prompt, skip_special_tokens=True).split())}\nbefore: {old}\n after: {new}")
    print("\nheld out    before     after\n" + "\n".join(f"{name:<9}{state['before'][name]:9.3f} {after[name]:9.3f}" for name in after))
    model.save_pretrained(folder, selected_adapters=["default"], save_embedding_layers=False)
    tokenizer.save_pretrained(folder)
    trained = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    speed = sum(m["tokens_per_second"] for m in trained) / len(trained)
    summary = settings | {"steps": steps, "seconds": round(seconds, 1), "tokens_per_second": round(speed), "peak_memory_gib": round(peak_memory_gib(device), 2),
                          "before": state["before"], "after": after}
    (folder / "summary.json").write_text(json.dumps(summary, indent=2))
    print(f"\nresults: {folder}\ncurves:  python plot.py {folder}\ncompare: python evaluate.py {args.model} {folder}")


if __name__ == "__main__":
    train(parse_args(Args, __doc__))
