"""SFT: supervised fine-tuning, which turns a model that continues text into one that answers.

The data are conversations. The model learns to write the assistant's turns, each with the token
that ends it. Everything else is context, which the model reads but is not trained to write.

Why it works. A pretrained model can continue any text. It continues a question with an answer, but
just as readily with another question. SFT raises the probability of one kind of continuation, the
answer. It teaches little that is new; it selects a behavior that the model is already capable of,
which is why a thousand good conversations can be enough (Zhou et al. 2023, arXiv:2305.11206).

As in pretraining, the objective is the negative log-likelihood of the next token, but a loss mask
m_t (1: trained, 0: context) restricts it to the assistant's tokens. SFT is the first stage of
InstructGPT (Ouyang et al. 2022, arXiv:2203.02155):

    loss = −1/N Σ_t m_t log π(y_t | y_<t)          N = Σ_t m_t, over all tokens of an optimizer step

π is the model, y a conversation, and y_<t its tokens before t. The gradient of log π(y_t | y_<t)
with respect to the logits is the one-hot vector of y_t minus the softmax. So each step moves
probability from all other tokens to y_t, and it moves less as the probability of y_t nears 1.

Kept from pretraining: the objective and the model. New: the loss mask, and the chat template that
turns messages into one string. N counts the trained tokens of the whole optimizer step, not those
of one conversation or micro-batch. So every token has the same weight, and the micro-batch size
changes speed and memory but not the result.

LoRA (Hu et al. 2021, arXiv:2106.09685) freezes the model and trains a small number of new weights.
A frozen weight matrix W [D, D] is used as W + (α/r) B A, and only A [r, D] and B [D, r] are
trained, with a small rank r. B starts at 0, so training starts exactly at the base model. With the
adapter (A and B) switched off, the model *is* the base model. Later methods get their reference
model this way, without a second copy in memory. "4-bit" (QLoRA, Dettmers et al. 2023,
arXiv:2305.14314) stores the frozen W in 4 bits per weight to save memory.

A model predicts the *next* token, so the log-prob in column t belongs to the token in column t + 1.
For the question "Hi" and the answer "Hello":

    column        0       1     2      3        4              5
    token       <user>   Hi   <end>  <asst>   Hello          <end>
    loss_mask     0       0     0      0        1              1           [T]
    logps         0       0     0   log p(Hello)  log p(<end>)             [T−1]

A worked example. Let p(Hello) = 0.5 and p(<end>) = 0.8, and let a second conversation in the same
step have four trained tokens with the probabilities 0.25, 0.5, 0.5 and 0.8:

    −Σ log p = 0.693 + 0.223 = 0.916 for the first, 1.386 + 0.693 + 0.693 + 0.223 = 2.996
    loss = (0.916 + 2.996) / 6 = 0.652, perplexity = e^0.652 = 1.919

The mean of the two conversations' means would be 0.604. It would give a token of the short answer
twice the weight of a token of the long one. A perplexity of 1.919 means that, on average,
the model is as uncertain as if it chose among 1.919 equally likely tokens.

    python sft.py                                          # the embedded tiny model, on a laptop
    python sft.py --model Qwen/Qwen2.5-0.5B                # 4-bit LoRA on a 16 GB T4
    python sft.py --model Qwen/Qwen2.5-0.5B --dataset chats.jsonl --neftune-alpha 5
    python sft.py --model Qwen/Qwen2.5-0.5B --lora-rank 0  # full fine-tuning, in fp32

A row of the dataset has the column `messages` (perhaps with `tools`) or ShareGPT's `conversations`,
or a prompt and an answer (`prompt` and `completion`, `instruction` and `output`, `question` and
`answer`, ...; strings or messages), or `text`. docs/your_data.md lists all forms.

What to watch. The loss falls steeply for a few dozen steps while the model learns the format, then
slowly. If the held-out loss (--eval-every) rises again while the training loss keeps falling, the
model is memorizing its data (overfitting), so train for fewer epochs. `stopped`, the share of
sampled answers that end with a stop token before the length limit, approaches 1.

Try setting every entry of the mask to 1 in `with_mask`. On the tiny model the held-out loss then
ends at 1.55 instead of 0.15, because it also counts the words of the questions, which nobody can
predict, and the samples contain made-up questions. Or train on all of an answer except the token
that ends it. The samples then run on into text like that of pretraining, as in "12 + 9 = 21? Yes."

Shapes: B conversations of T tokens, padding included; L ≤ T columns hold tokens (the rest are
padding in every row). N tokens are trained, and the logits of C of them are computed at a time. D
is the width of the model, V the size of its vocabulary, and r the rank.
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
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

import common

TINY = dict(dataset="tiny/data/sft_train.jsonl", eval_dataset="tiny/data/sft_heldout.jsonl",
            learning_rate=3e-3, epochs=2, micro_batch_size=32)


def make_flags():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=common.HelpFormatter)
    add = parser.add_argument
    add("--model", default="tiny/base", help="Hub name, local folder or LoRA adapter to start from")
    add("--dataset", default="trl-lib/Capybara", help="Hub name[:config], or a local file")
    add("--split", default="train", help="split of a Hub dataset")
    add("--columns", **common.COLUMNS)
    add("--chat-template", help=common.TEMPLATE)
    add("--template-arguments", **common.VARIABLES)
    add("--eval-dataset", help="held-out rows (without it, a part of --dataset is held out)")
    add("--eval-size", type=common.count, default=100, help="number of held-out rows")
    add("--neftune-alpha", type=common.weight, default=0.0,
        help="scale α of NEFTune's noise on the embeddings, a regularizer; 5 is typical, 0 is off")
    add("--max-length", type=common.number(int, 4), default=1024,
        help="longest conversation, in tokens; longer ones are truncated")
    add("--batch-size", type=common.count, default=32, help="conversations per optimizer step")
    add("--micro-batch-size", type=common.count, default=4, help="conversations per forward pass")
    add("--learning-rate", type=common.positive, default=2e-4, help=common.PEAK)
    add("--epochs", type=common.count, default=1, help="passes over the dataset")
    add("--max-steps", type=common.count, default=500, help="upper limit of optimizer steps")
    add("--lora-rank", type=common.natural, default=16,
        help="rank of the LoRA matrices on all linear layers; their alpha is twice the rank.\n"
        "0 means full fine-tuning, with a default --learning-rate that is ten times lower")
    add("--load-in-4bit", **common.FOUR_BIT)
    add("--gradient-checkpointing", **common.CHECKPOINTING)
    add("--max-new-tokens", type=common.count, default=128, help="length limit of sampled answers")
    add("--eval-every", type=common.natural, default=0, help="steps between evaluations; 0 is none")
    add("--save-every", type=common.count, default=50, help="steps between checkpoints")
    add("--seed", type=common.natural, default=0, help="seed of data order, LoRA and samples")
    add("--output-dir", default="runs/sft", help=common.RESUMED)
    return parser


# ---- data: token ids, and a mask on what is trained ----------------------------------------------

def encode_conversation(row, tokenizer, max_length):
    """Turns a row into a list of examples, usually one.

    If the chat template drops the reasoning of earlier turns, as Qwen3's does, each answer becomes
    an example of its own. common.encode returns an example as a list of pieces, (ids, is_answer):
    the head of the prompt (BOS, system message), the rest of the prompt, the answer, and perhaps
    further turns. For example, without a head:

        [([], False), ([<user>, Hi, <end>, <asst>], False), ([Hello, <end>], True)]
    """
    prompt, answer = prompt_and_answer(row, tokenizer)
    conversations = common.encode(tokenizer, prompt, answer, row.get("tools"))
    # Many chats begin alike, so the key is everything before the last answer. Where held-out
    # examples are split off from --dataset, no training example has the key of a held-out one.
    before_last_answer = conversations[-1][:-1]
    key = [token for ids, _ in before_last_answer for token in ids]
    examples = []
    for pieces in conversations:
        tokens = with_mask(pieces)
        # The first token has no context from which it could be predicted.
        tokens["loss_mask"][0] = 0
        head_length = len(pieces[0][0])
        whole_length = len(tokens["input_ids"])
        first_trained = tokens["loss_mask"].index(1)
        tokens = shorten(tokens, whole_length, head_length, first_trained, max_length)
        length = len(tokens["input_ids"])
        # Samples continue the context of the first answer, or the first quarter of a plain text.
        prompt_length = tokens["loss_mask"].index(1)
        is_plain_text = prompt_length == 1
        if is_plain_text:
            prompt_length = length // 4 + 1
        prompt_ids = tokens["input_ids"][:prompt_length]
        examples.append({"tokens": tokens, "prompt": prompt_ids, "key": key or prompt_ids,
                         "length": length, "truncated": whole_length > max_length})
    return examples


def prompt_and_answer(row, tokenizer):
    """Returns the prompt and the answer of a row, each a string or a list of messages.

    The trained part is the answer: all of a string, or the assistant's messages of a list.
    """
    messages = row.get("messages") or row.get("conversations")
    if messages:
        return [], common.with_system(messages, row)
    answer = common.answer_of(row)
    has_question = any(name in row for name in common.QUESTIONS)
    if answer is not None and has_question:
        return common.prompt_of(row, tokenizer), answer
    if row.get("text"):
        return "", row["text"]
    raise ValueError("it has no messages, no prompt with a completion, and no text")


def with_mask(pieces):
    """Joins pieces (ids, is_answer) into one example. Its loss mask is 1 on the answers."""
    input_ids = []
    loss_mask = []
    for ids, is_answer in pieces:
        input_ids += ids
        loss_mask += [int(is_answer)] * len(ids)
    return {"input_ids": input_ids, "loss_mask": loss_mask, "attention_mask": [1] * len(input_ids)}


def shorten(example, length, head, start, max_length):
    """Truncates an example: first the middle of its prompt, then the end of its answer.

    The prompt ends at `start`. Its first `head` tokens (BOS and the system message) are kept, and
    so is its end: at least max_length / 4 tokens of it, and at least max_length / 2 prompt tokens
    in total. `length` is the length of the example. In a pair it is the length of the longer
    example, so that both keep the same prompt.
    """
    room = max(max_length // 2, head + max_length // 4)
    cut = max(0, min(length - max_length, start - room))
    short = {name: (x[:head] + x[head + cut:])[:max_length] for name, x in example.items()}
    if 1 not in short.get("loss_mask", [1]):
        raise ValueError(f"its system message leaves no room for an answer in {max_length} tokens")
    return short


def collate(examples, pad_id, device):
    """B examples as tensors [B, T], padded on the right. Masks are 0 there, even if pad is eos."""
    batch = {}
    for name in examples[0]:
        padding = pad_id if name == "input_ids" else 0
        rows = [torch.tensor(example[name]) for example in examples]
        batch[name] = pad_sequence(rows, batch_first=True, padding_value=padding).to(device)
    return batch


# ---- the method ----------------------------------------------------------------------------------

def token_logps(model, batch, temperature=1.0):
    """[B, T-1]: column t is log p(token t+1 | tokens ≤ t) where the loss mask is 1, else 0.

    Equivalent to these two lines, which would hold the logits of all positions in memory at once:

        logps = (model(input_ids).logits[:, :-1] / temperature).log_softmax(-1)     # [B, T-1, V]
        return logps.gather(2, input_ids[:, 1:, None])[:, :, 0] * loss_mask[:, 1:]  # [B, T-1]

    Here logits are computed only where the mask is 1, for C positions at a time, and `checkpoint`
    computes them once more in the backward pass instead of storing them.
    """
    causal = common.causal_lm(model)
    # Columns that are padding in every row are not read. L ≤ T columns remain.
    used = batch["attention_mask"].any(0)  # [T]
    inputs = {name: batch[name][:, used] for name in ("input_ids", "attention_mask")}  # [B, L]
    hidden = causal.base_model(**inputs, use_cache=False)[0]  # [B, L, D]
    # The hidden state at position t predicts token t+1, so targets start at the second token.
    is_target = batch["loss_mask"][:, 1:].bool()  # [B, T-1]
    targets = batch["input_ids"][:, 1:][is_target]  # [N]
    hidden = hidden[:, :-1][is_target[:, used[1:]]]  # [N, D]
    # The logits of one chunk take 64 MiB. All of them, [N, V], could fill a T4.
    vocabulary = causal.get_output_embeddings().weight.shape[0]
    chunk = max(1, 2**24 // vocabulary)
    logps = []
    for piece, target in zip(hidden.split(chunk), targets.split(chunk), strict=True):
        logps.append(checkpoint(
            chunk_logps, piece, target, causal, temperature, use_reentrant=False))  # [C]
    zeros = torch.zeros(is_target.shape, device=hidden.device)  # [B, T-1]
    return zeros.masked_scatter(is_target, torch.cat(logps))


def chunk_logps(hidden, targets, causal, temperature):
    """The log-probs [C] of C target tokens, from the hidden states [C, D] that predict them."""
    # The softmax is computed in fp32, because 16-bit numbers are too coarse.
    logits = common.read_out(causal, hidden).float().div_(temperature)  # [C, V]
    return -F.cross_entropy(logits, targets, reduction="none")  # [C]


FIGURES = ("loss",)


def sft_loss(logps, loss_mask, trained_tokens):
    """−Σ_t m_t log π(y_t | y_<t) / N, a scalar, from logps [B, T-1] and loss_mask [B, T].

    N, `trained_tokens`, counts the trained tokens of the whole step. So the losses of the
    micro-batches add up to the loss of the step, and their gradients to its gradient.
    """
    return -(logps * loss_mask[:, 1:]).sum() / trained_tokens  # []


def batch_loss(model, examples, trained_tokens, pad_id):
    """The contribution of B conversations to the loss of a step, a scalar."""
    batch = collate([example["tokens"] for example in examples], pad_id, model.device)
    with common.autocast(model):
        logps = token_logps(model, batch)  # [B, T-1]
    return sft_loss(logps, batch["loss_mask"], trained_tokens)  # []


def count_trained(examples):
    """The number of trained tokens, N, in a list of examples."""
    return sum(sum(example["tokens"]["loss_mask"]) for example in examples)


def add_noise(alpha, base, inputs, kwargs):
    """NEFTune (Jain et al. 2023, arXiv:2310.05914): adds noise to the embeddings in training.

    The noise is uniform in ±α/√(n·D) for a row of n tokens, not counting padding. It makes it
    harder to memorize the exact wording of the data. This function is a hook that runs before the
    model: it looks up the embeddings itself and passes them on, with noise, in place of the ids.
    """
    if not base.training:
        return inputs, kwargs
    embeddings = base.get_input_embeddings()(kwargs["input_ids"])  # [B, L, D]
    lengths = kwargs["attention_mask"].sum(-1)[:, None, None]  # [B, 1, 1]: n of each row
    bound = alpha / (lengths * embeddings.shape[-1]).sqrt()  # [B, 1, 1]
    noise = bound * (2 * torch.rand_like(embeddings) - 1)  # [B, L, D]
    return inputs, kwargs | {"input_ids": None, "inputs_embeds": embeddings + noise}


# ---- the run -------------------------------------------------------------------------------------

@torch.no_grad()
def evaluate(model, examples, args, pad_id):
    """The mean loss per trained token of held-out examples, and its exponential, the perplexity."""
    model.eval()
    trained_tokens = count_trained(examples)
    # Process number RANK of WORLD takes every WORLD-th row. A single process (0 of 1) takes all.
    mine = examples[common.RANK::common.WORLD]
    sums = {}
    for i in range(0, len(mine), args.micro_batch_size):
        rows = mine[i:i + args.micro_batch_size]
        add_up(sums, {"loss": batch_loss(model, rows, trained_tokens, pad_id)})
    loss = over_processes(sums, FIGURES, model.device)["loss"]
    model.train()
    return {"loss": loss, "perplexity": math.exp(min(loss, 99))}


@torch.no_grad()
def sample_answers(model, tokenizer, prompts, length, seed):
    """Samples an answer of up to `length` tokens to each of B prompts, at temperature 1.

    Returns lists of ids. An answer ends with its stop token, unless it reaches `length`. Tokens
    are drawn from softmax(logits), because `generate` would also apply the generation config of
    the model: beams, penalties, suppressed tokens.
    """
    model.eval()  # in train mode, gradient checkpointing would silently drop the KV cache
    torch.manual_seed(seed)
    stop_ids = common.stop_token_ids(tokenizer, model.generation_config)
    # Left padding: all prompts end in the last column, where the first token is predicted.
    prompts = [ids[length - tokenizer.model_max_length:] for ids in prompts]  # room for the answer
    batch = tokenizer.pad({"input_ids": prompts}, padding_side="left", return_tensors="pt")
    token = batch["input_ids"].to(model.device)  # [B, T], and [B, 1] after the first pass
    mask = batch["attention_mask"].to(model.device)  # [B, T], one column more with every token
    cache = None
    answers = [[] for _ in prompts]
    for _ in range(length):
        with common.autocast(model):
            logits, cache = common.read(common.causal_lm(model), token, mask, cache)  # [B, V]
        token = torch.multinomial(logits.float().softmax(-1), 1)  # [B, 1]
        for answer, new in zip(answers, token[:, 0].tolist(), strict=True):
            if not answer or answer[-1] not in stop_ids:
                answer.append(new)
        if all(answer[-1] in stop_ids for answer in answers):
            break
        mask = F.pad(mask, (0, 1), value=1)
    model.train()
    return answers


def show_samples(samples):
    """Prints prompts, each with one answer from before training and one from after."""
    print("\nsamples: held-out prompts, each answered before and after training")
    for sample in samples:
        print()
        for name, text in sample.items():
            print(f"{name:>8}: {' '.join(text.split())}")


def share_stopped(answers, stop_ids):
    """The share of answers that end with a stop token, not at the length limit."""
    return sum(answer[-1] in stop_ids for answer in answers) / len(answers)


def train(args):
    # 1. Load the data first, so that bad data fails before the model is loaded.
    tokenizer = common.load_tokenizer(args.model, args.chat_template, args.template_arguments)
    pad_id = tokenizer.pad_token_id
    examples, held_out = common.load_examples(
        args, encode_conversation, tokenizer, limit=args.max_steps * args.batch_size)
    heading = "a training example as the model sees it (trained tokens in green"
    if args.dataset == TINY["dataset"]:
        heading += "; 43% of the answers in this file are wrong on purpose"
    tokens = examples[0]["tokens"]
    common.show(tokenizer, tokens["input_ids"], tokens["loss_mask"], heading + "):")

    # 2. Load the model: a frozen base with trainable LoRA matrices or, with --lora-rank 0, a model
    #    whose weights are all trained.
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
    common.print_settings(model)

    # 3. Start a new run, or resume an interrupted one. A new run is evaluated before training.
    open_run(args, [examples, held_out])
    state = restore(args, weights, optimizer, scaler)
    prompts = [example["prompt"] for example in held_out[:32]]
    stop_ids = common.stop_token_ids(tokenizer, model.generation_config)
    if "before" not in state:
        state["before"] = evaluate(model, held_out, args, pad_id)
        answers = sample_answers(model, tokenizer, prompts, args.max_new_tokens, args.seed)
        state["before"]["stopped"] = share_stopped(answers, stop_ids)
        state["answers"] = answers[:3]

    # 4. Shuffle the data once per epoch. The order depends on the seed alone, so a resumed run
    #    sees the same batches.
    generator = torch.Generator().manual_seed(args.seed)
    order = [torch.randperm(len(examples), generator=generator) for epoch in range(args.epochs)]
    batches = torch.cat(order).split(args.batch_size)[:args.max_steps]
    progress = tqdm(range(state["step"] + 1, len(batches) + 1), initial=state["step"],
                    total=len(batches), disable=common.RANK > 0)
    for step in progress:
        began = time.time()
        # NEFTune draws different noise in every step and in every process.
        torch.manual_seed(args.seed + step * common.WORLD + common.RANK)

        # 5. Accumulate gradients over micro-batches. Each loss is divided by the number of trained
        #    tokens in the whole batch, so the gradients of all micro-batches, in all processes, add
        #    up to the gradient of the batch. Sorting puts conversations of similar length together,
        #    which saves padding.
        batch = [examples[i] for i in batches[step - 1]]
        batch.sort(key=operator.itemgetter("length"))
        trained_tokens = count_trained(batch)
        mine = batch[common.RANK::common.WORLD]
        sums = {}
        for i in range(0, len(mine), args.micro_batch_size):
            rows = mine[i:i + args.micro_batch_size]
            loss = batch_loss(model, rows, trained_tokens, pad_id)
            scaler.scale(loss).backward()
            add_up(sums, {"loss": loss})

        # 6. Take one optimizer step with the gradient, summed over processes and clipped.
        lr = learning_rate(step, len(batches), args.learning_rate)
        updated = update(optimizer, scaler, lr)

        # 7. Log the step, evaluate from time to time, and save a checkpoint.
        metrics = {"step": step, **over_processes(sums, FIGURES, model.device)}
        metrics |= {"trained_tokens": trained_tokens, **updated, "seconds": time.time() - began}
        if args.eval_every and step % args.eval_every == 0:
            held = evaluate(model, held_out, args, pad_id)
            metrics |= {f"eval_{name}": value for name, value in held.items()}
        tokens = sum(len(example["tokens"]["input_ids"]) for example in batch)
        log_step(args, state, metrics, tokens, progress, FIGURES)
        if step % args.save_every == 0 or step == len(batches):
            save(args, state, weights, optimizer, scaler)

    # 8. Evaluate again on the same held-out rows and prompts, and show some answers.
    after = evaluate(model, held_out, args, pad_id)
    answers = sample_answers(model, tokenizer, prompts, args.max_new_tokens, args.seed)
    after["stopped"] = share_stopped(answers, stop_ids)
    for prompt, old, new in zip(prompts[:3], state["answers"], answers[:3], strict=True):
        texts = [common.shown_text(tokenizer, ids) for ids in (prompt, old, new)]
        state["samples"].append(dict(zip(("prompt", "before", "after"), texts, strict=True)))
    finish(args, state, model, tokenizer, after)
    show_samples(state["samples"])
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
