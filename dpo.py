"""DPO: Direct Preference Optimization (Rafailov et al. 2023, arXiv:2305.18290).

The data are pairs: a prompt x, a better answer y_w, a worse one y_l. RLHF, reinforcement learning
from human feedback, fits a reward model r to them, then looks for the policy π, a language model,
that earns most with its answers y and stays near π_ref, the model that it was at the start:

    max_π  E r(x, y) − β KL(π ‖ π_ref)                                                      (eq. 3)

DPO needs no reward model and no sampling. The best policy has a closed form, and solved for r it
says for which reward a given policy is the best:

    π(y|x) ∝ π_ref(y|x) exp(r(x, y) / β)                                                    (eq. 4)
    r(x, y) = β log[π(y|x) / π_ref(y|x)] + a term in x alone                               (eq. 5)

Bradley and Terry (1952) model a preference as P(y_w beats y_l) = σ(r(x, y_w) − r(x, y_l)). Put
eq. 5 in: the term in x cancels, and minus the log of P is a loss for the policy itself:

    loss = −log σ( β log[π(y_w|x) / π_ref(y_w|x)] − β log[π(y_l|x) / π_ref(y_l|x)] )        (eq. 7)

where log π(y|x) sums the log-probs of the tokens of y. --loss names a relative: ipo (a target for
the margin, not a push without end), hinge (no push once it is 1), simpo (mean log-probs and no
reference), orpo and cpo (no reference, and SFT on the chosen answer).

    python dpo.py                                         # the embedded tiny model, on a laptop
    python dpo.py --model Qwen/Qwen2.5-0.5B               # 4-bit LoRA on a 16 GB T4
    python dpo.py --model runs/sft --dataset pairs.jsonl  # an SFT adapter: it is also the reference

What to watch: the loss starts at log 2 = 0.693 and falls, the accuracy climbs from 0.5, the margin
grows. Often the log-prob of the chosen answer falls, too: the loss asks only for the difference.

Shapes: P pairs are B = 2P rows of T tokens, chosen first; N answer tokens, width D, vocabulary V.
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
from torch.utils.checkpoint import checkpoint
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
add("--loss", choices=["dpo", "ipo", "hinge", "simpo", "orpo", "cpo"], default="dpo")
add("--beta", type=common.positive, default=0.1, help="price of leaving the reference; without "
    "one, factor of log π (simpo: 2; cpo: 0.1 is nearly SFT on chosen answers) or λ (orpo)")
add("--gamma", type=common.weight, default=1.0, help="simpo: the margin that rewards must exceed")
add("--label-smoothing", type=common.number(float, 0, 0.5), default=0.0,
    help="dpo: share of mislabelled pairs")
add("--max-length", type=common.number(int, 4), default=1024, help="of prompt + answer, in tokens")
add("--batch-size", type=common.count, default=32, help="pairs per optimizer step")
add("--micro-batch-size", type=common.count, default=2, help="pairs per forward pass")
add("--learning-rate", type=common.positive, default=2e-5, help="the highest: it rises, then falls")
add("--epochs", type=common.count, default=1, help="passes over the pairs")
add("--max-steps", type=common.count, default=500, help="optimizer steps at most")
add("--lora-rank", **common.LORA_RANK, type=common.count)
add("--load-in-4bit", **common.ON_GPU, help="quantise the frozen base")
add("--gradient-checkpointing", **common.ON_GPU, help="compute activations twice, keep fewer")
add("--eval-every", type=common.natural, default=0, help="steps between evaluations; 0: none")
add("--save-every", type=common.count, default=50, help="steps between savings")
add("--seed", type=common.natural, default=0, help="of data order, LoRA matrices and samples")
add("--track", choices=["wandb", "trackio"], help="also send the metrics there")
add("--output-dir", default="runs/dpo", help="the same command again goes on where it stopped")
BY_LOSS = {"simpo": dict(beta=2.0)}  # other defaults, as in its paper
# tiny answers differ in a digit or two: at β 0.1 the end token would become rare after wrong ones
TINY = dict(dataset="tiny/data/preference_train.jsonl", beta=2.0, learning_rate=1e-3, epochs=2,
            eval_dataset="tiny/data/preference_heldout.jsonl", micro_batch_size=32)


# ---- data: pairs of token ids, and a mask on what is trained -------------------------------------

def encode_pair(row, tokenizer, max_length):
    """{"chosen": example, "rejected": example, "prompt": ids}; the loss mask is 1 on the answer."""
    sides = common.encode_preference(tokenizer, row)  # pieces: head, rest of the prompt, answer
    head = len(sides[0][0][0])
    chosen, rejected = [with_mask(pieces) for pieces in sides]
    # where the first answer begins: a token that spans the border is part of one of them only
    start = min(chosen["loss_mask"].index(1), rejected["loss_mask"].index(1))
    longest = max(len(chosen["input_ids"]), len(rejected["input_ids"]))
    pair = shorten({"prompt": chosen["input_ids"][:start]}, longest, head, start, max_length)
    for side, example in ("chosen", chosen), ("rejected", rejected):
        pair[side] = shorten(example, longest, head, start, max_length)
    return pair | {"length": min(longest, max_length), "truncated": longest > max_length}


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


def preference_loss(logps, ref_logps, lengths, loss="dpo", beta=0.1, label_smoothing=0, gamma=1):
    """Losses [P], rewards [2P]; the sums log π(y|x), log π_ref(y|x) (or 0) and |y|: [2P] each."""
    if loss in ("simpo", "orpo"):  # means over the tokens, so that length earns nothing
        logps = logps / lengths  # [2P]
    rewards = beta * (logps - ref_logps)  # [2P], eq. 5: what the policy implicitly rewards
    chosen, rejected = rewards.chunk(2)  # [P] each
    margin = chosen - rejected
    chosen_logps, rejected_logps = logps.chunk(2)
    if loss == "dpo":  # eq. 7; ε: the share of wrong labels (ericmitchell.ai/cdpo.pdf, eq. 3)
        ε = label_smoothing
        losses = -(1 - ε) * F.logsigmoid(margin) - ε * F.logsigmoid(-margin)  # [P]
    elif loss == "ipo":  # Azar et al. 2023, arXiv:2310.12036, eq. 17: log-ratios 1/(2β) apart
        losses = (margin / beta - 1 / (2 * beta)) ** 2
    elif loss == "hinge":  # SLiC's (2305.10425) on DPO's margin: Liu et al. 2023, 2309.06657
        losses = F.relu(1 - margin)
    elif loss == "simpo":  # Meng et al. 2024, arXiv:2405.14734, eq. 6
        losses = -F.logsigmoid(margin - gamma)
    elif loss == "cpo":  # Xu et al. 2024, arXiv:2401.08417: a uniform reference, and the NLL
        losses = -F.logsigmoid(margin) - chosen_logps
    elif loss == "orpo":  # Hong et al. 2024, arXiv:2403.07691, eqs. 6 and 7; their λ is β
        log_p = logps.clamp(max=-1e-6)  # [2P], as a certain answer has infinite odds
        chosen_odds, rejected_odds = (log_p - torch.log1p(-log_p.exp())).chunk(2)  # log(p/(1−p))
        losses = -chosen_logps - beta * F.logsigmoid(chosen_odds - rejected_odds)
    return losses, rewards.detach()


FIGURES = ("loss", "accuracy", "margin", "chosen_reward", "rejected_reward", "chosen_logp",
           "rejected_logp")


def score_pairs(model, pairs, args, pad_id):
    """Policy and reference read the same P pairs: losses [P], and sums over them of the FIGURES."""
    examples = [pair["chosen"] for pair in pairs] + [pair["rejected"] for pair in pairs]
    batch = collate(examples, pad_id, model.device)
    with common.autocast(model):
        logps = token_logps(model, batch).sum(-1)  # [2P]
        ref_logps = torch.zeros_like(logps)  # [2P]
        if args.loss not in ("simpo", "orpo", "cpo"):  # which do without it
            with torch.no_grad(), common.reference(model):  # what training started from
                ref_logps = token_logps(model, batch).sum(-1)
    lengths = batch["loss_mask"][:, 1:].sum(-1)  # [2P], |y|
    losses, rewards = preference_loss(
        logps, ref_logps, lengths, args.loss, args.beta, args.label_smoothing, args.gamma)
    chosen, rejected = rewards.chunk(2)
    right = (chosen > rejected) + 0.5 * (chosen == rejected)  # a tie is half right
    figures = [losses, right, chosen - rejected, chosen, rejected, *logps.chunk(2)]  # as FIGURES
    return losses, torch.stack(figures).detach().double().sum(-1)


# ---- the run -------------------------------------------------------------------------------------

@torch.no_grad()
def evaluate(model, pairs, args, pad_id):
    """The mean figures of held-out pairs, which the processes share between them."""
    model.eval()
    mine = pairs[common.RANK::common.WORLD]
    sums = torch.zeros(len(FIGURES), dtype=torch.float64, device=model.device)
    for i in range(0, len(mine), args.micro_batch_size):
        sums += score_pairs(model, mine[i:i + args.micro_batch_size], args, pad_id)[1]
    sum_over_processes([sums])
    model.train()
    return dict(zip(FIGURES, (sums / len(pairs)).tolist(), strict=True))


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
    pad_id = tokenizer.pad_token_id
    pairs, held_out = common.load_examples(
        args, encode_pair, tokenizer, limit=args.max_steps * args.batch_size)
    for side in "chosen", "rejected":
        common.show(tokenizer, pairs[0][side]["input_ids"], pairs[0][side]["loss_mask"])

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
    open_run(args, [pairs, held_out])
    state = restore(args, weights, optimizer, scaler)
    prompts = [pair["prompt"] for pair in held_out[:3]]
    if "before" not in state:
        state["before"] = evaluate(model, held_out, args, pad_id)
        state["answers"] = sample_answers(model, tokenizer, prompts, 64, args.seed)

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
        mine = batch[common.RANK::common.WORLD]
        sums = torch.zeros(len(FIGURES), dtype=torch.float64, device=model.device)
        for i in range(0, len(mine), args.micro_batch_size):
            losses, figures = score_pairs(model, mine[i:i + args.micro_batch_size], args, pad_id)
            scaler.scale(losses.sum() / len(batch)).backward()
            sums += figures

        # 5. One step down the gradient, which is summed over processes and clipped.
        lr = learning_rate(step, len(batches), args.learning_rate)
        updated = update(optimizer, scaler, lr)

        # 6. Log, and save what is needed to go on.
        sum_over_processes([sums])
        metrics = {"step": step} | dict(zip(FIGURES, (sums / len(batch)).tolist(), strict=True))
        metrics |= {**updated, "seconds": time.time() - began}
        progress.set_postfix({name: f"{metrics[name]:.3f}" for name in FIGURES[:3]}, refresh=False)
        if args.eval_every and step % args.eval_every == 0:
            held = evaluate(model, held_out, args, pad_id)
            metrics |= {f"eval_{name}": value for name, value in held.items()}
        log_step(args, state, metrics)
        if step % args.save_every == 0 or step == len(batches):
            save(args, state, weights, optimizer, scaler)

    # 7. The same held-out pairs and prompts once more.
    answers = sample_answers(model, tokenizer, prompts, 64, args.seed)
    for row in zip(prompts, state["answers"], answers, strict=True):
        texts = tokenizer.batch_decode(row, skip_special_tokens=True)
        state["samples"].append(dict(zip(("prompt", "before", "after"), texts, strict=True)))
    finish(args, state, model, tokenizer, evaluate(model, held_out, args, pad_id))
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
        train(common.parse(flags, TINY, BY_LOSS))
