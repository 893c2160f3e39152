"""SFT: supervised fine-tuning, which turns a model that continues text into one that answers.

It is next-token prediction on written answers, the first stage of InstructGPT (Ouyang et al. 2022,
arXiv:2203.02155). Of a conversation y, the model learns only what it should say: the turns of the
assistant, each with the token that ends it. The rest is read, not learned:

    loss = −1/N Σ_t log π(y_t | y_<t)     π: the model; t: the N trained tokens of an optimizer step

Kept from pretraining: everything. Added: the loss mask. The mean is over the whole step, not over
each conversation or micro-batch: the size of a micro-batch changes only speed and memory.

    python sft.py                                          # the embedded tiny model, on a laptop
    python sft.py --model Qwen/Qwen2.5-0.5B                # 4-bit LoRA on a 16 GB T4
    python sft.py --model Qwen/Qwen2.5-0.5B --dataset chats.jsonl --neftune-alpha 5
    python sft.py --model Qwen/Qwen2.5-0.5B --lora-rank 0  # all weights, in fp32

A dataset has the column `messages` (and `tools`) or ShareGPT's `conversations`, or a prompt and an
answer (`prompt` and `completion`, `instruction` and `output`, `question` and `answer`, ...; strings
or messages), or `text`. docs/your_data.md lists all forms.

What to watch: the loss falls steeply for a few dozen steps, while the model learns the form, then
slowly. Where the held-out loss (--eval-every) rises again, it learns the rows by heart. `stopped`,
the share of sampled answers that end by themselves, gets near 1.

Shapes: B conversations of T tokens, of which N are trained; D is the width of the model, V the size
of its vocabulary.
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
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

import common

flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
add = flags.add_argument
add("--model", default="tiny/base", help="Hub name, local folder or LoRA adapter to start from")
add("--dataset", default="trl-lib/Capybara", help="Hub name[:config], or a file")
add("--split", default="train", help="of a Hub dataset")
add("--columns", **common.COLUMNS, help="other names of columns: prompt=query completion=reply")
add("--chat-template", help="file with a chat template, in place of the model's own")
add("--template-arguments", **common.VARIABLES, help="variables that the chat template reads")
add("--eval-dataset", help="held-out rows (without it, some are kept out of --dataset)")
add("--eval-size", type=common.count, default=100, help="held-out rows")
add("--neftune-alpha", type=common.weight, default=0.0, help="noise that regularises; 5 is usual")
add("--max-length", type=common.number(int, 4), default=1024, help="of a conversation, in tokens")
add("--batch-size", type=common.count, default=32, help="conversations per optimizer step")
add("--micro-batch-size", type=common.count, default=4, help="conversations per forward pass")
add("--learning-rate", type=common.positive, default=2e-4, help="the highest: it rises, then falls")
add("--epochs", type=common.count, default=1, help="passes over the conversations")
add("--max-steps", type=common.count, default=500, help="optimizer steps at most")
add("--lora-rank", type=common.natural, default=16,
    help="rank of new LoRA matrices, on all linear layers, with an alpha of twice the rank.\n"
    "0: full fine-tuning; the default --learning-rate is then ten times lower")
add("--load-in-4bit", **common.ON_GPU, help="quantise the frozen base")
add("--gradient-checkpointing", **common.ON_GPU, help="compute activations twice, keep fewer")
add("--max-new-tokens", type=common.count, default=128, help="longest of 32 sampled answers")
add("--eval-every", type=common.natural, default=0, help="steps between evaluations; 0: none")
add("--save-every", type=common.count, default=50, help="steps between savings")
add("--seed", type=common.natural, default=0, help="of data order, LoRA matrices and samples")
add("--track", choices=["wandb", "trackio"], help="also send the metrics there")
add("--output-dir", default="runs/sft", help="the same command again goes on where it stopped")
TINY = dict(dataset="tiny/data/sft_train.jsonl", eval_dataset="tiny/data/sft_heldout.jsonl",
            learning_rate=3e-3, epochs=2, micro_batch_size=32)


# ---- data: token ids, and a mask on what is trained ----------------------------------------------

def encode_conversation(row, tokenizer, max_length):
    """The examples of a row: one, or one per answer if the template drops old thoughts (Qwen3)."""
    examples = []
    given, answer = prompt_and_answer(row, tokenizer)
    encoded = common.encode(tokenizer, given, answer, row.get("tools"))
    for pieces in encoded:  # of (ids, is_answer): the head, the rest of the prompt, the answer, ...
        tokens = with_mask(pieces)
        tokens["loss_mask"][0] = 0  # there is nothing to predict the first token from
        head, whole = len(pieces[0][0]), len(tokens["input_ids"])
        tokens = shorten(tokens, whole, head, tokens["loss_mask"].index(1), max_length)
        # samples start from what precedes the first answer, of plain text from its first quarter
        start, length = tokens["loss_mask"].index(1), len(tokens["input_ids"])
        shown = start if start > 1 else length // 4 + 1
        examples.append({"tokens": tokens, "prompt": tokens["input_ids"][:shown],
                         "length": length, "truncated": whole > max_length})
    # chats that begin alike differ by what comes before their last answer
    key = [token for ids, _ in encoded[-1][:-1] for token in ids]
    return [example | {"key": key or example["prompt"]} for example in examples]


def prompt_and_answer(row, tokenizer):
    """Both are strings or lists of messages, of which the assistant's turns are learned."""
    messages = row.get("messages") or row.get("conversations")
    if messages:
        return [], common.with_system(messages, row)
    answer = common.answer_of(row)
    if answer is not None and row.keys() & set(common.QUESTIONS):
        return common.prompt_of(row, tokenizer), answer
    if row.get("text"):
        return "", row["text"]
    raise ValueError("it has no messages, no prompt with a completion, and no text")


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


def sft_loss(logps, loss_mask, trained_tokens):
    """−Σ log p / N, from logps [B, T-1] and loss_mask [B, T].

    N counts the trained tokens of the whole step, so that the gradients of micro-batches add up. A
    mean over each would weigh tokens more where answers are short.
    """
    return -(logps * loss_mask[:, 1:]).sum() / trained_tokens  # []


def add_noise(alpha, base, inputs, kwargs):
    """A hook: embeddings with noise within ±α/√(L·D) (NEFTune, Jain et al. 2023, 2310.05914)."""
    if not base.training:
        return inputs, kwargs
    embeddings = base.get_input_embeddings()(kwargs["input_ids"])  # [B, L, D]
    lengths = kwargs["attention_mask"].sum(-1)[:, None, None]  # [B, 1, 1]: L of each row, unpadded
    bound = alpha / (lengths * embeddings.shape[-1]).sqrt()
    noise = bound * (2 * torch.rand_like(embeddings) - 1)
    return inputs, kwargs | {"input_ids": None, "inputs_embeds": embeddings + noise}


def score_rows(model, examples, pad_id):
    """Log-probs and mask of some examples."""
    batch = collate([x["tokens"] for x in examples], pad_id, model.device)
    with common.autocast(model):
        return token_logps(model, batch), batch["loss_mask"]


def count_trained(examples):
    return sum(sum(x["tokens"]["loss_mask"]) for x in examples)


# ---- the run -------------------------------------------------------------------------------------

@torch.no_grad()
def evaluate(model, examples, args, pad_id):
    """The mean loss per trained token of held-out rows, which the processes share between them."""
    model.eval()
    mine = examples[common.RANK::common.WORLD]
    trained_tokens = count_trained(examples)
    loss = torch.zeros((), dtype=torch.float64, device=model.device)
    for i in range(0, len(mine), args.micro_batch_size):
        rows = mine[i:i + args.micro_batch_size]
        loss += sft_loss(*score_rows(model, rows, pad_id), trained_tokens)
    sum_over_processes([loss])
    model.train()
    return {"loss": loss.item(), "perplexity": math.exp(min(loss.item(), 99))}


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


def share_stopped(model, tokenizer, answers):
    stop_ids = set(common.stop_token_ids(tokenizer, model.generation_config))
    return sum(not stop_ids.isdisjoint(ids) for ids in answers) / len(answers)


def train(args):
    # 1. Data first: what is wrong with it shows before the model is loaded.
    tokenizer = common.load_tokenizer(args.model, args.chat_template, args.template_arguments)
    pad_id = tokenizer.pad_token_id
    examples, held_out = common.load_examples(
        args, encode_conversation, tokenizer, limit=args.max_steps * args.batch_size)
    common.show(tokenizer, examples[0]["tokens"]["input_ids"], examples[0]["tokens"]["loss_mask"])

    # 2. A frozen base with LoRA matrices, which alone are trained, or all weights.
    torch.manual_seed(args.seed)
    model = common.load_model(
        args.model, args.load_in_4bit, args.lora_rank, args.gradient_checkpointing,
        keep_reference=False)
    weights = {name: p for name, p in model.named_parameters() if p.requires_grad}
    # `update` sets the learning rate.
    optimizer = torch.optim.AdamW(weights.values(), weight_decay=0.0)
    scaler = common.grad_scaler(model)  # for fp16 (a T4), where small gradients round to 0
    if args.neftune_alpha:
        noise = functools.partial(add_noise, args.neftune_alpha)
        common.causal_lm(model).base_model.register_forward_pre_hook(noise, with_kwargs=True)
    print(common.settings(model))

    # 3. Where the run stands: at its start, or where it was interrupted.
    open_run(args, [examples, held_out])
    state = restore(args, weights, optimizer, scaler)
    prompts = [x["prompt"] for x in held_out[:32]]
    if "before" not in state:
        state["before"] = evaluate(model, held_out, args, pad_id)
        answers = sample_answers(model, tokenizer, prompts, args.max_new_tokens, args.seed)
        state["before"]["stopped"] = share_stopped(model, tokenizer, answers)
        state["answers"] = answers[:3]

    # the order follows from the seed, so that a run that goes on sees the same batches
    generator = torch.Generator().manual_seed(args.seed)
    order = [torch.randperm(len(examples), generator=generator) for epoch in range(args.epochs)]
    batches = torch.cat(order).split(args.batch_size)[:args.max_steps]
    progress = tqdm(range(state["step"] + 1, len(batches) + 1), initial=state["step"],
                    total=len(batches), disable=common.RANK > 0)
    for step in progress:
        # 4. The gradients of micro-batches and processes add up to that of the batch, because all
        #    divide by the trained tokens of the whole batch. Rows of similar length share a pass.
        began = time.time()
        torch.manual_seed(args.seed + step * common.WORLD + common.RANK)  # of NEFTune's noise
        batch = sorted([examples[i] for i in batches[step - 1]], key=operator.itemgetter("length"))
        trained_tokens = count_trained(batch)
        mine = batch[common.RANK::common.WORLD]
        loss = torch.zeros((), dtype=torch.float64, device=model.device)
        for i in range(0, len(mine), args.micro_batch_size):
            rows = mine[i:i + args.micro_batch_size]
            micro_loss = sft_loss(*score_rows(model, rows, pad_id), trained_tokens)
            scaler.scale(micro_loss).backward()
            loss += micro_loss.detach()

        # 5. One step down the gradient, which is summed over processes and clipped.
        lr = learning_rate(step, len(batches), args.learning_rate)
        updated = update(optimizer, scaler, lr)

        # 6. Log, and save what is needed to go on.
        sum_over_processes([loss])
        metrics = {"step": step, "loss": loss.item(), "trained_tokens": trained_tokens}
        metrics |= {**updated, "seconds": time.time() - began}
        progress.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
        if args.eval_every and step % args.eval_every == 0:
            held = evaluate(model, held_out, args, pad_id)
            metrics |= {f"eval_{name}": value for name, value in held.items()}
        log_step(args, state, metrics)
        if step % args.save_every == 0 or step == len(batches):
            save(args, state, weights, optimizer, scaler)

    # 7. The same held-out rows and prompts once more.
    after = evaluate(model, held_out, args, pad_id)
    answers = sample_answers(model, tokenizer, prompts, args.max_new_tokens, args.seed)
    after["stopped"] = share_stopped(model, tokenizer, answers)
    for row in zip(prompts[:3], state["answers"], answers[:3], strict=True):
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
