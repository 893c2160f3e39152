"""notebooks/t4.ipynb, executed on a CPU with the tiny model, from `git clone` to the chat.

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

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOK = ROOT / "notebooks/t4.ipynb"


def sources(notebook):
    cells = json.loads(notebook.read_text())["cells"]
    return ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]


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

    def system(line):
        shell.user_ns["_exit_code"] = command(shell.var_expand(line, depth=2))

    shell.system = system
    for source in sources(notebook):
        print(f"\n>>> {source}", flush=True)
        shell.run_cell(source).raise_error()


def run_notebook(folder, *replacements):
    """Executes the notebook in a folder, with some text replaced; returns the finished process."""
    text = NOTEBOOK.read_text()
    for old, new in replacements:
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    (folder / "t4.ipynb").write_text(text)
    path = str(Path(sys.executable).parent) + os.pathsep + os.environ["PATH"]
    env = os.environ | {"PATH": path, "PIP_NO_INDEX": "1", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS":
                        "1", "IPYTHONDIR": str(folder / "ipython"), "PYTHONUNBUFFERED": "1"}
    return subprocess.run([sys.executable, __file__, "t4.ipynb"], cwd=folder, env=env, text=True,
                          input="What is 40 - 27?\n/quit\n", stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT, timeout=300)


def test_the_notebook_runs_from_the_clone_to_the_chat(tmp_path):
    """Each stage starts from the one before it, and the last one answers in the chat."""
    shutil.copytree(ROOT, tmp_path / "origin", ignore=shutil.ignore_patterns(
        ".*", "runs", "__pycache__", "benchmarks", "*.pt"))
    for line in ("init -q", "add .", "-c user.name=me -c user.email=me@here commit -qm all"):
        subprocess.run(["git", *line.split()], cwd=tmp_path / "origin", check=True)
    done = run_notebook(tmp_path, ('MODEL = \\"Qwen/Qwen2.5-0.5B\\"', 'MODEL = \\"tiny/chat\\"'),
                        ('\\"ADDRESS\\"', f'\\"{tmp_path / "origin"}\\"'))
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


def test_a_command_that_fails_stops_the_notebook_with_one_line(tmp_path):
    """Here `git clone` fails, because the address is not filled in."""
    done = run_notebook(tmp_path)
    assert done.returncode != 0 and "Stopped: this command failed" in done.stdout
    assert "pip install" not in done.stdout


def test_the_notebook_is_kept_without_outputs():
    cells = json.loads(NOTEBOOK.read_text())["cells"]
    assert all(not cell.get("outputs") and not cell.get("execution_count") for cell in cells)
    assert len({cell["id"] for cell in cells}) == len(cells)


if __name__ == "__main__":
    execute(Path(sys.argv[1]))
