"""Draws what training runs wrote into their metrics.jsonl: one panel a metric, several runs over each other.

    python plot.py runs/dpo                        # writes runs/dpo/curves.png
    python plot.py runs/dpo runs/dpo-2 --output compare.png
"""
import argparse
import json
import math
from pathlib import Path

import common
import matplotlib

matplotlib.use("Agg")  # no screen needed
import matplotlib.pyplot as plt  # noqa: E402

UNITS = {
    "kl": "nats", "ref_kl": "nats", "entropy": "nats a token", "chosen_logp": "nats", "rejected_logp": "nats", "loss": "nats", "eval_loss": "nats",
    "tokens_per_second": "tokens / s", "trained_tokens_per_second": "tokens / s", "peak_memory_gib": "GiB", "length": "tokens",
}


def read_metrics(run):
    """The logged steps of a run as a list of dicts; ends the program if there are none or a line is broken."""
    path = Path(run) / "metrics.jsonl"
    if not path.exists():
        common.fail(f"{run} holds no metrics.jsonl: is it the folder of a run?")
    steps = []
    for number, line in enumerate(path.read_text().split("\n")[:-1], 1):  # a last line without its end is still being written
        try:
            steps.append(json.loads(line))
        except json.JSONDecodeError as error:
            common.fail(f"{path}, line {number}: {error.msg}")
        if not isinstance(steps[-1], dict) or "step" not in steps[-1]:
            common.fail(f"{path}, line {number}: not an object with a step, as runs write it")
    if not steps:
        common.fail(f"{path} is empty: the run has not finished a step")
    return steps


def draw(runs, output):
    """Writes one picture with a panel for every number that any of the runs logged, over the optimizer step."""
    logged = {run: read_metrics(run) for run in runs}
    names = list(dict.fromkeys(name for steps in logged.values() for step in steps for name in step if name != "step"))
    columns = min(3, len(names))
    rows = math.ceil(len(names) / columns)
    figure, axes = plt.subplots(rows, columns, figsize=(4.6 * columns, 2.9 * rows), squeeze=False, layout="constrained")
    for axis, name in zip(axes.flat, names):
        for run, steps in logged.items():
            points = [(step["step"], step[name]) for step in steps if step.get(name) is not None]
            axis.plot(*zip(*points), label=run, marker="." if len(points) < 30 else "", linewidth=1.2) if points else axis.plot([], [], label=run)
        axis.set_title(name.replace("_", " "), fontsize=10)
        axis.set_xlabel("optimizer step")
        axis.set_ylabel(UNITS.get(name, name.replace("_", " ")))
        axis.grid(alpha=0.3)
    for axis in axes.flat[len(names):]:
        axis.set_visible(False)
    figure.legend(*axes.flat[0].get_legend_handles_labels(), loc="outside upper center", ncols=min(4, len(runs)))
    figure.savefig(output, dpi=120)
    print(output)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", help="folders of runs")
    parser.add_argument("--output", help="the picture (default: curves.png in the first folder)")
    parser.error = lambda message: common.fail(f"{message} (--help says more)")
    args = parser.parse_args()
    if args.output and (Path(args.output).exists() or not Path(args.output).parent.is_dir() or Path(args.output).suffix not in (".png", ".pdf", ".svg")):
        common.fail(f"--output {args.output} must be a new .png, .pdf or .svg file in a folder that is there")
    draw(args.runs, args.output or Path(args.runs[0]) / "curves.png")


if __name__ == "__main__":
    main()
