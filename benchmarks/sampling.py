"""Tokens per second of `sample` in grpo.py against `model.generate`, side by side on the same model and prompts.

    python benchmarks/sampling.py
    python benchmarks/sampling.py --model ../shared/models/stories260K --prompts ../shared/data/prompt_tinystories.jsonl --max-new-tokens 200

Both draw G completions of each prompt from the model's own distribution. The two alternate, round by round, and the ratio is taken
within a round, so that a machine that slows down does so for both.
"""
import argparse
import json
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import common  # noqa: E402
import grpo  # noqa: E402
import torch  # noqa: E402
from transformers import GenerationConfig  # noqa: E402


def ours(model, tokenizer, prompts, args, stop_ids, seed):
    return sum(map(len, grpo.sample(model, prompts, args.group_size, args.max_new_tokens, 1.0, stop_ids, tokenizer.pad_token_id, seed)))


def theirs(model, tokenizer, prompts, args, stop_ids, seed):
    torch.manual_seed(seed)
    width = max(map(len, prompts))
    input_ids = torch.tensor([[tokenizer.pad_token_id] * (width - len(p)) + p for p in prompts], device=model.device)
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=model.device)
    config = GenerationConfig(do_sample=True, temperature=1.0, top_k=0, top_p=1.0, repetition_penalty=1.0, max_new_tokens=args.max_new_tokens,
                              num_return_sequences=args.group_size, eos_token_id=stop_ids, pad_token_id=tokenizer.pad_token_id)
    new = model.generate(input_ids=input_ids, attention_mask=mask, generation_config=config)[:, width:]
    stopped = torch.isin(new, torch.tensor(stop_ids, device=new.device))
    ends = torch.where(stopped.any(1), stopped.int().argmax(1) + 1, new.shape[1])
    return ends.sum().item()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny/chat")
    parser.add_argument("--prompts", default="tiny/data/prompt_heldout.jsonl")
    parser.add_argument("--count", type=int, default=8, help="prompts at a time")
    parser.add_argument("--group-size", type=int, default=8)
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    tokenizer, model = common.load_tokenizer(args.model), common.load_model(args.model, trainable=False)
    stop_ids = common.stop_token_ids(tokenizer, model.generation_config)
    rows = [json.loads(line) for line in Path(common.find(args.prompts)).read_text().split("\n")[:args.count]]
    prompts = [common.encode_prompt(tokenizer, row["prompt"]) for row in rows]
    ratios = []
    for seed in range(-1, args.rounds):  # the first is a warm-up
        speeds = []
        for function in (ours, theirs):
            start = time.perf_counter()
            tokens = function(model, tokenizer, prompts, args, stop_ids, seed + 1)
            if model.device.type == "cuda":
                torch.cuda.synchronize()
            speeds.append(tokens / (time.perf_counter() - start))
        if seed >= 0:
            ratios.append(speeds[0] / speeds[1])
            print(f"round {seed + 1}: sample {speeds[0]:8.0f} tokens/s   generate {speeds[1]:8.0f} tokens/s   ratio {ratios[-1]:.2f}")
    print(f"ratio of {args.rounds} rounds: median {statistics.median(ratios):.2f}, from {min(ratios):.2f} to {max(ratios):.2f}")


if __name__ == "__main__":
    main()
