"""Runs of grpo.py computed plainly: full logits in float64, one completion at a time.

Nothing of grpo.py is used here.
"""
import functools
import random
import statistics

import torch

import common

TEMPERATURE, RATE, BETA, LONGEST = 1.5, 2e-3, 0.3, 20
CASES = {  # loss: baseline, epsilon, epsilon-high
    "grpo": ("group", 0.1, 0.15), "dr_grpo": ("group", 0.15, 0.1), "dapo": ("rloo", 0.1, 0.15),
    "gspo": ("group", 0.02, 0.03), "cispo": ("none", 0.1, 1.2)}


def row(question, answer):
    """Its difficulty is its answer."""
    prompt = [{"role": "user", "content": question}]
    return {"prompt": prompt, "answer": str(answer), "difficulty": answer}


ROWS = [row("What is 5 - 2?", 3), row("Tom has 14 figs and gets 83 more. How many figs now?", 97),
        row("What is 9 - 8 and 12 + 9?", 21)]
HELD_OUT = [row(f"What is {n} - 4?", n - 4) for n in (6, 11, 400)]


def plain_loss(loss, logps, old, ref, advantages, used, beta, low, high, longest):
    """One [N_i] tensor per completion, of log-probs alone; returns the loss and the clipped."""
    total, clipped = 0.0, 0
    tokens = sum(len(x) for x, use in zip(logps, used, strict=True) if use)
    for x, o, r, a, use in zip(logps, old, ref, advantages, used, strict=True):
        ratio = (x - o).exp()
        if loss == "gspo":
            ratio = ratio.prod().pow(1 / len(x)).expand(len(x))
        gain = torch.minimum(ratio * a, torch.clamp(ratio, 1 - low, 1 + high) * a)
        stopped = ratio > 1 + high if a > 0 else (ratio < 1 - low) & (a < 0)
        if loss == "cispo":
            gain = torch.clamp(ratio, max=high).detach() * a * x
            stopped = ratio > high
        q = (r - x).exp()
        worth = (gain - beta * (q - q.log() - 1)).sum()
        if loss == "dr_grpo":
            total = total - worth / longest / len(logps)
        elif loss in ("dapo", "cispo"):
            total = total - worth / tokens if use else total
        else:
            total = total - worth / len(x) / len(logps)
        clipped += stopped.sum().item()
    return total, clipped / sum(map(len, logps))


def fixed_answers(model, tokenizer, prompts, copies, args, seed):
    """In place of `sample`: they follow from prompt and copy; each third one never stops."""
    answers = []
    for prompt in prompts:
        for copy in range(copies):
            draw = random.Random(f"{prompt} {copy}")
            text = f"{draw.randrange(100)} + {draw.randrange(10)} = {draw.randrange(1000)}"
            ids = tokenizer(text[draw.randrange(6):])["input_ids"]
            answers.append(ids + [tokenizer.eos_token_id] * (copy % 3 < 2))
    return answers


def plain_logps(model, completions):
    """log p of each token of each completion, from the logits of all positions and no mask."""
    rows = [torch.tensor(prompt + answer) for prompt, answer in completions]
    padded = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)  # nothing looks ahead
    every = (model(padded).logits / TEMPERATURE).log_softmax(-1)
    logps = []
    for row, (prompt, answer) in zip(every, completions, strict=True):
        answered = row[len(prompt) - 1:len(prompt) - 1 + len(answer)]
        logps.append(answered.gather(1, torch.tensor(answer)[:, None])[:, 0])
    return logps


def complete(tokenizer, rows, copies):
    prompts = [common.encode_prompt(tokenizer, row["prompt"]) for row in rows]
    answers = fixed_answers(None, tokenizer, prompts, copies, None, 0)
    prompts = [prompt for prompt in prompts for _ in range(copies)]
    return list(zip(prompts, answers, strict=True))


def score(text, row):
    """2 x the reward varied_but_on_3 + 0.5 x tenth."""
    varied = 1 if row["difficulty"] == 3 else sum(map(ord, text)) % 8
    return 2 * varied + 0.05 * row["difficulty"], varied, row["difficulty"] / 10


def describe(tokenizer, completions, rows, copies):
    """Rewards of the completions, and what is logged of them."""
    rows = [row for row in rows for _ in range(copies)]
    texts = [tokenizer.decode(ids, skip_special_tokens=True) for _, ids in completions]
    scores = [score(text, row) for text, row in zip(texts, rows, strict=True)]
    rewards = [total for total, _, _ in scores]
    stopped = [ids[-1] == tokenizer.eos_token_id for _, ids in completions]
    return scores, stopped, {
        "reward": statistics.fmean(rewards), "stopped": statistics.fmean(stopped),
        "length": statistics.fmean(len(ids) for _, ids in completions)}


def plain_advantages(groups, loss, baseline):
    advantages = []
    for group in groups:
        mean = statistics.fmean(group)
        std = 1 if loss == "dr_grpo" else statistics.stdev(group) + 1e-4
        for i, reward in enumerate(group):
            others = statistics.fmean(group[:i] + group[i + 1:])
            advantages.append({"group": (reward - mean) / std, "rloo": reward - others,
                               "none": reward}[baseline])
    return advantages


@functools.cache
def by_hand(loss):
    """Two rollouts with two updates each: what has to be logged, and the weights at the end."""
    baseline, low, high = CASES[loss]
    tokenizer = common.load_tokenizer("tiny/chat")
    torch.manual_seed(0)
    model = common.load_model("tiny/chat").double()
    weights = {name: p for name, p in model.named_parameters() if p.requires_grad}
    start = {name: p.detach().clone() for name, p in weights.items()}
    optimizer = torch.optim.Adam(weights.values())
    completions, held_out = complete(tokenizer, ROWS, 3), complete(tokenizer, HELD_OUT, 1)
    scores, stopped, described = describe(tokenizer, completions, ROWS, 3)
    groups = [[x[0] for x in scores[i:i + 3]] for i in (0, 3, 6)]
    spread = [len(set(group)) > 1 for group in groups]
    assert spread == [False, True, True] and len({len(x) for x, _ in completions}) == 3
    advantages = plain_advantages(groups, loss, baseline)
    used = [loss != "dapo" or (stopped[i] and spread[i // 3]) for i in range(9)]
    with torch.no_grad(), model.disable_adapter():
        ref, held_ref = plain_logps(model, completions), plain_logps(model, held_out)
    steps = []
    for rate in (RATE, RATE / 2):  # a cosine, and two steps are too few for a warm-up
        old = [x.detach() for x in plain_logps(model, completions)]
        losses, clips, entropies = [], [], []
        for _ in range(2):
            new = plain_logps(model, completions)
            value, clipped = plain_loss(loss, new, old, ref, advantages, used, BETA, low, high,
                                        LONGEST)
            optimizer.zero_grad()
            value.backward()
            norm = sum(p.grad.square().sum() for p in weights.values()).sqrt().item()
            for p in weights.values():
                p.grad *= min(1, 1 / norm)
            optimizer.param_groups[0]["lr"] = rate
            optimizer.step()
            losses.append(value.item())
            clips.append(clipped)
            entropies.append(-torch.cat(new).mean().item())
        kl = sum(o.sum() - r.sum() for o, r in zip(old, ref, strict=True)).item() / 9
        steps.append(described | {
            "step": len(steps) + 1, "loss": statistics.fmean(losses), "kl": kl,
            "entropy": statistics.fmean(entropies), "clip_fraction": statistics.fmean(clips),
            "grad_norm": norm, "learning_rate": rate, "loss_scale": 1, "ratio_error": 0,
            "varied": statistics.fmean(x[1] for x in scores),
            "tenth": statistics.fmean(x[2] for x in scores),
            "group_std": statistics.fmean(map(statistics.stdev, groups)), "zero_spread": 1 / 3})
    with torch.no_grad():
        new = plain_logps(model, held_out)
    kl = sum(n.sum() - r.sum() for n, r in zip(new, held_ref, strict=True)).item() / 3
    after = describe(tokenizer, held_out, HELD_OUT, 1)[2] | {"kl": kl}
    assert 0 < steps[0]["clip_fraction"] < 1 and abs(steps[1]["kl"]) > 0.1
    return steps, after, start, {name: p.detach() for name, p in weights.items()}
