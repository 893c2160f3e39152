"""A reward function with a bug; docs/comparison.md shows how GRPO exploits it.

    python grpo.py --reward correct_answer experiments/length_bug.py:work_shown --reward-weights 1 1
"""


def work_shown(prompts, completions, **columns):
    """Is meant as a small bonus for showing the work, but pays per character and has no limit."""
    return [0.1 * len(text) for text in completions]
