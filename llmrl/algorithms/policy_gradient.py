"""Parts that policy-gradient algorithms share: the policy loss and the entropy bonus, the length penalty, the filter of
truncated responses, and the metrics of a policy."""

from collections.abc import Callable
from functools import partial

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from llmrl.algorithms.config import CLIPS, GRPOConfig, PPOConfig
from llmrl.algorithms.user_functions import UserLoss
from llmrl.batches import Experience, Rollout, TokenOutputs
from llmrl.functional.importance import behaviour_ratio, importance_metrics, masked_weights, truncated_weights
from llmrl.functional.losses import cispo_loss, clipped_policy_loss, policy_gradient_loss
from llmrl.functional.masking import masked_moments, masked_sum
from llmrl.functional.penalties import overlong_penalty
from llmrl.functional.statistics import Loads, Maximum, Mean, Minimum, Moments, Statistic, Total
from llmrl.metrics import AGREEMENT, LOADS

PolicyLoss = Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, dict[str, Statistic]]]
"""From `logprobs`, `old_logprobs`, `advantages` and `weights`, each (B, T), to ``(loss, metrics)``."""


def make_policy_loss(config: GRPOConfig | PPOConfig) -> PolicyLoss:
    """The policy loss that the settings name, with their clips, or a user's function.

    Raises:
        UserCodeError: The user's function does not load, or does not take these.
    """
    clips = {name: getattr(config, name) for name, losses in CLIPS.items() if config.loss in losses}
    match config.loss:
        case "clipped":
            return partial(clipped_policy_loss, **clips)
        case "cispo":
            return partial(cispo_loss, **clips)
        case "policy_gradient":
            return policy_gradient_loss
        case name:
            return UserLoss(name)


def length_penalty(rollout: Rollout, *, limit: int, buffer: int) -> Float[Tensor, " B"]:
    """`overlong_penalty` of each response, 0 or below, by the tokens that the actor chose; 0 without a buffer. `limit`
    and `buffer` in tokens."""
    lengths = rollout.num_chosen
    return overlong_penalty(lengths, limit=limit, buffer=buffer) if buffer else torch.zeros_like(lengths).float()


def learned_responses(rollout: Rollout, config: GRPOConfig | PPOConfig) -> Bool[Tensor, " B"]:
    """True for the responses that the losses count: all, or with `mask_truncated` those that ended by themselves.

    Reference: Yu et al. 2025, arXiv:2503.14476, section 3.4, overlong filtering.
    """
    return rollout.finished if config.mask_truncated else torch.ones_like(rollout.finished)


def add_entropy_bonus(
    loss: Float[Tensor, ""],
    entropy: Float[Tensor, "B T"],
    weights: Float[Tensor, "B T"],
    mask: Bool[Tensor, "B T"],
    *,
    coef: float,
) -> Float[Tensor, ""]:
    """Loss minus the entropy bonus, which is aggregated by the weights of the loss.

        L - coef Σ_t weight_t H_t,    H_t = -Σ_v π_t(v) log π_t(v)

    Reference: Schulman et al. 2017, arXiv:1707.06347, eq. 9.
    """
    return loss - coef * masked_sum(weights * entropy, mask) if coef else loss


def add_balance(
    loss: Float[Tensor, ""],
    outputs: TokenOutputs,
    weights: Float[Tensor, "B T"],
    mask: Bool[Tensor, "B T"],
    *,
    coef: float,
) -> tuple[Float[Tensor, ""], dict[str, Statistic]]:
    """Loss plus the Switch loss of a mixture of experts, aggregated by the weights of the loss, and metrics of its
    experts; as it is for other models."""
    if "routed" not in outputs.named:
        return loss, {}
    balance, counted = outputs.named["balance"], mask.any(dim=1)
    loss = loss + coef * masked_sum(weights * balance, mask) if coef else loss
    return loss, {
        LOADS: Loads(outputs.named["routed"][counted].sum(dim=0)),
        f"{LOADS}/balance_loss": Mean(masked_sum(balance.detach(), mask), mask.sum()),
    }


def routing_agreement(batch: Experience, outputs: TokenOutputs) -> dict[str, Statistic]:
    """Share of pairs of a counted token and a layer of a mixture in which this pass chooses the experts that the engine
    chose as it sampled the token; empty for other models.

    Reference: Ma et al. 2025, arXiv:2510.11370, on the mismatch between the routers of engine and trainer.
    """
    sampled, routes = batch.rollout.routes, outputs.named.get("routes")
    if sampled is None or routes is None:
        return {}
    same = (sampled == routes)[batch.counted]
    return {AGREEMENT: Mean(same.sum(), same.numel())}


def old_logprobs_of(batch: Experience, live: TokenOutputs) -> Float[Tensor, "B T"]:
    """Old log-probabilities of a microbatch; where its experience has none, a copy of the live ones, detached: in the
    only optimizer step both are of the same weights."""
    return live.logprobs.detach().clone() if batch.old_logprobs is None else batch.old_logprobs


def importance_weights(
    experience: Experience, old_logprobs: Float[Tensor, "B T"], config: GRPOConfig | PPOConfig
) -> tuple[Float[Tensor, "B T"], dict[str, Statistic]]:
    """``(weights, metrics)``: what multiplies the advantages where another policy sampled; 1 without correction."""
    if config.importance == "none":
        return torch.ones_like(old_logprobs), {}
    mask = experience.counted
    ratio = behaviour_ratio(old_logprobs, experience.rollout.rollout_logprobs, mask, level=config.importance_level)
    weigh = masked_weights if config.importance == "masked" else truncated_weights
    weights = weigh(ratio, cap=config.importance_cap)
    return weights, importance_metrics(ratio, weights, mask)


def policy_metrics(experience: Experience, entropy: Float[Tensor, "B T"]) -> dict[str, Statistic]:
    """Entropy, and the gap between the log-probabilities of engine and trainer, per counted token, nats."""
    assert experience.old_logprobs is not None, "measured where they are known"
    mask = experience.counted
    gap = (experience.old_logprobs - experience.rollout.rollout_logprobs).abs()
    return {
        "policy/entropy": Mean(masked_sum(entropy, mask), mask.sum()),
        "policy/rollout_gap": Mean(masked_sum(gap, mask), mask.sum()),
    }


def advantage_metrics(advantages: Float[Tensor, "B T"], mask: Bool[Tensor, "B T"]) -> dict[str, Statistic]:
    """Moments, bounds and positive share of advantages, over the tokens under the mask; empty where there are none."""
    if not mask.any():
        return {}
    counted = advantages[mask]
    return {
        "advantage": Moments(*masked_moments(advantages, mask)),
        "advantage/min": Minimum(counted.min()),
        "advantage/max": Maximum(counted.max()),
        "advantage/positive_fraction": Mean((counted > 0).sum(), len(counted)),
    }


def kl_metrics(kl: Float[Tensor, "B T"], mask: Bool[Tensor, "B T"]) -> dict[str, Mean]:
    """KL to the reference per token and per response, nats, from the estimate k1 of each token."""
    total, num_tokens, num_responses = masked_sum(kl, mask).double(), mask.sum(), mask.any(dim=1).sum()
    return {"kl/mean": Mean(total, num_tokens), "kl/sequence": Mean(total, num_responses)}


def extreme_metrics(scores: Float[Tensor, " B"], extreme: Bool[Tensor, " B"]) -> dict[str, Statistic]:
    """Number of extreme scores, and the size of the largest; empty where there are none."""
    if not extreme.any():
        return {}
    return {"score/extreme": Total(extreme.sum()), "score/extreme_size": Maximum(scores[extreme].abs().max())}
