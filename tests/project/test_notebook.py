"""notebooks/t4.ipynb, executed on a CPU with the tiny model, from `git clone` to the talk.

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
import traceback
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOK = ROOT / "notebooks/t4.ipynb"
TALK = "What is 40 - 27?\n/quit\n"


def sources(notebook):
    cells = json.loads(notebook.read_text())["cells"]
    return ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]


def command(line):
    """What `!line` does. Python starts as a copy of this process, which has torch and its kin."""
    words = shlex.split(line)
    if words[0] != "python":
        return subprocess.run(line, shell=True).returncode
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
    """Cell after cell, until one fails: also a command, at which IPython itself would go on."""
    from IPython.core.interactiveshell import InteractiveShell
    for name in ("bitsandbytes", "datasets", "peft", "torch"):  # in the order of common.py
        importlib.import_module(name)  # to import them eight times would take longest of all
    shell = InteractiveShell.instance(colors="NoColor")
    codes = []
    shell.system = lambda line: codes.append(command(shell.var_expand(line, depth=1)))
    for source in sources(notebook):
        print(f"\n>>> {source}", flush=True)
        shell.run_cell(source).raise_error()
        if any(codes):
            raise SystemExit(f"the command failed: {source}")


@pytest.fixture(scope="module")
def executed(tmp_path_factory):
    """What the notebook leaves and says, with the one variable and the address changed."""
    folder = tmp_path_factory.mktemp("notebook")
    shutil.copytree(ROOT, folder / "origin", ignore=shutil.ignore_patterns(
        ".*", "runs", "__pycache__", "benchmarks", "*.pt"))
    for line in ("init -q", "add .", "-c user.name=me -c user.email=me@here commit -qm all"):
        subprocess.run(["git", *line.split()], cwd=folder / "origin", check=True)
    text = NOTEBOOK.read_text()
    for old, new in (('MODEL = \\"Qwen/Qwen2.5-0.5B\\"', 'MODEL = \\"tiny/chat\\"'),
                     ("clone -q ADDRESS", f"clone -q {folder / 'origin'}")):
        assert text.count(old) == 1
        text = text.replace(old, new)
    (folder / "t4.ipynb").write_text(text)
    path = str(Path(sys.executable).parent) + os.pathsep + os.environ["PATH"]
    env = os.environ | {"PATH": path, "PIP_NO_INDEX": "1", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS":
                        "1", "IPYTHONDIR": str(folder / "ipython"), "PYTHONUNBUFFERED": "1"}
    done = subprocess.run([sys.executable, __file__, "t4.ipynb"], cwd=folder, env=env, input=TALK,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-3000:]
    return folder / "post-training", done.stdout


def test_the_notebook_runs_from_the_clone_to_the_talk(executed):
    """Each stage begins with the one before it, and the last is what one talks with."""
    folder, said = executed
    started = {"sft": "tiny/chat", "sft-dpo": "runs/sft", "sft-dpo-grpo": "runs/sft-dpo"}
    for run, start in started.items():
        summary = json.loads((folder / "runs" / run / "summary.json").read_text())
        assert summary["model"] == start and summary["step"] > 0
    assert (folder / "pairs.jsonl").read_text().count("\n") > 1
    assert (folder / "chain.png").read_bytes()[:4] == b"\x89PNG"
    assert (folder / "chain.html").exists()
    talk = said[said.index(">>> !python chat.py"):]
    assert len(re.findall(r"\d+ [-+] \d+ = \d+", talk)) == 2, talk  # an answer of each checkpoint


def test_the_pictures_are_inline(executed):
    assert "<IPython.core.display.Image object>" in executed[1]


@pytest.mark.parametrize("source", [s for s in sources(NOTEBOOK) if s.startswith("!python")])
def test_each_command_is_one_of_the_readme(source):
    """The README has the same script with the same kind of start, and all flags are real."""
    script = shlex.split(source[1:])[1]
    assert f"python {script}" in (ROOT / "README.md").read_text()
    options = runpy.run_path(str(ROOT / script))["flags"]._option_string_actions
    assert {word for word in shlex.split(source) if word.startswith("--")} <= options.keys()


def test_the_notebook_is_kept_without_outputs():
    """As committed: nothing executed, and nothing that only its writer's machine has."""
    cells = json.loads(NOTEBOOK.read_text())["cells"]
    assert all(not cell.get("outputs") and not cell.get("execution_count") for cell in cells)
    assert len({cell["id"] for cell in cells}) == len(cells)


if __name__ == "__main__":
    execute(Path(sys.argv[1]))
