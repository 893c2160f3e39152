"""How `python exercise.py --check` grades a file: its properties, in sentences with numbers."""
import contextlib
import functools
import linecache
import math
import os
import sys
import threading
import time
import tomllib
import traceback
import types
from pathlib import Path

import numpy as np
import properties
import torch

import common

ROOT = Path(__file__).resolve().parents[1]
CATALOGUE = tomllib.loads((ROOT / "checks/catalogue.toml").read_text(encoding="utf-8"))
SCRIPTS = list(dict.fromkeys(name.partition(".")[0] for name in CATALOGUE))
LIMIT = 15  # CPU seconds that a check may take; a correct solution takes a fraction of one


def script_of(name):
    return name.partition(".")[0]


def source_of(script):
    return (ROOT / f"{script}.py").read_text(encoding="utf-8")


def functions_of(name):
    """The names of the functions that belong to an exercise; the first is the one to call."""
    entry = CATALOGUE[name]
    return [entry.get("function", name.partition(".")[2]), *entry.get("also", [])]


def read_text(path):
    """The text of the student's file. Some editors begin it with a byte-order mark."""
    with common.phase(f"reading {path}"):
        return path.read_text(encoding="utf-8-sig")


def save_text(path, text):
    """Writes atomically: a killed program leaves either the old file or the new one."""
    with common.phase(f"writing {path}"):
        path.parent.mkdir(exist_ok=True)
        path.with_suffix(".new").write_text(text, encoding="utf-8")
        path.with_suffix(".new").replace(path)


class Refused(Exception):
    """What the student's code did, in a sentence."""


GUARD = {"on": False, "installed": False}
PROGRAMS = {"subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.spawn"}


def watch(event, details):
    """An audit hook that keeps the student's code from the solved scripts during a check."""
    if GUARD["on"] and event == "open" and isinstance(details[0], str | bytes):
        path = Path(os.path.realpath(os.fsdecode(details[0])))
        if path.name.partition(".")[0] in SCRIPTS and path.parent in (ROOT, ROOT / "__pycache__"):
            raise Refused(f"your file reads {path.name}, which holds the solution: the check keeps "
                         "it out")
    if GUARD["on"] and event in PROGRAMS:
        raise Refused("your file starts another program: the check does not allow it")


@contextlib.contextmanager
def guarded():
    """Inside, the solved scripts can be neither imported nor read."""
    if not GUARD["installed"]:
        sys.addaudithook(watch)
        GUARD["installed"] = True
    hidden = [*SCRIPTS, "exercise", "grading", "properties", "questions"]
    loaded = {name: sys.modules.pop(name, None) for name in hidden}
    sys.modules.update(dict.fromkeys(hidden))  # None: an import fails
    GUARD["on"] = True
    try:
        yield
    finally:
        GUARD["on"] = False
        for name, module in loaded.items():
            del sys.modules[name]
            if module:
                sys.modules[name] = module


def not_none(function):
    """The function, except that its result may not be None."""
    @functools.wraps(function)
    def call(*args, **kwargs):
        result = function(*args, **kwargs)
        if result is None:
            raise Refused(f"{function.__name__} returns None: is a `return` missing?")
        return result
    return call


def load(source, path):
    """A module from the text of a script. Its __name__ is not __main__, so it does not train."""
    module = types.ModuleType(Path(path).stem)
    module.__file__ = str(path)
    exec(compile(source, str(path), "exec"), vars(module))
    return module


def show(value):
    """A number, a word, a short list or tensor as text."""
    if isinstance(value, torch.Tensor):
        value = value.detach().tolist()
    if isinstance(value, float):
        return f"{value + 0.0:.3{'f' if abs(value) >= 5e-4 else 'g'}}".replace("-", "−")
    if isinstance(value, list | tuple) and len(str(value)) < 400:
        inner = ", ".join(map(show, value))
        return inner if len(value) == 1 else f"[{inner}]"
    return f"{value:.200}" if isinstance(value, str) else f"{value!r:.200}"


def is_right(said, answer):
    """Whether an answer is the correct word, or a number within 2% or 0.01 of the correct one."""
    if isinstance(answer, str):
        return said.strip().lower() == answer
    try:
        number = float(said.replace("−", "-"))
    except ValueError:
        return False
    return math.isclose(number, answer, rel_tol=0.02, abs_tol=0.01)


def difference(ours, true, tolerance=1e-9):
    """Why `ours` is not `true`, in words; None if it is, up to rounding."""
    if isinstance(ours, torch.Tensor):
        # Numbers of Python are float64, as the inputs of most properties are.
        true = torch.as_tensor(np.asarray(true) if isinstance(true, list | float) else true)
        true = true.detach()
        if ours.shape != true.shape:
            return f"yours has the shape {list(ours.shape)}, not {list(true.shape)}"
        if ours.dtype != true.dtype:
            return (f"yours has the dtype {ours.dtype}, not {true.dtype}: is it converted, or "
                    "created without a dtype?")
        if torch.allclose(ours.detach().double(), true.double(), tolerance, tolerance):
            return None
        differ = ~torch.isclose(ours.detach().double(), true.double(), tolerance, tolerance)
        if ours.numel() > 6:
            place = differ.nonzero()[0].tolist()
            return f"yours is {show(ours[tuple(place)])} at {place}, not {show(true[tuple(place)])}"
        return f"yours is {show(ours)}" + ("" if ours.isfinite().all() else ", which is not finite")
    if isinstance(true, torch.Tensor):
        return f"yours is not a tensor but a {type(ours).__name__}"
    if isinstance(ours, float | int) and isinstance(true, float | int):
        same = math.isclose(ours, true, rel_tol=tolerance, abs_tol=tolerance)
    else:
        same = ours == true
    kind = "the list " if isinstance(ours, list) else ""
    return None if same else f"yours is {kind}{show(ours)}"


def complaint(error, source, path):
    """An exception in a sentence, with the line of the student's file."""
    frames = [frame.lineno for frame in traceback.extract_tb(error.__traceback__)
              if frame.filename == str(path)]
    code = source.splitlines()[frames[-1] - 1].strip() if frames else ""
    line = f" in line {frames[-1]}, `{code}`" if frames else ""
    said = f"{type(error).__name__}: {str(error) or 'no reason given'}".splitlines()[0]
    if isinstance(error, Refused):
        return f"{error}{line}"
    if isinstance(error, NotImplementedError):
        return f"nothing is written yet{line}"
    if isinstance(error, ModuleNotFoundError) and "None in sys.modules" in str(error):
        return f"your file imports {error.name}{line}, which the check does not allow"
    if isinstance(error, SyntaxError):
        return f"line {error.lineno} is not Python: {error.msg}"
    if not frames:
        return (f"it cannot be called, or its result cannot be used ({said}): what does the "
                "docstring say?")
    return f"your file raises {said}{line}"


def grade(name, source, path, function=None):
    """The properties of an exercise: [(sentence, complaint or None, the student's value)].

    `function`, from a notebook, takes the place of the one in the source.
    """
    graded = []
    try:
        with guarded():
            module = load(source, path)
            main = functions_of(name)[0]
            if main not in vars(module):
                raise Refused(f"the file has no function {main} any more")
            setattr(module, main, not_none(function or getattr(module, main)))
            found = getattr(properties, name.replace(".", "_"))(module)
            for sentence, ours, true, *tolerance in found:
                said = difference(ours, true, *tolerance)
                if isinstance(ours, torch.Tensor):
                    ours = ours.detach().clone()
                graded.append((sentence.format(show(true)), said, ours))
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # also SystemExit, in the student's file
        cell = linecache.getlines(function.__code__.co_filename) if function else []
        if cell:  # the lines to name are those of the notebook
            source, path = "".join(cell), function.__code__.co_filename
        graded.append(("", complaint(error, source, path), type(error).__name__))
    return graded


def mistake_of(script, what):
    """The original script with a mistake of tests/mutants/ planted in it."""
    path = ROOT / f"tests/mutants/{script}.toml"
    table = tomllib.loads(path.read_text(encoding="utf-8"))["mistake"]
    mistake = next(entry for entry in table if entry["what"] == what and "file" not in entry)
    source = source_of(script)
    assert source.count(mistake["old"]) == 1, f"{what!r} cannot be planted any more"
    return source.replace(mistake["old"], mistake["new"]), mistake


def behaves_like(name, graded):
    """The planted mistakes that give the same values, at all inputs of the properties."""
    script = script_of(name)
    same = []
    for what in CATALOGUE[name]["mistakes"]:
        source, _ = mistake_of(script, what)
        other = grade(name, source, ROOT / f"{script}.py")
        values = [x[2] for x in graded], [x[2] for x in other]
        if len(graded) == len(other) and all(
                difference(ours, theirs, 1e-6) is None for ours, theirs in zip(*values, strict=True)
                if ours is not theirs):
            same.append(what)
    return same


def report(name, graded):
    """Prints the properties, and what the student's version behaves like; whether all hold."""
    wrong = [said for _, said, _ in graded if said]
    for sentence, said, _ in graded:
        print(f"✗ {sentence}; {said}" if said and sentence else f"✗ {said}" if said
              else f"✓ {sentence}")
    if wrong and graded[-1][0]:
        for what in behaves_like(name, graded):
            print(f"\nYour version behaves like this mistake: {what}.")
    return not wrong


def check(name, function):
    """For notebooks: prints the properties of a function; returns whether all hold."""
    script = script_of(name)
    if function.__module__ in SCRIPTS:
        return report(name, [("", f"this is the original, imported from {script}.py", "")])
    return report(name, grade(name, source_of(script), ROOT / f"{script}.py", function))


@contextlib.contextmanager
def time_limit(path, seconds=LIMIT):
    """Ends the program if its body takes too long, and prints where in the student's file it is.

    The limit is in CPU seconds, because other programs may keep the computer busy. Sleeping and
    waiting end after ten times as long.
    """
    done = threading.Event()
    began, began_cpu = time.monotonic(), time.process_time()

    def watch_time():
        while not done.wait(0.2):
            waited, used = time.monotonic() - began, time.process_time() - began_cpu
            if used > seconds or waited > 10 * seconds:
                give_up()

    def give_up():
        frame = sys._current_frames()[threading.main_thread().ident]
        lines = [line for each, line in traceback.walk_stack(frame)
                 if each.f_code.co_filename == str(path)]
        where = f" in line {lines[0]}" if lines else ""
        print(f"✗ your function has not returned after {seconds} seconds{where}: is there a loop "
              "that never ends?", flush=True)
        os._exit(1)

    threading.Thread(target=watch_time, daemon=True).start()
    try:
        yield
    finally:
        done.set()
