"""One task, every way: all methods from one start on the tiny world, and what makes them sick.

    python experiments/compare.py               # under an hour on two cores
    python experiments/compare.py --seeds 0     # the first seed: about 25

Every run is a command that you can type; it is written to the log beside its folder. What is done
is not done again: the same command goes on after an interruption, or only draws. Checkpoints along
the way are measured by evaluate.py. Writes the pictures and compare.json, and prints a table.
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

flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
add = flags.add_argument
add("--runs", default="runs/compare", help="folder of the runs")
add("--images", default=str(ROOT / "docs/images"), help="folder of the pictures")
add("--results", default=str(ROOT / "experiments/results"), help="folder of compare.json")
add("--seeds", type=common.natural, nargs="+", default=[0, 1, 2], help="sick runs take the first")
add("--jobs", type=common.count, default=2, help="runs at a time, each on one core")

# --save-every decides at which steps the held-out accuracy is measured
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
# a reward model that has seen 400 pairs in place of 9000: right about 8 of 10, and blind to much
BLIND = "reward_model.py --max-steps 25 --output-dir {runs}/blind"
EXTRA = {  # with the first seed: the sick, and their healthy ones that are no method of above
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
# colours by Okabe and Ito, which the colour-blind tell apart: one a family, a marker each in it
BLUE, RED, GREEN, PURPLE = "#0072B2", "#D55E00", "#009E73", "#CC79A7"
FAMILIES = {
    "SFT on right answers": (PURPLE, {"sft": "SFT, preferred answers", "raft": "RAFT, own best"}),
    "given preferences": (BLUE, {"dpo": "DPO", "ipo": "IPO", "kto": "KTO"}),
    "preferences on own samples": (GREEN, {"online_dpo": "online DPO", "xpo": "XPO",
                                           "nash_md": "Nash-MD"}),
    "rewards on own samples": (RED, {"grpo": "GRPO", "rloo": "RLOO", "ppo": "PPO"}),
}
FORMS = (("o", "-"), ("s", "--"), ("^", ":"))  # of the first, second and third of a family
RIGHT = "right answers, held out (share)"
GREEDY = "right answers, held out\n(share of the likeliest answers)"
KL = "KL from tiny/chat, held out\n(nats per answer)"
# picture: title, the healthy and the sick run with their labels, and panels: where from, what, axis
SICK = {
    "sick_dpo_beta": ("DPO with β too small", ("dpo", "β = 2"), ("dpo_beta", "β = 0.1"), [
        ("held out", "length", "length, held out (tokens)"),
        ("held out", "kl", KL), ("held out", "sampled", RIGHT)]),
    "sick_ppo_beta": ("PPO with β too small, a reward model that errs in 2 of 10 pairs",
                      ("ppo_blind", "β = 0.5"), ("ppo_beta", "β = 0.05"), [
        ("logged", "reward", "reward of the reward model\n(its units, mean of a rollout)"),
        ("held out", "kl", KL),
        ("held out", "greedy", GREEDY)]),
    "sick_ppo_critic": ("PPO with the critic's learning off", ("ppo", "learns"),
                        ("ppo_critic", "--value-weight 0"), [
        ("logged", "explained_variance", "explained variance\n(1: perfect critic)"),
        ("logged", "reward", "reward of the reward model\n(its units, mean of a rollout)"),
        ("held out", "sampled", RIGHT)]),
    "sick_grpo_rate": ("GRPO with too high a rate", ("grpo", "rate 1e-3"),
                       ("grpo_rate", "rate 1e-2"), [
        ("logged", "entropy", "entropy (nats per token)"),
        ("logged", "zero_spread", "groups of equal rewards (share)"),
        ("held out", "sampled", RIGHT)]),
    "sick_grpo_length": ("GRPO with a reward that pays by the character",
                         ("grpo", "right or wrong"), ("grpo_length", "+ 0.1 per character"), [
        ("logged", "reward", "reward that is trained on\n(mean of a rollout)"),
        ("held out", "length", "length, held out (tokens)"), ("held out", "sampled", RIGHT)]),
    "sick_sft_long": ("SFT for too long on what it has: 470 steps", ("sft_all", "3000 rows"),
                      ("sft_long", "300 rows"), [
        ("logged", "loss", "loss in training (nats per token)"),
        ("logged", "eval_loss", "loss, held out (nats per token)"),
        ("held out", "greedy", GREEDY)]),
}
LOADING = threading.Lock()  # a model is loaded by one thread at a time


# ---- the runs ------------------------------------------------------------------------------------

def plan(args):
    """Every run with its commands; what is sick has one seed."""
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
    """What several runs need: preferred answers, few demonstrations, a reward model to fool."""
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
    """Runs one of the scripts to its end; its output goes to a file. Returns its CPU seconds."""
    began, cpu = time.time(), 0.0
    line = as_typed(command)
    log = Path(f"{folder}.log")
    with open(log, "a") as file:
        print(f"$ {line}", file=file, flush=True)
        process = subprocess.Popen(
            [sys.executable, ROOT / command[0], *command[1:]], stdout=file, stderr=file,
            env=os.environ | {"OMP_NUM_THREADS": "1"})
    while process.poll() is None:
        with contextlib.suppress(psutil.Error):  # it has just ended
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
    """Keeps the weights that a run saves to go on, with the CPU seconds that they have cost."""
    states = folder / "states"
    known = {file.stat().st_mtime_ns for file in states.glob("*.pt")}
    with contextlib.suppress(FileNotFoundError):  # not yet there, or no more
        saved = (folder / "resume.pt").stat().st_mtime_ns
        if saved not in known:
            state = torch.load(folder / "resume.pt", map_location="cpu", weights_only=True)
            states.mkdir(exist_ok=True)
            kept = {"weights": state["weights"], "cpu_seconds": spent + cpu}
            torch.save(kept, states / "unfinished")
            os.utime(states / "unfinished", ns=(saved, saved))
            (states / "unfinished").replace(states / f"{state['step']}.pt")


def read_states(folder):
    """What was kept of a run, {step: state}."""
    files = {int(file.stem): file for file in (folder / "states").glob("*.pt")}
    return {step: torch.load(files[step], weights_only=True) for step in sorted(files)}


def write_checkpoints(folder, states):
    """A model for each of the states; returns their folders."""
    summary = json.loads((folder / "summary.json").read_text())
    if summary["step"] not in states:
        raise ValueError(f"{folder} ended while nobody watched: delete it to run it again")
    tokenizer = common.load_tokenizer(str(folder))
    model = common.load_model(str(folder))
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    final = {name: p.clone() for name, p in trained.items()}
    folders = []
    for step, state in states.items():
        for name, weight in trained.items():  # PPO's states also hold its critic
            weight.data.copy_(state["weights"][name])
        # a copy without LoRA layers answers the same, in half the time
        merged = copy.deepcopy(model).merge_and_unload(adapter_names=["default"])
        folders.append(str(folder / "steps" / str(step)))
        merged.save_pretrained(folders[-1])
        tokenizer.save_pretrained(folders[-1])
    if not all(torch.equal(final[name], trained[name]) for name in final):
        raise ValueError(f"{folder}: its last state is not what it saved")
    return folders


def finish(run):
    """Samples, trains and measures what has not been: {run}.table.json is there once all is."""
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


# ---- what they have reached ----------------------------------------------------------------------

def read_run(run):
    """The held-out figures of a run along its way, from its start on, and what it logged."""
    folder = run["folder"]
    with common.phase(f"reading {folder}"):
        summary = json.loads((folder / "summary.json").read_text())
        lines = json.loads(Path(f"{folder}.table.json").read_text())
        logged = [json.loads(x) for x in (folder / "metrics.jsonl").read_text().splitlines()]
        if f"$ {as_typed(run['training'])}\n" not in Path(f"{folder}.log").read_text():
            raise ValueError("it is of another command than now: name another --runs")
        start = lines[0] | {"kl": 0.0}
        points = [point(start, 0, 0.0)]
        answers, seconds = 0, 0.0
        if run["sampling"]:  # its answers cost before they teach
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
    """How many answers a step reads or samples: a pair has two, a prompt of GRPO its group."""
    each = {"dpo": 2, "online_dpo": 2, "grpo": summary.get("group_size")}
    return summary["batch_size"] * each.get(summary["method"], 1)


def point(line, answers, seconds):
    figures = {key: line[key] for key in ("step", "sampled", "greedy", "kl", "length", "stopped")}
    return figures | {"answers": answers, "cpu_seconds": round(seconds, 1)}


def write_results(results, file):
    """All figures of the pictures, with date and versions."""
    versions = {name: importlib.metadata.version(name)
                for name in ("torch", "transformers", "peft", "bitsandbytes")}
    runs = [{"command": f"python {(METHODS | EXTRA)[result['name']]} --seed {result['seed']}"}
            | {key: result[key] for key in ("name", "seed", "points")} for result in results]
    text = {"date": datetime.date.today().isoformat(), "python": platform.python_version(),
            **versions, "machine": f"{platform.machine()}, {os.cpu_count()} cores", "runs": runs}
    file.write_text(json.dumps(text, indent=1))


def show_table(results):
    """In Markdown: what the last checkpoint of each run has reached."""
    print("\n| | right, sampled | greedy | KL from tiny/chat | tokens | end | answers | CPU s |")
    print("|---|---|---|---|---|---|---|---|")
    for name in METHODS | EXTRA:
        ends = [result["points"][-1] for result in results if result["name"] == name]
        if ends:
            each = ", ".join(f"{end['sampled']:.3f}" for end in ends)
            mean = {key: statistics.fmean(end[key] for end in ends) for key in ends[0]}
            print(f"| `{name}` | {each} | {mean['greedy']:.3f} | {mean['kl']:.2f} | "
                  f"{mean['length']:.1f} | {mean['stopped']:.3f} | {mean['answers']:.0f} | "
                  f"{mean['cpu_seconds']:.0f} |")


# ---- the pictures --------------------------------------------------------------------------------

def new_figure(rows, columns, width, height):
    """Axes [rows, columns] in the one style of all pictures, which half the size can be read in."""
    plt.rcParams.update({
        "font.size": 14, "lines.linewidth": 2, "lines.markersize": 8, "axes.grid": True,
        "grid.alpha": 0.3, "axes.spines.top": False, "axes.spines.right": False})
    return plt.subplots(rows, columns, figsize=(width, height), squeeze=False, layout="constrained")


def mean_points(results, name):
    """The points of a method, each the mean over its seeds; {} of lists, and all its ends."""
    runs = [result["points"] for result in results if result["name"] == name]
    steps = list(zip(*runs, strict=False))
    keys = runs[0][0] if runs else ()
    mean = {key: [statistics.fmean(p[key] for p in step) for step in steps] for key in keys}
    low = [min(p["sampled"] for p in step) for step in steps]
    high = [max(p["sampled"] for p in step) for step in steps]
    return mean, low, high, [points[-1] for points in runs]


def least_kl(right, start):
    """KL between coins: no policy that is right so often is nearer to one that was at the start.

    Whether an answer is right is a function of it, which loses KL, and KL is convex: the mean over
    the prompts is not below the KL of the means.
    """
    return sum(p * math.log(p / q) for p, q in ((right, start), (1 - right, 1 - start)) if p > 0)


def draw_frontier(results, file):
    """Accuracy against KL: how much right for how far from the start."""
    figure, axes = new_figure(1, 1, 9.5, 6.2)
    axis = axes[0, 0]
    start = next(result["points"][0]["sampled"] for result in results if result["name"] in METHODS)
    shares = [start + (1 - start) * i / 100 for i in range(101)]
    axis.plot([least_kl(share, start) for share in shares], shares, color="black", linewidth=1,
              label="the least KL possible")
    for family, (colour, names) in FAMILIES.items():
        axis.plot([], [], " ", label=family)
        for (name, label), (marker, line) in zip(names.items(), FORMS, strict=False):
            mean, _, _, ends = mean_points(results, name)
            if ends:
                axis.plot(mean["kl"], mean["sampled"], line, color=colour, linewidth=1.2,
                          marker=marker, markersize=4)
                axis.plot([end["kl"] for end in ends], [end["sampled"] for end in ends], marker,
                          color=colour, markeredgecolor="white", markersize=11, label="  " + label)
    axis.set(xlabel="KL from tiny/chat on held-out prompts (nats per answer)", ylabel=RIGHT)
    axis.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    save_figure(figure, file)


def draw_curves(results, x, label, file):
    """Accuracy against what was spent: a panel a family, all others in grey behind it."""
    figure, axes = new_figure(2, 2, 10, 7.8)
    everyone = [name for _, names in FAMILIES.values() for name in names]
    for axis, (family, (colour, names)) in zip(axes.flat, FAMILIES.items(), strict=True):
        for name in everyone:
            mean, _, _, ends = mean_points(results, name)
            if ends and name not in names:
                axis.plot(mean[x], mean["sampled"], color="#cccccc", linewidth=1)
        for (name, method), (marker, line) in zip(names.items(), FORMS, strict=False):
            mean, low, high, ends = mean_points(results, name)
            if ends:
                axis.fill_between(mean[x], low, high, color=colour, alpha=0.15, linewidth=0)
                axis.plot(mean[x], mean["sampled"], line, marker=marker, color=colour, label=method)
        axis.set_title(family)
        axis.legend(loc="center right")
    for axis in axes.flat:
        axis.set(xlabel=label, ylabel=RIGHT)
        axis.label_outer()
    for axis in axes.flat[1:]:
        axis.sharex(axes[0, 0])
        axis.sharey(axes[0, 0])
    save_figure(figure, file)


def draw_sick(results, picture, file):
    """The sick run beside its healthy one: blue dots, whole lines; red triangles, broken lines."""
    title, healthy, sick, panels = SICK[picture]
    figure, axes = new_figure(1, len(panels), 12.5, 4.6)
    for axis, (source, key, label) in zip(axes.flat, panels, strict=True):
        for (name, said), colour, marker, line in ((*healthy,), BLUE, "o", "-"), (
                (*sick,), RED, "^", "--"):
            for result in [x for x in results if x["name"] == name][:1]:
                points = result["points" if source == "held out" else "logged"]
                points = [p for p in points if p.get(key) is not None]
                axis.plot([p["step"] for p in points], [p[key] for p in points], line,
                          marker=marker if source == "held out" else "", color=colour, label=said)
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
    """All pictures."""
    draw_frontier(results, images / "frontier.png")
    draw_curves(results, "answers", "answers seen", images / "answers.png")
    draw_curves(results, "cpu_seconds", "CPU seconds of one core, loading included",
                images / "seconds.png")
    for picture in SICK:
        draw_sick(results, picture, images / f"{picture}.png")


def main(args):
    folder, images = Path(args.runs), Path(args.images)
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
        flags.error = common.fail
        main(flags.parse_args())
