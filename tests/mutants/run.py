"""Deliberate mistakes, each with the tests that must notice it: whether the tests can fail.

    python tests/mutants/run.py                # all of them
    python tests/mutants/run.py dpo kto:3      # those of dpo.toml, and the third of kto.toml
    python tests/mutants/run.py --check        # only whether each can still be made

They are mistakes that a competent engineer makes: a proven function is handed the wrong tensor, a
mean is over the wrong thing, an adapter, a detach or a lock is forgotten. A mistake in a .toml file
of this folder is one text of a script in place of another:

    [[mistake]]
    what = "what is wrong"
    tests = "dpo: EXPRESSION"    # for pytest -k in test_dpo.py; without it, all of the file
    old = 'text that stands exactly once in the script'
    new = 'text that takes its place'
    file = "plot.py"             # if it is not the script after which the .toml file is named
    equivalent = "why no test can notice it"

The program copies the project to a temporary folder, makes one mistake at a time there and runs its
tests in a process that is forked from one that has imported the libraries. It ends with exit code 1
if a mistake without `equivalent` goes unnoticed, or can no longer be made.
"""
import contextlib
import importlib
import logging
import os
import shutil
import signal
import sys
import tempfile
import time
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
LIMIT = 400  # seconds; a mistake that makes its tests hang is noticed too
SLOW_IMPORTS = "bitsandbytes datasets hypothesis peft pytest torch transformers.models.qwen2"


def read_mistakes(wanted):
    """[(name, mistake)]: all, or those of a file ("dpo") or single ones ("dpo:3")."""
    mistakes = []
    for path in sorted(Path(__file__).parent.glob("*.toml")):
        table = tomllib.loads(path.read_text())["mistake"]
        for number, mistake in enumerate(table, 1):
            name = f"{path.stem}:{number}"
            if not wanted or {path.stem, name} & set(wanted):
                mistakes.append((name, {"file": f"{path.stem}.py"} | mistake))
    return mistakes


def mutated(mistake, folder=ROOT):
    """The text of the script with the mistake in it, or None if it cannot be made."""
    text = (folder / mistake["file"]).read_text()
    changed = text.replace(mistake["old"], mistake["new"])
    return changed if text.count(mistake["old"]) == 1 and changed != text else None


def run_tests(folder, tests, limit=LIMIT):
    """Runs "FILE: EXPRESSION" in a process of its own: "passed", "failed" or what else it was."""
    name, _, expression = tests.partition(": ")
    log = folder / "log.txt"
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        os.setsid()
        signal.alarm(limit)
        os.chdir(folder)
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(output, 1)
        os.dup2(output, 2)
        sys.dont_write_bytecode = True
        flags = ["-x", "-n", "0", "-p", "no:cacheprovider", "--tb=short", "-k", expression]
        files = [str(path) for path in Path("tests").rglob(f"test_{name}.py")]
        os._exit(importlib.import_module("pytest").main([*flags, *files]))
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)  # processes that the tests left
    if code == -signal.SIGALRM:
        return "hangs"
    if code == 0 and " passed" not in log.read_text(errors="replace"):
        return "skipped"
    return {0: "passed", 1: "failed"}.get(code, f"no such tests, exit code {code}")


def check_unchanged(folder, mistakes):
    """The tests must pass without any mistake, or that they fail with one says nothing."""
    expressions = {}
    for _, mistake in mistakes:
        name, _, expression = mistake["tests"].partition(": ")
        expressions.setdefault(name, set()).add(f"({expression})" if expression else "")
    results = []
    for name, parts in expressions.items():
        expression = "" if "" in parts else " or ".join(sorted(parts))
        results.append(run_tests(folder, f"{name}: {expression}", 3600))
        print(f"unchanged  test_{name}.py: {results[-1]}", flush=True)
        if results[-1] != "passed":
            print((folder / "log.txt").read_text(errors="replace")[-1500:])
    return set(results) == {"passed"}


def copy_project(folder):
    folder.mkdir()
    (folder.parent / "shared").symlink_to(ROOT.parent / "shared")  # which some tests need
    for path in ROOT.glob("[!.]*"):
        if path.is_file():
            shutil.copy(path, folder)
    for part in "tests", "checks", "tiny", "examples", "docs":
        shutil.copytree(ROOT / part, folder / part, ignore=shutil.ignore_patterns("__pycache__"))


def make_and_notice(mistakes, folder):
    """Makes each mistake in the copy and runs its tests; returns those that went unnoticed."""
    unnoticed = []
    for name, mistake in mistakes:
        began, changed, result = time.time(), mutated(mistake, folder), "CANNOT BE MADE"
        if changed is not None:
            file = folder / mistake["file"]
            text = file.read_text()
            file.write_text(changed)
            result = run_tests(folder, mistake["tests"])
            file.write_text(text)
        if result not in ("failed", "hangs"):
            unnoticed.append((name, mistake, result))
        result = {"failed": "noticed", "passed": "UNNOTICED"}.get(result, result)
        seconds = time.time() - began
        print(f"{name:<18} {result:<9} {seconds:4.0f} s  {mistake['what']}", flush=True)
    return unnoticed


def main():
    mistakes = read_mistakes([word for word in sys.argv[1:] if word != "--check"])
    unnoticed = [(name, mistake, "CANNOT BE MADE") for name, mistake in mistakes
                 if mutated(mistake) is None]
    good = not unnoticed
    if "--check" not in sys.argv:
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
        os.environ.setdefault("OMP_NUM_THREADS", "1")
        logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # as in common.py
        for module in SLOW_IMPORTS.split():  # once, before forking
            importlib.import_module(module)
        sys.modules["torch"].set_num_threads(1)
        with tempfile.TemporaryDirectory() as place:
            folder = Path(place, "copy")
            copy_project(folder)
            good = check_unchanged(folder, mistakes) and good
            unnoticed = make_and_notice(mistakes, folder)
    for name, mistake, result in unnoticed:
        reason = mistake.get("equivalent", "unexplained")
        print(f"\n{name}, {mistake['what']}: {result}\n    {reason}")
        good = good and "equivalent" in mistake
    print(f"\n{len(mistakes)} mistakes, of which {len(unnoticed)} went unnoticed or are lost")
    sys.exit(0 if good else 1)


if __name__ == "__main__":
    main()
