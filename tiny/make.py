"""Rebuild the embedded default: the tiny tokenizer, the tiny models and their data.

    python tiny/make.py            # everything, written beside this file
    python tiny/make.py chat       # one stage of: data, steps, base, chat, reward

A Qwen2-architecture model of one million parameters reads text about addition and subtraction until
it can do sums, which gives `tiny/base`: it continues text, and has never seen a chat. `tiny/chat`
is that model after it imitated chats in which 43 answers in 100 are wrong, and users sometimes say
so. It learned the chat format and the mistakes with it: sampled, it is right about half the time,
although it can do better. That gap is what the post-training methods close. `tiny/reward` is an
adapter on it that reward_model.py trained, for ppo.py.

Everything follows from SEED. Questions that hash into HELD_OUT_SHARE appear in no training text of
any stage.
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
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
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
HELD_OUT_SHARE = 0.1   # of all questions
CORRECT_SHARE = 0.57   # of the demonstrations that the chat model imitates
TOP = 99               # operands lie in 0..TOP
WRONG_STEP_SHARE = 0.25  # of the lines of a solution in steps

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)

NAMES = ["Ana", "Ben", "Eva", "Ida", "Jon", "Leo", "Mia", "Noa", "Sam", "Tom", "Uma", "Zoe"]
THINGS = ["pens", "cups", "keys", "nuts", "eggs", "figs", "hats", "jars", "maps", "toys"]
PLUS = ["What is {a} + {b}?", "Add {a} and {b}.",
        "{name} has {a} {things} and gets {b} more. How many {things} now?"]
MINUS = ["What is {a} - {b}?", "Take {b} from {a}.",
         "{name} has {a} {things} and loses {b}. How many {things} are left?"]


# ---- questions -----------------------------------------------------------------------------------

def all_sums():
    """Every question as (a, operator, b): sums in either order, differences not below 0."""
    questions = itertools.product(range(TOP + 1), range(TOP + 1), "+-")
    return [(a, op, b) for a, b, op in questions if op == "+" or a >= b]


def train_sums():
    return [s for s in all_sums() if not is_held_out(*s)]


def is_held_out(a, op, b):
    """The same for a + b and b + a, on every machine: Python's own hash changes between runs."""
    key = f"{min(a, b)} {op} {max(a, b)}"
    return int(hashlib.sha256(key.encode()).hexdigest(), 16) % 1000 < 1000 * HELD_OUT_SHARE


def result(a, op, b):
    return a + b if op == "+" else a - b


def mistake(rng, a, op, b):
    """A wrong result as people make it: off by a little or ten, a lost carry, the other sign."""
    right = result(a, op, b)
    no_carry = (a + b) - 10 if op == "+" and a % 10 + b % 10 > 9 else right + 10
    other_way = abs(a - b) if op == "+" else a + b
    wrong = [right - 1, right + 1, right - 2, right + 2, right - 10, right + 10]
    wrong += [no_carry, other_way]
    return rng.choice([w for w in wrong if w >= 0 and w != right])


def question(rng, a, op, b):
    form = rng.choice(PLUS if op == "+" else MINUS)
    return form.format(a=a, b=b, name=rng.choice(NAMES), things=rng.choice(THINGS))


def equation(a, op, b, value):
    return f"{a} {op} {b} = {value}"


def document(rng, a, op, b):
    """A piece of what the base model reads: an equation, a question answered, a claim judged."""
    right = equation(a, op, b, result(a, op, b))
    kind = rng.random()
    if kind < 0.35:
        return right
    if kind < 0.65:
        return f"{question(rng, a, op, b)} {right}"
    if rng.random() < 0.5:
        return f"{right}? Yes."
    return f"{equation(a, op, b, mistake(rng, a, op, b))}? No."


def demonstration(rng, a, op, b):
    """A chat as a careless writer would leave it: right with probability CORRECT_SHARE."""
    value = result(a, op, b) if rng.random() < CORRECT_SHARE else mistake(rng, a, op, b)
    return [{"role": "user", "content": question(rng, a, op, b)},
            {"role": "assistant", "content": equation(a, op, b, value)}]


def with_feedback(rng, messages, a, op, b):
    """Half of the time the user judges the answer: so the model learns to tell right from wrong."""
    right = messages[1]["content"] == equation(a, op, b, result(a, op, b))
    verdict = "Right." if right else "Wrong."
    return messages + [{"role": "user", "content": verdict}] * (rng.random() < 0.5)


# ---- data files ----------------------------------------------------------------------------------

def write_rows(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    print(f"{path.relative_to(HERE.parent)}: {len(rows)} rows")


def make_data():
    """Three files in the usual columns for training, three for the held-out part."""
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
        write_rows(HERE / f"data/sft_{part}.jsonl", demonstrations)
        write_rows(HERE / f"data/preference_{part}.jsonl", [
            {"prompt": prompt,
             "chosen": [{"role": "assistant", "content": equation(*s, result(*s))}],
             "rejected": [{"role": "assistant", "content": equation(*s, mistake(rng, *s))}]}
            for prompt, s in asked])
        write_rows(HERE / f"data/prompt_{part}.jsonl", [
            {"prompt": prompt, "answer": str(result(*s))} for prompt, s in asked])


# ---- solutions in steps --------------------------------------------------------------------------

def is_held_out_list(numbers):
    """The same for every order of the numbers; of two numbers, it says what is_held_out says."""
    key = " + ".join(str(number) for number in sorted(numbers))
    return int(hashlib.sha256(key.encode()).hexdigest(), 16) % 1000 < 1000 * HELD_OUT_SHARE


def solution(rng, numbers, wrong_share):
    """Partial sums, one a line, as (a, b, value), and for each line whether it is right.

    Each line has a wrong result with probability `wrong_share`. The next one goes on from there, so
    after a wrong line none is right, even if its own sum is: it is no step to the answer any more.
    """
    lines, labels, value = [], [], numbers[0]
    for number in numbers[1:]:
        wrong = rng.random() < wrong_share
        before = value
        value = mistake(rng, before, "+", number) if wrong else before + number
        lines.append((before, number, value))
        labels.append(not wrong and all(labels))
    return lines, labels


def long_sum(rng, held_out):
    """Three or four numbers of a question that is held out or not; partial sums stay below TOP."""
    while True:
        count = rng.choice([3, 4])
        numbers = [rng.randint(1, (TOP - 10) // (count - 1)) for _ in range(count)]
        if is_held_out_list(numbers) == held_out:
            return numbers


def make_steps():
    """Solutions of sums of three or four numbers: with wrong lines for prm.py, right for sft.py."""
    rng = random.Random(SEED + 3)
    for part, size in (("train", 3000), ("heldout", 300)):
        labelled, right, prompts = [], [], []
        while len(labelled) < size:
            numbers = long_sum(rng, part == "heldout")
            lines, labels = solution(rng, numbers, WRONG_STEP_SHARE)
            truth, _ = solution(rng, numbers, 0)
            if part == "train" and any(is_held_out(a, "+", b) for a, b, _ in lines + truth):
                continue  # no text of training may hold the sums that are held out elsewhere
            listed = [str(number) for number in numbers]
            texts = [f"What is {' + '.join(listed)}?",
                     f"Add {', '.join(listed[:-1])} and {listed[-1]}."]
            prompt = [{"role": "user", "content": rng.choice(texts)}]
            steps = [equation(a, "+", b, value) for a, b, value in lines]
            answer = "\n".join(equation(a, "+", b, value) for a, b, value in truth)
            labelled.append({"prompt": prompt, "completions": steps, "labels": labels})
            right.append({"messages": prompt + [{"role": "assistant", "content": answer}]})
            prompts.append({"prompt": prompt, "answer": str(sum(numbers))})
        write_rows(HERE / f"data/steps_{part}.jsonl", labelled)
        write_rows(HERE / f"data/steps_sft_{part}.jsonl", right)
    write_rows(HERE / "data/steps_prompt_heldout.jsonl", prompts)


# ---- tokenizer and models ------------------------------------------------------------------------

def make_tokenizer():
    """Byte-level BPE with single digits, as in Qwen2.5, trained on what the base model reads."""
    rng = random.Random(SEED)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Digits(individual_digits=True),
        pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=512, special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False)
    # the role names are in the corpus so that a chat is short; the base model never reads them
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


def packed(tokenizer, documents, length):
    """An endless stream of documents, each closed by <|endoftext|>, in rows of `length` ids."""
    ids = []
    while True:
        while len(ids) < length:
            texts = [next(documents) for _ in range(500)]
            for row in tokenizer(texts, add_special_tokens=False)["input_ids"]:
                ids += row + [tokenizer.convert_tokens_to_ids("<|endoftext|>")]
        yield ids[:length]
        ids = ids[length:]


def fit(model, rows, steps, batch_size, learning_rate):
    """Next-token prediction on every token: pretraining, in its shortest form."""
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
    """In fp16, half the bytes: a CPU run loads it in fp32 again."""
    model.half().save_pretrained(HERE / name)
    tokenizer.save_pretrained(HERE / name)
    print(f"tiny/{name}: {sum(p.numel() for p in model.parameters()):,} parameters")
    model.float()


def make_base():
    rng = random.Random(SEED + 1)
    tokenizer = make_tokenizer()
    model = make_model(len(tokenizer))
    sums = train_sums()
    documents = (document(rng, *rng.choice(sums)) for _ in iter(int, 1))
    rows = packed(tokenizer, documents, 128)
    fit(model, rows, steps=2000, batch_size=64, learning_rate=3e-3)
    save(model, tokenizer, "base")


def make_chat():
    rng = random.Random(SEED + 2)
    tokenizer = AutoTokenizer.from_pretrained(HERE / "base")
    model = AutoModelForCausalLM.from_pretrained(HERE / "base", dtype=torch.float32)
    tokenizer.eos_token = "<|im_end|>"
    model.config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    sums = train_sums()

    def chats():
        while True:
            a, op, b = rng.choice(sums)
            chat = with_feedback(rng, demonstration(rng, a, op, b), a, op, b)
            yield tokenizer.apply_chat_template(chat, tokenize=False)

    fit(model, packed(tokenizer, chats(), 128), steps=600, batch_size=32, learning_rate=1e-3)
    save(model, tokenizer, "chat")


def make_reward():
    """What `python reward_model.py` learns from the preferences, without the traces of the run."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "reward_model.py", "--output-dir", folder]
        subprocess.run(command, cwd=HERE.parent, check=True)
        (HERE / "reward").mkdir(exist_ok=True)
        for name in ("adapter_config.json", "adapter_model.safetensors", "tokenizer.json",
                     "tokenizer_config.json", "chat_template.jinja"):
            shutil.copy(Path(folder) / name, HERE / "reward")


if __name__ == "__main__":
    stages = {"data": make_data, "steps": make_steps, "base": make_base, "chat": make_chat,
              "reward": make_reward}
    for name in sys.argv[1:] or stages:
        print(f"{name}:", flush=True)
        stages[name]()
