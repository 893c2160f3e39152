"""Compares the time and memory of an optimizer step with TRL's, and its time with a lower limit.

    pip install trl==1.16.0
    python benchmarks/step.py --model MODEL --output benchmarks/results/step.json
    python benchmarks/step.py --model MODEL --methods dpo --steps 2 --rounds 1

MODEL is a folder with a model of the Qwen2 or Llama architecture. Random weights will do, since the
length of every row is fixed, and a trained model will do if it hardly ever ends a sampled answer
within 64 tokens of such rows:

    sft            4 rows of 128 + 380 tokens
    dpo            2 pairs of 256 + 250 tokens, including the forward pass of the reference
    reward_model   the same pairs
    grpo           the whole step: 1 prompt of 100 tokens, 8 completions of 64, with the reference
    distill        the whole step: 4 prompts of 100 tokens, 1 answer of 64 each. MODEL is also the
                   teacher, and distill.py logs the KL to its start as well, which TRL does not

All methods use LoRA of rank 16, gradient checkpointing and one forward pass for all rows. Both
programs run their real training loop. They take turns, each in a process of its own, and the first
step of each is for warm-up. On a CPU the figures are the CPU seconds of one thread in fp32, and the
peak of resident memory beyond the loaded model. On a GPU they are the wall-clock time in bf16, and
the peak of the memory that torch allocated beyond the loaded model.

The limit is the time of the matrix products with the frozen weights, which no program can avoid. It
is measured with torch.mm on the same shapes. Every linear layer needs a forward pass, a second one
(gradient checkpointing) and the gradient of its input. The head needs a forward pass and that
gradient, at the trained positions only.
"""
import argparse
import collections
import datetime
import importlib
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# per step: examples, rows per example (pair, group), tokens of a prompt and of an answer
METHODS = {"sft": (4, 1, 128, 380), "dpo": (2, 2, 256, 250), "reward_model": (2, 2, 256, 250),
           "grpo": (1, 8, 100, 64), "distill": (4, 1, 100, 64)}
SAMPLED = ("grpo", "distill")  # the methods that sample their answers


def make_flags():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    add = parser.add_argument
    add("--model", required=True, help="folder of the model")
    add("--methods", nargs="+", choices=METHODS, default=list(METHODS), help="methods to measure")
    add("--rounds", type=int, default=2, help="processes per program")
    add("--steps", type=int, default=3, help="measured steps per process")
    add("--output", help=".json file to which the figures are appended")
    add("--child", nargs=3, metavar=("PROGRAM", "METHOD", "DATA"), help=argparse.SUPPRESS)
    return parser


# ---- rows of exact length ------------------------------------------------------------------------

def text_of(tokenizer, length, seed):
    """A text of exactly `length` tokens, even when it follows another text."""
    words = [f" {word}" for word in ("one two red blue green small large time water house tree "
                                     "hand light night music paper table river stone").split()]
    text = "".join(words[(seed * 7 + i * (seed % 5 + 1)) % len(words)] for i in range(length))
    assert len(tokenizer(text, add_special_tokens=False)["input_ids"]) == length
    return text


def write_rows(method, tokenizer, count, file):
    _, _, prompt_length, answer_length = METHODS[method]
    lines = []
    for i in range(count):
        row = {"prompt": text_of(tokenizer, prompt_length, i)}
        if method in SAMPLED:
            row["answer"] = "1"
        elif method == "sft":  # the last token is eos, which both programs append
            row["completion"] = text_of(tokenizer, answer_length - 1, i + 1)
        else:
            row["chosen"] = text_of(tokenizer, answer_length - 1, 2 * i + 1)
            row["rejected"] = text_of(tokenizer, answer_length - 1, 2 * i + 2)
        lines.append(json.dumps(row) + "\n")
    Path(file).write_text("".join(lines))


def draw_scores(prompts, completions, **columns):
    """A reward whose values differ within every group."""
    return [float(i % 3) for i in range(len(completions))]


# ---- one program in a process of its own ---------------------------------------------------------

class Meter:
    """Measures the time of each step, and the peak memory beyond that of the model."""

    def __init__(self):
        self.ticks = []

    def loaded(self):
        """Call this when the model has been loaded."""
        self.weight = self.memory("VmRSS")

    def tick(self):
        """Call this when a step has ended."""
        self.ticks.append(self.clock())
        if len(self.ticks) == 1:  # the first step does not count toward the peak
            if self.on_gpu():
                torch.cuda.reset_peak_memory_stats()
            else:
                Path("/proc/self/clear_refs").write_text("5")

    def figures(self):
        steps = [b - a for a, b in zip(self.ticks, self.ticks[1:], strict=False)]
        return {"seconds": steps, "memory": self.memory("VmHWM") - self.weight}

    def on_gpu(self):
        return torch.cuda.is_available()

    def clock(self):
        if not self.on_gpu():
            return time.process_time()
        torch.cuda.synchronize()
        return time.perf_counter()

    def memory(self, line):
        """Memory now (VmRSS) or at its peak (VmHWM), in GiB."""
        if self.on_gpu():
            peak = line == "VmHWM"
            read = torch.cuda.max_memory_allocated if peak else torch.cuda.memory_allocated
            return read() / 2**30
        status = Path("/proc/self/status").read_text()
        return int(status.split(line + ":")[1].split()[0]) / 2**20  # KiB


def run_ours(method, data, args):
    """Runs the script's own `train`; a step ends where it is logged."""
    sys.path.insert(0, str(ROOT))
    common = importlib.import_module("common")
    script = importlib.import_module(method)
    meter, load_model, log_step = Meter(), common.load_model, script.log_step

    def load(*arguments, **options):
        model = load_model(*arguments, **options)
        meter.loaded()
        return model

    def log(*arguments):
        log_step(*arguments)
        meter.tick()

    common.load_model, script.log_step = load, log
    examples, rows, _, _ = METHODS[method]
    sys.argv = [method, "--model", args.model, "--dataset", data, "--eval-dataset", data + "l",
                "--eval-size", "1", "--batch-size", str(examples),
                "--max-steps", str(args.steps + 1), "--lora-rank", "16",
                "--load-in-4bit", "off", "--gradient-checkpointing", "on",
                "--output-dir", tempfile.mkdtemp(), "--micro-batch-size"]
    sys.argv += [str(rows if method == "grpo" else examples)]  # completions, else examples
    if method in SAMPLED:
        sys.argv += ["--max-new-tokens", "64"]
    if method == "grpo":
        sys.argv += ["--group-size", "8", "--reward", f"{Path(__file__).resolve()}:draw_scores"]
    if method == "distill":
        sys.argv += ["--teacher", args.model]
    script.train(common.parse(script.make_flags(), script.TINY, getattr(script, "BY_LOSS", None)))
    return meter.figures()


def run_trl(method, data, args):
    """Runs TRL's trainer; a callback reports the end of each step."""
    import datasets
    import peft
    import transformers
    import trl

    class Clock(transformers.TrainerCallback):
        def on_train_begin(self, *_, **__):
            meter.loaded()

        def on_step_end(self, *_, **__):
            meter.tick()

    meter, on_gpu = Meter(), torch.cuda.is_available()
    examples, rows, _, _ = METHODS[method]
    options = dict(
        output_dir=tempfile.mkdtemp(), max_steps=args.steps + 1,
        per_device_train_batch_size=rows if method == "grpo" else examples,
        gradient_checkpointing=True, gradient_checkpointing_kwargs={"use_reentrant": False},
        bf16=on_gpu, use_cpu=not on_gpu, report_to="none", save_strategy="no", disable_tqdm=True,
        model_init_kwargs={"dtype": "bfloat16" if on_gpu else "float32"})
    lora = peft.LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    common = dict(model=args.model, peft_config=lora, callbacks=[Clock()],
                  train_dataset=datasets.load_dataset("json", data_files=data, split="train"))
    if method == "sft":
        trainer = trl.SFTTrainer(args=trl.SFTConfig(max_length=None, **options), **common)
    elif method == "dpo":
        trainer = trl.DPOTrainer(args=trl.DPOConfig(max_length=None, **options), **common)
    elif method == "reward_model":
        lora.task_type, lora.modules_to_save = "SEQ_CLS", ["score"]
        trainer = trl.RewardTrainer(args=trl.RewardConfig(max_length=None, **options), **common)
    elif method == "distill":
        trainer = trl.DistillationTrainer(  # with beta 1, the divergence is the reverse KL
            teacher_model=args.model, **common, args=trl.DistillationConfig(
                max_completion_length=64, beta=1.0,
                teacher_model_init_kwargs=options["model_init_kwargs"], **options))
    else:
        trainer = trl.GRPOTrainer(
            reward_funcs=draw_scores, **common,
            args=trl.GRPOConfig(num_generations=8, max_completion_length=64, beta=0.04, **options))
    trainer.train()
    return meter.figures()


def run_limit(method, data, args):
    """The matrix products alone: the time of each shape times its number of uses in a step."""
    from transformers import AutoConfig
    config = AutoConfig.from_pretrained(args.model)
    width, inner, vocabulary = config.hidden_size, config.intermediate_size, config.vocab_size
    keys = width // config.num_attention_heads * config.num_key_value_heads
    linear = [(width, width), (width, keys), (width, keys), (width, width),
              (width, inner), (width, inner), (inner, width)]
    examples, rows, prompt, answer = METHODS[method]
    rows = examples * rows
    counts = collections.Counter()

    def forward(tokens, times):
        for i, o in linear:
            counts[tokens, i, o] += times * config.num_hidden_layers

    def head(tokens, times):
        counts[tokens, width, vocabulary] += times

    tokens, trained = rows * (prompt + answer), rows * answer
    forward(tokens, 2)
    for i, o in linear:
        counts[tokens, o, i] += config.num_hidden_layers  # the gradient of the input
    if method != "reward_model":
        head(trained, 1)
        counts[trained, vocabulary, width] += 1
    if method in ("dpo", "grpo", "distill"):  # the reference, or the teacher
        forward(tokens, 1)
        head(trained, 1)
    if method in SAMPLED:  # each prompt is read once, then one token of all rows at a time
        forward(examples * prompt, 1)
        head(examples, 1)
        forward(rows, answer - 1)
        head(rows, answer - 1)
    meter, seconds = Meter(), []
    dtype = torch.bfloat16 if meter.on_gpu() else torch.float32
    for _ in range(args.steps + 1):
        spent = 0
        for (m, k, n), times in counts.items():
            a = torch.randn(m, k).to("cuda" if meter.on_gpu() else "cpu", dtype)
            b = torch.randn(n, k).to(a).T  # a linear layer stores its weight as [out, in]
            repeats = 5 if m <= rows else 1
            began = meter.clock()
            for _ in range(repeats):
                torch.mm(a, b)
            spent += times * (meter.clock() - began) / repeats
        seconds.append(spent)
    return {"seconds": seconds[1:], "memory": 0.0}


# ---- all of them in turns ------------------------------------------------------------------------

def measure(program, method, folder, args):
    data = f"{folder}/{method}.json"
    command = [sys.executable, __file__, "--model", args.model, "--steps", str(args.steps),
               "--child", program, method, data]
    # One thread. Freed memory goes back to the system at once, or holes in the heap would count.
    env = os.environ | {"OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "1000000",
                        "HF_HUB_OFFLINE": "1"}
    child = subprocess.run(command, env=env, stdout=subprocess.PIPE, text=True)
    if child.returncode:
        sys.exit(f"error: {program} failed at {method}")
    return json.loads(child.stdout.splitlines()[-1])


def main(args):
    from transformers import AutoConfig, AutoTokenizer
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    layers = AutoConfig.from_pretrained(args.model).num_hidden_layers
    lines = []
    with tempfile.TemporaryDirectory() as folder:
        for method in args.methods:
            write_rows(method, tokenizer, 4 * (args.steps + 1), f"{folder}/{method}.json")
            write_rows(method, tokenizer, 1, f"{folder}/{method}.jsonl")
        for method in args.methods:
            runs = {"ours": [], "trl": [], "limit": []}
            for _ in range(args.rounds):
                for program, several in runs.items():
                    several.append(measure(program, method, folder, args))
            line = {"method": method, "layers": layers}
            for program, several in runs.items():
                every = [second for run in several for second in run["seconds"]]
                line[f"{program}_seconds"] = statistics.median(every)
                line[f"{program}_memory_gib"] = max(run["memory"] for run in several)
            line["speed"] = line["trl_seconds"] / line["ours_seconds"]
            line["memory"] = line["ours_memory_gib"] / line["trl_memory_gib"]
            line["times_the_limit"] = line["ours_seconds"] / line["limit_seconds"]
            lines.append(line)
            print(f"{method:<13} {layers:>2} layers: {line['ours_seconds']:7.2f} s, TRL "
                  f"{line['trl_seconds']:7.2f} s ({line['speed']:.2f}x as fast), limit "
                  f"{line['limit_seconds']:6.2f} s ({line['times_the_limit']:.2f} of it); memory "
                  f"{line['ours_memory_gib']:.2f} and {line['trl_memory_gib']:.2f} GiB "
                  f"({line['memory']:.2f})", flush=True)
    if args.output:
        save(args.output, lines)


def save(file, lines):
    import transformers
    import trl
    words = [Path(word).name if Path(word).is_absolute() else word for word in sys.argv[1:]]
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else cpu_name()
    about = {"date": datetime.date.today().isoformat(), "machine": device,
             "python": platform.python_version(), "torch": torch.__version__,
             "transformers": transformers.__version__, "trl": trl.__version__,
             "command": " ".join(["python", "benchmarks/step.py", *words])}
    before = json.loads(Path(file).read_text()) if Path(file).exists() else []
    Path(file).write_text(json.dumps(before + [about | {"lines": lines}], indent=1) + "\n")


def cpu_name():
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0]}, one thread" if names else platform.machine()


if __name__ == "__main__":
    args = make_flags().parse_args()
    import torch
    if args.child:
        program, method, data = args.child
        run = {"ours": run_ours, "trl": run_trl, "limit": run_limit}[program]
        print(json.dumps(run(method, data, args)))
    else:
        main(args)
