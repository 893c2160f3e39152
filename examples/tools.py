"""Example tools, for the flag --tools of agent.py.

    python agent.py --tools examples/tools.py:calculator examples/tools.py:look_up

A tool is a plain function. The chat template shows the model its name, its docstring and its type
hints, so all of them are required, and Args must describe each argument. After a call, the model
reads the function's return value, or the message of the exception that the function raised. Tools
run in the training process, with its privileges, so never give the model a tool that runs code or
commands outside a sandbox.
"""
import ast
import operator
from fractions import Fraction

LONGEST = 200  # characters of an expression
MOST_BITS = 4000  # of a power; without a limit, 9 ** 9 ** 9 could keep Python busy for hours
OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul,
             ast.Div: operator.truediv, ast.FloorDiv: operator.floordiv, ast.Mod: operator.mod,
             ast.USub: operator.neg, ast.UAdd: operator.pos}
ATOMIC_MASSES = {"hydrogen": "1.008", "carbon": "12.011", "nitrogen": "14.007",
                 "oxygen": "15.999", "sodium": "22.990", "sulfur": "32.06", "chlorine": "35.45",
                 "calcium": "40.078", "iron": "55.845", "copper": "63.546"}


def calculator(expression: str) -> str:
    """
    Computes the value of an arithmetic expression.

    Args:
        expression: Numbers, + - * / // % ** and parentheses, for example "12 * (3 + 4)".
    """
    if len(expression) > LONGEST:
        raise ValueError(f"the expression has more than {LONGEST} characters")
    tree = ast.parse(expression.strip(), mode="eval")
    number = value_of(tree.body)
    if number.denominator == 1:
        return str(number.numerator)
    return f"{float(number):.12g}"


def value_of(node: ast.AST) -> Fraction:
    """The exact value of a parsed expression. It is computed here; no code is ever evaluated."""
    if isinstance(node, ast.Constant) and type(node.value) in (int, float):
        # The text of a float is exact, its binary value is rounded: 0.1 means one tenth.
        return Fraction(str(node.value))
    if isinstance(node, ast.UnaryOp) and type(node.op) in OPERATORS:
        return OPERATORS[type(node.op)](value_of(node.operand))
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Pow):
        return power(value_of(node.left), value_of(node.right))
    if isinstance(node, ast.BinOp) and type(node.op) in OPERATORS:
        return OPERATORS[type(node.op)](value_of(node.left), value_of(node.right))
    raise ValueError("only numbers, + - * / // % ** and parentheses are allowed")


def power(base: Fraction, exponent: Fraction) -> Fraction:
    """The base to the power of a whole number, unless the result would be huge."""
    if exponent.denominator != 1:
        raise ValueError("an exponent must be a whole number")
    bits = max(base.numerator.bit_length(), base.denominator.bit_length())
    if bits * abs(exponent.numerator) > MOST_BITS:
        raise ValueError("the power is too large")
    return base ** exponent.numerator


def look_up(element: str) -> str:
    """
    Looks up the atomic mass of a chemical element.

    Args:
        element: The English name of the element, for example "oxygen".
    """
    name = element.strip().lower()
    if name not in ATOMIC_MASSES:
        raise LookupError(f"no element {name}; the table has {', '.join(ATOMIC_MASSES)}")
    return ATOMIC_MASSES[name]
