"""Exercises that grade themselves: write a loss, find a bug, predict a number.

    python exercise.py                        # lists the exercises in the order to do them
    python exercise.py dpo.preference_loss    # writes exercises/dpo.py, with one function to write
    python exercise.py --check                # which properties hold, in sentences with numbers
    python exercise.py --hint                 # one more hint each time, at most three
    python exercise.py --solution             # shows the difference to the solution
    python exercises/dpo.py                   # trains the tiny model with your own loss

    python exercise.py --bug                  # plants a bug: run it, look at the plot, fix it
    python exercise.py --predict dpo          # asks three questions about a method

A check calls your function with small tensors and compares the results with facts: closed forms,
limits, invariances, sums over all possible answers. It never compares your code with the solution,
so any correct implementation passes. If a property does not hold, your function is also compared
with common mistakes (those in tests/mutants/). While a check runs, the solved scripts cannot be
read or imported, because copying from them would teach nothing.

exercises/ is your own folder, and git ignores it. Nothing that you have written there is ever
overwritten: if an exercise needs a script that is already there, only code that is still identical
to the original is blanked. Run everything from the root of the repository. docs/learning.md
suggests how to study with the exercises; checks/ holds their texts and properties.
"""
import argparse
import ast
import difflib
import json
import sys
import textwrap
from pathlib import Path

import common

ROOT = Path(__file__).resolve().parent
FOLDER = ROOT / "exercises"
sys.path[:0] = [str(ROOT / "checks")]
import grading  # noqa: E402
from grading import CATALOGUE, SCRIPTS, functions_of, script_of, source_of  # noqa: E402


def make_flags():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=common.HelpFormatter)
    add = parser.add_argument
    add("name", nargs="?", help="exercise to start or check; default: the one started last")
    add("--check", action="store_true", help="properties of your solution, each with ✓ or ✗")
    add("--hint", action="store_true", help="one more hint")
    add("--solution", action="store_true", help="difference between your file and the solution")
    add("--bug", nargs="?", const="next", metavar="SCRIPT",
        help="a script with one mistake planted in it; without a name, the next unsolved one")
    add("--predict", choices=SCRIPTS, metavar="SCRIPT", help="three questions about a method")
    return parser


def refuse_unless(condition, message):
    if not condition:
        common.fail(message)


# ---- the student's file --------------------------------------------------------------------------

def runnable(source, name):
    """A script as a file in exercises/, which finds common.py and writes its runs beside itself."""
    path = "import sys\nsys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # common.py\n"
    source = source.replace("\nimport common\n", f"\n{path}import common\n", 1)
    return source.replace('default="runs/', f'default="exercises/runs/{name}', 1)


def function_of(source, name):
    """The source of a function, from its `def` to the end of its last line."""
    try:
        tree = ast.parse(source)
    except SyntaxError as error:
        common.fail(f"line {error.lineno} of the file is not Python: {error.msg}")
    for node in tree.body:
        if isinstance(node, ast.FunctionDef) and node.name == name:
            return "\n".join(source.splitlines()[node.lineno - 1:node.end_lineno])
    common.fail(f"the file no longer has a function {name}")


def pieces_of(name):
    """The parts of the original script that an exercise blanks: whole bodies, or some lines."""
    source = source_of(script_of(name))
    main, *others = [function_of(source, function) for function in functions_of(name)]
    lines = main.splitlines(keepends=True)
    pieces = []
    for first, last in CATALOGUE[name].get("lines", []):
        start = next(i for i, line in enumerate(lines) if first in line)
        end = next(i for i, line in enumerate(lines) if i >= start and last in line)
        pieces.append("".join(lines[start:end + 1]).rstrip("\n"))
    for function in others if pieces else [main, *others]:
        body = ast.parse(function).body[0].body
        # The docstring stays.
        pieces.append("\n".join(function.splitlines()[body[0].end_lineno:]))
    return pieces


def blanked(source, name):
    """The source with the pieces of an exercise blanked, if they are still as in the original."""
    task = CATALOGUE[name]["task"]
    for text in CATALOGUE[name].get("hide", []):
        source = source.replace(text, "")
    for number, piece in enumerate(pieces_of(name)):
        indent = piece[:len(piece) - len(piece.lstrip())]
        says = f"Exercise {name}. {task}" if number == 0 else f"Exercise {name}, continued."
        comment = textwrap.fill(" ".join(says.split()), 99, initial_indent=f"{indent}# ",
                                subsequent_indent=f"{indent}# ", break_on_hyphens=False)
        stub = f'{comment}\n{indent}raise NotImplementedError("exercise {name}")'
        # A whole body may begin with a comment, so its text is searched for from a line's start.
        if source.count(f"\n{piece}\n") == 1:
            source = source.replace(f"\n{piece}\n", f"\n{stub}\n")
    return source


def read_state():
    path = FOLDER / "progress.json"
    state = {"current": None, "solved": [], "hints": {}}
    if path.exists():
        with common.phase(f"reading {path} (your progress begins anew if you delete it)"):
            state |= json.loads(path.read_text(encoding="utf-8"))
            common.need(isinstance(state["current"], str | None)
                        and isinstance(state["solved"], list)
                        and isinstance(state["hints"], dict), "it has values of another type")
    return state


def save_state(**changes):
    grading.save_text(FOLDER / "progress.json", json.dumps(read_state() | changes, indent=1))


# ---- commands ------------------------------------------------------------------------------------

def place_of(task):
    """The exercise of a task and its file. A task is an exercise or "bug:" and an exercise."""
    name = task.removeprefix("bug:")
    refuse_unless(name in CATALOGUE, f"there is no exercise {name}: python exercise.py lists them")
    script = script_of(name)
    return name, FOLDER / (f"{script}.py" if name == task else f"bug_{script}.py")


def written(task):
    """The text of the student's file for a task."""
    name, path = place_of(task)
    begin = name if name == task else f"--bug {script_of(name)}"
    refuse_unless(path.exists(), f"exercises/{path.name} does not exist: begin with "
                  f"python exercise.py {begin}")
    return grading.read_text(path)


def list_exercises():
    solved = read_state()["solved"]
    for name, entry in CATALOGUE.items():
        mark = "✓" if name in solved else " "
        print(f"{mark} {name:<30} {entry['difficulty']:<7} {entry['teaches']}")
    bugs = [task for task in solved if task not in CATALOGUE]
    print(f"\n{len(solved) - len(bugs)} of {len(CATALOGUE)} solved, {len(bugs)} bugs found. Begin "
          "with:\npython exercise.py NAME, or --bug, or --predict SCRIPT (see --help)")


def start(name):
    """Writes the file of an exercise, or blanks the exercise in the file that is there already."""
    refuse_unless(not name.startswith("bug:"), "--bug SCRIPT plants a mistake in a script")
    name, path = place_of(name)
    entry = CATALOGUE[name]
    where = f"exercises/{path.name}"
    if path.exists():
        old = grading.read_text(path)
        new = blanked(old, name)
        said = ("already exists. The part for this exercise was still the original and is blank "
                "now; the rest is as you left it.")
        if new == old:
            said = ("already has code of yours in this place, and is left as it is. "
                    f"Change {functions_of(name)[0]} there, or rename the file and start again.")
    else:
        new = blanked(runnable(source_of(script_of(name)), ""), name)
        said = f"is a copy of {path.name}, with a part left out for you to write."
    if not path.exists() or new != old:
        grading.save_text(path, new)
    print(f"{where} {said}\n\n{entry['title']} ({entry['difficulty']}). {entry['teaches']}\n\n"
          f"{entry['task']}\n")
    blank = f'raise NotImplementedError("exercise {name}")'
    for number, line in enumerate(new.splitlines(), 1):
        if blank in line:
            print(f"Write it in line {number} of {where}, in place of `raise NotImplementedError`.")
    print("Then: python exercise.py --check")
    save_state(current=name)


def check_file(task):
    """Grades the student's file, and remembers what is solved."""
    name, path = place_of(task)
    where = f"exercises/{path.name}"
    source = written(task)
    with grading.time_limit(path):
        graded = grading.grade(name, source, path)
    wrong = [said for _, said, _ in graded if said]
    if task == name:
        grading.report(name, graded)
    elif wrong:
        # An exception comes last, without the sentence of a property.
        said = f"{len(wrong)} properties of the method do not hold" if graded[-1][0] else wrong[-1]
        print(f"✗ the mistake is still there: {said}")
    else:
        what = CATALOGUE[name]["bug"]["what"]
        _, mistake = grading.mistake_of(script_of(name), what)
        print(f"✓ found: {what}. This was planted:\n{textwrap.indent(mistake['new'], '    ')}")
    if wrong:
        raise SystemExit(1)
    if task == name:
        print("\nAll properties hold. Now train the tiny model with your code:\n"
              f"python {where} {CATALOGUE[name].get('run', '')}".rstrip())
    save_state(solved=[*dict.fromkeys([*read_state()["solved"], task])])


def plant(script):
    """Writes a script with one mistake whose curve shows it."""
    solved = read_state()["solved"]
    names = [name for name, entry in CATALOGUE.items() if "bug" in entry
             and (script_of(name) == script or script == "next" and f"bug:{name}" not in solved)]
    refuse_unless(names, f"no bug is left to find (asked for: {script})")
    name, path = place_of(f"bug:{names[0]}")
    script = script_of(name)
    where = f"exercises/{path.name}"
    if not path.exists():
        source, _ = grading.mistake_of(script, CATALOGUE[name]["bug"]["what"])
        grading.save_text(path, runnable(source, "bug_"))
    print(f"One line of {where} is wrong, and the curves show it. Which one is it?\n\n"
          f"    python {where}\n    python plot.py exercises/runs/bug_{script}\n\n"
          f"docs/metrics.md says what healthy curves look like; python {script}.py draws them.\n"
          "Fix the line, then: python exercise.py --check")
    save_state(current=f"bug:{name}")


def give_hint(task):
    """Prints the hints so far, and one more."""
    name, _ = place_of(task)
    hints = CATALOGUE[name]["hints"]
    if task != name:
        bug = CATALOGUE[name]["bug"]
        where = functions_of(name)[0]
        hints = [bug["curve"], f"The line is in {where}.", f"The mistake: {bug['what']}."]
    counts = read_state()["hints"]
    count = min(counts.get(task, 0) + 1, len(hints))
    for number, hint in enumerate(hints[:count], 1):
        print(f"{number}. {' '.join(hint.split())}")
    if count == len(hints):
        print("That was the last hint; python exercise.py --solution shows the solution.")
    save_state(hints=counts | {task: count})


def show_solution(task):
    """Prints the difference between the student's functions and those of the script."""
    name, _ = place_of(task)
    source = written(task)
    solved = source
    for function in functions_of(name):
        original = function_of(source_of(script_of(name)), function)
        solved = solved.replace(function_of(source, function), original)
    lines = difflib.unified_diff(source.splitlines(), solved.splitlines(), "yours", "solution",
                                 lineterm="", n=2)
    print("\n".join(lines) or "Your code is the same as the solution.")


def predict(script):
    """Asks three questions about a method; the answers are computed by its functions."""
    import questions  # it imports all scripts
    right = 0
    for question, answer in getattr(questions, f"about_{script}")():
        try:
            said = input(f"\n{question}\n> ")
        except EOFError:
            said = ""
        right += grading.is_right(said, answer)
        print(f"{'✓' if grading.is_right(said, answer) else '✗'} {grading.show(answer)}")
    print(f"\n{right} correct. The calls that gave the answers: checks/questions.py.")


def main(args):
    state = read_state()
    task = args.name or state["current"]
    wants = args.check or args.hint or args.solution
    refuse_unless(task or not wants, "no exercise is started: python exercise.py lists them")
    if args.predict:
        predict(args.predict)
    elif args.bug:
        plant(args.bug)
    elif args.check:
        check_file(task)
    elif args.hint:
        give_hint(task)
    elif args.solution:
        show_solution(task)
    elif args.name:
        start(args.name)
    else:
        list_exercises()


if __name__ == "__main__":
    with common.running("", resumes=""):
        main(common.parse(make_flags()))
