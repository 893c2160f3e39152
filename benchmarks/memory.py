"""Whether a run fits on a 16 GB T4: its peak by part, and the largest batches that fit.

    python benchmarks/memory.py                       # Qwen2.5 in four sizes, every script
    python benchmarks/memory.py --scripts dpo --gib 22

An estimate from shapes, with each script's own defaults, for sequences that are all as long as
--max-length allows: 4-bit weights, fp16 activations, gradient checkpointing.
tests/system/test_memory.py holds the same sums against measured peaks of small models on a CPU; no
T4 was at hand. A T4 has 14.7 GiB, of which the CUDA context and fragmentation leave about 13.8.

    weights      linear layers in NF4, half a byte and a scale per weight; embeddings in fp16
    training     LoRA matrices in fp32 with gradient and Adam's two moments; PPO has two adapters
    checkpoints  the input of every layer, kept for the backward pass
    cache        keys and values of all answers that are sampled at a time
    widest       all of one layer, computed again, or a chunk of logits, or those sampled from

Training and sampling do not happen at once, nor do layers and logits: the larger counts.
"""
import argparse
import importlib
import sys
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

# hidden, layers, heads, key/value heads, intermediate, vocabulary, tied: the published configs
SHAPES = {"0.5B": (896, 24, 14, 2, 4864, 151936, True),
          "1.5B": (1536, 28, 12, 2, 8960, 151936, True),
          "3B": (2048, 36, 16, 2, 11008, 151936, True),
          "7B": (3584, 28, 28, 4, 18944, 152064, False)}
# rows of a forward pass for each of --micro-batch-size: a pair has two
ROWS = {"sft": 1, "reward_model": 2, "prm": 1, "dpo": 2, "kto": 1, "online_dpo": 2, "ppo": 1,
        "grpo": 1}

flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
flags.add_argument("--scripts", nargs="+", choices=ROWS, default=list(ROWS))
flags.add_argument("--sizes", nargs="+", choices=SHAPES, default=list(SHAPES))
flags.add_argument("--gib", type=float, default=13.8, help="what the GPU has to give")


def shape(hidden, layers, heads, kv_heads, intermediate, vocabulary, tied):
    keys = hidden // heads * kv_heads
    linear = [(hidden, hidden), (hidden, keys), (hidden, keys), (hidden, hidden),
              (hidden, intermediate), (hidden, intermediate), (intermediate, hidden)]
    return SimpleNamespace(hidden=hidden, layers=layers, keys=keys, intermediate=intermediate,
                           vocabulary=vocabulary, tied=tied, linear=linear, heads=heads)


def weights(model, element, four_bit):
    """Bytes. NF4 has half a byte per weight and, per 64, a scale of one byte (double quantised)."""
    inside = sum(i * o for i, o in model.linear) * model.layers
    tables = model.vocabulary * model.hidden * (1 if model.tied else 2)
    return inside * (0.5 + 1 / 64 if four_bit else element) + tables * element


def training(model, rank, adapters):
    """Bytes of what is trained: a weight, its gradient and two moments, 4 bytes each."""
    lora = sum(rank * (i + o) for i, o in model.linear) * model.layers
    return 16 * lora * adapters


def checkpoints(model, rows, length, element):
    """Bytes of what gradient checkpointing keeps: the input of every layer."""
    return model.layers * rows * length * model.hidden * element


def layer(model, rows, length, element, four_bit, repeated=True):
    """Bytes of one layer between its second forward pass and the end of its backward pass."""
    # what backward reads: its two norms' inputs and outputs, queries, the attention's output, keys
    # and values (a T4 repeats them for all heads); of the MLP gate, its SiLU, up and their product
    keys = model.hidden if repeated else model.keys
    saved = 6 * model.hidden + 2 * keys + 4 * model.intermediate
    moving = 2 * model.intermediate  # gradients on their way
    # the widest weight, taken out of its 4 bits
    widest = model.hidden * model.intermediate * element if four_bit else 0
    return rows * length * (saved + moving) * element + widest


def logits(model, count):
    """Bytes of `count` positions in fp32: logits, log-probs, their gradient."""
    return 12 * count * model.vocabulary


def cache(model, rows, length, element):
    """Bytes of keys and values; those of a layer are there twice while they grow."""
    return 2 * model.keys * rows * length * element * (model.layers + 0.5)


def estimate(model, script, args, element=2, four_bit=True):
    """The parts of the peak in bytes, from a script's flags."""
    rows = ROWS[script] * args.micro_batch_size
    chunk = max(1, 2**24 // model.vocabulary)
    parts = {"weights": weights(model, element, four_bit),
             "training": training(model, args.lora_rank, 2 if script == "ppo" else 1)}
    scored = 0 if script in ("reward_model", "prm") else min(chunk, rows * args.max_length)
    learn = {"checkpoints": checkpoints(model, rows, args.max_length, element),
             "widest": max(layer(model, rows, args.max_length, element, four_bit),
                           logits(model, scored))}
    draw = {}
    if script in ("online_dpo", "ppo", "grpo"):
        sampled = sampled_rows(script, args)
        # online_dpo.py has those of policy and reference, where it samples a mixture of both
        caches = 2 if 0 < getattr(args, "mixture", 0) < 1 else 1
        draw["cache"] = caches * cache(model, sampled, args.max_length, element)
        draw["widest"] = logits(model, sampled)
    larger = max(learn, draw, key=lambda phase: sum(phase.values()))
    return parts | larger


def sampled_rows(script, args):
    """Answers that are sampled at a time."""
    if script == "online_dpo":
        return max(args.batch_size, args.eval_size)
    copies = args.group_size if script == "grpo" else 1
    return min(args.sample_batch_size, max(args.batch_size * copies, args.eval_size))


def largest(model, script, args, name, limit):
    """The largest power of two for the flag `name` that fits, or 0."""
    size = 0
    for candidate in (2**power for power in range(13)):
        tried = SimpleNamespace(**vars(args) | {name: candidate})
        if name == "sample_batch_size":  # as many as are asked for are sampled
            tried.batch_size = tried.eval_size = candidate
        if sum(estimate(model, script, tried).values()) > limit:
            break
        size = candidate
    return size


def main(args):
    limit = args.gib * 2**30
    parts = ("weights", "training", "checkpoints", "cache", "widest")
    print(f"{'':<18}{'fits':>5}{'peak GiB':>10}" + "".join(f"{part:>13}" for part in parts)
          + f"{'micro-batch':>13}{'samples':>9}")
    for size in args.sizes:
        model = shape(*SHAPES[size])
        for script in args.scripts:
            defaults = importlib.import_module(script).flags.parse_args([])
            needed = estimate(model, script, defaults)
            line = f"{size:<5}{script:<13}{'yes' if sum(needed.values()) <= limit else 'NO':>5}"
            line += f"{sum(needed.values()) / 2**30:10.1f}"
            line += "".join(f"{needed.get(part, 0) / 2**30:13.2f}" for part in parts)
            line += f"{largest(model, script, defaults, 'micro_batch_size', limit):13}"
            if script in ("ppo", "grpo"):
                line += f"{largest(model, script, defaults, 'sample_batch_size', limit):9}"
            print(line)


if __name__ == "__main__":
    main(flags.parse_args())
