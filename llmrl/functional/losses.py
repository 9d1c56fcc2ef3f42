"""Losses of policies, critics and reward models. Every token loss is a plain sum of weights times losses per token.

The weights carry the aggregation and the counts of the whole optimizer step, so no loss knows what a microbatch or a
rank is, and the gradients of the parts add up to that of the whole. A weight of 0 means "not counted": whatever stands
there, NaN included, is selected away before it is used. Each loss returns ``(loss, metrics)``; the metrics are detached
statistics that can be pooled.
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.functional import softplus

from llmrl.functional.aggregation import Aggregation
from llmrl.functional.kl import estimate_kl
from llmrl.functional.masking import check_shapes, masked_sum
from llmrl.functional.statistics import Maximum, Mean, Statistic

Count = Tensor | float | int


def token_weights(
    response_mask: Bool[Tensor, "B T"],
    *,
    aggregation: Aggregation,
    num_tokens: Count,
    num_responses: Count,
    max_response_tokens: int,
) -> Float[Tensor, "B T"]:
    """Weight of each token in a loss, by the way that token losses are aggregated.

        token       1 / num_tokens                              every token the same
        sequence    1 / (num_responses * tokens of the row)     the mean of means per response
        constant    1 / (num_responses * max_response_tokens)   Dr. GRPO, arXiv:2503.20783

    The counts are those of the whole optimizer step, over all microbatches and ranks; `token` and `sequence` weights
    then sum to 1 over it. A count of 0 gives weights of 0.

    Args:
        response_mask: True on the tokens that count, in whole rows.
        aggregation: One of the above.
        num_tokens: Tokens under the mask, in the whole optimizer step.
        num_responses: Responses with at least one of them, in the whole optimizer step.
        max_response_tokens: The length that `constant` divides by.

    Returns:
        Weights in float32, 0 outside the mask.

    Raises:
        ValueError: The aggregation is unknown.
    """
    match aggregation:
        case "token":
            denominators = _as_double(num_tokens, response_mask)
        case "sequence":
            denominators = _as_double(num_responses, response_mask) * response_mask.sum(dim=1, keepdim=True)
        case "constant":
            denominators = _as_double(num_responses, response_mask) * max_response_tokens
        case _:
            raise ValueError(f"aggregation ({aggregation!r}) must be 'token', 'sequence' or 'constant'")
    return torch.where(response_mask & (denominators > 0), 1.0 / denominators, 0.0).float()


def importance_ratio(
    logprobs: Float[Tensor, "B T"], old_logprobs: Float[Tensor, "B T"], mask: Bool[Tensor, "B T"]
) -> Float[Tensor, "B T"]:
    """Importance ratio of each token: exp(logprobs - old_logprobs) under the mask, 1 outside it.

    Raises:
        ValueError: Shapes differ.
    """
    check_shapes(logprobs=(logprobs, "B T"), old_logprobs=(old_logprobs, "B T"), mask=(mask, "B T"))
    return torch.where(mask, logprobs - old_logprobs, 0.0).exp()


def sequence_log_ratio(
    logprobs: Float[Tensor, "B T"], old_logprobs: Float[Tensor, "B T"], mask: Bool[Tensor, "B T"]
) -> Float[Tensor, "B T"]:
    """Logarithm of GSPO's sequence-level importance ratio, at every token of a row; 0 for a row without tokens.

        log s_i = 1/|y_i| Σ_t (logprobs_t - old_logprobs_t)

    As `logprobs` of `clipped_policy_loss`, with zeros as `old_logprobs` and `sequence` weights, it gives GSPO.

    Raises:
        ValueError: Shapes differ.

    Reference: Zheng et al. 2025, arXiv:2507.18071, eq. 7.
    """
    check_shapes(logprobs=(logprobs, "B T"), old_logprobs=(old_logprobs, "B T"), mask=(mask, "B T"))
    total = torch.where(mask, logprobs - old_logprobs, 0.0).sum(dim=1, keepdim=True)
    return (total / mask.sum(dim=1, keepdim=True).clamp(min=1)).expand_as(logprobs)


def clipped_policy_loss(
    logprobs: Float[Tensor, "B T"],
    old_logprobs: Float[Tensor, "B T"],
    advantages: Float[Tensor, "B T"],
    weights: Float[Tensor, "B T"],
    *,
    clip_low: float,
    clip_high: float,
    dual_clip: float | None = None,
) -> tuple[Float[Tensor, ""], dict[str, Statistic]]:
    """Clipped surrogate loss of PPO.

        L_t = max(-A_t ρ_t, -A_t clip(ρ_t, 1 - clip_low, 1 + clip_high)),    ρ_t = exp(logprobs - old_logprobs)

    and with a dual clip c, where A_t < 0, min(L_t, -c A_t). That is -A_t times a ratio bounded above by 1 + clip_high
    where A_t >= 0, and below by 1 - clip_low and above by c where A_t < 0; where a bound acts there is no gradient.

    Args:
        logprobs: Log-probabilities of the current actor; the only argument with a gradient.
        old_logprobs: Log-probabilities of the actor at the start of the iteration.
        advantages: Advantages of the tokens.
        weights: From `token_weights`.
        clip_low: How far the ratio may fall below 1 where the advantage is negative.
        clip_high: How far it may rise above 1 where the advantage is positive.
        dual_clip: Bounds the ratio where the advantage is negative; greater than 1. None: no bound.

    Returns:
        ``(loss, metrics)``: fraction of tokens that the clip leaves no gradient, KL(old, current) by k3, and the
        largest |ρ_t - 1|.

    Raises:
        ValueError: A clip is out of its range, or shapes differ.

    Reference: Schulman et al. 2017, arXiv:1707.06347, eq. 7; Ye et al. 2020, arXiv:1912.09729, eq. 5;
    Yu et al. 2025, arXiv:2503.14476, eq. 10, for two clips.
    """
    _check_clips(clip_low, clip_high, dual_clip)
    check_shapes(
        logprobs=(logprobs, "B T"),
        old_logprobs=(old_logprobs, "B T"),
        advantages=(advantages, "B T"),
        weights=(weights, "B T"),
    )
    counted = weights != 0
    with torch.no_grad():
        ratio = importance_ratio(logprobs, old_logprobs, counted)
        falls, rises = ratio.clamp(min=1 - clip_low, max=dual_clip), ratio.clamp(max=1 + clip_high)
        bounded = torch.where(advantages < 0, falls, rises)
        clipped = (bounded < ratio) | (bounded > ratio)
        metrics: dict[str, Statistic] = {
            "policy/clip_fraction": Mean((clipped & (advantages != 0)).sum(), counted.sum()),
            **ratio_metrics(logprobs, old_logprobs, counted),
        }
    # the same ratio again, with a gradient: clipped ones, which may have overflowed, are selected away before exp
    live = importance_ratio(logprobs, old_logprobs, counted & ~clipped)
    return masked_sum(weights * -advantages * torch.where(clipped, bounded, live), counted), metrics


def policy_gradient_loss(
    logprobs: Float[Tensor, "B T"],
    old_logprobs: Float[Tensor, "B T"],
    advantages: Float[Tensor, "B T"],
    weights: Float[Tensor, "B T"],
) -> tuple[Float[Tensor, ""], dict[str, Statistic]]:
    """Policy gradient with an importance ratio that nothing clips: REINFORCE and A2C, in the first optimizer step.

        L_t = -A_t ρ_t,    ρ_t = exp(logprobs - old_logprobs),    ∇L_t = -A_t ρ_t ∇ log π_t

    Args:
        logprobs: Log-probabilities of the current actor; the only argument with a gradient.
        old_logprobs: Log-probabilities of the actor at the start of the iteration.
        advantages: Advantages of the tokens.
        weights: From `token_weights`.

    Returns:
        ``(loss, metrics)``; the metrics are `ratio_metrics`.

    Raises:
        ValueError: Shapes differ.

    Reference: Williams 1992, "Simple statistical gradient-following algorithms for connectionist reinforcement
    learning", theorem 1; with the ratio Schulman et al. 2017, arXiv:1707.06347, eq. 6.
    """
    check_shapes(logprobs=(logprobs, "B T"), advantages=(advantages, "B T"), weights=(weights, "B T"))
    counted = weights != 0
    ratio = importance_ratio(logprobs, old_logprobs, counted)
    with torch.no_grad():
        metrics = ratio_metrics(logprobs, old_logprobs, counted)
    return masked_sum(weights * -advantages * ratio, counted), metrics


def cispo_loss(
    logprobs: Float[Tensor, "B T"],
    old_logprobs: Float[Tensor, "B T"],
    advantages: Float[Tensor, "B T"],
    weights: Float[Tensor, "B T"],
    *,
    clip_low: float,
    clip_high: float,
) -> tuple[Float[Tensor, ""], dict[str, Statistic]]:
    """CISPO: policy gradient with a clipped importance ratio as a constant, so that no token loses its gradient.

        L_t = -A_t clip(ρ_t, 1 - clip_low, 1 + clip_high) log π_t,    ρ_t = exp(logprobs - old_logprobs), detached

    Args:
        logprobs: Log-probabilities of the current actor; the only argument with a gradient.
        old_logprobs: Log-probabilities of the actor at the start of the iteration.
        advantages: Advantages of the tokens.
        weights: From `token_weights`.
        clip_low: How far the ratio may fall below 1; 1 for no lower bound.
        clip_high: How far it may rise above 1.

    Returns:
        ``(loss, metrics)``: fraction of tokens whose ratio was clipped, and `ratio_metrics`.

    Raises:
        ValueError: A clip is out of its range, or shapes differ.

    Reference: MiniMax 2025, arXiv:2506.13585, eq. 4 and 5.
    """
    _check_clips(clip_low, clip_high, None)
    check_shapes(logprobs=(logprobs, "B T"), advantages=(advantages, "B T"), weights=(weights, "B T"))
    counted = weights != 0
    with torch.no_grad():
        ratio = importance_ratio(logprobs, old_logprobs, counted)
        bounded = ratio.clamp(1 - clip_low, 1 + clip_high)
        metrics: dict[str, Statistic] = {
            "policy/clip_fraction": Mean(((bounded != ratio) & (advantages != 0)).sum(), counted.sum()),
            **ratio_metrics(logprobs, old_logprobs, counted),
        }
    live = torch.where(counted, logprobs, 0.0)
    return masked_sum(weights * -advantages * bounded * live, counted), metrics


def ratio_metrics(
    logprobs: Float[Tensor, "B T"], old_logprobs: Float[Tensor, "B T"], mask: Bool[Tensor, "B T"]
) -> dict[str, Statistic]:
    """Distance of the current actor from the old one, as metrics: KL(old, current) by k3, nats per token under the
    mask, and the largest |ρ_t - 1|, ρ_t = exp(logprobs - old_logprobs).

    Raises:
        ValueError: Shapes differ.
    """
    ratio = importance_ratio(logprobs, old_logprobs, mask)
    kl = estimate_kl(old_logprobs, logprobs, estimator="k3")
    return {
        "policy/approx_kl": Mean(masked_sum(kl, mask), mask.sum()),
        "policy/ratio_max_deviation": Maximum(torch.cat([ratio.flatten() - 1, ratio.new_zeros(1)]).abs().amax()),
    }


def cloning_loss(
    logprobs: Float[Tensor, "B T"],
    old_logprobs: Float[Tensor, "B T"],
    rollout_logprobs: Float[Tensor, "B T"],
    weights: Float[Tensor, "B T"],
) -> tuple[Float[Tensor, ""], Mean]:
    """KL(old, current) as a loss, from tokens that neither of them sampled: k3 by importance weights.

        L_t = exp(old - rollout) (ρ_t - 1 - log ρ_t),    ρ_t = exp(logprobs - old)

    Over tokens of the rollout's policy, the expectation of L_t is the KL of the whole distributions at that state, and
    that of its gradient is the gradient of this KL, Σ_v -π_old(v) ∇log π(v). Never negative; 0 where nothing moved.

    Args:
        logprobs: Log-probabilities of the current actor; the only argument with a gradient.
        old_logprobs: Log-probabilities of the actor that is to be kept.
        rollout_logprobs: Log-probabilities of the policy that sampled the tokens.
        weights: From `token_weights`.

    Returns:
        ``(loss, kl)``: `kl` is the mean of L_t over the tokens with a weight, nats.

    Raises:
        ValueError: Shapes differ.

    Reference: Cobbe et al. 2020, arXiv:2009.04416, section 2.2, the behavioral cloning term of L_joint; k3: Schulman
    2020, "Approximating KL divergence".
    """
    check_shapes(
        logprobs=(logprobs, "B T"),
        old_logprobs=(old_logprobs, "B T"),
        rollout_logprobs=(rollout_logprobs, "B T"),
        weights=(weights, "B T"),
    )
    counted = weights != 0
    current, old = (torch.where(counted, x, 0.0) for x in (logprobs, old_logprobs))
    kl = importance_ratio(old_logprobs, rollout_logprobs, counted) * estimate_kl(old, current, estimator="k3")
    return masked_sum(weights * kl, counted), Mean(masked_sum(kl.detach(), counted), counted.sum())


def clipped_value_loss(
    values: Float[Tensor, "B T"],
    old_values: Float[Tensor, "B T"],
    returns: Float[Tensor, "B T"],
    weights: Float[Tensor, "B T"],
    *,
    value_clip: float | None,
) -> tuple[Float[Tensor, ""], dict[str, Statistic]]:
    """Clipped value loss: half the squared error of the critic, no smaller than that of values clipped to the old ones.

        L_t = 1/2 max((V_t - R_t)^2, (clip(V_t, V_old - value_clip, V_old + value_clip) - R_t)^2)

    Args:
        values: Values of the current critic.
        old_values: Values of the critic at collection.
        returns: Targets of the values.
        weights: From `token_weights`.
        value_clip: Half the width of the clip, in units of the returns. None: no clip.

    Returns:
        ``(loss, metrics)``: fraction of tokens that the clip leaves no gradient.

    Raises:
        ValueError: `value_clip` is negative, or shapes differ.

    Reference: Engstrom et al. 2020, arXiv:2005.12729, "Value function clipping".
    """
    if value_clip is not None and value_clip < 0:
        raise ValueError(f"value_clip ({value_clip}) must not be negative; None switches the clip off")
    check_shapes(
        values=(values, "B T"), old_values=(old_values, "B T"), returns=(returns, "B T"), weights=(weights, "B T")
    )
    counted = weights != 0
    values, old_values, returns = (torch.where(counted, x, 0.0) for x in (values, old_values, returns))
    reach = torch.inf if value_clip is None else value_clip
    error = (values - returns).square()
    clipped_error = (values.clamp(old_values - reach, old_values + reach) - returns).square()
    metrics: dict[str, Statistic] = {"value/clip_fraction": Mean((clipped_error > error).sum(), counted.sum())}
    return masked_sum(weights * 0.5 * torch.maximum(error, clipped_error), counted), metrics


def proximal_value_loss(
    values: Float[Tensor, "B T"], old_values: Float[Tensor, "B T"], weights: Float[Tensor, "B T"]
) -> Float[Tensor, ""]:
    """Proximal term of the critic: half its squared distance from the values at collection.

        L_t = 1/2 (V_t - V_old)^2

    The trust region of Schulman et al. bounds its mean over the squared error of the old values, which is the KL of two
    Gaussians around old and new values. This is that constraint as a penalty: c times it beside the squared error draws
    V_t to (R_t + c V_old) / (1 + c), and leaves a gradient wherever V_t is, which a clip does not.

    Args:
        values: Values of the current critic; the only argument with a gradient.
        old_values: Values of the critic at collection.
        weights: From `token_weights`.

    Raises:
        ValueError: Shapes differ.

    Reference: Schulman et al. 2016, arXiv:1506.02438, section 5.
    """
    check_shapes(values=(values, "B T"), old_values=(old_values, "B T"), weights=(weights, "B T"))
    counted = weights != 0
    moved = torch.where(counted, values - old_values, 0.0)
    return masked_sum(weights * 0.5 * moved.square(), counted)


def bradley_terry_loss(
    chosen_scores: Float[Tensor, " B"],
    rejected_scores: Float[Tensor, " B"],
    *,
    margin: Float[Tensor, " B"] | None = None,
    center_coef: float = 0.0,
    num_pairs: Count,
) -> tuple[Float[Tensor, ""], dict[str, Statistic]]:
    """Bradley-Terry loss: negative log-likelihood that the chosen response wins, sigmoid(chosen - rejected - margin).

        L = Σ [-log sigmoid(chosen - rejected - margin) + center_coef (chosen + rejected)^2] / num_pairs

    Args:
        chosen_scores: Scores of the preferred responses, one per pair.
        rejected_scores: Scores of the other responses, one per pair.
        margin: How much better the chosen response is known to be, one per pair.
        center_coef: Pulls the scores of a pair, whose common shift the likelihood leaves free, around 0.
        num_pairs: Pairs of the whole optimizer step, over all microbatches and ranks; 0 gives a loss of 0.

    Returns:
        ``(loss, metrics)``: how often chosen scores higher, a tie as half, and the mean of chosen - rejected.

    Raises:
        ValueError: Shapes differ.

    Reference: Bradley and Terry 1952; margin: Touvron et al. 2023, arXiv:2307.09288, eq. 2; centering: Eisenstein et
    al. 2023, arXiv:2312.09244.
    """
    shapes = {"chosen_scores": (chosen_scores, "B"), "rejected_scores": (rejected_scores, "B")}
    check_shapes(**shapes, **({} if margin is None else {"margin": (margin, "B")}))
    difference = chosen_scores - rejected_scores
    lead = difference if margin is None else difference - margin
    losses = softplus(-lead)
    if center_coef != 0:  # 0 times the square of a large score may be 0 times infinity
        losses = losses + center_coef * (chosen_scores + rejected_scores).square()
    denominator = _as_double(num_pairs, losses)
    loss = losses.sum() * torch.where(denominator > 0, 1.0 / denominator, 0.0).to(losses.dtype)
    wins = (difference > 0).double() + 0.5 * (difference == 0).double()
    metrics: dict[str, Statistic] = {
        "pairs/accuracy": Mean(wins.sum(), len(wins)),
        "pairs/margin": Mean(difference.detach().double().sum(), len(wins)),
    }
    return loss, metrics


def _as_double(count: Count, like: Tensor) -> Tensor:
    return torch.as_tensor(count, dtype=torch.float64, device=like.device)


def _check_clips(clip_low: float, clip_high: float, dual_clip: float | None) -> None:
    if clip_low < 0:
        raise ValueError(f"clip_low ({clip_low}) must not be negative")
    if clip_high < 0:
        raise ValueError(f"clip_high ({clip_high}) must not be negative")
    if dual_clip is not None and dual_clip <= 1:
        raise ValueError(f"dual_clip ({dual_clip}) must be greater than 1; None switches it off")
