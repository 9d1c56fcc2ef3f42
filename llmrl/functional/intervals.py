"""Confidence intervals of measured rates and means, and pass@k."""

import math

import torch
from jaxtyping import Float, Float64, Int
from torch import Tensor

from llmrl.functional.masking import check_shapes

Z_95 = 1.959964
"""Standard normal quantile at 0.975: intervals of 95 %."""


def wilson_interval(num_successes: float | int, num_trials: int, *, z: float = Z_95) -> tuple[float, float]:
    """Wilson score interval ``(low, high)`` of a success probability; ``(0, 1)`` without trials.

        (p + z²/2n ± z sqrt(p (1 - p) / n + z²/4n²)) / (1 + z²/n)

    Args:
        num_successes: In [0, num_trials]; a tie may count as half.
        num_trials: n.
        z: Standard normal quantile of the confidence level.

    Raises:
        ValueError: `num_successes` is out of range.

    Reference: Wilson 1927, "Probable inference, the law of succession, and statistical inference".
    """
    if not 0 <= num_successes <= num_trials:
        raise ValueError(f"num_successes ({num_successes}) must be at least 0 and at most num_trials ({num_trials})")
    if num_trials == 0:
        return 0.0, 1.0
    rate, spread = num_successes / num_trials, z * z / num_trials
    center = rate + spread / 2
    half = z * math.sqrt(rate * (1 - rate) / num_trials + spread / (4 * num_trials))
    return max((center - half) / (1 + spread), 0.0), min((center + half) / (1 + spread), 1.0)


def pass_at_k(num_correct: Int[Tensor, " N"], num_samples: int, k: int) -> Float64[Tensor, " N"]:
    """pass@k of each prompt: unbiased estimate of the probability that at least one of k samples is correct.

        1 - C(n - c, k) / C(n, k) = 1 - Π_{j < k} (n - c - j) / (n - j)

    Args:
        num_correct: c, the correct samples of each prompt.
        num_samples: n, the samples of each prompt.
        k: In [1, n].

    Raises:
        ValueError: `k` is out of range.

    Reference: Chen et al. 2021, arXiv:2107.03374, eq. 1.
    """
    if not 1 <= k <= num_samples:
        raise ValueError(f"k ({k}) must be at least 1 and at most num_samples ({num_samples})")
    drawn = torch.arange(k, dtype=torch.float64, device=num_correct.device)
    wrong = num_samples - num_correct[:, None] - drawn
    return 1.0 - (wrong / (num_samples - drawn)).prod(dim=1)


def mean_interval(values: Float[Tensor, " N"], *, z: float = Z_95) -> tuple[float, float, float]:
    """Normal confidence interval ``(mean, low, high)`` of a mean: mean ± z s / sqrt(N), s with N - 1.

    Not clipped to any range; infinite for a single value.

    Raises:
        ValueError: There are no values.
    """
    if len(values) == 0:
        raise ValueError("values: an interval needs at least one value")
    mean = values.double().mean().item()
    if len(values) == 1:
        return mean, -math.inf, math.inf
    half = z * values.double().std().item() / math.sqrt(len(values))
    return mean, mean - half, mean + half


def paired_interval(
    after: Float[Tensor, " N"], before: Float[Tensor, " N"], *, z: float = Z_95
) -> tuple[float, float, float]:
    """Normal confidence interval ``(difference, low, high)`` of the mean difference of two measurements of each unit.

        d_n = after_n - before_n,  mean(d) ± z s_d / sqrt(N), s_d with N - 1

    What both share, such as how hard a prompt is, cancels: the interval is narrower than that of two independent means
    by twice their covariance, Var(d) = Var(after) + Var(before) - 2 Cov(after, before). Infinite for a single unit.

    Args:
        after: Measurement of each unit, such as the mean score of the responses to each prompt.
        before: The other measurement of the same units.
        z: Standard normal quantile of the confidence level.

    Raises:
        ValueError: There are no units, or shapes differ.

    Reference: Miller 2024, "Adding Error Bars to Evals", arXiv:2411.00640, section 4.2.
    """
    check_shapes(after=(after, "N"), before=(before, "N"))
    return mean_interval(after.double() - before.double(), z=z)
