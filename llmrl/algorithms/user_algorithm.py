"""Algorithms that users write and the settings name: loaded, constructed, and checked at every call."""

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import fields
from typing import Any, cast, get_args

from jaxtyping import Bool, Float
from torch import Tensor

from llmrl.algorithms.config import GRPOConfig
from llmrl.algorithms.user_functions import (
    check_kinds,
    check_signature,
    check_statistics,
    checked_loss,
    describe,
    failures_of,
)
from llmrl.batches import Batch, Experience, Rollout, Scores
from llmrl.functional.aggregation import Aggregation
from llmrl.metrics import Metrics
from llmrl.roles import Algorithm, Progress
from llmrl.user_code import UserCodeError, UserCodeFailure, load_object, names_code

NAME = "algorithm.name"
ARGUMENTS = ("actor", "reference", "max_response_tokens")
"""Keyword arguments that the class of an algorithm without a critic is made with, after its settings."""
READ_BY_THE_LOOP = ("name", "group_size", "kl_coef", "reference_refresh_every", "reference_mixing")
"""Settings that have their effect whether the class reads them or not."""
TRAINED = "actor"
"""The only module that an algorithm without a critic trains."""
RETURN, YIELD = "return experience, Metrics()", f'yield "{TRAINED}", loss, Metrics()'
"""Last lines of `experience` and `losses`, for messages."""
END = object()


def check_user_algorithm(config: object) -> None:
    """Checks the user's class that the settings of an algorithm name: it is loaded, and its signature compared.

    Raises:
        UserCodeError: It is missing, does not load, lacks methods, or does not take what it would be made with.
    """
    if isinstance(config, GRPOConfig) and names_code(config.name):
        load_algorithm(config.name)


def load_algorithm(name: str) -> Callable[..., Algorithm]:
    """The class of a user's algorithm.

    Raises:
        UserCodeError: There is no such class, it lacks methods of `Algorithm`, or it cannot be made as `GRPO` is.
    """
    algorithm = load_object(name, role=NAME)
    if not inspect.isclass(algorithm):
        raise UserCodeError(f"{NAME} {name} is {describe(algorithm)}; name a class, such as a subclass of GRPO")
    methods = [method for method, value in vars(Algorithm).items() if callable(value) and not method.startswith("_")]
    stubs = (None, Algorithm.experience, Algorithm.losses)
    if lacking := [method for method in methods if getattr(algorithm, method, None) in stubs]:
        raise UserCodeError(
            f"{NAME} {name} lacks {', '.join(lacking)}; write {'it' if len(lacking) == 1 else 'them'}, or make it a "
            "subclass of llmrl.roles.Algorithm, which has all but experience and losses, or of GRPO"
        )
    check_signature(algorithm, NAME, name, ("config",), ARGUMENTS)
    return cast(Callable[..., Algorithm], algorithm)


def make_user_algorithm(name: str, config: GRPOConfig, *, progress: Progress, **roles: Any) -> "UserAlgorithm":
    """A user's algorithm, constructed with the arguments of `GRPO`. `progress` receives its warnings.

    Raises:
        UserCodeFailure: The constructor raised, or set no attribute that the loop reads, or one to a wrong value.
    """
    code, place, recorded = load_algorithm(name), f"{NAME} {name}", RecordedConfig(**vars(config))
    with failures_of(code, place):
        algorithm = code(recorded, **roles)
    if lacking := [attribute for attribute in inspect.get_annotations(Algorithm) if not hasattr(algorithm, attribute)]:
        raise UserCodeFailure(
            f"{place} has no {', '.join(lacking)}, which the loop reads; set "
            f"{'it' if len(lacking) == 1 else 'them'} in __init__, such as self.{lacking[0]} = ..."
        )
    if algorithm.aggregation not in get_args(Aggregation):
        raise UserCodeFailure(
            f"{place} has aggregation {algorithm.aggregation!r}; expected {' or '.join(get_args(Aggregation))}; set "
            "self.aggregation = config.aggregation"
        )
    for attribute in ("max_redraws", "max_response_tokens"):
        if not isinstance(number := getattr(algorithm, attribute), int):
            raise UserCodeFailure(f"{place} has {attribute} {number!r}; expected a whole number; set it in __init__")
    return UserAlgorithm(algorithm, place, recorded, progress)


class RecordedConfig(GRPOConfig):
    """Settings of GRPO that record which of them are read."""

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "names_read", set())  # the checks above have read all

    def __getattribute__(self, name: str) -> Any:
        object.__getattribute__(self, "__dict__").get("names_read", set()).add(name)
        return object.__getattribute__(self, name)

    def unread(self) -> list[str]:
        """Names of the settings that differ from their default and have not been read, except by the loop."""
        own = vars(self)
        return [
            field.name
            for field in fields(GRPOConfig)
            if field.name not in (*READ_BY_THE_LOOP, *own["names_read"]) and own[field.name] != field.default
        ]


class UserAlgorithm:
    """`Algorithm` of a user whose every result is checked. Attributes are those of the user's object.

    Every method raises UserCodeFailure where the user's raises, or returns what cannot be used.

    Args:
        algorithm: The user's object.
        place: Beginning of messages about it.
        config: The settings that it was made with. Those that it has not read by the end of the first iteration are
            reported.
        progress: Receives that report.
    """

    aggregation: Aggregation
    max_redraws: int
    max_response_tokens: int

    def __init__(self, algorithm: Algorithm, place: str, config: RecordedConfig, progress: Progress) -> None:
        self.algorithm = algorithm
        self.place = place
        self.config = config
        self.progress = progress
        self.has_learned = False
        """Whether `losses` has been called."""
        self.kinds: dict[str, type] = {}
        """Kinds of the statistics that an iteration pools, by name."""
        self.kinds_of_losses: dict[str, type] = {}
        """Kinds of the statistics that an optimizer step pools, by name."""
        self.has_reported = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self.algorithm, name)

    def experience(self, rollout: Rollout, scores: Scores) -> tuple[Experience, Metrics]:
        """See `Algorithm`."""
        subject = f"{self.place}.experience returned"
        with self._failures("experience"):
            returned = self.algorithm.experience(rollout, scores)
        match returned:
            case (Experience() as experience, Metrics() as metrics):
                _check_experience(experience, subject, self.config.group_size)
                self._check_metrics(metrics, subject)
                return experience, metrics
        raise UserCodeFailure(f"{subject} {describe(returned)}; expected (Experience, Metrics), as in {RETURN}")

    def losses(self, batch: Any, weights: Float[Tensor, "B T"]) -> Iterator[tuple[str, Tensor, Metrics]]:
        """See `Algorithm`."""
        self.has_learned = True
        with self._failures("losses"):
            yielded = self.algorithm.losses(batch, weights)
        if not isinstance(yielded, Iterator):
            raise UserCodeFailure(
                f"{self.place}.losses returned {describe(yielded)}; expected an iterator of (module, loss, metrics): "
                f"write {YIELD} in place of return"
            )
        while True:
            with self._failures("losses"):
                item = next(yielded, END)
            if item is END:
                return
            yield self._checked_loss(item)

    def _checked_loss(self, item: object) -> tuple[str, Tensor, Metrics]:
        subject = f"{self.place}.losses yielded"
        match item:
            case (str() as module, loss, Metrics() as metrics):
                if module != TRAINED:
                    raise UserCodeFailure(
                        f"{subject} a loss for {module!r}; expected {TRAINED!r}, the only module that is trained; add "
                        f"what the loss consists of, and {YIELD}"
                    )
                check_statistics(metrics.statistics, subject)
                check_kinds(metrics.statistics, self.kinds_of_losses, subject)
                check_kinds(metrics.per_step().statistics, self.kinds, subject)
                return module, checked_loss(loss, subject), metrics
        raise UserCodeFailure(f"{subject} {describe(item)}; expected (module, loss, metrics), as in {YIELD}")

    def _check_metrics(self, metrics: Metrics, subject: str) -> None:
        check_statistics(metrics.statistics, subject)
        check_kinds(metrics.statistics, self.kinds, subject)

    def should_stop(self, update: Metrics) -> bool:
        """See `Algorithm`."""
        with self._failures("should_stop"):
            return bool(self.algorithm.should_stop(update))

    def finish(self, experience: Any) -> Metrics:
        """See `Algorithm`. Reports unread settings at the end of the first iteration that learned."""
        with self._failures("finish"):
            metrics = self.algorithm.finish(experience)
        subject = f"{self.place}.finish returned"
        if not isinstance(metrics, Metrics):
            raise UserCodeFailure(f"{subject} {describe(metrics)}; expected Metrics, as in return Metrics()")
        self._check_metrics(metrics, subject)
        if self.has_learned and not self.has_reported:
            self._report_unread()
        return metrics

    def _report_unread(self) -> None:
        self.has_reported = True
        for name in self.config.unread():
            self.progress.message(
                f"warning: algorithm.{name} ({getattr(self.config, name)}) is set, and {self.place} has not read it in "
                f"its first iteration; read config.{name}, or leave the setting out"
            )

    def state_dict(self) -> dict[str, Any]:
        """See `Algorithm`."""
        with self._failures("state_dict"):
            state = self.algorithm.state_dict()
        subject = f"{self.place}.state_dict returned"
        if not isinstance(state, dict):
            raise UserCodeFailure(f"{subject} {describe(state)}; expected a dict, as in return {{'num': self.num}}")
        _check_state(state, subject)
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See `Algorithm`."""
        with self._failures("load_state_dict"):
            self.algorithm.load_state_dict(state)

    def _failures(self, method: str) -> AbstractContextManager[None]:
        return failures_of(type(self.algorithm), f"{self.place}.{method}")


def _check_experience(experience: Experience, subject: str, group_size: int) -> None:
    """Raises UserCodeFailure where an update cannot learn from an experience."""
    for name, kind in (("rollout", Rollout), ("scores", Scores)):
        if not isinstance(value := getattr(experience, name), kind):
            raise UserCodeFailure(f"{subject} {describe(value)} as {name}; expected {kind.__name__}: pass on {name}")
    num_responses = len(experience.rollout.rows)
    if num_responses % group_size:
        raise UserCodeFailure(
            f"{subject} an experience of {num_responses} responses; expected whole groups of algorithm.group_size "
            f"({group_size}); a response leaves an update by an advantage of 0, or as a whole group"
        )
    for field in fields(experience):
        if field.name != "rollout":
            _check_rows(getattr(experience, field.name), field.name, num_responses, subject)
    for name in ("old_logprobs", "advantages"):
        _check_tokens(getattr(experience, name), name, experience.counted, subject)


def _check_rows(value: object, name: str, num_responses: int, subject: str) -> None:
    """Raises UserCodeFailure where the rows of a field are not the responses."""
    match value:
        case Batch():
            parts = {f"{name}.{field.name}": getattr(value, field.name) for field in fields(value)}
        case Mapping():
            parts = {f"{name}[{key!r}]": part for key, part in value.items()}
        case Tensor() | tuple() if (value.dim() if isinstance(value, Tensor) else True) and len(value) == num_responses:
            parts = {}
        case _:
            raise UserCodeFailure(
                f"{subject} {describe(value)} as {name}; expected a tensor whose first axis is the {num_responses} "
                "responses; numbers that are not of a response are attributes of the class"
            )
    for path, part in parts.items():
        _check_rows(part, path, num_responses, subject)


def _check_tokens(value: Tensor, name: str, mask: Bool[Tensor, "B T"], subject: str) -> None:
    """Raises UserCodeFailure where a field has not one finite number for each token that counts."""
    if not isinstance(value, Tensor) or value.shape != mask.shape:
        raise UserCodeFailure(
            f"{subject} {describe(value)} as {name}; expected the shape {tuple(mask.shape)}, a number for each "
            "token of each response; where a response has one number, write x[:, None].expand_as(logprobs)"
        )
    wrong = mask.to(value.device) & ~value.isfinite()
    if wrong.any():
        row, token = wrong.nonzero()[0].tolist()
        raise UserCodeFailure(
            f"{subject} {float(value[row, token])} in {name}, for response {row}, token {token}; expected a finite "
            "number wherever `counted` is True; divide by nothing that can be 0, and leave responses that could "
            "not be scored (NaN in scores.total) out of means"
        )


def _check_state(value: object, subject: str, path: str = "") -> None:
    """Raises UserCodeFailure where a checkpoint cannot hold a state."""
    match value:
        case dict() if all(isinstance(key, str) and "/" not in key for key in value):
            for key, part in value.items():
                _check_state(part, subject, f"{path}[{key!r}]")
        case list() | tuple() if not any(isinstance(part, Tensor) for part in value):
            for index, part in enumerate(value):
                _check_state(part, subject, f"{path}[{index}]")
        case Tensor() | str() | int() | float() | None:
            pass
        case _:
            raise UserCodeFailure(
                f"{subject} {describe(value)}{path and f' at {path}'}; expected numbers, strings and tensors, in dicts "
                "whose keys are strings without a slash; convert it, such as by float(x)"
            )
