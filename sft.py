"""SFT: supervised fine-tuning, which turns a model that continues text into one that answers and stops.

Plain next-token prediction on written answers, as in the first stage of InstructGPT (Ouyang et al. 2022, arXiv:2203.02155). Only what
the model shall say is trained on: the assistant turns, each with the token that ends it. The rest of a conversation y is read, not learned:

    L = −1/N Σ log π(y_t | y_<t)        over the N trained tokens of all conversations in an optimizer step

Kept from pretraining: everything. Added: the mask. The mean is over tokens of the whole step, not over conversations or micro-batches, so
neither --micro-batch-size nor packing changes the result. Packing lays several conversations into a row; none of them sees another. Measured on
a CPU it is 7 % faster than rows of one conversation each, sorted by length (GSM8K, Qwen2.5-0.5B of two layers), and no slower on the tiny model.

    python sft.py                                            # the embedded tiny base model, about a minute on a laptop
    python sft.py --model Qwen/Qwen2.5-0.5B                  # 4-bit LoRA on a 16 GB T4, Capybara from the Hub
    python sft.py --model Qwen/Qwen2.5-0.5B --dataset chats.jsonl --neftune-alpha 5
    python sft.py --model Qwen/Qwen2.5-0.5B --lora-rank 0    # all weights, in fp32: 16 bytes each with gradient and Adam moments

A dataset has the columns `messages`, or `prompt` and `completion` (strings or messages), or `instruction`, `input` and `output`, or `text`.

Healthy curves: the loss falls steeply for some dozen steps, while the model learns the form, then slowly. The held-out loss (--eval-every) falls with
it: where it rises again the model learns the rows by heart, and --epochs should be lower. `stopped`, the share of answers that end, should get near 1.
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
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm
from transformers import DynamicCache, HfArgumentParser

FORMATS = (("messages",), ("prompt", "completion"), ("instruction", "output"), ("text",))
OnOff = Literal["auto", "on", "off"]


def arg(default, help):
    return field(default=default, metadata={"help": help})


@dataclass
class Args:
    model: str = arg("tiny/base", "Hub name, local folder or saved LoRA adapter to start from")
    dataset: Optional[str] = arg(None, "Hub name or .json, .jsonl or .parquet file (default: tiny/data, for other models trl-lib/Capybara)")
    split: str = arg("train", "split of a Hub dataset")
    eval_dataset: Optional[str] = arg(None, "held-out rows, like --dataset (default: rows kept out of it that share no prompt with the rest)")
    eval_size: int = arg(100, "number of held-out rows")
    packing: bool = arg(True, "fill rows with whole conversations, up to --max-length; changes speed, not the result (but for the noise of NEFTune)")
    neftune_alpha: float = arg(0.0, "noise on the embeddings in training, which made answers longer and better liked; 5 is usual (0: none)")
    max_length: Optional[int] = arg(None, "longest conversation, and length of a packed row, in tokens (default: 1024, tiny model 128)")
    batch_size: int = arg(32, "conversations in an optimizer step, over all micro-batches and GPUs")
    micro_batch_size: Optional[int] = arg(None, "rows in a forward pass; changes speed and memory, not the result (default: 4, tiny model 32)")
    learning_rate: Optional[float] = arg(None, "highest learning rate (default: 2e-4, with --lora-rank 0 2e-5, tiny model 3e-3 and 1e-3)")
    warmup_ratio: float = arg(0.1, "share of the steps in which the learning rate rises, before it falls along a cosine")
    max_grad_norm: float = arg(1.0, "longer gradients are scaled down to this norm")
    epochs: Optional[int] = arg(None, "passes over the rows (default: 1, tiny model 2)")
    max_steps: int = arg(500, "most optimizer steps, even if the epochs are not over (0: no limit)")
    lora_rank: int = arg(16, "rank of new LoRA matrices, 0 to train all weights; an adapter given as --model keeps its own")
    load_in_4bit: OnOff = arg("auto", "quantise the frozen base; auto: on CUDA")
    gradient_checkpointing: OnOff = arg("auto", "save memory by computing activations twice; auto: on CUDA")
    eval_every: int = arg(0, "steps between evaluations during training (0: only before and after)")
    save_every: int = arg(50, "steps between savings of what --resume needs")
    sample_size: int = arg(32, "held-out prompts answered before and after, to see how many answers end by themselves")
    max_new_tokens: int = arg(128, "longest of these answers")
    seed: int = arg(0, "fixes data order, LoRA initialisation, noise and sampled answers")
    output_dir: Optional[str] = arg(None, "a new folder (default: runs/sft, or the next free one of runs/sft-2, runs/sft-3, ...)")
    resume: Optional[str] = arg(None, "finish the interrupted run in this folder, with the settings it was started with")
    track: Optional[Literal["wandb", "trackio"]] = arg(None, "also send the metrics there")
    show_batch: bool = arg(False, "print one tokenised row with its trained tokens in green, and exit")


def check(args):
    """Fills in the defaults that depend on the model; refuses flags out of range."""
    tiny, full = common.is_tiny(args.model), args.lora_rank == 0
    if tiny and not args.dataset:
        args.dataset, args.eval_dataset = "tiny/data/sft_train.jsonl", args.eval_dataset or "tiny/data/sft_heldout.jsonl"
    defaults = {"dataset": "trl-lib/Capybara", "max_length": 128 if tiny else 1024, "micro_batch_size": 32 if tiny else 4,
                "epochs": 2 if tiny else 1, "learning_rate": (1e-3 if full else 3e-3) if tiny else 2e-5 if full else 2e-4}
    vars(args).update({name: value for name, value in defaults.items() if getattr(args, name) is None})
    if args.eval_dataset == args.dataset:
        common.fail(f"--eval-dataset {args.dataset} is also what is trained on: leave it out, and some of its rows are held out")
    for names, low, high in (
        ("batch_size micro_batch_size epochs eval_size save_every sample_size max_new_tokens", 1, sys.maxsize), ("max_length", 2, sys.maxsize),
        ("max_steps eval_every seed lora_rank", 0, sys.maxsize), ("learning_rate max_grad_norm", 1e-9, 1e9), ("neftune_alpha", 0, 1e3),
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


def encode(row, tokenizer, max_length):
    """A row of any of the FORMATS as {"input_ids", "loss_mask", "prompt", "cut"}, where prompt are the ids to show the model for a sample.

    None if no trained token fits into max_length; ValueError for an unusable row.
    """
    if "messages" in row:
        if not isinstance(row["messages"], list):
            raise ValueError("messages must be a list of messages")
        input_ids, loss_mask = common.encode_chat(tokenizer, row["messages"])
    else:
        if "completion" in row:
            prompt, completion = row["prompt"], row["completion"]
        elif "output" in row:
            if not all(isinstance(row.get(column) or "", str) for column in ("instruction", "input", "output")):
                raise ValueError("instruction, input and output must be strings")
            prompt, completion = "\n\n".join(filter(None, (row["instruction"], row.get("input")))), row["output"]
            if tokenizer.chat_template:
                prompt, completion = [{"role": "user", "content": prompt}], [{"role": "assistant", "content": completion}]
            else:
                prompt += "\n\n"
        else:
            prompt, completion = "", row["text"]
        if {type(prompt), type(completion)} not in ({str}, {list}):
            raise ValueError("prompt and completion must both be strings or both be lists of messages, and text a string")
        if isinstance(prompt, str):  # some datasets write eos into their strings: once is enough
            input_ids, loss_mask = common.encode_text(tokenizer, prompt, completion.removesuffix(tokenizer.eos_token))
        else:
            input_ids, loss_mask = common.encode_chat(tokenizer, prompt + completion, first_trained=len(prompt))
    loss_mask[0] = 0  # nothing comes before the first token; in a packed row another conversation would
    if 1 not in loss_mask:
        raise ValueError("there is no assistant turn to train on")
    # a prompt of max_length tokens or more is dropped. A shorter one loses its start, down to half of max_length; then the conversation loses its end
    start, excess = loss_mask.index(1), len(input_ids) - max_length
    cut = max(0, min(excess, start - max_length // 2))
    shown = start if start > 1 else len(input_ids) // 4 + 1  # plain text has no prompt: its first quarter
    row = {"input_ids": input_ids, "loss_mask": loss_mask, "prompt": input_ids[:shown]}
    row = {name: ids[cut:cut + max_length] for name, ids in row.items()}
    return row | {"cut": excess > 0} if start < max_length else None


def pack(examples, max_length, packing):
    """Lists of examples that share a row of up to `max_length` tokens, one a list without packing; the longest first, so that like goes with like."""
    rows, free = [], []
    for example in sorted(examples, key=lambda example: -len(example["input_ids"])):
        length = len(example["input_ids"])
        fits = next((i for i, room in enumerate(free) if packing and length <= room), None)
        if fits is None:
            rows, free, fits = rows + [[]], free + [max_length], len(rows)
        rows[fits].append(example)
        free[fits] -= length
    return rows


def collate(rows, pad_id, packing, device):
    """Packed rows, padded on the right, as one batch of [B, T] tensors.

    Positions restart with every conversation. For transformers that marks the border: without an attention mask it lets no token
    attend across. Padding restarts too. `lengths` holds at each token the length of its conversation, 0 at padding.
    """
    width = max(sum(len(example["input_ids"]) for example in row) for row in rows)
    batch = {name: [] for name in ("input_ids", "loss_mask", "position_ids", "lengths")}
    for row in rows:
        lengths = [len(example["input_ids"]) for example in row]
        padding = width - sum(lengths)
        batch["input_ids"].append([i for example in row for i in example["input_ids"]] + [pad_id] * padding)
        batch["loss_mask"].append([m for example in row for m in example["loss_mask"]] + [0] * padding)
        batch["position_ids"].append([i for length in [*lengths, padding] for i in range(length)])
        batch["lengths"].append([length for length in lengths for _ in range(length)] + [0] * padding)
    batch = {name: torch.tensor(value, device=device) for name, value in batch.items()}
    return batch | {"attention_mask": None if packing else (batch["lengths"] > 0).long()}  # from lengths: pad may be eos


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


def trainable_head_logps(hidden, head, targets, chunk):
    """The same log-probs [N] for a head that is trained too: it needs its own gradient, so each chunk of logits is computed twice."""
    def logps(h, y):
        logits = h @ head.T  # [C, V]
        return logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1).gather(1, y[:, None])[:, 0]  # [C]
    return torch.cat([checkpoint(logps, h, y, use_reentrant=False) for h, y in zip(hidden.split(chunk), targets.split(chunk))])


def token_logps(model, input_ids, position_ids, attention_mask, loss_mask, lengths, neftune_alpha=0.0):
    """logps [B, T-1]: column t is log p(token t+1 | tokens ≤ t of its conversation), 0 outside the mask; and the token accuracy, a scalar.

    In training, NEFTune (Jain et al. 2023, arXiv:2310.05914) adds uniform noise to the embeddings of a conversation of L tokens, within
    ±α/√(L·D), so that the expected norm of the noise is the same in all of them.
    """
    causal = common.causal_lm(model)
    scored = loss_mask[:, 1:].bool()  # [B, T-1]: position t predicts token t+1
    if not scored.any():
        raise ValueError("a batch without a single trained token")
    embeddings = causal.get_input_embeddings()(input_ids)  # [B, T, D]
    if neftune_alpha and model.training:
        bound = torch.where(lengths > 0, neftune_alpha / (lengths * embeddings.shape[-1]).sqrt(), 0.0)  # [B, T]: none on padding
        embeddings = embeddings + (bound[..., None] * (2 * torch.rand_like(embeddings) - 1)).to(embeddings.dtype)
    hidden = causal.base_model(inputs_embeds=embeddings, position_ids=position_ids, attention_mask=attention_mask, use_cache=False).last_hidden_state
    hidden, targets, head = hidden[:, :-1][scored], input_ids[:, 1:][scored], causal.get_output_embeddings().weight  # [N, D], [N], [V, D]
    chunk = max(1, 2**25 // len(head))  # 128 MiB of fp32 logits at a time
    if head.requires_grad:
        flat = trainable_head_logps(hidden, head, targets, chunk)  # [N]
    else:
        flat = ChunkedLogps.apply(hidden, head, targets, 1.0, chunk)  # [N]
    logps = torch.zeros(scored.shape, dtype=flat.dtype, device=flat.device).masked_scatter(scored, flat)
    return logps, token_accuracy(hidden, targets, head)


@torch.no_grad()
def token_accuracy(hidden, targets, head, positions=256):
    """How often the likeliest token is the right one, at up to `positions` of the N scored places [N, D]."""
    pick = torch.linspace(0, len(hidden) - 1, min(positions, len(hidden)), device=hidden.device).long()
    return ((hidden[pick] @ head.T).argmax(-1) == targets[pick]).float().mean()


@torch.no_grad()
def check_packing(model):
    """Refuses models in which a packed conversation is changed by the one before it, as in one that ignores where positions restart."""
    causal, position_ids = common.causal_lm(model.eval()), torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3]], device=model.device)  # without dropout
    one, other = (causal.base_model(input_ids=torch.tensor([[*first, 4, 5, 6, 7]], device=model.device), position_ids=position_ids, use_cache=False)
                  .last_hidden_state[0, 4:].float() for first in ((0, 1, 2, 3), (9, 8, 7, 6)))  # [4, D]
    if not torch.allclose(one, other, rtol=0, atol=1e-5 * one.abs().max().item()):
        common.fail(f"{type(causal).__name__} cannot keep packed conversations apart: add --no-packing")


# ---- the loss ---------------------------------------------------------------------------------------------

def sft_loss(logps, loss_mask, trained_tokens):
    """−Σ log p / N over the trained tokens: logps [B, T-1], loss_mask [B, T].

    N = `trained_tokens` counts those of the whole optimizer step, of all micro-batches and ranks, so that the gradients of the parts add up
    to that of the whole. A mean of each part would weigh the tokens of short answers more.
    """
    return -(logps * loss_mask[:, 1:]).sum() / trained_tokens  # the first token of a row is predicted by nothing


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

def score_rows(model, rows, args, pad_id):
    """logps, loss mask and token accuracy of some packed rows."""
    device = common.causal_lm(model).device
    batch = collate(rows, pad_id, args.packing, device)
    with torch.autocast(device.type, common.choose_dtype(device), enabled=device.type == "cuda"):
        logps, accuracy = token_logps(model, **batch, neftune_alpha=args.neftune_alpha)
    return logps, batch["loss_mask"], accuracy


@torch.no_grad()
def evaluate(model, examples, args, row_length, pad_id, rank, world):
    """Mean loss a trained token, its exponential, and token accuracy on the held-out rows, which the ranks share between them."""
    totals = torch.zeros(3, dtype=torch.float64, device=common.causal_lm(model).device)
    rows = pack(examples[rank::world], row_length, args.packing)
    model.eval()
    for i in range(0, len(rows), args.micro_batch_size):
        logps, loss_mask, accuracy = score_rows(model, rows[i:i + args.micro_batch_size], args, pad_id)
        trained = loss_mask.sum()
        totals += torch.stack([sft_loss(logps, loss_mask, 1), accuracy * trained, trained]).double()
    model.train()
    add_over_ranks([totals])
    loss, accuracy = (totals[:2] / totals[2]).tolist()
    return {"loss": loss, "perplexity": math.exp(min(loss, 99)), "accuracy": accuracy}


def sample_answers_and_stops(model, tokenizer, prompts, args):
    """One answer at temperature 1 to each prompt, and the share of them that end by themselves."""
    stop_ids, answers = common.stop_token_ids(tokenizer, model.generation_config), []
    for i in range(0, len(prompts), 16):
        answers += sample(model, prompts[i:i + 16], 1, args.max_new_tokens, 1.0, stop_ids, tokenizer.pad_token_id, args.seed + i)
    return tokenizer.batch_decode(answers, skip_special_tokens=True), sum(ids[-1] in stop_ids for ids in answers) / len(answers)


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
        wanted = next((columns for columns in FORMATS if all(rows[0].get(column) is not None for column in columns)), None)
        if wanted is None:
            common.fail(f"{source}, row 1, has the columns {', '.join(rows[0])}: wanted are {', or '.join(' and '.join(columns) for columns in FORMATS)}")
        return encode_rows(rows, lambda row: encode({c: row[c] for c in (*wanted, "input") if c in row}, tokenizer, max_length), wanted, source, max_length)

    examples = read(args.dataset, args.eval_size + args.max_steps * args.batch_size if args.max_steps else sys.maxsize)
    if args.eval_dataset:
        held_out = read(args.eval_dataset, args.eval_size)[:args.eval_size]
    else:  # a random fifth at most
        order = torch.randperm(len(examples), generator=torch.Generator().manual_seed(args.seed)).tolist()
        held_out = [examples[i] for i in order[:min(args.eval_size, len(examples) // 5)]]
        prompts = {tuple(example["prompt"]) for example in held_out}
        examples = [example for example in examples if tuple(example["prompt"]) not in prompts]
    if not examples or not held_out:
        common.fail(f"{args.dataset}: too few different prompts to hold some out; add rows, or name an --eval-dataset")
    if args.show_batch:
        print("".join(f"\033[32m{tokenizer.decode([i])}\033[0m" if trained else tokenizer.decode([i])
                      for i, trained in zip(examples[0]["input_ids"], examples[0]["loss_mask"])))
        return

    # 2. model, optimizer, schedule
    folder = Path(args.resume) if args.resume else new_folder(args.output_dir, "runs/sft") if rank == 0 else None
    torch.manual_seed(args.seed)
    model = common.load_model(args.model, load_in_4bit=args.load_in_4bit, lora_rank=args.lora_rank, gradient_checkpointing=args.gradient_checkpointing)
    if args.packing:
        check_packing(model)
    weights = torch.nn.ParameterList(p for p in model.parameters() if p.requires_grad)
    for p in weights if world > 1 else ():
        dist.broadcast(p.data, 0)
    optimizer = torch.optim.AdamW(weights, lr=args.learning_rate, weight_decay=0.0)
    per_epoch = math.ceil(len(examples) / args.batch_size)
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
        tracker.init(project="sft", name=folder.name, config=asdict(args))
    settings = {"method": "sft", "model": args.model, "dataset": args.dataset, **common.describe(model)}
    for name, value in (settings | {"conversations": f"{len(examples)}, and {len(held_out)} held out", "results": folder,
                                    "steps": f"{steps} of {args.batch_size} conversations, {per_epoch} an epoch"}).items():
        print(f"{name:>24}  {value}")

    # 4. the start, to compare the end with
    prompts = [example["prompt"] for example in held_out[:args.sample_size]]
    if state["before"] is None:
        state["before"] = evaluate(model, held_out, args, max_length, pad_id, rank, world)
        state["shown"], state["before"]["stopped"] = sample_answers_and_stops(model, tokenizer, prompts, args)
    clock = time.time() - state["seconds"]
    model.train()
    bar = tqdm(range(state["step"] + 1, steps + 1), desc="sft", initial=state["step"], total=steps, disable=rank > 0)
    for step in bar:
        # 5. the conversations of a step, and the noise on them, follow from the seed and its number alone: a resumed run sees the same
        began, (epoch, index) = time.time(), divmod(step - 1, per_epoch)
        order = torch.randperm(len(examples), generator=torch.Generator().manual_seed(args.seed + epoch)).tolist()
        window = [examples[i] for i in order[index * args.batch_size:(index + 1) * args.batch_size]]
        rows = pack(window[rank::world], max_length, args.packing)
        torch.manual_seed(args.seed + step * world + rank)

        # 6. gradients add up over micro-batches and ranks; each loss is divided by the trained tokens of the whole step
        trained = sum(sum(example["loss_mask"]) for example in window)
        totals = torch.zeros(3, dtype=torch.float64, device=device)  # loss, accuracy, and micro-batches it is the mean over
        for i in range(0, len(rows), args.micro_batch_size):
            logps, loss_mask, accuracy = score_rows(model, rows[i:i + args.micro_batch_size], args, pad_id)
            loss = sft_loss(logps, loss_mask, trained)
            scaler.scale(loss).backward()
            totals += torch.stack([loss.detach(), accuracy, torch.ones_like(accuracy)]).double()
        for p in weights:  # a rank whose share of the last window is empty has no gradients, but takes part in the sum
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
        add_over_ranks([totals])
        add_over_ranks([p.grad for p in weights])
        loss, accuracy = totals[0].item(), (totals[1] / totals[2]).item()

        # 7. unscale, clip, step. Where fp16 gradients overflowed, the scaler skips the step and lowers its scale: no error until it is at 1
        scaler.unscale_(optimizer)
        grad_norm = torch.nn.utils.clip_grad_norm_(weights, args.max_grad_norm).item()
        if not math.isfinite(loss) or not (math.isfinite(grad_norm) or scaler.is_enabled() and scaler.get_scale() > 1):
            bar.close()
            common.fail(f"step {step}: the loss is {loss} and the gradient norm {grad_norm} in {settings['dtype']}: most likely --learning-rate "
                        f"{args.learning_rate} is too high" + (", or activations exceed what fp16 can hold" if scaler.is_enabled() else ""))
        learning_rate = schedule.get_last_lr()[0]
        scaler.step(optimizer)
        scaler.update()
        schedule.step()
        optimizer.zero_grad()

        # 8. what happened
        seconds, tokens = time.time() - began, sum(len(example["input_ids"]) for example in window)
        evaluated = evaluate(model, held_out, args, max_length, pad_id, rank, world) if args.eval_every and step % args.eval_every == 0 else {}
        metrics = {"step": step, "loss": loss, "perplexity": math.exp(min(loss, 99)), "accuracy": accuracy, "grad_norm": grad_norm,
                   "learning_rate": learning_rate, "tokens_per_second": tokens / seconds, "trained_tokens_per_second": trained / seconds,
                   "peak_memory_gib": peak_memory_gib(device), **{f"eval_{k}": v for k, v in evaluated.items()}}
        bar.set_postfix({"loss": f"{loss:.3f}", "accuracy": f"{accuracy:.3f}"}, refresh=False)
        if rank > 0:
            continue
        with open(folder / "metrics.jsonl", "a") as file:
            file.write(json.dumps(metrics) + "\n")
        if tracker:
            tracker.log({name: value for name, value in metrics.items() if name != "step"}, step=step)
        if step % args.save_every == 0:
            torch.save(state | {"step": step, "seconds": time.time() - clock} | {name: part.state_dict() for name, part in parts.items()}, folder / "new.pt")
            os.replace(folder / "new.pt", folder / "resume.pt")  # whole or not at all, whenever the run is killed

    # 9. the end: the same held-out rows and prompts once more
    seconds, after = time.time() - clock, evaluate(model, held_out, args, max_length, pad_id, rank, world)
    shown, after["stopped"] = sample_answers_and_stops(model, tokenizer, prompts, args)
    if tracker:
        tracker.finish()
    if rank > 0:
        return
    for prompt, old, new in list(zip(prompts, state["shown"], shown))[:3]:
        prompt, old, new = (" ".join(text.split()) for text in (tokenizer.decode(prompt, skip_special_tokens=True), old, new))
        print(f"\nprompt: {prompt}\nbefore: {old}\n after: {new}")
    print("\nheld out      before     after\n" + "\n".join(f"{name:<11}{state['before'][name]:9.3f} {after[name]:9.3f}" for name in after))
    model.save_pretrained(folder, **({"selected_adapters": ["default"], "save_embedding_layers": False} if args.lora_rank else {}))
    tokenizer.save_pretrained(folder)
    trained = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    speed = sum(m["tokens_per_second"] for m in trained) / len(trained)
    summary = settings | {"steps": steps, "seconds": round(seconds, 1), "tokens_per_second": round(speed), "peak_memory_gib": round(peak_memory_gib(device), 2),
                          "before": state["before"], "after": after}
    (folder / "summary.json").write_text(json.dumps(summary, indent=2))
    print(f"\nresults: {folder}\ncurves:  python plot.py {folder}\ncompare: python evaluate.py {args.model} {folder}\ngo on:   python dpo.py --model {folder}")


if __name__ == "__main__":
    train(parse_args(Args, __doc__))
