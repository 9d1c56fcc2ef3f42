"""What `llmrl verify` is asked about: rows of the table, or the code of a user."""

import inspect

from llmrl.algorithms.ppo import PPO
from llmrl.algorithms.user_algorithm import load_algorithm
from llmrl.algorithms.user_functions import describe
from llmrl.errors import Error
from llmrl.messages import nearest
from llmrl.user_code import UserCodeError, load_object, names_code
from llmrl.verify.rows import PLAIN, ROWS, Row

ROLE = "ALGORITHM"
EXPECTED = (
    "expected a class such as GRPO or PPO, a baseline of (scores, group_ids), or a loss of (logprobs, old_logprobs, "
    "advantages, weights)"
)


class UnknownEstimator(Error, ValueError):
    """There is no row of a name, and it names no code."""


def rows_of(target: str | None) -> list[Row]:
    """The rows to verify: all; those of an algorithm, or of one name; or those of a user's class, baseline or loss.

    Raises:
        UnknownEstimator: There is no such row.
        UserCodeError: The user's code does not load, or is of no kind that can be verified.
    """
    if target is None:
        return list(ROWS)
    if names_code(target):
        return _rows_of_code(target)
    found = [row for row in ROWS if row.name == target] or [row for row in ROWS if row.algorithm == target]
    if not found:
        names = ["grpo", "ppo", *(row.name for row in ROWS)]
        raise UnknownEstimator(
            f"ALGORITHM ({target}) is no row of the table{nearest(target, names)}; known: {' | '.join(names)}; or name "
            "your own: path/to/file.py:Class"
        )
    return found


def _rows_of_code(name: str) -> list[Row]:
    """A class is made with the settings of every row of its kind. A function is a baseline or a loss by how many
    arguments it takes, (scores, group_ids) or (logprobs, old_logprobs, advantages, weights)."""
    code = load_object(name, role=ROLE)
    if not callable(code):
        raise UserCodeError(f"{ROLE} {name} is {describe(code)}; {EXPECTED}")
    parameters = inspect.signature(code).parameters
    if inspect.isclass(code):
        kind = "ppo" if "networks" in parameters or issubclass(code, PPO) else "grpo"
        if kind == "grpo":
            load_algorithm(name)
        return [Row(**{**vars(row), "code": name}) for row in ROWS if row.algorithm == kind]
    match len(parameters):
        case 2:
            return [Row(name="baseline", algorithm="grpo", settings={"baseline": name, **PLAIN})]
        case 4:
            settings = {"loss": name, "baseline": "leave_one_out", **PLAIN}
            return [
                Row(name="loss, in grpo", algorithm="grpo", settings=settings),
                Row(name="loss, in ppo", algorithm="ppo", settings={"loss": name, "gae_lambda": 1.0}),
            ]
    raise UserCodeError(f"{ROLE} {name} takes {inspect.signature(code)}; {EXPECTED}")
