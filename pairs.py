"""Pairs: data for dpo.py, sft.py and kto.py from a model's own answers. Nothing is trained here.

The model π answers each prompt x several times, y_1 … y_N ~ π(·|x). Each answer gets a score s_i,
and --format says what is kept:

    pairs   chosen = argmax s, rejected = argmin s, margin = max s − min s          for dpo.py
    best    completion = argmax s, as in RAFT (Dong et al. 2023, arXiv:2304.06767)  for sft.py
    kto     label = whether s_i is above the mean of all samples; none if equal     for kto.py

Equal scores make no pair. With `best` they make a row even where all answers are wrong: --min-score
1 keeps those out. --reward is a function of the answer, or a run of reward_model.py, or one of
prm.py: min_k p_k over the lines of y. Or the score is AI feedback: --judge, a language model, reads
x, two answers and a principle drawn from a constitution (Bai et al. 2022, arXiv:2212.08073, section
4.1), and says A or B. RLAIF trains a reward model on such preferences, and a policy on that; here
they are the scores. Judges favour a place (position bias), so each pair is read twice (Lee et al.
2023, arXiv:2309.00267):

    P_A(y, y') = p(A) / (p(A) + p(B))                           A: the first answer, y, is better
    P(y ≻ y')  = ½ [P_A(y, y') + 1 − P_A(y', y)],    s_i = mean of P(y_i ≻ y_j) over the y_j it met

N different answers make N (N − 1) / 2 pairs; --comparisons C judges C of them, at least N − 1.

    python pairs.py --output pairs.jsonl                             # the tiny model, a minute
    python pairs.py Qwen/Qwen2.5-0.5B-Instruct --output pairs.jsonl  # GSM8K in 4 bits on a T4
    python pairs.py --judge tiny/base --judge-template examples/judge_claim.txt --output ai.jsonl

What to watch: how far the best answers score above the first; prompts without different scores,
which are wasted; best answers that are longer than the worst: the scorer likes length. A judge
most of whose verdicts flip names a place and not an answer, unless its template shows one answer at
a time (judge_claim.txt): then it may say the same of both. One process does it all.

Shapes: B answers or comparisons of T tokens, S steps in an answer; width D, vocabulary V.
"""
import argparse
import functools
import itertools
import json
import random
import re
import statistics
import tempfile
from decimal import Decimal
from pathlib import Path

import jinja2.sandbox
import torch
import torch.nn.functional as F
from tqdm import tqdm

import common

flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
add = flags.add_argument
add("model", nargs="?", default="tiny/chat", help="that answers: Hub name, folder or LoRA adapter")
add("--output", required=True, help="a new .jsonl file")
add("--format", choices=["pairs", "best", "kto"], default="pairs")
add("--dataset", default="openai/gsm8k:main", help="prompts: Hub name or local file")
add("--split", default="train", help="of a Hub dataset")
add("--columns", **common.COLUMNS, help="other names of columns: prompt=query completion=reply")
add("--chat-template", help="file with a chat template, in place of the model's own")
add("--template-arguments", **common.VARIABLES, help="variables that the chat template reads")
add("--size", type=common.count, default=1000, help="prompts at most")
add("--samples", type=common.number(int, 2), default=8, help="answers to each prompt, N")
add("--reward", default="correct_answer", help="or FILE.py:function, or a run of reward_model, prm")
add("--judge", help="a language model that compares answers, in place of --reward")
add("--judge-template", default="examples/judge.txt", help="what the judge reads")
add("--constitution", default="examples/constitution.txt", help="principles, one a line")
add("--comparisons", type=common.count, default=28, help="pairs judged per prompt, at most")
add("--max-length-ratio", type=common.number(float, 1), default=1e9,
    help="how many times longer, in tokens, one answer of a pair may be than the other")
add("--min-score", type=common.number(float, -1e9), default=-1e9,
    help="lowest score that the best answer to a prompt may have")
add("--temperature", type=common.positive, default=1.0, help="of sampling")
add("--max-new-tokens", type=common.count, default=512, help="longest answer")
add("--micro-batch-size", type=common.count, default=32, help="answers sampled at a time")
add("--load-in-4bit", **common.ON_GPU, help="quantise the models")
add("--seed", type=common.natural, default=0, help="of the samples and principles")
TINY = dict(dataset="tiny/data/prompt_train.jsonl", max_new_tokens=24, micro_batch_size=256)
# what these columns of a prompt say would be read as part of the new row
TAKEN = {"messages", "text", "completion", "chosen", "rejected", "margin", "label"}


# ---- data: prompts -------------------------------------------------------------------------------

def encode_row(row, tokenizer, max_length, max_new_tokens, needs_answer):
    """The row and the token ids of its prompt. A row that cannot be used raises ValueError."""
    prompt = common.prompt_of(row, tokenizer)
    ids = common.encode_prompt(tokenizer, prompt, row.get("tools"))
    if len(ids) + max_new_tokens > max_length:
        raise ValueError(f"prompt and answer exceed {max_length} tokens")
    if needs_answer and plain_number(row.get("answer")) is None:
        raise ValueError("no plain number as its answer: --reward examples/rewards.py:math_answer")
    return {"prompt": ids, "row": row | {"prompt": prompt}}


# ---- the method: what is kept of the scored answers to a prompt ----------------------------------

def make_rows(row, answers, args):
    """Rows of the new dataset. An answer has "text", "length", "count" and "score"."""
    scores = [answer["score"] for answer in answers]
    if max(scores) < args.min_score:
        return []
    kept = {name: value for name, value in row.items() if name not in TAKEN}
    said = [answer["text"] for answer in answers]
    if not isinstance(row["prompt"], str):  # in the form of the prompt
        said = [[{"role": "assistant", "content": text}] for text in said]
    if args.format == "best":
        return [kept | {"completion": said[scores.index(max(scores))]}]
    if args.format == "pairs":
        lengths = [answer["length"] for answer in answers]
        best, worst = best_and_worst(scores, lengths, args.max_length_ratio)
        margin = scores[best] - scores[worst]
        pair = {"chosen": said[best], "rejected": said[worst], "margin": margin}
        return [kept | pair] if margin > 0 else []
    samples = [answer["score"] for answer in answers for _ in range(answer["count"])]
    level = statistics.mean(samples)  # an exact sum: the mean of equal scores is equal to them
    return [kept | {"completion": text, "label": score > level}
            for text, score in zip(said, scores, strict=True) if score != level]


def best_and_worst(scores, lengths, ratio):
    """The indices of a best answer, and of the worst that is within `ratio` times its length."""
    pairs = itertools.product(range(len(scores)), repeat=2)
    pairs = [(i, j) for i, j in pairs if scores[i] == max(scores)
             and max(lengths[i], lengths[j]) <= ratio * min(lengths[i], lengths[j])]
    # of several best ones that with the widest margin, of equals the first
    return min(pairs, key=lambda pair: scores[pair[1]])


# ---- sampling ------------------------------------------------------------------------------------

@torch.no_grad()
def sample(model, tokenizer, prompts, copies, args, seed):
    """Samples `copies` answers to each of P prompts; returns lists of ids, grouped by prompt.

    Tokens are drawn from exactly softmax(logits / temperature): no top-k, no top-p, no penalties.
    An answer ends with its stop token, unless it reached --max-new-tokens.
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


def read_answers(tokenizer, prompt, answers, stop_ids):
    """The answers to a prompt that ended and are not empty, each once: "text", "length", "count".

    A row made of one that did not end would teach to stop where it was cut off.
    """
    read = {}
    plain = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
    asked = tokenizer.decode(prompt, **plain)
    for answer in answers:
        # decoded alone, an answer may lose the space that it starts with
        text = tokenizer.decode(prompt + answer, **plain).removeprefix(asked)
        if text.strip() and answer[-1] in stop_ids:
            read.setdefault(text, {"text": text, "length": len(answer), "count": 0})["count"] += 1
    return list(read.values())


# ---- what scores an answer: each is a function of prompts, completions and columns ---------------

def correct_answer(prompts, completions, answer, **columns):
    """1 where the last number of the completion equals the row's column `answer`, else 0."""
    scores = []
    for completion, truth in zip(completions, answer, strict=True):
        number = plain_number(truth)
        scores.append(float(number is not None and last_number(completion) == number))
    return scores


# 1,000 is a number, 1,2345 are two, .5 is a half.
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


def call_reward(name, function, examples, texts):
    """Calls a reward function with the columns of the rows: a score per text, or None for some.

    None means that the reward does not apply to an answer.
    """
    rows = [example["row"] for example in examples]
    columns = {key: [row.get(key) for row in rows] for key in set().union(*rows)}
    columns |= {"prompts": columns.pop("prompt"), "completions": texts}
    with common.phase(f"the reward {name} (completions are strings), on {str(rows[0]):.100}"):
        scores = [None if score is None else float(score) for score in function(**columns)]
        # NaN fails this comparison, and so does a number that would be infinite in fp32.
        if len(scores) != len(rows) or not all(abs(score or 0) < 1e38 for score in scores):
            raise ValueError(f"not {len(rows)} numbers below 1e38 or None, but {scores}")
    return scores


def load_scorer(name, args):
    """What --reward names, as a function of columns: the user's own, or one that asks a model."""
    if name == "correct_answer":
        return correct_answer
    if name.rpartition(":")[0].endswith(".py"):
        return common.load_function(name)
    with common.phase(f"loading the reward {name} ({common.ANOTHER_BASE})"):
        config = common.adapter_config(name)
        if not config or config.task_type != "SEQ_CLS":
            raise ValueError("no FILE.py:function, and no run of reward_model.py or prm.py")
        # summary.json says which script trained it. Without one, as in tiny/reward, or if it has
        # another form, it is a reward model.
        summary = Path(common.find(name), "summary.json")
        run = json.loads(summary.read_text()) if summary.exists() else {}
        run = run if isinstance(run, dict) else {}
    tokenizer = common.load_tokenizer(name)
    model = common.load_model(name, args.load_in_4bit, 0, "off", trainable=False, task="SEQ_CLS")
    by_steps = run.get("method") == "prm"
    return functools.partial(model_scores, model, tokenizer, by_steps, run.get("outcome"))


@torch.no_grad()
def model_scores(model, tokenizer, by_steps, outcome, /, prompts, completions, tools=None,
                 **columns):
    """Scores of answers by a reward model, r(x, y), or by steps: min p_k over the steps of y.

    With `outcome`, the model of the steps was trained on the last step alone: then p of that one.
    """
    scores = []
    tools = tools or [None] * len(prompts)
    for prompt, text, tool in zip(prompts, completions, tools, strict=True):
        steps = []
        # Each line is a step. Prompt and steps are joined as prm.py joins them in training.
        if by_steps:
            steps = [line.strip() for line in text.split("\n") if line.strip()]
            text = "\n".join(steps)
            if isinstance(prompt, str):
                chat = [{"role": "user", "content": prompt}]
                prompt = chat if tokenizer.chat_template else prompt + "\n"
        if text.strip():
            said = text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]
            (head, _), (rest, _), (answer, _) = common.encode(tokenizer, prompt, said, tool)[0]
            asked = head + rest
        else:  # an empty answer is the token that ends it
            asked = common.encode_prompt(tokenizer, prompt, tool)
            answer = [tokenizer.eos_token_id]
        ends = step_ends(tokenizer, answer, steps)[-1 if outcome else 0:] or [len(answer) - 1]
        batch = tokenizer.pad({"input_ids": [asked + answer]}, return_tensors="pt")
        batch["step_ends"] = torch.tensor([ends]) + len(asked)  # [1, S]
        with common.autocast(model):
            logits = step_logits(model, batch.to(model.device), common.causal_lm(model).score)
        scores.append((logits.sigmoid() if by_steps else logits).min().item())
    return scores


def step_ends(tokenizer, ids, steps):
    """The index in `ids`, an answer, of the token that completes each step of its text.

    A token may hold a part of a character, so the text is known for prefixes of the ids only.
    """
    plain = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
    text = tokenizer.decode(ids, **plain)
    ends = []
    end = 0  # the token that is looked at
    done = 0  # how many characters of the text it has to complete
    for step in steps:
        start = text.find(step, done)
        if start < 0:
            raise ValueError(f"its tokens do not spell the step {step!r:.80}")
        done = start + len(step)
        said = tokenizer.decode(ids[:end + 1], **plain)
        # A prefix that ends inside a character is spelled wrong: then the next token is needed.
        while len(said) < done or not text.startswith(said):
            end += 1
            said = tokenizer.decode(ids[:end + 1], **plain)
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


# ---- what compares two answers: AI feedback ------------------------------------------------------

def load_judge(args, flips):
    """A function that scores answers by what the judge prefers, and notes which verdicts flip.

    A template is a line like "verdicts: A B", and messages in Jinja below lines like <user>, with
    prompt (messages), principle, answer_a, answer_b, and verdict where the judge decides.
    """
    tokenizer = common.load_tokenizer(args.judge)
    with common.phase(f"reading {args.judge_template} and {args.constitution}"):
        principles = Path(common.find(args.constitution)).read_text().strip().splitlines()
        first, _, rest = Path(common.find(args.judge_template)).read_text().partition("\n")
        words = first.removeprefix("verdicts:").split()
        parts = re.split(r"^<(system|user|assistant)>\n", rest, flags=re.MULTILINE)
        # A template may be a stranger's: it must run no code, and a misspelled name is no blank.
        jinja = jinja2.sandbox.ImmutableSandboxedEnvironment(undefined=jinja2.StrictUndefined)
        messages = list(zip(parts[1::2], map(jinja.from_string, parts[2::2]), strict=True))
        if len(set(words)) != 2 or "{{ verdict }}" not in "".join(parts[2::2]) or not principles:
            raise ValueError("needed: a line verdicts: A B; {{ verdict }} in a message; principles")
        # What is wrong with it shows now, and not after the first answers.
        chat = [{"role": role, "content": "?"} for role in ("user", "assistant", "user")]
        encode_verdict(tokenizer, words, messages, {
            "prompt": chat, "principle": principles[0], "answer_a": "1", "answer_b": "2"})
    model = common.load_model(args.judge, args.load_in_4bit, 0, "off", trainable=False)
    return functools.partial(
        judge_scores, model, tokenizer, (words, messages), principles, args, flips)


def judge_scores(model, tokenizer, template, principles, args, flips, /, prompts, completions,
                 **columns):
    """The mean preference for each of some answers to one prompt over the others."""
    prompt, won = prompts[0], [[] for _ in completions]  # preferences for each answer
    chat = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    duels = sorted(itertools.combinations(range(len(won)), 2), key=lambda duel: duel[1] - duel[0])
    for i, j in duels[:max(args.comparisons, len(won) - 1)]:  # neighbours first: each meets another
        principle = random.Random(f"{args.seed} {prompt} {i} {j}").choice(principles)
        questions = []
        for first, second in (i, j), (j, i):
            values = {"prompt": chat, "principle": principle,
                      "answer_a": completions[first], "answer_b": completions[second]}
            questions.append(encode_verdict(tokenizer, *template, values))
        forth, back = first_wins(model, tokenizer, questions)
        flips.append((forth > 0.5) != (back < 0.5))
        won[i].append(0.5 + (forth - back) / 2)  # ½ [P_A(y_i, y_j) + 1 − P_A(y_j, y_i)]
        won[j].append(0.5 - (forth - back) / 2)
    return [statistics.fmean(several or [0.5]) for several in won]


def encode_verdict(tokenizer, words, messages, values):
    """The ids that the chats with either verdict share, and the token of each where they part."""
    both = []
    for word in words:
        chat = [{"role": role, "content": text.render(values, verdict=word).strip()}
                for role, text in messages]
        both.append(common.to_ids(tokenizer, common.render(tokenizer, chat)))
    parting = common.shared_length(*both)
    if not 0 < parting < min(map(len, both)) or parting > tokenizer.model_max_length:
        raise ValueError(f"the verdicts {words} part after {parting} tokens of {len(both[0])}")
    return both[0][:parting], [ids[parting] for ids in both]


@torch.no_grad()
def first_wins(model, tokenizer, questions):
    """P_A of each question: the softmax of its two verdicts' logits, at its last token."""
    causal = common.causal_lm(model)
    rows, verdicts = zip(*questions, strict=True)
    batch = tokenizer.pad({"input_ids": list(rows)}, padding_side="right", return_tensors="pt")
    last = batch["attention_mask"].sum(-1) - 1  # [B]
    with common.autocast(model):
        hidden = causal.base_model(**batch.to(model.device), use_cache=False)[0]  # [B, T, D]
        logits = common.read_out(causal, hidden[torch.arange(len(rows)), last])  # [B, V]
    logits = logits.float().cpu().gather(1, torch.tensor(verdicts))  # [B, 2]
    return logits.softmax(-1)[:, 0].tolist()


# ---- the run -------------------------------------------------------------------------------------

def summarise(groups, flips, args):
    """Prints how good the answers are, and what picking among them gains."""
    every = list(itertools.chain(*groups))
    ended = sum(answer["count"] for answer in every)
    print(f"\n{ended} of {len(groups) * args.samples} answers ended and are not empty")
    ranked = [sorted(group, key=lambda answer: answer["score"]) for group in groups if group]
    spread = sum(group[0]["score"] < group[-1]["score"] for group in ranked)
    print(f"{spread} of {len(groups)} prompts have answers of different scores")
    if flips:
        print(f"{sum(flips) / len(flips):.3f} of {len(flips)} verdicts flip with the order")
    print(f"{'':<8}{'score':>9}{'length':>9}")
    shown = {"first": [group[0] for group in groups if group], "all": every,
             "best": [group[-1] for group in ranked], "worst": [group[0] for group in ranked]}
    for name, answers in shown.items():
        counts = [answer["count"] if name == "all" else 1 for answer in answers]
        score = statistics.fmean([answer["score"] for answer in answers], counts)
        length = statistics.fmean([answer["length"] for answer in answers], counts)
        print(f"{name:<8}{score:9.3f}{length:9.1f}")


def main(args):
    # 1. What is wrong with flags and prompts shows before a model is loaded.
    output = Path(args.output)
    with common.phase(f"--output {output}, which must be a new .jsonl file in a folder"):
        if output.suffix != ".jsonl":
            raise ValueError("its name does not end in .jsonl")
        output.open("x").close()
        output.unlink()
    tokenizer = common.load_tokenizer(args.model, args.chat_template, args.template_arguments)
    rows = common.load_rows(args.dataset, args.split, args.size, args.seed, args.columns)
    rows = rows[:args.size]
    encode = functools.partial(encode_row, max_new_tokens=args.max_new_tokens,
                               needs_answer=not args.judge and args.reward == "correct_answer")
    examples = common.encode_rows(args.dataset, rows, encode, tokenizer, 10**9)

    # 2. What scores the answers, and beside it the model that gives them.
    name, flips = args.judge or args.reward, []
    scorer = load_judge(args, flips) if args.judge else load_scorer(args.reward, args)
    model = common.load_model(args.model, args.load_in_4bit, 0, "off", trainable=False)
    stop_ids = common.stop_token_ids(tokenizer, model.generation_config)
    print(common.settings(model))

    groups = []
    size = max(1, args.micro_batch_size // args.samples)
    for i in tqdm(range(0, len(examples), size)):
        # 3. N answers to each of some prompts.
        part = examples[i:i + size]
        prompts = [example["prompt"] for example in part]
        with common.autocast(model):
            answers = sample(model, tokenizer, prompts, args.samples, args, args.seed + i)

        # 4. As texts, and their scores; what is said twice is scored once.
        for j, example in enumerate(part):
            several = answers[j * args.samples:(j + 1) * args.samples]
            group = read_answers(tokenizer, example["prompt"], several, stop_ids)
            texts = [answer["text"] for answer in group]
            scores = call_reward(name, scorer, [example] * len(texts), texts) if texts else []
            if None in scores:
                common.fail(f"the reward {name} returns None: here each answer needs a number")
            scored = zip(group, scores, strict=True)
            groups.append([answer | {"score": score} for answer, score in scored])
    if not any(groups):
        common.fail("no answer ended within --max-new-tokens")

    # 5. What they are worth.
    summarise(groups, flips, args)

    # 6. The rows that they make.
    rows = []
    for example, group in zip(examples, groups, strict=True):
        rows += make_rows(example["row"], group, args) if group else []
    if not rows:
        common.fail("not one row: no answers of different scores, or none above --min-score")

    # 7. The file, whole or not at all.
    with common.phase(f"writing {output}"), tempfile.TemporaryDirectory(dir=output.parent) as new:
        Path(new, "rows").write_text("".join(json.dumps(row) + "\n" for row in rows))
        Path(new, "rows").replace(output)
    for row in rows[:3]:
        print("\n" + common.visible(json.dumps(row, ensure_ascii=False)))
    print(common.visible(f"\n{len(rows)} rows of {len(examples)} prompts: {output}"))


if __name__ == "__main__":
    with common.running("--micro-batch-size, then --max-new-tokens", resumes=""):
        flags.error = common.fail
        if common.is_tiny(flags.parse_args().model):
            flags.set_defaults(**TINY)
        main(flags.parse_args())
