"""What README says of the files: how long they are, and how much of each is new on the path."""
import ast
import re

import pytest
from conftest import ROOT

README = (ROOT / "README.md").read_text()
PATH = re.findall(r"^\| \d+ \| \[(\w+)\.py\]\S+ \| .* \| (\d+) \| (\d+) \| (\d+) \|$", README, re.M)


def functions(name):
    """The functions at the top of a script, with their decorators, as text."""
    lines = (ROOT / f"{name}.py").read_text().splitlines()
    for node in ast.parse("\n".join(lines)).body:
        if isinstance(node, ast.FunctionDef):
            yield "\n".join(lines[node.lineno - 1 - len(node.decorator_list):node.end_lineno])


def test_readme_keeps_to_its_room():
    lines = README.splitlines()
    assert len(lines) <= 250 and max(map(len, lines)) <= 100


def test_the_path_says_how_long_the_files_are_and_what_is_new_in_each():
    """Minutes are new lines at 25 a minute."""
    scripts = {"sft", "reward_model", "prm", "dpo", "kto", "online_dpo", "ppo", "grpo", "pairs",
               "common", "evaluate"}
    assert scripts <= {name for name, *_ in PATH}
    seen = set()
    for name, *figures in PATH:
        length = len((ROOT / f"{name}.py").read_text().splitlines())
        known = [text for text in functions(name) if text in seen]
        seen.update(functions(name))
        new = length - sum(text.count("\n") + 1 for text in known)
        assert [int(x) for x in figures] == [length, new, round(new / 25)], name
    hours = sum(int(new) for _, _, new, _ in PATH) / 25 / 60
    assert f"all of it takes {hours:.1f} hours" in README.replace("\n", " ")


def test_the_table_of_methods_has_the_lines_of_the_path():
    lengths = {name: length for name, length, *_ in PATH}
    rows = re.findall(r"^\| \[.*\]\[(\w+)\] \|.*\| (\d+) \| [^|]* \| [^|]* \|$", README, re.M)
    assert len(rows) == 9
    for name, length in rows:
        assert length == lengths[{"rlaif": "pairs"}.get(name, name)], name


@pytest.mark.parametrize("target", re.findall(r"\]\(([^)#\s]+)", README))
def test_its_files_are_there(target):
    assert target.startswith("https://") or (ROOT / target).exists()


def test_its_commands_have_flags_that_exist():
    text = README.replace("\\\n", " ")
    commands = re.findall(r"python (\w+\.py)([^`\n#]*)", text)
    assert len(commands) > 25
    for script, flags in commands:
        for flag in re.findall(r"--[a-z0-9-]+", flags):
            assert f'"{flag}"' in (ROOT / script).read_text(), f"{script} has no {flag}"
