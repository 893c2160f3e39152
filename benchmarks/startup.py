"""Measures the CPU seconds of each phase of `python dpo.py`, up to the end of the first step.

    OMP_NUM_THREADS=1 python benchmarks/startup.py
    python -X importtime dpo.py --max-steps 1 --output-dir FOLDER    # the time of each import

common.py imports large libraries at their first use, so a phase includes the imports of what it is
the first to use. Beside each phase stand the libraries that have come with it.
"""
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
LIBRARIES = ("torch", "transformers", "datasets", "peft", "bitsandbytes", "torch._inductor")
MARKS = []


def mark(phase):
    """Notes that a phase has ended now, and which libraries have been imported by now."""
    MARKS.append((phase, time.process_time(), [x for x in LIBRARIES if x in sys.modules]))


def marked(function, phase):
    """The same function, which also sets a mark when its first call ends."""
    def call(*args, **options):
        result = function(*args, **options)
        if phase not in [name for name, _, _ in MARKS]:
            mark(phase)
        return result
    return call


def main():
    mark("Python")
    import torch  # noqa: F401
    mark("import torch")
    import common
    import dpo
    mark("import dpo.py and common.py")
    common.load_tokenizer = marked(common.load_tokenizer, "tokenizer")
    common.load_examples = marked(common.load_examples, "rows")
    common.load_model = marked(common.load_model, "model")
    dpo.evaluate = marked(dpo.evaluate, "held-out figures before training")
    dpo.sample_answers = marked(dpo.sample_answers, "samples before training")
    dpo.log_step = marked(dpo.log_step, "first step")
    sys.argv = ["dpo.py", "--max-steps", "1", "--output-dir", tempfile.mkdtemp() + "/run"]
    with common.running(""):
        dpo.train(common.parse(dpo.make_flags(), dpo.TINY, dpo.BY_LOSS))
    before, known = 0, []
    for phase, seconds, libraries in MARKS:
        new = ", ".join(name for name in libraries if name not in known)
        print(f"{seconds - before:7.2f} s  {phase:<34}{new}".rstrip())
        before, known = seconds, libraries
        if phase == "first step":
            print(f"{seconds:7.2f} s  in total")


if __name__ == "__main__":
    main()
