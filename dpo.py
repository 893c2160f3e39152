"""DPO: Direct Preference Optimization (Rafailov et al. 2023, arXiv:2305.18290).

The data are pairs: a prompt x, a better answer y_w and a worse answer y_l. DPO trains the policy π,
a language model, to prefer the better answers while it stays close to the reference π_ref, a frozen
copy of the model that training started from. It needs no reward model and no sampling.

RLHF, reinforcement learning from human feedback, fits a reward model r to the pairs. Then it
searches for the policy whose answers earn the most reward without straying far from π_ref:

    max_π  E r(x, y) − β KL(π ‖ π_ref)                                                      (eq. 3)

The optimal policy has a closed form. Solving it for r gives the reward for which a given policy is
optimal:

    π(y|x) ∝ π_ref(y|x) exp(r(x, y) / β)                                                    (eq. 4)
    r(x, y) = β log[π(y|x) / π_ref(y|x)] + a term in x alone                                (eq. 5)

So every policy contains a reward model, its implicit reward: how much likelier an answer has become
than it was at the start. Bradley and Terry (1952) model a preference as
P(y_w beats y_l) = σ(r(x, y_w) − r(x, y_l)). Insert eq. 5: the term in x cancels, and −log P is a
loss for the policy itself:

    loss = −log σ( β log[π(y_w|x) / π_ref(y_w|x)] − β log[π(y_l|x) / π_ref(y_l|x)] )        (eq. 7)

where log π(y|x) is the sum of the log-probs of the tokens of y. Compared with reward_model.py, the
loss stays and the scalar head goes: β log(π / π_ref) takes its place.

A worked example. With β = 0.1, let the summed log-probs of the two answers be

                  log π    log π_ref    implicit reward
    y_w (chosen)   −12        −13       0.1 · (−12 + 13) =  0.1
    y_l (rejected) −20        −18       0.1 · (−20 + 18) = −0.2

The margin is 0.1 + 0.2 = 0.3 and the loss −log σ(0.3) = 0.554. Its gradient with respect to
log π(y_w|x) is −β σ(−0.3) = −0.0426, and with respect to log π(y_l|x) it is +0.0426. So a step
raises the first and lowers the second, less and less as the margin grows.

--loss selects a variant, which differs in a line or two of `preference_loss`:

    ipo     pulls the margin to a target instead of pushing it up forever
    hinge   has no gradient once the margin exceeds 1
    simpo   compares mean log-probs, without a reference
    orpo    compares odds without a reference, and adds SFT on the chosen answer
    cpo     compares log-probs without a reference, and adds SFT on the chosen answer

    python dpo.py                                         # the embedded tiny model, on a laptop
    python dpo.py --model Qwen/Qwen2.5-0.5B               # 4-bit LoRA, sized for a 16 GB T4
    python dpo.py --model runs/sft --dataset pairs.jsonl  # an SFT adapter: it is also the reference

What to watch: DPO's loss starts at log 2 = 0.693 and falls, the accuracy climbs from 0.5 and the
margin grows. `chosen_logp` often falls along with `rejected_logp`, because the loss depends only on
their difference.

Change one thing: with `--beta 0.1` instead of 2, the tiny model still orders 98% of the held-out
pairs correctly, but its samples turn into garbage: 15% of them are correct instead of 94%, and
`chosen_logp` falls from −0.5 to −5.8. A KL penalty this weak lets π make both answers of a pair
unlikely, as long as the gap between them grows.

The default learning rate, 2e-5, is four times the 5e-6 that TRL suggests for DPO with LoRA. If
`chosen_logp` collapses on your data, try TRL's value first.

Shapes: P pairs are B = 2P rows of T tokens, all chosen answers first. L ≤ T columns hold tokens
(the rest are padding in every row), N positions predict a token of an answer, and C of these are
processed at a time. D is the width of the model and V the size of its vocabulary.
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

BY_LOSS = {"simpo": dict(beta=2.0)}  # a different default, as in its paper
# The answers of a tiny pair differ in a digit or two. At β = 0.1 the cheapest way to make the wrong
# one less likely is to make its end token unlikely, so answers run on (see docs/tiny_world.md).
TINY = dict(dataset="tiny/data/preference_train.jsonl", beta=2.0, learning_rate=1e-3, epochs=2,
            eval_dataset="tiny/data/preference_heldout.jsonl", micro_batch_size=32)
REFERENCE_FREE = ("simpo", "orpo", "cpo")  # losses that never read π_ref


def make_flags():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=common.HelpFormatter)
    add = parser.add_argument
    add("--model", default="tiny/chat", help="Hub name, local folder or LoRA adapter to start from")
    add("--dataset", default="trl-lib/ultrafeedback_binarized", help="pairs: Hub name or file")
    add("--split", default="train", help="split of a Hub dataset")
    add("--columns", **common.COLUMNS)
    add("--chat-template", help=common.TEMPLATE)
    add("--template-arguments", **common.VARIABLES)
    add("--eval-dataset", help="held-out pairs; if not given, some pairs of --dataset are held out")
    add("--eval-size", type=common.count, default=100, help="number of held-out pairs")
    add("--loss", choices=["dpo", "ipo", "hinge", "simpo", "orpo", "cpo"], default="dpo",
        help="loss function: DPO or one of its variants")
    add("--beta", type=common.positive, default=0.1,
        help="KL penalty strength; simpo, cpo: scale of log π (at 0.1, cpo is close to SFT);\n"
        "orpo: weight of the odds-ratio term")
    add("--gamma", type=common.weight, default=1.0, help="simpo: target reward margin")
    add("--label-smoothing", type=common.number(float, 0, 0.5), default=0.0,
        help="dpo: expected share of pairs whose two labels are swapped")
    add("--max-length", type=common.number(int, 4), default=1024,
        help="longest prompt + answer, in tokens; longer examples are truncated")
    add("--batch-size", type=common.count, default=32, help="pairs per optimizer step")
    add("--micro-batch-size", type=common.count, default=2, help="pairs per forward pass")
    add("--learning-rate", type=common.positive, default=2e-5, help=common.PEAK)
    add("--epochs", type=common.count, default=1, help="passes over the pairs")
    add("--max-steps", type=common.count, default=500, help="upper limit on optimizer steps")
    add("--lora-rank", **common.LORA_RANK, type=common.count)
    add("--load-in-4bit", **common.FOUR_BIT)
    add("--gradient-checkpointing", **common.CHECKPOINTING)
    add("--eval-every", type=common.natural, default=0, help="steps between evaluations; 0: none")
    add("--save-every", type=common.count, default=50, help="steps between checkpoints")
    add("--seed", type=common.natural, default=0, help="seed of data order, LoRA and samples")
    add("--output-dir", default="runs/dpo", help=common.RESUMED)
    return parser


# ---- data: pairs of token ids, and a mask on what is trained -------------------------------------

def encode_pair(row, tokenizer, max_length):
    """A row as {"chosen": example, "rejected": example, "prompt": ids, ...}.

    The loss mask of an example is 1 on its answer and 0 on the prompt.
    """
    # Each side is a list of pieces: the head of the prompt (BOS and the system message), the rest
    # of the prompt, and the answer.
    sides = common.encode_preference(tokenizer, row)
    head_ids, _ = sides[0][0]
    chosen, rejected = [with_mask(pieces) for pieces in sides]
    # A token that spans the border between prompt and answer can differ between the two sides.
    # The prompt that both share ends where the first answer begins.
    start = min(chosen["loss_mask"].index(1), rejected["loss_mask"].index(1))
    # The same prompt tokens are cut from both sides, so that both still answer the same prompt.
    longest = max(len(chosen["input_ids"]), len(rejected["input_ids"]))
    cut = functools.partial(
        shorten, length=longest, head=len(head_ids), start=start, max_length=max_length)
    prompt = cut({"prompt": chosen["input_ids"][:start]})["prompt"]
    return {"prompt": prompt, "chosen": cut(chosen), "rejected": cut(rejected),
            "length": min(longest, max_length), "truncated": longest > max_length}


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


def preference_loss(policy_chosen_logps, policy_rejected_logps, ref_chosen_logps,
                    ref_rejected_logps, chosen_lengths=None, rejected_lengths=None, loss="dpo",
                    beta=0.1, label_smoothing=0.0, gamma=1.0):
    """Returns the losses and the implicit rewards of the chosen and the rejected answers, [P] each.

    The four log-probs are sums over the tokens of an answer, [P] each. Reference-free losses get
    zeros for the last two. Only simpo and orpo need the lengths in tokens, [P] each.
    """
    if loss in ("simpo", "orpo"):
        # Means over tokens instead of sums, so that an answer gains nothing from its length.
        policy_chosen_logps = policy_chosen_logps / chosen_lengths  # [P]
        policy_rejected_logps = policy_rejected_logps / rejected_lengths  # [P]
    chosen_rewards = beta * (policy_chosen_logps - ref_chosen_logps)  # [P], eq. 5
    rejected_rewards = beta * (policy_rejected_logps - ref_rejected_logps)  # [P], eq. 5
    margins = chosen_rewards - rejected_rewards  # [P]
    if loss == "dpo":
        # Eq. 7 if no label is wrong. With label smoothing, conservative DPO: the expected loss if
        # this share of the labels is wrong (ericmitchell.ai/cdpo.pdf, eq. 3).
        wrong = label_smoothing
        losses = -(1 - wrong) * F.logsigmoid(margins) - wrong * F.logsigmoid(-margins)  # [P]
    elif loss == "ipo":
        # Azar et al. 2023, arXiv:2310.12036, eq. 17: the log-ratios should be 1/(2β) apart.
        losses = (margins / beta - 1 / (2 * beta)) ** 2  # [P]
    elif loss == "hinge":
        # SLiC's hinge loss (arXiv:2305.10425) of DPO's margin: Liu et al. 2023, arXiv:2309.06657.
        losses = F.relu(1 - margins)  # [P]
    elif loss == "simpo":
        # Meng et al. 2024, arXiv:2405.14734, eq. 6.
        losses = -F.logsigmoid(margins - gamma)  # [P]
    elif loss == "cpo":
        # Xu et al. 2024, arXiv:2401.08417: DPO with a uniform reference, plus SFT on y_w.
        losses = -F.logsigmoid(margins) - policy_chosen_logps  # [P]
    elif loss == "orpo":
        # Hong et al. 2024, arXiv:2403.07691, eqs. 6 and 7: SFT on y_w, plus an odds-ratio term,
        # whose weight λ is β here.
        log_odds = log_odds_of(policy_chosen_logps) - log_odds_of(policy_rejected_logps)  # [P]
        losses = -policy_chosen_logps - beta * F.logsigmoid(log_odds)  # [P]
    return losses, chosen_rewards, rejected_rewards


def log_odds_of(logps):
    """log(p / (1 − p)) for log-probs [P]."""
    logps = logps.clamp(max=-1e-6)  # at p = 1 the odds would be infinite
    return logps - torch.log1p(-logps.exp())  # [P]


FIGURES = ("loss", "accuracy", "margin", "chosen_reward", "rejected_reward", "chosen_logp",
           "rejected_logp")


def pair_losses(model, pairs, args, pad_id):
    """The losses, [P], and the FIGURES to log, {name: [P]}."""
    # One forward pass reads both answers of every pair.
    examples = [pair["chosen"] for pair in pairs] + [pair["rejected"] for pair in pairs]
    batch = collate(examples, pad_id, model.device)  # [2P, T] each
    with common.autocast(model):
        policy_logps = token_logps(model, batch).sum(-1)  # [2P], log π(y|x)
        ref_logps = torch.zeros_like(policy_logps)  # [2P]
        if args.loss not in REFERENCE_FREE:
            # The reference is the model that this run started from.
            with torch.no_grad(), common.reference(model):
                ref_logps = token_logps(model, batch).sum(-1)  # [2P], log π_ref(y|x)
    lengths = batch["loss_mask"][:, 1:].sum(-1)  # [2P], |y|

    # Split the batch into chosen and rejected answers again: [P] each.
    chosen_logps, rejected_logps = policy_logps.chunk(2)
    ref_chosen_logps, ref_rejected_logps = ref_logps.chunk(2)
    chosen_lengths, rejected_lengths = lengths.chunk(2)
    losses, chosen_rewards, rejected_rewards = preference_loss(
        chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps, chosen_lengths,
        rejected_lengths, args.loss, args.beta, args.label_smoothing, args.gamma)  # [P] each
    margins = chosen_rewards - rejected_rewards
    accuracy = (margins > 0) + 0.5 * (margins == 0)  # [P], a tie counts half
    return losses, {
        "loss": losses, "accuracy": accuracy, "margin": margins, "chosen_reward": chosen_rewards,
        "rejected_reward": rejected_rewards, "chosen_logp": chosen_logps,
        "rejected_logp": rejected_logps}


# ---- the run -------------------------------------------------------------------------------------

@torch.no_grad()
def evaluate(model, pairs, args, pad_id):
    """The means of the FIGURES over held-out pairs, of which each process evaluates a share."""
    model.eval()
    mine = pairs[common.RANK::common.WORLD]
    sums = {}
    for i in range(0, len(mine), args.micro_batch_size):
        _, figures = pair_losses(model, mine[i:i + args.micro_batch_size], args, pad_id)
        add_up(sums, figures)
    model.train()
    totals = over_processes(sums, FIGURES, model.device)
    return {name: total / len(pairs) for name, total in totals.items()}


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
    pad_id = tokenizer.pad_token_id
    pairs, held_out = common.load_examples(
        args, encode_pair, tokenizer, limit=args.max_steps * args.batch_size)
    for side in "chosen", "rejected":
        example = pairs[0][side]
        common.show(tokenizer, example["input_ids"], example["loss_mask"],
                    f"a {side} answer after its prompt (trained tokens in green):")

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
    open_run(args, [pairs, held_out])
    state = restore(args, weights, optimizer, scaler)
    prompts = [pair["prompt"] for pair in held_out[:3]]
    if "before" not in state:
        state["before"] = evaluate(model, held_out, args, pad_id)
        state["answers"] = sample_answers(model, tokenizer, prompts, 64, args.seed)

    # The order depends only on the seed, so that a resumed run sees the same batches.
    generator = torch.Generator().manual_seed(args.seed)
    order = [torch.randperm(len(pairs), generator=generator) for epoch in range(args.epochs)]
    batches = torch.cat(order).split(args.batch_size)[:args.max_steps]
    progress = tqdm(range(state["step"] + 1, len(batches) + 1), initial=state["step"],
                    total=len(batches), disable=common.RANK > 0)
    for step in progress:
        # 4. Take this process's share of the batch (with one process, all of it). Pairs of similar
        #    length share a forward pass, which saves padding.
        began = time.time()
        batch = sorted([pairs[i] for i in batches[step - 1]], key=operator.itemgetter("length"))
        mine = batch[common.RANK::common.WORLD]

        # 5. Accumulate the gradients of the micro-batches. Each pair has the weight 1 / len(batch),
        #    so that the sum over micro-batches and processes is the gradient of the batch mean.
        sums = {}
        for i in range(0, len(mine), args.micro_batch_size):
            losses, figures = pair_losses(model, mine[i:i + args.micro_batch_size], args, pad_id)
            scaler.scale(losses.sum() / len(batch)).backward()
            add_up(sums, figures)

        # 6. Take one optimizer step with the gradients of all processes, summed and clipped.
        lr = learning_rate(step, len(batches), args.learning_rate)
        updated = update(optimizer, scaler, lr)

        # 7. Log the step, and save a checkpoint from time to time.
        totals = over_processes(sums, FIGURES, model.device)
        metrics = {"step": step} | {name: total / len(batch) for name, total in totals.items()}
        metrics |= updated | {"seconds": time.time() - began}
        if args.eval_every and step % args.eval_every == 0:
            held = evaluate(model, held_out, args, pad_id)
            metrics |= {f"eval_{name}": value for name, value in held.items()}
        tokens = sum(len(pair["chosen"]["input_ids"]) + len(pair["rejected"]["input_ids"])
                     for pair in batch)
        log_step(args, state, metrics, tokens, progress, ("loss", "accuracy", "margin"))
        if step % args.save_every == 0 or step == len(batches):
            save(args, state, weights, optimizer, scaler)

    # 8. Evaluate and sample again with the same held-out pairs, and save the adapter.
    after = evaluate(model, held_out, args, pad_id)
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
        train(common.parse(make_flags(), TINY, BY_LOSS))
