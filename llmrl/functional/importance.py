"""Corrections for responses of another policy than the one that learns from them: importance weights and V-trace.

The policy that sampled is the behaviour policy μ, whose log-probabilities are the `rollout_logprobs`; the one that the
update starts from is π, with the `old_logprobs`. They differ where a rollout is some iterations old, and where the
engine computes in another arithmetic.
"""

from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from llmrl.functional.masking import check_shapes, masked_moments
from llmrl.functional.statistics import EffectiveShare, Maximum, Mean, Moments, Statistic

Level = Literal["token", "sequence"]
LARGEST_LOG_RATIO = 20.0
"""Log-ratios are clipped to plus and minus this many nats, so that no ratio overflows."""


def behaviour_ratio(
    old_logprobs: Float[Tensor, "B T"],
    rollout_logprobs: Float[Tensor, "B T"],
    mask: Bool[Tensor, "B T"],
    *,
    level: Level = "token",
) -> Float[Tensor, "B T"]:
    """Ratio of the policy that learns to the one that sampled, detached; 1 outside the mask.

        token      ρ_t = exp(old_logprobs_t - rollout_logprobs_t)
        sequence   ρ_t = exp Σ_s (old_logprobs_s - rollout_logprobs_s)    the same at every token of a response

    Only `sequence` has no bias for the reward of a whole response; its variance grows with the length.

    Args:
        old_logprobs: Log-probabilities by the policy at the start of the update, nats.
        rollout_logprobs: Log-probabilities by the policy that sampled, nats.
        mask: True on the tokens that count.
        level: One of the above.

    Raises:
        ValueError: Shapes differ, or the level is unknown.

    Reference: Precup, Sutton and Singh 2000, "Eligibility traces for off-policy policy evaluation".
    """
    check_shapes(old_logprobs=(old_logprobs, "B T"), rollout_logprobs=(rollout_logprobs, "B T"), mask=(mask, "B T"))
    if level not in ("token", "sequence"):
        raise ValueError(f"level ({level!r}) must be 'token' or 'sequence'")
    log_ratio = torch.where(mask, old_logprobs - rollout_logprobs, 0.0).detach()
    if level == "sequence":
        log_ratio = log_ratio.sum(dim=1, keepdim=True).expand_as(mask)
    ratio = log_ratio.clamp(-LARGEST_LOG_RATIO, LARGEST_LOG_RATIO).exp()
    return torch.where(mask, ratio, 1.0)


def truncated_weights(ratio: Float[Tensor, "B T"], *, cap: float) -> Float[Tensor, "B T"]:
    """Importance weights min(ρ, cap): less variance, and a bias where the cap is reached.

    Reference: Ionides 2008, "Truncated importance sampling"; Espeholt et al. 2018, arXiv:1802.01561.
    """
    return ratio.clamp(max=cap)


def masked_weights(ratio: Float[Tensor, "B T"], *, cap: float) -> Float[Tensor, "B T"]:
    """Importance weights ρ where 1 / cap <= ρ <= cap, and 0 elsewhere: such a token is not learned from.

    Reference: Ling Team 2025, arXiv:2510.18855, IcePop, with bounds of its own on each side.
    """
    return torch.where((ratio >= 1 / cap) & (ratio <= cap), ratio, 0.0)


def importance_metrics(
    ratio: Float[Tensor, "B T"], weights: Float[Tensor, "B T"], mask: Bool[Tensor, "B T"]
) -> dict[str, Statistic]:
    """Moments, largest value and effective sample size of the ratio, and the share of tokens whose weight is another
    than their ratio; over the tokens under the mask, empty where there are none."""
    if not mask.any():
        return {}
    moments = masked_moments(ratio, mask)
    return {
        "importance": Moments(*moments),
        "importance/max": Maximum(ratio[mask].max()),
        "importance/ess": EffectiveShare(*moments),
        "importance/clipped_fraction": Mean((weights != ratio)[mask].sum(), moments[0]),
    }


def v_trace(
    rewards: Float[Tensor, "B T"],
    values: Float[Tensor, "B T"],
    response_mask: Bool[Tensor, "B T"],
    bootstrap_values: Float[Tensor, " B"],
    *,
    ratio: Float[Tensor, "B T"],
    gamma: float,
    gae_lambda: float,
    rho_bar: float,
    c_bar: float = 1.0,
) -> tuple[Float[Tensor, "B T"], Float[Tensor, "B T"]]:
    """V-trace: advantages, and returns that the critic learns, from responses of another policy.

        δ_t = r_t + γ V_{t+1} - V_t
        v_t = V_t + min(ρ_t, rho_bar) δ_t + γ λ min(ρ_t, c_bar) (v_{t+1} - V_{t+1})
        A_t = r_t + γ (V_{t+1} + λ (v_{t+1} - V_{t+1})) - V_t

    The policy's loss multiplies A_t by min(ρ_t, rho_bar). Where every ρ_t is 1, this is `gae`. Positions outside the
    mask are skipped, as there.

    Args:
        rewards: Per-token rewards, KL penalty included.
        values: The critic's V(s_t), *before* token t is chosen.
        response_mask: True on the tokens the policy chose.
        bootstrap_values: V after the last token; 0 where the response ended, or where a truncated one counts as ended.
        ratio: ρ_t of each token, from `behaviour_ratio`.
        gamma: Discount per token, in [0, 1].
        gae_lambda: λ in [0, 1].
        rho_bar: Decides whose values the critic learns: 1 those of a policy between μ and π, infinity those of π.
        c_bar: Bounds how far what comes later counts: speed and variance, not the fixed point.

    Returns:
        ``(advantages, returns)``, both 0 outside the mask. The advantages are neither weighted nor standardized.

    Raises:
        ValueError: Shapes differ.

    Reference: Espeholt et al. 2018, arXiv:1802.01561, eq. 1 and remark 2.
    """
    check_shapes(
        rewards=(rewards, "B T"),
        values=(values, "B T"),
        ratio=(ratio, "B T"),
        response_mask=(response_mask, "B T"),
        bootstrap_values=(bootstrap_values, "B"),
    )
    advantages, returns = torch.zeros_like(rewards), torch.zeros_like(rewards)
    next_value, next_correction = bootstrap_values, torch.zeros_like(bootstrap_values)
    for t in reversed(range(rewards.shape[1])):
        chosen, rho = response_mask[:, t], ratio[:, t]
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        advantage = delta + gamma * gae_lambda * next_correction
        correction = rho.clamp(max=rho_bar) * delta + gamma * gae_lambda * rho.clamp(max=c_bar) * next_correction
        advantages[:, t] = torch.where(chosen, advantage, 0.0)
        returns[:, t] = torch.where(chosen, values[:, t] + correction, 0.0)
        next_correction = torch.where(chosen, correction, next_correction)
        next_value = torch.where(chosen, values[:, t], next_value)
    return advantages, returns
