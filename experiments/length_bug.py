"""A reward with a bug; experiments/compare.py shows how that looks.

    python grpo.py --reward correct_answer experiments/length_bug.py:work_shown --reward-weights 1 1
"""


def work_shown(prompts, completions, **columns):
    """Meant as a little extra for showing the work; but it pays by the character, without end."""
    return [0.1 * len(text) for text in completions]
