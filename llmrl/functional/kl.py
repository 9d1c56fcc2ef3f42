"""KL divergence between two policies, per token, and rewards with the KL penalty."""

from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from llmrl.functional.masking import check_shapes

Estimator = Literal["k1", "k2", "k3"]


def estimate_kl(
    logprobs: Float[Tensor, "B T"], ref_logprobs: Float[Tensor, "B T"], *, estimator: Estimator
) -> Float[Tensor, "B T"]:
    """KL(policy, reference) estimated per token, in nats, from tokens that the policy sampled.

    With d = logprobs - ref_logprobs:

        k1 = d                  unbiased, of either sign
        k2 = d^2 / 2            biased, never negative; its gradient has the KL's as expectation
        k3 = exp(-d) - 1 + d    unbiased, never negative

    There is no mask: select with one before the sum.

    Raises:
        ValueError: The estimator is unknown, or shapes differ.

    Reference: Schulman 2020, "Approximating KL divergence", http://joschu.net/blog/kl-approx.html.
    """
    check_shapes(logprobs=(logprobs, "B T"), ref_logprobs=(ref_logprobs, "B T"))
    log_ratio = logprobs - ref_logprobs
    match estimator:
        case "k1":
            return log_ratio
        case "k2":
            return log_ratio.square() / 2
        case "k3":
            return torch.expm1(-log_ratio) + log_ratio
    raise ValueError(f"estimator ({estimator!r}) must be 'k1', 'k2' or 'k3'")


def shape_rewards(
    scores: Float[Tensor, " B"], kl: Float[Tensor, "B T"], response_mask: Bool[Tensor, "B T"], *, kl_coef: float
) -> Float[Tensor, "B T"]:
    """Rewards per token: -kl_coef * kl on each, and the score on the last one under the mask.

    Args:
        scores: One per response. Not read where the response has no token under the mask.
        kl: Per token, from `estimate_kl`, nats.
        response_mask: True on the tokens the policy chose.
        kl_coef: Penalty per nat, in units of the score.

    Returns:
        Rewards; 0 outside the mask.

    Raises:
        ValueError: Shapes differ.

    Reference: Ziegler et al. 2019, arXiv:1909.08593, eq. 2, with the logarithm of the ratio summed by tokens.
    """
    check_shapes(scores=(scores, "B"), kl=(kl, "B T"), response_mask=(response_mask, "B T"))
    num_left = response_mask.flip(1).cumsum(dim=1).flip(1)
    is_last = response_mask & (num_left == 1)
    penalties = torch.where(response_mask, -kl_coef * kl, 0.0)
    return torch.where(is_last, penalties + scores[:, None], penalties)
