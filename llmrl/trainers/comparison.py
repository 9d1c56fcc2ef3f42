"""Paired comparison of two evaluations of the same prompts."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float64
from torch import Tensor

from llmrl.errors import Error
from llmrl.functional.intervals import paired_interval

PER_PROMPT = "per_prompt"
"""Key of what a comparison needs in the record of an evaluation."""


class NotPaired(Error, ValueError):
    """Why two evaluations cannot be compared prompt by prompt."""


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Numbers of an evaluation, and those of each prompt."""

    values: dict[str, float]
    """Metrics, those of `Evaluator.evaluate`."""
    num_responses: int
    """Responses to each prompt."""
    prompts: tuple[str, ...]
    """SHA-256 of each prompt's row, in order."""
    means: dict[str, Float64[Tensor, " N"]]
    """Mean over the responses to each prompt of ``eval/accuracy`` and ``eval/score``; NaN where none counts."""

    def to_record(self) -> dict[str, Any]:
        """The evaluation as JSON has it: its metrics, and the rest under `PER_PROMPT`."""
        means = {name: [None if math.isnan(x) else x for x in each.tolist()] for name, each in self.means.items()}
        return {
            **self.values,
            PER_PROMPT: {"num_responses": self.num_responses, "prompts": list(self.prompts), "means": means},
        }


def read_evaluation(record: Mapping[str, Any]) -> Evaluation:
    """The evaluation of a record; without prompts where the record has none, as those of llmrl 0.1.

    Raises:
        ValueError: It is no such record.
    """
    values = {name: value for name, value in record.items() if name != PER_PROMPT}
    if not all(isinstance(value, int | float) for value in values.values()):
        raise ValueError("a value of the evaluation is not a number")
    match record.get(PER_PROMPT, {"num_responses": 0, "prompts": [], "means": {}}):
        case {"num_responses": int(num_responses), "prompts": list(prompts), "means": dict(means)} if all(
            _is_column(each, len(prompts)) for each in means.values()
        ):
            columns = {
                name: torch.tensor([math.nan if x is None else x for x in each], dtype=torch.float64)
                for name, each in means.items()
            }
            return Evaluation(
                values=values, num_responses=num_responses, prompts=tuple(map(str, prompts)), means=columns
            )
    raise ValueError(f"{PER_PROMPT} of the evaluation has another form")


def paired_differences(after: Evaluation, before: Evaluation) -> dict[str, tuple[float, float, float]]:
    """``(difference, low, high)`` at 95 % of each mean that both evaluations have, by `paired_interval` over the
    prompts that count in both.

    Raises:
        NotPaired: They are of other prompts, or of another number of responses to each.
    """
    if not before.prompts:
        raise NotPaired("the earlier evaluation has no numbers for each prompt; evaluate that model again")
    if after.prompts != before.prompts:
        raise NotPaired(
            f"the evaluations are of other prompts ({len(before.prompts)} then, {len(after.prompts)} now); evaluate "
            "both models on the same rows"
        )
    if after.num_responses != before.num_responses:
        raise NotPaired(
            f"the evaluations have other numbers of responses per prompt ({before.num_responses} then, "
            f"{after.num_responses} now); set evaluation.num_responses to one of them for both"
        )
    differences = {}
    for name in after.means:
        now, then = after.means[name], before.means.get(name)
        if then is not None and (count := ~(now.isnan() | then.isnan())).any():
            differences[name] = paired_interval(now[count], then[count])
    return differences


def _is_column(values: Any, length: int) -> bool:
    return isinstance(values, list) and len(values) == length and all(isinstance(x, int | float | None) for x in values)
