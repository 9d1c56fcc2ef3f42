"""Calibration of probabilities: of all events given 0.8, eight in ten should happen."""

import math

import torch
from jaxtyping import Float, Float64, Int
from torch import Tensor

from llmrl.functional.masking import check_shapes


def expected_calibration_error(
    probabilities: Float[Tensor, " N"], outcomes: Float[Tensor, " N"], *, num_bins: int
) -> Float64[Tensor, ""]:
    """Expected calibration error (ECE): mean distance of outcome rates from probabilities, over bins of equal width.

        ECE = Σ_b (n_b / N) |mean outcome in b - mean probability in b|

    Args:
        probabilities: In [0, 1]; bin b holds those in ((b - 1) / num_bins, b / num_bins], the first also 0.
        outcomes: 1 for what happened, 0 for what did not; 0.5 for a draw.
        num_bins: At least 1.

    Raises:
        ValueError: There are no probabilities, one is outside [0, 1] or NaN, or `num_bins` is below 1.

    Reference: Guo et al. 2017, arXiv:1706.04599, eq. 3.
    """
    check_shapes(probabilities=(probabilities, "N"), outcomes=(outcomes, "N"))
    bins = _bins(probabilities, num_bins)
    gaps = outcomes.double() - probabilities.double()
    return _sums(gaps, bins, num_bins).abs().sum() / len(gaps)


def chance_calibration_error(probabilities: Float[Tensor, " N"], *, num_bins: int) -> Float64[Tensor, ""]:
    """Expectation of `expected_calibration_error` when every probability is exactly right.

        Σ_b sqrt(2/π Σ_{i in b} p_i (1 - p_i)) / N

    The mean absolute value of a normal variable with the variance of a bin's outcomes. With few outcomes it is large,
    and a calibration error near it is noise.

    Args:
        probabilities: In [0, 1].
        num_bins: At least 1.

    Raises:
        ValueError: As there.

    Reference: the bias of binned estimates, Roelofs et al. 2022, arXiv:2012.08668; E|X| = σ sqrt(2/π) of a normal X.
    """
    check_shapes(probabilities=(probabilities, "N"))
    bins = _bins(probabilities, num_bins)
    variances = probabilities.double() * (1.0 - probabilities.double())
    return (_sums(variances, bins, num_bins) * (2.0 / math.pi)).sqrt().sum() / len(variances)


def _bins(probabilities: Float[Tensor, " N"], num_bins: int) -> Int[Tensor, " N"]:
    if num_bins < 1:
        raise ValueError(f"num_bins ({num_bins}) must be at least 1")
    if len(probabilities) == 0:
        raise ValueError("probabilities: a calibration error needs at least one")
    if not bool(((probabilities >= 0) & (probabilities <= 1)).all()):
        raise ValueError("probabilities must lie in [0, 1]; NaN does not")
    edges = torch.arange(1, num_bins, dtype=torch.float64, device=probabilities.device) / num_bins
    return torch.bucketize(probabilities.double(), edges)


def _sums(x: Float64[Tensor, " N"], bins: Int[Tensor, " N"], num_bins: int) -> Float64[Tensor, " M"]:
    return x.new_zeros(num_bins).index_add(0, bins, x)
