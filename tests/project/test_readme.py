"""What the README says about the files."""
import re

import pytest
from conftest import ROOT

README = (ROOT / "README.md").read_text()


def test_readme_keeps_to_its_room():
    lines = README.splitlines()
    assert len(lines) <= 250 and max(map(len, lines)) <= 100


def test_the_path_and_the_table_of_methods_name_every_script():
    path = re.findall(r"^\| \d+ \| \[(\w+)\.py\]", README, re.M)
    assert sorted(path) == sorted(["sft", "reward_model", "prm", "dpo", "kto", "online_dpo", "ppo",
                                   "grpo", "pairs", "common", "evaluate"])
    assert len(re.findall(r"^\| \[.*\]\[\w+\] \|", README, re.M)) == 9


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
