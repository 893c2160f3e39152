"""The notebooks, executed on a CPU with the tiny models, with stubs and solutions as the exercises.

    python tests/project/test_notebook.py NOTEBOOK    # executes a notebook as IPython does
"""
import importlib
import json
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import textwrap
import traceback
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
T4 = ROOT / "notebooks/t4.ipynb"
EXERCISES = ROOT / "notebooks/exercises.ipynb"
# Also what the commands of the README leave in a checkout.
LEFT_OUT = shutil.ignore_patterns(".*", "runs", "__pycache__", "benchmarks", "*.pt", "pairs.jsonl",
                                  "own.jsonl", "ai.jsonl", "both.*")


def sources(notebook, *replacements):
    """The code cells of a notebook, with some text replaced."""
    cells = json.loads(notebook.read_text())["cells"]
    cells = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    for old, new in replacements:
        assert "".join(cells).count(old) == 1, old
        cells = [cell.replace(old, new) for cell in cells]
    return cells


def command(line):
    """Runs a line as `!line` does. Python is a fork of this process, which has the libraries."""
    words = shlex.split(line)
    if words[0] != "python":
        return subprocess.run(line, shell=True).returncode
    for name in ("bitsandbytes", "datasets", "peft", "torch"):  # in the order of common.py
        importlib.import_module(name)  # once: eight imports would take most of the time
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    code = 1
    try:
        sys.argv = words[1:]
        sys.path.insert(0, os.getcwd())  # where python looks first for what a script imports
        runpy.run_path(sys.argv[0], run_name="__main__")
        code = 0
    except SystemExit as exit:
        code = exit.code or 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(code)


def execute(notebook):
    """Runs cell after cell until one of them raises an error."""
    from IPython.core.interactiveshell import InteractiveShell
    shell = InteractiveShell.instance(colors="NoColor")
    sys.path.insert(0, "")  # the current folder, as in a kernel

    def system(line):
        shell.user_ns["_exit_code"] = command(shell.var_expand(line, depth=2))

    shell.system = system
    for source in sources(notebook):
        print(f"\n>>> {source}", flush=True)
        shell.run_cell(source).raise_error()


def run_cells(folder, cells):
    """Executes cells as a notebook in a folder; returns the finished process."""
    cells = [{"cell_type": "code", "source": [cell]} for cell in cells]
    (folder / "cells.ipynb").write_text(json.dumps({"cells": cells}))
    path = str(Path(sys.executable).parent) + os.pathsep + os.environ["PATH"]
    env = os.environ | {"PATH": path, "PIP_NO_INDEX": "1", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS":
                        "1", "IPYTHONDIR": str(folder / "ipython"), "PYTHONUNBUFFERED": "1"}
    return subprocess.run([sys.executable, __file__, "cells.ipynb"], cwd=folder, env=env, text=True,
                          input="What is 40 - 27?\n/quit\n", stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT, timeout=300)


def test_the_notebook_runs_from_the_clone_to_the_chat(tmp_path):
    """Each stage starts from the one before it, and the last one answers in the chat."""
    shutil.copytree(ROOT, tmp_path / "origin", ignore=LEFT_OUT)
    for line in ("init -q", "add .", "-c user.name=me -c user.email=me@here commit -qm all"):
        subprocess.run(["git", *line.split()], cwd=tmp_path / "origin", check=True)
    done = run_cells(tmp_path, sources(T4, ("MODEL = \"Qwen/Qwen2.5-0.5B", "MODEL = \"tiny/chat"),
                                       ("ADDRESS", str(tmp_path / "origin"))))
    assert done.returncode == 0, done.stdout[-3000:]
    folder = tmp_path / "post-training"
    started = {"sft": "tiny/chat", "sft-dpo": "runs/sft", "sft-dpo-grpo": "runs/sft-dpo"}
    for run, start in started.items():
        summary = json.loads((folder / "runs" / run / "summary.json").read_text())
        assert summary["model"] == start and summary["step"] > 0
    assert (folder / "chain.png").read_bytes()[:4] == b"\x89PNG"
    assert (folder / "chain.html").exists()
    assert "<IPython.core.display.Image object>" in done.stdout
    chat = done.stdout[done.stdout.index(">>> !python chat.py"):]
    assert len(re.findall(r"\d+ [-+] \d+ = \d+", chat)) == 2, chat  # one answer per checkpoint


@pytest.mark.parametrize("notebook", [T4, EXERCISES], ids=lambda path: path.stem)
def test_a_command_that_fails_stops_the_notebook_with_one_line(notebook, tmp_path):
    """Here `git clone` fails, because the address is not filled in."""
    done = run_cells(tmp_path, sources(notebook))
    assert done.returncode != 0 and "Stopped: this command failed" in done.stdout
    assert "pip install" not in done.stdout


def test_stubs_are_rejected_and_solutions_become_scripts_that_train(tmp_path):
    """All cells are run with the stubs first; then a student solves one exercise after another."""
    from test_exercise import RIGHT, exercise, grading
    shutil.copytree(ROOT, tmp_path / "post-training", ignore=LEFT_OUT)
    quick = ".py --max-steps 1 --eval-size 4 --dataset tiny/data/{}_heldout.jsonl"
    cells = sources(
        EXERCISES, ("!git clone -q {REPOSITORY} post-training", ""),
        ("!python exercises/my_sft.py", "!python exercises/my_sft" + quick.format("sft")),
        ("my_reward_model.py", "my_reward_model" + quick.format("preference")))
    first, last = [next(i for i, cell in enumerate(cells) if cell.startswith(start))
                   for start in ("def with_mask", "def write_script")]
    solved = []
    for stub, check in zip(cells[first:last:2], cells[first + 1:last:2], strict=True):
        name = re.match(r'solved\["(.*?)"\]', check)[1]
        script, _, function = name.partition(".")
        source = grading.source_of(script)
        # A stub that has drifted is mended by pasting that of exercise.py into its cell.
        assert stub == exercise.function_of(exercise.blanked(source, name), function)
        solution = exercise.function_of(source, function)
        if script == "sft":  # in another form
            body = textwrap.indent(RIGHT[name].strip(), "    ")
            solution = stub.partition("    # Exercise")[0] + body
        solved += [solution, check]
    early = [cells[last], 'write_script("sft", exercise.blanked)']
    early = [f"try:\n{textwrap.indent(cell, '    ')}\nexcept Stopped as why:\n    print(why)"
             for cell in early]
    done = run_cells(tmp_path, [*cells[:last], *early, *solved, *cells[last:]])
    assert done.returncode == 0, done.stdout[-3000:]
    said = [part for part in done.stdout.split("\n>>> ") if part.startswith("solved[")]
    assert len(said) == 10
    for stub, solution in zip(said[:5], said[5:], strict=True):
        assert "✗ nothing is written yet in line " in stub and "✓" not in stub
        assert "✗" not in solution and solution.count("✓") >= 3
    assert "sft.with_mask is not solved yet" in done.stdout
    assert "sft.blanked was imported from exercise" in done.stdout
    folder = tmp_path / "post-training/exercises"
    for script in "sft", "reward_model":
        assert (folder / f"runs/my_{script}/summary.json").exists()
    assert RIGHT["sft.token_logps"].strip().splitlines()[1] in (folder / "my_sft.py").read_text()
    assert (folder / "mine.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize("notebook", [T4, EXERCISES], ids=lambda path: path.stem)
def test_the_notebook_is_kept_without_outputs(notebook):
    cells = json.loads(notebook.read_text())["cells"]
    assert all(not cell.get("outputs") and not cell.get("execution_count") for cell in cells)
    assert len({cell["id"] for cell in cells}) == len(cells)


if __name__ == "__main__":
    execute(Path(sys.argv[1]))
