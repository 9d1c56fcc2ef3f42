"""Sums, means and moments over the tokens that count, and the shape check that public functions begin with.

A mask is boolean and True means "count it". What stands outside is selected away, never multiplied by zero: NaN and
infinity there change neither results nor gradients.
"""

from collections.abc import Iterable

import torch
from jaxtyping import Bool, Float, Float64, Int, Shaped
from torch import Tensor

VARIANCE_FLOOR = 1e-8
"""Added to the variance before `standardize` takes its root."""
MEAN_ROUNDING = 2.0**-44
"""Bound on the relative rounding error of a mean summed in float64. Deviations below it count as 0."""


def masked_sum(x: Float[Tensor, "*s"], mask: Bool[Tensor, "*s"]) -> Float[Tensor, ""]:
    """Sum of the entries under the mask."""
    check_shapes(x=(x, "*s"), mask=(mask, "*s"))
    return torch.where(mask, x, 0.0).sum()


def masked_mean(x: Float[Tensor, "*s"], mask: Bool[Tensor, "*s"]) -> Float[Tensor, ""]:
    """Mean of the entries under the mask; 0 where there are none."""
    return masked_sum(x, mask) / mask.sum().clamp(min=1)


def masked_moments(
    x: Float[Tensor, "*s"], mask: Bool[Tensor, "*s"]
) -> tuple[Float64[Tensor, ""], Float64[Tensor, ""], Float64[Tensor, ""]]:
    """``(count, sum, sum of squares)`` of the entries under the mask, in float64. Moments of parts add up."""
    check_shapes(x=(x, "*s"), mask=(mask, "*s"))
    counted = torch.where(mask, x, 0.0).double()
    return mask.sum(dtype=torch.float64), counted.sum(), counted.square().sum()


def standardize(
    x: Float[Tensor, "*s"], mask: Bool[Tensor, "*s"], *, moments: Iterable[Tensor] | None = None
) -> Float[Tensor, "*s"]:
    """Values at mean 0 and variance 1 under the mask: (x - mean) / sqrt(population variance + 1e-8).

    Args:
        x: Values to standardize.
        mask: True on the entries that count.
        moments: ``(count, sum, sum of squares)`` of everything that shares the scale, such as `masked_moments` summed
            over ranks. None: the moments of `x` itself.

    Returns:
        Standardized values in the dtype of `x`; 0 outside the mask, and exactly 0 where all values are equal or there
        is only one. NaN under the whole mask where one of them is not finite, so that nothing is learned from the rest.
    """
    check_shapes(x=(x, "*s"), mask=(mask, "*s"))
    count, total, square = masked_moments(x, mask) if moments is None else moments
    mean = total / count
    variance = (square / count - mean.square()).clamp(min=0.0)
    deviation = torch.where(mask, x, 0.0).double() - mean
    counted = mask & ((deviation.abs() > MEAN_ROUNDING * mean.abs()) | ~mean.isfinite())
    return torch.where(counted, deviation / (variance + VARIANCE_FLOOR).sqrt(), 0.0).to(x.dtype)


def next_positions(mask: Bool[Tensor, "B T"]) -> Int[Tensor, "B T"]:
    """The position of the next True after each position; T where there is none."""
    width = mask.shape[1]
    here = torch.where(mask, torch.arange(width, device=mask.device), width)
    after = torch.cat([here[:, 1:], here.new_full((len(here), 1), width)], dim=1)[:, :width]
    return after.flip(1).cummin(dim=1).values.flip(1)


def taken_at(
    x: Shaped[Tensor, "B T"], positions: Int[Tensor, "B T"], *, beyond: Shaped[Tensor, " B"]
) -> Shaped[Tensor, "B T"]:
    """Entries of each row at `next_positions`; `beyond` where there is none."""
    return torch.cat([x, beyond[:, None]], dim=1).gather(1, positions)


def check_shapes(**tensors: tuple[Tensor, str]) -> None:
    """Raises ValueError with every shape unless one size per letter explains them all.

    Args:
        tensors: Each tensor by its name, with its axes: ``"B T"``, or ``"*s"`` for any shape, the same wherever it
            stands.
    """
    sizes: dict[str, object] = {}
    for x, axes in tensors.values():
        names, shape = ([axes], [tuple(x.shape)]) if axes.startswith("*") else (axes.split(), list(x.shape))
        if len(names) != len(shape) or any(sizes.setdefault(n, s) != s for n, s in zip(names, shape, strict=True)):
            found = ", ".join(f"{name} {tuple(x.shape)}" for name, (x, _) in tensors.items())
            wanted = ", ".join(f"({', '.join(axes.split())})" for _, axes in tensors.values())
            raise ValueError(f"shapes do not fit together: {found} must be {wanted}")
