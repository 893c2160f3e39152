"""Measures the CPU seconds of each phase of `python dpo.py`, up to the end of the first step.

    OMP_NUM_THREADS=1 python benchmarks/startup.py
    python -X importtime dpo.py --help            # the time of each import
"""
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
MARKS = [("Python", time.process_time())]


def mark(phase):
    MARKS.append((phase, time.process_time()))


def marked(function, phase):
    """The same function, which also sets a mark when its first call ends."""
    def call(*args, **options):
        result = function(*args, **options)
        if phase not in dict(MARKS):
            mark(phase)
        return result
    return call


def main():
    import torch  # noqa: F401
    mark("import torch")
    import bitsandbytes  # noqa: F401  which imports the compiler of torch
    mark("import bitsandbytes")
    import common
    mark("import transformers, datasets, peft")
    import dpo
    mark("import the rest")
    common.load_tokenizer = marked(common.load_tokenizer, "tokenizer")
    common.load_examples = marked(common.load_examples, "rows")
    common.load_model = marked(common.load_model, "model")
    dpo.evaluate = marked(dpo.evaluate, "held-out figures before training")
    dpo.sample_answers = marked(dpo.sample_answers, "samples before training")
    dpo.log_step = marked(dpo.log_step, "first step")
    sys.argv = ["dpo.py", "--max-steps", "1", "--output-dir", tempfile.mkdtemp() + "/run"]
    with common.running(""):
        dpo.train(common.parse(dpo.make_flags(), dpo.TINY, dpo.BY_LOSS))
    before = 0
    for phase, seconds in MARKS:
        print(f"{seconds - before:7.2f} s  {phase}")
        before = seconds
        if phase == "first step":
            print(f"{seconds:7.2f} s  in total")


if __name__ == "__main__":
    main()
