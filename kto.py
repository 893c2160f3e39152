"""KTO: Kahneman-Tversky Optimization (Ethayarajh et al. 2024, arXiv:2402.01306).

The data are single answers: a prompt x, an answer y, a thumb up or down. As in DPO, the policy π
implicitly rewards what became likelier than it was for π_ref, the model that π was at the start:

    r(x, y) = β log[π(y|x) / π_ref(y|x)]                        eq. 5 of DPO, but for a term in x

DPO compares the two answers of a pair. KTO compares each answer with a reference point z, as people
do: they feel gains and losses against what they are used to, and each further bit of either less
(Kahneman and Tversky 1979). The value of y is λ times a sigmoid around z, the loss what it lacks:

    loss = λ_D (1 − σ(r(x, y) − β z))                           if y is desirable
    loss = λ_U (1 − σ(β z − r(x, y)))                           if y is undesirable
    z    = max(0, mean of log[π(y'|x) / π_ref(y'|x)])           where y' answers another prompt

λ_D and λ_U are weights. z, a mean over the step, stands for KL(π ‖ π_ref), how far π has moved as a
whole, without sampling; it has no gradient. Kept from DPO: reference and masks. Dropped: the pairs.
An answer far on the wrong side of z, perhaps mislabelled, has no pull any more: there σ is flat.

    python kto.py                                           # the embedded tiny model, on a laptop
    python kto.py --model Qwen/Qwen2.5-0.5B                 # 4-bit LoRA on a 16 GB T4
    python kto.py --model runs/sft --dataset thumbs.jsonl   # an SFT adapter: it is the reference

What to watch: the loss starts at 0.5 if both λ are 1; the margin, desirable minus undesirable mean
reward, grows. z is 0 while answers behind wrong prompts only get less likely. Where grad_norm dies
and the loss stays at the share of one label, all its answers were let go: raise its weight.

Shapes: B answers (of a micro-batch or a whole step) of T tokens; N answer tokens, width D,
vocabulary V; L of the T columns hold tokens.
"""
import argparse
import hashlib
import importlib
import json
import math
import time
from pathlib import Path

import filelock
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

import common

flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
add = flags.add_argument
add("--model", default="tiny/chat", help="Hub name, local folder or LoRA adapter to start from")
add("--dataset", default="trl-lib/kto-mix-14k", help="Hub name[:config], or a file")
add("--split", default="train", help="of a Hub dataset")
add("--columns", **common.COLUMNS, help="other names of columns: prompt=query completion=reply")
add("--chat-template", help="file with a chat template, in place of the model's own")
add("--template-arguments", **common.VARIABLES, help="variables that the chat template reads")
add("--eval-dataset", help="held-out rows (without it, some are kept out of --dataset)")
add("--eval-size", type=common.count, default=100, help="held-out rows")
add("--beta", type=common.positive, default=0.1, help="price of leaving the reference")
add("--desirable-weight", type=common.positive, default=1.0, help="λ_D, of desirable answers")
add("--undesirable-weight", type=common.positive, default=1.0, help="λ_U, of undesirable answers")
add("--max-length", type=common.number(int, 4), default=1024, help="of prompt + answer, in tokens")
add("--batch-size", type=common.number(int, 2), default=32, help="answers per optimizer step")
add("--micro-batch-size", type=common.count, default=4, help="answers per forward pass")
add("--learning-rate", type=common.positive, default=2e-5, help="the highest: it rises, then falls")
add("--epochs", type=common.count, default=1, help="passes over the answers")
add("--max-steps", type=common.count, default=500, help="optimizer steps at most")
add("--lora-rank", **common.LORA_RANK, type=common.count)
add("--load-in-4bit", **common.ON_GPU, help="quantise the frozen base")
add("--gradient-checkpointing", **common.ON_GPU, help="compute activations twice, keep fewer")
add("--eval-every", type=common.natural, default=0, help="steps between evaluations; 0: none")
add("--save-every", type=common.count, default=50, help="steps between savings")
add("--seed", type=common.natural, default=0, help="of data order, LoRA matrices and samples")
add("--track", choices=["wandb", "trackio"], help="also send the metrics there")
add("--output-dir", default="runs/kto", help="the same command again goes on where it stopped")
# tiny answers differ in a digit or two, as in dpo.py: β is as high for the same reason
TINY = dict(dataset="tiny/data/preference_train.jsonl", beta=2.0, learning_rate=1e-3,
            eval_dataset="tiny/data/preference_heldout.jsonl", micro_batch_size=64)
LABELS = {"true": True, "false": False, "1": True, "0": False}


# ---- data: prompts, answers to them, and labels --------------------------------------------------

def encode_labelled(row, tokenizer, max_length):
    """Examples of a prompt, an answer and a label, which says whether the answer is desirable."""
    if "chosen" in row or "rejected" in row:
        labelled = zip(common.encode_preference(tokenizer, row), (True, False), strict=True)
    else:
        prompt, answer = common.prompt_of(row, tokenizer), common.answer_of(row)
        label = LABELS.get(str(row.get("label")).lower())
        if not prompt or answer is None or label is None:
            raise ValueError("no prompt, completion and label (true or false, 1 or 0), and no pair")
        answers = common.encode(tokenizer, prompt, answer, row.get("tools"))
        labelled = [(pieces, label) for pieces in answers]
    examples = []
    for ((head, _), (rest, _), *answer), label in labelled:
        length = len(head) + len(rest) + sum(len(ids) for ids, _ in answer)
        examples.append({"prompt": head + rest, "head": len(head), "answer": answer,
                         "label": label, "truncated": length > max_length})
    return examples


def tokens_of(example, args, tokenizer):
    """The answer behind the prompt, which need not be its own; the loss mask is 1 on the answer."""
    longest = min(args.max_length, tokenizer.model_max_length)
    tokens = with_mask([(example["prompt"], False), *example["answer"]])
    length, start = len(tokens["input_ids"]), len(example["prompt"])
    return shorten(tokens, length, example["head"], start, longest)


def with_mask(pieces):
    """Pieces (ids, is_answer) as one example, whose mask says what is learned: the answers."""
    input_ids, loss_mask = [], []
    for ids, is_answer in pieces:
        input_ids += ids
        loss_mask += [int(is_answer)] * len(ids)
    return {"input_ids": input_ids, "loss_mask": loss_mask, "attention_mask": [1] * len(input_ids)}


def shorten(example, length, head, start, max_length):
    """Too long: the prompt loses its middle, down to half of max_length, the answer its end.

    The prompt ends at `start`. Its head (BOS, system message) stays, and its end, a quarter of
    max_length or more. `length` is that of the example, or of the longer one of a pair.
    """
    room = max(max_length // 2, head + max_length // 4)
    cut = max(0, min(length - max_length, start - room))
    short = {name: (x[:head] + x[head + cut:])[:max_length] for name, x in example.items()}
    if 1 not in short.get("loss_mask", [1]):
        raise ValueError(f"its system message leaves no room for an answer in {max_length} tokens")
    return short


def collate(examples, pad_id, device):
    """B examples as [B, T] tensors, padded on the right; masks are 0 there, even if pad is eos."""
    batch = {}
    for name in examples[0]:
        padding = pad_id if name == "input_ids" else 0
        rows = [torch.tensor(example[name]) for example in examples]
        batch[name] = pad_sequence(rows, batch_first=True, padding_value=padding).to(device)
    return batch


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


def kto_loss(log_ratios, labels, z, beta, desirable_weight, undesirable_weight):
    """The loss of each answer [B], from its log π/π_ref [B], whether it is desirable [B], and z."""
    gains = beta * (log_ratios - z)  # [B]: r − βz
    desirable = desirable_weight * (1 - torch.sigmoid(gains))  # [B]
    undesirable = undesirable_weight * (1 - torch.sigmoid(-gains))  # [B]
    return torch.where(labels, desirable, undesirable)


def score_labelled(model, examples, z, args, tokenizer):
    """The loss, log π(y|x)/π_ref(y|x) and log π(y|x) of B answers: [3, B]."""
    rows = [tokens_of(example, args, tokenizer) for example in examples]
    batch = collate(rows, tokenizer.pad_token_id, model.device)
    with common.autocast(model):
        logps = token_logps(model, batch).sum(-1)  # [B]
        with torch.no_grad(), common.reference(model):  # what training started from
            ref_logps = token_logps(model, batch).sum(-1)  # [B]
    log_ratios = logps - ref_logps  # [B]
    labels = torch.tensor([example["label"] for example in examples], device=logps.device)  # [B]
    losses = kto_loss(
        log_ratios, labels, z, args.beta, args.desirable_weight, args.undesirable_weight)
    return torch.stack([losses, log_ratios, logps])


def score_step(model, examples, z, args, tokenizer, scaler):
    """score_labelled for all the answers, which the processes share between them: [3, B].

    With a scaler (in training), this is also the backward pass: gradients add up to that of the
    mean loss, as each answer counts 1 / len(examples), whatever its micro-batch and process.
    """
    scores = torch.zeros(3, len(examples), dtype=torch.float64, device=model.device)
    mine = list(range(len(examples)))[common.RANK::common.WORLD]
    for i in range(0, len(mine), args.micro_batch_size):
        rows = mine[i:i + args.micro_batch_size]
        scored = score_labelled(model, [examples[row] for row in rows], z, args, tokenizer)
        if scaler is not None:
            scaler.scale(scored[0].sum() / len(examples)).backward()
        scores[:, rows] = scored.detach().double()
    sum_over_processes([scores])
    return scores


@torch.no_grad()
def reference_point(model, examples, args, tokenizer):
    """z: the mean log-ratio of the answers, each behind the next prompt that is another, or 0.

    Where one prompt begins with the other, they may be one text, split elsewhere: not another.
    """
    mismatched = []
    for i, example in enumerate(examples):
        for other in examples[i + 1:] + examples[:i]:
            prompts = example["prompt"], other["prompt"]
            if common.shared_length(*prompts) < min(map(len, prompts)):
                mismatched.append(example | {"prompt": other["prompt"], "head": other["head"]})
                break
    _, log_ratios, _ = score_step(model, mismatched, 0.0, args, tokenizer, None)  # losses unused
    return (log_ratios.sum() / max(1, len(mismatched))).clamp(min=0)


def describe(scores, examples, z, args):
    """Means over all answers, and by label: as in dpo.py, chosen is desirable, rejected is not."""
    labels = torch.tensor([example["label"] for example in examples], device=scores.device)
    _, chosen_gain, chosen_logp = scores[:, labels].mean(1).tolist()
    _, rejected_gain, rejected_logp = scores[:, ~labels].mean(1).tolist()
    return {"loss": scores[0].mean().item(), "margin": args.beta * (chosen_gain - rejected_gain),
            "chosen_reward": args.beta * chosen_gain, "rejected_reward": args.beta * rejected_gain,
            "chosen_logp": chosen_logp, "rejected_logp": rejected_logp, "z": z.item()}


# ---- the run -------------------------------------------------------------------------------------

def plan_batches(labels, args):
    """The indices of each step's answers: of either label its share in the data, but at least one.

    Each label has an order of its own, from the seed; used up, it starts again in a new one.
    """
    size = min(args.batch_size, len(labels))
    n_D = min(max(1, round(size * sum(labels) / len(labels))), size - 1)
    ratio = n_D * args.desirable_weight / ((size - n_D) * args.undesirable_weight)
    if not 1 <= ratio <= 4 / 3:  # the advice of the paper's first version; its last: up to 3/2
        print(f"n_D λ_D / (n_U λ_U) is {ratio:.3g} in each step, better are 1 to 4/3: try "
              f"--desirable-weight {args.desirable_weight / ratio * 7 / 6:.3g}")
    generator = torch.Generator().manual_seed(args.seed)
    steps = min(args.max_steps, math.ceil(args.epochs * len(labels) / size))
    batches = []
    for label, count in (True, n_D), (False, size - n_D):
        members = torch.tensor([i for i, own in enumerate(labels) if own == label])
        rounds = range(math.ceil(steps * count / len(members)))
        order = torch.cat([torch.randperm(len(members), generator=generator) for _ in rounds])
        batches.append(members[order[:steps * count]].view(steps, count))
    return torch.cat(batches, dim=1)  # [steps, size]


@torch.no_grad()
def evaluate(model, examples, args, tokenizer):
    """The figures of held-out examples, whose z is their own."""
    model.eval()
    z = reference_point(model, examples, args, tokenizer)
    scores = score_step(model, examples, z, args, tokenizer, None)
    model.train()
    return describe(scores, examples, z, args)


@torch.no_grad()
def sample_answers(model, tokenizer, prompts, length, seed):
    """An answer of up to `length` tokens to each prompt, sampled at temperature 1.

    Token by token from softmax(logits), because `generate` would also do what the model's own
    generation config asks for: beams, penalties, suppressed tokens. Pads follow a stop token.
    """
    prompts = [ids[length - tokenizer.model_max_length:] for ids in prompts]  # room for the answer
    batch = tokenizer.pad({"input_ids": prompts}, padding_side="left", return_tensors="pt")
    stop_ids = common.stop_token_ids(tokenizer, model.generation_config)
    stops = torch.tensor(stop_ids, device=model.device)
    torch.manual_seed(seed)
    model.eval()  # in train mode, gradient checkpointing would silently drop the cache
    token, mask = batch["input_ids"].to(model.device), batch["attention_mask"].to(model.device)
    ended, answers, cache = torch.zeros_like(mask[:, :1], dtype=torch.bool), [], None
    while len(answers) < length and not ended.all():
        with common.autocast(model):
            logits, cache = common.read(common.causal_lm(model), token, mask, cache)  # [B, V]
        token = torch.multinomial(logits.float().softmax(-1), 1)  # [B, 1]
        token[ended] = tokenizer.pad_token_id
        answers.append(token)
        ended |= torch.isin(token, stops)
        mask = F.pad(mask, (0, 1), value=1)
    model.train()
    return torch.cat(answers, 1).tolist()


def train(args):
    # 1. Data first: what is wrong with it shows before the model is loaded.
    tokenizer = common.load_tokenizer(args.model, args.chat_template, args.template_arguments)
    examples, held_out = common.load_examples(
        args, encode_labelled, tokenizer, limit=args.max_steps * args.batch_size)
    for name, part in ("to train on", examples), ("held out", held_out):
        if len({example["label"] for example in part}) < 2:
            common.fail(f"all answers {name} have the same label, and KTO needs both")
    batches = plan_batches([example["label"] for example in examples], args)
    for i in batches[0, 0], batches[0, -1]:  # a desirable answer and an undesirable one
        tokens = tokens_of(examples[i], args, tokenizer)
        common.show(tokenizer, tokens["input_ids"], tokens["loss_mask"])

    # 2. A frozen base, with LoRA matrices: they alone are trained.
    torch.manual_seed(args.seed)
    model = common.load_model(
        args.model, args.load_in_4bit, args.lora_rank, args.gradient_checkpointing)
    weights = {name: p for name, p in model.named_parameters() if p.requires_grad}
    # `update` sets the learning rate.
    optimizer = torch.optim.AdamW(weights.values(), weight_decay=0.0)
    scaler = common.grad_scaler(model)  # for fp16 (a T4), where small gradients round to 0
    print(common.settings(model))

    # 3. Where the run stands: at its start, or where it was interrupted.
    open_run(args, [examples, held_out])
    state = restore(args, weights, optimizer, scaler)
    prompts = [x["prompt"][-args.max_length:] for x in held_out if x["label"]][:3]
    if "before" not in state:
        state["before"] = evaluate(model, held_out, args, tokenizer)
        state["answers"] = sample_answers(model, tokenizer, prompts, 64, args.seed)

    progress = tqdm(range(state["step"] + 1, len(batches) + 1), initial=state["step"],
                    total=len(batches), disable=common.RANK > 0)
    for step in progress:
        # 4. The reference point, before any answer has a loss: all of the step share it.
        began = time.time()
        batch = [examples[i] for i in batches[step - 1]]
        z = reference_point(model, batch, args, tokenizer)

        # 5. The losses and their gradients, micro-batch by micro-batch.
        scores = score_step(model, batch, z, args, tokenizer, scaler)

        # 6. One step down the gradient, which is summed over processes and clipped.
        updated = update(optimizer, scaler, learning_rate(step, len(batches), args.learning_rate))

        # 7. Log, and save what is needed to go on.
        metrics = {"step": step} | describe(scores, batch, z, args) | updated
        metrics["seconds"] = time.time() - began
        progress.set_postfix(loss=metrics["loss"], margin=metrics["margin"], refresh=False)
        if args.eval_every and step % args.eval_every == 0:
            held = evaluate(model, held_out, args, tokenizer)
            metrics |= {f"eval_{name}": value for name, value in held.items()}
        log_step(args, state, metrics)
        if step % args.save_every == 0 or step == len(batches):
            save(args, state, weights, optimizer, scaler)

    # 8. The same held-out answers and prompts once more.
    after = evaluate(model, held_out, args, tokenizer)
    answers = sample_answers(model, tokenizer, prompts, 64, args.seed)
    for row in zip(prompts, state["answers"], answers, strict=True):
        texts = tokenizer.batch_decode(row, skip_special_tokens=True)
        state["samples"].append(dict(zip(("prompt", "before", "after"), texts, strict=True)))
    finish(args, state, model, tokenizer, after)
    for sample in state["samples"]:
        for name, text in sample.items():
            print(f"{name:>8}: {common.visible(' '.join(text.split()))}")


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
