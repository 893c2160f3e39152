"""Estimates whether a run fits on a 16 GB T4: its peak memory by part, and the largest batches.

    python benchmarks/memory.py                       # Qwen2.5 in four sizes, every script
    python benchmarks/memory.py --scripts dpo --gib 22

The estimate follows from shapes, with each script's own defaults, for sequences that are all as
long as --max-length allows, with 4-bit weights, fp16 activations and gradient checkpointing. It was
not measured on a T4; tests/system/test_memory.py compares the same sums with the peaks of small
models on a CPU. A T4 has 14.7 GiB, of which the CUDA context and fragmentation leave about 13.8.

    weights      linear layers in NF4 (half a byte and a scale per weight), embeddings in fp16
    training     LoRA matrices in fp32, with gradients and Adam's two moments; PPO has two adapters
    checkpoints  the input of every layer, kept for the backward pass (gradient checkpointing)
    cache        KV cache of all answers that are sampled at once
    widest       all activations of one layer while it is recomputed, or one chunk of logits

Training and sampling do not happen at the same time, so only the larger of the two counts. The same
holds for layers and logits.
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
# rows of a forward pass per example of --micro-batch-size: a pair has two
ROWS = {"sft": 1, "reward_model": 2, "prm": 1, "dpo": 2, "kto": 1, "online_dpo": 2, "ppo": 1,
        "grpo": 1}


def make_flags():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    add = parser.add_argument
    add("--scripts", nargs="+", choices=ROWS, default=list(ROWS), help="scripts to estimate")
    add("--sizes", nargs="+", choices=SHAPES, default=list(SHAPES), help="sizes of Qwen2.5")
    add("--gib", type=float, default=13.8, help="GPU memory that a run can use, in GiB")
    return parser


def shape(hidden, layers, heads, kv_heads, intermediate, vocabulary, tied):
    """The shapes of a model; `linear` lists [in, out] of the linear layers of one layer."""
    keys = hidden // heads * kv_heads
    linear = [(hidden, hidden), (hidden, keys), (hidden, keys), (hidden, hidden),
              (hidden, intermediate), (hidden, intermediate), (intermediate, hidden)]
    return SimpleNamespace(hidden=hidden, layers=layers, keys=keys, intermediate=intermediate,
                           vocabulary=vocabulary, tied=tied, linear=linear, heads=heads)


def weights(model, element, four_bit):
    """Bytes of the weights; NF4 takes half a byte per weight, and one byte of scale per 64."""
    inside = sum(i * o for i, o in model.linear) * model.layers
    tables = model.vocabulary * model.hidden * (1 if model.tied else 2)
    return inside * (0.5 + 1 / 64 if four_bit else element) + tables * element


def training(model, rank, adapters):
    """Bytes of the trained weights, their gradients and Adam's two moments, in fp32."""
    lora = sum(rank * (i + o) for i, o in model.linear) * model.layers
    return 16 * lora * adapters


def checkpoints(model, rows, length, element):
    """Bytes of the inputs of all layers, which gradient checkpointing keeps."""
    return model.layers * rows * length * model.hidden * element


def layer(model, rows, length, element, four_bit, repeated=True):
    """Bytes of one layer between its second forward pass and the end of its backward pass."""
    # The backward pass needs the inputs and outputs of two norms, the queries, the output of the
    # attention, and the keys and values, which a T4 repeats for all heads. From the MLP it needs
    # the gate, the SiLU of the gate, the up projection, and the product of the last two.
    keys = model.hidden if repeated else model.keys
    saved = 6 * model.hidden + 2 * keys + 4 * model.intermediate
    moving = 2 * model.intermediate  # gradients of activations
    # the widest weight, dequantized from its 4 bits
    widest = model.hidden * model.intermediate * element if four_bit else 0
    return rows * length * (saved + moving) * element + widest


def logits(model, count):
    """Bytes of the logits, log-probs and their gradient at `count` positions, in fp32."""
    return 12 * count * model.vocabulary


def cache(model, rows, length, element):
    """Bytes of the KV cache; the keys and values of one layer exist twice while they grow."""
    return 2 * model.keys * rows * length * element * (model.layers + 0.5)


def estimate(model, script, args, element=2, four_bit=True):
    """The parts of the peak, in bytes, that follow from a script's flags."""
    rows = ROWS[script] * args.micro_batch_size
    chunk = max(1, 2**24 // model.vocabulary)
    parts = {"weights": weights(model, element, four_bit),
             "training": training(model, args.lora_rank, 2 if script == "ppo" else 1)}
    has_logits = script not in ("reward_model", "prm")
    positions = min(chunk, rows * args.max_length) if has_logits else 0
    learn = {"checkpoints": checkpoints(model, rows, args.max_length, element),
             "widest": max(layer(model, rows, args.max_length, element, four_bit),
                           logits(model, positions))}
    draw = {}
    if script in ("online_dpo", "ppo", "grpo"):
        sampled = sampled_rows(script, args)
        # online_dpo.py needs two caches to sample from a mixture of policy and reference.
        caches = 2 if 0 < getattr(args, "mixture", 0) < 1 else 1
        draw["cache"] = caches * cache(model, sampled, args.max_length, element)
        draw["widest"] = logits(model, sampled)
    larger = max(learn, draw, key=lambda phase: sum(phase.values()))
    return parts | larger


def sampled_rows(script, args):
    """The number of answers that are sampled at a time."""
    if script == "online_dpo":
        return max(args.batch_size, args.eval_size)
    copies = args.group_size if script == "grpo" else 1
    return min(args.sample_batch_size, max(args.batch_size * copies, args.eval_size))


def largest(model, script, args, name, limit):
    """The largest power of two for the flag `name` that fits, or 0."""
    size = 0
    for candidate in (2**power for power in range(13)):
        tried = SimpleNamespace(**vars(args) | {name: candidate})
        if name == "sample_batch_size":  # a smaller batch would not reach it
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
            defaults = importlib.import_module(script).make_flags().parse_args([])
            needed = estimate(model, script, defaults)
            line = f"{size:<5}{script:<13}{'yes' if sum(needed.values()) <= limit else 'NO':>5}"
            line += f"{sum(needed.values()) / 2**30:10.1f}"
            line += "".join(f"{needed.get(part, 0) / 2**30:13.2f}" for part in parts)
            line += f"{largest(model, script, defaults, 'micro_batch_size', limit):13}"
            if script in ("ppo", "grpo"):
                line += f"{largest(model, script, defaults, 'sample_batch_size', limit):9}"
            print(line)


if __name__ == "__main__":
    main(make_flags().parse_args())
