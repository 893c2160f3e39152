"""Draws what runs logged in their metrics.jsonl: a panel per metric, several runs over each other.

    python plot.py runs/dpo                        # writes runs/dpo/curves.png
    python plot.py runs/dpo runs/other --output compare.png
"""
import argparse
import json
import math
from pathlib import Path

import matplotlib

import common

matplotlib.use("Agg")  # no screen needed
import matplotlib.pyplot as plt  # noqa: E402

flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
flags.add_argument("runs", nargs="+", help="folders of runs")
flags.add_argument("--output", help="a new picture; without it, curves.png in the first folder")
UNITS = {"kl": "nats per answer", "sampler_kl": "nats per token", "entropy": "nats per token",
         "chosen_logp": "nats per answer", "rejected_logp": "nats per answer",
         "z": "nats per answer", "length": "tokens", "trained_tokens": "tokens",
         "peak_memory_gib": "GiB", "seconds": "s", "rollout_seconds": "s"}


def read_metrics(run):
    """The logged steps of a run as a list of dicts."""
    with common.phase(f"reading the metrics of {run}"):
        lines = (Path(run) / "metrics.jsonl").read_text().splitlines()
        steps = [json.loads(line) for line in lines]
        if not steps or not all("step" in step for step in steps):
            raise ValueError("no steps were logged there")
    return steps


def x_unit(steps):
    return "rollout" if "rollout_seconds" in steps[0] else "optimizer step"


def draw(runs, output):
    """Writes a picture with a panel for every number that any of the runs logged."""
    logged = {run: read_metrics(run) for run in runs}
    names = [name for steps in logged.values() for step in steps for name in step]
    names = [name for name in dict.fromkeys(names) if name != "step"]
    columns = min(3, len(names))
    rows = math.ceil(len(names) / columns)
    figure, axes = plt.subplots(
        rows, columns, figsize=(4.6 * columns, 2.9 * rows), squeeze=False, layout="constrained")
    for axis, name in zip(axes.flat, names, strict=False):
        for run, steps in logged.items():
            points = [(step["step"], step[name]) for step in steps if step.get(name) is not None]
            marker = "." if len(points) < 30 else ""
            x, y = zip(*points, strict=True) if points else ((), ())
            axis.plot(x, y, label=run, marker=marker, linewidth=1.2)
        axis.set_title(name.replace("_", " "), fontsize=10)
        axis.set_xlabel(" or ".join(sorted({x_unit(steps) for steps in logged.values()})))
        axis.set_ylabel(UNITS.get(name.removeprefix("eval_"), name.replace("_", " ")))
        axis.grid(alpha=0.3)
    for axis in axes.flat[len(names):]:
        axis.set_visible(False)
    handles, labels = axes.flat[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=min(4, len(runs)))
    with common.phase(f"writing {output}"):
        figure.savefig(output, dpi=120)
    print(output)


def main(args):
    output = Path(args.output or Path(args.runs[0]) / "curves.png")
    if output.exists():
        common.fail(f"{output} is there already: name a new picture with --output")
    draw(args.runs, output)


if __name__ == "__main__":
    flags.error = common.fail
    main(flags.parse_args())
