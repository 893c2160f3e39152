"""On-policy distillation: the student writes the answers, and a teacher grades every token.

Agarwal et al. 2023 (GKD, arXiv:2306.13649) and Gu et al. 2023 (MiniLLM, arXiv:2306.08543). A
student π_θ learns from the next-token distributions of a better model, the teacher π_T.

Why it works. SFT on the teacher's answers shows the student only prefixes that the teacher wrote.
Once the student makes a mistake of its own, it has to continue a prefix of a kind that it has never
seen (exposure bias). Reinforcement learning trains on the student's own mistakes, but rewards a
whole answer with a single number. Here the student writes the answer y, and at every token the
teacher gives its own distribution after the same prefix. The signal is as dense as in SFT, and it
is about the prefixes that the student really writes:

    loss = E_{y ~ π_θ}  1/|y| Σ_t  D( π_θ(· | x, y_<t), π_T(· | x, y_<t) )              GKD, eq. 2

No gradient flows through the sampling, so each D is an ordinary loss at a fixed prefix. It is a sum
over the whole vocabulary V, and --divergence selects one of three:

    reverse   D = KL(π_θ ‖ π_T) = Σ_v π_θ(v) log[π_θ(v) / π_T(v)]                       (MiniLLM)
    forward   D = KL(π_T ‖ π_θ) = Σ_v π_T(v) log[π_T(v) / π_θ(v)]                  (supervised KD)
    jsd       D = β KL(π_T ‖ M) + (1 − β) KL(π_θ ‖ M),  M = β π_T + (1 − β) π_θ         GKD, eq. 1

The reverse KL is large where the student says something that the teacher never would, so the
student gives up the modes that it cannot match (mode-seeking). The forward KL is large where the
student misses something that the teacher might say, so the student spreads to cover everything
(mode-covering). The generalized Jensen-Shannon divergence lies between them: JSD / β tends to the
forward KL for β → 0, and JSD / (1 − β) to the reverse KL for β → 1.

--estimator sampled replaces the sum over V with the one token that was sampled. This is a policy
gradient (see ppo.py) in which every token has an advantage of its own:

    loss = −A_t log π_θ(y_t),   A_t = log π_T(y_t) − log π_θ(y_t), a constant

Both have the same expected gradient, because E_{y_t ~ π_θ}[A_t ∇ log π_θ(y_t)] is minus the
gradient of the reverse KL at that prefix (the term Σ_v π_θ(v) ∇ log π_θ(v) is 0). The sampled
estimator needs only one log-prob per token from the teacher, but it is noisier. Neither is the
gradient of the KL between whole sequences, which would also hold each token responsible for the
divergence of all later tokens that it leads to, as a return does in ppo.py. Here each token is
responsible only for its own divergence (discount 0).

As in grpo.py, the model in training samples answers, and its KL from its frozen start is measured.
There are no rewards, no groups, and no advantages of whole answers. --on-policy is the share of
steps on the student's own answers (λ in GKD); the other steps train on the answers of the rows.
With 0 and the forward KL, this is classic distillation (supervised KD in GKD).

Worked example, with a vocabulary of two tokens: the student's probabilities are (0.5, 0.5), and the
teacher's are (0.9, 0.1). The reverse KL is 0.511, the forward KL is 0.368, and the JSD with β = 0.5
is 0.102. If the first token is sampled, A = log 0.9 − log 0.5 = 0.588, and if the second is, A is
−1.609; their mean is −0.511, which is minus the reverse KL.

    python distill.py                                             # the tiny model and teacher
    python distill.py --model Qwen/Qwen2.5-0.5B-Instruct --teacher Qwen/Qwen2.5-1.5B-Instruct
    python distill.py --on-policy 0 --dataset tiny/data/preference_train.jsonl \\
        --columns completion=chosen --divergence forward          # supervised KD

What to watch: the divergence falls and the agreement (how often both models have the same most
likely token) rises toward 1. student_entropy should approach teacher_entropy. If it falls far
below that, the student has collapsed onto a few answers. If answers get long and stopped falls, the
teacher does not end answers where the student does; read the samples.

Try `--estimator sampled` on the tiny model: 0.913 of the samples are correct after training instead
of 0.969 (both by evaluate.py with --seed 0), because its gradient is noisier.

Shapes: P prompts with one answer each = B rows of T columns, of which L ≤ T hold a token in some
row; N trained tokens in all, C of them at a time; D the width of a model (student and teacher may
differ in it), V the size of the vocabulary.
"""
import argparse
import contextlib
import functools
import hashlib
import json
import math
import re
import time
from decimal import Decimal
from pathlib import Path

import filelock
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

import common


def make_flags():
    """The command line of this script."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=common.HelpFormatter)
    add = parser.add_argument
    add("--model", default="tiny/chat", help="student: Hub name, local folder or LoRA adapter")
    add("--teacher", default="Qwen/Qwen2.5-1.5B-Instruct",
        help="teacher: Hub name, local folder or LoRA adapter, with the student's vocabulary")
    add("--divergence", choices=["reverse", "forward", "jsd"], default="reverse",
        help="divergence of the student from the teacher at each token")
    add("--beta", type=common.number(float, 1e-3, 1 - 1e-3), default=0.5,
        help="jsd: weight of the teacher in the mixture")
    add("--estimator", choices=["full", "sampled"], default="full",
        help="sum over the vocabulary, or a policy gradient on the sampled token")
    add("--on-policy", type=common.share, default=1.0,
        help="share of steps on the student's own answers; the other steps use those of the rows")
    add("--dataset", default="openai/gsm8k:main", help="prompts: Hub name or local file")
    add("--split", default="train", help="split of a Hub dataset")
    add("--columns", **common.COLUMNS)
    add("--chat-template", help=common.TEMPLATE)
    add("--template-arguments", **common.VARIABLES)
    add("--eval-dataset", help="held-out prompts (default: some of --dataset)")
    add("--eval-size", type=common.count, default=64, help="number of held-out prompts")
    add("--batch-size", type=common.number(int, common.WORLD), default=32,
        help="prompts per optimizer step")
    add("--micro-batch-size", type=common.count, default=2, help="answers per forward pass")
    add("--sample-batch-size", type=common.count, default=128, help="answers sampled at a time")
    add("--temperature", type=common.positive, default=1.0,
        help="temperature of sampling, and of both distributions that are compared")
    add("--max-length", type=common.count, default=1024, help="longest prompt + answer, in tokens")
    add("--max-new-tokens", type=common.count, default=512, help="longest answer, in tokens")
    add("--learning-rate", type=common.positive, default=1e-4, help=common.PEAK)
    add("--max-steps", type=common.count, default=200, help="number of optimizer steps")
    add("--lora-rank", **common.LORA_RANK, type=common.count)
    add("--load-in-4bit", **common.FOUR_BIT)
    add("--gradient-checkpointing", **common.CHECKPOINTING)
    add("--save-every", type=common.count, default=20,
        help="steps between checkpoints, at which samples are shown")
    add("--seed", type=common.natural, default=0, help="seed of data order, LoRA and samples")
    add("--output-dir", default="runs/distill", help=common.RESUMED)
    return parser


TINY = dict(dataset="tiny/data/prompt_train.jsonl", eval_dataset="tiny/data/prompt_heldout.jsonl",
            teacher="tiny/teacher", micro_batch_size=64, max_new_tokens=24, learning_rate=1e-3,
            max_steps=60)
FIGURES = ("loss", "divergence", "agreement", "student_entropy", "teacher_entropy", "logp",
           "start_logp")

LOGITS_PER_CHUNK = 2**23  # 32 MiB in fp32, of which the divergence holds several copies


# ---- data: prompts, and answers with a mask on the tokens that are trained -----------------------

def encode_row(row, tokenizer, max_length, max_new_tokens, needs_answer):
    """The row and the token ids of its prompt. A row that cannot be used raises ValueError."""
    prompt = common.prompt_of(row, tokenizer)
    ids = common.encode_prompt(tokenizer, prompt, row.get("tools"))
    if len(ids) + max_new_tokens > max_length:
        raise ValueError(f"prompt and answer exceed {max_length} tokens")
    if needs_answer and plain_number(row.get("answer")) is None:
        raise ValueError("its answer is not a plain number; for others, use --reward "
                         "examples/rewards.py:math_answer")
    return {"prompt": ids, "row": row | {"prompt": prompt}}


def encode_example(row, tokenizer, max_length, max_new_tokens, needs_answer):
    """The prompt of a row, and, where off-policy steps need it, the ids of the row's answer."""
    example = encode_row(row, tokenizer, max_length, max_new_tokens, needs_answer=False)
    if needs_answer:
        answer = common.answer_of(row)
        if not answer:
            raise ValueError("it has no answer (completion), which --on-policy below 1 trains on")
        prompt = example["row"]["prompt"]
        examples = common.encode(tokenizer, prompt, answer, row.get("tools"))
        if len(examples) > 1 or len(examples[0]) > 3:
            raise ValueError("its answer has several turns, of which only one could be read")
        head, rest, answer = examples[0]
        example["prompt"] = head[0] + rest[0]
        example["answer"] = answer[0][:max_new_tokens]
        example["truncated"] = len(answer[0]) > max_new_tokens
    return example


def join_answers(prompts, answers, tokenizer, model):
    """Prompts and answers as tensors [B, T], padded on the right. The loss mask is 1 on answers."""
    rows = [prompt + answer for prompt, answer in zip(prompts, answers, strict=True)]
    batch = tokenizer.pad({"input_ids": rows}, padding_side="right", return_tensors="pt")
    # The mask is built from lengths, because the pad token may also be a token of an answer.
    starts = torch.tensor([[len(prompt)] for prompt in prompts])  # [B, 1]
    columns = torch.arange(batch["input_ids"].shape[1])  # [T]
    batch["loss_mask"] = batch["attention_mask"] * (columns >= starts)  # [B, T]
    stop_ids = common.stop_token_ids(tokenizer, model.generation_config)
    batch["stopped"] = torch.tensor([ids[-1] in stop_ids for ids in answers])  # [B]
    return {name: value.to(model.device) for name, value in batch.items()}


# ---- the method ----------------------------------------------------------------------------------

def chunk_logps(hidden, targets, causal, temperature):
    """The log-probs [C] of C target tokens, from the hidden states [C, D] that predict them."""
    # The softmax is computed in fp32, because 16-bit numbers are too coarse.
    logits = common.read_out(causal, hidden).float().div_(temperature)  # [C, V]
    return -F.cross_entropy(logits, targets, reduction="none")  # [C]


def hidden_states(model, batch):
    """The last hidden states [N, D] at the positions that predict the N tokens of the answers."""
    used = batch["attention_mask"].any(0)  # [T]: the L columns that are not padding in every row
    inputs = {name: batch[name][:, used] for name in ("input_ids", "attention_mask")}  # [B, L]
    hidden = common.causal_lm(model).base_model(**inputs, use_cache=False)[0]  # [B, L, D]
    is_target = batch["loss_mask"][:, 1:][:, used[1:]].bool()  # [B, L-1]
    return hidden[:, :-1][is_target]  # [N, D]


def divergences(student_logps, teacher_logps, divergence, beta):
    """D of the student from the teacher at C positions, [C] in nats; log-probs are [C, V] each."""
    if divergence == "reverse":  # KL(π_θ ‖ π_T)
        return (student_logps.exp() * (student_logps - teacher_logps)).sum(-1)
    if divergence == "forward":  # KL(π_T ‖ π_θ)
        return (teacher_logps.exp() * (teacher_logps - student_logps)).sum(-1)
    # GKD eq. 1: both KLs are measured to the mixture M, which is nowhere 0 if either model is not
    weighted = [teacher_logps + math.log(beta), student_logps + math.log(1 - beta)]
    mixture_logps = torch.stack(weighted).logsumexp(0)  # [C, V]
    teacher_kl = (teacher_logps.exp() * (teacher_logps - mixture_logps)).sum(-1)
    student_kl = (student_logps.exp() * (student_logps - mixture_logps)).sum(-1)
    return beta * teacher_kl + (1 - beta) * student_kl


def sampled_losses(student_logps, teacher_logps):
    """The policy gradient of the reverse KL, [C], from the log-probs [C] of the sampled tokens."""
    advantages = (teacher_logps - student_logps).detach()  # above 0 where the teacher says it more
    return -advantages * student_logps


def chunk_losses(student_hidden, teacher_hidden, targets, student, teacher, args):
    """Losses and figures of C tokens from both models' hidden states [C, D]."""
    student_logits = common.read_out(student, student_hidden).float() / args.temperature
    teacher_logits = common.read_out(teacher, teacher_hidden).float() / args.temperature
    # Models of one family may pad the same vocabulary to different sizes (Qwen2.5).
    size = min(student_logits.shape[-1], teacher_logits.shape[-1])
    student_logps = student_logits[:, :size].log_softmax(-1)  # [C, V]
    teacher_logps = teacher_logits[:, :size].log_softmax(-1)  # [C, V]
    losses = divergences(student_logps, teacher_logps, args.divergence, args.beta)  # [C]
    figures = {"divergence": losses.detach()}
    if args.estimator == "sampled":
        sampled = targets[:, None]  # [C, 1]
        losses = sampled_losses(
            student_logps.gather(1, sampled)[:, 0], teacher_logps.gather(1, sampled)[:, 0])
    with torch.no_grad():
        figures["agreement"] = student_logps.argmax(-1) == teacher_logps.argmax(-1)
        figures["student_entropy"] = -(student_logps.exp() * student_logps).sum(-1)
        figures["teacher_entropy"] = -(teacher_logps.exp() * teacher_logps).sum(-1)
    figures["logp"] = student_logps.detach().gather(1, targets[:, None])[:, 0]
    figures["loss"] = losses.detach()
    return losses, figures


def distillation_losses(model, teacher, batch, args):
    """The loss of each of N tokens, [N], and figures of them, {name: [N]}.

    The distributions over the vocabulary are computed for a chunk of C positions at a time, and
    again in the backward pass: [B, T, V] for two models would not fit on a T4.
    """
    targets = batch["input_ids"][:, 1:][batch["loss_mask"][:, 1:].bool()]  # [N]
    with torch.no_grad(), reading_as(teacher):
        teacher_hidden = hidden_states(teacher, batch)  # [N, D]
    with torch.no_grad(), common.reference(model):
        start_hidden = hidden_states(model, batch)  # [N, D]
    student_hidden = hidden_states(model, batch)  # [N, D]
    lms = common.causal_lm(model), common.causal_lm(teacher)
    chunk = max(1, LOGITS_PER_CHUNK // lms[0].get_output_embeddings().weight.shape[0])
    losses = []
    figures = {}
    for student_piece, teacher_piece, start_piece, target in zip(
            student_hidden.split(chunk), teacher_hidden.split(chunk), start_hidden.split(chunk),
            targets.split(chunk), strict=True):
        piece_losses, piece_figures = checkpoint(
            chunk_losses, student_piece, teacher_piece, target, *lms, args, use_reentrant=False)
        losses.append(piece_losses)
        # The start of the run is only a yardstick: the KL to it is logged.
        with torch.no_grad():
            piece_figures["start_logp"] = chunk_logps(
                start_piece, target, lms[0], args.temperature)
        for name, values in piece_figures.items():
            figures.setdefault(name, []).append(values)
    return torch.cat(losses), {name: torch.cat(values) for name, values in figures.items()}


def load_teacher(args, model, tokenizer):
    """The teacher: a frozen model, or one more adapter on the student's base (one more role).

    Its vocabulary must be the student's, because the two distributions are compared by token id.
    """
    with common.phase(f"loading the teacher {args.teacher}"):
        theirs = common.load_tokenizer(args.teacher).get_vocab()
        ours = tokenizer.get_vocab()
        differing = sorted(token for token in ours | theirs if ours.get(token) != theirs.get(token))
        if differing:
            raise ValueError(f"its vocabulary is not the student's: {len(differing)} tokens differ,"
                             f" the first is {differing[0]!r}")
        is_adapter = common.adapter_config(args.teacher) is not None
        if is_adapter and common.base_of(args.teacher) == common.base_of(args.model):
            model.load_adapter(common.find(args.teacher), "teacher", is_trainable=False)
            # peft has switched to evaluation mode, in which gradient checkpointing is off.
            return model.train()
    return common.load_model(args.teacher, args.load_in_4bit, gradient_checkpointing="off",
                             trainable=False)


def reading_as(teacher):
    """Inside, a model that carries the teacher as an adapter reads as the teacher."""
    carries = "teacher" in getattr(teacher, "peft_config", {})
    return common.using(teacher, "teacher") if carries else contextlib.nullcontext()


# ---- sampling ------------------------------------------------------------------------------------

@torch.no_grad()
def sample(model, tokenizer, prompts, copies, args, seed):
    """Samples `copies` answers to each of P prompts; returns lists of ids, grouped by prompt.

    Tokens are drawn from exactly softmax(logits / temperature): no top-k, no top-p, no penalties.
    An answer ends with its stop token, unless it was truncated at --max-new-tokens.
    """
    was_training = model.training
    model.eval()  # in train mode, gradient checkpointing would silently drop the KV cache
    causal = common.causal_lm(model)
    generator = torch.Generator(causal.device).manual_seed(seed)
    stop_ids = common.stop_token_ids(tokenizer, model.generation_config)
    stops = torch.tensor(stop_ids, device=causal.device)
    # Left padding: all prompts end in the last column, where the first token is predicted.
    batch = tokenizer.pad({"input_ids": prompts}, padding_side="left", return_tensors="pt")
    mask = batch["attention_mask"].to(causal.device)  # [P, T]
    logits, cache = common.read(causal, batch["input_ids"].to(causal.device), mask)  # [P, V]
    # Each prompt is read once. Its KV cache is then repeated, so that B = P × copies rows follow.
    rows = torch.arange(len(mask), device=causal.device).repeat_interleave(copies)  # [B]
    cache.reorder_cache(rows)
    logits, mask = logits[rows], mask[rows]  # [B, V], [B, T]
    answers = [[] for _ in mask]
    alive = torch.arange(len(mask), device=causal.device)  # the answers that have not ended
    for length in range(1, args.max_new_tokens + 1):
        probs = (logits.float() / args.temperature).softmax(-1)  # [alive, V]
        token = torch.multinomial(probs, 1, generator=generator)  # [alive, 1]
        for i, new in zip(alive.tolist(), token[:, 0].tolist(), strict=True):
            answers[i].append(new)
        going = ~torch.isin(token[:, 0], stops)  # [alive]
        if length == args.max_new_tokens or not going.any():
            break
        # Answers that have ended leave the batch, and their rows leave the KV cache.
        if not going.all():
            alive, token, mask = alive[going], token[going], mask[going]
            cache.reorder_cache(going.nonzero()[:, 0])
        mask = F.pad(mask, (0, 1), value=1)
        logits, cache = common.read(causal, token, mask, cache)  # [alive, V]
    model.train(was_training)
    return answers


# ---- the held-out reward, where rows have an answer that is a number -----------------------------

def correct_answer(prompts, completions, answer, **columns):
    """1 where the last number of the completion equals the row's column `answer`, else 0."""
    scores = []
    for completion, truth in zip(completions, answer, strict=True):
        number = plain_number(truth)
        scores.append(float(number is not None and last_number(completion) == number))
    return scores


# 1,000 is one number, 1,2345 is two numbers, and .5 is one half.
NUMBER = r"(?:\d{1,3}(?:,\d{3})+(?!\d)(?:\.\d+)?|\d*\.?\d+)"


def last_number(text):
    """The last number in a string, or None. "7-3" holds 7 and 3; "-$3" is a negative number."""
    found = re.findall(r"(?:(?<![\w)])[-−]\$?)?" + NUMBER, text)
    if not found:
        return None
    return Decimal(re.sub("[,$]", "", found[-1]).replace("−", "-"))


def plain_number(text):
    r"""The answer of a row, alone or after its last ####, as a number. None for \frac{3}{4}."""
    alone = str(text).rpartition("####")[2].strip().removesuffix(".")
    is_plain = re.fullmatch(rf"([-−+]?\$?|\$[-−]){NUMBER} ?%?", alone)
    return last_number(alone) if is_plain else None


# ---- the run -------------------------------------------------------------------------------------

def rollout(model, examples, tokenizer, args, seed):
    """An answer of the student to each prompt, as ids."""
    answers = []
    for i in range(0, len(examples), args.sample_batch_size):
        prompts = [example["prompt"] for example in examples[i:i + args.sample_batch_size]]
        with common.autocast(model):
            answers += sample(model, tokenizer, prompts, 1, args, seed + i)
    return answers


def make_batch(model, examples, answers, tokenizer):
    """Prompts and answers as tensors [B, T]; `rewards` [B] is 1 on correct answers.

    It is NaN where the row has no number as its answer. Rewards are logged, not trained on.
    """
    prompts = [example["prompt"] for example in examples]
    batch = join_answers(prompts, answers, tokenizer, model)
    truth = [example["row"].get("answer") for example in examples]
    texts = tokenizer.batch_decode(answers, skip_special_tokens=True)
    rewards = torch.tensor(correct_answer(None, texts, truth), device=model.device)
    has_truth = [plain_number(answer) is not None for answer in truth]
    batch["rewards"] = rewards.where(torch.tensor(has_truth, device=model.device), math.nan)
    return batch


def accumulate_gradients(model, teacher, batch, scaler, args):
    """Adds up the gradients of all micro-batches; returns the sums of the figures, {name: sum}."""
    # Every token counts 1 / tokens, whichever process and micro-batch it is in.
    tokens = batch["loss_mask"].sum()
    sum_over_processes([tokens])
    sums = {}
    for rows in torch.arange(len(batch["input_ids"])).split(args.micro_batch_size):
        micro = {name: value[rows] for name, value in batch.items()}
        with common.autocast(model):
            losses, figures = distillation_losses(model, teacher, micro, args)
        scaler.scale(losses.sum() / tokens).backward()
        add_up(sums, figures)
    return sums


@torch.no_grad()
def evaluate(model, teacher, examples, tokenizer, args):
    """One answer to each held-out prompt, with the same random numbers each time."""
    answers = rollout(model, examples, tokenizer, args, args.seed)
    batch = make_batch(model, examples, answers, tokenizer)
    sums = {}
    for rows in torch.arange(len(answers)).split(args.micro_batch_size):
        micro = {name: value[rows] for name, value in batch.items()}
        with common.autocast(model):
            _, figures = distillation_losses(model, teacher, micro, args)
        add_up(sums, figures)
    return describe(batch, sums)


def describe(batch, sums):
    """Means over the tokens, or over the answers, of all processes; kl in nats per answer."""
    sums = sums | {"tokens": batch["loss_mask"].sum(), "answers": len(batch["input_ids"]),
                   "stopped": batch["stopped"].sum(), "reward": batch["rewards"].sum()}
    totals = over_processes(sums, (*FIGURES, "tokens", "answers", "stopped", "reward"),
                            batch["input_ids"].device)
    means = {"reward": totals["reward"] / totals["answers"],
             "length": totals["tokens"] / totals["answers"],
             "stopped": totals["stopped"] / totals["answers"],
             "kl": (totals["logp"] - totals["start_logp"]) / totals["answers"]}
    for name in ("loss", "divergence", "agreement", "student_entropy", "teacher_entropy"):
        means[name] = totals[name] / totals["tokens"]
    # The reward is NaN if a row has no number as its answer.
    if math.isnan(means["reward"]):
        del means["reward"]
    return means


def train(args):
    # 1. Load the prompts first, so that bad data fails before a model is loaded.
    if args.estimator == "sampled" and (args.divergence != "reverse" or args.on_policy < 1):
        common.fail("--estimator sampled estimates the reverse KL on the student's own tokens, so "
                    "it needs --divergence reverse and --on-policy 1")
    tokenizer = common.load_tokenizer(args.model, args.chat_template, args.template_arguments)
    encode = functools.partial(encode_example, max_new_tokens=args.max_new_tokens,
                               needs_answer=args.on_policy < 1)
    wanted = args.max_steps * args.batch_size
    examples, held_out = common.load_examples(args, encode, tokenizer, wanted)

    # 2. Load the student, a frozen base with trainable LoRA matrices, and the frozen teacher.
    torch.manual_seed(args.seed)
    model = common.load_model(
        args.model, args.load_in_4bit, args.lora_rank, args.gradient_checkpointing)
    teacher = load_teacher(args, model, tokenizer)
    weights = {name: p for name, p in model.named_parameters() if p.requires_grad}
    # `update` sets the learning rate.
    optimizer = torch.optim.AdamW(weights.values(), weight_decay=0.0)
    scaler = common.grad_scaler(model)  # for fp16 (a T4), where small gradients round to 0
    common.print_settings(model)

    # 3. Start a new run, or resume an interrupted one.
    open_run(args, [examples, held_out])
    state = restore(args, weights, optimizer, scaler)
    if "before" not in state:
        state["before"] = evaluate(model, teacher, held_out, tokenizer, args)
    # Prompts and random numbers depend only on seed and step, so a resumed run sees the same ones.
    generator = torch.Generator().manual_seed(args.seed)
    passes = range(math.ceil(wanted / len(examples)))
    order = torch.cat([torch.randperm(len(examples), generator=generator) for _ in passes])
    is_on_policy = torch.rand(args.max_steps, generator=generator) < args.on_policy
    progress = tqdm(range(state["step"] + 1, args.max_steps + 1), initial=state["step"],
                    total=args.max_steps, disable=common.RANK > 0)
    for step in progress:
        # 4. The student answers the prompts of this process; an off-policy step takes the answers
        # of the rows instead.
        began = time.time()
        picked = order[(step - 1) * args.batch_size:step * args.batch_size]
        mine = [examples[i] for i in picked[common.RANK::common.WORLD]]
        if is_on_policy[step - 1]:
            seed = args.seed + 10**6 * (step * common.WORLD + common.RANK)
            answers = rollout(model, mine, tokenizer, args, seed)
        else:
            answers = [example["answer"] for example in mine]
        batch = make_batch(model, mine, answers, tokenizer)
        metrics = {"step": step, "on_policy": float(is_on_policy[step - 1]),
                   "rollout_seconds": time.time() - began}

        # 5. Both models read all answers. The gradients of the divergence at each token add up.
        sums = accumulate_gradients(model, teacher, batch, scaler, args)

        # 6. Take one optimizer step on the gradient, summed over processes and clipped.
        lr = learning_rate(step, args.max_steps, args.learning_rate)
        updated = update(optimizer, scaler, lr)

        # 7. Log the means, print some answers, and save a checkpoint.
        metrics |= {**describe(batch, sums), **updated, "seconds": time.time() - began}
        tokens = batch["attention_mask"].sum()
        sum_over_processes([tokens])
        log_step(args, state, metrics, tokens.item(), progress, ("divergence", "agreement"))
        if step % args.save_every == 0 or step in (1, args.max_steps):
            tqdm.write(f"\nanswers of step {step}, in green:")
            for example, answer in zip(mine[:4], answers, strict=False):
                sample = {"step": step, "prompt": common.shown_text(tokenizer, example["prompt"]),
                          "answer": common.shown_text(tokenizer, answer)}
                state["samples"].append(sample)
                tqdm.write("{prompt}\033[32m{answer}\033[0m\n".format(**sample))
            save(args, state, weights, optimizer, scaler)

    # 8. Evaluate again on the same held-out prompts, and save the adapter.
    finish(args, state, model, tokenizer, evaluate(model, teacher, held_out, tokenizer, args))
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
    with common.running("--micro-batch-size and --sample-batch-size, then the lengths"):
        train(common.parse(make_flags(), TINY))
