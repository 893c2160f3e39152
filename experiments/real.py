"""Trains a real chat model of 135 million parameters on a laptop's CPU, one method after another.

    python experiments/real.py              # all runs: 3.5 CPU hours, and evaluation
    python experiments/real.py grpo         # one run, and the runs that it starts from
    python experiments/real.py --table      # only prints the tables of the recorded results, and
                                            # draws the curves of docs/real_model.md

Each run is a command that you can type yourself, and this program prints it. The same command
resumes after an interruption, and finished runs are skipped. evaluate.py then measures each model
on problems whose forms no training row has, and on a file of other problems if --transfer names
one. The logs of a run are copied to experiments/results/NAME, so that
`python plot.py experiments/results/grpo` draws them on any machine.
"""
import argparse
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # no screen needed

import matplotlib.pyplot as plt  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import evaluate  # noqa: E402

RESULTS = ROOT / "experiments/results"
PAPER, COLORS = "#f3f1ec", ("#D55E00", "#0072B2")
# A checkpoint every few steps, because a step takes up to a minute.
PROMPTS = ("--dataset examples/wordproblems_train.jsonl"
           " --eval-dataset examples/wordproblems_test.jsonl --eval-size 64 --max-new-tokens 48"
           " --micro-batch-size 8 --save-every 5")
ROWS = "--batch-size 16 --micro-batch-size 8 --save-every 5"
# The name of a run, the runs that it needs, and its command.
RUNS = {
    "sft": ([], "sft.py --model {model} --dataset examples/wordproblems_train.jsonl"
                " --columns completion=solution --eval-dataset examples/wordproblems_test.jsonl"
                " --max-steps 12 --learning-rate 1e-3 --max-new-tokens 48 " + ROWS),
    "pairs": (["sft"], "pairs.py {runs}/sft --dataset examples/wordproblems_train.jsonl --size 250"
                       " --max-new-tokens 48 --micro-batch-size 64 --output {runs}/pairs.jsonl"),
    "dpo": (["pairs"], "dpo.py --model {runs}/sft --dataset {runs}/pairs.jsonl --eval-size 20"
                       " --learning-rate 1e-4 --epochs 2 " + ROWS),
    "dpo_seed1": (["pairs"], "dpo.py --model {runs}/sft --dataset {runs}/pairs.jsonl"
                             " --eval-size 20 --learning-rate 1e-4 --epochs 2 --seed 1 " + ROWS),
    "kto": (["pairs"], "kto.py --model {runs}/sft --dataset {runs}/pairs.jsonl --eval-size 40"
                       " --learning-rate 1e-4 --epochs 2 " + ROWS),
    "best": (["sft"], "pairs.py {runs}/sft --dataset examples/wordproblems_train.jsonl --size 500"
                      " --samples 4 --format best --min-score 1 --max-new-tokens 48"
                      " --micro-batch-size 64 --output {runs}/best.jsonl"),
    "raft": (["best"], "sft.py --model {runs}/sft --dataset {runs}/best.jsonl --eval-size 20"
                       " --learning-rate 5e-4 --epochs 2 --max-new-tokens 48 " + ROWS),
    "online_dpo": (["sft"], "online_dpo.py --model {runs}/sft --batch-size 16"
                            " --learning-rate 1e-4 --max-steps 16 " + PROMPTS),
    "grpo": (["sft"], "grpo.py --model {runs}/sft --batch-size 4 --group-size 8"
                      " --learning-rate 2e-4 --max-steps 40 " + PROMPTS),
    "grpo_seed1": (["sft"], "grpo.py --model {runs}/sft --batch-size 4 --group-size 8"
                            " --learning-rate 2e-4 --max-steps 40 --seed 1 " + PROMPTS),
    "grpo_length": (["sft"], "grpo.py --model {runs}/sft --batch-size 4 --group-size 8"
                             " --learning-rate 2e-4 --max-steps 15 --reward correct_answer"
                             " experiments/length_bug.py:work_shown --reward-weights 1 1 "
                             + PROMPTS),
    "distill": (["grpo"], "distill.py --model {runs}/sft --teacher {runs}/grpo --batch-size 16"
                          " --learning-rate 5e-4 --max-steps 24 " + PROMPTS),
    "agent_sft": ([], "sft.py --model {model} --chat-template examples/tools.jinja"
                      " --dataset examples/wordproblems_calls.jsonl --eval-size 20"
                      " --max-steps 12 --learning-rate 1e-3 --max-new-tokens 48 " + ROWS),
    "agent": (["agent_sft"], "agent.py --model {runs}/agent_sft --batch-size 4 --group-size 8"
                             " --learning-rate 2e-4 --max-steps 10 --max-turns 2"
                             " --max-length 512 " + PROMPTS),
}


# evaluate.py runs no tools, so agent.py's own figures before and after training are shown.
NOT_EVALUATED = ("agent_sft", "agent", "grpo_length")


def make_flags():
    flags = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    add = flags.add_argument
    add("names", nargs="*", metavar="NAME", help=f"runs: {', '.join(RUNS)} (default: all)")
    add("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct", help="Hub name or folder")
    add("--runs", default="runs/real", help="folder of the runs")
    add("--transfer", help="prompts with answers from another source, to evaluate on as well")
    add("--table", action="store_true", help="only print the table and draw the curves")
    return flags


def run(command, log, record):
    """Runs a script, and adds its CPU seconds to record["cpu_seconds"]. Its output goes to `log`.

    CPU seconds count all cores, so they are the same whatever else the machine is doing.
    """
    print(f"python {command}", flush=True)
    with log.open("a") as file:
        process = subprocess.Popen([sys.executable, *command.split()], cwd=ROOT, stdout=file,
                                   stderr=file)
        _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    record["cpu_seconds"] = record.get("cpu_seconds", 0) + usage.ru_utime + usage.ru_stime
    # ru_maxrss is in KiB on Linux and in bytes on macOS.
    peak = usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 2**30
    record["peak_gib"] = max(peak, record.get("peak_gib", 0))
    if process.returncode != 0:
        sys.exit(f"it failed: see {log}")


def evaluate_checkpoint(checkpoint, dataset, size, file, log):
    """The figures of one checkpoint, from `file` if it was evaluated before."""
    if not file.exists():
        run(f"evaluate.py {checkpoint} --dataset {dataset} --size {size} --samples-per-prompt 1"
            f" --max-new-tokens 100 --output {file}", log, {})
    return json.loads(file.read_text())


def train(name, args):
    """Does a run and those that it needs, unless they are finished, and records them."""
    needs, command = RUNS[name]
    for need in needs:
        train(need, args)
    runs = Path(args.runs)
    is_training = not command.startswith("pairs.py")
    output = runs / name if is_training else runs / f"{name}.jsonl"
    command = command.format(model=args.model, runs=args.runs)
    if is_training:
        command += f" --output-dir {output}"
    file = runs / f"{name}.json"
    row = json.loads(file.read_text()) if file.exists() else {"command": command}
    if not (output / "summary.json").exists() and not output.is_file():
        run(command, runs / f"{name}.log", row)
        file.write_text(json.dumps(row, indent=1))
    if is_training:
        (RESULTS / name).mkdir(exist_ok=True)
        for part in ("args.json", "metrics.jsonl", "summary.json"):
            shutil.copy(output / part, RESULTS / name)
    if is_training and name not in NOT_EVALUATED:
        measure(row, name, output, args)
    record(name, row)


def measure(row, name, checkpoint, args):
    """Adds what evaluate.py finds for a checkpoint to its row."""
    runs = Path(args.runs)
    log = runs / "evaluate.log"
    row["test"] = evaluate_checkpoint(checkpoint, "examples/wordproblems_test.jsonl", 300,
                           runs / f"{name}-test.json", log)
    transfer = runs / f"{name}-transfer.json"
    if args.transfer or transfer.exists():
        row["transfer"] = evaluate_checkpoint(checkpoint, args.transfer, 200, transfer, log)


def record(name, row):
    """Writes a row of real.json, in the order in which the runs are done."""
    table = RESULTS / "real.json"
    rows = json.loads(table.read_text()) if table.exists() else {}
    rows[name] = row
    rows = {name: rows[name] for name in ["start", *RUNS] if name in rows}
    table.write_text(json.dumps(rows, indent=1) + "\n")


def share(value, interval):
    """A share with its 95% interval, as text."""
    low, high = interval
    return f"{value:.3f} ({low:.3f}–{high:.3f})"


def costs(row):
    """The last cells of a line: CPU minutes and peak memory."""
    if "cpu_seconds" not in row:
        return ["–", "–"]
    return [f"{row['cpu_seconds'] / 60:.0f}", f"{row['peak_gib']:.1f}"]


def print_tables():
    """Prints the recorded results as two tables in Markdown."""
    rows = json.loads((RESULTS / "real.json").read_text())
    print("| run | sampled | greedy | other problems, sampled | tokens | CPU minutes | peak GiB |")
    print("|---|---|---|---|---|---|---|")
    for name, row in rows.items():
        if name in NOT_EVALUATED:
            continue
        cells = [name]
        for file, kind in (("test", "sampled"), ("test", "greedy"), ("transfer", "sampled")):
            line = row[file][0] if file in row else None
            cells.append(share(line[kind], line[f"{kind}_interval"]) if line else "–")
        cells.append(f"{row['test'][0]['length']:.0f}" if "test" in row else "–")
        print(f"| {' | '.join(cells + costs(row))} |")
    print("\n| run | correct before | after | CPU minutes | peak GiB |")
    print("|---|---|---|---|---|")
    summary = json.loads((RESULTS / "agent/summary.json").read_text())
    cells = ["agent"]
    for when in ("before", "after"):
        correct = summary[when]["reward"]
        cells.append(share(correct, evaluate.wilson(correct, summary["eval_size"])))
    print(f"| {' | '.join(cells + costs(rows['agent']))} |")


def draw_curves(file, runs, panels, window=1):
    """Draws metrics of runs, {folder: label}, as means over `window` rollouts.

    A panel is a metric and its title. Nothing is drawn before all of the runs are recorded.
    """
    if not all((RESULTS / name / "metrics.jsonl").exists() for name in runs):
        return
    figure, axes = plt.subplots(1, len(panels), figsize=(13, 2.8), facecolor=PAPER)
    for axis, (metric, title) in zip(axes, panels, strict=True):
        for (name, label), color in zip(runs.items(), COLORS, strict=False):
            lines = (RESULTS / name / "metrics.jsonl").read_text().splitlines()
            steps = [json.loads(line) for line in lines]
            values = [step[metric] for step in steps]
            means = [sum(values[i:i + window]) / window for i in range(len(values) - window + 1)]
            axis.plot(range(window, len(values) + 1), means, color=color, label=label)
        axis.set(title=title, xlabel="rollout", ylim=(0, None), facecolor=PAPER)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].legend(frameon=False)
    figure.tight_layout()
    figure.savefig(file, dpi=110)


def draw_all():
    """Draws the curves of docs/real_model.md."""
    images = ROOT / "docs/images"
    draw_curves(images / "real_grpo.png", {"grpo": "seed 0", "grpo_seed1": "seed 1"}, [
        ("reward", "correct samples (share)"), ("kl", "KL from sft (nats per answer)"),
        ("entropy", "entropy (nats per token)"),
        ("zero_spread", "groups without spread (share)")], window=8)
    draw_curves(images / "real_length.png", {
        "grpo": "correct or not", "grpo_length": "+ 0.1 per character"}, [
        ("reward", "reward in training"), ("length", "length (tokens)"),
        ("stopped", "answers that stopped (share)"),
        ("reward_correct_answer", "correct samples (share)")], window=4)


def main():
    args = make_flags().parse_args()
    if not args.table:
        Path(args.runs).mkdir(parents=True, exist_ok=True)
        for name in args.names or RUNS:
            train(name, args)
        row = {}
        measure(row, "start", args.model, args)
        record("start", row)
    print_tables()
    draw_all()


if __name__ == "__main__":
    main()
