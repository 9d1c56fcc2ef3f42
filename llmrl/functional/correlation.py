"""Correlation coefficients of two quantities."""

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from llmrl.functional.masking import check_shapes


def pearson_correlation(x: Float[Tensor, " N"], y: Float[Tensor, " N"]) -> Float64[Tensor, ""]:
    """Linear correlation, in [-1, 1]; NaN where it is undefined: equal values on one side, no values, NaN, infinity.

        r = Σ (x_i - x̄)(y_i - ȳ) / sqrt(Σ (x_i - x̄)² Σ (y_i - ȳ)²)

    Reference: Pearson 1895, "Note on regression and inheritance in the case of two parents".
    """
    check_shapes(x=(x, "N"), y=(y, "N"))
    if len(x) == 0 or bool(x.min() == x.max()) or bool(y.min() == y.max()):  # equal values deviate by rounding errors
        return x.new_tensor(torch.nan, dtype=torch.float64)
    return (_direction(x) @ _direction(y)).clamp(-1.0, 1.0)


def spearman_correlation(x: Float[Tensor, " N"], y: Float[Tensor, " N"]) -> Float64[Tensor, ""]:
    """Correlation of ranks, ties sharing their mean rank: any monotone relation gives 1 or -1.

        r_s = r(rank x, rank y)

    NaN where `pearson_correlation` of the ranks is undefined, and for NaN values.

    Reference: Spearman 1904, "The proof and measurement of association between two things".
    """
    check_shapes(x=(x, "N"), y=(y, "N"))
    return pearson_correlation(_ranks(x), _ranks(y))


def _direction(x: Float[Tensor, " N"]) -> Float64[Tensor, " N"]:
    """Deviations from the mean as a vector of length 1."""
    deviations = x.double() - x.double().mean()
    return deviations / deviations.norm()


def _ranks(x: Float[Tensor, " N"]) -> Float64[Tensor, " N"]:
    _, places, counts = x.unique(return_inverse=True, return_counts=True)
    last = counts.cumsum(0).double()
    return torch.where(x.isnan(), torch.nan, (last - (counts - 1) / 2.0)[places])
