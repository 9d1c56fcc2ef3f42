"""Sections of settings, and what is marked on the types of their fields: bounds, and where a default comes from."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, fields
from functools import cache
from types import NoneType
from typing import Any, ClassVar, get_args, get_type_hints


@dataclass(frozen=True, kw_only=True)
class Bound:
    """Range of a number, or of each of a list, as in ``rank: Annotated[int, Bound(least=1)] = 16``; finite unless
    `allows_infinity`."""

    least: int | float = -math.inf
    above: int | float = -math.inf
    most: int | float = math.inf
    below: int | float = math.inf
    allows_infinity: bool = False
    why: str = ""
    """The reason for the rule, in words; empty where it is plain."""
    way_out: str = ""
    """Advice on what to write instead; empty where any number that follows the rule will do."""

    def holds(self, value: int | float) -> bool:
        """Whether a value keeps to the bounds. NaN never does."""
        is_within = self.least <= value <= self.most and self.above < value < self.below
        return is_within if math.isfinite(value) else self.allows_infinity and value > self.above

    @property
    def rule(self) -> str:
        """The bounds in words, such as "at least 0 and less than 1"; empty for any finite number."""
        match self.least, self.most:
            case (0, math.inf) if self.below == math.inf:
                return "0 or greater"
            case (least, most) if math.isfinite(least) and math.isfinite(most):
                return f"between {least} and {most}"
        words = {"at least": self.least, "greater than": self.above, "at most": self.most, "less than": self.below}
        return " and ".join(f"{word} {limit}" for word, limit in words.items() if math.isfinite(limit))


@dataclass(frozen=True)
class Like:
    """Section from which another one takes what it leaves out: ``Annotated[DataConfig, Like("data", ("path",))]``."""

    source: str
    """The section of the same run whose settings stand in."""
    own: tuple[str, ...]
    """Settings that are never taken from there: left out, they have their own defaults."""


class Section:
    """Base of the dataclasses that hold settings: making one checks the bounds of its fields.

    ``class RolloutConfig(Section, place="rollout")`` names the place of the section in most recipes; errors begin with
    it. A subclass with checks of its own has a ``__post_init__`` that calls this one first.
    """

    place: ClassVar[str]

    def __init_subclass__(cls, place: str | None = None, **others: Any) -> None:
        super().__init_subclass__(**others)
        if place is not None:
            cls.place = place

    def __post_init__(self) -> None:
        for name, (bound, may_be_null) in bounds(type(self)).items():
            for number in _numbers(getattr(self, name)):
                if not bound.holds(number):
                    raise ValueError(_refusal(f"{self.place}.{name}", number, bound, may_be_null=may_be_null))


@cache
def bounds(section: type) -> dict[str, tuple[Bound, bool]]:
    """The bound of each field that has one, and whether the field may be null."""
    return dict(_bounds(section))


@cache
def likes(section: type) -> dict[str, Like]:
    """Source of each field that takes settings from another one."""
    return {name: mark for name, _, mark in _marks(section) if isinstance(mark, Like)}


def _bounds(section: type) -> Iterator[tuple[str, tuple[Bound, bool]]]:
    for name, kind, mark in _marks(section):
        if isinstance(mark, Bound):
            yield name, (mark, NoneType in get_args(kind))


def _marks(section: type) -> Iterator[tuple[str, Any, Any]]:
    """``(name, type, mark)`` of every field with something marked on its type."""
    hints = get_type_hints(section, include_extras=True)
    for field in fields(section):
        for mark in getattr(hints[field.name], "__metadata__", ()):
            yield field.name, hints[field.name].__origin__, mark


def _numbers(value: int | float | tuple[int | float, ...] | None) -> tuple[int | float, ...]:
    """What a bound is held against: a number, each of a list, or nothing for null."""
    match value:
        case None:
            return ()
        case tuple():
            return value
    return (value,)


def _refusal(place: str, value: int | float, bound: Bound, *, may_be_null: bool) -> str:
    is_number = math.isfinite(value) or bound.allows_infinity
    rule = " and ".join(part for part in ("" if is_number else "finite", bound.rule) if part)
    null = ", or null" if may_be_null else ""
    why = f": {bound.why}" if bound.why else ""
    way_out = f"; {bound.way_out}" if bound.way_out else ""
    return f"{place} ({value}) must be {rule}{null}{why}{way_out}"
