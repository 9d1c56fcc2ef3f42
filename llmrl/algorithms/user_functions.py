"""Baselines and policy losses that users write and the settings name."""

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.distributed import DistError

from llmrl.algorithms.config import GRPOConfig, PPOConfig
from llmrl.catalogue import LOOP, OWN, find
from llmrl.functional.losses import ratio_metrics
from llmrl.functional.statistics import Statistic
from llmrl.memory import is_full
from llmrl.user_code import UserCodeError, UserCodeFailure, describe_exception, load_object, names_code

BASELINE, LOSS = "algorithm.baseline", "algorithm.loss"
ITERATION = "iteration"
"""Number of the iteration, which stands beside its metrics."""
OF_THE_LOSS = ("policy/clip_fraction", "policy/approx_kl", "policy/ratio_max_deviation")
"""Metrics of the catalogue that `clipped_policy_loss` returns, and so a user's loss may return."""


def check_user_functions(config: object) -> None:
    """Checks the user's functions that the settings of an algorithm name: each is loaded, and its signature compared.

    Raises:
        UserCodeError: One is missing, does not load, or does not take what it would be called with.
    """
    if isinstance(config, GRPOConfig | PPOConfig) and names_code(config.loss):
        UserLoss(config.loss)
    if isinstance(config, GRPOConfig) and names_code(config.baseline):
        UserBaseline(config.baseline)


class UserBaseline:
    """Advantages over a user's baseline.

    The function gets the scores and groups of the responses that could be scored, on the CPU and in order: `scores`
    (B,), float64, and `group_ids` (B,). It returns what is subtracted from each score, (B,).

    Args:
        name: Name of the function, as in a recipe.

    Raises:
        UserCodeError: There is no such function, or it does not take these.
    """

    def __init__(self, name: str) -> None:
        self.place = f"{BASELINE} {name}"
        self.function = _load_function(name, BASELINE, ("scores", "group_ids"))

    def __call__(self, scores: Float[Tensor, " B"], group_ids: Int[Tensor, " B"]) -> Float[Tensor, " B"]:
        """Scores minus the baseline, in the dtype of the scores; 0 for a response that could not be scored.

        Raises:
            UserCodeFailure: The function raised, or returned no finite number for some score.
        """
        scored = ~scores.isnan().cpu()
        exact = scores.double().cpu()
        advantages = torch.zeros_like(exact)
        if scored.any():
            known, groups = exact[scored], group_ids.cpu()[scored]
            advantages[scored] = known - self._baseline(known.clone(), groups)
        return advantages.to(scores)

    def _baseline(self, scores: Float[Tensor, " B"], group_ids: Int[Tensor, " B"]) -> Float[Tensor, " B"]:
        with failures_of(self.function, self.place):
            baseline = self.function(scores, group_ids)
        expected = f"expected a tensor of {len(scores)} numbers, one for each score"
        if not isinstance(baseline, Tensor) or baseline.shape != scores.shape:
            raise UserCodeFailure(f"{self.place} returned {describe(baseline)}; {expected}")
        if not baseline.isfinite().all():
            first = int((~baseline.isfinite()).nonzero()[0])
            raise UserCodeFailure(
                f"{self.place} returned {float(baseline[first])} for score {first} "
                f"({float(scores[first])}, group {int(group_ids[first])}); {expected}, each finite"
            )
        return baseline.detach().double().cpu()


class UserLoss:
    """A user's policy loss, called as `clipped_policy_loss` is, without its clips.

    The function gets `logprobs`, which have the gradient, `old_logprobs`, `advantages` and `weights`, each (B, T). It
    returns the loss, a tensor without dimensions, or ``(loss, metrics)`` with statistics by name.

    Args:
        name: Name of the function, as in a recipe.

    Raises:
        UserCodeError: There is no such function, or it does not take these.
    """

    def __init__(self, name: str) -> None:
        self.place = f"{LOSS} {name}"
        self.function = _load_function(name, LOSS, ("logprobs", "old_logprobs", "advantages", "weights"))
        self.kinds: dict[str, type] = {}
        """Kinds of the statistics so far, by name."""

    def __call__(
        self,
        logprobs: Float[Tensor, "B T"],
        old_logprobs: Float[Tensor, "B T"],
        advantages: Float[Tensor, "B T"],
        weights: Float[Tensor, "B T"],
    ) -> tuple[Float[Tensor, ""], dict[str, Statistic]]:
        """``(loss, metrics)``; the metrics are the function's own and, in place of any it returned, `ratio_metrics`.

        Raises:
            UserCodeFailure: The function raised, returned no finite loss with a gradient, or metrics that an algorithm
                or the loop measures.
        """
        with failures_of(self.function, self.place):
            returned = self.function(logprobs, old_logprobs, advantages, weights)
        loss, metrics = returned if isinstance(returned, tuple) and len(returned) == 2 else (returned, {})
        check_statistics(metrics, f"{self.place} returned", loggers=LOOP)
        check_kinds(metrics, self.kinds, f"{self.place} returned")
        loss = checked_loss(loss, f"{self.place} returned")
        return loss, {**metrics, **ratio_metrics(logprobs.detach(), old_logprobs, weights != 0)}


def checked_loss(loss: object, subject: str) -> Float[Tensor, ""]:
    """The loss, which is a finite number with a gradient.

    Raises:
        UserCodeFailure: It is not; `subject` begins the message.
    """
    if not isinstance(loss, Tensor) or loss.shape != ():
        raise UserCodeFailure(
            f"{subject} {describe(loss)} as the loss; expected a tensor without dimensions, such as "
            "(weights * losses).sum()"
        )
    if not loss.requires_grad:
        raise UserCodeFailure(
            f"{subject} a loss without gradient; compute it from logprobs, with no detach(), item() or no_grad() on "
            "the way"
        )
    if not loss.isfinite():
        raise UserCodeFailure(
            f"{subject} {loss.item()} as the loss; expected a finite number; select with torch.where(weights != 0, x, "
            "0.0) before exp, log and division, as anything may stand where the weight is 0"
        )
    return loss


def check_statistics(statistics: object, subject: str, *, loggers: tuple[str, ...] = (OWN,)) -> None:
    """Raises UserCodeFailure where metrics are no statistics by names of their own.

    Args:
        statistics: What a user's code gave as metrics.
        subject: Beginning of the message.
        loggers: Kinds of runs, as in the catalogue, whose metrics have names that are taken.
    """
    if not isinstance(statistics, dict) or not all(
        isinstance(name, str) and isinstance(value, Statistic) for name, value in statistics.items()
    ):
        raise UserCodeFailure(
            f"{subject} {describe(statistics)} as metrics; expected statistics by name, such as "
            '{"policy/my_share": Mean(total, num)} with Mean of llmrl.functional.statistics'
        )
    for name, statistic in statistics.items():
        for number in statistic:
            if not (isinstance(number, int | float) or (isinstance(number, Tensor) and number.shape == ())):
                raise UserCodeFailure(
                    f"{subject} {describe(number)} in the metric {name!r}; expected numbers, or tensors without "
                    "dimensions, such as Mean(x.sum(), x.numel())"
                )
        if name not in OF_THE_LOSS and is_taken(name, loggers):
            raise UserCodeFailure(
                f"{subject} a metric {name!r}, which llmrl logs itself; choose another name, such as policy/my_share"
            )


@cache
def is_taken(name: str, loggers: tuple[str, ...]) -> bool:
    """Whether runs of one of these kinds log a metric of this name, or the mean of moments of this name, themselves."""
    of_mean = find(f"{name}/mean")
    entry = find(name) if of_mean is None or of_mean.is_family else of_mean
    return name == ITERATION or (entry is not None and not set(loggers).isdisjoint(entry.runs))


def check_kinds(statistics: dict[str, Statistic], kinds: dict[str, type], subject: str) -> None:
    """Raises UserCodeFailure where a metric is a statistic of another kind than in `kinds`, those so far by name, to
    which it adds these; `subject` begins the message."""
    for name, statistic in statistics.items():
        kind, before = type(statistic), kinds.setdefault(name, type(statistic))
        if kind is not before:
            raise UserCodeFailure(
                f"{subject} a {kind.__name__} as the metric {name!r}, which was a {before.__name__} before; give one "
                "of them another name (a Total that losses yields becomes a Mean over optimizer steps)"
            )


def _load_function(name: str, setting: str, parameters: tuple[str, ...]) -> Callable[..., Any]:
    """The function that a setting names, checked to take these parameters by position."""
    function = load_object(name, role=setting)
    if inspect.isclass(function) or not callable(function):
        raise UserCodeError(f"{setting} {name} is {describe(function)}; name a function of {_listed(parameters)}")
    check_signature(function, setting, name, parameters, ())
    return function


def check_signature(
    function: Callable[..., Any], setting: str, name: str, positional: tuple[str, ...], by_name: tuple[str, ...]
) -> None:
    """Raises UserCodeError where a function cannot be called with these."""
    try:
        signature = inspect.signature(function)
    except ValueError as error:
        raise UserCodeError(f"{setting} {name} does not tell its parameters; wrap it in a function") from error
    try:
        signature.bind(*positional, **dict.fromkeys(by_name))
    except TypeError as error:
        wanted = _listed(positional, "*", *by_name) if by_name else _listed(positional)
        raise UserCodeError(
            f"{setting} {name} takes {signature} and is called with {wanted}: {error}; change its parameters"
        ) from error


@contextmanager
def failures_of(code: Callable[..., Any], place: str) -> Iterator[None]:
    """Context of a call of a user's function or class: what it raises becomes one line, which begins with `place`.

    Memory that ran out, a lost connection between ranks, and a failure that has its line already pass as they are.

    Raises:
        UserCodeFailure: It raised, and the exception is its cause.
    """
    try:
        yield
    except (DistError, UserCodeFailure):
        raise
    except (Exception, SystemExit) as error:
        if is_full(error):
            raise
        raise UserCodeFailure(f"{place} {describe_exception(code, error)}") from error


def _listed(parameters: tuple[str, ...], *more: str) -> str:
    return f"({', '.join((*parameters, *more))})"


def describe(value: object) -> str:
    """Description of a value, for messages."""
    match value:
        case Tensor():
            return f"a tensor of shape {tuple(value.shape)}"
        case tuple():
            return f"({', '.join(type(item).__name__ for item in value)})"
        case type():
            return f"the class {value.__name__}"
    return f"{value!r:.60} ({type(value).__name__})"
