"""Compares eleven methods on one task, from the same tiny model, and reproduces failure modes.

    python experiments/compare.py               # under an hour on two cores
    python experiments/compare.py --seeds 0     # the first seed only: about 25 minutes
    python experiments/compare.py --draw        # only draws the plots again, from compare.json

Every run is a command that you can type yourself; it is written to the log beside its folder. The
same command resumes after an interruption, and finished runs are skipped. evaluate.py measures the
checkpoints along the way. The program writes the plots and compare.json, and prints a table.
"""
import argparse
import concurrent.futures
import contextlib
import copy
import datetime
import functools
import importlib.metadata
import json
import math
import os
import platform
import shutil
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path

import matplotlib

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
matplotlib.use("Agg")  # no screen needed

import matplotlib.pyplot as plt  # noqa: E402
import psutil  # noqa: E402
import torch  # noqa: E402

import common  # noqa: E402


def make_flags():
    flags = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    add = flags.add_argument
    add("--runs", default="runs/compare", help="folder of the runs")
    add("--images", default=str(ROOT / "docs/images"), help="folder of the plots")
    add("--results", default=str(ROOT / "experiments/results"), help="folder of compare.json")
    add("--seeds", type=common.natural, nargs="+", default=[0, 1, 2],
        help="random seeds; the failure modes are run with the first one")
    add("--jobs", type=common.count, default=2, help="number of runs at a time, one core each")
    add("--draw", action="store_true", help="only draw the plots, from compare.json")
    return flags


# --save-every decides at which steps the held-out accuracy is measured.
METHODS = {
    "sft": "sft.py --model tiny/chat --dataset {runs}/chosen.jsonl --learning-rate 1e-3"
           " --save-every 40",
    "raft": "sft.py --model tiny/chat --dataset {runs}/best_{seed}.jsonl --learning-rate 1e-3"
            " --save-every 12",
    "dpo": "dpo.py --save-every 40",
    "ipo": "dpo.py --loss ipo --beta 0.2 --save-every 40",
    "kto": "kto.py --save-every 40",
    "online_dpo": "online_dpo.py --save-every 12",
    "xpo": "online_dpo.py --loss xpo --save-every 12",
    "nash_md": "online_dpo.py --loss nash_md --save-every 12",
    "grpo": "grpo.py --save-every 16",
    "rloo": "grpo.py --loss dr_grpo --baseline rloo --save-every 16",
    "ppo": "ppo.py --save-every 5",
}
SAMPLING = ("pairs.py tiny/chat --format best --size 1000 --samples 4 --seed {seed}"
            " --output {runs}/best_{seed}.jsonl")  # RAFT's data, before its training
# A reward model that is trained on 400 pairs instead of three epochs of 3000. It orders 8 of 10
# held-out pairs correctly.
BLIND = "reward_model.py --max-steps 25 --output-dir {runs}/blind"
# These runs use the first seed only: the failure modes, and normal runs to compare them with where
# no method above serves.
EXTRA = {
    "sft_all": "sft.py --epochs 5 --eval-every 10 --save-every 94",
    "sft_long": "sft.py --dataset {runs}/few.jsonl --eval-dataset tiny/data/sft_heldout.jsonl"
                " --epochs 50 --eval-every 10 --save-every 94",
    "dpo_beta": "dpo.py --beta 0.1 --save-every 40",
    "ppo_blind": "ppo.py --reward {runs}/blind --save-every 5",
    "ppo_beta": "ppo.py --reward {runs}/blind --beta 0.05 --save-every 5",
    "ppo_critic": "ppo.py --value-weight 0 --save-every 5",
    "grpo_rate": "grpo.py --learning-rate 1e-2 --save-every 16",
    "grpo_length": "grpo.py --reward correct_answer experiments/length_bug.py:work_shown"
                   " --reward-weights 1 1 --save-every 16",
}
# The colors of Okabe and Ito, which color-blind readers can tell apart: one color per family and
# one marker per method in it.
BLUE, RED, GREEN, PURPLE = "#0072B2", "#D55E00", "#009E73", "#CC79A7"
PAPER = "#f3f1ec"  # the background of all plots: light, and no glare on a dark page
INK, QUIET = "#22262b", "#b9b6ae"
FAMILIES = {
    "SFT on correct answers": (PURPLE, {"sft": "SFT, preferred answers",
                                        "raft": "RAFT, own best answers"}),
    "given preferences": (BLUE, {"dpo": "DPO", "ipo": "IPO", "kto": "KTO"}),
    "preferences on own samples": (GREEN, {"online_dpo": "online DPO", "xpo": "XPO",
                                           "nash_md": "Nash-MD"}),
    "rewards on own samples": (RED, {"grpo": "GRPO", "rloo": "RLOO", "ppo": "PPO"}),
}
FORMS = (("o", "-"), ("s", "--"), ("^", ":"))  # the first, second and third method of a family
ACCURACY = "correct sampled answers, held out"
GREEDY = "correct greedy answers, held out"
KL = "KL from tiny/chat, held out\n(nats per answer)"
# For each plot: its title, the normal and the failing run with their labels, and its panels as
# (source, metric, label of the axis).
FAILURES = {
    "failure_dpo_beta": ("DPO with too small a β", ("dpo", "β = 2"), ("dpo_beta", "β = 0.1"), [
        ("held out", "length", "length, held out (tokens)"),
        ("held out", "kl", KL), ("held out", "sampled", ACCURACY)]),
    "failure_ppo_beta": ("PPO with too small a β and a reward model that errs in 2 of 10 pairs",
                      ("ppo_blind", "β = 0.5"), ("ppo_beta", "β = 0.05"), [
        ("logged", "reward", "score by the reward model\n(mean over a rollout)"),
        ("held out", "kl", KL),
        ("held out", "greedy", GREEDY)]),
    "failure_ppo_critic": ("PPO with a critic that does not learn", ("ppo", "critic trained"),
                           ("ppo_critic", "--value-weight 0"), [
        ("logged", "explained_variance", "explained variance\n(1: perfect critic)"),
        ("logged", "reward", "score by the reward model\n(mean over a rollout)"),
        ("held out", "sampled", ACCURACY)]),
    "failure_grpo_rate": ("GRPO with too high a learning rate", ("grpo", "learning rate 1e-3"),
                          ("grpo_rate", "learning rate 1e-2"), [
        ("logged", "entropy", "entropy (nats per token)"),
        ("logged", "zero_spread", "groups with equal rewards (share)"),
        ("held out", "sampled", ACCURACY)]),
    "failure_grpo_length": ("GRPO with a reward that pays per character",
                         ("grpo", "correct or not"), ("grpo_length", "+ 0.1 per character"), [
        ("logged", "reward", "reward in training\n(mean over a rollout)"),
        ("held out", "length", "length, held out (tokens)"), ("held out", "sampled", ACCURACY)]),
    "failure_sft_long": ("SFT for 470 steps", ("sft_all", "3000 rows"),
                      ("sft_long", "300 rows"), [
        ("logged", "loss", "training loss (nats per token)"),
        ("logged", "eval_loss", "held-out loss (nats per token)"),
        ("held out", "greedy", GREEDY)]),
}
LOADING = threading.Lock()  # one thread at a time loads a model


# ---- the runs ------------------------------------------------------------------------------------

def plan(args):
    """Every run with its commands; the failure modes are run with one seed."""
    runs = []
    for seed in args.seeds:
        for name, command in (METHODS | (EXTRA if seed == args.seeds[0] else {})).items():
            folder = Path(args.runs, f"{name}_{seed}")
            words = command.format(runs=args.runs, seed=seed).split()
            sampling = SAMPLING.format(runs=args.runs, seed=seed).split() if name == "raft" else []
            runs.append({"name": name, "seed": seed, "folder": folder, "sampling": sampling,
                         "training": [*words, "--seed", str(seed), "--output-dir", str(folder)]})
    return runs


def prepare(runs):
    """Makes the data and the weak reward model that several runs share."""
    if not (runs / "chosen.jsonl").exists():
        rows = common.load_rows("tiny/data/preference_train.jsonl", "train", 10**9, 0)
        rows = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in rows]
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (runs / "chosen.jsonl").write_text(text)
    if not (runs / "few.jsonl").exists():
        lines = (ROOT / "tiny/data/sft_train.jsonl").read_text().splitlines(keepends=True)
        (runs / "few.jsonl").write_text("".join(lines[:300]))
    if not (runs / "blind/summary.json").exists():
        call(BLIND.format(runs=runs).split(), runs / "blind")


def call(command, folder, watch=None):
    """Runs a script to its end, with its output in a log file; returns its CPU seconds."""
    began, cpu = time.time(), 0.0
    line = as_typed(command)
    log = Path(f"{folder}.log")
    with open(log, "a") as file:
        print(f"$ {line}", file=file, flush=True)
        process = subprocess.Popen(
            [sys.executable, ROOT / command[0], *command[1:]], stdout=file, stderr=file,
            env=os.environ | {"OMP_NUM_THREADS": "1"})
    while process.poll() is None:
        with contextlib.suppress(psutil.Error):  # the process has just ended
            cpu = sum(psutil.Process(process.pid).cpu_times()[:2])  # user and system
        if watch:
            watch(cpu)
        time.sleep(0.1)
    if process.returncode != 0:
        raise ValueError(f"{line}: {log.read_text().strip().splitlines()[-1]}")
    print(f"{time.time() - began:5.0f} s  {line}", flush=True)
    return cpu


def as_typed(command):
    return " ".join(["python", *command])


def keep_state(folder, spent, cpu):
    """Keeps a copy of the weights in a run's checkpoint, with the CPU seconds spent so far."""
    states = folder / "states"
    known = {file.stat().st_mtime_ns for file in states.glob("*.pt")}
    with contextlib.suppress(FileNotFoundError):  # before the first checkpoint, or after the end
        saved = (folder / "resume.pt").stat().st_mtime_ns
        if saved not in known:
            state = torch.load(folder / "resume.pt", map_location="cpu", weights_only=True)
            states.mkdir(exist_ok=True)
            kept = {"weights": state["weights"], "cpu_seconds": spent + cpu}
            torch.save(kept, states / "unfinished")
            os.utime(states / "unfinished", ns=(saved, saved))
            (states / "unfinished").replace(states / f"{state['step']}.pt")


def read_states(folder):
    """The checkpoints of a run that were kept, {step: state}."""
    files = {int(file.stem): file for file in (folder / "states").glob("*.pt")}
    return {step: torch.load(files[step], weights_only=True) for step in sorted(files)}


def write_checkpoints(folder, states):
    """Writes a model for each of the states; returns their folders."""
    summary = json.loads((folder / "summary.json").read_text())
    if summary["step"] not in states:
        raise ValueError(f"{folder} has no copy of its last checkpoint: delete it to run it again")
    tokenizer = common.load_tokenizer(str(folder))
    model = common.load_model(str(folder))
    final = {name: p.clone() for name, p in model.named_parameters() if ".default." in name}
    folders = []
    for step, state in states.items():
        load_weights(model, state["weights"])
        # A merged copy gives the same answers in half the time.
        merged = copy.deepcopy(model).merge_and_unload(adapter_names=["default"])
        folders.append(str(folder / "steps" / str(step)))
        merged.save_pretrained(folders[-1])
        tokenizer.save_pretrained(folders[-1])
    weights = dict(model.named_parameters())
    if not all(torch.equal(final[name], weights[name]) for name in final):
        raise ValueError(f"{folder}: the last checkpoint differs from the saved adapter")
    return folders


def load_weights(model, saved):
    """Copies the policy's weights from a checkpoint, {name: tensor}, and ignores a critic's."""
    for name, p in model.named_parameters():
        if ".default." in name:
            p.data.copy_(saved[name])


def finish(run):
    """Completes a run: samples, trains and measures. {run}.table.json marks it as finished."""
    folder = run["folder"]
    sampling, table = Path(f"{folder}.sampling.json"), Path(f"{folder}.table.json")
    if run["sampling"] and not sampling.exists():
        sampling.write_text(json.dumps({"cpu_seconds": call(run["sampling"], folder)}))
    if not (folder / "summary.json").exists():
        spent = [state["cpu_seconds"] for state in read_states(folder).values()][-1:]
        call(run["training"], folder, functools.partial(keep_state, folder, sum(spent)))
    if not table.exists():
        states = read_states(folder)
        with LOADING:
            checkpoints = write_checkpoints(folder, states)
        measured = Path(f"{folder}.measured.json")
        measured.unlink(missing_ok=True)
        call(["evaluate.py", "tiny/chat", *checkpoints, "--output", str(measured)], folder)
        lines = json.loads(measured.read_text())
        costs = [{"step": 0, "cpu_seconds": 0.0}] + [
            {"step": step, "cpu_seconds": state["cpu_seconds"]} for step, state in states.items()]
        lines = [line | cost for line, cost in zip(lines, costs, strict=True)]
        measured.write_text(json.dumps(lines, indent=1))
        measured.replace(table)
        shutil.rmtree(folder / "steps")
        shutil.rmtree(folder / "states")


# ---- results -------------------------------------------------------------------------------------

def read_run(run):
    """The held-out figures of a run before training and at its checkpoints, and its log."""
    folder = run["folder"]
    with common.phase(f"reading {folder}"):
        summary = json.loads((folder / "summary.json").read_text())
        lines = json.loads(Path(f"{folder}.table.json").read_text())
        logged = [json.loads(x) for x in (folder / "metrics.jsonl").read_text().splitlines()]
        if f"$ {as_typed(run['training'])}\n" not in Path(f"{folder}.log").read_text():
            raise ValueError("the folder is from another command: name another --runs")
        start = lines[0] | {"kl": 0.0}
        points = [point(start, 0, 0.0)]
        answers, seconds = 0, 0.0
        if run["sampling"]:  # these answers are sampled before the training
            size, samples = (run["sampling"][run["sampling"].index(flag) + 1]
                             for flag in ("--size", "--samples"))
            answers = int(size) * int(samples)
            seconds = json.loads(Path(f"{folder}.sampling.json").read_text())["cpu_seconds"]
            points.append(point(start, answers, seconds))
        for line in lines[1:]:
            seen = line["step"] * answers_per_step(summary)
            points.append(point(line, answers + seen, seconds + line["cpu_seconds"]))
    if summary["model"] != "tiny/chat":
        points = [p for p in points if p["step"] > 0]
    return {"name": run["name"], "seed": run["seed"], "points": points, "logged": logged}


def answers_per_step(summary):
    """Answers per step, given or sampled: two per pair, and a group per prompt of GRPO."""
    each = {"dpo": 2, "online_dpo": 2, "grpo": summary.get("group_size")}
    return summary["batch_size"] * each.get(summary["method"], 1)


def point(line, answers, seconds):
    figures = {key: line[key] for key in ("step", "sampled", "greedy", "kl", "length", "stopped")}
    return figures | {"answers": answers, "cpu_seconds": round(seconds, 1)}


def write_results(results, file):
    """Writes the figures of all plots with the date, the versions and the commands."""
    versions = {name: importlib.metadata.version(name)
                for name in ("torch", "transformers", "peft", "bitsandbytes")}
    runs = [{"command": f"python {(METHODS | EXTRA)[result['name']]} --seed {result['seed']}"}
            | {"name": result["name"], "seed": result["seed"], "points": result["points"],
               "logged": logged_figures(result)} for result in results]
    text = {"date": datetime.date.today().isoformat(), "python": platform.python_version(),
            **versions, "machine": f"{platform.machine()}, {os.cpu_count()} cores", "runs": runs}
    file.write_text(json.dumps(text, indent=1))


def logged_figures(result):
    """The logged metrics that the plots of failure modes show, as a list with a dict per step."""
    wanted = {key for _, normal, failing, panels in FAILURES.values()
              for source, key, _ in panels if source == "logged"
              if result["seed"] == 0 and result["name"] in (normal[0], failing[0])}
    names = {"step", "rollout_seconds"} | wanted
    return [{name: line[name] for name in sorted(names & line.keys())}
            for line in result["logged"] if wanted]


def show_table(results):
    """Prints the figures of the last checkpoints as a Markdown table."""
    print("\n| | sampled | greedy | KL from tiny/chat | tokens | stopped | answers | CPU s |")
    print("|---|---|---|---|---|---|---|---|")
    for name in METHODS | EXTRA:
        ends = [result["points"][-1] for result in results if result["name"] == name]
        if ends:
            each = ", ".join(f"{end['sampled']:.3f}" for end in ends)
            mean = {key: statistics.fmean(end[key] for end in ends) for key in ends[0]}
            print(f"| `{name}` | {each} | {mean['greedy']:.3f} | {mean['kl']:.2f} | "
                  f"{mean['length']:.1f} | {mean['stopped']:.3f} | {mean['answers']:.0f} | "
                  f"{mean['cpu_seconds']:.0f} |")


# ---- the plots -----------------------------------------------------------------------------------

def new_figure(rows, columns, width, height):
    """Axes [rows, columns] in the style of all plots, which stays legible at half the size."""
    plt.rcParams.update({
        "font.size": 14, "lines.linewidth": 2, "lines.markersize": 8, "axes.grid": True,
        "grid.alpha": 0.4, "axes.spines.top": False, "axes.spines.right": False,
        "figure.facecolor": PAPER, "axes.facecolor": PAPER, "savefig.facecolor": PAPER,
        "text.color": INK, "axes.labelcolor": INK, "legend.framealpha": 0})
    return plt.subplots(rows, columns, figsize=(width, height), squeeze=False, layout="constrained")


def mean_points(results, name):
    """The checkpoints of a method as means over its seeds, {metric: list}, the lowest and highest
    accuracy at each of them, and the last checkpoint of each seed."""
    runs = [result["points"] for result in results if result["name"] == name]
    steps = list(zip(*runs, strict=False))
    keys = runs[0][0] if runs else ()
    mean = {key: [statistics.fmean(p[key] for p in step) for step in steps] for key in keys}
    low = [min(p["sampled"] for p in step) for step in steps]
    high = [max(p["sampled"] for p in step) for step in steps]
    return mean, low, high, [points[-1] for points in runs]


def least_kl(right, start):
    """The KL between two biased coins: no policy with this accuracy can be closer to the start.

    Whether an answer is correct is a function of the answer, and a function cannot increase the KL.
    Because KL is convex, the mean over the prompts is not below the KL of the means.
    """
    return sum(p * math.log(p / q) for p, q in ((right, start), (1 - right, 1 - start)) if p > 0)


def draw_accuracy(results, file):
    """Draws bars: the share of correct answers before training, and what each method adds to it."""
    figure, axes = new_figure(1, 1, 10, 6.4)
    axis = axes[0, 0]
    start = next(result["points"][0]["sampled"] for result in results if result["name"] in METHODS)
    ticks, place = {}, 0
    for family, (color, names) in FAMILIES.items():
        axis.text(1.1, place + 0.5 * (len(names) - 1), family.replace(" ", "\n", 1), color=color,
                  va="center")
        for name, label in names.items():
            accuracy = statistics.fmean(end["sampled"] for end in mean_points(results, name)[3])
            axis.barh(place, start, color=QUIET)
            axis.barh(place, accuracy - start, left=start, color=color)
            axis.text(accuracy + 0.01, place, f"{accuracy:.0%}", va="center")
            ticks[label] = place
            place += 1
        place += 0.6
    axis.text(start / 2, -0.85, f"before training: {start:.0%}", ha="center", color=INK)
    axis.axvline(start, color=INK, linewidth=1)
    axis.set_yticks(list(ticks.values()), list(ticks))
    axis.set_ylim(place - 0.6, -1.4)
    axis.set_xlim(0, 1.4)
    axis.set_xticks([])
    axis.grid(False)
    axis.tick_params(left=False)
    axis.spines[["left", "bottom"]].set_visible(False)
    axis.set_title("Correct answers, before and after training", loc="left", pad=12)
    save_figure(figure, file)


def draw_frontier(results, file):
    """Accuracy against the KL from the start."""
    figure, axes = new_figure(1, 1, 9.5, 6.2)
    axis = axes[0, 0]
    start = next(result["points"][0]["sampled"] for result in results if result["name"] in METHODS)
    shares = [start + (1 - start) * i / 100 for i in range(101)]
    axis.plot([least_kl(share, start) for share in shares], shares, color="black", linewidth=1,
              label="smallest possible KL")
    for family, (color, names) in FAMILIES.items():
        axis.plot([], [], " ", label=family)
        for (name, label), (marker, line) in zip(names.items(), FORMS, strict=False):
            mean, _, _, ends = mean_points(results, name)
            if ends:
                axis.plot(mean["kl"], mean["sampled"], line, color=color, linewidth=1.2,
                          marker=marker, markersize=4)
                axis.plot([end["kl"] for end in ends], [end["sampled"] for end in ends], marker,
                          color=color, markeredgecolor="white", markersize=11, label="  " + label)
    axis.set(xlabel="KL from tiny/chat on held-out prompts (nats per answer)", ylabel=ACCURACY)
    axis.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    save_figure(figure, file)


def draw_curves(results, x, label, file):
    """Accuracy against cost: one panel per family, with all other methods in gray behind it."""
    figure, axes = new_figure(2, 2, 10, 7.8)
    everyone = [name for _, names in FAMILIES.values() for name in names]
    for axis, (family, (color, names)) in zip(axes.flat, FAMILIES.items(), strict=True):
        for name in everyone:
            mean, _, _, ends = mean_points(results, name)
            if ends and name not in names:
                axis.plot(mean[x], mean["sampled"], color="#cccccc", linewidth=1)
        for (name, method), (marker, line) in zip(names.items(), FORMS, strict=False):
            mean, low, high, ends = mean_points(results, name)
            if ends:
                axis.fill_between(mean[x], low, high, color=color, alpha=0.15, linewidth=0)
                axis.plot(mean[x], mean["sampled"], line, marker=marker, color=color, label=method)
        axis.set_title(family)
        axis.legend(loc="center right")
    for axis in axes.flat:
        axis.set(xlabel=label, ylabel=ACCURACY)
        axis.label_outer()
    for axis in axes.flat[1:]:
        axis.sharex(axes[0, 0])
        axis.sharey(axes[0, 0])
    save_figure(figure, file)


def draw_failure(results, plot, file):
    """A failing run (red, dashed) beside a normal one (blue, solid)."""
    title, normal, failing, panels = FAILURES[plot]
    figure, axes = new_figure(1, len(panels), 12.5, 4.6)
    for axis, (source, key, label) in zip(axes.flat, panels, strict=True):
        for (name, said), color, marker, line in (normal, BLUE, "o", "-"), (
                failing, RED, "^", "--"):
            for result in [x for x in results if x["name"] == name][:1]:
                points = result["points" if source == "held out" else "logged"]
                points = [p for p in points if p.get(key) is not None]
                axis.plot([p["step"] for p in points], [p[key] for p in points], line,
                          marker=marker if source == "held out" else "", color=color, label=said)
                has_rollouts = "rollout_seconds" in result["logged"][0]
                axis.set_xlabel("rollout" if has_rollouts else "optimizer step")
        axis.set_ylabel(label)
    figure.suptitle(title)
    handles, labels = axes[0, -1].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2)
    save_figure(figure, file)


def save_figure(figure, file):
    figure.savefig(file, dpi=120)
    plt.close(figure)
    print(file)


def draw(results, images):
    """Draws all plots, except for failure modes that were not run."""
    draw_accuracy(results, images / "accuracy.png")
    draw_frontier(results, images / "frontier.png")
    draw_curves(results, "answers", "answers seen", images / "answers.png")
    draw_curves(results, "cpu_seconds", "CPU seconds on one core, loading included",
                images / "seconds.png")
    logged = {result["name"] for result in results if result.get("logged")}
    for plot, (_, normal, failing, _) in FAILURES.items():
        if {normal[0], failing[0]} <= logged:
            draw_failure(results, plot, images / f"{plot}.png")


def main(args):
    folder, images = Path(args.runs), Path(args.images)
    if args.draw:
        draw(json.loads(Path(args.results, "compare.json").read_text())["runs"], images)
        return
    with common.phase(f"writing to {folder} and {images}"):
        folder.mkdir(parents=True, exist_ok=True)
        images.mkdir(parents=True, exist_ok=True)
        prepare(folder)
    runs = plan(args)
    missing = [run for run in runs if not Path(f"{run['folder']}.table.json").exists()]
    print(f"{len(missing)} of {len(runs)} runs to do, {args.jobs} at a time", flush=True)
    pool = concurrent.futures.ThreadPoolExecutor(args.jobs)
    try:
        for future in concurrent.futures.as_completed([pool.submit(finish, x) for x in missing]):
            with common.phase("a run of the comparison"):
                future.result()
    finally:
        pool.shutdown(cancel_futures=True)
    results = [read_run(run) for run in runs]
    draw(results, images)
    write_results(results, Path(args.results, "compare.json"))
    show_table(results)


if __name__ == "__main__":
    with common.running("--jobs"):
        flags = make_flags()
        flags.error = common.fail
        main(flags.parse_args())
