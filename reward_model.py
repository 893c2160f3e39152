"""Reward model: learns from preferences to rate an answer with a single number.

The data are pairs: a prompt x, a better answer y_w (chosen) and a worse one y_l (rejected). The
model is a language model whose head over the vocabulary is replaced by a scalar head, a linear
layer with one output. It reads x and y, and its output at the last token is the reward r(x, y).

Why it works. People find it hard to rate an answer on a scale, but they can say which of two
answers is better. Bradley and Terry (1952) connect the two: if every answer has a strength r, then
y_w beats y_l with a probability that depends only on the difference, σ(r(x, y_w) − r(x, y_l)). So r
can be fitted by maximum likelihood, as in logistic regression: the loss is the negative
log-probability of the observed preferences. The fitted r also ranks answers that nobody has
compared, which is what reinforcement learning needs.

    loss = −log σ( r(x, y_w) − r(x, y_l) − m )  +  λ (r(x, y_w) + r(x, y_l))²

The first term without m is eq. 1 of Ouyang et al. 2022, arXiv:2203.02155, for two answers. The
margin m, read from the column `margin` if the data have one, says how far apart the two rewards
should be (Touvron et al. 2023, arXiv:2307.09288, eq. 2). The first term does not change if a
constant is added to all rewards, so the second term keeps them centered around 0; λ (--centering)
is small (Eisenstein et al. 2023, arXiv:2312.09244). The gradient of the first term with respect to
r(x, y_w) is −σ(r(x, y_l) − r(x, y_w) + m). For m = 0 its size is the probability that the model
gives to the wrong order, so pairs in a clearly correct order hardly count any more.

Kept from SFT: the model, the adapter, the loop. Dropped: the head over the vocabulary and the loss
mask. New: the scalar head and the pairs. DPO, the next method, has the same loss, with
β log[π(y|x) / π_ref(y|x)], a log-ratio of two probabilities, in place of the reward.

A worked example. Let r(x, y_w) = 1.2 and r(x, y_l) = 0.2, with no margin and λ = 0.01:

    P(y_w beats y_l) = σ(1.0) = 0.731, loss = −log 0.731 + 0.01 · 1.4² = 0.313 + 0.020 = 0.333
    gradient: −0.269 + 0.028 = −0.241 in r(x, y_w), 0.269 + 0.028 = 0.297 in r(x, y_l)

With a margin of 0.5 the first term is −log σ(0.5) = 0.474. With the two rewards exchanged it is
−log σ(−1.0) = 1.313. With 10 added to both it is still 0.313, but the second grows to 4.580.

    python reward_model.py                               # the embedded tiny model, on a laptop
    python reward_model.py --model Qwen/Qwen2.5-0.5B     # 4-bit LoRA on a 16 GB T4
    python reward_model.py --model runs/sft --dataset pairs.jsonl
    python ppo.py --reward runs/reward_model             # RL with the trained reward model

What to watch. The loss starts near log 2 = 0.693, the loss of a coin flip, and falls; the accuracy
climbs from 0.5. On human preferences it ends around 0.65 to 0.75, because people agree with each
other only about that often. `reward_spread`, the standard deviation of the rewards, grows, and so
does the logged `margin`, which is r(x, y_w) − r(x, y_l) and not m. A held-out loss (--eval-every)
that rises while the accuracy stays the same is a sign of overfitting: the model becomes more
certain of its mistakes.

Try --centering 0. On the tiny model the accuracy stays at 0.993, but the rewards spread almost
twice as far (5.5 instead of 3.0) and their mean drifts away from 0 (−0.16 instead of −0.02). The
spread matters in PPO: the wider the rewards spread, the less a given KL penalty counts.

Shapes: P pairs are B = 2P sequences of T tokens, all chosen ones first. L ≤ T columns hold tokens
(the rest are padding in every row). D is the width of the model.
"""
import argparse
import hashlib
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

TINY = dict(dataset="tiny/data/preference_train.jsonl", epochs=3, batch_size=16,
            eval_dataset="tiny/data/preference_heldout.jsonl", eval_size=300, micro_batch_size=16,
            learning_rate=1e-3)


def make_flags():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=common.HelpFormatter)
    add = parser.add_argument
    add("--model", default="tiny/chat", help="Hub name, local folder or LoRA adapter to start from")
    add("--dataset", default="trl-lib/ultrafeedback_binarized",
        help="Hub name[:config], or a local file")
    add("--split", default="train", help="split of a Hub dataset")
    add("--columns", **common.COLUMNS)
    add("--chat-template", help=common.TEMPLATE)
    add("--template-arguments", **common.VARIABLES)
    add("--eval-dataset", help="held-out pairs (without it, a part of --dataset is held out)")
    add("--eval-size", type=common.count, default=100, help="number of held-out pairs")
    add("--centering", type=common.weight, default=0.01,
        help="weight λ of the term that centers the rewards around 0")
    add("--max-length", type=common.count, default=1024,
        help="longest prompt + answer, in tokens; longer pairs are dropped")
    add("--batch-size", type=common.count, default=32, help="pairs per optimizer step")
    add("--micro-batch-size", type=common.count, default=2, help="pairs per forward pass")
    add("--learning-rate", type=common.positive, default=1e-4, help=common.PEAK)
    add("--epochs", type=common.count, default=1, help="passes over the dataset")
    add("--max-steps", type=common.count, default=500, help="upper limit of optimizer steps")
    add("--lora-rank", **common.LORA_RANK, type=common.count)
    add("--load-in-4bit", **common.FOUR_BIT)
    add("--gradient-checkpointing", **common.CHECKPOINTING)
    add("--eval-every", type=common.natural, default=0, help="steps between evaluations; 0 is none")
    add("--save-every", type=common.count, default=50, help="steps between checkpoints")
    add("--seed", type=common.natural, default=0, help="seed of data order, LoRA and scalar head")
    add("--output-dir", default="runs/reward_model", help=common.RESUMED)
    return parser


# ---- data: two answers to a prompt, as token ids -------------------------------------------------

def encode_comparison(row, tokenizer, max_length):
    """Turns a row into a pair of sequences, each ending with a stop token, as samples do.

    A pair that is too long is refused, because a truncated answer would deserve another reward.
    """
    # Each side consists of three pieces: the head of the prompt, the rest of it, and the answer.
    chosen, rejected = common.encode_preference(tokenizer, row)
    (head, _), (rest, _), _ = chosen
    pair = {"prompt": head + rest, "margin": float(row.get("margin", 0)), "length": 0}
    for side, pieces in ("chosen", chosen), ("rejected", rejected):
        ids = [token for piece, _ in pieces for token in piece]
        if len(ids) > max_length:
            raise ValueError(f"it is longer than {max_length} tokens")
        pair[side] = {"input_ids": ids, "attention_mask": [1] * len(ids)}
        pair["length"] = max(pair["length"], len(ids))
    if not math.isfinite(pair["margin"]):
        raise ValueError(f"its margin is {pair['margin']}, not a finite number")
    return pair


def collate(examples, pad_id, device):
    """B examples as tensors [B, T], padded on the right. Masks are 0 there, even if pad is eos."""
    batch = {}
    for name in examples[0]:
        padding = pad_id if name == "input_ids" else 0
        rows = [torch.tensor(example[name]) for example in examples]
        batch[name] = pad_sequence(rows, batch_first=True, padding_value=padding).to(device)
    return batch


# ---- the method ----------------------------------------------------------------------------------

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


def reward_loss(chosen_rewards, rejected_rewards, margins, centering):
    """The loss of each pair, [P], from its two rewards and its margin m, each [P]."""
    difference = chosen_rewards - rejected_rewards  # [P]
    preference = -F.logsigmoid(difference - margins)  # [P], Ouyang eq. 1; m: Touvron eq. 2
    # Adding a constant to all rewards leaves the preference term as it is, but not this term.
    return preference + centering * (chosen_rewards + rejected_rewards) ** 2  # [P]


FIGURES = ("loss", "accuracy", "margin", "reward", "squared_reward")


def comparison_losses(model, pairs, args, pad_id):
    """The losses of P pairs, [P], and their figures, {name: [P]}."""
    examples = [pair["chosen"] for pair in pairs] + [pair["rejected"] for pair in pairs]
    batch = collate(examples, pad_id, model.device)
    head = common.causal_lm(model).score  # the scalar head: its weight is [1, D]
    with common.autocast(model):
        rewards = sequence_rewards(model, batch, head)  # [2P]
    chosen, rejected = rewards.chunk(2)  # [P] each
    margins = torch.tensor([pair["margin"] for pair in pairs], device=chosen.device)  # [P]
    losses = reward_loss(chosen, rejected, margins, args.centering)  # [P]
    correct = (chosen > rejected) + 0.5 * (chosen == rejected)  # [P]: a tie is half correct
    return losses, {"loss": losses, "accuracy": correct, "margin": chosen - rejected,
                    "reward": (chosen + rejected) / 2,
                    "squared_reward": (chosen.double() ** 2 + rejected.double() ** 2) / 2}


def describe(sums, count):
    """The figures of `count` pairs, from the sums over them. The spread is √(E[r²] − E[r]²)."""
    means = {name: total / count for name, total in sums.items()}
    variance = means.pop("squared_reward") - means["reward"] ** 2
    return means | {"reward_spread": math.sqrt(max(0.0, variance))}


# ---- the run -------------------------------------------------------------------------------------

@torch.no_grad()
def evaluate(model, pairs, args, pad_id):
    """The figures of held-out pairs, and their leads, r(x, y_w) − r(x, y_l), [P]."""
    model.eval()
    leads = torch.zeros(len(pairs), dtype=torch.float64, device=model.device)  # [P]
    # Process number RANK of WORLD takes every WORLD-th pair. A single process (0 of 1) takes all.
    mine = list(range(len(pairs)))[common.RANK::common.WORLD]
    sums = {}
    for i in range(0, len(mine), args.micro_batch_size):
        places = mine[i:i + args.micro_batch_size]
        rows = [pairs[place] for place in places]
        _, figures = comparison_losses(model, rows, args, pad_id)
        add_up(sums, figures)
        leads[places] = figures["margin"].double()
    totals = over_processes(sums, FIGURES, model.device)
    sum_over_processes([leads])
    model.train()
    return describe(totals, len(pairs)), leads


def show_worst(tokenizer, pairs, leads):
    """Prints the model's most confident mistake. Often it is the label that is wrong."""
    worst = leads.argmin().item()
    if leads[worst] < 0:
        print(f"\nthe most confident mistake: the rejected answer leads by {-leads[worst]:.3f}")
        for side in "chosen", "rejected":
            ids = pairs[worst][side]["input_ids"]
            print(f"{side:>9}: {common.visible(' '.join(tokenizer.decode(ids).split()))}")


def pad_apart(tokenizer):
    """Sets a pad token that never ends an answer.

    Transformers reads a reward at the last token that is not the pad token, so it would skip the
    end of an answer that ends with the pad token. This script uses the attention mask.
    """
    ends = {tokenizer.eos_token_id, common.end_of_turn_id(tokenizer)}
    if tokenizer.pad_token_id not in ends:
        return
    added = sorted(tokenizer.added_tokens_decoder.items())
    candidates = [str(token) for i, token in added if i not in ends]
    named_pad = [token for token in candidates if "pad" in token]
    if candidates:
        tokenizer.pad_token = (named_pad + candidates)[0]


def train(args):
    # 1. Load the data first, so that bad data fails before the model is loaded.
    tokenizer = common.load_tokenizer(args.model, args.chat_template, args.template_arguments)
    pad_id = tokenizer.pad_token_id
    pairs, held_out = common.load_examples(
        args, encode_comparison, tokenizer, limit=args.max_steps * args.batch_size)
    for side in "chosen", "rejected":
        ids = pairs[0][side]["input_ids"]
        is_read = [0] * (len(ids) - 1) + [1]
        heading = f"the {side} answer of a pair (its reward is read at the token in green):"
        common.show(tokenizer, ids, is_read, heading)

    # 2. Load the model: a frozen base, with LoRA matrices and a scalar head that are trained.
    torch.manual_seed(args.seed)
    model = common.load_model(
        args.model, args.load_in_4bit, args.lora_rank, args.gradient_checkpointing, task="SEQ_CLS")
    weights = {name: p for name, p in model.named_parameters() if p.requires_grad}
    # `update` sets the learning rate.
    optimizer = torch.optim.AdamW(weights.values(), weight_decay=0.0)
    scaler = common.grad_scaler(model)  # for fp16 (a T4), where small gradients round to 0
    common.print_settings(model)

    # 3. Start a new run, or resume an interrupted one. A new run is evaluated before training.
    open_run(args, [pairs, held_out])
    state = restore(args, weights, optimizer, scaler)
    if "before" not in state:
        state["before"], _ = evaluate(model, held_out, args, pad_id)

    # 4. Shuffle the data once per epoch. The order depends on the seed alone, so a resumed run
    #    sees the same batches.
    generator = torch.Generator().manual_seed(args.seed)
    order = [torch.randperm(len(pairs), generator=generator) for epoch in range(args.epochs)]
    batches = torch.cat(order).split(args.batch_size)[:args.max_steps]
    progress = tqdm(range(state["step"] + 1, len(batches) + 1), initial=state["step"],
                    total=len(batches), disable=common.RANK > 0)
    for step in progress:
        began = time.time()

        # 5. Accumulate gradients over micro-batches. Each pair has the weight 1 / len(batch), so
        #    the gradients of all micro-batches, in all processes, add up to the gradient of the
        #    batch. Sorting puts pairs of similar length together, which saves padding.
        batch = [pairs[i] for i in batches[step - 1]]
        batch.sort(key=operator.itemgetter("length"))
        mine = batch[common.RANK::common.WORLD]
        sums = {}
        for i in range(0, len(mine), args.micro_batch_size):
            rows = mine[i:i + args.micro_batch_size]
            losses, figures = comparison_losses(model, rows, args, pad_id)
            scaler.scale(losses.sum() / len(batch)).backward()
            add_up(sums, figures)

        # 6. Take one optimizer step with the gradient, summed over processes and clipped.
        lr = learning_rate(step, len(batches), args.learning_rate)
        updated = update(optimizer, scaler, lr)

        # 7. Log the step, evaluate from time to time, and save a checkpoint.
        totals = over_processes(sums, FIGURES, model.device)
        metrics = {"step": step, **describe(totals, len(batch)), **updated}
        metrics["seconds"] = time.time() - began
        if args.eval_every and step % args.eval_every == 0:
            held, _ = evaluate(model, held_out, args, pad_id)
            metrics |= {f"eval_{name}": value for name, value in held.items()}
        tokens = sum(len(pair["chosen"]["input_ids"]) + len(pair["rejected"]["input_ids"])
                     for pair in batch)
        log_step(args, state, metrics, tokens, progress, ("loss", "accuracy", "margin"))
        if step % args.save_every == 0 or step == len(batches):
            save(args, state, weights, optimizer, scaler)

    # 8. Evaluate again on the same held-out pairs, and show the most confident mistake.
    after, leads = evaluate(model, held_out, args, pad_id)
    pad_apart(tokenizer)
    finish(args, state, model, tokenizer, after)
    show_worst(tokenizer, held_out, leads)
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
    with common.running("--micro-batch-size, then --max-length"):
        train(common.parse(make_flags(), TINY))
