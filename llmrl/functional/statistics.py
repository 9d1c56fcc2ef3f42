"""Statistics that losses report beside their value, and that can be pooled over microbatches, minibatches and ranks.

A mean of means is wrong as soon as two parts differ in size, so no part ever reports a mean: it reports the sums from
which the mean of the whole follows.
"""

from typing import NamedTuple

from jaxtyping import Float
from torch import Tensor


class Mean(NamedTuple):
    """``total / num`` of everything pooled. A rate is one too: tokens over seconds."""

    total: Tensor | float
    num: Tensor | float


class Total(NamedTuple):
    """A sum over everything pooled: counts, seconds, the loss of one optimizer step over its microbatches."""

    value: Tensor | float


class Maximum(NamedTuple):
    """The largest of everything pooled."""

    value: Tensor | float


class Minimum(NamedTuple):
    """The smallest of everything pooled."""

    value: Tensor | float


class Moments(NamedTuple):
    """Mean and population standard deviation of everything pooled."""

    num: Tensor | float
    total: Tensor | float
    square: Tensor | float


class Explained(NamedTuple):
    """Explained variance of predictions: 1 - Var(target - prediction) / Var(target)."""

    num: Tensor | float
    total: Tensor | float
    square: Tensor | float
    residual_total: Tensor | float
    residual_square: Tensor | float


class Loads(NamedTuple):
    """How often each expert of each layer was chosen, over everything pooled."""

    counts: Float[Tensor, "L E"]


class EffectiveShare(NamedTuple):
    """Effective sample size of weights over their number: (Σ w)² / (num Σ w²); 1 where all are equal."""

    num: Tensor | float
    total: Tensor | float
    square: Tensor | float


Statistic = Mean | Total | Maximum | Minimum | Moments | Explained | EffectiveShare | Loads
