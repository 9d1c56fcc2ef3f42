"""The tool of the products recipes: a function that the actor can call. Copy and change it."""

import operator
import re

OPERATORS = {"+": operator.add, "-": operator.sub, "*": operator.mul}
EXPRESSION = re.compile(r"\s*(\d{1,9})\s*([-+*])\s*(\d{1,9})\s*")


def calculate(expression: str) -> str:
    """Adds, subtracts or multiplies two whole numbers.

    Args:
        expression: The numbers with +, - or * between them, such as 12*34.
    """
    found = EXPRESSION.fullmatch(expression)
    if found is None:
        raise ValueError(
            f"{expression!r} must be two whole numbers with +, - or * between them"
        )  # the actor reads this
    first, sign, second = found.groups()
    return str(OPERATORS[sign](int(first), int(second)))
