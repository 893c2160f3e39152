"""Process reward model: learns from labelled steps whether a solution is still right after each.

A solution y of a problem x is a list of steps y_1 ... y_S. A language model with a scalar in place
of its head reads them; from the scalar r_k at the last token of step k follows how likely it is to
be labelled right:

    p_k = σ(r_k)
    loss = −Σ_k [ l_k log p_k + (1 − l_k) log(1 − p_k) ]                 l_k = 1: right, 0: wrong

in the mean over the steps of a batch. This is process supervision: Uesato et al. 2022,
arXiv:2211.14275; Lightman et al. 2023, arXiv:2305.20050. p_k means what the labels mean. Uesato's,
and those of tiny/data, say whether all is right so far: p_k is the chance of that, and p_S that of
the solution. Lightman's say whether a step is right, and end at the first that is not: a solution
has Π_k p_k. Math-Shepherd's (Wang et al. 2023, arXiv:2312.08935), the default dataset, say whether
any of 8 continuations from there found the answer: p_k is the chance that it is still within reach.
min_k p_k, as in Math-Shepherd, serves all three: a solution is as good as its worst step. With
--outcome the sum has only its last term, the verdict on the whole: an outcome reward model, which
has to find out by itself at which step things went wrong. (In the papers it learns that verdict at
every step or token, and is read at the last.) It is judged by the same held-out figures but for the
loss.

Kept from the reward model: the scalar, the adapter, the loop. Dropped: the pairs. A label stands by
itself, so r = 0 has a meaning, a probability of a half, and the rewards need no centering.

    python prm.py                                        # the embedded tiny model, on a laptop
    python prm.py --outcome                              # its last step only, to compare
    python prm.py --model Qwen/Qwen2.5-0.5B-Instruct     # 4-bit LoRA on a 16 GB T4

What to watch: the loss starts near log 2 = 0.693. The step accuracy soon reaches the share of the
commoner label, and says little where most steps are right. The hard figure is `f1`, for the first
wrong step: a hit is a solution whose first step with p < 1/2 is the first that is labelled wrong.
`precision` is the share of hits among solutions with a p < 1/2, `recall` among those with a wrong
label, both 0 where there are none, `f1` their harmonic mean. `accuracy_min`, `accuracy_product` and
`accuracy_last` are shares of solutions that min_k p_k, Π_k p_k or p_S, against 1/2, judge right: a
solution is right if none of its steps is labelled wrong.

Shapes: B solutions of T tokens and at most S steps; D is the model's width.
"""
import argparse
import functools
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
add("--dataset", default="trl-lib/math_shepherd", help="Hub name[:config], or a file")
add("--split", default="train", help="of a Hub dataset")
add("--columns", **common.COLUMNS, help="other names of columns: prompt=query completion=reply")
add("--chat-template", help="file with a chat template, in place of the model's own")
add("--template-arguments", **common.VARIABLES, help="variables that the chat template reads")
add("--eval-dataset", help="held-out solutions (without it, some are kept out of --dataset)")
add("--eval-size", type=common.count, default=100, help="held-out solutions")
add("--outcome", action="store_true", help="learn from the label of the last step only")
add("--max-length", type=common.count, default=1024, help="solutions with more tokens are dropped")
add("--batch-size", type=common.count, default=32, help="solutions per optimizer step")
add("--micro-batch-size", type=common.count, default=4, help="solutions per forward pass")
add("--learning-rate", type=common.positive, default=1e-4, help="the highest: it rises, then falls")
add("--epochs", type=common.count, default=1, help="passes over the solutions")
add("--max-steps", type=common.count, default=500, help="optimizer steps at most")
add("--lora-rank", **common.LORA_RANK, type=common.count)
add("--load-in-4bit", **common.ON_GPU, help="quantise the frozen base")
add("--gradient-checkpointing", **common.ON_GPU, help="compute activations twice, keep fewer")
add("--eval-every", type=common.natural, default=0, help="steps between evaluations; 0: none")
add("--save-every", type=common.count, default=50, help="steps between savings")
add("--seed", type=common.natural, default=0, help="of data order, LoRA matrices and head")
add("--track", choices=["wandb", "trackio"], help="also send the metrics there")
add("--output-dir", default="runs/prm", help="the same command again goes on where it stopped")
TINY = dict(dataset="tiny/data/steps_train.jsonl", epochs=10, max_steps=800, micro_batch_size=32,
            eval_dataset="tiny/data/steps_heldout.jsonl", eval_size=300, learning_rate=2e-3)


# ---- data: a solution as token ids, and where its steps end --------------------------------------

def encode_solution(row, tokenizer, max_length, outcome):
    """{"prompt": ids, "solution": example}; the loss mask is 1 on the steps that are learned from.

    The steps are lines of one answer, of the assistant if the prompt is messages or the tokenizer
    has a chat template; else it is text, on the line below the prompt. Longer ones are refused.
    pairs.py and evaluate.py take every line for a step: give a step one line.
    """
    prompt, steps = common.prompt_of(row, tokenizer), row.get("completions")
    labels = row.get("labels")
    if not prompt or not isinstance(prompt, str | list):
        raise ValueError("a prompt must be a text or a list of messages")
    if not isinstance(steps, list) or not all(isinstance(x, str) and x.strip() for x in steps):
        raise ValueError("completions must be a list of steps, none of them empty")
    if not steps or not isinstance(labels, list) or list(map(type, labels)) != [bool] * len(steps):
        raise ValueError("labels must be a list of booleans, one for each of the completions")
    steps = [step.strip() for step in steps]
    answer = "\n".join(steps)
    if isinstance(prompt, str) and tokenizer.chat_template:
        prompt = [{"role": "user", "content": prompt}]
    if isinstance(prompt, str):
        prompt = prompt + "\n"
    else:
        answer = [{"role": "assistant", "content": answer}]
    (head, _), (rest, _), (said, _) = common.encode(tokenizer, prompt, answer, row.get("tools"))[0]
    asked = head + rest
    if len(asked) + len(said) > max_length:
        raise ValueError(f"it is longer than {max_length} tokens")
    return {"prompt": asked, "length": len(asked + said), "solution": {
        "input_ids": asked + said, "attention_mask": [1] * len(asked + said),
        "step_ends": [len(asked) + end for end in step_ends(tokenizer, said, steps)],
        "step_mask": [1] * len(steps),
        "loss_mask": [0] * (len(steps) - 1) + [1] if outcome else [1] * len(steps),
        "labels": list(map(int, labels))}}


def collate(examples, pad_id, device):
    """B examples as [B, T] tensors, padded on the right; masks are 0 there, even if pad is eos."""
    batch = {}
    for name in examples[0]:
        padding = pad_id if name == "input_ids" else 0
        rows = [torch.tensor(example[name]) for example in examples]
        batch[name] = pad_sequence(rows, batch_first=True, padding_value=padding).to(device)
    return batch


# ---- the method ----------------------------------------------------------------------------------

def step_ends(tokenizer, ids, steps):
    """Where each step ends: the index in `ids`, an answer, of the token with its last character.

    Tokens may hold parts of characters, so it is decoded prefixes that tell what has been said. A
    binary search over them finds the first that says all of a step.
    """
    plain = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
    text = tokenizer.decode(ids, **plain)
    ends, low, done = [], 0, 0
    for step in steps:
        start = text.find(step, done)
        if start < 0:
            raise ValueError(f"its tokens do not spell the step {step!r:.80}")
        done, high = start + len(step), len(ids) - 1
        while low < high:
            last = middle = (low + high) // 2
            # a prefix that ends within a character is spelled wrong: then a shorter one counts
            while not text.startswith(said := tokenizer.decode(ids[:last + 1], **plain)):
                last -= 1
            if len(said) >= done:
                high = last
            else:
                low = middle + 1
        ends.append(low)
    return ends


def step_logits(model, batch, head):
    """The logit of each step, [B, S], read at its last token; rows with fewer steps are padded."""
    causal = common.causal_lm(model)
    hidden = causal.base_model(input_ids=batch["input_ids"], use_cache=False,
                               attention_mask=batch["attention_mask"])[0]  # [B, T, D]
    hidden = hidden[torch.arange(len(hidden))[:, None], batch["step_ends"]]  # [B, S, D]
    # not `@`, which autocast would round to 16 bits: too coarse to compare
    return (hidden.float() * head.weight.float()).sum(-1)  # [B, S]


def step_losses(logits, labels, loss_mask):
    """Minus the log-likelihood of each step's label, [B, S]; 0 where the mask is."""
    right, wrong = F.logsigmoid(logits), F.logsigmoid(-logits)  # [B, S], log p and log(1 − p)
    return -(labels * right + (1 - labels) * wrong) * loss_mask


COUNTS = ("loss", "trained", "agreed", "steps", "hits", "flagged", "wrong", "by_min", "by_product",
          "by_last", "solutions")


def count_steps(losses, logits, batch):
    """Sums over B solutions of what the figures are made of, in the order of COUNTS."""
    steps = batch["step_mask"].bool()  # [B, S]
    judged = (logits >= 0) | ~steps  # [B, S]: p ≥ 1/2; where a row has no step, nothing is wrong
    labelled = batch["labels"].bool() | ~steps  # [B, S]
    flagged = ~judged.all(-1)  # [B]: some p < 1/2
    wrong = ~labelled.all(-1)  # [B]: some label is 0
    # a running product is 1 before the first wrong step and 0 from there on: its sum is the place
    same_place = judged.long().cumprod(-1).sum(-1) == labelled.long().cumprod(-1).sum(-1)  # [B]
    log_product = (F.logsigmoid(logits.double()) * steps).sum(-1)  # [B]
    last = judged.gather(1, steps.sum(-1, keepdim=True) - 1)[:, 0]  # [B]
    counts = [losses, batch["loss_mask"], (judged == labelled) & steps, steps,
              flagged & wrong & same_place, flagged, wrong, flagged == wrong,
              (log_product < math.log(0.5)) == wrong, last != wrong, torch.ones_like(wrong)]
    return torch.stack([count.detach().double().sum() for count in counts])


def step_figures(counts):
    """What is logged of the counts of some solutions."""
    n = dict(zip(COUNTS, counts.tolist(), strict=True))
    return {"loss": n["loss"] / n["trained"], "step_accuracy": n["agreed"] / n["steps"],
            "precision": n["hits"] / max(1, n["flagged"]), "recall": n["hits"] / max(1, n["wrong"]),
            "f1": 2 * n["hits"] / max(1, n["flagged"] + n["wrong"]),
            "accuracy_min": n["by_min"] / n["solutions"],
            "accuracy_product": n["by_product"] / n["solutions"],
            "accuracy_last": n["by_last"] / n["solutions"]}


def score_solutions(model, examples, pad_id):
    """The sum of the losses of B solutions, and their COUNTS."""
    batch = collate([example["solution"] for example in examples], pad_id, model.device)
    with common.autocast(model):
        logits = step_logits(model, batch, common.causal_lm(model).score)  # [B, S]
    losses = step_losses(logits, batch["labels"], batch["loss_mask"])  # [B, S]
    return losses.sum(), count_steps(losses, logits, batch)


# ---- the run -------------------------------------------------------------------------------------

@torch.no_grad()
def evaluate(model, examples, args, pad_id):
    """The figures of held-out solutions, which the processes share between them."""
    model.eval()
    mine = examples[common.RANK::common.WORLD]
    counts = torch.zeros(len(COUNTS), dtype=torch.float64, device=model.device)
    for i in range(0, len(mine), args.micro_batch_size):
        counts += score_solutions(model, mine[i:i + args.micro_batch_size], pad_id)[1]
    sum_over_processes([counts])
    model.train()
    return step_figures(counts)


@torch.no_grad()
def show_steps(model, tokenizer, examples, pad_id):
    """Prints some solutions with the probability that each step is right."""
    model.eval()
    batch = collate([example["solution"] for example in examples], pad_id, model.device)
    with common.autocast(model):
        chances = step_logits(model, batch, common.causal_lm(model).score).sigmoid().tolist()
    for row, example in zip(chances, examples, strict=True):
        asked = tokenizer.decode(example["prompt"], skip_special_tokens=True)
        print(f"\n{common.visible(' '.join(asked.split()))}\n{'p':>5}  label")
        start, solution = len(example["prompt"]), example["solution"]
        steps = zip(solution["step_ends"], solution["labels"], strict=True)
        for p, (end, label) in zip(row, steps, strict=False):  # the row is padded
            text = tokenizer.decode(solution["input_ids"][start:end + 1], skip_special_tokens=True)
            verdict = "right" if label else "wrong"
            print(f"{p:5.2f}  {verdict}  {common.visible(' '.join(text.split()))}")
            start = end + 1


def train(args):
    # 1. Data first: what is wrong with it shows before the model is loaded.
    tokenizer = common.load_tokenizer(args.model, args.chat_template, args.template_arguments)
    pad_id = tokenizer.pad_token_id
    encode = functools.partial(encode_solution, outcome=args.outcome)
    examples, held_out = common.load_examples(
        args, encode, tokenizer, limit=args.max_steps * args.batch_size)
    solution = examples[0]["solution"]  # the tokens whose scalar is trained, in green
    ids, ends = solution["input_ids"], solution["step_ends"][-1 if args.outcome else 0:]
    common.show(tokenizer, ids, [i in ends for i in range(len(ids))])

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
    open_run(args, [examples, held_out])
    state = restore(args, weights, optimizer, scaler)
    if "before" not in state:
        state["before"] = evaluate(model, held_out, args, pad_id)

    # the order follows from the seed, so that a run that goes on sees the same batches
    generator = torch.Generator().manual_seed(args.seed)
    order = [torch.randperm(len(examples), generator=generator) for epoch in range(args.epochs)]
    batches = torch.cat(order).split(args.batch_size)[:args.max_steps]
    progress = tqdm(range(state["step"] + 1, len(batches) + 1), initial=state["step"],
                    total=len(batches), disable=common.RANK > 0)
    for step in progress:
        # 4. The gradients of micro-batches and processes add up to that of the batch, because each
        #    step of a solution counts 1 / `trained`, wherever it is computed. Similar lengths share
        #    a pass.
        began = time.time()
        batch = sorted([examples[i] for i in batches[step - 1]], key=operator.itemgetter("length"))
        trained = sum(sum(example["solution"]["loss_mask"]) for example in batch)
        mine = batch[common.RANK::common.WORLD]
        counts = torch.zeros(len(COUNTS), dtype=torch.float64, device=model.device)
        for i in range(0, len(mine), args.micro_batch_size):
            loss, counted = score_solutions(model, mine[i:i + args.micro_batch_size], pad_id)
            scaler.scale(loss / trained).backward()
            counts += counted

        # 5. One step down the gradient, which is summed over processes and clipped.
        lr = learning_rate(step, len(batches), args.learning_rate)
        updated = update(optimizer, scaler, lr)

        # 6. Log, and save what is needed to go on.
        sum_over_processes([counts])
        metrics = {"step": step, **step_figures(counts), **updated, "seconds": time.time() - began}
        shown = {name: f"{metrics[name]:.3f}" for name in ("loss", "step_accuracy", "f1")}
        progress.set_postfix(shown, refresh=False)
        if args.eval_every and step % args.eval_every == 0:
            held = evaluate(model, held_out, args, pad_id)
            metrics |= {f"eval_{name}": value for name, value in held.items()}
        log_step(args, state, metrics)
        if step % args.save_every == 0 or step == len(batches):
            save(args, state, weights, optimizer, scaler)

    # 7. The same held-out solutions once more, and some of them step by step.
    finish(args, state, model, tokenizer, evaluate(model, held_out, args, pad_id))
    show_steps(model, tokenizer, held_out[:3], pad_id)


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
