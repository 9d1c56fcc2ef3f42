"""Bounds of settings: what they let pass, what they say, and that making a section checks them."""

import math
from dataclasses import dataclass, replace
from typing import Annotated, Any

import pytest

from llmrl.section import Bound, Section, bounds

NEXT_TO_ONE = math.nextafter(1, 2)


@dataclass(frozen=True, kw_only=True)
class Adapter(Section, place="model.lora"):
    rank: Annotated[int, Bound(least=1, why="no rank, no update", way_out="leave the section out")] = 16
    dropout: Annotated[float | None, Bound(least=0, below=1)] = None
    scale: Annotated[float, Bound()] = 1.0
    slopes: Annotated[tuple[float, ...], Bound(least=0)] = ()
    name: str = "a"


@dataclass(frozen=True, kw_only=True)
class Wider(Adapter):
    decay: Annotated[float, Bound(above=0)] = 0.1


@pytest.mark.parametrize(
    ("bound", "inside", "outside", "rule"),
    [
        (Bound(least=0), [0, 1e300], [-1e-300], "0 or greater"),
        (Bound(least=3), [3.0], [2.9], "at least 3"),
        (Bound(above=1), [NEXT_TO_ONE], [1.0, -5], "greater than 1"),
        (Bound(above=0, most=1), [1e-300, 1], [0, NEXT_TO_ONE], "greater than 0 and at most 1"),
        (Bound(least=0, below=1), [0, 0.9], [1, -0.1], "at least 0 and less than 1"),
        (Bound(least=0, most=1), [0, 1], [-0.1, 1.1], "between 0 and 1"),
        (Bound(), [-1e300, 1e300], [], ""),
    ],
)
def test_a_bound_and_its_rule(bound: Bound, inside: list[float], outside: list[float], rule: str):
    assert bound.rule == rule
    assert all(bound.holds(value) for value in inside)
    assert not any(bound.holds(value) for value in [*outside, math.nan, math.inf, -math.inf])


def test_infinity_only_where_it_is_allowed_and_only_upwards():
    bound = Bound(above=0, allows_infinity=True)
    assert bound.holds(math.inf)
    assert not any(bound.holds(value) for value in (-math.inf, math.nan, 0.0))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"rank": 0},
            "model.lora.rank (0) must be at least 1: no rank, no update; leave the section out",
        ),
        ({"dropout": 1.0}, "model.lora.dropout (1.0) must be at least 0 and less than 1, or null"),
        ({"dropout": math.nan}, "model.lora.dropout (nan) must be finite and at least 0 and less than 1, or null"),
        ({"slopes": (0.0, -1.0)}, "model.lora.slopes (-1.0) must be 0 or greater"),
        ({"scale": math.inf}, "model.lora.scale (inf) must be finite"),
        ({"decay": 0.0}, "model.lora.decay (0.0) must be greater than 0"),
    ],
)
def test_a_value_out_of_bounds_is_refused_by_place_value_rule_and_way_out(settings: dict[str, Any], message: str):
    with pytest.raises(ValueError, match="must be") as refused:
        Wider(**settings)
    assert str(refused.value) == message
    with pytest.raises(ValueError, match="must be"):
        replace(Wider(), **settings)


def test_null_is_within_the_bounds_of_a_setting_that_may_be_null():
    assert Wider(dropout=None).dropout is None


def test_the_bounds_of_a_section_are_those_of_its_fields_and_of_its_base():
    assert {name: may_be_null for name, (_, may_be_null) in bounds(Wider).items()} == {
        "rank": False,
        "dropout": True,
        "scale": False,
        "slopes": False,
        "decay": False,
    }
