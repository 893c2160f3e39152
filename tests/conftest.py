"""What several test files use."""
import json
from pathlib import Path

import common  # noqa: F401  before torch, as in the scripts
import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared"


def pytest_configure():
    torch.set_num_threads(1)


@pytest.fixture
def shared():
    """The folder with real data, a real model and real tokenizers, which is not part of the repository."""
    if not SHARED.is_dir():
        pytest.skip("needs the folder ../shared with real data, models and tokenizers")
    return SHARED


@pytest.fixture
def write_jsonl(tmp_path):
    """Writes rows to a .jsonl file and returns its name."""
    def write(rows, name="rows.jsonl"):
        path = tmp_path / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(path)
    return write


@pytest.fixture
def refused(capsys):
    """Runs something that has to end in one line on stderr and exit code 2, and returns the line."""
    def run(call, *args, **kwargs):
        with pytest.raises(SystemExit) as exit_info:
            call(*args, **kwargs)
        assert exit_info.value.code == 2
        lines = [line for line in capsys.readouterr().err.splitlines() if line and "it/s" not in line]  # a progress bar is no error message
        assert len(lines) == 1 and lines[0].startswith("error: "), lines
        return lines[0]
    return run
