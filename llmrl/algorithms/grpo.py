"""Group relative policy optimization and its critic-free kin, REINFORCE among them.

G responses to each prompt. The advantage of a response is its score compared with the other responses of its group, and
each of its tokens has that advantage. No critic. The members of the family differ in settings only:

    algorithm    baseline       scale  aggregation  clip low / high  and
    GRPO         mean           std    sequence     0.2 / 0.2        kl_coef: 0.04, kl_form: k3_paper
    Dr. GRPO     mean           none   constant     0.2 / 0.2
    RLOO         leave_one_out  none   constant     0.2 / 0.2        one optimizer step per rollout
    DAPO         mean           std    token        0.2 / 0.28       overlong_buffer_tokens, max_redraws, mask_truncated
    GSPO         mean           std    sequence     3e-4 / 4e-4      ratio: sequence
    GDPO         mean           std    token        0.2 / 0.2        reward.combine: standardized
    CISPO        mean           std    token        1.0 / 4.0        loss: cispo
    REINFORCE    none           none   constant     none             loss: policy_gradient, group_size: 1
    OPO          optimal        none   constant     none             loss: policy_gradient
    REINFORCE++  none           batch  token        0.2 / 0.2        credit: token, kl_form: k1_reward, group_size: 1

Baselines constant, batch and, with credit: token, one in time are REINFORCE's too; see docs/algorithms.md.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from llmrl.algorithms.config import GRPOConfig
from llmrl.algorithms.policy_gradient import (
    add_balance,
    add_entropy_bonus,
    advantage_metrics,
    extreme_metrics,
    importance_weights,
    kl_metrics,
    learned_responses,
    length_penalty,
    make_policy_loss,
    old_logprobs_of,
    policy_metrics,
    routing_agreement,
)
from llmrl.algorithms.user_functions import UserBaseline
from llmrl.batches import GRPOExperience, Rollout, Scores, counted_tokens
from llmrl.functional.advantages import decoupled_group_relative, group_relative, leave_one_out, rewards_to_go
from llmrl.functional.extremes import find_extremes
from llmrl.functional.kl import estimate_kl
from llmrl.functional.losses import importance_ratio, sequence_log_ratio
from llmrl.functional.masking import masked_sum, standardize
from llmrl.functional.statistics import Mean, Statistic, Total
from llmrl.metrics import Metrics
from llmrl.roles import Algorithm, Policy


class GRPO(Algorithm):
    """`Algorithm` of GRPO and its variants: group-relative advantages and the policy loss.

    Args:
        config: The settings of the algorithm.
        actor: The policy that is trained.
        reference: The frozen policy from which the KL is measured; None: no KL.
        max_response_tokens: Length limit of a response, tokens.
        one_step: Whether each rollout is learned from in a single optimizer step. Then no pass is made for old
            log-probabilities: the live ones of that step are the same.
        reward_weights: Weight of each part of the scores where these are standardized one by one (GDPO); None: the
            responses of a group are compared by their sum.
    """

    def __init__(
        self,
        config: GRPOConfig,
        *,
        actor: Policy,
        reference: Policy | None,
        max_response_tokens: int,
        one_step: bool = False,
        reward_weights: Mapping[str, float] | None = None,
    ) -> None:
        self.config = config
        self.actor = actor
        self.reference = reference
        self.aggregation = config.aggregation
        self.max_redraws = config.max_redraws
        self.max_response_tokens = max_response_tokens
        self.one_step = one_step
        self.reward_weights = reward_weights
        self.estimate_advantages = make_advantages(config)
        self.policy_loss = make_policy_loss(config)

    def experience(self, rollout: Rollout, scores: Scores) -> tuple[GRPOExperience, Metrics]:
        """Advantages from the scores of each group, log-probabilities of actor and reference, and metrics. Called
        without gradient."""
        rewards_kl = self.reference is not None and self.config.kl_form == "k1_reward"
        outputs = None if self.one_step and not rewards_kl else self.actor.logprobs(rollout.sequences)
        ref_logprobs = torch.zeros_like(rollout.rollout_logprobs)
        if self.reference is not None:
            ref_logprobs = self.reference.logprobs(rollout.sequences).logprobs
        penalty = length_penalty(rollout, limit=self.max_response_tokens, buffer=self.config.overlong_buffer_tokens)
        rewards = scores
        if rewards_kl and outputs is not None:
            kl = estimate_kl(outputs.logprobs, ref_logprobs, estimator="k1")
            paid = torch.where(rollout.sequences.response_mask, self.config.kl_coef * kl, 0.0)
            rewards = replace(scores, per_token=scores.per_token - paid)
        advantages = self._compare(rollout, rewards, penalty)
        experience = GRPOExperience(
            rollout=rollout,
            scores=scores,
            old_logprobs=None if outputs is None else outputs.logprobs,
            ref_logprobs=ref_logprobs,
            advantages=advantages,
            learned=learned_responses(rollout, self.config),
        )
        statistics = advantage_metrics(experience.advantages, experience.counted)
        statistics |= {} if outputs is None else self._metrics(experience, outputs.entropy)
        extreme, _, _ = find_extremes(scores.per_response, scores.total.isfinite())
        statistics |= extreme_metrics(scores.per_response, extreme)
        if self.config.overlong_buffer_tokens:
            statistics["score/overlong_penalty"] = Mean(penalty.sum(), len(penalty))
        return experience, Metrics(statistics)

    def _compare(self, rollout: Rollout, scores: Scores, penalty: Float[Tensor, " B"]) -> Float[Tensor, "B T"]:
        """Advantages of tokens: of their responses, by the sum of scores or by each part of it, or of their turns, or
        their own; over the baseline, and scaled."""
        if self.reward_weights is not None:
            parts = torch.stack([scores.parts[name] for name in self.reward_weights])
            weights = parts.new_tensor(list(self.reward_weights.values()))
            unscored = parts.masked_fill(scores.total.isnan(), torch.nan)
            advantages = decoupled_group_relative(unscored, weights, rollout.group_ids)
            return advantages[:, None].expand_as(scores.per_token)
        advantages = self._compare_parts(rollout, scores, penalty)
        if self.config.scale == "batch":
            learned = learned_responses(rollout, self.config)
            advantages = standardize(advantages, counted_tokens(rollout, scores) & learned[:, None])
        return advantages

    def _compare_parts(self, rollout: Rollout, scores: Scores, penalty: Float[Tensor, " B"]) -> Float[Tensor, "B T"]:
        """Advantages of responses, turns or tokens, each among those of the same number."""
        mask = rollout.sequences.response_mask
        match self.config.credit:
            case "response":
                part_of_token, returns = torch.zeros_like(mask, dtype=torch.long), scores.per_response + penalty
                returns = returns[:, None]
            case "turn":
                part_of_token = rollout.turn_of_token
                returns = rewards_to_go(scores.total + penalty, scores.per_token, part_of_token, mask)
            case "token":
                part_of_token = (mask.cumsum(dim=1) - 1).clamp(min=0)
                returns = rewards_to_go(scores.total + penalty, scores.per_token, part_of_token, mask)
        num_parts = returns.shape[1]
        groups = torch.zeros_like(rollout.group_ids) if self.config.baseline == "batch" else rollout.group_ids
        compared = groups[:, None] * num_parts + torch.arange(num_parts, device=groups.device)
        lengths = rollout.num_chosen.repeat_interleave(num_parts)
        advantages = self.estimate_advantages(returns.flatten(), compared.flatten(), lengths)
        return advantages.view_as(returns).to(scores.per_token).gather(1, part_of_token.clamp(max=num_parts - 1))

    def _metrics(self, experience: GRPOExperience, entropy: Float[Tensor, "B T"]) -> dict[str, Statistic]:
        """Metrics of the old policy, and of its KL to the reference."""
        statistics: dict[str, Statistic] = {**policy_metrics(experience, entropy)}
        if self.reference is not None and experience.old_logprobs is not None:
            kl = estimate_kl(experience.old_logprobs, experience.ref_logprobs, estimator="k1")
            statistics |= kl_metrics(kl, experience.counted)
        return statistics

    def losses(self, batch: GRPOExperience, weights: Float[Tensor, "B T"]) -> Iterator[tuple[str, Tensor, Metrics]]:
        """Yields the policy loss of one microbatch, plus the KL to the reference, minus the entropy bonus; `weights`
        from `token_weights`."""
        counted, outputs = batch.counted, self.actor.logprobs(batch.sequences)
        logprobs, old_logprobs = outputs.logprobs, old_logprobs_of(batch, outputs)
        current, old = logprobs, old_logprobs
        if self.config.ratio == "sequence":
            current, old = sequence_log_ratio(logprobs, old_logprobs, counted), torch.zeros_like(logprobs)
        correction, corrected = importance_weights(batch, old_logprobs, self.config)
        loss, statistics = self.policy_loss(current, old, correction * batch.advantages, weights)
        statistics |= corrected
        if self.reference is not None and self.config.kl_coef and self.config.kl_form != "k1_reward":
            live, ref = (torch.where(counted, x, 0.0) for x in (logprobs, batch.ref_logprobs))
            kl = self._kl(live, ref, importance_ratio(logprobs, old_logprobs, counted))
            loss = loss + self.config.kl_coef * masked_sum(weights * correction * kl, counted)
        loss = add_entropy_bonus(loss, outputs.entropy, weights, counted, coef=self.config.entropy_coef)
        loss, of_experts = add_balance(loss, outputs, weights, counted, coef=self.config.balance_coef)
        statistics |= of_experts | routing_agreement(batch, outputs)
        if batch.old_logprobs is None:
            statistics |= self._metrics(replace(batch, old_logprobs=old_logprobs), outputs.entropy.detach())
        yield "actor", loss, Metrics({"policy/loss": Total(loss.detach()), **statistics})

    def _kl(
        self, logprobs: Float[Tensor, "B T"], ref_logprobs: Float[Tensor, "B T"], ratio: Float[Tensor, "B T"]
    ) -> Float[Tensor, "B T"]:
        match self.config.kl_form:
            case "k2":
                return ratio.detach() * estimate_kl(logprobs, ref_logprobs, estimator="k2")
            case "k3":
                return ratio * estimate_kl(logprobs, ref_logprobs, estimator="k3")
            case _:
                return estimate_kl(logprobs, ref_logprobs, estimator="k3")


def make_advantages(config: GRPOConfig) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """The function that the settings name, from scores, numbers of what is compared together, and lengths, each (B,),
    to advantages (B,).

    Raises:
        UserCodeError: The settings name a user's function that does not load, or does not take scores and groups.
    """
    match config.baseline:
        case "mean":
            scale = "std" if config.scale == "std" else "none"
            return lambda scores, groups, _: group_relative(scores, groups, scale=scale)
        case "leave_one_out" | "batch":
            return lambda scores, groups, _: leave_one_out(scores, groups)
        case "optimal":
            return lambda scores, groups, lengths: leave_one_out(scores, groups, weights=lengths)
        case "none" | "constant":
            value = config.baseline_value or 0.0
            return lambda scores, *_: torch.where(scores.isnan(), 0.0, scores - value)
        case name:
            baseline = UserBaseline(name)
            return lambda scores, groups, _: baseline(scores, groups)
