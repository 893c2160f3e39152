"""experiments/compare.py: the scripts take its commands, its pictures show what was measured."""
import argparse
import importlib
import importlib.util
import json
import os
import runpy
import types

import pytest
import torch
from conftest import ROOT
from runs_helper import command, small_args, write_data

import common
import dpo
import grpo
import ppo
import reward_model
import sft

spec = importlib.util.spec_from_file_location("compare", ROOT / "experiments/compare.py")
compare = importlib.util.module_from_spec(spec)
spec.loader.exec_module(compare)
RUNS = compare.plan(argparse.Namespace(runs="r", seeds=[0, 1, 2]))


# ---- the plan ------------------------------------------------------------------------------------

def test_no_run_is_planned_twice_and_all_methods_have_all_seeds():
    folders = [str(run["folder"]) for run in RUNS]
    settings = [" ".join(run["training"]).partition(" --output-dir ")[0] for run in RUNS]
    assert len(set(folders)) == len(set(settings)) == len(RUNS)
    seeds = {}
    for run in RUNS:
        seeds.setdefault(run["name"], []).append(run["seed"])
    assert seeds == {name: [0, 1, 2] for name in compare.METHODS} | {
        name: [0] for name in compare.EXTRA}


@pytest.mark.parametrize("run", RUNS[:len(compare.METHODS | compare.EXTRA)],
                         ids=lambda run: run["name"])
def test_the_scripts_take_their_commands(run):
    """Their own parsers read every flag, and the run would write where it is looked for."""
    for words in filter(None, (run["training"], run["sampling"])):
        script = importlib.import_module(words[0].removesuffix(".py"))
        args = script.flags.parse_args(words[1:])
        assert args.seed == run["seed"] and "{" not in " ".join(words)
    assert run["training"][-1] == str(run["folder"]) == f"r/{run['name']}_{run['seed']}"
    if run["sampling"]:
        assert args.output in run["training"]  # what is sampled is what is trained on


def test_every_method_and_every_sick_run_is_drawn():
    drawn = [name for _, names in compare.FAMILIES.values() for name in names]
    assert sorted(drawn) == sorted(compare.METHODS)
    pairs = [(healthy[0], sick[0]) for _, healthy, sick, _ in compare.SICK.values()]
    assert {name for pair in pairs for name in pair} >= set(compare.EXTRA)
    for healthy, sick in pairs:
        both = [(compare.METHODS | compare.EXTRA)[name].split()[0] for name in (healthy, sick)]
        assert both[0] == both[1]


def test_labels_of_healthy_runs_are_the_defaults_of_the_scripts():
    said = {picture: healthy[1] for picture, (_, healthy, _, _) in compare.SICK.items()}
    assert said["sick_dpo_beta"] == f"β = {dpo.TINY['beta']:g}"
    assert said["sick_ppo_beta"] == f"β = {ppo.TINY['beta']:g}"
    assert float(said["sick_grpo_rate"].split()[-1]) == grpo.TINY["learning_rate"]
    rows = (ROOT / "tiny/data/sft_train.jsonl").read_text().count("\n")
    assert said["sick_sft_long"] == f"{rows} rows"


# ---- the runs ------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    write_data(folder)
    return folder


@pytest.mark.parametrize("script", [dpo, ppo], ids=lambda script: script.__name__)
def test_what_a_run_saves_to_go_on_becomes_its_checkpoints(script, data, tmp_path, monkeypatch):
    """Of PPO, too, whose states hold a critic; each is what the policy was at that step."""
    folder, seen = tmp_path / "run", {}
    save = script.save

    def keep(args, state, weights, optimizer, scaler):
        save(args, state, weights, optimizer, scaler)
        compare.keep_state(folder, 30, state["step"])
        compare.keep_state(folder, 30, 99)  # nothing new was saved, nothing is kept
        seen[state["step"]] = {name: p.clone() for name, p in weights.items()}

    compare.keep_state(folder, 0, 0)  # before there is anything
    monkeypatch.setattr(script, "save", keep)
    command(script.__name__, small_args(script.__name__, data, folder, max_steps=2, save_every=1))
    compare.keep_state(folder, 0, 0)  # and when it is gone
    states = compare.read_states(folder)
    assert {step: state["cpu_seconds"] for step, state in states.items()} == {1: 31, 2: 32}
    folders = compare.write_checkpoints(folder, states)
    assert folders == [str(folder / "steps" / step) for step in "12"]

    ids, logits = torch.arange(20, 30)[None], []
    model = common.load_model(str(folder))
    own = {name: p for name, p in model.named_parameters() if ".default." in name}
    for weights, name in zip(seen.values(), folders, strict=True):
        assert script is ppo or own.keys() == weights.keys()  # PPO's hold its critic, too
        for weight_name, p in own.items():
            p.data.copy_(weights[weight_name])
        merged = common.load_model(name, lora_rank=0, trainable=False)
        logits.append(merged(ids).logits)
        assert torch.allclose(logits[-1], common.causal_lm(model)(ids).logits, atol=1e-4)
    assert not torch.allclose(*logits, atol=1e-4)

    with pytest.raises(ValueError, match="nobody watched"):
        compare.write_checkpoints(folder, {1: states[1]})
    with pytest.raises(ValueError, match="not what it saved"):
        compare.write_checkpoints(folder, {2: states[1]})


@pytest.mark.parametrize("name", ["raft", "grpo"])
def test_what_is_done_is_not_done_again(name, tmp_path, monkeypatch):
    """Sampling, training and measuring, each of which is interrupted once; CPU seconds add up."""
    run, calls = dict(next(run for run in RUNS if run["name"] == name)), []
    folder = run["folder"] = tmp_path / "run"
    state = {"weights": {}, "cpu_seconds": 7.0}

    def call(words, _, watch=None):
        calls.append(words[0])
        if calls.count(words[0]) == 1:
            if watch:
                (folder / "states").mkdir(parents=True)
                torch.save(state, folder / "states/4.pt")
                os.utime(folder / "states/4.pt", (1, 1))
            raise ValueError("interrupted")
        if watch:
            torch.save({"step": 8, "weights": {}}, folder / "resume.pt")
            watch(5.0)
            (folder / "summary.json").touch()
        if words[0] == "evaluate.py":
            (folder / "steps").mkdir()
            lines = [{"checkpoint": x} for x in words[1:words.index("--output")]]
            (tmp_path / "run.measured.json").write_text(json.dumps(lines))
        return 3.0

    monkeypatch.setattr(compare, "call", call)
    monkeypatch.setattr(compare, "write_checkpoints", lambda folder, states: list("ab"))
    for script in run["sampling"][:1] + ["training", "evaluate.py"]:
        with pytest.raises(ValueError, match="interrupted"):
            compare.finish(run)
        assert not (tmp_path / "run.table.json").exists(), script
    compare.finish(run)
    scripts = {"raft": ["pairs.py", "sft.py"], "grpo": ["grpo.py"]}[name] + ["evaluate.py"]
    assert calls == [script for script in scripts for _ in "ab"]
    lines = json.loads((tmp_path / "run.table.json").read_text())
    assert [(line["checkpoint"], line["step"], line["cpu_seconds"]) for line in lines] == [
        ("tiny/chat", 0, 0), ("a", 4, 7), ("b", 8, 12)]
    assert not (folder / "steps").exists() and not (folder / "states").exists()


def test_what_several_runs_need_is_made_once(tmp_path, monkeypatch):
    """The preferred answers, as rows that sft.py reads; a reward model that ppo.py can load."""
    calls = []

    def call(words, folder):
        calls.append(words)
        folder.mkdir()
        (folder / "summary.json").touch()

    monkeypatch.setattr(compare, "call", call)
    compare.prepare(tmp_path)
    compare.prepare(tmp_path)
    assert len(calls) == 1 and calls[0][-1] == str(tmp_path / "blind")
    reward_model.flags.parse_args(calls[0][1:])
    rows = [json.loads(line) for line in (tmp_path / "chosen.jsonl").read_text().splitlines()]
    pairs = (ROOT / "tiny/data/preference_train.jsonl").read_text().splitlines()
    assert [row["completion"] for row in rows] == [json.loads(pair)["chosen"] for pair in pairs]
    assert sft.encode_conversation(rows[0], common.load_tokenizer("tiny/chat"), 64)
    few = (tmp_path / "few.jsonl").read_text().splitlines()
    assert few == (ROOT / "tiny/data/sft_train.jsonl").read_text().splitlines()[:300]
    commands = [" ".join(run["training"]) for run in RUNS]
    assert sum("--reward r/blind " in command for command in commands) == 2
    assert sum("--dataset r/chosen.jsonl " in command for command in commands) == 3


def test_a_run_that_fails_says_why(tmp_path, monkeypatch, capsys):
    (tmp_path / "bad.py").write_text("raise SystemExit('no disk')")
    (tmp_path / "good.py").write_text(
        "import os, time\nprint(os.environ['OMP_NUM_THREADS'])\n"
        "while time.process_time() < 0.5: pass")
    monkeypatch.setattr(compare, "ROOT", tmp_path)
    with pytest.raises(ValueError, match="python bad.py --x: no disk"):
        compare.call(["bad.py", "--x"], tmp_path / "run")
    watched = []
    assert 0.2 < compare.call(["good.py"], tmp_path / "run", watched.append) < 1
    assert (tmp_path / "run.log").read_text().endswith("$ python good.py\n1\n")
    assert watched == sorted(watched) and "python good.py" in capsys.readouterr().out


def test_a_seed_that_is_no_number_is_refused(refused, monkeypatch):
    monkeypatch.setattr(compare.flags, "error", common.fail)
    assert "--seeds" in refused(compare.flags.parse_args, ["--seeds", "one"])


# ---- what they have reached ----------------------------------------------------------------------

def test_answers_and_seconds_add_up_along_the_way(tmp_path, refused):
    """RAFT's samples are answers, too, and cost seconds before the first step."""
    folder = tmp_path / "raft_0"
    folder.mkdir()
    figures = {"sampled": 0.5, "greedy": 1.0, "kl": None, "length": 11.0, "stopped": 1.0}
    lines = [figures | {"step": 0, "cpu_seconds": 0.0}]
    lines += [figures | {"step": step, "kl": 0.1 * step, "cpu_seconds": step} for step in (2, 3)]
    (tmp_path / "raft_0.table.json").write_text(json.dumps(lines))
    (tmp_path / "raft_0.sampling.json").write_text('{"cpu_seconds": 40}')
    (folder / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}\n')
    summary = {"method": "sft", "batch_size": 32, "model": "tiny/chat"}
    (folder / "summary.json").write_text(json.dumps(summary))
    sampling = "pairs.py --size 10 --samples 4".split()
    run = {"name": "raft", "seed": 0, "folder": folder, "training": ["sft.py", "--seed", "0"]}
    (tmp_path / "raft_0.log").write_text("$ python sft.py --seed 0\n")
    points = compare.read_run(run | {"sampling": sampling})["points"]
    assert [p["answers"] for p in points] == [0, 40, 40 + 64, 40 + 96]
    assert [p["cpu_seconds"] for p in points] == [0, 40, 42, 43]
    assert [p["kl"] for p in points] == [0, 0, 0.2, pytest.approx(0.3)]
    assert [p["answers"] for p in compare.read_run(run | {"sampling": []})["points"]] == [0, 64, 96]
    (folder / "summary.json").write_text(json.dumps(summary | {"model": "tiny/base"}))
    points = compare.read_run(run | {"sampling": []})["points"]  # tiny/chat is not its start
    assert [p["step"] for p in points] == [2, 3]
    said = refused(compare.read_run, run | {"sampling": [], "training": ["sft.py"]})
    assert "another command" in said
    each = {"dpo": 64, "online_dpo": 64, "kto": 32, "ppo": 32, "grpo": 32 * 8, "sft": 32}
    for method, count in each.items():
        summary = {"method": method, "batch_size": 32, "group_size": 8}
        assert compare.answers_per_step(summary) == count


def test_the_least_kl_is_that_of_tilting_each_prompt_alike():
    """Below the KL of any policy over some prompts; reached where all prompts are equally hard."""
    torch.manual_seed(0)
    old, new = torch.rand(2, 5, 4).softmax(-1)  # [5 prompts, 4 answers], of which two are right
    kl = (new * (new / old).log()).sum(-1).mean().item()
    least = compare.least_kl(new[:, :2].sum(-1).mean().item(), old[:, :2].sum(-1).mean().item())
    assert 0 < least < kl
    tilted = old[:1] * torch.tensor([3.0, 3, 1, 1])
    tilted /= tilted.sum()
    kl = (tilted * (tilted / old[:1]).log()).sum().item()
    shares = tilted[0, :2].sum().item(), old[0, :2].sum().item()
    assert compare.least_kl(*shares) == pytest.approx(kl, abs=1e-6)
    assert compare.least_kl(1.0, 0.5) == pytest.approx(0.6931, abs=1e-4)


@pytest.fixture
def results():
    """Four points of every planned run; a number for each that follows from method and seed."""
    made = []
    for run in RUNS:
        i = list(compare.METHODS | compare.EXTRA).index(run["name"]) + 0.1 * run["seed"]
        keys = {key for _, _, _, panels in compare.SICK.values() for _, key, _ in panels}
        keys |= {"answers", "cpu_seconds", "greedy", "stopped"}
        points = [dict.fromkeys(keys, i + step) | {"step": step} for step in range(4)]
        points[0]["sampled"] = 0.5  # tiny/chat
        logged = points if run["training"][0] != "ppo.py" else [
            p | {"rollout_seconds": 1} for p in points]
        made.append({"name": run["name"], "seed": run["seed"], "points": points, "logged": logged})
    return made


def test_pictures_show_all_methods_with_units_on_their_axes(results, tmp_path, monkeypatch):
    figures, save = {}, compare.save_figure

    def keep(figure, file):
        figures[file.stem] = figure
        if file.stem in ("frontier", "sick_sft_long"):  # the rest would take seconds
            save(figure, file)

    monkeypatch.setattr(compare, "save_figure", keep)
    compare.draw(results, tmp_path)
    assert set(figures) == {"frontier", "answers", "seconds", *compare.SICK}
    assert sorted(file.name for file in tmp_path.iterdir()) == ["frontier.png", "sick_sft_long.png"]
    assert all(file.read_bytes()[:4] == b"\x89PNG" for file in tmp_path.iterdir())

    axis = figures["frontier"].axes[0]
    assert "KL" in axis.get_xlabel() and "nats" in axis.get_xlabel()
    assert axis.get_ylabel() == compare.RIGHT
    labels = [label for _, names in compare.FAMILIES.values() for label in names.values()]
    ends = {line.get_label().strip(): line for line in axis.lines}
    assert set(labels) < set(ends)
    i = list(compare.METHODS).index("kto")
    assert ends["KTO"].get_xdata() == pytest.approx([i + 3, i + 3.1, i + 3.2])  # an end per seed

    for name, unit in ("answers", "answers seen"), ("seconds", "CPU seconds"):
        axes = figures[name].axes
        assert len(axes) == 4 and unit in axes[2].get_xlabel() and unit in axes[3].get_xlabel()
        assert axes[0].get_ylabel() == axes[2].get_ylabel() == compare.RIGHT
        drawn = {line.get_label(): line for axis in axes for line in axis.lines}
        assert set(labels) < set(drawn)
        assert list(drawn["KTO"].get_ydata()) == pytest.approx(
            [0.5, *(i + step + 0.1 for step in (1, 2, 3))])

    for name, (_, healthy, sick, panels) in compare.SICK.items():
        assert [axis.get_ylabel() for axis in figures[name].axes] == [panel[2] for panel in panels]
        for axis in figures[name].axes:
            assert axis.get_xlabel() == ("rollout" if "ppo" in name else "optimizer step")
            for line, (run, label) in zip(axis.lines, (healthy, sick), strict=True):
                i = list(compare.METHODS | compare.EXTRA).index(run)
                assert line.get_label() == label
                assert list(line.get_ydata())[1:] == [i + 1, i + 2, i + 3]


def test_families_differ_by_colour_and_methods_by_marker_and_line():
    colours = [colour for colour, _ in compare.FAMILIES.values()]
    assert len(set(colours)) == len(colours) == 4
    assert len(set(compare.FORMS)) == 3 >= max(len(x) for _, x in compare.FAMILIES.values())
    assert len({marker for marker, _ in compare.FORMS}) == len({x for _, x in compare.FORMS}) == 3


def test_results_are_written_with_date_and_versions_and_printed(results, tmp_path, capsys):
    compare.write_results(results, tmp_path / "compare.json")
    written = json.loads((tmp_path / "compare.json").read_text())
    assert written["torch"] == torch.__version__ and len(written["date"]) == 10
    assert [run["points"] for run in written["runs"]] == [run["points"] for run in results]
    assert all("logged" not in run for run in written["runs"])
    assert written["runs"][2]["command"] == "python dpo.py --save-every 40 --seed 0"
    compare.show_table(results)
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| `")]
    assert len(rows) == len(compare.METHODS | compare.EXTRA)
    i = list(compare.METHODS).index("kto")
    assert f"| `kto` | {i + 3:.3f}, {i + 3.1:.3f}, {i + 3.2:.3f} | {i + 3.1:.3f} |" in rows[i]


def test_the_length_bug_pays_without_end():
    work_shown = types.SimpleNamespace(**runpy.run_path(
        ROOT / "experiments/length_bug.py")).work_shown
    assert work_shown(["q"] * 3, ["", "4", "4" * 100]) == pytest.approx([0, 0.1, 10])
