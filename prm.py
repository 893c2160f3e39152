"""Process reward model: learns from labeled steps whether a solution is still correct after each.

The data are solutions to problems. A solution is a list of steps y_1 ... y_S, each with a label
l_k: 1 (correct) or 0 (wrong). The model is a language model with a scalar head, as in
reward_model.py. It reads the problem and the solution. Its output r_k at the last token of step k
is a logit, and σ(r_k) is the probability that step k is labeled correct.

Why it works. A label for a whole answer says that something is wrong with it, and leaves the model
to find out what. A label per step says where, so a model learns more from one solution, and its
judgment can be read at any point: to find the first mistake, to pick the best of several samples,
or to prune a search. The loss is the cross-entropy of logistic regression, applied to each step:

    p_k = σ(r_k)
    loss = −1/N Σ_k [ l_k log p_k + (1 − l_k) log(1 − p_k) ]       N: trained steps in the batch

This is process supervision (Uesato et al. 2022, arXiv:2211.14275; Lightman et al. 2023,
arXiv:2305.20050). The gradient with respect to r_k is (p_k − l_k) / N.

The meaning of a label differs between datasets, and so does the meaning of p_k:

    Uesato, tiny/data   Is everything correct up to and including this step? So p_S judges the
                        solution.
    Lightman            Is this step correct? The labels end at the first wrong step, and the
                        product Π_k p_k judges the solution.
    Math-Shepherd       Did any of 8 continuations from here reach the correct answer? (Wang et al.
                        2023, arXiv:2312.08935, the default dataset.)

The minimum, min_k p_k, which Math-Shepherd uses, suits all three, because a solution is only as
good as its worst step.

With --outcome, only the label of the last step is trained on. This makes an outcome reward model,
which gets one label per solution and must work out by itself where the mistake is. (In the papers
it is trained on that label at every step or token, and read at the last one.) Its held-out figures
are computed as for a process reward model, except for the loss, which covers the last steps only.

Kept from the reward model: the scalar head, the adapter, the loop. Dropped: the pairs, the
centering. A label is absolute, not relative to another answer, so r_k = 0 means a probability of
one half.

A worked example. Let the logits of three steps be 2, 1 and −1, and their labels 1, 1 and 0:

    p = 0.881, 0.731, 0.269; loss = −(log 0.881 + log 0.731 + log(1 − 0.269)) / 3
                                  = (0.127 + 0.313 + 0.313) / 3 = 0.251
    gradient: (p − l) / 3 = −0.040, −0.090, 0.090

Step 3 is the first with p < 1/2 and the first labeled wrong, so the mistake is found. min p = 0.269
and Π p = 0.173 are below 1/2, so both judge the solution wrong, as they should.

    python prm.py                                        # the embedded tiny model, on a laptop
    python prm.py --outcome                              # trained on the last step only, to compare
    python prm.py --model Qwen/Qwen2.5-0.5B-Instruct     # 4-bit LoRA on a 16 GB T4

What to watch. The loss starts near log 2 = 0.693. The step accuracy soon reaches the share of the
more frequent label, so it says little where most steps are correct. The figure that counts is `f1`,
which measures how well the first mistake is found; ProcessBench defines its F1 differently.
`count_steps` and `step_figures` give the definitions.

Try --outcome. On the tiny model, with the same solutions and as many optimizer steps, p_S then
judges about 0.69 of the held-out solutions correctly instead of 0.97, and f1 is 0.4 instead of
0.98, because the label at the end does not say which of the steps was wrong.

Shapes: B solutions of T tokens and S steps, padding included; D is the width of the model.
"""
import argparse
import functools
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

TINY = dict(dataset="tiny/data/steps_train.jsonl", epochs=10, max_steps=800, micro_batch_size=32,
            eval_dataset="tiny/data/steps_heldout.jsonl", eval_size=300, learning_rate=2e-3)


def make_flags():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=common.HelpFormatter)
    add = parser.add_argument
    add("--model", default="tiny/chat", help="Hub name, local folder or LoRA adapter to start from")
    add("--dataset", default="trl-lib/math_shepherd", help="Hub name[:config], or a local file")
    add("--split", default="train", help="split of a Hub dataset")
    add("--columns", **common.COLUMNS)
    add("--chat-template", help=common.TEMPLATE)
    add("--template-arguments", **common.VARIABLES)
    add("--eval-dataset", help="held-out solutions (without it, a part of --dataset is held out)")
    add("--eval-size", type=common.count, default=100, help="number of held-out solutions")
    add("--outcome", action="store_true", help="training on the last label of each solution only")
    add("--max-length", type=common.count, default=1024,
        help="longest problem + solution, in tokens; longer ones are dropped")
    add("--batch-size", type=common.count, default=32, help="solutions per optimizer step")
    add("--micro-batch-size", type=common.count, default=4, help="solutions per forward pass")
    add("--learning-rate", type=common.positive, default=1e-4, help=common.PEAK)
    add("--epochs", type=common.count, default=1, help="passes over the dataset")
    add("--max-steps", type=common.count, default=500, help="upper limit of optimizer steps")
    add("--lora-rank", **common.LORA_RANK, type=common.count)
    add("--load-in-4bit", **common.FOUR_BIT)
    add("--gradient-checkpointing", **common.CHECKPOINTING)
    add("--eval-every", type=common.natural, default=0, help="steps between evaluations; 0 is none")
    add("--save-every", type=common.count, default=50, help="steps between checkpoints")
    add("--seed", type=common.natural, default=0, help="seed of data order, LoRA and scalar head")
    add("--output-dir", default="runs/prm", help=common.RESUMED)
    return parser


# ---- data: a solution as token ids, and where its steps end --------------------------------------

def encode_solution(row, tokenizer, max_length, outcome):
    """Turns a row into {"prompt": ids, "solution": example}; the loss mask is 1 on trained steps.

    The steps become the lines of one answer. The answer is an assistant message if the prompt is a
    list of messages or the tokenizer has a chat template; otherwise it is plain text that starts on
    the line below the prompt. A solution that is too long is refused. Each step should be a single
    line, because pairs.py and evaluate.py treat every line as a step.
    """
    prompt, steps = read_steps(row, tokenizer)
    answer = "\n".join(steps)
    if isinstance(prompt, str) and tokenizer.chat_template:
        prompt = [{"role": "user", "content": prompt}]
    if isinstance(prompt, str):
        prompt = prompt + "\n"
    else:
        answer = [{"role": "assistant", "content": answer}]
    # An example consists of three pieces: the head of the prompt, the rest of it, and the answer.
    pieces = common.encode(tokenizer, prompt, answer, row.get("tools"))[0]
    (head, _), (rest, _), (answer_ids, _) = pieces
    prompt_ids = head + rest
    ids = prompt_ids + answer_ids
    if len(ids) > max_length:
        raise ValueError(f"it is longer than {max_length} tokens")
    ends = step_ends(tokenizer, answer_ids, steps)
    loss_mask = [1] * len(steps)
    if outcome:
        loss_mask[:-1] = [0] * (len(steps) - 1)
    solution = {"input_ids": ids, "attention_mask": [1] * len(ids),
                "step_ends": [len(prompt_ids) + end for end in ends],
                "step_mask": [1] * len(steps), "loss_mask": loss_mask,
                "labels": [int(label) for label in row["labels"]]}
    return {"prompt": prompt_ids, "length": len(ids), "solution": solution}


def read_steps(row, tokenizer):
    """The prompt of a row, and its steps without surrounding whitespace."""
    prompt = common.prompt_of(row, tokenizer)
    steps, labels = row.get("completions"), row.get("labels")
    if not prompt or not isinstance(prompt, str | list):
        raise ValueError("a prompt must be a string or a list of messages")
    if not isinstance(steps, list) or not all(isinstance(x, str) and x.strip() for x in steps):
        raise ValueError("completions must be a list of steps, none of them empty")
    if not isinstance(labels, list) or not all(isinstance(label, bool) for label in labels):
        raise ValueError("labels must be a list of booleans")
    if not steps or len(labels) != len(steps):
        raise ValueError(f"there are {len(steps)} completions and {len(labels)} labels")
    return prompt, [step.strip() for step in steps]


def collate(examples, pad_id, device):
    """B examples as tensors [B, T], padded on the right. Masks are 0 there, even if pad is eos."""
    batch = {}
    for name in examples[0]:
        padding = pad_id if name == "input_ids" else 0
        rows = [torch.tensor(example[name]) for example in examples]
        batch[name] = pad_sequence(rows, batch_first=True, padding_value=padding).to(device)
    return batch


# ---- the method ----------------------------------------------------------------------------------

def step_ends(tokenizer, ids, steps):
    """For each step, the index in the answer's `ids` of the token that completes it."""
    plain = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
    text = tokenizer.decode(ids, **plain)

    def spelled(last):
        """How many characters of the text the tokens up to index `last` spell."""
        said = tokenizer.decode(ids[:last + 1], **plain)
        # A token may end inside a character, which is then decoded wrong.
        while not text.startswith(said):
            said = said[:-1]
        return len(said)

    ends = []
    end = 0
    done = 0
    for step in steps:
        start = text.find(step, done)
        if start < 0:
            raise ValueError(f"its tokens do not spell the step {step!r:.80}")
        done = start + len(step)
        while spelled(end) < done:
            end += 1
        ends.append(end)
    return ends


def step_logits(model, batch, head):
    """The logit of each step [B, S], read at its last token. Rows with fewer steps are padded."""
    causal = common.causal_lm(model)
    hidden = causal.base_model(input_ids=batch["input_ids"], use_cache=False,
                               attention_mask=batch["attention_mask"])[0]  # [B, T, D]
    hidden = hidden[torch.arange(len(hidden))[:, None], batch["step_ends"]]  # [B, S, D]
    # `@` would run in 16 bits under autocast, which is too coarse to compare two rewards.
    return (hidden.float() * head.weight.float()).sum(-1)  # [B, S]


def step_losses(logits, labels, loss_mask):
    """The negative log-likelihood of each step's label, [B, S]; 0 where the loss mask is 0."""
    log_correct = F.logsigmoid(logits)  # [B, S]: log p
    log_wrong = F.logsigmoid(-logits)  # [B, S]: log(1 − p)
    log_likelihood = labels * log_correct + (1 - labels) * log_wrong  # [B, S]
    return -log_likelihood * loss_mask  # [B, S]


FIGURES = ("loss", "trained", "agreed", "steps", "found", "flagged", "wrong", "min_correct",
           "product_correct", "last_correct", "solutions")


def first_wrong(is_correct):
    """The index of the first wrong step of each solution, [B], from is_correct, [B, S].

    The running product is 1 before that step and 0 from there on, so its sum counts the steps
    before it. Where no step is wrong, the sum is S.
    """
    return is_correct.long().cumprod(-1).sum(-1)


def count_steps(losses, logits, batch):
    """The loss and the counts of each of B solutions, {name: [B]}, for `step_figures`.

    A step is judged correct if p ≥ 1/2. A solution is flagged if any of its steps is judged wrong,
    and it is wrong if any of its steps is labeled wrong. Its mistake is found if the first step
    judged wrong is also the first step labeled wrong.
    """
    is_step = batch["step_mask"].bool()  # [B, S]
    # Padding counts as correct, so that it is never the first wrong step.
    judged = (logits >= 0) | ~is_step  # [B, S]: p ≥ 1/2
    labeled = batch["labels"].bool() | ~is_step  # [B, S]
    flagged = ~judged.all(-1)  # [B]
    wrong = ~labeled.all(-1)  # [B]
    found = flagged & wrong & (first_wrong(judged) == first_wrong(labeled))  # [B]
    # Three verdicts on the whole solution: min_k p_k, Π_k p_k and p_S, each compared with 1/2.
    log_product = (F.logsigmoid(logits.double()) * is_step).sum(-1)  # [B]
    last_step = is_step.sum(-1, keepdim=True) - 1  # [B, 1]
    last_judged = judged.gather(1, last_step)[:, 0]  # [B]
    return {"loss": losses.sum(-1), "trained": batch["loss_mask"].sum(-1),
            "agreed": ((judged == labeled) & is_step).sum(-1), "steps": is_step.sum(-1),
            "found": found, "flagged": flagged, "wrong": wrong, "min_correct": flagged == wrong,
            "product_correct": (log_product < math.log(0.5)) == wrong,
            "last_correct": last_judged != wrong, "solutions": torch.ones_like(wrong)}


def step_figures(counts):
    """The figures of a set of solutions, from the sums of their counts.

    precision = found / flagged and recall = found / wrong (0 where nothing is flagged or wrong).
    f1 is their harmonic mean, 2 found / (flagged + wrong). ProcessBench (Zheng et al. 2024,
    arXiv:2412.06559) defines F1 as the harmonic mean of found / wrong and the share of correct
    solutions that are not flagged.
    """
    solutions = counts["solutions"]
    return {"loss": counts["loss"] / counts["trained"],
            "step_accuracy": counts["agreed"] / counts["steps"],
            "precision": counts["found"] / max(1, counts["flagged"]),
            "recall": counts["found"] / max(1, counts["wrong"]),
            "f1": 2 * counts["found"] / max(1, counts["flagged"] + counts["wrong"]),
            "accuracy_min": counts["min_correct"] / solutions,
            "accuracy_product": counts["product_correct"] / solutions,
            "accuracy_last": counts["last_correct"] / solutions}


def solution_losses(model, examples, pad_id):
    """The losses of the steps of B solutions, [B, S], and the solutions' counts, {name: [B]}."""
    batch = collate([example["solution"] for example in examples], pad_id, model.device)
    head = common.causal_lm(model).score  # the scalar head: its weight is [1, D]
    with common.autocast(model):
        logits = step_logits(model, batch, head)  # [B, S]
    losses = step_losses(logits, batch["labels"], batch["loss_mask"])  # [B, S]
    return losses, count_steps(losses, logits, batch)


# ---- the run -------------------------------------------------------------------------------------

@torch.no_grad()
def evaluate(model, examples, args, pad_id):
    """The figures of held-out solutions."""
    model.eval()
    # Process number RANK of WORLD takes every WORLD-th row. A single process (0 of 1) takes all.
    mine = examples[common.RANK::common.WORLD]
    sums = {}
    for i in range(0, len(mine), args.micro_batch_size):
        _, figures = solution_losses(model, mine[i:i + args.micro_batch_size], pad_id)
        add_up(sums, figures)
    counts = over_processes(sums, FIGURES, model.device)
    model.train()
    return step_figures(counts)


@torch.no_grad()
def show_steps(model, tokenizer, examples, pad_id):
    """Prints solutions, each step with the probability that it is correct and with its label."""
    model.eval()
    batch = collate([example["solution"] for example in examples], pad_id, model.device)
    with common.autocast(model):
        logits = step_logits(model, batch, common.causal_lm(model).score)  # [B, S]
    for probabilities, example in zip(logits.sigmoid().tolist(), examples, strict=True):
        solution = example["solution"]
        question = tokenizer.decode(example["prompt"])
        print(f"\n{common.visible(' '.join(question.split()))}\n{'p':>5}  label")
        start = len(example["prompt"])
        for k, end in enumerate(solution["step_ends"]):
            step = tokenizer.decode(solution["input_ids"][start:end + 1])
            label = "correct" if solution["labels"][k] else "wrong"
            line = f"{probabilities[k]:5.2f}  {label:<7}  {' '.join(step.split())}"
            print(common.visible(line))
            start = end + 1


def train(args):
    # 1. Load the data first, so that bad data fails before the model is loaded.
    tokenizer = common.load_tokenizer(args.model, args.chat_template, args.template_arguments)
    pad_id = tokenizer.pad_token_id
    encode = functools.partial(encode_solution, outcome=args.outcome)
    examples, held_out = common.load_examples(
        args, encode, tokenizer, limit=args.max_steps * args.batch_size)
    solution = examples[0]["solution"]
    is_trained = [0] * len(solution["input_ids"])
    for end, trained in zip(solution["step_ends"], solution["loss_mask"], strict=True):
        is_trained[end] = trained
    heading = "a training example as the model sees it (a step is judged at its green token):"
    common.show(tokenizer, solution["input_ids"], is_trained, heading)

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
    open_run(args, [examples, held_out])
    state = restore(args, weights, optimizer, scaler)
    if "before" not in state:
        state["before"] = evaluate(model, held_out, args, pad_id)

    # 4. Shuffle the data once per epoch. The order depends on the seed alone, so a resumed run
    #    sees the same batches.
    generator = torch.Generator().manual_seed(args.seed)
    order = [torch.randperm(len(examples), generator=generator) for epoch in range(args.epochs)]
    batches = torch.cat(order).split(args.batch_size)[:args.max_steps]
    progress = tqdm(range(state["step"] + 1, len(batches) + 1), initial=state["step"],
                    total=len(batches), disable=common.RANK > 0)
    for step in progress:
        began = time.time()

        # 5. Accumulate gradients over micro-batches. Each trained step of a solution has the weight
        #    1 / trained_steps, so the gradients of all micro-batches, in all processes, add up to
        #    the gradient of the batch. Sorting puts solutions of similar length together, which
        #    saves padding.
        batch = [examples[i] for i in batches[step - 1]]
        batch.sort(key=operator.itemgetter("length"))
        trained_steps = sum(sum(example["solution"]["loss_mask"]) for example in batch)
        mine = batch[common.RANK::common.WORLD]
        sums = {}
        for i in range(0, len(mine), args.micro_batch_size):
            rows = mine[i:i + args.micro_batch_size]
            losses, figures = solution_losses(model, rows, pad_id)
            scaler.scale(losses.sum() / trained_steps).backward()
            add_up(sums, figures)

        # 6. Take one optimizer step with the gradient, summed over processes and clipped.
        lr = learning_rate(step, len(batches), args.learning_rate)
        updated = update(optimizer, scaler, lr)

        # 7. Log the step, evaluate from time to time, and save a checkpoint.
        counts = over_processes(sums, FIGURES, model.device)
        metrics = {"step": step, **step_figures(counts), **updated}
        metrics["seconds"] = time.time() - began
        if args.eval_every and step % args.eval_every == 0:
            held = evaluate(model, held_out, args, pad_id)
            metrics |= {f"eval_{name}": value for name, value in held.items()}
        tokens = sum(len(example["solution"]["input_ids"]) for example in batch)
        log_step(args, state, metrics, tokens, progress, ("loss", "step_accuracy", "f1"))
        if step % args.save_every == 0 or step == len(batches):
            save(args, state, weights, optimizer, scaler)

    # 8. Evaluate again on the same held-out solutions, and show some of them step by step.
    finish(args, state, model, tokenizer, evaluate(model, held_out, args, pad_id))
    print("\nheld-out solutions, with p, the probability that a step is correct:")
    show_steps(model, tokenizer, held_out[:3], pad_id)
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
