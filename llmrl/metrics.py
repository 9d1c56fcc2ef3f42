"""Metrics of an iteration: pooled as sums and counts on the device, turned into floats once, at the end."""

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from llmrl.functional.statistics import (
    EffectiveShare,
    Explained,
    Loads,
    Maximum,
    Mean,
    Minimum,
    Moments,
    Statistic,
    Total,
)

LOADS = "experts"
"""Name of the statistic that counts how often experts are chosen."""
AGREEMENT = f"{LOADS}/agreement"
"""Name of the share of their choices that are those made during sampling."""
VARIANCE_ROUNDING = 2.0**-40
"""Smallest variance, relative to the mean squares it is computed from; below it is the rounding of float32."""


@dataclass(frozen=True)
class Metrics:
    """Statistics by name. Merging pools sums, counts, maxima and moments, so that no mean of means is ever logged."""

    statistics: dict[str, Statistic] = field(default_factory=dict)

    def merge(self, other: "Metrics") -> "Metrics":
        """Statistics of both, pooled; a name that only one of them has is kept as it is."""
        merged = dict(self.statistics)
        for name, statistic in other.statistics.items():
            merged[name] = pool(merged[name], statistic) if name in merged else statistic
        return Metrics(merged)

    def without(self, *names: str) -> "Metrics":
        """These metrics without the statistics of these names."""
        return Metrics({name: statistic for name, statistic in self.statistics.items() if name not in names})

    def in_floats(self) -> "Metrics":
        """These metrics as Python floats, in one transfer from the device, to be sent to other ranks."""
        flat = iter(_flatten(self.statistics))
        return Metrics(
            {
                name: Loads(s.counts.cpu()) if isinstance(s, Loads) else type(s)(*(next(flat) for _ in s))
                for name, s in self.statistics.items()
            }
        )

    def per_step(self) -> "Metrics":
        """Each `Total` as a `Mean` of count 1, so that merging optimizer steps averages them."""
        return Metrics(
            {
                name: Mean(statistic.value, 1.0) if isinstance(statistic, Total) else statistic
                for name, statistic in self.statistics.items()
            }
        )

    def values(self) -> dict[str, float]:
        """Values as floats, in one transfer from the device, and one more for `Loads`. `Moments` named ``x`` become
        ``x/mean`` and ``x/std``, and `Loads` ``x/load_max`` and ``x/unused_fraction``.

        A mean over nothing is left out, and so is the explained variance of targets without variance.
        """
        flat = _flatten(self.statistics)
        floats: dict[str, float] = {}
        for name, statistic in self.statistics.items():
            if isinstance(statistic, Loads):
                floats.update(_read_loads(name, statistic.counts))
                continue
            numbers = [flat.pop(0) for _ in statistic]
            floats.update(_read(name, statistic, numbers))
        return floats


def pool(left: Statistic, right: Statistic) -> Statistic:
    """One statistic of everything that two of the same kind cover.

    Raises:
        TypeError: They are of different kinds.
    """
    match left, right:
        case Maximum(), Maximum():
            return Maximum(_maximum(left.value, right.value))
        case Minimum(), Minimum():
            return Minimum(-_maximum(-left.value, -right.value))
        case Loads(), Loads():
            return Loads(left.counts + right.counts)
        case (
            (Mean(), Mean())
            | (Total(), Total())
            | (Moments(), Moments())
            | (Explained(), Explained())
            | (EffectiveShare(), EffectiveShare())
        ):
            return type(left)(*(a + b for a, b in zip(left, right, strict=True)))
    raise TypeError(f"cannot pool a {type(left).__name__} with a {type(right).__name__}: one name, two meanings")


def _maximum(left: Tensor | float, right: Tensor | float) -> Tensor | float:
    if isinstance(left, Tensor) or isinstance(right, Tensor):
        return torch.maximum(torch.as_tensor(left), torch.as_tensor(right))
    return max(left, right)


def _flatten(statistics: dict[str, Statistic]) -> list[float]:
    scalars = (statistic for statistic in statistics.values() if not isinstance(statistic, Loads))
    numbers = [number for statistic in scalars for number in statistic]
    tensors = [number.detach().double() for number in numbers if isinstance(number, Tensor)]
    fetched = iter(torch.stack(tensors).tolist() if tensors else [])
    return [next(fetched) if isinstance(number, Tensor) else float(number) for number in numbers]


def _read(name: str, statistic: Statistic, numbers: list[float]) -> dict[str, float]:
    match statistic:
        case Mean():
            total, count = numbers
            return {name: total / count} if count else {}
        case Moments():
            count, total, square = numbers
            if not count:
                return {}
            return {f"{name}/mean": total / count, f"{name}/std": math.sqrt(_variance(count, total, square))}
        case EffectiveShare():
            count, total, square = numbers
            return {name: total * total / (count * square)} if count and square else {}
        case Explained():
            count, total, square, residual_total, residual_square = numbers
            if not count:
                return {}
            spread = _variance(count, total, square)
            if spread <= VARIANCE_ROUNDING * (square + residual_square) / count:
                return {}
            return {name: 1 - _variance(count, residual_total, residual_square) / spread}
        case _:
            return {name: numbers[0]}


def _read_loads(name: str, counts: Tensor) -> dict[str, float]:
    """Choices of the most used expert over those of an even split, of the worst layer; and the share of experts that
    nothing chose."""
    if not counts.any():
        return {}
    load = counts.double() / counts.double().mean(dim=1, keepdim=True)
    return {f"{name}/load_max": float(load.max()), f"{name}/unused_fraction": float((counts == 0).double().mean())}


def _variance(count: float, total: float, square: float) -> float:
    """Population variance from count, sum and sum of squares."""
    mean = total / count
    return max(square / count - mean * mean, 0.0)
