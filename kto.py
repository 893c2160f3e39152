"""KTO: Kahneman-Tversky Optimization (Ethayarajh et al. 2024, arXiv:2402.01306).

The data are single answers with binary feedback: a prompt x, an answer y, and a label that says
whether y is desirable. KTO makes desirable answers likelier and undesirable ones less likely. As
in dpo.py, the policy π contains an implicit reward: how much likelier an answer has become than
under π_ref, the model that training started from:

    r(x, y) = β log[π(y|x) / π_ref(y|x)]                    (eq. 5 of DPO, without the term in x)

DPO compares the two answers of a pair. Here nothing says which two answers to compare, so KTO asks
how people judge a single outcome. They compare it with what they are used to, the reference point
z: above z it is a gain, below z a loss, and each additional unit of either matters less (Kahneman
and Tversky 1979). So the value of a desirable answer is λ_D times a sigmoid of its gain. For an
undesirable answer, gain and loss are swapped. The training loss is λ minus the value:

    loss = λ_D (1 − σ(r(x, y) − β z))                       if y is desirable       (section 4.1)
    loss = λ_U (1 − σ(β z − r(x, y)))                       if y is undesirable
    z    = max(0, mean of log[π(y'|x) / π_ref(y'|x)])       where y' answers another prompt

λ_D and λ_U are weights. z stands for KL(π ‖ π_ref), which measures how far π has moved overall. A
proper estimate needs samples from π, which are slow to generate. The answer to another prompt is a
cheap, biased substitute: nothing trains π to prefer it after this prompt, so its log-ratio shows
only the overall drift. z gets no gradient; it decides where σ is steep, and so which answers have
the largest gradient.

Compared with DPO, the implicit reward, the reference and the masks stay. The pairs go, and with
them the loss that grows without bound: σ is flat far from z, so an answer far on the wrong side,
perhaps because its label is wrong, has almost no gradient.

A worked example. With β = 0.1, both λ = 1 and z = 1, let an answer have the log-ratio 3. Its gain
over the reference point is 0.1 · (3 − 1) = 0.2 and σ(0.2) = 0.550. If the answer is desirable, its
loss is 1 − 0.550 = 0.450; if not, 1 − σ(−0.2) = 0.550. The gradient with respect to log π(y|x) is
−β σ(0.2) σ(−0.2) = −0.0248 if y is desirable and +0.0248 if not.

    python kto.py                                            # the embedded tiny model, on a laptop
    python kto.py --model Qwen/Qwen2.5-0.5B                  # 4-bit LoRA, sized for a 16 GB T4
    python kto.py --model runs/sft --dataset labeled.jsonl   # an SFT adapter: it is the reference

What to watch: the loss starts at 0.5 if both λ are 1, and `margin`, the mean reward of desirable
answers minus the mean reward of undesirable ones, grows. `z` stays 0 as long as mismatched answers
become less likely on average. If `grad_norm` vanishes while the loss settles at the share of one
label, all answers with that label are far on the wrong side of z: raise the weight of that label.

Change one thing: with `--undesirable-weight 0.1` a line warns that one label outweighs the other 10
to 1. The result hardly changes: held-out `chosen_logp` ends at −0.02 and `rejected_logp` at −9, as
with equal weights, because all labels in the tiny data are correct, and σ is flat once answers of
both kinds are far from z.

The default learning rate, 2e-5, is that of dpo.py, and four times the 5e-6 that TRL suggests for
DPO with LoRA (it has no figure for KTO). If a run is unstable on your data, try TRL's value first.

Shapes: B answers (of a micro-batch or of a step) are rows of T tokens. L ≤ T columns hold tokens
(the rest are padding in every row), N positions predict a token of an answer, and C of these are
processed at a time. D is the width of the model and V the size of its vocabulary.
"""
import argparse
import hashlib
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

# β is as high as in dpo.py, for the same reason: tiny answers differ in a digit or two.
TINY = dict(dataset="tiny/data/preference_train.jsonl", beta=2.0, learning_rate=1e-3,
            eval_dataset="tiny/data/preference_heldout.jsonl", micro_batch_size=64)
LABELS = {"true": True, "false": False, "1": True, "0": False}


def make_flags():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=common.HelpFormatter)
    add = parser.add_argument
    add("--model", default="tiny/chat", help="Hub name, local folder or LoRA adapter to start from")
    add("--dataset", default="trl-lib/kto-mix-14k", help="labeled answers: Hub name or local file")
    add("--split", default="train", help="split of a Hub dataset")
    add("--columns", **common.COLUMNS)
    add("--chat-template", help=common.TEMPLATE)
    add("--template-arguments", **common.VARIABLES)
    add("--eval-dataset", help="held-out rows; if not given, some rows of --dataset are held out")
    add("--eval-size", type=common.count, default=100, help="number of held-out rows")
    add("--beta", type=common.positive, default=0.1, help="KL penalty strength")
    add("--desirable-weight", type=common.positive, default=1.0,
        help="λ_D, weight of the loss of desirable answers")
    add("--undesirable-weight", type=common.positive, default=1.0,
        help="λ_U, weight of the loss of undesirable answers")
    add("--max-length", type=common.number(int, 4), default=1024,
        help="longest prompt + answer, in tokens; longer examples are truncated")
    add("--batch-size", type=common.number(int, 2), default=32, help="answers per optimizer step")
    add("--micro-batch-size", type=common.count, default=4, help="answers per forward pass")
    add("--learning-rate", type=common.positive, default=2e-5, help=common.PEAK)
    add("--epochs", type=common.count, default=1, help="passes over the answers")
    add("--max-steps", type=common.count, default=500, help="upper limit on optimizer steps")
    add("--lora-rank", **common.LORA_RANK, type=common.count)
    add("--load-in-4bit", **common.FOUR_BIT)
    add("--gradient-checkpointing", **common.CHECKPOINTING)
    add("--eval-every", type=common.natural, default=0, help="steps between evaluations; 0: none")
    add("--save-every", type=common.count, default=50, help="steps between checkpoints")
    add("--seed", type=common.natural, default=0, help="seed of data order, LoRA and samples")
    add("--output-dir", default="runs/kto", help=common.RESUMED)
    return parser


# ---- data: prompts, answers to them, and labels --------------------------------------------------

def encode_labeled(row, tokenizer, max_length):
    """A row as examples, each with a prompt, an answer and a label (True: desirable).

    A pair becomes two examples. Prompt and answer are kept apart, because the reference point z
    needs each answer after another prompt as well.
    """
    if "chosen" in row or "rejected" in row:
        chosen, rejected = common.encode_preference(tokenizer, row)
        labeled = [(chosen, True), (rejected, False)]
    else:
        prompt, answer = common.prompt_of(row, tokenizer), common.answer_of(row)
        label = LABELS.get(str(row.get("label")).lower())
        if not prompt or answer is None or label is None:
            raise ValueError("no prompt, completion and label (true or false, 1 or 0), and no pair")
        labeled = [(pieces, label) for pieces in
                   common.encode(tokenizer, prompt, answer, row.get("tools"))]
    examples = []
    for pieces, label in labeled:
        # Pieces: the head of the prompt (BOS and the system message), the rest of the prompt, then
        # the turns of the answer.
        (head, _), (rest, _), *answer = pieces
        length = sum(len(ids) for ids, _ in pieces)
        examples.append({"prompt": head + rest, "head": len(head), "answer": answer,
                         "label": label, "truncated": length > max_length})
    return examples


def tokens_of(example, args, tokenizer):
    """The answer appended to the prompt, truncated; the loss mask is 1 on the answer."""
    longest = min(args.max_length, tokenizer.model_max_length)
    tokens = with_mask([(example["prompt"], False), *example["answer"]])
    length = len(tokens["input_ids"])
    return shorten(tokens, length, example["head"], len(example["prompt"]), longest)


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


def kto_loss(log_ratios, labels, z, beta, desirable_weight, undesirable_weight):
    """The losses, [B], from the log-ratios log(π / π_ref) and the labels (True: desirable), [B]."""
    gains = beta * (log_ratios - z)  # [B], r(x, y) − βz
    desirable_losses = desirable_weight * (1 - torch.sigmoid(gains))  # [B]
    undesirable_losses = undesirable_weight * (1 - torch.sigmoid(-gains))  # [B]
    return torch.where(labels, desirable_losses, undesirable_losses)  # [B]


FIGURES = ("loss", "chosen_reward", "rejected_reward", "chosen_logp", "rejected_logp")


def answer_logps(model, examples, args, tokenizer):
    """log π(y|x) and log π_ref(y|x) of B answers, [B] each; only the first has a gradient."""
    rows = [tokens_of(example, args, tokenizer) for example in examples]
    batch = collate(rows, tokenizer.pad_token_id, model.device)  # [B, T] each
    with common.autocast(model):
        policy_logps = token_logps(model, batch).sum(-1)  # [B]
        # The reference is the model that this run started from.
        with torch.no_grad(), common.reference(model):
            ref_logps = token_logps(model, batch).sum(-1)  # [B]
    return policy_logps, ref_logps


def answer_losses(model, examples, z, args, tokenizer):
    """The losses, [B], and the FIGURES to log, {name: [B]}.

    The names are those of dpo.py: chosen means desirable and rejected means undesirable. An answer
    adds 0 to the figures of the other label.
    """
    policy_logps, ref_logps = answer_logps(model, examples, args, tokenizer)  # [B] each
    log_ratios = policy_logps - ref_logps  # [B]
    labels = torch.tensor([example["label"] for example in examples], device=model.device)  # [B]
    losses = kto_loss(
        log_ratios, labels, z, args.beta, args.desirable_weight, args.undesirable_weight)  # [B]
    rewards = args.beta * log_ratios  # [B], r(x, y)
    return losses, {
        "loss": losses, "chosen_reward": rewards * labels, "rejected_reward": rewards * ~labels,
        "chosen_logp": policy_logps * labels, "rejected_logp": policy_logps * ~labels}


def mismatched(examples):
    """The answers, each with the next prompt that differs from its own; [] if none differs."""
    pairs = []
    for i, example in enumerate(examples):
        for other in examples[i + 1:] + examples[:i]:
            if differs(example["prompt"], other["prompt"]):
                pairs.append(example | {"prompt": other["prompt"], "head": other["head"]})
                break
    return pairs


def differs(prompt, other):
    """Whether two prompts (token ids) differ in a token, not just in length.

    If one is a prefix of the other, both may come from the same string, because a token that spans
    the border between prompt and answer belongs to the answer.
    """
    return common.shared_length(prompt, other) < min(len(prompt), len(other))


@torch.no_grad()
def reference_point(model, examples, args, tokenizer):
    """z: the mean log-ratio of mismatched answers, clamped at 0; 0 if there are none."""
    pairs = mismatched(examples)
    mine = pairs[common.RANK::common.WORLD]
    sums = {}
    for i in range(0, len(mine), args.micro_batch_size):
        policy_logps, ref_logps = answer_logps(
            model, mine[i:i + args.micro_batch_size], args, tokenizer)
        add_up(sums, {"log_ratio": policy_logps - ref_logps})
    total = over_processes(sums, ["log_ratio"], model.device)["log_ratio"]
    return max(0.0, total / max(1, len(pairs)))


# ---- the run -------------------------------------------------------------------------------------

def plan_batches(labels, args):
    """The indices of the answers of each step, [steps, size].

    Every step has both labels in about the proportion of the data, and at least one of each.
    """
    size = min(args.batch_size, len(labels))
    desirable = [i for i, label in enumerate(labels) if label]
    undesirable = [i for i, label in enumerate(labels) if not label]
    desirable_per_step = round(size * len(desirable) / len(labels))
    desirable_per_step = min(max(1, desirable_per_step), size - 1)
    undesirable_per_step = size - desirable_per_step
    advise_weights(desirable_per_step, undesirable_per_step, args)
    steps = min(args.max_steps, math.ceil(args.epochs * len(labels) / size))
    generator = torch.Generator().manual_seed(args.seed)
    return torch.cat([
        draw(desirable, steps * desirable_per_step, generator).view(steps, -1),
        draw(undesirable, steps * undesirable_per_step, generator).view(steps, -1)], dim=1)


def draw(members, count, generator):
    """`count` members: all in a random order, then all in another order, until there are enough."""
    order = []
    while len(order) < count:
        order += torch.randperm(len(members), generator=generator).tolist()
    return torch.tensor(members)[order[:count]]


def advise_weights(n_desirable, n_undesirable, args):
    """Prints a line if the weights are outside the range that section 4.2 of the paper gives."""
    ratio = n_desirable * args.desirable_weight / (n_undesirable * args.undesirable_weight)
    if not 1 <= ratio <= 3 / 2:
        better = args.desirable_weight / ratio * 5 / 4
        print(f"n_D λ_D / (n_U λ_U) is {ratio:.3g} in each step (n: number of answers). The paper "
              f"recommends 1 to 1.5, so try --desirable-weight {better:.3g}")


def describe(sums, labels, z, device):
    """The figures to log: the loss is a mean over all answers, the rest over those of a label."""
    totals = over_processes(sums, FIGURES, device)
    n_desirable = sum(labels)
    n_undesirable = len(labels) - n_desirable
    chosen_reward = totals["chosen_reward"] / n_desirable
    rejected_reward = totals["rejected_reward"] / n_undesirable
    return {"loss": totals["loss"] / len(labels), "margin": chosen_reward - rejected_reward,
            "chosen_reward": chosen_reward, "rejected_reward": rejected_reward,
            "chosen_logp": totals["chosen_logp"] / n_desirable,
            "rejected_logp": totals["rejected_logp"] / n_undesirable, "z": z}


@torch.no_grad()
def evaluate(model, examples, args, tokenizer):
    """The figures of the held-out answers, for which z is computed anew."""
    model.eval()
    z = reference_point(model, examples, args, tokenizer)
    mine = examples[common.RANK::common.WORLD]
    sums = {}
    for i in range(0, len(mine), args.micro_batch_size):
        _, figures = answer_losses(model, mine[i:i + args.micro_batch_size], z, args, tokenizer)
        add_up(sums, figures)
    model.train()
    return describe(sums, [example["label"] for example in examples], z, model.device)


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


def train(args):
    # 1. Load the data first, so that bad data fails before the model is loaded.
    tokenizer = common.load_tokenizer(args.model, args.chat_template, args.template_arguments)
    examples, held_out = common.load_examples(
        args, encode_labeled, tokenizer, limit=args.max_steps * args.batch_size)
    for name, part in ("to train on", examples), ("held out", held_out):
        if len({example["label"] for example in part}) < 2:
            common.fail(f"all answers {name} have the same label, and KTO needs both")
    batches = plan_batches([example["label"] for example in examples], args)  # [steps, size]
    for name, i in ("desirable", batches[0, 0]), ("undesirable", batches[0, -1]):
        tokens = tokens_of(examples[i], args, tokenizer)
        common.show(tokenizer, tokens["input_ids"], tokens["loss_mask"],
                    f"an answer labeled {name}, after its prompt (trained tokens in green):")

    # 2. Load the model: a frozen base with trainable LoRA matrices.
    torch.manual_seed(args.seed)
    model = common.load_model(
        args.model, args.load_in_4bit, args.lora_rank, args.gradient_checkpointing)
    weights = {name: p for name, p in model.named_parameters() if p.requires_grad}
    # `update` sets the learning rate.
    optimizer = torch.optim.AdamW(weights.values(), weight_decay=0.0)
    scaler = common.grad_scaler(model)  # for fp16 (a T4), where small gradients round to 0
    common.print_settings(model)

    # 3. Start a new run, or resume an interrupted one.
    open_run(args, [examples, held_out])
    state = restore(args, weights, optimizer, scaler)
    prompts = [x["prompt"][-args.max_length:] for x in held_out if x["label"]][:3]
    if "before" not in state:
        state["before"] = evaluate(model, held_out, args, tokenizer)
        state["answers"] = sample_answers(model, tokenizer, prompts, 64, args.seed)

    progress = tqdm(range(state["step"] + 1, len(batches) + 1), initial=state["step"],
                    total=len(batches), disable=common.RANK > 0)
    for step in progress:
        # 4. Compute the reference point z once; all answers of the step share it.
        began = time.time()
        batch = [examples[i] for i in batches[step - 1]]
        z = reference_point(model, batch, args, tokenizer)

        # 5. Accumulate the gradients of the micro-batches of this process. Each answer has the
        #    weight 1 / len(batch), so that the sum over processes is the gradient of the mean.
        mine = batch[common.RANK::common.WORLD]
        sums = {}
        for i in range(0, len(mine), args.micro_batch_size):
            losses, figures = answer_losses(
                model, mine[i:i + args.micro_batch_size], z, args, tokenizer)
            scaler.scale(losses.sum() / len(batch)).backward()
            add_up(sums, figures)

        # 6. Take one optimizer step with the gradients of all processes, summed and clipped.
        lr = learning_rate(step, len(batches), args.learning_rate)
        updated = update(optimizer, scaler, lr)

        # 7. Log the step, and save a checkpoint from time to time.
        described = describe(sums, [example["label"] for example in batch], z, model.device)
        metrics = {"step": step} | described | updated | {"seconds": time.time() - began}
        if args.eval_every and step % args.eval_every == 0:
            held = evaluate(model, held_out, args, tokenizer)
            metrics |= {f"eval_{name}": value for name, value in held.items()}
        tokens = sum(len(tokens_of(x, args, tokenizer)["input_ids"]) for x in batch)
        log_step(args, state, metrics, tokens, progress, ("loss", "margin"))
        if step % args.save_every == 0 or step == len(batches):
            save(args, state, weights, optimizer, scaler)

    # 8. Evaluate and sample again with the same held-out data, and save the adapter.
    after = evaluate(model, held_out, args, tokenizer)
    answers = sample_answers(model, tokenizer, prompts, 64, args.seed)
    for prompt, old, new in zip(prompts, state["answers"], answers, strict=True):
        state["samples"].append({"prompt": common.shown_text(tokenizer, prompt),
                                 "before": common.shown_text(tokenizer, old),
                                 "after": common.shown_text(tokenizer, new)})
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
