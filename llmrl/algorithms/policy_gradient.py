"""Parts that policy-gradient algorithms share: the policy loss, the length penalty, and the metrics of a policy."""

from collections.abc import Callable
from functools import partial

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from llmrl.algorithms.config import CLIPS, GRPOConfig, PPOConfig
from llmrl.algorithms.user_functions import UserLoss
from llmrl.batches import Experience, Rollout, TokenOutputs
from llmrl.functional.losses import clipped_policy_loss
from llmrl.functional.masking import masked_sum
from llmrl.functional.penalties import overlong_penalty
from llmrl.functional.statistics import Maximum, Mean, Statistic, Total
from llmrl.user_code import names_code

PolicyLoss = Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, dict[str, Statistic]]]
"""From `logprobs`, `old_logprobs`, `advantages` and `weights`, each (B, T), to ``(loss, metrics)``."""


def make_policy_loss(config: GRPOConfig | PPOConfig) -> PolicyLoss:
    """The policy loss that the settings name: the clipped surrogate with their clips, or a user's function.

    Raises:
        UserCodeError: The user's function does not load, or does not take these.
    """
    if names_code(config.loss):
        return UserLoss(config.loss)
    return partial(clipped_policy_loss, **{name: getattr(config, name) for name in CLIPS})


def length_penalty(rollout: Rollout, *, limit: int, buffer: int) -> Float[Tensor, " B"]:
    """`overlong_penalty` of each response, 0 or below; 0 without a buffer. `limit` and `buffer` in tokens."""
    lengths = rollout.sequences.response_lengths
    return overlong_penalty(lengths, limit=limit, buffer=buffer) if buffer else torch.zeros_like(lengths).float()


def old_logprobs_of(batch: Experience, live: TokenOutputs) -> Float[Tensor, "B T"]:
    """Old log-probabilities of a microbatch; where its experience has none, a copy of the live ones, detached: in the
    only optimizer step both are of the same weights."""
    return live.logprobs.detach().clone() if batch.old_logprobs is None else batch.old_logprobs


def policy_metrics(experience: Experience, entropy: Float[Tensor, "B T"]) -> dict[str, Statistic]:
    """Entropy, and the gap between the log-probabilities of engine and trainer, per counted token, nats."""
    assert experience.old_logprobs is not None, "measured where they are known"
    mask = experience.counted
    gap = (experience.old_logprobs - experience.rollout.rollout_logprobs).abs()
    return {
        "policy/entropy": Mean(masked_sum(entropy, mask), mask.sum()),
        "policy/rollout_gap": Mean(masked_sum(gap, mask), mask.sum()),
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
