"""The form of the scripts: their size, their structure, and the copies of functions."""
import ast
import functools
import io
import re
import tokenize
from collections import defaultdict
from pathlib import Path

import pytest

import common

ROOT = Path(__file__).resolve().parents[2]
# The most lines of code that a script may have: room, not a target. Prose does not count.
ROOM = {"common": 914, "sft": 380, "reward_model": 310, "dpo": 385, "kto": 420, "online_dpo": 460,
        "ppo": 500, "grpo": 530, "prm": 360, "distill": 446, "agent": 569, "pairs": 390,
        "evaluate": 361, "chat": 215, "plot": 160, "exercise": 220}
ROOM = {name: lines for name, lines in ROOM.items() if (ROOT / f"{name}.py").exists()}
METHODS = [name for name in ROOM
           if name not in ("common", "pairs", "evaluate", "chat", "plot", "exercise")]
TRAIN = {"ppo": 110, "grpo": 110, "agent": 110}  # lines of code of train(); 85 elsewhere
# Functions of these names may differ from script to script.
OWN = {"main", "train", "evaluate", "describe", "rollout", "make_flags"}
PROSE = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT,
         tokenize.ENDMARKER}
BLOCKS = ast.For | ast.While | ast.If | ast.With | ast.Try
each_script = pytest.mark.parametrize("name", ROOM)
each_method = pytest.mark.parametrize("name", METHODS)


def source_of(name):
    return (ROOT / f"{name}.py").read_text()


@functools.cache
def functions(name):
    """{name: source} of the functions and classes of a script."""
    source = source_of(name)
    return {node.name: ast.get_source_segment(source, node) for node in ast.parse(source).body
            if isinstance(node, ast.FunctionDef | ast.ClassDef)}


def code_lines(source):
    """The number of lines that hold code: not blank, not a comment, not part of a docstring."""
    lines = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in PROSE:
            lines.update(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(ast.parse(source)):
        documented = ast.Module | ast.FunctionDef | ast.ClassDef
        if isinstance(node, documented) and ast.get_docstring(node) is not None:
            lines -= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    return len(lines)


def depth(node):
    """How deeply statements are nested below `node`."""
    inner = [depth(child) for child in ast.iter_child_nodes(node)]
    return max(inner, default=0) + isinstance(node, BLOCKS)


def python_files():
    folders = ["tests", "checks", "tiny", "benchmarks", "examples", "experiments", "site"]
    return [ROOT / f"{name}.py" for name in ROOM] + [
        path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]


def test_code_lines_count_neither_prose_nor_blank_lines():
    source = '"""A\ndocstring."""\n\n# a comment\nx = """\ntext\n"""  # another\n'
    function = 'def f():\n    """Says."""\n    # why\n    return [\n\n        1]\n'
    assert code_lines(source) == 3 and code_lines(source + function) == 6


@each_script
def test_a_script_has_its_room(name):
    assert code_lines(source_of(name)) <= ROOM[name]


def test_the_tests_have_their_room():
    """Proofs that nobody can read through prove less."""
    files = (ROOT / "tests").rglob("*.py")
    assert sum(code_lines(path.read_text()) for path in files) <= 8000


def test_lines_are_short_and_identifiers_can_be_typed():
    """At most 100 columns, and no Greek letters as names in code."""
    for path in python_files():
        source = path.read_text()
        assert max(map(len, source.splitlines()), default=0) <= 100, path
        for token in tokenize.generate_tokens(io.StringIO(source).readline):
            assert token.type != tokenize.NAME or token.string.isascii(), (path, token.line)


def test_a_function_of_one_name_is_the_same_everywhere():
    copies = defaultdict(lambda: defaultdict(list))
    for name in ROOM:
        for function, source in functions(name).items():
            copies[function][source].append(name)
    drifted = {function: list(texts.values()) for function, texts in copies.items()
               if len(texts) > 1 and function not in OWN}
    assert not drifted, f"edit one copy, then: tests/copy_function.py SCRIPT NAME. {drifted}"


def test_housekeeping_is_the_same_everywhere():
    """Compares everything from its heading to the end of the file."""
    parts = {source_of(name).partition("# ---- housekeeping")[2].partition("\nif __name__")[0]
             for name in METHODS}
    assert len(parts) == 1 and parts.pop()


@each_method
def test_train_is_short_flat_and_in_numbered_steps(name):
    source = functions(name)["train"]
    train = ast.parse(source).body[0]
    assert code_lines(source) <= TRAIN.get(name, 85)
    nested = ast.FunctionDef | ast.Lambda | ast.ClassDef
    assert not any(isinstance(node, nested) for node in ast.walk(train) if node is not train)
    assert depth(train) <= 4
    steps = re.findall(r"^ +# (\d+)\. ", source, re.M)
    assert steps == [str(i + 1) for i in range(len(steps))] and len(steps) >= 7


@each_method
def test_losses_are_short(name):
    for function, source in functions(name).items():
        if function.endswith(("_loss", "_losses")):
            assert code_lines(source) <= 25, function


def flags_of(name):
    """{flag: the call add(flag, …)} of make_flags."""
    calls = [node for node in ast.walk(ast.parse(functions(name)["make_flags"]))
             if isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("add", "argument"))]
    return {call.args[0].value: call for call in calls}


@pytest.mark.parametrize("name", [name for name in ROOM if name != "common"])
def test_every_flag_has_a_help(name):
    """A help text of its own, or one that common.py defines for all scripts."""
    assert flags_of(name)
    for flag, call in flags_of(name).items():
        shared = [getattr(common, keyword.value.attr) for keyword in call.keywords
                  if keyword.arg is None and isinstance(keyword.value, ast.Attribute)]
        names = {keyword.arg for keyword in call.keywords}.union(*shared)
        assert "help" in names, flag


@each_method
def test_every_flag_is_read(name):
    """A flag that no line reads would have no effect."""
    source, names = source_of(name) + source_of("common"), flags_of(name)
    for flag in names:
        assert re.search(rf"args\.{flag.strip('-').replace('-', '_')}\b", source), flag


@each_script
def test_scripts_import_common_and_libraries_only(name):
    forbidden = {*ROOM} - {"common"} | {"trl"}
    for node in ast.walk(ast.parse(source_of(name))):
        if isinstance(node, ast.Import):
            assert not forbidden & {alias.name.split(".")[0] for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            assert node.module.split(".")[0] not in forbidden
