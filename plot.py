"""Plots the logged metrics of one or more runs: a picture and an HTML report.

    python plot.py runs/dpo                       # writes runs/dpo/curves.png and report.html
    python plot.py runs/* --output compare.png    # writes compare.png and compare.html

The picture has one panel per metric and one line per run. If a run has many steps, a pale line is
the logged values and a strong line is their moving average. The report is a single file. It adds
the settings (those that differ between the runs come first), the held-out figures before and after
training, and sampled answers with their scores. docs/metrics.md says what each metric means and
what a healthy curve looks like.

To see the effect of a setting, run a script twice and plot both runs. For example, the loss of a
reward model does not change if a constant is added to all rewards; only --centering keeps them
near 0:

    python reward_model.py --output-dir runs/centered
    python reward_model.py --centering 0 --output-dir runs/drifting
    python plot.py runs/centered runs/drifting --output centering.png    # see the panel "reward"
"""
import argparse
import base64
import io
import json
from pathlib import Path

import jinja2
import matplotlib

import common

matplotlib.use("Agg")  # draws to files and needs no display
import matplotlib.pyplot as plt  # noqa: E402

TEMPLATE = Path(__file__).with_name("plot.html")
UNITS = {"kl": "nats per answer", "sampler_kl": "nats per token", "entropy": "nats per token",
         "chosen_logp": "nats per answer", "rejected_logp": "nats per answer",
         "z": "nats per answer", "length": "tokens", "trained_tokens": "tokens",
         "tokens_per_second": "tokens/s", "peak_memory_gib": "GiB", "seconds": "s",
         "rollout_seconds": "s"}
MANY = 60  # a curve with at least this many steps is smoothed
NOT_NOISY = {"learning_rate", "loss_scale"}  # never smoothed
plt.rcParams["text.parse_math"] = False  # a $ in a run's name starts no formula
plt.style.use("petroff10")  # colors that color-blind readers can tell apart


def make_flags():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=common.HelpFormatter)
    add = parser.add_argument
    add("runs", nargs="+", help="folders of runs")
    add("--output", help="new picture, with the report beside it; by default both are written\n"
                         "to the folder of the first run")
    return parser


# ---- reading a run -------------------------------------------------------------------------------

def read_metrics(run):
    """The logged steps of a run, a list of dicts from metric to number or None."""
    with common.phase(f"reading the metrics of {run}"):
        lines = (Path(run) / "metrics.jsonl").read_text().splitlines()
        # Integers are read as floats, which cannot grow without limit: 400 digits become infinity.
        steps = [json.loads(line, parse_int=float) for line in lines]
        if not steps or not all({"step"} < set(step) for step in steps):
            raise ValueError("no steps were logged there")
        for step in steps:
            if not all(isinstance(value, float | None) for value in step.values()):
                raise ValueError(f"a metric is not a number in {step}")
    return steps


def metrics_of(logged):
    """The metrics that any of the runs logged, in the order of their first appearance."""
    names = {}
    for steps in logged.values():
        for step in steps:
            names |= dict.fromkeys(step)
    return [name for name in names if name != "step"]


def read_about(run):
    """Settings, held-out figures and samples of a run. A run in progress has no summary yet."""
    about = {"method": "–"}
    with common.phase(f"reading the settings of {run}"):
        for file in Path(run, "args.json"), Path(run, "summary.json"):
            if file.exists():
                about |= json.loads(file.read_text())
        for name in "data", "files":
            about[name] = about.get(name, "–")[:8]  # the beginning of a hash
        before = about.pop("before", {})
        after = about.pop("after", {})
        held_out = {name: f"{before[name]:.3f} → {after[name]:.3f}" for name in after}
    samples = about.pop("samples", [])
    return about, held_out, samples


# ---- drawing -------------------------------------------------------------------------------------

def smooth(values):
    """A moving average, centered on each step, over a window of a twentieth of all steps."""
    half = len(values) // 40
    means = []
    for i in range(len(values)):
        near = values[max(0, i - half):i + half + 1]
        means.append(sum(near) / len(near))
    return means


def draw_panel(axis, name, logged):
    """One metric, with a line per run through the steps in which it was logged."""
    units = set()
    for run, steps in logged.items():
        units.add("rollout" if "rollout_seconds" in steps[0] else "optimizer step")
        points = [step for step in steps if step.get(name) is not None]
        x = [step["step"] for step in points]
        y = [step[name] for step in points]
        label = common.visible(run)
        if len(points) < MANY or name in NOT_NOISY:
            axis.plot(x, y, label=label, marker="." if len(points) < 30 else "", linewidth=1.4)
        else:
            (pale,) = axis.plot(x, y, linewidth=0.8, alpha=0.3)
            axis.plot(x, smooth(y), label=label, color=pale.get_color(), linewidth=1.6)
    axis.set_title(name.replace("_", " "), fontsize=11, fontweight="bold", loc="left")
    axis.set_xlabel(" or ".join(sorted(units)))
    axis.set_ylabel(UNITS.get(name.removeprefix("eval_"), ""))
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)


def draw_panels(names, logged):
    """A figure with one panel per metric, at most three in a row."""
    columns = min(3, len(names))
    rows = (len(names) + columns - 1) // columns
    figure, axes = plt.subplots(
        rows, columns, figsize=(4.6 * columns, 2.9 * rows), squeeze=False, layout="constrained")
    for axis, name in zip(axes.flat, names, strict=False):
        draw_panel(axis, name, logged)
    for axis in axes.flat[len(names):]:
        axis.set_visible(False)
    return figure


def draw_picture(runs, output):
    """The picture as bytes: a panel for every metric that any of the runs logged, and a legend."""
    logged = {run: read_metrics(run) for run in runs}
    figure = draw_panels(metrics_of(logged), logged)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=min(4, len(runs)))
    file = io.BytesIO()
    with common.phase(f"drawing {output}"):
        figure.savefig(file, format=output.suffix[1:], dpi=120)
    plt.close(figure)
    return file.getvalue()


def as_svg(figure):
    """The figure as SVG in base64, for a data: URL."""
    file = io.BytesIO()
    figure.savefig(file, format="svg", transparent=True)
    plt.close(figure)
    return base64.b64encode(file.getvalue()).decode()


# ---- the report ----------------------------------------------------------------------------------

def as_rows(columns):
    """Turns dicts, one per run, into rows: pairs of a name and its values in all runs."""
    names = {}
    for column in columns:
        names |= dict.fromkeys(column)
    return [(name, [column.get(name, "–") for column in columns]) for name in names]


def make_report(runs, file):
    """The page as bytes. Everything in it that comes from data is escaped."""
    logged = {run: read_metrics(run) for run in runs}
    settings = []
    held_out = []
    samples = []
    for run in logged:
        about, figures, texts = read_about(run)
        settings.append(about)
        held_out.append(figures)
        samples.append((run, texts))
    differing = []
    same = []
    for name, values in as_rows(settings):
        is_same = len({str(value) for value in values}) == 1
        (same if is_same else differing).append((name, values))
    with common.phase(f"drawing {file}"):
        panels = [(name, as_svg(draw_panels([name], logged))) for name in metrics_of(logged)]
        jinja = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
        text = jinja.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
            runs=logged, colors=plt.rcParams["axes.prop_cycle"].by_key()["color"],
            differing=differing, same=same, panels=panels, held_out=as_rows(held_out),
            samples=samples)
    return text.encode("utf-8", errors="xmlcharrefreplace")


def main(args):
    # 1. Choose the names of both files; neither may exist.
    if args.output:
        picture = Path(args.output)
        if not picture.suffix:
            picture = Path(f"{picture}.png")
        report = picture.with_suffix(".html")
    else:
        picture = Path(args.runs[0], "curves.png")
        report = Path(args.runs[0], "report.html")
    for output in picture, report:
        with common.phase(f"--output {output}"):
            exists = output.exists()
        if exists:
            common.fail(f"{output} exists already: name a new picture with --output")

    # 2. Make both before writing either, so that after an error the same command works again.
    contents = {picture: draw_picture(args.runs, picture), report: make_report(args.runs, report)}

    # 3. Write them.
    for output, content in contents.items():
        with common.phase(f"writing {output}"):
            output.write_bytes(content)
        print(common.visible(str(output)))


if __name__ == "__main__":
    with common.running("the number of runs", resumes=""):
        main(common.parse(make_flags()))
