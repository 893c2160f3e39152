"""Small runs of all scripts, for several test files.

    torchrun --nproc-per-node 2 runs_helper.py FOLDER    # runs dpo.py in two processes
"""
import contextlib
import importlib
import json
import os
import shutil
import sys
from pathlib import Path
from unittest import mock

import filelock
import torch
import transformers
from conftest import ROOT, run_args
from safetensors.torch import load_file, save_file
from tqdm import tqdm

import common

KIND = {"sft": "sft", "reward_model": "preference", "dpo": "preference", "ppo": "prompt",
        "grpo": "prompt", "kto": "preference", "online_dpo": "prompt", "prm": "steps",
        "distill": "prompt", "agent": "tools"}
REWARDED = ("online_dpo", "ppo", "grpo")  # the scripts that have --reward
SCRIPTS = {name: importlib.import_module(name) for name in KIND}
SMALL = {  # batches of 5, 5 and 1: the last has fewer rows than two processes need
    "sft": dict(batch_size=5, micro_batch_size=2, max_new_tokens=4),
    "reward_model": dict(batch_size=5, micro_batch_size=2),
    "prm": dict(batch_size=5, micro_batch_size=2),
    "dpo": dict(batch_size=5, micro_batch_size=2),
    "kto": dict(batch_size=5, micro_batch_size=2),  # always 5, of 22: a pair is two answers
    "online_dpo": dict(batch_size=5, micro_batch_size=2, max_new_tokens=8, loss="xpo"),
    "ppo": dict(batch_size=5, micro_batch_size=3, epochs=2, max_new_tokens=8, beta=0.5),
    "grpo": dict(batch_size=3, micro_batch_size=4, group_size=2, updates=2, max_new_tokens=8),
    "distill": dict(batch_size=5, micro_batch_size=2, max_new_tokens=8, teacher="tiny/teacher"),
    "agent": dict(batch_size=3, micro_batch_size=4, group_size=2, updates=2, max_new_tokens=8,
                  chat_template=ROOT / "tiny/agent/chat_template.jinja")}


def write_data(folder):
    """The first layer of the tiny model and of its reward model, and some rows of each kind."""
    chat = transformers.AutoModelForCausalLM.from_pretrained(
        ROOT / "tiny/chat", num_hidden_layers=1, layer_types=["full_attention"])
    chat.save_pretrained(folder / "chat")
    transformers.AutoTokenizer.from_pretrained(ROOT / "tiny/chat").save_pretrained(folder / "chat")
    shutil.copytree(ROOT / "tiny/reward", folder / "reward")
    config = json.loads((folder / "reward/adapter_config.json").read_text())
    config["base_model_name_or_path"] = str(folder / "chat")
    (folder / "reward/adapter_config.json").write_text(json.dumps(config))
    weights = load_file(folder / "reward/adapter_model.safetensors")
    weights = {name: x for name, x in weights.items() if "layers.0." in name or "score" in name}
    save_file(weights, folder / "reward/adapter_model.safetensors")
    for kind in set(KIND.values()):
        for part, size in ("train", 11), ("heldout", 3):
            lines = (ROOT / f"tiny/data/{kind}_{part}.jsonl").read_text().splitlines()
            (folder / f"{kind}_{part}.jsonl").write_text("\n".join(lines[:size]))


def small_args(name, data, output_dir, **flags):
    """The flags of a run of a few steps on what is in the folder `data`."""
    files = {"model": data / "chat", "dataset": data / f"{KIND[name]}_train.jsonl",
             "eval_dataset": data / f"{KIND[name]}_heldout.jsonl", "learning_rate": 1e-3}
    if name in REWARDED:
        files["reward"] = data / "reward"
    return run_args(SCRIPTS[name], **(SMALL[name] | files | flags), output_dir=output_dir)


def arguments(module, *words, **flags):
    """The flags of a program as a command line with these words and flags gives them."""
    words = [str(word) for word in words]
    for name, value in flags.items():
        words += ["--" + name.replace("_", "-"), str(value)]
    return module.make_flags().parse_args(words)


def scripted(answers, greedy=None):
    """Replaces `sample`: {part of a prompt: answers}. "..." marks a truncated answer.

    A single answer is taken from `greedy`. `calls` has (prompts, copies, temperature, seed).
    """
    def sample(model, tokenizer, prompts, copies, args, seed):
        sample.calls.append((len(prompts), copies, args.temperature, seed))
        ids = []
        for prompt in prompts:
            key = next(key for key in answers if key in tokenizer.decode(prompt))
            texts = [greedy[key]] if greedy and copies == 1 else answers[key] * copies
            for text in texts[:copies]:
                end = "" if text.endswith("...") else tokenizer.eos_token
                ids.append(tokenizer(text + end, add_special_tokens=False).input_ids)
        return ids
    sample.calls = []
    return sample


@contextlib.contextmanager
def as_one_command():
    """A folder is locked until the process ends; here, until the command would have ended."""
    acquire, locks = filelock.FileLock.acquire, []

    def remember(lock, *args, **kwargs):
        locks.append(lock)
        return acquire(lock, *args, **kwargs)

    with mock.patch.object(filelock.FileLock, "acquire", remember):
        try:
            yield
        finally:
            for lock in locks:  # those of `datasets`, too, which it has released already
                lock.release()
            for bar in list(getattr(tqdm, "_instances", ())):
                bar.close()


def command(name, args):
    """What the command line would do with these flags, but for the end of the process."""
    with as_one_command(), common.running("--micro-batch-size"):
        SCRIPTS[name].train(args)


def refuse(*args, **kwargs):
    raise AssertionError("a process other than the first writes")


def die(*args, **kwargs):
    Path("died").touch()
    raise RuntimeError("as planned")


def interrupted(log_step):
    """log_step, after which step 2 ends the run: what was saved is step 1."""
    def log_and_stop(args, state, metrics, *rest):
        log_step(args, state, metrics, *rest)
        if metrics["step"] == 2:
            raise InterruptedError
    return log_and_stop


def two_processes(folder):
    """A run that is interrupted and resumed. Then one process fails; the other must not wait."""
    if common.RANK == 1:
        Path.write_text = torch.save = common.save_model = refuse
    module = SCRIPTS["dpo"]
    args = small_args("dpo", folder, folder / "two", max_steps=3, save_every=1)
    stop = mock.patch.object(module, "log_step", interrupted(module.log_step))
    with stop, as_one_command(), contextlib.suppress(InterruptedError):
        module.train(args)
    assert torch.load(folder / "two/resume.pt", weights_only=True)["step"] == 1
    with as_one_command():
        module.train(args)
    os.chdir(folder)
    if common.RANK == 1:
        module.update = die
    module.train(small_args("dpo", folder, "failing", max_steps=2))


if __name__ == "__main__":
    with common.running("--micro-batch-size"):
        two_processes(Path(sys.argv[1]))
