"""Every script starts where a module of Unix is absent, as on Windows."""
import os
import subprocess
import sys

from conftest import ROOT

SCRIPTS = sorted(path.stem for path in ROOT.glob("*.py"))
CHILD = """
import importlib, sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name in ("fcntl", "readline"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Absent())
names = sys.argv[1:]
for name in names:
    script = importlib.import_module(name)
    flags = script.make_flags() if hasattr(script, "make_flags") else getattr(script, "flags", None)
    if flags:
        assert flags.format_help().startswith("usage: ")
heavy = {"bitsandbytes", "datasets", "peft", "pyarrow", "transformers"} & set(sys.modules)
assert not heavy, f"--help waits for {heavy}"
assert "fcntl" not in sys.modules and "readline" not in sys.modules
print("imported", len(names))
"""


def test_every_script_starts_without_the_modules_that_windows_lacks():
    """fcntl and readline do not exist there. `--help` works, and imports nothing that is slow."""
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", CHILD, *SCRIPTS], env=env, cwd=ROOT, text=True,
                          capture_output=True, timeout=200)
    assert done.stdout.endswith(f"imported {len(SCRIPTS)}\n"), done.stderr
