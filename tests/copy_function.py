"""Copies functions from one script to every other script that has functions of the same names.

    python tests/copy_function.py grpo.py token_logps chunk_logps   # edited in grpo.py, copied
    python tests/copy_function.py grpo.py housekeeping              # all below that heading

Functions of the same name are identical in all scripts (tests/project/test_form.py checks it),
because each script has to be readable on its own. Edit a function once, then run this.
"""
import ast
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
HEADING, END = "# ---- housekeeping", '\nif __name__ == "__main__"'


def span(source, name):
    """Where the part `name` begins and ends in the source, or None if it has no such part."""
    if name == "housekeeping":
        start = source.find(HEADING)
        return (start, source.index(END)) if start >= 0 else None
    lines = source.splitlines(keepends=True)
    for node in ast.parse(source).body:
        if isinstance(node, ast.FunctionDef) and node.name == name:
            first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
            return len("".join(lines[:first - 1])), len("".join(lines[:node.end_lineno]))
    return None


def main(origin, names):
    source = (ROOT / origin).read_text()
    for name in names:
        start, end = span(source, name) or sys.exit(f"{origin} has no function {name}")
        for path in sorted(ROOT.glob("*.py")):
            other = path.read_text()
            place = span(other, name)
            if place and other[place[0]:place[1]] != source[start:end]:
                path.write_text(other[:place[0]] + source[start:end] + other[place[1]:])
                print(f"{path.name}: {name}")


if __name__ == "__main__":
    if len(sys.argv) < 3:
        sys.exit(__doc__)
    main(sys.argv[1], sys.argv[2:])
