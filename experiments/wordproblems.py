"""Grade-school word problems of one and two steps, with answers, for the runs on a real model.

    python experiments/wordproblems.py     # writes examples/wordproblems_{train,test,calls}.jsonl

A row has a prompt (one question), its `answer` (a number, for rewards) and a `solution` (its steps
and the answer in a sentence, for SFT: --columns completion=solution). Names, things and numbers
vary. The test file has only forms of problems that no training row has, so that it measures whether
a model has learned to solve problems, not forms. The rows of the third file are conversations in
which the assistant calls a calculator, for SFT before agent.py. Everything follows from SEED.
"""
import json
import random
import runpy
from pathlib import Path

from transformers.utils import get_json_schema

SEED = 0
TRAIN_ROWS, TEST_ROWS, CALL_ROWS = 2000, 300, 200
EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
NAMES = ["Ada", "Ali", "Amir", "Bea", "Carl", "Chen", "Dina", "Emil", "Fay", "Hugo", "Ines", "Ivan",
         "Jada", "Kofi", "Lena", "Lucas", "Mara", "Nils", "Omar", "Priya", "Rosa", "Sara", "Theo",
         "Yuki"]
THINGS = ["apples", "balloons", "beads", "books", "buttons", "cards", "coins", "cookies", "eggs",
          "flowers", "marbles", "oranges", "pencils", "shells", "stamps", "stickers", "stones",
          "tickets", "toys"]
PLACES = ["bag", "basket", "box", "drawer", "jar", "room"]
# A form: the question, and its steps; _ is the result of the step before.
TRAINING_FORMS = [
    ("{A} has {a} {things}. {B} gives {A} {b} more. How many {things} does {A} have now?",
     ["a + b"]),
    ("There are {a} {things} in the {place}. {A} puts in {b} more. How many {things} are in the "
     "{place} now?", ["a + b"]),
    ("{A} finds {a} {things} and {B} finds {b}. How many {things} do they find together?",
     ["a + b"]),
    ("On Monday {A} sold {a} {things}, and on Tuesday {b}. How many {things} did {A} sell on both "
     "days?", ["a + b"]),
    ("{A} is {a} years old. How old will {A} be in {b} years?", ["a + b"]),
    ("{A} has {a} {things}. {B} has {b} more than {A}. How many {things} does {B} have?",
     ["a + b"]),
    ("A train has {a} passengers. At the station {b} people get on. How many passengers are on the "
     "train now?", ["a + b"]),
    ("{A} has {a} {things} and loses {b} of them. How many {things} are left?", ["a - b"]),
    ("There were {a} {things} in the {place}. {A} took {b}. How many {things} are still in the "
     "{place}?", ["a - b"]),
    ("{A} has {a} {things} and {B} has {b}. How many more {things} does {A} have than {B}?",
     ["a - b"]),
    ("{A} needs {a} {things} and already has {b}. How many {things} are missing?", ["a - b"]),
    ("A book has {a} pages. {A} has read {b} of them. How many pages are left to read?", ["a - b"]),
    ("{A} had {a} dollars and spent {b} dollars on a book. How many dollars does {A} have left?",
     ["a - b"]),
    ("{B} has {b} fewer {things} than {A}. {A} has {a}. How many {things} does {B} have?",
     ["a - b"]),
    ("There are {c} boxes with {d} {things} in each. How many {things} are there in all?",
     ["c * d"]),
    ("{A} buys {c} {things} for {d} dollars each. How many dollars does {A} pay?", ["c * d"]),
    ("{A} reads {c} pages every day. How many pages does {A} read in {d} days?", ["c * d"]),
    ("A room has {c} rows of {d} chairs. How many chairs are in the room?", ["c * d"]),
    ("{A} has {c} {things}. {B} has {d} times as many. How many {things} does {B} have?",
     ["c * d"]),
    ("{A} shares {m} {things} equally among {d} friends. How many {things} does each friend get?",
     ["m / d"]),
    ("{m} children form {d} groups of the same size. How many children are in a group?", ["m / d"]),
    ("{d} {things} cost {m} dollars. How many dollars does one cost, if all cost the same?",
     ["m / d"]),
    ("{A} has {a} {things}. {A} gives {b} to {B} and then finds {c} more. How many {things} does "
     "{A} have now?", ["a - b", "_ + c"]),
    ("{A} has {c} bags with {d} {things} in each, and {e} more on the table. How many {things} "
     "does {A} have?", ["c * d", "_ + e"]),
    ("{A} buys {c} {things} for {d} dollars each and pays with {h} dollars. How many dollars does "
     "{A} get back?", ["c * d", "h - _"]),
    ("{A} has {a} {things} and {B} has {b} fewer. How many {things} do they have together?",
     ["a - b", "a + _"]),
    ("A bus has {a} passengers. {b} get off and {e} get on. How many passengers are on the bus "
     "now?", ["a - b", "_ + e"]),
    ("{A} picks {c} {things} an hour for {d} hours and gives away {e}. How many {things} are left?",
     ["c * d", "_ - e"]),
]
TEST_FORMS = [
    ("A farmer has {a} cows and buys {b} more. How many cows does the farmer have?", ["a + b"]),
    ("{A} ran {a} meters in the morning and {b} meters in the evening. How many meters is that in "
     "all?", ["a + b"]),
    ("Of the {a} {things} in a {place}, {b} are red and the others are blue. How many are blue?",
     ["a - b"]),
    ("{A} baked {a} cookies. The family ate {b} of them. How many cookies remain?", ["a - b"]),
    ("A machine has {c} wheels. How many wheels do {d} such machines have?", ["c * d"]),
    ("{A} plants {c} trees in each of {d} gardens. How many trees does {A} plant?", ["c * d"]),
    ("A rope of {m} meters is cut into {d} equal pieces. How many meters long is each piece?",
     ["m / d"]),
    ("{A} saves {c} dollars a week for {d} weeks and then spends {e} dollars. How many dollars are "
     "left?", ["c * d", "_ - e"]),
    ("{A} has {a} {things}, {B} has {b} and {C} has {e}. How many {things} do the three have?",
     ["a + b", "_ + e"]),
]


def solve(steps, numbers):
    """Lines such as "3 * 4 = 12", the last result, and all steps as one expression.

    It returns None if a result is not whole and positive.
    """
    lines = []
    result = None
    expression = ""
    for step in steps:
        left, operator, right = step.split()
        x, y = (result if name == "_" else numbers[name] for name in (left, right))
        if operator == "/" and x % y:
            return None
        written = [f"({expression})" if name == "_" else str(numbers[name])
                   for name in (left, right)]
        expression = f"{written[0]} {operator} {written[1]}"
        result = {"+": x + y, "-": x - y, "*": x * y, "/": x // y}[operator]
        if result < 1:
            return None
        lines.append(f"{x} {operator} {y} = {result}")
    return lines, result, expression


def problem(rng, forms):
    """A row of a random form and its expression. Draws again until the numbers fit the story."""
    question, steps = rng.choice(forms)
    while True:
        numbers = {"a": rng.randint(3, 60), "b": rng.randint(2, 40), "c": rng.randint(2, 12),
                   "d": rng.randint(2, 9), "e": rng.randint(2, 9), "h": rng.choice([50, 100])}
        numbers["m"] = numbers["d"] * rng.randint(2, 12)
        solved = solve(steps, numbers)
        if solved:
            break
    first, second, third = rng.sample(NAMES, 3)
    text = question.format(A=first, B=second, C=third, things=rng.choice(THINGS),
                           place=rng.choice(PLACES), **numbers)
    lines, result, expression = solved
    row = {"prompt": [{"role": "user", "content": text}], "answer": str(result),
           "solution": f"{'. '.join(lines)}. The answer is {result}."}
    return row, expression


def with_call(row, expression, schema):
    """The row as a conversation in which the assistant calls the calculator."""
    call = {"name": "calculator", "arguments": {"expression": expression}}
    return {"messages": [
        *row["prompt"],
        {"role": "assistant", "content": "",
         "tool_calls": [{"type": "function", "function": call}]},
        {"role": "tool", "name": "calculator", "content": row["answer"]},
        {"role": "assistant", "content": f"The answer is {row['answer']}."}], "tools": [schema]}


def problems(forms, count, seed):
    """Different problems, as pairs (row, expression)."""
    rng = random.Random(seed)
    found = {}
    while len(found) < count:
        row, expression = problem(rng, forms)
        found[row["prompt"][0]["content"]] = row, expression
    return list(found.values())


def write(name, rows):
    path = EXAMPLES / f"wordproblems_{name}.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    print(f"examples/{path.name}: {len(rows)} rows")


if __name__ == "__main__":
    train = problems(TRAINING_FORMS, TRAIN_ROWS, SEED)
    write("train", [row for row, _ in train])
    write("test", [row for row, _ in problems(TEST_FORMS, TEST_ROWS, SEED + 1)])
    calculator = get_json_schema(runpy.run_path(str(EXAMPLES / "tools.py"))["calculator"])
    write("calls", [with_call(*pair, calculator) for pair in train[:CALL_ROWS]])
