"""Rebuilds the embedded default: the tiny tokenizer, the tiny models and their data.

    python tiny/make.py            # all stages; the results are written beside this file
    python tiny/make.py chat       # some: data, steps, tools, base, chat, reward, teacher, agent

The scripts need a model that a CPU can train within minutes and that has something to gain from
training, because it has a skill but uses it unreliably. This program pretrains one from scratch. A
model with one million parameters and the Qwen2 architecture reads text about addition and
subtraction until it can do sums. The result, `tiny/base`, continues text and has never seen a chat.

`tiny/chat` is the same model after further training on chats in which 43% of the answers are wrong,
and in which users sometimes say so. It has learned the format of a chat and also the mistakes:
about half of its sampled answers are correct, although it can do better. That gap is what the
post-training methods close. `tiny/reward` is an adapter on tiny/chat, trained by reward_model.py
and used by ppo.py; `tiny/teacher` is another, trained by kto.py and used by distill.py.
`tiny/agent` is the start of agent.py: sft.py trained all weights of tiny/chat on chats with a
calculator, which is used badly in half of them.

Every random choice follows from SEED. Questions whose hash falls within HELD_OUT_SHARE appear in no
text that a model is trained on, so held-out accuracy measures arithmetic and not memorization.
"""
import hashlib
import itertools
import json
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    get_cosine_schedule_with_warmup,
)

HERE = Path(__file__).resolve().parent
SEED = 0
HELD_OUT_SHARE = 0.1  # share of the questions that are held out
CORRECT_SHARE = 0.57  # share of correct answers in the chats that the chat model imitates
TOP = 99  # operands lie in 0..TOP
WRONG_STEP_SHARE = 0.25  # share of wrong lines in a solution in steps
AGENT_ROWS = 6000  # chats with a calculator that tiny/agent was trained on
# Share of each kind of chat with a calculator. The first is the way to use it.
TOOL_USES = {"correct": 0.5, "no call": 0.1, "wrong operator": 0.1, "wrong digit": 0.1,
             "misread": 0.1, "broken, then correct": 0.05, "broken, then a guess": 0.05}

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)

# With tools, a chat begins with their names. A real template prints their whole schemas, for which
# the tiny model has no room; its tool calls are those of Qwen2.5.
AGENT_TEMPLATE = """\
{% if tools %}{{ '<|im_start|>system\\nTools:' }}
{%- for tool in tools %}{{ ' ' + tool.function.name }}{% endfor %}{{ '<|im_end|>\\n' }}{% endif %}
{%- for message in messages %}{{ '<|im_start|>' + message.role + '\\n' + message.content }}
{%- for call in message.tool_calls %}{{ '<tool_call>\\n{"name": "' + call.function.name }}
{{- '", "arguments": ' + (call.function.arguments | tojson) + '}\\n</tool_call>' }}{% endfor %}
{{- '<|im_end|>\\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""

NAMES = ["Ana", "Ben", "Eva", "Ida", "Jon", "Leo", "Mia", "Noa", "Sam", "Tom", "Uma", "Zoe"]
THINGS = ["pens", "cups", "keys", "nuts", "eggs", "figs", "hats", "jars", "maps", "toys"]
PLUS = ["What is {a} + {b}?", "Add {a} and {b}.",
        "{name} has {a} {things} and gets {b} more. How many {things} now?"]
MINUS = ["What is {a} - {b}?", "Take {b} from {a}.",
         "{name} has {a} {things} and loses {b}. How many {things} are left?"]
TIMES = ["What is {a} * {b}?", "Multiply {a} by {b}.",
         "{name} has {a} bags of {b} {things}. How many {things}?"]


# ---- questions -----------------------------------------------------------------------------------

def all_sums():
    """Every question as (a, operator, b): sums in both orders, differences that are at least 0."""
    questions = itertools.product(range(TOP + 1), range(TOP + 1), "+-")
    return [(a, op, b) for a, b, op in questions if op == "+" or a >= b]


def train_sums():
    return [s for s in all_sums() if not is_held_out(*s)]


def is_held_out(a, op, b):
    """Whether a question is held out; the same for a + b and b + a, and on every machine.

    Python's own hash() of a string changes from run to run.
    """
    key = f"{min(a, b)} {op} {max(a, b)}"
    return int(hashlib.sha256(key.encode()).hexdigest(), 16) % 1000 < 1000 * HELD_OUT_SHARE


def result(a, op, b):
    return {"+": a + b, "-": a - b, "*": a * b}[op]


def mistake(rng, a, op, b):
    """A human mistake: a result off by 1, 2 or 10, a lost carry, or the other operation."""
    correct = result(a, op, b)
    has_carry = op == "+" and a % 10 + b % 10 > 9
    lost_carry = a + b - 10 if has_carry else correct + 10
    other_operation = abs(a - b) if op == "+" else a + b
    wrong = [correct - 1, correct + 1, correct - 2, correct + 2, correct - 10, correct + 10]
    wrong += [lost_carry, other_operation]
    return rng.choice([w for w in wrong if w >= 0 and w != correct])


def question(rng, a, op, b):
    form = rng.choice({"+": PLUS, "-": MINUS, "*": TIMES}[op])
    return form.format(a=a, b=b, name=rng.choice(NAMES), things=rng.choice(THINGS))


def equation(a, op, b, value):
    return f"{a} {op} {b} = {value}"


def document(rng, a, op, b):
    """A pretraining text: an equation, a question with its answer, or a claim with a verdict."""
    correct = equation(a, op, b, result(a, op, b))
    kind = rng.random()
    if kind < 0.35:
        return correct
    if kind < 0.65:
        return f"{question(rng, a, op, b)} {correct}"
    if rng.random() < 0.5:
        return f"{correct}? Yes."
    return f"{equation(a, op, b, mistake(rng, a, op, b))}? No."


def demonstration(rng, a, op, b):
    """A chat by a careless writer: the answer is correct with probability CORRECT_SHARE."""
    value = result(a, op, b) if rng.random() < CORRECT_SHARE else mistake(rng, a, op, b)
    return [{"role": "user", "content": question(rng, a, op, b)},
            {"role": "assistant", "content": equation(a, op, b, value)}]


def with_feedback(rng, messages, a, op, b):
    """The chat; in half of the cases the user adds a verdict on the answer.

    From these verdicts the model learns to tell correct answers from wrong ones.
    """
    is_correct = messages[1]["content"] == equation(a, op, b, result(a, op, b))
    verdict = {"role": "user", "content": "Right." if is_correct else "Wrong."}
    if rng.random() < 0.5:
        return [*messages, verdict]
    return messages


# ---- data files ----------------------------------------------------------------------------------

def write_rows(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    print(f"{path.relative_to(HERE.parent)}: {len(rows)} rows")


def make_data():
    """Writes three files for training and three with held-out questions."""
    rng = random.Random(SEED)
    sums = all_sums()
    rng.shuffle(sums)
    parts = {"train": [s for s in sums if not is_held_out(*s)],
             "heldout": [s for s in sums if is_held_out(*s)]}
    for part, size in (("train", 3000), ("heldout", 300)):
        chosen = parts[part][:size]
        prompts = [[{"role": "user", "content": question(rng, *s)}] for s in chosen]
        asked = list(zip(prompts, chosen, strict=True))
        demonstrations = [{"messages": demonstration(rng, *s)} for s in chosen]
        preferences = []
        answered = []
        for prompt, s in asked:
            correct = {"role": "assistant", "content": equation(*s, result(*s))}
            wrong = {"role": "assistant", "content": equation(*s, mistake(rng, *s))}
            preferences.append({"prompt": prompt, "chosen": [correct], "rejected": [wrong]})
            answered.append({"prompt": prompt, "answer": str(result(*s))})
        write_rows(HERE / f"data/sft_{part}.jsonl", demonstrations)
        write_rows(HERE / f"data/preference_{part}.jsonl", preferences)
        write_rows(HERE / f"data/prompt_{part}.jsonl", answered)


# ---- solutions in steps --------------------------------------------------------------------------

def is_held_out_list(numbers):
    """Whether a sum is held out, in any order of its numbers; for two, as is_held_out says."""
    key = " + ".join(str(number) for number in sorted(numbers))
    return int(hashlib.sha256(key.encode()).hexdigest(), 16) % 1000 < 1000 * HELD_OUT_SHARE


def solution(rng, numbers, wrong_share):
    """Partial sums, one per line, as (a, b, value), and a label for each: is the line correct?

    A line has a wrong result with probability `wrong_share`, and the next line continues from it.
    After a wrong line no line is correct, even if its own sum is: it no longer leads to the answer.
    """
    lines = []
    labels = []
    total = numbers[0]
    for number in numbers[1:]:
        is_wrong = rng.random() < wrong_share
        before = total
        total = mistake(rng, before, "+", number) if is_wrong else before + number
        lines.append((before, number, total))
        labels.append(not is_wrong and all(labels))
    return lines, labels


def long_sum(rng, held_out):
    """Three or four numbers of a question that is held out, or of one that is not.

    Before the last of them is added, the correct sum is at most TOP - 10.
    """
    while True:
        count = rng.choice([3, 4])
        numbers = [rng.randint(1, (TOP - 10) // (count - 1)) for _ in range(count)]
        if is_held_out_list(numbers) == held_out:
            return numbers


def make_steps():
    """Writes solutions of longer sums: with wrong lines for prm.py, without them for sft.py."""
    rng = random.Random(SEED + 3)
    for part, size in (("train", 3000), ("heldout", 300)):
        labeled = []
        correct = []
        prompts = []
        while len(labeled) < size:
            numbers = long_sum(rng, part == "heldout")
            lines, labels = solution(rng, numbers, WRONG_STEP_SHARE)
            truth, _ = solution(rng, numbers, 0)
            if part == "train" and any(is_held_out(a, "+", b) for a, b, _ in lines + truth):
                continue  # no training text may contain sums that are held out elsewhere
            listed = [str(number) for number in numbers]
            texts = [f"What is {' + '.join(listed)}?",
                     f"Add {', '.join(listed[:-1])} and {listed[-1]}."]
            prompt = [{"role": "user", "content": rng.choice(texts)}]
            steps = [equation(a, "+", b, value) for a, b, value in lines]
            answer = "\n".join(equation(a, "+", b, value) for a, b, value in truth)
            labeled.append({"prompt": prompt, "completions": steps, "labels": labels})
            correct.append({"messages": prompt + [{"role": "assistant", "content": answer}]})
            prompts.append({"prompt": prompt, "answer": str(sum(numbers))})
        write_rows(HERE / f"data/steps_{part}.jsonl", labeled)
        write_rows(HERE / f"data/steps_sft_{part}.jsonl", correct)
    write_rows(HERE / "data/steps_prompt_heldout.jsonl", prompts)


# ---- questions for a calculator ------------------------------------------------------------------

# The tokenizer of tiny/agent has a token for each of these. Otherwise, a call would have 84 tokens,
# most of which tiny/chat has never seen. (Qwen2.5 has a token for <tool_call>, too.)
CALL_TOKENS = ["<tool_call>", '{"name": "', "calculator", '", "arguments": {"', "expression",
               '": "', '"}}', "</tool_call>"]

CALCULATOR = {"name": "calculator", "description": "Computes an arithmetic expression.",
              "parameters": {"type": "object", "properties": {"expression": {"type": "string"}},
                             "required": ["expression"]}}


def large_sums(rng, held_out):
    """An endless stream of sums and products of numbers with three digits, none of them twice."""
    seen = set()
    while True:
        s = rng.randint(100, 999), rng.choice("+*"), rng.randint(100, 999)
        if is_held_out(*s) == held_out and s not in seen:
            seen.add(s)
            yield s


def with_other_digit(rng, number):
    """The number with one digit replaced by another; the first digit never becomes 0."""
    digits = list(str(number))
    place = rng.randrange(len(digits))
    others = "123456789" if place == 0 else "0123456789"
    digits[place] = rng.choice(others.replace(digits[place], ""))
    return int("".join(digits))


def call_turns(a, op, b):
    """Two messages: a call of the calculator, and its result."""
    call = {"name": "calculator", "arguments": {"expression": f"{a} {op} {b}"}}
    return [{"role": "assistant", "content": "", "tool_calls": [{"function": call}]},
            {"role": "tool", "content": str(result(a, op, b))}]


def broken_turns(rng, a, op, b):
    """Two messages: a call that is not JSON, and the error that agent.py returns for it."""
    call = {"name": "calculator", "arguments": {"expression": f"{a} {op} {b}"}}
    ending = rng.choice(['}', '"}}'])
    text = "\n" + json.dumps(call).removesuffix(ending) + "\n"
    try:
        json.loads(text)
    except json.JSONDecodeError as error:
        message = f"error: JSONDecodeError: {error}"
    return [{"role": "assistant", "content": f"<tool_call>{text}</tool_call>"},
            {"role": "tool", "content": message}]


def tool_use(rng, a, op, b):
    """A chat by a careless user of the calculator, who makes the mistakes of TOOL_USES."""
    kind = rng.choices(list(TOOL_USES), TOOL_USES.values())[0]
    turns = [{"role": "user", "content": question(rng, a, op, b)}]
    value = result(a, op, b)
    if kind.startswith("broken"):
        turns += broken_turns(rng, a, op, b)
    if kind == "wrong operator":
        op = "-" if op == "+" else "+"
    if kind == "wrong digit":
        a = with_other_digit(rng, a)
    if kind in ("no call", "broken, then a guess"):
        value = with_other_digit(rng, value)
    else:
        turns += call_turns(a, op, b)
        value = result(a, op, b)
    if kind == "misread":
        value = with_other_digit(rng, abs(value))
    return [*turns, {"role": "assistant", "content": str(value)}]


def make_tools():
    """Writes questions whose answers the tiny model cannot compute without a calculator."""
    for part, size in (("train", 3000), ("heldout", 300)):
        rng = random.Random(SEED + (4 if part == "train" else 5))
        asked = itertools.islice(large_sums(rng, part == "heldout"), size)
        write_rows(HERE / f"data/tools_{part}.jsonl", [
            {"prompt": [{"role": "user", "content": question(rng, *s)}], "answer": str(result(*s))}
            for s in asked])


# ---- tokenizer and models ------------------------------------------------------------------------

def make_tokenizer():
    """Byte-level BPE with single digits, as in Qwen2.5, trained on the pretraining texts."""
    rng = random.Random(SEED)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Digits(individual_digits=True),
        pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=512, special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False)
    # With the role names in the corpus, chats take fewer tokens. The base model never reads them.
    corpus = [document(rng, *s) for s in all_sums()] + ["user\n", "assistant\n"] * 1000
    tokenizer.train_from_iterator(corpus, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|endoftext|>", pad_token="<|endoftext|>",
        model_max_length=512, additional_special_tokens=["<|im_start|>", "<|im_end|>"],
        chat_template=CHAT_TEMPLATE)


def make_model(vocab_size):
    torch.manual_seed(SEED)
    return Qwen2ForCausalLM(Qwen2Config(
        vocab_size=vocab_size, hidden_size=128, num_hidden_layers=5, num_attention_heads=4,
        num_key_value_heads=2, intermediate_size=336, max_position_embeddings=512,
        tie_word_embeddings=True, bos_token_id=0, eos_token_id=0, pad_token_id=0))


def packed(tokenizer, texts, length):
    """Yields rows of `length` ids from an endless stream of documents, each with an end token."""
    ids = []
    while True:
        while len(ids) < length:
            some = [next(texts) for _ in range(500)]
            for row in tokenizer(some, add_special_tokens=False)["input_ids"]:
                ids += row + [tokenizer.convert_tokens_to_ids("<|endoftext|>")]
        yield ids[:length]
        ids = ids[length:]


def fit(model, rows, steps, batch_size, learning_rate):
    """Pretraining in its shortest form: next-token prediction on every token."""
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=learning_rate, weight_decay=0.1, betas=(0.9, 0.95))
    schedule = get_cosine_schedule_with_warmup(optimizer, steps // 20, steps)
    model.train()
    start = time.time()
    for step in range(1, steps + 1):
        input_ids = torch.tensor([next(rows) for _ in range(batch_size)])
        loss = model(input_ids=input_ids, labels=input_ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 100 == 0 or step == steps:
            seconds = time.time() - start
            print(f"  step {step}/{steps}  loss {loss.item():.3f}  {seconds:.0f} s", flush=True)


def save(model, tokenizer, name):
    """Saves the weights in fp16, which halves the files. On a CPU they are loaded in fp32."""
    model.half().save_pretrained(HERE / name)
    tokenizer.save_pretrained(HERE / name)
    print(f"tiny/{name}: {sum(p.numel() for p in model.parameters()):,} parameters")
    model.float()


def documents(rng):
    """An endless stream of pretraining texts."""
    sums = train_sums()
    while True:
        yield document(rng, *rng.choice(sums))


def chats(rng, tokenizer):
    """An endless stream of chats, as text in the format of the template."""
    sums = train_sums()
    while True:
        a, op, b = rng.choice(sums)
        chat = with_feedback(rng, demonstration(rng, a, op, b), a, op, b)
        yield tokenizer.apply_chat_template(chat, tokenize=False)


def make_base():
    rng = random.Random(SEED + 1)
    tokenizer = make_tokenizer()
    model = make_model(len(tokenizer))
    rows = packed(tokenizer, documents(rng), 128)
    fit(model, rows, steps=2000, batch_size=64, learning_rate=3e-3)
    save(model, tokenizer, "base")


def make_chat():
    rng = random.Random(SEED + 2)
    tokenizer = AutoTokenizer.from_pretrained(HERE / "base")
    model = AutoModelForCausalLM.from_pretrained(HERE / "base", dtype=torch.float32)
    tokenizer.eos_token = "<|im_end|>"
    model.config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    rows = packed(tokenizer, chats(rng, tokenizer), 128)
    fit(model, rows, steps=600, batch_size=32, learning_rate=1e-3)
    save(model, tokenizer, "chat")


def keep_adapter(script, name):
    """Runs a script with its default flags, and keeps its adapter without the logs."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, script, "--output-dir", folder]
        subprocess.run(command, cwd=HERE.parent, check=True)
        (HERE / name).mkdir(exist_ok=True)
        for file in ("adapter_config.json", "adapter_model.safetensors", "tokenizer.json",
                     "tokenizer_config.json", "chat_template.jinja"):
            shutil.copy(Path(folder) / file, HERE / name)


def make_reward():
    keep_adapter("reward_model.py", "reward")


def make_teacher():
    keep_adapter("kto.py", "teacher")


def make_agent():
    """Trains tiny/chat on chats with the calculator, which are not kept.

    All weights are trained, because LoRA cannot teach the new tokens, whose embeddings are random.
    """
    torch.manual_seed(SEED)
    tokenizer = AutoTokenizer.from_pretrained(HERE / "chat")
    tokenizer.add_tokens([AddedToken(text, normalized=False) for text in CALL_TOKENS])
    tokenizer.chat_template = AGENT_TEMPLATE
    model = AutoModelForCausalLM.from_pretrained(HERE / "chat", dtype=torch.float32)
    model.resize_token_embeddings(len(tokenizer))
    rng = random.Random(SEED + 6)
    asked = large_sums(rng, held_out=False)
    rows = [{"messages": tool_use(rng, *s), "tools": [{"type": "function", "function": CALCULATOR}]}
            for s in itertools.islice(asked, AGENT_ROWS)]
    with tempfile.TemporaryDirectory() as folder:
        start, run = f"{folder}/start", f"{folder}/run"
        model.save_pretrained(start)
        tokenizer.save_pretrained(start)
        file = Path(folder, "rows.jsonl")
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        command = [sys.executable, "sft.py", "--model", start, "--lora-rank", "0", "--dataset",
                   str(file), "--batch-size", "8", "--micro-batch-size", "8", "--max-steps", "1000",
                   "--learning-rate", "1e-3", "--output-dir", run]
        subprocess.run(command, cwd=HERE.parent, check=True)
        model = AutoModelForCausalLM.from_pretrained(run, dtype=torch.float32)
        save(model, AutoTokenizer.from_pretrained(run), "agent")


if __name__ == "__main__":
    stages = {"data": make_data, "steps": make_steps, "tools": make_tools, "base": make_base,
              "chat": make_chat, "reward": make_reward, "teacher": make_teacher,
              "agent": make_agent}
    for name in sys.argv[1:] or stages:
        print(f"{name}:", flush=True)
        stages[name]()
