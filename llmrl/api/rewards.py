"""Rewards that a program hands over, as the section of a recipe."""

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, Union

from llmrl.api.folder import RunFolder
from llmrl.api.given import Given
from llmrl.rewards.loading import takes_rollout
from llmrl.settings import SettingError
from llmrl.user_code import load_object, names_code

if TYPE_CHECKING:
    from transformers import PreTrainedModel

OneReward: TypeAlias = Union[Callable[..., Any], "PreTrainedModel", RunFolder, str, Path]
"""A function, also by its name ``file.py:function``; a `RewardFunction` of `llmrl.roles`; a reward model."""
Reward: TypeAlias = (
    OneReward
    | tuple[OneReward, float]
    | Sequence[OneReward | tuple[OneReward, float]]
    | Mapping[str, OneReward | tuple[OneReward, float]]
)
"""One reward, or several as a list or, by their names in the metrics, as a mapping; each with a weight where it stands
in a pair ``(reward, weight)``. A reward model is ``model`` in the metrics, whatever its name here."""


def reward_section(reward: Reward, given: Given) -> dict[str, Any]:
    """Section `reward` of a recipe.

    Raises:
        SettingError: It is no reward, or rewards are together that cannot be.
    """
    functions: list[dict[str, Any]] = []
    models: list[dict[str, Any]] = []
    for name, each, weight in _named(reward):
        setting = {} if weight is None else {"weight": weight}
        if _is_model(each):
            models.append({"path": given.model(each, argument="reward_model"), **setting})
        elif callable(each) or isinstance(each, str):
            functions.append({"name": _code(each, name, given), **setting})
        else:
            raise SettingError(
                f"reward is a {type(each).__name__}; hand over a function such as def score(responses), a reward "
                "model, or several of them as a list or a dict"
            )
    if len(functions) > 1 and any(callable(each) and takes_rollout(each) for _, each, _ in _named(reward)):
        raise SettingError(
            "reward: one that takes a rollout scores alone, or beside a reward model; call the others in it"
        )
    if len(models) > 1:
        raise SettingError(f"reward has {len(models)} reward models, and a run scores by one; leave the others out")
    return {"functions": functions, **({"model": models[0]} if models else {})}


def _named(reward: Any) -> Iterator[tuple[str | None, Any, float | None]]:
    """Yields ``(name, reward, weight)`` of each reward; None where it is not given."""
    is_pair = isinstance(reward, tuple) and len(reward) == 2 and isinstance(reward[1], int | float)
    if isinstance(reward, Mapping):
        entries: list[tuple[str | None, Any]] = list(reward.items())
    elif isinstance(reward, list | tuple) and not is_pair:
        entries = [(None, each) for each in reward]
    else:
        entries = [(None, reward)]
    for name, entry in entries:
        has_weight = isinstance(entry, tuple) and len(entry) == 2
        yield (name, *entry) if has_weight else (name, entry, None)


def _is_model(reward: Any) -> bool:
    if isinstance(reward, str):
        return not names_code(reward)
    return isinstance(reward, RunFolder | Path) or hasattr(reward, "save_pretrained")


def _code(reward: Any, name: str | None, given: Given) -> str:
    if name is not None and not name.isidentifier():
        raise SettingError(
            f"reward: {name!r} cannot be the name of a function in the metrics; write letters, digits and _, such as "
            "length_penalty"
        )
    if not isinstance(reward, str):
        takes_tensors = inspect.isfunction(reward) and takes_rollout(reward)  # which no other process gets
        return given.code(reward, name, stays_here=takes_tensors)
    if name is None or reward.rpartition(":")[2] == name:
        return reward
    return given.code(load_object(reward, role="reward function"), name)
