"""Reward model: learns from preferences how good an answer is, as one number.

A language model with a scalar in place of its head reads a prompt x and an answer y; the scalar at
the last token is the reward r(x, y). Bradley and Terry (1952): a better answer y_w beats a worse
one y_l with probability σ(r(x, y_w) − r(x, y_l)). The loss is minus its log, with two additions:

    loss = −log σ( r(x, y_w) − r(x, y_l) − m )  +  λ (r(x, y_w) + r(x, y_l))²

Without m and λ it is eq. 1 of Ouyang et al. 2022, arXiv:2203.02155, for two answers. m, the data's
column `margin` if it has one, says how far apart a pair should be (Touvron et al. 2023,
arXiv:2307.09288, eq. 2). Only differences count in the first term; the second keeps the rewards
around 0, and λ is small (Eisenstein et al. 2023, arXiv:2312.09244).

Kept from SFT: the model, the adapter, the loop. Dropped: the head over the vocabulary and the loss
mask. DPO, the next script, has the same loss, with a log-ratio of probabilities for a reward.

    python reward_model.py                               # the embedded tiny model, on a laptop
    python reward_model.py --model Qwen/Qwen2.5-0.5B     # 4-bit LoRA on a 16 GB T4
    python reward_model.py --model runs/sft --dataset pairs.jsonl
    python ppo.py --reward runs/reward_model             # what it is for

What to watch: the loss starts near log 2 = 0.693 and falls, the accuracy climbs from 0.5; on human
preferences it ends around 0.65 to 0.75. The spread of the rewards grows, and so does the logged
margin, which is r(x, y_w) − r(x, y_l), not m. A held-out loss (--eval-every) that rises while the
accuracy stands still is over-fitting.

Shapes: P pairs (of a micro-batch, a step or a file) are B = 2P sequences of T tokens, the chosen
ones first; L of the T columns hold tokens; D is the model's width.
"""
import argparse
import hashlib
import importlib
import json
import math
import operator
import time
from pathlib import Path

import filelock
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

import common

flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
add = flags.add_argument
add("--model", default="tiny/chat", help="Hub name, local folder or LoRA adapter to start from")
add("--dataset", default="trl-lib/ultrafeedback_binarized", help="Hub name[:config], or a file")
add("--split", default="train", help="of a Hub dataset")
add("--columns", **common.COLUMNS, help="other names of columns: prompt=query completion=reply")
add("--chat-template", help="file with a chat template, in place of the model's own")
add("--template-arguments", **common.VARIABLES, help="variables that the chat template reads")
add("--eval-dataset", help="held-out pairs (without it, some are kept out of --dataset)")
add("--eval-size", type=common.count, default=100, help="held-out pairs")
add("--centering", type=common.weight, default=0.01, help="λ, keeps the rewards around 0")
add("--max-length", type=common.count, default=1024, help="pairs with more tokens are dropped")
add("--batch-size", type=common.count, default=32, help="pairs per optimizer step")
add("--micro-batch-size", type=common.count, default=2, help="pairs per forward pass")
add("--learning-rate", type=common.positive, default=1e-4, help="the highest: it rises, then falls")
add("--epochs", type=common.count, default=1, help="passes over the pairs")
add("--max-steps", type=common.count, default=500, help="optimizer steps at most")
add("--lora-rank", **common.LORA_RANK, type=common.count)
add("--load-in-4bit", **common.ON_GPU, help="quantise the frozen base")
add("--gradient-checkpointing", **common.ON_GPU, help="compute activations twice, keep fewer")
add("--eval-every", type=common.natural, default=0, help="steps between evaluations; 0: none")
add("--save-every", type=common.count, default=50, help="steps between savings")
add("--seed", type=common.natural, default=0, help="of data order, LoRA matrices and head")
add("--track", choices=["wandb", "trackio"], help="also send the metrics there")
add("--output-dir", default="runs/reward_model", help="the same command goes on where it stopped")
TINY = dict(dataset="tiny/data/preference_train.jsonl", epochs=3, batch_size=16,
            eval_dataset="tiny/data/preference_heldout.jsonl", eval_size=300, micro_batch_size=16,
            learning_rate=1e-3)


# ---- data: two answers to a prompt, as token ids -------------------------------------------------

def encode_comparison(row, tokenizer, max_length):
    """{"chosen": example, "rejected": example, "prompt": ids, "margin": m, "length": of the longer}

    Each ends with the token that ends its answer, as a sampled one does. What is longer than
    max_length is refused: half an answer deserves another reward.
    """
    chosen, rejected = common.encode_preference(tokenizer, row)
    prompt = chosen[0][0] + chosen[1][0]  # the pieces are the head, its rest, and the answer
    pair = {"prompt": prompt, "margin": float(row.get("margin", 0)), "length": 0}
    for side, pieces in ("chosen", chosen), ("rejected", rejected):
        ids = [token for piece, _ in pieces for token in piece]
        if len(ids) > max_length:
            raise ValueError(f"it is longer than {max_length} tokens")
        pair[side] = {"input_ids": ids, "attention_mask": [1] * len(ids)}
        pair["length"] = max(pair["length"], len(ids))
    if not math.isfinite(pair["margin"]):
        raise ValueError(f"the margin is {pair['margin']}")
    return pair


def collate(examples, pad_id, device):
    """B examples as [B, T] tensors, padded on the right; masks are 0 there, even if pad is eos."""
    batch = {}
    for name in examples[0]:
        padding = pad_id if name == "input_ids" else 0
        rows = [torch.tensor(example[name]) for example in examples]
        batch[name] = pad_sequence(rows, batch_first=True, padding_value=padding).to(device)
    return batch


# ---- the method ----------------------------------------------------------------------------------

def sequence_rewards(model, batch, head):
    """The reward of each sequence, [B], read at its last real token; padding is on the right."""
    used = batch["attention_mask"].any(0)  # [T]: the L columns that are not padding in every row
    inputs = {name: batch[name][:, used] for name in ("input_ids", "attention_mask")}  # [B, L]
    hidden = common.causal_lm(model).base_model(**inputs, use_cache=False)[0]  # [B, L, D]
    last = inputs["attention_mask"].sum(-1) - 1  # [B]
    hidden = hidden[torch.arange(len(hidden)), last]  # [B, D]
    # not `@`, which autocast would round to 16 bits: too coarse to compare
    return (hidden.float() * head.weight.float()).sum(-1)  # [B]


def reward_loss(chosen, rejected, m, centering):
    """The loss of each pair [P], from its rewards and its m, [P] each."""
    preference = -F.logsigmoid(chosen - rejected - m)  # Ouyang eq. 1; m: Touvron eq. 2
    return preference + centering * (chosen + rejected) ** 2  # pairs alone do not fix the level


def score_comparisons(model, pairs, args, pad_id):
    """Losses, chosen and rejected rewards of P pairs: [3, P]."""
    examples = [pair["chosen"] for pair in pairs] + [pair["rejected"] for pair in pairs]
    batch = collate(examples, pad_id, model.device)
    head = common.causal_lm(model).score  # the scalar: weight [1, D]
    with common.autocast(model):
        chosen, rejected = sequence_rewards(model, batch, head).chunk(2)  # [P] each
    m = torch.tensor([pair["margin"] for pair in pairs], device=chosen.device)  # [P]
    return torch.stack([reward_loss(chosen, rejected, m, args.centering), chosen, rejected])


def describe(scores):
    """What is logged of the scores [3, P] of some pairs."""
    losses, chosen, rejected = scores
    right = (chosen > rejected) + 0.5 * (chosen == rejected)  # a tie is half right
    rewards = torch.cat([chosen, rejected])
    return {"loss": losses.mean().item(), "accuracy": right.mean().item(),
            "margin": (chosen - rejected).mean().item(), "reward": rewards.mean().item(),
            "reward_spread": rewards.std(correction=0).item()}


# ---- the run -------------------------------------------------------------------------------------

@torch.no_grad()
def evaluate(model, pairs, args, pad_id):
    """The scores [3, P] of held-out pairs, which the processes share between them."""
    model.eval()
    scores = torch.zeros(3, len(pairs), dtype=torch.float64, device=model.device)
    mine = list(range(len(pairs)))[common.RANK::common.WORLD]
    for i in range(0, len(mine), args.micro_batch_size):
        rows = mine[i:i + args.micro_batch_size]
        scores[:, rows] = score_comparisons(model, [pairs[k] for k in rows], args, pad_id).double()
    sum_over_processes([scores])
    model.train()
    return scores


def show_worst(tokenizer, pairs, scores):
    """The pair in which the worse answer leads by most: often it is the label that is wrong."""
    margins = scores[1] - scores[2]  # [P]
    worst = margins.argmin().item()
    if margins[worst] < 0:
        print(f"\nmost confidently wrong, by {-margins[worst]:.3f}:")
        for side in "chosen", "rejected":
            ids = pairs[worst][side]["input_ids"]
            text = common.visible(tokenizer.decode(ids, skip_special_tokens=True))
            print(f"{side:>9}: {' '.join(text.split())}")


def pad_apart(tokenizer):
    """Sets a pad token that ends no answer: transformers reads rewards right before the pads."""
    ends = {tokenizer.eos_token_id, common.end_of_turn_id(tokenizer)}
    others = [str(x) for i, x in sorted(tokenizer.added_tokens_decoder.items()) if i not in ends]
    if tokenizer.pad_token_id in ends and others:
        tokenizer.pad_token = next((name for name in others if "pad" in name), others[0])


def train(args):
    # 1. Data first: what is wrong with it shows before the model is loaded.
    tokenizer = common.load_tokenizer(args.model, args.chat_template, args.template_arguments)
    pad_id = tokenizer.pad_token_id
    pairs, held_out = common.load_examples(
        args, encode_comparison, tokenizer, limit=args.max_steps * args.batch_size)
    for side in "chosen", "rejected":  # the reward is read at the last token
        ids = pairs[0][side]["input_ids"]
        common.show(tokenizer, ids, [0] * (len(ids) - 1) + [1])

    # 2. A frozen base, with LoRA matrices and a scalar head: they alone are trained.
    torch.manual_seed(args.seed)
    model = common.load_model(
        args.model, args.load_in_4bit, args.lora_rank, args.gradient_checkpointing, task="SEQ_CLS")
    weights = {name: p for name, p in model.named_parameters() if p.requires_grad}
    # `update` sets the learning rate.
    optimizer = torch.optim.AdamW(weights.values(), weight_decay=0.0)
    scaler = common.grad_scaler(model)  # for fp16 (a T4), where small gradients round to 0
    print(common.settings(model))

    # 3. Where the run stands: at its start, or where it was interrupted.
    open_run(args, [pairs, held_out])
    state = restore(args, weights, optimizer, scaler)
    if "before" not in state:
        state["before"] = describe(evaluate(model, held_out, args, pad_id))

    # the order follows from the seed, so that a run that goes on sees the same batches
    generator = torch.Generator().manual_seed(args.seed)
    order = [torch.randperm(len(pairs), generator=generator) for epoch in range(args.epochs)]
    batches = torch.cat(order).split(args.batch_size)[:args.max_steps]
    progress = tqdm(range(state["step"] + 1, len(batches) + 1), initial=state["step"],
                    total=len(batches), disable=common.RANK > 0)
    for step in progress:
        # 4. The gradients of micro-batches and processes add up to that of the batch, because each
        #    pair counts 1 / len(batch), wherever it is computed. Similar lengths share a pass.
        began = time.time()
        batch = sorted([pairs[i] for i in batches[step - 1]], key=operator.itemgetter("length"))
        scores = torch.zeros(3, len(batch), dtype=torch.float64, device=model.device)
        mine = list(range(len(batch)))[common.RANK::common.WORLD]
        for i in range(0, len(mine), args.micro_batch_size):
            rows = mine[i:i + args.micro_batch_size]
            scored = score_comparisons(model, [batch[k] for k in rows], args, pad_id)  # [3, P]
            scaler.scale(scored[0].sum() / len(batch)).backward()
            scores[:, rows] = scored.detach().double()

        # 5. One step down the gradient, which is summed over processes and clipped.
        lr = learning_rate(step, len(batches), args.learning_rate)
        updated = update(optimizer, scaler, lr)

        # 6. Log, and save what is needed to go on.
        sum_over_processes([scores])
        metrics = {"step": step, **describe(scores), **updated, "seconds": time.time() - began}
        shown = {name: f"{metrics[name]:.3f}" for name in ("loss", "accuracy", "margin")}
        progress.set_postfix(shown, refresh=False)
        if args.eval_every and step % args.eval_every == 0:
            held = describe(evaluate(model, held_out, args, pad_id))
            metrics |= {f"eval_{name}": value for name, value in held.items()}
        log_step(args, state, metrics)
        if step % args.save_every == 0 or step == len(batches):
            save(args, state, weights, optimizer, scaler)

    # 7. The same held-out pairs once more, and where the model is most wrong.
    scores = evaluate(model, held_out, args, pad_id)
    pad_apart(tokenizer)  # for those who load the model elsewhere: here lengths are known
    finish(args, state, model, tokenizer, describe(scores))
    show_worst(tokenizer, held_out, scores)


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
    with common.running("--micro-batch-size, then --max-length"):
        train(common.parse(flags, TINY))
