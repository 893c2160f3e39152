"""Compares the sampling speed of grpo.py's `sample`, of `model.generate` and of TRL's GRPO.

    python benchmarks/sampling.py                                    # tiny/chat
    python benchmarks/sampling.py --model FOLDER --stop-share 0.02 --trl --output results.json
    python benchmarks/sampling.py --model FOLDER --adapter --load-in-4bit on

All three draw G completions of each prompt from the model's own distribution. They take turns, and
speeds are compared within a round, so that a machine that slows down affects all of them alike.
Time is CPU time on a CPU (of one thread, with OMP_NUM_THREADS=1) and wall-clock time on a GPU. A
model with random weights hardly ever samples the eos token. With --stop-share, that share of the
vocabulary ends a completion, so that its mean length is about 1 / share unless --max-new-tokens is
reached first. TRL 1.16.0 is called through a private method of its trainer.
"""
import argparse
import datetime
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch  # noqa: E402

import common  # noqa: E402
import grpo  # noqa: E402


def make_flags():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=common.HelpFormatter)
    add = parser.add_argument
    add("--model", default="tiny/chat", help="Hub name, folder or LoRA adapter")
    add("--prompts", default="tiny/data/prompt_heldout.jsonl", help=".jsonl file with prompts")
    add("--prompt-count", type=common.count, default=8, help="prompts per call")
    add("--group-size", type=common.count, default=8, help="completions per prompt, G")
    add("--max-new-tokens", type=common.count, default=64, help="longest completion, in tokens")
    add("--stop-share", type=common.share, default=0.0,
        help="share of the vocabulary that ends a completion")
    add("--temperature", type=common.positive, default=1.0, help="sampling temperature")
    add("--adapter", action="store_true", help="add LoRA matrices, as a policy has them")
    add("--load-in-4bit", choices=["on", "off"], default="off", help="quantize to 4 bits (NF4)")
    add("--trl", action="store_true", help="also measure TRL")
    add("--rounds", type=common.count, default=5, help="measured rounds")
    add("--output", help=".json file to which the figures are appended")
    return parser


def sample_ours(model, tokenizer, prompts, args, seed):
    """Samples with grpo.py; like sample_generate and sample_trl, returns the number of tokens."""
    answers = grpo.sample(model, tokenizer, prompts, args.group_size, args, seed)
    return sum(len(answer) for answer in answers)


def sample_generate(model, tokenizer, prompts, args, seed):
    torch.manual_seed(seed)
    stop_ids = common.stop_token_ids(tokenizer, model.generation_config)
    batch = tokenizer.pad({"input_ids": prompts}, padding_side="left", return_tensors="pt")
    model.eval()
    ids = model.generate(
        **batch.to(model.device), do_sample=True, temperature=args.temperature, top_k=0, top_p=1.0,
        repetition_penalty=1.0, max_new_tokens=args.max_new_tokens, eos_token_id=stop_ids,
        pad_token_id=tokenizer.pad_token_id, num_return_sequences=args.group_size)
    ids = ids[:, batch["input_ids"].shape[1]:]
    stopped = torch.isin(ids, torch.tensor(stop_ids, device=ids.device))
    ends = torch.where(stopped.any(1), stopped.int().argmax(1) + 1, ids.shape[1])
    return ends.sum().item()


def make_trainer(model, tokenizer, args):
    """TRL's trainer around the same model, with the same stop tokens."""
    import datasets
    import trl
    on_gpu = torch.cuda.is_available()
    config = trl.GRPOConfig(
        output_dir=tempfile.mkdtemp(), report_to="none", use_cpu=not on_gpu, bf16=False,
        num_generations=args.group_size, max_completion_length=args.max_new_tokens, top_k=0,
        per_device_train_batch_size=args.prompt_count * args.group_size,
        temperature=args.temperature)
    rows = datasets.Dataset.from_dict({"prompt": ["a"] * args.prompt_count})
    trainer = trl.GRPOTrainer(model, lambda completions, **_: [0.0] * len(completions), config,
                              train_dataset=rows, processing_class=tokenizer)
    trainer.eos_token_ids = common.stop_token_ids(tokenizer, model.generation_config)
    trainer.generation_config.eos_token_id = trainer.eos_token_ids
    return trainer


def sample_trl(trainer, tokenizer, prompts, args, seed):
    torch.manual_seed(seed)
    repeated = [prompt for prompt in prompts for _ in range(args.group_size)]
    answers, _ = trainer._generate_single_turn(repeated, None, {}, args.group_size)
    return sum(len(answer) for answer in answers)


def tokens_per_second(function, *args):
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    clock = time.perf_counter if torch.cuda.is_available() else time.process_time
    began = clock()
    tokens = function(*args)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return tokens / (clock() - began)


def main(args):
    tokenizer = common.load_tokenizer(args.model)
    model = common.load_model(args.model, args.load_in_4bit, trainable=args.adapter)
    if args.stop_share:
        vocabulary = model.config.vocab_size
        chosen = torch.randperm(vocabulary, generator=torch.Generator().manual_seed(0))
        model.generation_config.eos_token_id = chosen[:round(args.stop_share * vocabulary)].tolist()
    lines = Path(common.find(args.prompts)).read_text().split("\n")[:args.prompt_count]
    prompts = [common.encode_prompt(tokenizer, json.loads(line)["prompt"]) for line in lines]
    programs = {"sample": (sample_ours, model), "generate": (sample_generate, model)}
    if args.trl:
        programs["TRL"] = (sample_trl, make_trainer(model, tokenizer, args))
    rounds = []
    for seed in range(args.rounds + 1):
        speeds = {name: tokens_per_second(function, subject, tokenizer, prompts, args, seed)
                  for name, (function, subject) in programs.items()}
        if seed > 0:  # the first round is for warm-up
            rounds.append(speeds)
            print(f"round {seed}: " + ", ".join(f"{name} {x:.1f}" for name, x in speeds.items()))
    result = {name: statistics.median(speeds[name] for speeds in rounds) for name in programs}
    for name in list(programs)[1:]:
        ratios = [speeds["sample"] / speeds[name] for speeds in rounds]
        result[f"times_{name}"] = statistics.median(ratios)
        print(f"sample is {statistics.median(ratios):.2f} times as fast as {name} "
              f"({min(ratios):.2f} to {max(ratios):.2f})")
    if args.output:
        save(args.output, result)


def save(file, result):
    words = [Path(word).name if Path(word).is_absolute() else word for word in sys.argv[1:]]
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    line = {"date": datetime.date.today().isoformat(), "machine": device,
            "torch": torch.__version__, "tokens_per_second": result,
            "command": " ".join(["python", "benchmarks/sampling.py", *words])}
    before = json.loads(Path(file).read_text()) if Path(file).exists() else []
    Path(file).write_text(json.dumps([*before, line], indent=1) + "\n")


if __name__ == "__main__":
    main(make_flags().parse_args())
