"""Tokens per second of `sample` in grpo.py against `model.generate`, on the same prompts.

    python benchmarks/sampling.py
    python benchmarks/sampling.py --model Qwen/Qwen2.5-0.5B --prompts prompts.jsonl

Both draw G completions of each prompt from the model's own distribution. The two alternate, round
by round, and the ratio is taken within a round, so that a machine that slows down does so for both.
"""
import argparse
import json
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch  # noqa: E402

import common  # noqa: E402
import grpo  # noqa: E402

flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
add = flags.add_argument
add("--model", default="tiny/chat")
add("--prompts", default="tiny/data/prompt_heldout.jsonl", help="a .jsonl file")
add("--prompt-count", type=common.count, default=8, help="prompts at a time")
add("--group-size", type=common.count, default=8, help="completions per prompt")
add("--max-new-tokens", type=common.count, default=64)
add("--temperature", type=common.positive, default=1.0)
add("--rounds", type=common.count, default=7)


def ours(model, tokenizer, prompts, args, seed):
    answers = grpo.sample(model, tokenizer, prompts, args.group_size, args, seed)
    return sum(len(answer) for answer in answers)


def theirs(model, tokenizer, prompts, args, seed):
    torch.manual_seed(seed)
    stop_ids = common.stop_token_ids(tokenizer, model.generation_config)
    batch = tokenizer.pad({"input_ids": prompts}, padding_side="left", return_tensors="pt")
    ids = model.generate(
        **batch.to(model.device), do_sample=True, temperature=args.temperature, top_k=0, top_p=1.0,
        repetition_penalty=1.0, max_new_tokens=args.max_new_tokens, eos_token_id=stop_ids,
        pad_token_id=tokenizer.pad_token_id, num_return_sequences=args.group_size)
    ids = ids[:, batch["input_ids"].shape[1]:]
    stopped = torch.isin(ids, torch.tensor(stop_ids, device=ids.device))
    ends = torch.where(stopped.any(1), stopped.int().argmax(1) + 1, ids.shape[1])
    return ends.sum().item()


def tokens_per_second(function, model, *args):
    began = time.perf_counter()
    tokens = function(model, *args)
    if model.device.type == "cuda":
        torch.cuda.synchronize()
    return tokens / (time.perf_counter() - began)


def main(args):
    tokenizer = common.load_tokenizer(args.model)
    model = common.load_model(args.model, trainable=False)
    lines = Path(common.find(args.prompts)).read_text().split("\n")[:args.prompt_count]
    prompts = [common.encode_prompt(tokenizer, json.loads(line)["prompt"]) for line in lines]
    ratios = []
    for seed in range(args.rounds + 1):
        sample = tokens_per_second(ours, model, tokenizer, prompts, args, seed)
        generate = tokens_per_second(theirs, model, tokenizer, prompts, args, seed)
        if seed > 0:  # the first round is a warm-up
            ratios.append(sample / generate)
            print(f"round {seed}: sample {sample:8.0f} tokens/s   generate {generate:8.0f} tokens/s"
                  f"   ratio {ratios[-1]:.2f}")
    print(f"ratio: median {statistics.median(ratios):.2f}, from {min(ratios):.2f} to "
          f"{max(ratios):.2f}")


if __name__ == "__main__":
    main(flags.parse_args())
