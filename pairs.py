"""Builds datasets for dpo.py, sft.py and kto.py from a model's own answers; trains nothing.

The model π answers each prompt x N times: y_1 … y_N ~ π(·|x). Each answer y_i gets a score s_i, and
--format determines which answers become rows:

    pairs   chosen = argmax s, rejected = argmin s, margin = max s − min s           for dpo.py
    best    completion = argmax s (best-of-N)                                        for sft.py
    kto     label = s_i > mean of all N scores; no row where s_i equals the mean     for kto.py

Why it works. A model that answers one sample in four correctly already has the skill; it only has
to use it more often. Nobody has to write answers, and every answer that is kept is one that the
model can produce. SFT on the best answers is RAFT (Dong et al. 2023, arXiv:2304.06767), also known
as rejection-sampling fine-tuning:

    maximize  E_x [ log π(y*|x) ],    y* = argmax s_i over y_1 … y_N ~ π(·|x)

Its gradient is a policy gradient in which the best answer has weight 1 and all others have weight
0. A prompt whose answers all have the same score yields no pair and no label. With `best` it yields
a row even if every answer is wrong; --min-score 1 leaves such prompts out.

The scores come from --reward: a reward function, a run of reward_model.py, or a run of prm.py
(min_k p_k over the lines of y). Or they come from AI feedback: a language model, --judge, reads x,
two answers and a principle drawn from a constitution (Bai et al. 2022, arXiv:2212.08073, section
4.1), and says which answer is better, A or B. RLAIF trains a reward model on such preferences; here
an answer's score is its win rate. Judges have a position bias, so they read each pair in both
orders (Lee et al. 2023, arXiv:2309.00267):

    P_A(y, y') = p(A) / (p(A) + p(B))                   A: the first answer, y, is better
    P(y ≻ y')  = ½ [P_A(y, y') + 1 − P_A(y', y)]
    s_i        = mean of P(y_i ≻ y_j) over the y_j that y_i was compared with: its win rate

If the judge follows the Bradley-Terry model, P(y_i ≻ y_j) = σ(r_i − r_j), and all pairs are
compared, then the win rates rank the answers in the same order as the rewards r. N distinct answers
form N (N − 1) / 2 pairs. The judge compares at most --comparisons of them, but at least N − 1.

A worked example, with four answers to "What is 36 - 25?" and the reward correct_answer:

    answers 11, 11, 13, 1    scores 1, 1, 0, 0    mean 0.5
    pairs   chosen 11, rejected 13, margin 1
    best    11
    kto     11 desirable, 13 and 1 undesirable (one row for each distinct answer)

With a judge that compares three answers a, b and c:

    P_A(a, b) = 0.9    P_A(b, a) = 0.6    P(a ≻ b) = 0.65    the verdict flips: "A" both times
    P_A(a, c) = 0.7    P_A(c, a) = 0.2    P(a ≻ c) = 0.75
    P_A(b, c) = 0.5    P_A(c, b) = 0.5    P(b ≻ c) = 0.50
    s_a = (0.65 + 0.75) / 2 = 0.700    s_b = (0.35 + 0.50) / 2 = 0.425    s_c = 0.375

    python pairs.py --output pairs.jsonl                             # the tiny model, a minute
    python pairs.py Qwen/Qwen2.5-0.5B-Instruct --output pairs.jsonl  # GSM8K in 4 bits on a T4
    python pairs.py --judge tiny/base --judge-template examples/judge_claim.txt --output ai.jsonl

What to watch. The gain from best-of-N is the difference between the scores of the best and the
first answers. Prompts whose answers all have the same score are wasted: they are too easy or too
hard. If the best answers are much longer than the worst, the reward favors length;
--max-length-ratio limits the damage. If most verdicts flip, the judge prefers a position rather
than an answer. With a template that shows one answer at a time (judge_claim.txt), a flip only means
that both answers get the same verdict.

Change one thing: with `--temperature 0.3` only 11 of the first 100 prompts have answers with
different scores, compared with 99 at 1.0, so nearly all samples are wasted. Or change the judge.
The model tiny/base has read claims such as `2 + 2 = 5? No.`; DPO on its preferences raises the
accuracy of tiny/chat from 0.589 to 0.801. With
`--judge tiny/chat --judge-template examples/judge_tiny.txt` the model judges itself. It orders only
54% of held-out pairs correctly (tiny/base: 96%), and DPO lowers its accuracy to 0.492.

Shapes: P prompts; B answers or comparisons of T tokens; S steps in an answer; width D,
vocabulary V. The program runs in one process.
"""
import argparse
import functools
import itertools
import json
import math
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

TINY = dict(dataset="tiny/data/prompt_train.jsonl", max_new_tokens=24, micro_batch_size=256)
# The script that trains on the rows of each --format.
TRAINED_BY = {"pairs": "dpo.py", "best": "sft.py", "kto": "kto.py"}
# Columns of a prompt's row that would be misread as part of the new row.
MISREAD = {"messages", "text", "completion", "chosen", "rejected", "margin", "label"}


def make_flags():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=common.HelpFormatter)
    add = parser.add_argument
    add("model", nargs="?", default="tiny/chat",
        help="model that answers: Hub name, folder or LoRA adapter")
    add("--output", required=True, help="new .jsonl file")
    add("--format", choices=TRAINED_BY, default="pairs",
        help="rows to write: pairs for dpo.py, best-of-N for sft.py, or labels for kto.py")
    add("--dataset", default="openai/gsm8k:main",
        help="prompts: Hub name[:config] or local file; the tiny model has its own")
    add("--split", default="train", help="split of a Hub dataset")
    add("--columns", **common.COLUMNS)
    add("--chat-template", help=common.TEMPLATE)
    add("--template-arguments", **common.VARIABLES)
    add("--size", type=common.count, default=1000, help="maximum number of prompts")
    add("--samples", type=common.number(int, 2), default=8, help="answers per prompt, N")
    add("--reward", default="correct_answer",
        help="correct_answer, FILE.py:function, or a run of reward_model.py or prm.py")
    add("--judge", help="language model that compares answers; replaces --reward")
    add("--judge-template", default="examples/judge.txt", help="file with the judge's prompt")
    add("--constitution", default="examples/constitution.txt",
        help="file with the judge's principles, one per line")
    add("--comparisons", type=common.count, default=28,
        help="maximum number of comparisons per prompt")
    add("--max-length-ratio", type=common.number(float, 1), default=math.inf,
        help="maximum length of the longer answer of a pair, relative to the shorter one")
    add("--min-score", type=common.number(float, -1e9), default=-math.inf,
        help="minimum score of the best answer; a prompt whose best is lower is left out")
    add("--temperature", type=common.positive, default=1.0, help="sampling temperature")
    add("--max-new-tokens", type=common.count, default=512,
        help="longest answer, in tokens; 24 for the tiny model")
    add("--micro-batch-size", type=common.count, default=32,
        help="answers sampled at a time; 256 for the tiny model")
    add("--load-in-4bit", **common.ON_GPU, help="quantize the models to 4 bits (NF4)")
    add("--seed", type=common.natural, default=0, help="seed of the samples and the principles")
    return parser


# ---- data: prompts -------------------------------------------------------------------------------

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


# ---- the method: which answers are kept ----------------------------------------------------------

def make_rows(row, answers, args):
    """The rows of the new dataset that come from one prompt, in the form that --format asks for.

    An answer has "text", "length", "score" and "count", the number of samples with that text.
    """
    scores = [answer["score"] for answer in answers]
    if max(scores) < args.min_score:
        return []
    kept = {name: value for name, value in row.items() if name not in MISREAD}
    completions = [answer["text"] for answer in answers]
    if not isinstance(row["prompt"], str):
        # A prompt of messages needs answers of messages.
        completions = [[{"role": "assistant", "content": text}] for text in completions]

    if args.format == "best":
        best = scores.index(max(scores))
        return [kept | {"completion": completions[best]}]

    if args.format == "pairs":
        lengths = [answer["length"] for answer in answers]
        best, worst = best_and_worst(scores, lengths, args.max_length_ratio)
        margin = scores[best] - scores[worst]
        if margin == 0:
            return []
        pair = {"chosen": completions[best], "rejected": completions[worst], "margin": margin}
        return [kept | pair]

    # KTO labels: is an answer better or worse than the mean of all samples, the baseline?
    samples = []
    for answer in answers:
        samples += [answer["score"]] * answer["count"]
    mean = statistics.mean(samples)  # exact: the mean of equal scores is equal to them
    rows = []
    for completion, score in zip(completions, scores, strict=True):
        if score != mean:
            rows.append(kept | {"completion": completion, "label": score > mean})
    return rows


def best_and_worst(scores, lengths, max_ratio):
    """The indices of chosen and rejected, neither over `max_ratio` times as long as the other.

    If several answers share the best score, the one with the lowest-scoring partner is chosen, and
    among equal pairs the first.
    """
    candidates = []
    for best, worst in itertools.product(range(len(scores)), repeat=2):
        shorter, longer = sorted([lengths[best], lengths[worst]])
        if scores[best] == max(scores) and longer <= max_ratio * shorter:
            candidates.append((best, worst))
    return min(candidates, key=lambda pair: scores[pair[1]])


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


def read_answers(tokenizer, prompt, answers, stop_ids):
    """The distinct answers to a prompt as dicts with "text", "length" and "count".

    Empty answers are left out, and so are truncated ones: training on a truncated answer would
    teach the model to stop mid-answer.
    """
    options = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
    prompt_text = tokenizer.decode(prompt, **options)
    different = {}
    for answer in answers:
        # An answer that is decoded on its own may lose its leading space.
        whole = tokenizer.decode(prompt + answer, **options)
        text = whole.removeprefix(prompt_text)
        if not text.strip() or answer[-1] not in stop_ids:
            continue
        if text not in different:
            different[text] = {"text": text, "length": len(answer), "count": 0}
        different[text]["count"] += 1
    return list(different.values())


# ---- rewards: functions of prompts, completions and columns --------------------------------------

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


def call_reward(name, function, examples, texts):
    """Calls a reward function with the columns of the rows.

    Returns a score per text, or None where the reward does not apply.
    """
    rows = [example["row"] for example in examples]
    columns = {key: [row.get(key) for row in rows] for key in set().union(*rows)}
    columns |= {"prompts": columns.pop("prompt"), "completions": texts}
    with common.phase(f"the reward {name} (completions are strings), on {str(rows[0]):.100}"):
        scores = [None if score is None else float(score) for score in function(**columns)]
        # NaN fails this comparison, and so does a number that would be infinite in fp32.
        if len(scores) != len(rows) or not all(abs(score or 0) < 1e38 for score in scores):
            raise ValueError(f"expected {len(rows)} numbers below 1e38 (or None), got {scores}")
    return scores


def load_scorer(name, args):
    """The reward as a function of columns: the user's own, or the score of a trained model."""
    if name == "correct_answer":
        return correct_answer
    if name.rpartition(":")[0].endswith(".py"):
        return common.load_function(name)
    with common.phase(f"loading the reward {name} ({common.ANOTHER_BASE})"):
        config = common.adapter_config(name)
        if not config or config.task_type != "SEQ_CLS":
            raise ValueError("neither FILE.py:function nor a run of reward_model.py or prm.py")
        # summary.json says which script trained the model. If there is none, as in tiny/reward, or
        # if it has another form, the model is taken to be a reward model.
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
    """Scores by a reward model, r(x, y), or by a process reward model, min p_k over steps k.

    With `outcome`, the process reward model was trained on last steps only, and p of the last step
    is the score.
    """
    scores = []
    tools = tools or [None] * len(prompts)
    for prompt, text, tool in zip(prompts, completions, tools, strict=True):
        steps = []
        # Each line is a step. Prompt and steps are joined in the same way as prm.py trains on them.
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
        else:  # an empty answer consists of its end token
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


# ---- AI feedback: a judge compares two answers ---------------------------------------------------

def load_judge(args, flips):
    """Returns a reward function: the win rate of each answer, according to the judge.

    For each comparison it appends to the list `flips` whether the verdict changed with the order.
    """
    tokenizer = common.load_tokenizer(args.judge)
    with common.phase(f"reading {args.judge_template} and {args.constitution}"):
        principles = Path(common.find(args.constitution)).read_text().strip().splitlines()
        if not principles:
            raise ValueError("the constitution has no principles")
        template = read_template(args.judge_template)
        # Render it once now, so that a faulty template fails before anything is sampled.
        chat = [{"role": role, "content": "?"} for role in ("user", "assistant", "user")]
        values = {"prompt": chat, "principle": principles[0], "answer_a": "1", "answer_b": "2"}
        encode_verdict(tokenizer, template, values)
    model = common.load_model(args.judge, args.load_in_4bit, 0, "off", trainable=False)
    return functools.partial(judge_scores, model, tokenizer, template, principles, args, flips)


def read_template(file):
    """The two verdicts of a judge's template, and its messages as pairs (role, Jinja template).

    The first line of the file names the verdicts, as in "verdicts: A B". A line with a role, such
    as <user>, precedes each message. The variables of a message are prompt (a list of messages),
    principle, answer_a, answer_b and, where the judge decides, verdict.
    """
    first_line, _, rest = Path(common.find(file)).read_text().partition("\n")
    verdicts = first_line.removeprefix("verdicts:").split()
    # The split gives [text before the first message, role, text, role, text, …].
    parts = re.split(r"^<(system|user|assistant)>\n", rest, flags=re.MULTILINE)
    roles = parts[1::2]
    texts = parts[2::2]
    if len(set(verdicts)) != 2 or "{{ verdict }}" not in "".join(texts):
        raise ValueError("it needs a first line like verdicts: A B, and {{ verdict }} in a message")
    # A template may come from a stranger, so it must not run code. Misspelled variables are errors.
    jinja = jinja2.sandbox.ImmutableSandboxedEnvironment(undefined=jinja2.StrictUndefined)
    templates = [jinja.from_string(text) for text in texts]
    return verdicts, list(zip(roles, templates, strict=True))


def judge_scores(model, tokenizer, template, principles, args, flips, /, prompts, completions,
                 **columns):
    """The win rate of each answer. All completions answer the same prompt."""
    prompt = prompts[0]
    chat = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    comparisons = list(itertools.combinations(range(len(completions)), 2))
    # Adjacent pairs come first, so that every answer is compared at least once.
    comparisons.sort(key=lambda pair: pair[1] - pair[0])
    count = max(args.comparisons, len(completions) - 1)
    preferences = [[] for _ in completions]  # P(y_i ≻ y_j) for each i
    for i, j in comparisons[:count]:
        principle = random.Random(f"{args.seed} {prompt} {i} {j}").choice(principles)
        questions = []
        for first, second in (i, j), (j, i):
            values = {"prompt": chat, "principle": principle,
                      "answer_a": completions[first], "answer_b": completions[second]}
            questions.append(encode_verdict(tokenizer, template, values))
        i_first, j_first = first_wins(model, tokenizer, questions)  # P_A(y_i, y_j), P_A(y_j, y_i)
        # This is ½ [P_A(y_i, y_j) + 1 − P_A(y_j, y_i)], in a form that is exactly ½ for equal P_A.
        preference = 0.5 + (i_first - j_first) / 2
        preferences[i].append(preference)
        preferences[j].append(1 - preference)
        flips.append((i_first > 0.5) != (j_first < 0.5))
    # A single answer is compared with nothing; its win rate is ½.
    return [statistics.fmean(own or [0.5]) for own in preferences]


def encode_verdict(tokenizer, template, values):
    """The ids that precede the judge's verdict, and the ids of the two tokens that may follow.

    The chat is rendered once with each verdict. The judge decides where the two first differ.
    """
    verdicts, messages = template
    rendered = []
    for verdict in verdicts:
        chat = []
        for role, text in messages:
            content = text.render(values, verdict=verdict).strip()
            chat.append({"role": role, "content": content})
        rendered.append(common.to_ids(tokenizer, common.render(tokenizer, chat)))
    a, b = rendered
    length = common.shared_length(a, b)
    if not 0 < length < min(len(a), len(b)) or length > tokenizer.model_max_length:
        raise ValueError(f"the verdicts {verdicts} first differ after {length} of {len(a)} tokens")
    return a[:length], [a[length], b[length]]


@torch.no_grad()
def first_wins(model, tokenizer, questions):
    """P_A for each question: the softmax over its two verdicts, read at its last token."""
    causal = common.causal_lm(model)
    rows = [ids for ids, _ in questions]
    verdicts = torch.tensor([tokens for _, tokens in questions])  # [B, 2]
    batch = tokenizer.pad({"input_ids": rows}, padding_side="right", return_tensors="pt")
    last = batch["attention_mask"].sum(-1) - 1  # [B]
    with common.autocast(model):
        hidden = causal.base_model(**batch.to(model.device), use_cache=False)[0]  # [B, T, D]
        logits = common.read_out(causal, hidden[torch.arange(len(rows)), last])  # [B, V]
    logits = logits.float().cpu().gather(1, verdicts)  # [B, 2]
    return logits.softmax(-1)[:, 0].tolist()


# ---- the program ---------------------------------------------------------------------------------

def summarize(groups, flips, args):
    """Prints the scores and lengths of the answers, and so the gain from best-of-N."""
    answers = list(itertools.chain(*groups))
    ended = sum(answer["count"] for answer in answers)
    print(f"\n{ended} of {len(groups) * args.samples} answers ended and were not empty")
    ranked = [sorted(group, key=lambda answer: answer["score"]) for group in groups if group]
    differing = sum(group[0]["score"] < group[-1]["score"] for group in ranked)
    print(f"{differing} of {len(groups)} prompts have answers with different scores")
    if flips:
        share = sum(flips) / len(flips)
        print(f"{share:.1%} of {len(flips)} verdicts flip with the order of the answers")
    print(f"{'':<8}{'score':>9}{'length':>9}")
    shown = {"first": [group[0] for group in groups if group], "all": answers,
             "best": [group[-1] for group in ranked], "worst": [group[0] for group in ranked]}
    for name, several in shown.items():
        # "all" means all samples; the other lines have one answer per prompt.
        counts = [answer["count"] if name == "all" else 1 for answer in several]
        score = statistics.fmean([answer["score"] for answer in several], counts)
        length = statistics.fmean([answer["length"] for answer in several], counts)
        print(f"{name:<8}{score:9.3f}{length:9.1f}")


def main(args):
    # 1. Check the flags and load the prompts, so that errors show before a model is loaded.
    output = Path(args.output)
    with common.phase(f"--output {output}, which must be a new .jsonl file in an existing folder"):
        if output.suffix != ".jsonl":
            raise ValueError("its name does not end in .jsonl")
        output.open("x").close()
        output.unlink()
    tokenizer = common.load_tokenizer(args.model, args.chat_template, args.template_arguments)
    rows = common.load_rows(args.dataset, args.split, args.size, args.seed, args.columns)
    encode = functools.partial(encode_row, max_new_tokens=args.max_new_tokens,
                               needs_answer=not args.judge and args.reward == "correct_answer")
    examples = common.encode_rows(args.dataset, rows[:args.size], encode, tokenizer, 10**9)

    # 2. Load the reward or the judge, and the model that answers.
    flips = []
    if args.judge:
        name = args.judge
        reward = load_judge(args, flips)
    else:
        name = args.reward
        reward = load_scorer(args.reward, args)
    model = common.load_model(args.model, args.load_in_4bit, 0, "off", trainable=False)
    stop_ids = common.stop_token_ids(tokenizer, model.generation_config)
    common.print_settings(model)

    groups = []  # the distinct answers to each prompt
    size = max(1, args.micro_batch_size // args.samples)
    for i in tqdm(range(0, len(examples), size)):
        # 3. Sample N answers to each of a few prompts.
        part = examples[i:i + size]
        prompts = [example["prompt"] for example in part]
        with common.autocast(model):
            sampled = sample(model, tokenizer, prompts, args.samples, args, args.seed + i)

        # 4. Score them; an answer that was sampled several times is scored once.
        for j, example in enumerate(part):
            own = sampled[j * args.samples:(j + 1) * args.samples]
            group = read_answers(tokenizer, example["prompt"], own, stop_ids)
            groups.append(group)
            if not group:
                continue
            texts = [answer["text"] for answer in group]
            scores = call_reward(name, reward, [example] * len(texts), texts)
            if None in scores:
                common.fail(f"the reward {name} returned None, but each answer needs a number")
            for answer, score in zip(group, scores, strict=True):
                answer["score"] = score
    if not any(groups):
        common.fail("no answer ended within --max-new-tokens")

    # 5. Report the scores.
    summarize(groups, flips, args)

    # 6. Make the rows.
    made = []
    for example, group in zip(examples, groups, strict=True):
        if group:
            made += make_rows(example["row"], group, args)
    if not made:
        common.fail("no rows: every prompt has equal scores or a best one below --min-score")

    # 7. Write to another name first, so that an interrupted run leaves no incomplete file.
    lines = [json.dumps(row) + "\n" for row in made]
    with common.phase(f"writing {output}"), tempfile.TemporaryDirectory(dir=output.parent) as new:
        Path(new, "rows").write_text("".join(lines))
        Path(new, "rows").replace(output)
    print("\nthe first rows:")
    for row in made[:3]:
        print(common.visible(json.dumps(row, ensure_ascii=False)))
    print(common.visible(f"\n{len(made)} rows from {len(examples)} prompts: {output}\n"
                         f"next:   python {TRAINED_BY[args.format]} --model {args.model} "
                         f"--dataset {output}"))


if __name__ == "__main__":
    with common.running("--micro-batch-size, then --max-new-tokens", resumes=""):
        main(common.parse(make_flags(), TINY))
