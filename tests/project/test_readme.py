"""The README: its tables list every file, its files exist, and its commands parse."""
import importlib
import json
import re
import shlex

import pytest
from conftest import ROOT
from test_form import METHODS, ROOM

README = (ROOT / "README.md").read_text()


def commands(text):
    """The words of every command that is in an indented block or between backticks."""
    blocks = re.findall(r"^ +(?:[A-Z_]+=\S+ )*python (\w+\.py.*)$", text.replace("\\\n", " "), re.M)
    inline = re.findall(r"`(?:[A-Z_]+=\S+ )*python\s(\w+\.py[^`]*)`", text)
    return [shlex.split(line, comments=True) for line in blocks + inline if "..." not in line]


def test_readme_keeps_to_its_room():
    lines = README.splitlines()
    assert len(lines) <= 250
    assert all(len(line) <= 100 or line.startswith("|") for line in lines)
    assert not [line for line in lines if line.startswith("+")]  # Markdown makes it a bullet


def test_methods_and_tools_each_stand_in_their_table():
    methods, tools = README.partition("## The tools")[::2]
    assert set(re.findall(r"^\| \d+ \| \[(\w+)\.py\]", methods, re.M)) == {*METHODS}
    assert set(re.findall(r"^\| \[(\w+)\.py\]", tools, re.M)) == {*ROOM} - {*METHODS}


@pytest.mark.parametrize("target", re.findall(r"\]\(([^)#\s]+)", README))
def test_its_files_are_there(target):
    assert target.startswith("https://") or (ROOT / target).exists()


@pytest.mark.parametrize("words", commands(README), ids=" ".join)
def test_its_commands_parse(words):
    module = importlib.import_module(words[0].removesuffix(".py"))
    module.make_flags().parse_args(words[1:])


def test_the_notebook_has_commands_of_the_readme():
    cells = json.loads((ROOT / "notebooks/t4.ipynb").read_text())["cells"]
    for source in ["".join(cell["source"]) for cell in cells]:
        for script in re.findall(r"python (\w+\.py)", source):
            assert f"python {script}" in README
