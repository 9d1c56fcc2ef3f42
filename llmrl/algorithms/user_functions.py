"""Baselines, policy losses and algorithms that users write and the settings name."""

import inspect
from collections.abc import Callable
from typing import Any, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor

from llmrl.algorithms.config import GRPOConfig, PPOConfig
from llmrl.functional.losses import ratio_metrics
from llmrl.functional.statistics import Statistic
from llmrl.roles import Algorithm
from llmrl.user_code import UserCodeError, UserCodeFailure, describe_exception, load_object, names_code

BASELINE, LOSS, NAME = "algorithm.baseline", "algorithm.loss", "algorithm.name"
ALGORITHM_ARGUMENTS = ("actor", "reference", "max_response_tokens")
"""Keyword arguments that the class of an algorithm without a critic is made with, after its settings."""


def check_user_functions(config: object) -> None:
    """Checks the user's functions and class that the settings of an algorithm name, by loading them.

    Raises:
        UserCodeError: One is missing, does not load, or does not take what it would be called with.
    """
    if isinstance(config, GRPOConfig | PPOConfig) and names_code(config.loss):
        UserLoss(config.loss)
    if isinstance(config, GRPOConfig) and names_code(config.baseline):
        UserBaseline(config.baseline)
    if isinstance(config, GRPOConfig) and names_code(config.name):
        load_algorithm(config.name)


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
        self.name = name
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
        baseline = _call(self.function, BASELINE, self.name, scores, group_ids)
        expected = f"expected a tensor of {len(scores)} numbers, one for each score"
        if not isinstance(baseline, Tensor) or baseline.shape != scores.shape:
            raise UserCodeFailure(f"{BASELINE} {self.name} returned {_describe(baseline)}; {expected}")
        if not baseline.isfinite().all():
            first = int((~baseline.isfinite()).nonzero()[0])
            raise UserCodeFailure(
                f"{BASELINE} {self.name} returned {float(baseline[first])} for score {first} "
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
        self.name = name
        self.function = _load_function(name, LOSS, ("logprobs", "old_logprobs", "advantages", "weights"))

    def __call__(
        self,
        logprobs: Float[Tensor, "B T"],
        old_logprobs: Float[Tensor, "B T"],
        advantages: Float[Tensor, "B T"],
        weights: Float[Tensor, "B T"],
    ) -> tuple[Float[Tensor, ""], dict[str, Statistic]]:
        """``(loss, metrics)``; the metrics are those of `ratio_metrics` and the function's own.

        Raises:
            UserCodeFailure: The function raised, or returned no loss with a gradient.
        """
        returned = _call(self.function, LOSS, self.name, logprobs, old_logprobs, advantages, weights)
        loss, metrics = returned if isinstance(returned, tuple) and len(returned) == 2 else (returned, {})
        if not isinstance(loss, Tensor) or loss.shape != ():
            raise UserCodeFailure(
                f"{LOSS} {self.name} returned {_describe(loss)} as the loss; expected a tensor without dimensions, "
                "such as (weights * losses).sum()"
            )
        if not loss.requires_grad:
            raise UserCodeFailure(
                f"{LOSS} {self.name} returned a loss without gradient; compute it from logprobs, with no detach(), "
                "item() or no_grad() on the way"
            )
        if not isinstance(metrics, dict) or not all(isinstance(value, Statistic) for value in metrics.values()):
            raise UserCodeFailure(
                f"{LOSS} {self.name} returned {_describe(metrics)} as metrics; expected statistics by name, such as "
                '{"policy/my_share": Mean(total, num)} with Mean of llmrl.functional.statistics'
            )
        return loss, {**ratio_metrics(logprobs.detach(), old_logprobs, weights != 0), **metrics}


def load_algorithm(name: str) -> Callable[..., Algorithm]:
    """The class of a user's algorithm.

    Raises:
        UserCodeError: There is no such class, it lacks methods of `Algorithm`, or it cannot be made as `GRPO` is.
    """
    algorithm = load_object(name, role=NAME)
    if not inspect.isclass(algorithm):
        raise UserCodeError(f"{NAME} {name} is {_describe(algorithm)}; name a class, such as a subclass of GRPO")
    methods = [method for method, value in vars(Algorithm).items() if callable(value) and not method.startswith("_")]
    stubs = (None, Algorithm.experience, Algorithm.losses)
    if lacking := [method for method in methods if getattr(algorithm, method, None) in stubs]:
        raise UserCodeError(
            f"{NAME} {name} lacks {', '.join(lacking)}; write {'it' if len(lacking) == 1 else 'them'}, or make it a "
            "subclass of llmrl.roles.Algorithm, which has all but experience and losses, or of GRPO"
        )
    _check_signature(algorithm, NAME, name, ("config",), ALGORITHM_ARGUMENTS)
    return cast(Callable[..., Algorithm], algorithm)


def make_user_algorithm(name: str, config: GRPOConfig, **roles: Any) -> Algorithm:
    """A user's algorithm, constructed with the arguments of `GRPO`.

    Raises:
        UserCodeFailure: The constructor raised, or sets no attribute of a name that the loop reads.
    """
    algorithm = _call(load_algorithm(name), NAME, name, config, **roles)
    if lacking := [attribute for attribute in inspect.get_annotations(Algorithm) if not hasattr(algorithm, attribute)]:
        raise UserCodeFailure(
            f"{NAME} {name} has no {', '.join(lacking)}, which the loop reads; set it in __init__, such as "
            f"self.{lacking[0]} = ..."
        )
    return algorithm


def _load_function(name: str, setting: str, parameters: tuple[str, ...]) -> Callable[..., Any]:
    """The function that a setting names, checked to take these parameters by position."""
    function = load_object(name, role=setting)
    if inspect.isclass(function) or not callable(function):
        raise UserCodeError(f"{setting} {name} is {_describe(function)}; name a function of {_listed(parameters)}")
    _check_signature(function, setting, name, parameters, ())
    return function


def _check_signature(
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


def _call(function: Callable[..., Any], setting: str, name: str, *arguments: Any, **by_name: Any) -> Any:
    """What a user's function returns.

    Raises:
        UserCodeFailure: It raised, and the exception is its cause. Running out of memory is raised as it is.
    """
    try:
        return function(*arguments, **by_name)
    except torch.OutOfMemoryError:
        raise
    except (Exception, SystemExit) as error:
        raise UserCodeFailure(f"{setting} {name} {describe_exception(function, error)}") from error


def _listed(parameters: tuple[str, ...], *more: str) -> str:
    return f"({', '.join((*parameters, *more))})"


def _describe(value: Any) -> str:
    """Description of a value, for messages."""
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)}"
    return f"the class {value.__name__}" if inspect.isclass(value) else f"{value!r:.60} ({type(value).__name__})"
