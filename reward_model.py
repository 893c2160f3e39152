"""Reward model: learns from preferences how good an answer is, as one number (Ouyang et al. 2022, arXiv:2203.02155, eq. 1).

A language model whose head is replaced by a scalar one reads a prompt x with an answer y; the scalar at the last token is the reward
r(x, y). In the model of Bradley and Terry (1952) a better answer y_w beats a worse one y_l with probability σ(r(x, y_w) − r(x, y_l)):

    L = −E log σ( r(x, y_w) − r(x, y_l) − m ) + λ E (r(x, y_w) + r(x, y_l))²

m is how far apart the pair should be at least, from a column `margin` if the data has one (Touvron et al. 2023, arXiv:2307.09288, eq. 2). Only
differences count in the first term; the second keeps the rewards around 0 (Eisenstein et al. 2023, arXiv:2312.09244).

Kept from SFT: model, adapter and loop. Dropped: the vocabulary head, the loss mask. DPO has the same loss with a log-ratio as its reward.

    python reward_model.py                                   # the embedded tiny model, about a minute on a laptop
    python reward_model.py --model Qwen/Qwen2.5-0.5B         # 4-bit LoRA on a 16 GB T4, UltraFeedback from the Hub
    python reward_model.py --model runs/sft --dataset pairs.jsonl

Healthy curves: the loss starts near log 2 = 0.693 and falls, the accuracy climbs from 0.5; on human preferences it ends around 0.65 to 0.75. The spread
of the rewards and the logged margin, r(x, y_w) − r(x, y_l), grow steadily. A calibration error
(--eval-every) that grows while the accuracy stands still is over-fitting: lower --epochs or --learning-rate.
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
from transformers import HfArgumentParser

OnOff = Literal["auto", "on", "off"]


def arg(default, help):
    return field(default=default, metadata={"help": help})


@dataclass
class Args:
    model: str = arg("tiny/chat", "Hub name, local folder or saved LoRA adapter to start from")
    dataset: Optional[str] = arg(None, "Hub name or .json, .jsonl or .parquet file (default: tiny/data, for other models trl-lib/ultrafeedback_binarized)")
    split: str = arg("train", "split of a Hub dataset")
    eval_dataset: Optional[str] = arg(None, "held-out pairs, like --dataset (default: rows kept out of it that share no prompt with the rest)")
    eval_size: Optional[int] = arg(None, "number of held-out pairs (default: 100, tiny model 300)")
    centering: float = arg(0.01, "λ, the weight of the term that keeps rewards around 0")
    max_length: int = arg(1024, "longest prompt + answer, in tokens; longer pairs are dropped, as half an answer deserves another reward")
    batch_size: Optional[int] = arg(None, "pairs in an optimizer step, over all micro-batches and GPUs (default: 32, tiny model 16)")
    micro_batch_size: Optional[int] = arg(None, "pairs in a forward pass; changes speed and memory, not the result (default: 2, tiny model 16)")
    learning_rate: Optional[float] = arg(None, "highest learning rate (default: 1e-4, tiny model 1e-3)")
    warmup_ratio: float = arg(0.1, "share of the steps in which the learning rate rises, before it falls along a cosine")
    max_grad_norm: float = arg(1.0, "longer gradients are scaled down to this norm")
    epochs: Optional[int] = arg(None, "passes over the pairs (default: 1, tiny model 3)")
    max_steps: int = arg(500, "most optimizer steps, even if the epochs are not over (0: no limit)")
    lora_rank: int = arg(16, "rank of new LoRA matrices; an adapter given as --model keeps its own")
    load_in_4bit: OnOff = arg("auto", "quantise the frozen base; auto: on CUDA")
    gradient_checkpointing: OnOff = arg("auto", "save memory by computing activations twice; auto: on CUDA")
    eval_every: int = arg(0, "steps between evaluations during training (0: only before and after)")
    save_every: int = arg(50, "steps between savings of what --resume needs")
    seed: int = arg(0, "fixes data order and the initialisation of LoRA and head")
    output_dir: Optional[str] = arg(None, "a new folder (default: runs/reward_model, or the next free one of runs/reward_model-2, ...)")
    resume: Optional[str] = arg(None, "finish the interrupted run in this folder, with the settings it was started with")
    track: Optional[Literal["wandb", "trackio"]] = arg(None, "also send the metrics there")
    show_batch: bool = arg(False, "print one tokenised pair with the tokens at which the rewards are read in green, and exit")


def check(args):
    """Fills in the defaults that depend on the model; refuses flags out of range."""
    tiny = common.is_tiny(args.model)
    if tiny and not args.dataset:
        args.dataset, args.eval_dataset = "tiny/data/preference_train.jsonl", args.eval_dataset or "tiny/data/preference_heldout.jsonl"
    defaults = {"dataset": "trl-lib/ultrafeedback_binarized", "batch_size": 16 if tiny else 32, "micro_batch_size": 16 if tiny else 2,
                "learning_rate": 1e-3 if tiny else 1e-4, "epochs": 3 if tiny else 1, "eval_size": 300 if tiny else 100}
    vars(args).update({name: value for name, value in defaults.items() if getattr(args, name) is None})
    if args.eval_dataset == args.dataset:
        common.fail(f"--eval-dataset {args.dataset} is also what is trained on: leave it out, and some of its rows are held out")
    for names, low, high in (
        ("batch_size micro_batch_size epochs lora_rank eval_size save_every", 1, sys.maxsize), ("max_length", 2, sys.maxsize),
        ("max_steps eval_every seed", 0, sys.maxsize), ("learning_rate max_grad_norm", 1e-9, 1e9), ("centering", 0, 1e3), ("warmup_ratio", 0, 1),
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


def encode_comparison(row, tokenizer, max_length):
    """A row of preferences as ids to score: {"chosen", "rejected", "prompt", "margin", "cut"}, None if it is longer than max_length.

    Both end with the token that ends the answer: what a template writes after it would be missing in an answer that a model sampled.
    """
    margin = 0.0 if row.get("margin") is None else row["margin"]
    if not isinstance(margin, (int, float)) or not math.isfinite(margin):
        raise ValueError(f"the margin must be a finite number, not {margin!r}")
    pair = encode_pair(row, tokenizer, sys.maxsize)  # cuts nothing
    for side in ("chosen", "rejected"):
        mask = pair[side + "_mask"]
        pair[side] = pair[side][:len(mask) - mask[::-1].index(1)]
    if pair["chosen"] == pair["rejected"]:
        raise ValueError("chosen and rejected are the same tokens, so there is nothing to prefer")
    if max(len(pair["chosen"]), len(pair["rejected"])) > max_length:
        return None
    return {"chosen": pair["chosen"], "rejected": pair["rejected"], "prompt": pair["prompt"], "margin": float(margin), "cut": False}


def collate(pairs, pad_id, device):
    """P pairs, padded on the right, as one batch [2P, T]: the chosen answers first, the rejected ones below."""
    rows = [pair[side] for side in ("chosen", "rejected") for pair in pairs]
    width = max(map(len, rows))
    batch = {
        "input_ids": [ids + [pad_id] * (width - len(ids)) for ids in rows],
        "attention_mask": [[1] * len(ids) + [0] * (width - len(ids)) for ids in rows],  # from lengths: pad may be eos
    }
    return {name: torch.tensor(value, device=device) for name, value in batch.items()}


# ---- rewards and the loss ---------------------------------------------------------------------------------

def sequence_rewards(model, input_ids, attention_mask):
    """The reward [B] of each sequence [B, T], read at its last real token, wherever the padding is.

    transformers' own classifier looks for the last token that is not `pad_token_id`: with pad == eos it would read before the eos.
    """
    causal = common.causal_lm(model)
    hidden = causal.base_model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).last_hidden_state  # [B, T, D]
    last = (attention_mask * torch.arange(attention_mask.shape[1], device=attention_mask.device)).argmax(-1)  # [B]
    hidden = hidden[torch.arange(len(hidden), device=hidden.device), last]  # [B, D]
    # a sum of products, as autocast would compute a matmul, and so the rewards, in 16 bits: too coarse to compare close ones
    return (hidden.float() * causal.score.weight.float()).sum(-1)  # [B]


def reward_loss(chosen_rewards, rejected_rewards, margin, centering):
    """The loss of each pair [P] from the rewards and margins, [P] each."""
    preference = -F.logsigmoid(chosen_rewards - rejected_rewards - margin)  # Ouyang eq. 1; with a margin, Touvron eq. 2
    return preference + centering * (chosen_rewards + rejected_rewards) ** 2  # Eisenstein et al.: pairs do not fix the level


def score_comparisons(model, pairs, args, pad_id):
    """Losses, chosen and rejected rewards, as one tensor [3, P]."""
    device = common.causal_lm(model).device
    batch = collate(pairs, pad_id, device)
    with torch.autocast(device.type, common.choose_dtype(device), enabled=device.type == "cuda"):
        chosen, rejected = sequence_rewards(model, **batch).chunk(2)  # [P] each
    margin = torch.tensor([pair["margin"] for pair in pairs], device=device)
    return torch.stack([reward_loss(chosen, rejected, margin, args.centering), chosen, rejected])


def summarise(scores):
    """Mean loss, accuracy and margin, and mean and spread of all rewards, of the scores [3, P] of some pairs."""
    losses, chosen, rejected = scores.double().cpu()
    difference, rewards = chosen - rejected, torch.cat([chosen, rejected])
    accuracy = (difference > 0) + 0.5 * (difference == 0)  # a tie is half right
    return {"loss": losses.mean().item(), "accuracy": accuracy.double().mean().item(), "margin": difference.mean().item(),
            "reward_mean": rewards.mean().item(), "reward_spread": rewards.std(correction=0).item()}


def calibration(difference, bins=5):
    """Does σ(margin) say how often the model is right? Expected calibration error, and (from, to, pairs, predicted, observed) of each bin.

    difference [P] holds r_w − r_l. The preferred answer of a pair is the one of higher reward, predicted to be the better one with probability
    σ(|difference|), from 0.5 to 1; observed is how often it is. The error is the mean gap of the two over the bins, weighted by their pairs.
    """
    predicted, right = difference.abs().sigmoid(), (difference > 0).double() + 0.5 * (difference == 0)
    index = ((predicted - 0.5) * 2 * bins).long().clamp(max=bins - 1)
    rows = [(0.5 + 0.5 * b / bins, 0.5 + 0.5 * (b + 1) / bins, int((index == b).sum()), predicted[index == b].mean().item(), right[index == b].mean().item())
            for b in range(bins) if (index == b).any()]
    return sum(count * abs(p - o) for _, _, count, p, o in rows) / len(difference), rows


# ---- the run ----------------------------------------------------------------------------------------------

@torch.no_grad()
def evaluate(model, pairs, args, pad_id, rank, world):
    """The summary and the scores [3, P] of the held-out pairs, which the ranks share between them."""
    scores = torch.zeros(3, len(pairs), dtype=torch.float64, device=common.causal_lm(model).device)
    model.eval()
    for i in range(rank * args.micro_batch_size, len(pairs), world * args.micro_batch_size):
        scores[:, i:i + args.micro_batch_size] = score_comparisons(model, pairs[i:i + args.micro_batch_size], args, pad_id).double()
    model.train()
    add_over_ranks([scores])
    return summarise(scores) | {"calibration_error": calibration((scores[1] - scores[2]).cpu())[0]}, scores.cpu()


def pad_apart(tokenizer):
    """Gives a tokenizer that is saved a pad token that ends no answer, as transformers' classifier reads at the last token that is not padding."""
    ends = {tokenizer.eos_token_id, common.end_of_turn_id(tokenizer)}
    others = [token for i, token in sorted(tokenizer.added_tokens_decoder.items()) if i not in ends]
    if tokenizer.pad_token_id in ends and others:
        tokenizer.pad_token = next((token.content for token in others if "pad" in token.content), others[0].content)


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
        return encode_rows(rows, lambda row: encode_comparison(row, tokenizer, max_length), ("chosen", "rejected"), source, max_length)

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
            *ids, last = pairs[0][side]
            print(f"\n{side}:\n{tokenizer.decode(ids)}\033[32m{tokenizer.decode([last])}\033[0m")
        return

    # 2. model, optimizer, schedule
    folder = Path(args.resume) if args.resume else new_folder(args.output_dir, "runs/reward_model") if rank == 0 else None
    torch.manual_seed(args.seed)
    model = common.load_model(args.model, load_in_4bit=args.load_in_4bit, lora_rank=args.lora_rank, gradient_checkpointing=args.gradient_checkpointing,
                              task="SEQ_CLS")
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
    state = {"step": 0, "seconds": 0.0, "before": None}
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
        tracker.init(project="reward_model", name=folder.name, config=asdict(args))
    settings = {"method": "reward_model", "model": args.model, "dataset": args.dataset, **common.describe(model)}
    for name, value in (settings | {"pairs": f"{len(pairs)}, and {len(held_out)} held out", "results": folder,
                                    "steps": f"{steps} of {args.batch_size} pairs, {per_epoch} an epoch"}).items():
        print(f"{name:>24}  {value}")

    # 4. the start, to compare the end with
    if state["before"] is None:
        state["before"], _ = evaluate(model, held_out, args, pad_id, rank, world)
    clock = time.time() - state["seconds"]
    model.train()
    bar = tqdm(range(state["step"] + 1, steps + 1), desc="reward_model", initial=state["step"], total=steps, disable=rank > 0)
    for step in bar:
        # 5. the pairs of a step follow from the seed and its number alone, so that a resumed run sees the same ones
        began, (epoch, index) = time.time(), divmod(step - 1, per_epoch)
        order = torch.randperm(len(pairs), generator=torch.Generator().manual_seed(args.seed + epoch)).tolist()
        window = [pairs[i] for i in order[index * args.batch_size:(index + 1) * args.batch_size]]
        mine = range(rank, len(window), world)

        # 6. gradients add up over micro-batches and ranks; a pair weighs 1 / window, so the sum is the gradient of the whole batch
        scores = torch.zeros(3, len(window), dtype=torch.float64, device=device)
        for i in range(0, len(mine), args.micro_batch_size):
            part = mine[i:i + args.micro_batch_size]
            scored = score_comparisons(model, [window[j] for j in part], args, pad_id)
            scaler.scale(scored[0].sum() / len(window)).backward()
            scores[:, part.start:part.stop:world] = scored.detach().double()
        for p in weights:  # a rank whose share of the last window is empty has no gradients, but takes part in the sum
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
        add_over_ranks([scores])
        add_over_ranks([p.grad for p in weights])
        means = summarise(scores)

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
        evaluated = evaluate(model, held_out, args, pad_id, rank, world)[0] if args.eval_every and step % args.eval_every == 0 else {}
        metrics = {"step": step, **means, "grad_norm": grad_norm, "learning_rate": learning_rate, "tokens_per_second": tokens / seconds,
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

    # 9. the end: the same held-out pairs once more, how far its certainty can be trusted, and where it was most wrong
    seconds = time.time() - clock
    after, scores = evaluate(model, held_out, args, pad_id, rank, world)
    if tracker:
        tracker.finish()
    if rank > 0:
        return
    difference = scores[1] - scores[2]
    print("\nheld out             before     after\n" + "\n".join(f"{name:<18}{state['before'][name]:9.3f} {after[name]:9.3f}" for name in after))
    print("\nσ(margin)     pairs  predicted  observed")
    for low, high, count, predicted, observed in calibration(difference)[1]:
        print(f"{low:.1f} to {high:.1f}  {count:7}  {predicted:9.3f} {observed:9.3f}")
    worst = difference.argmin().item()
    if difference[worst] < 0:
        print(f"\nmost confidently wrong, by {-difference[worst]:.3f}:")
        for side, reward in (("chosen", scores[1][worst]), ("rejected", scores[2][worst])):
            print(f"{side} at {reward:.3f}: {' '.join(tokenizer.decode(held_out[worst][side], skip_special_tokens=True).split())}")
    model.save_pretrained(folder, selected_adapters=["default"], save_embedding_layers=False)
    pad_apart(tokenizer)
    tokenizer.save_pretrained(folder)
    trained = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    speed = sum(m["tokens_per_second"] for m in trained) / len(trained)
    summary = settings | {"steps": steps, "seconds": round(seconds, 1), "tokens_per_second": round(speed), "peak_memory_gib": round(peak_memory_gib(device), 2),
                          "before": state["before"], "after": after}
    (folder / "summary.json").write_text(json.dumps(summary, indent=2))
    print(f"\nresults: {folder}\ncurves:  python plot.py {folder}")


if __name__ == "__main__":
    train(parse_args(Args, __doc__))
