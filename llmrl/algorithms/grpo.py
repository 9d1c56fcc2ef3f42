"""Group relative policy optimization and its critic-free kin.

One rollout, G responses to each prompt. A response is as good as it is better than its siblings, and each of its tokens
shares that advantage. No critic. Everything that tells GRPO, Dr. GRPO, RLOO, DAPO and GSPO apart is a setting:

    algorithm   baseline       scale  aggregation  clip low / high  and
    GRPO        mean           std    sequence     0.2 / 0.2        kl_coef: 0.04, kl_form: k3_paper
    Dr. GRPO    mean           none   constant     0.2 / 0.2
    RLOO        leave_one_out  none   constant     0.2 / 0.2        one optimizer step per rollout
    DAPO        mean           std    token        0.2 / 0.28       overlong_buffer_tokens, max_redraws
    GSPO        mean           std    sequence     3e-4 / 4e-4      ratio: sequence
"""

from collections.abc import Iterator
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from llmrl.algorithms.config import GRPOConfig
from llmrl.batches import GRPOExperience, Rollout, Scores
from llmrl.functional.advantages import group_relative, leave_one_out
from llmrl.functional.aggregation import Aggregation
from llmrl.functional.kl import estimate_kl
from llmrl.functional.losses import clipped_policy_loss, importance_ratio, sequence_log_ratio
from llmrl.functional.masking import masked_sum
from llmrl.functional.penalties import overlong_penalty
from llmrl.functional.statistics import Mean, Statistic, Total
from llmrl.metrics import Metrics
from llmrl.roles import Policy


class GRPO:
    """What to learn from a rollout, and the loss that learns it."""

    def __init__(
        self, config: GRPOConfig, *, actor: Policy, reference: Policy | None, max_response_tokens: int
    ) -> None:
        self.config = config
        self.actor = actor
        self.reference = reference
        self.aggregation: Aggregation = config.aggregation
        self.max_redraws = config.max_redraws
        self.max_response_tokens = max_response_tokens

    def experience(self, rollout: Rollout, scores: Scores) -> tuple[GRPOExperience, Metrics]:
        """Advantages from the scores of each group; log-probabilities of the actor now and of the reference."""
        outputs = self.actor.logprobs(rollout.sequences)
        old_logprobs = outputs.logprobs
        ref_logprobs = torch.zeros_like(old_logprobs)
        if self.reference is not None:
            ref_logprobs = self.reference.logprobs(rollout.sequences).logprobs
        shaped = scores.per_response + self._penalty(rollout)
        experience = GRPOExperience(
            rollout=rollout,
            scores=scores,
            old_logprobs=old_logprobs,
            ref_logprobs=ref_logprobs,
            advantages=self._advantages(shaped, rollout)[:, None].expand_as(old_logprobs),
        )
        return experience, self._describe(experience, outputs.entropy)

    def losses(self, batch: GRPOExperience, weights: Float[Tensor, "B T"]) -> Iterator[tuple[str, Tensor, Metrics]]:
        """The clipped policy loss, and the KL to the reference."""
        counted = batch.response_mask
        logprobs = self.actor.logprobs(batch.sequences).logprobs
        current, old = logprobs, batch.old_logprobs
        if self.config.ratio == "sequence":
            current, old = sequence_log_ratio(logprobs, batch.old_logprobs, counted), torch.zeros_like(logprobs)
        loss, statistics = clipped_policy_loss(
            current,
            old,
            batch.advantages,
            weights,
            clip_low=self.config.clip_low,
            clip_high=self.config.clip_high,
            dual_clip=self.config.dual_clip,
        )
        if self.reference is not None and self.config.kl_coef:
            live, ref = (torch.where(counted, x, 0.0) for x in (logprobs, batch.ref_logprobs))
            kl = self._kl(live, ref, importance_ratio(logprobs, batch.old_logprobs, counted))
            loss = loss + self.config.kl_coef * masked_sum(weights * kl, counted)
        yield "actor", loss, Metrics({"policy/loss": Total(loss.detach()), **statistics})

    def should_stop(self, update: Metrics) -> bool:
        """GRPO makes every update that it planned."""
        return False

    def finish(self, experience: GRPOExperience) -> Metrics:
        """Nothing here steers itself."""
        return Metrics()

    def state_dict(self) -> dict[str, Any]:
        """One iteration leaves nothing to the next but weights."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """There is nothing to take over."""

    def _penalty(self, rollout: Rollout) -> Float[Tensor, " B"]:
        """What responses lose for their length; 0 where the settings ask for no penalty."""
        lengths, buffer = rollout.sequences.response_lengths, self.config.overlong_buffer_tokens
        if not buffer:
            return torch.zeros(lengths.shape, device=lengths.device)
        return overlong_penalty(lengths, limit=self.max_response_tokens, buffer=buffer)

    def _advantages(self, scores: Float[Tensor, " B"], rollout: Rollout) -> Float[Tensor, " B"]:
        if self.config.baseline == "leave_one_out":
            return leave_one_out(scores, rollout.group_ids)
        return group_relative(scores, rollout.group_ids, scale=self.config.scale)

    def _kl(
        self, logprobs: Float[Tensor, "B T"], ref_logprobs: Float[Tensor, "B T"], ratio: Float[Tensor, "B T"]
    ) -> Float[Tensor, "B T"]:
        match self.config.kl_form:
            case "k2":
                return ratio.detach() * estimate_kl(logprobs, ref_logprobs, estimator="k2")
            case "k3":
                return ratio * estimate_kl(logprobs, ref_logprobs, estimator="k3")
            case "k3_paper":
                return estimate_kl(logprobs, ref_logprobs, estimator="k3")

    def _describe(self, experience: GRPOExperience, entropy: Float[Tensor, "B T"]) -> Metrics:
        rollout, mask = experience.rollout, experience.response_mask
        num_tokens, num_responses = mask.sum(), mask.any(dim=1).sum()
        gap = (experience.old_logprobs - rollout.rollout_logprobs).abs()
        statistics: dict[str, Statistic] = {
            "policy/entropy": Mean(masked_sum(entropy, mask), num_tokens),
            "policy/rollout_gap": Mean(masked_sum(gap, mask), num_tokens),
        }
        if self.config.overlong_buffer_tokens:
            penalty = self._penalty(rollout)
            statistics["score/overlong_penalty"] = Mean(penalty.sum(), len(penalty))
        if self.reference is not None:
            kl = estimate_kl(experience.old_logprobs, experience.ref_logprobs, estimator="k1")
            statistics["kl/mean"] = Mean(masked_sum(kl, mask), num_tokens)
            statistics["kl/sequence"] = Mean(masked_sum(kl, mask), num_responses)
        return Metrics(statistics)
