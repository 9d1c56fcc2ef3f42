"""Scores so far from all others that they would set the scale of everything else."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from llmrl.functional.masking import check_shapes

EXTREME = 1000.0
"""Distance from the mean of the others, in their scales, above which a number is extreme. A heavy tail does not get
there: of a million draws of a Cauchy distribution the largest is about a thousand standard deviations of the others."""


def find_extremes(
    x: Float[Tensor, " B"], mask: Bool[Tensor, " B"], *, moments: tuple[float, float, float] = (0.0, 0.0, 0.0)
) -> tuple[Bool[Tensor, " B"], float, float]:
    """Entries that are further than `EXTREME` scales from the mean of all that are less far out.

        scale = 1 + |mean| + standard deviation

    The 1 and the mean keep small differences of equal numbers from being extreme. Entries are taken from the centre
    outwards, so that several extremes do not hide each other.

    Args:
        x: Numbers; those under the mask are finite.
        mask: True on the entries that count.
        moments: ``(count, sum, sum of squares)`` of earlier numbers, which lie around the centre; without them the
            median of `x` is the centre.

    Returns:
        ``(extreme, mean, scale)``, the latter two of everything that is not extreme. Computed in float64 on the CPU.

    Raises:
        ValueError: Shapes differ.
    """
    check_shapes(x=(x, "B"), mask=(mask, "B"))
    extreme = torch.zeros_like(mask)
    chosen = x[mask].double().cpu()
    count, total, square = moments
    if not len(chosen) and not count:
        return extreme, 0.0, 1.0
    center = total / count if count else float(chosen.median())
    order = (chosen - center).abs().argsort(stable=True)
    deviations = (chosen - center)[order]
    num = count + torch.arange(len(chosen) + 1, dtype=torch.float64)
    spread = max(square - total * center, 0.0) if count else 0.0
    means, squares = (_sums_before(d) / num.clamp(min=1.0) for d in (deviations, deviations.square()))
    scales = (
        1.0 + (center + means).abs() + (squares + spread / num.clamp(min=1.0) - means.square()).clamp(min=0.0).sqrt()
    )
    is_far = ((deviations - means[:-1]).abs() > EXTREME * scales[:-1]) & (num[:-1] > 0)
    first = int(is_far.int().argmax()) if is_far.any() else len(chosen)
    extreme[mask] = torch.zeros_like(is_far).index_fill(0, order[first:], True).to(mask.device)
    return extreme, center + float(means[first]), float(scales[first])


def _sums_before(x: Float[Tensor, " n"]) -> Float[Tensor, " n1"]:
    """Sum of the entries before each entry, and of all."""
    return torch.cat([x.new_zeros(1), x.cumsum(0)])
