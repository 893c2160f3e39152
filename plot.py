"""Draws what runs logged, several runs over each other: a picture, and a page that says more.

    python plot.py runs/dpo                       # writes runs/dpo/curves.png and report.html
    python plot.py runs/* --output compare.png    # writes compare.png and compare.html

The page, one file, also has the settings, those first that differ between the runs, the held-out
figures before and after, and answers of the policy on the way with their scores.
"""
import argparse
import base64
import io
import json
from pathlib import Path

import jinja2
import matplotlib

import common

matplotlib.use("Agg")  # no screen needed
import matplotlib.pyplot as plt  # noqa: E402

flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
flags.add_argument("runs", nargs="+", help="folders of runs")
flags.add_argument("--output", help="new picture, its page beside it (else in the first run)")
UNITS = {"kl": "nats per answer", "sampler_kl": "nats per token", "entropy": "nats per token",
         "chosen_logp": "nats per answer", "rejected_logp": "nats per answer",
         "z": "nats per answer", "length": "tokens", "trained_tokens": "tokens",
         "tokens_per_second": "tokens/s", "peak_memory_gib": "GiB", "seconds": "s",
         "rollout_seconds": "s"}
plt.rcParams["text.parse_math"] = False  # a $ in the name of a run is a $
plt.style.use("petroff10")  # colours that the colour-blind can tell apart
PAGE = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>{{ runs | join(", ") }}</title>
<meta name="viewport" content="width=device-width, initial-scale=1"><style>
body { font: 1rem/1.5 system-ui, sans-serif; max-width: 80rem; margin: auto; padding: 0 1rem }
:root { color-scheme: light dark } img { width: 100% } summary { padding: .5rem 0 }
header { position: sticky; top: 0; padding: .5rem 0; background: Canvas; border-bottom: 1px solid }
table { display: block; overflow-x: auto; border-collapse: collapse } td { min-width: 7rem }
th, td { padding: .2rem 1rem .2rem 0; border-bottom: 1px solid #8886; text-align: left }
.grid { display: grid; grid: auto / repeat(auto-fill, minmax(min(20rem, 100%), 1fr)); gap: 1rem }
dl { display: grid; grid: auto / max-content 1fr; column-gap: 1rem } dt { opacity: .7 }
@media (prefers-color-scheme: dark) { img, b {filter: invert() hue-rotate(.5turn) brightness(1.4)} }
td, dd { white-space: pre-wrap; overflow-wrap: anywhere } dd { margin: 0 }</style></head><body>
{% macro table(rows) %}<table><tr><th></th>{% for run in runs %}<th>{{ run }}</th>{% endfor %}</tr>
{% for name, row in rows %}<tr><th>{{ name }}</th>{% for x in row %}
<td>{{ "%.4g" | format(x) if x is float else x }}</td>{% endfor %}</tr>
{% endfor %}</table>{% endmacro %}
<header>{% for run in runs %}<b style="color: {{ colors[loop.index0 % 10] }}">■</b>&nbsp;{{ run }}
&emsp; {% endfor %}</header><h2>Settings</h2>{{ table(differing) if differing }}
<details{{ " open" if not differing }}><summary>The same in all</summary>{{ table(same) }}</details>
<h2>Curves</h2><div class="grid">{% for name, svg in panels %}
<img alt="{{ name }}" src="data:image/svg+xml;base64,{{ svg }}">{% endfor %}</div>
{% if held_out %}<h2>Held out, before → after</h2>{{ table(held_out) }}{% endif %}
<div class="grid">{% for run, said in samples if said %}<div><h2>Samples of {{ run }}</h2>
{% for step, group in said | groupby("step", default="") %}
<details{{ " open" if loop.first or loop.last }}><summary>
{{ "step %d" | format(step) if step else "held out" }}</summary>
{% for sample in group %}<dl>{% for name, x in sample.items() if name != "step" %}<dt>{{ name }}
</dt><dd>{{ "%.4g" | format(x) if x is float else x }}</dd>{% endfor %}</dl>
{% endfor %}</details>{% endfor %}</div>{% endfor %}</div></body></html>"""


def read_metrics(run):
    """The logged steps of a run as a list of dicts."""
    with common.phase(f"reading the metrics of {run}"):
        lines = (Path(run) / "metrics.jsonl").read_text().splitlines()
        # as floats: one with 400 digits is infinite, where Python's integers have no end
        steps = [json.loads(line, parse_int=float) for line in lines]
        if not steps or not all({"step"} < set(step) for step in steps):
            raise ValueError("no steps were logged there")
        for step in steps:
            if not all(isinstance(value, float | None) for value in step.values()):
                raise ValueError(f"a metric is no number in {step}")
    return steps


def names_of(logged):
    names = [name for steps in logged.values() for step in steps for name in step]
    return [name for name in dict.fromkeys(names) if name != "step"]


def panels(names, logged):
    """A figure with a panel for each of the names, and in it a line per run."""
    kinds = {"rollout" if "rollout_seconds" in x[0] else "optimizer step" for x in logged.values()}
    columns = min(3, len(names))
    rows = (len(names) + columns - 1) // columns
    figure, axes = plt.subplots(
        rows, columns, figsize=(4.6 * columns, 2.9 * rows), squeeze=False, layout="constrained")
    for axis, name in zip(axes.flat, names, strict=False):
        for run, steps in logged.items():
            points = [(step["step"], step[name]) for step in steps if step.get(name) is not None]
            marker = "." if len(points) < 30 else ""
            x, y = zip(*points, strict=True) if points else ((), ())
            axis.plot(x, y, label=common.visible(run), marker=marker, linewidth=1.2)
        axis.set_title(name.replace("_", " "), fontsize=10)
        axis.set_xlabel(" or ".join(sorted(kinds)))
        axis.set_ylabel(UNITS.get(name.removeprefix("eval_"), name.replace("_", " ")))
        axis.grid(alpha=0.3)
    for axis in axes.flat[len(names):]:
        axis.set_visible(False)
    return figure


def draw(runs, output):
    """A picture with a panel for every number that any of the runs logged, as bytes."""
    logged = {run: read_metrics(run) for run in runs}
    figure = panels(names_of(logged), logged)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=min(4, len(runs)))
    with common.phase(f"drawing {output}"):
        figure.savefig(file := io.BytesIO(), format=output.suffix[1:], dpi=120)
    return file.getvalue()


def as_svg(figure):
    figure.savefig(file := io.BytesIO(), format="svg", transparent=True)
    plt.close(figure)
    return base64.b64encode(file.getvalue()).decode()


def read_about(run):
    """Settings, held-out figures and samples of a run; one in progress has no summary yet."""
    with common.phase(f"reading the settings of {run}"):
        about = {"method": "–"}
        for file in Path(run, "args.json"), Path(run, "summary.json"):
            about |= json.loads(file.read_text()) if file.exists() else {}
        for name in "data", "files":
            about[name] = about.get(name, "–")[:8]  # a hash
        before, after = about.pop("before", {}), about.pop("after", {})
        held_out = {name: f"{before[name]:.3f} → {after[name]:.3f}" for name in after}
    return about, held_out, about.pop("samples", [])


def as_rows(columns):
    """For each key of any of these dicts: the key, and its value in each of them."""
    names = {name: None for column in columns for name in column}
    return [(name, [column.get(name, "–") for column in columns]) for name in names]


def make_page(runs, file):
    """The page, in which all that comes from data is escaped, as bytes."""
    logged = {run: read_metrics(run) for run in runs}
    settings, held_out, samples = zip(*map(read_about, logged), strict=True)
    differing = [row for row in as_rows(settings) if len(set(map(str, row[1]))) > 1]
    with common.phase(f"drawing {file}"):
        text = jinja2.Environment(autoescape=True).from_string(PAGE).render(
            runs=logged, colors=plt.rcParams["axes.prop_cycle"].by_key()["color"],
            differing=differing, same=[row for row in as_rows(settings) if row not in differing],
            panels=[(name, as_svg(panels([name], logged))) for name in names_of(logged)],
            held_out=as_rows(held_out), samples=zip(logged, samples, strict=True))
    return text.encode("utf-8", errors="xmlcharrefreplace")


def main(args):
    picture = Path(args.output or Path(args.runs[0]) / "curves.png")
    page = picture.with_name("report.html")
    if args.output:
        picture = picture if picture.suffix else Path(f"{picture}.png")
        page = picture.with_suffix(".html")
    for output in picture, page:
        with common.phase(f"--output {output}"):
            is_there = output.exists()
        if is_there:
            common.fail(f"{output} is there already: name a new picture with --output")
    # both are made before one is written, or the same command would find the first in its way
    contents = [draw(args.runs, picture), make_page(args.runs, page)]
    for output, content in zip([picture, page], contents, strict=True):
        with common.phase(f"writing {output}"):
            output.write_bytes(content)
        print(common.visible(str(output)))


if __name__ == "__main__":
    with common.running("the number of runs", resumes=""):
        flags.error = common.fail
        main(flags.parse_args())
