"""Proximal policy optimization with four models: actor, critic, frozen reference and reward model.

Each token is an action. Its reward is minus the KL penalty against the reference; the last token's reward includes the
score of the whole response. The critic predicts, before each token, the return from there on; the advantage of a token
is how much better the outcome was than that prediction.

    score     clipped, normalized, minus the penalties on a missing EOS and on length
    rewards   r_t = -kl_coef (log π_t - log π_ref,t) + [t is last] score + what a reward function gave for this token
    returns   of `gae` or of n steps on rewards and old values; advantages are standardized over the rollout's tokens
    losses    the policy loss of the actor, clipped or not, minus the entropy bonus; the clipped squared error

All of that except the losses is frozen for the iteration, however many epochs it takes. The actor's pass before the
update is left out where the update is a single optimizer step, no KL is measured and the critic stands alone; values
are always needed. Schulman et al. 2017, arXiv:1707.06347; for language models Ziegler et al. 2019, arXiv:1909.08593,
and Ouyang et al. 2022, arXiv:2203.02155.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from llmrl.algorithms.config import PPOConfig
from llmrl.algorithms.kl_control import KLControl, StepKLControl
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
from llmrl.batches import PPOExperience, Rollout, Scores, TokenOutputs, counted_tokens
from llmrl.functional.advantages import gae, n_step_returns
from llmrl.functional.extremes import EXTREME, find_extremes
from llmrl.functional.importance import behaviour_ratio, v_trace
from llmrl.functional.kl import estimate_kl, shape_rewards
from llmrl.functional.losses import clipped_value_loss, proximal_value_loss
from llmrl.functional.masking import masked_moments, masked_sum, standardize
from llmrl.functional.statistics import Explained, Mean, Moments, Statistic, Total
from llmrl.metrics import Metrics
from llmrl.roles import ActorCritic, Algorithm, Policy

Losses = Iterator[tuple[str, Tensor, Metrics]]

COUNTS_AS = 3.0
"""Distance from the mean, in scales, at which an extreme score enters the running moments: a single one changes little,
and where more than one in ten is extreme, the scale follows, as they are then what scores are like."""


class PPO(Algorithm):
    """`Algorithm` of PPO: rewards, advantages and returns of a rollout, and the losses of actor and critic.

    Args:
        config: The settings of the algorithm.
        networks: Actor and critic.
        reference: The frozen policy from which the KL is measured; None: no KL.
        max_response_tokens: Length limit of a response, tokens.
        warmup_iterations: Iterations at the start that train the critic alone.
        value_coef: Weight of the critic's loss where both share a trunk, and so one loss.
        one_step: Whether each rollout is learned from in a single optimizer step. Then old log-probabilities, which are
            the live ones of that step, have a pass of their own only where something else reads them.
    """

    def __init__(
        self,
        config: PPOConfig,
        *,
        networks: ActorCritic,
        reference: Policy | None,
        max_response_tokens: int,
        warmup_iterations: int,
        value_coef: float,
        one_step: bool,
    ) -> None:
        self.config = config
        self.networks = networks
        self.reference = reference
        self.aggregation = config.aggregation
        self.max_redraws = 0
        self.max_response_tokens = max_response_tokens
        self.warmup_iterations = warmup_iterations
        self.value_coef = value_coef
        self.one_step = one_step
        self.policy_loss = make_policy_loss(config)
        self.kl_control = KLControl(coef=config.kl_coef, target=config.kl_target)
        self.step_kl_control = None
        if config.step_kl_target is not None:
            self.step_kl_control = StepKLControl(target=config.step_kl_target)
        self.score_moments = (0.0, 0.0, 0.0)
        """Count, sum and sum of squares of every clipped score so far; extreme ones count as `COUNTS_AS` says."""
        self.num_iterations = 0

    # --- experience ---------------------------------------------------------------------------------------------------

    def experience(self, rollout: Rollout, scores: Scores) -> tuple[PPOExperience, Metrics]:
        """Values, advantages and returns of a rollout, and metrics. Called without gradient."""
        needs_logprobs = self._needs_old_logprobs
        outputs = (self.networks.both if needs_logprobs else self.networks.values)(rollout.sequences)
        values, learned = outputs.values, learned_responses(rollout, self.config)
        mask = counted_tokens(rollout, scores) & learned[:, None]
        kl = torch.zeros_like(values)
        if self.reference is not None:
            ref_logprobs = self.reference.logprobs(rollout.sequences).logprobs
            kl = torch.where(mask, estimate_kl(outputs.logprobs, ref_logprobs, estimator="k1"), 0.0)
        shaped, extremes = self._shape_scores(scores.total, rollout)
        rewards = shape_rewards(shaped, kl, mask, kl_coef=self.kl_control.coef)
        rewards = rewards + torch.where(mask, scores.per_token, 0.0)
        bootstrapped = ~rollout.finished & self.config.bootstrap_truncated
        estimator = gae
        if self.config.importance == "v_trace":
            ratio = behaviour_ratio(outputs.logprobs, rollout.rollout_logprobs, mask)
            estimator = partial(v_trace, ratio=ratio, rho_bar=self.config.importance_cap)
        bootstrap_values = torch.where(bootstrapped, outputs.last_values, 0.0)
        advantages, returns = self._estimate(rewards, values, mask, bootstrap_values, estimator)
        experience = PPOExperience(
            rollout=rollout,
            scores=scores,
            old_logprobs=outputs.logprobs if needs_logprobs else None,
            advantages=standardize(advantages, mask) if self.config.scale == "batch" else advantages,
            learned=learned,
            old_values=values,
            returns=returns,
        )
        experience = self.with_targets(experience, outputs, rewards, bootstrapped)
        metrics = Metrics({**_value_metrics(experience, rewards), **advantage_metrics(advantages, mask), **extremes})
        if needs_logprobs:
            metrics = metrics.merge(Metrics({**policy_metrics(experience, outputs.entropy)}))
        if self.reference is not None:
            metrics = metrics.merge(self._control_kl(kl, mask))
        return experience, metrics

    def with_targets(
        self,
        experience: PPOExperience,
        outputs: TokenOutputs,
        rewards: Float[Tensor, "B T"],
        bootstrapped: Bool[Tensor, " B"],
    ) -> PPOExperience:
        """The experience with what another critic learns from; that of PPO learns from the returns alone."""
        return experience

    @property
    def _needs_old_logprobs(self) -> bool:
        """Whether old log-probabilities are read before the only optimizer step or after it, or in several steps; or
        cost next to nothing, in the pass for the values. In the critic's warm-up they are for the metrics."""
        return (
            not self.one_step
            or self.reference is not None
            or self.step_kl_control is not None
            or self.config.importance == "v_trace"
            or self.networks.share_trunk
            or self._warming_up
        )

    def _shape_scores(
        self, scores: Float[Tensor, " B"], rollout: Rollout
    ) -> tuple[Float[Tensor, " B"], dict[str, Statistic]]:
        """Scores clipped, then normalized, then minus the penalties; 0 where the critic's value replaces the score. And
        metrics of those that are extreme."""
        replaced = ~rollout.finished & self.config.bootstrap_truncated
        scored = scores.isfinite() & ~replaced & learned_responses(rollout, self.config)
        if self.config.score_clip is not None:
            scores = scores.clamp(-self.config.score_clip, self.config.score_clip)
        extreme, mean, scale = find_extremes(scores, scored, moments=self.score_moments)
        metrics = extreme_metrics(scores, extreme)
        if self.config.normalize_scores:
            learned, remembered = (
                torch.where(extreme, scores.clamp(mean - times * scale, mean + times * scale), scores)
                for times in (EXTREME, COUNTS_AS)
            )
            scores = self._normalize(learned, remembered, scored)
        scores = scores - self.config.missing_eos_penalty * (~rollout.finished).float()
        penalty = length_penalty(rollout, limit=self.max_response_tokens, buffer=self.config.overlong_buffer_tokens)
        return torch.where(replaced, 0.0, scores + penalty), metrics

    def _normalize(
        self, scores: Float[Tensor, " B"], remembered: Float[Tensor, " B"], scored: Bool[Tensor, " B"]
    ) -> Float[Tensor, " B"]:
        """Scores standardized by the moments of every score so far, which these enter as they are `remembered`."""
        batch = masked_moments(remembered, scored)
        count, total, square = (x + float(y) for x, y in zip(self.score_moments, batch, strict=True))
        self.score_moments = (count, total, square)
        return standardize(scores, scored, moments=batch[0].new_tensor(self.score_moments))

    def _estimate(
        self,
        rewards: Float[Tensor, "B T"],
        values: Float[Tensor, "B T"],
        mask: Bool[Tensor, "B T"],
        bootstrap_values: Float[Tensor, " B"],
        estimator: Callable[..., tuple[Tensor, Tensor]],
    ) -> tuple[Float[Tensor, "B T"], Float[Tensor, "B T"]]:
        """``(advantages, returns)``: of n steps, or of `gae` or `v_trace`, each with its own lambda."""
        estimate = partial(estimator, rewards, values, mask, bootstrap_values, gamma=self.config.gamma)
        num_steps = self.config.num_return_steps
        if num_steps is None:
            advantages, returns = estimate(gae_lambda=self.config.gae_lambda)
        else:
            advantages, returns = n_step_returns(
                rewards, values, mask, bootstrap_values, gamma=self.config.gamma, num_steps=num_steps
            )
        if self.config.value_lambda is not None:
            _, returns = estimate(gae_lambda=self.config.value_lambda)
        return advantages, returns

    # --- losses -------------------------------------------------------------------------------------------------------

    def losses(self, batch: PPOExperience, weights: Float[Tensor, "B T"]) -> Losses:
        """Yields the losses of actor and critic of one microbatch; their sum where they share a trunk. Warm-up
        iterations train the critic alone. `weights` from `token_weights`."""
        share_trunk = self.networks.share_trunk
        if share_trunk or not self._warming_up:
            ask = self.networks.both if share_trunk else self.networks.logprobs
            outputs = ask(batch.sequences)
            old_logprobs = old_logprobs_of(batch, outputs)
            correction, corrected = importance_weights(batch, old_logprobs, self.config)
            loss, statistics = self.policy_loss(outputs.logprobs, old_logprobs, correction * batch.advantages, weights)
            statistics |= corrected
            if batch.old_logprobs is None:
                statistics |= policy_metrics(replace(batch, old_logprobs=old_logprobs), outputs.entropy.detach())
            loss = self._add_regularizers(loss, outputs, batch, weights, correction)
            loss, of_experts = add_balance(loss, outputs, weights, batch.counted, coef=self.config.balance_coef)
            statistics |= of_experts | routing_agreement(batch, outputs)
            metrics = Metrics({"policy/loss": Total(loss.detach()), **statistics})
            if share_trunk:
                critic_loss, of_critic = self.critic_loss(outputs, batch, weights)
                loss, metrics = loss + critic_loss, metrics.merge(of_critic)
            yield "actor", loss, metrics
        if not share_trunk:
            yield "critic", *self._value_loss(self.networks.values(batch.sequences), batch, weights)

    def _add_regularizers(
        self,
        loss: Float[Tensor, ""],
        outputs: TokenOutputs,
        batch: PPOExperience,
        weights: Float[Tensor, "B T"],
        correction: Float[Tensor, "B T"],
    ) -> Float[Tensor, ""]:
        """The policy loss minus the entropy bonus, plus the penalty on the KL of this iteration's step."""
        counted = batch.counted
        loss = add_entropy_bonus(loss, outputs.entropy, weights, counted, coef=self.config.entropy_coef)
        if self.step_kl_control is not None:
            moved = correction * _step_kl(batch, outputs.logprobs)
            loss = loss + self.step_kl_control.coef * masked_sum(weights * moved, counted)
        return loss

    def critic_loss(
        self, outputs: TokenOutputs, batch: Any, weights: Float[Tensor, "B T"]
    ) -> tuple[Float[Tensor, ""], Metrics]:
        """What the critic adds to the loss of a trunk that it shares with the actor, and its metrics."""
        loss, metrics = self._value_loss(outputs, batch, weights)
        return self.value_coef * loss, metrics

    def _value_loss(
        self, outputs: TokenOutputs, batch: Any, weights: Float[Tensor, "B T"]
    ) -> tuple[Float[Tensor, ""], Metrics]:
        loss, statistics = clipped_value_loss(
            outputs.values, batch.old_values, batch.returns, weights, value_clip=self.config.value_clip
        )
        if coef := self.config.value_proximal_coef:
            loss = loss + coef * proximal_value_loss(outputs.values, batch.old_values, weights)
        return loss, Metrics({"value/loss": Total(loss.detach()), **statistics})

    # --- control and state --------------------------------------------------------------------------------------------

    def should_stop(self, update: Metrics) -> bool:
        """Whether KL(old, current) of a minibatch exceeds `stop_kl`, so that the iteration's updates end."""
        kl = update.statistics.get("policy/approx_kl")
        if self.config.stop_kl is None or not isinstance(kl, Mean):
            return False
        return bool(kl.total > self.config.stop_kl * kl.num)

    def finish(self, experience: PPOExperience) -> Metrics:
        """Metrics of the step's KL, measured after the updates of an iteration, and its controller's step from it."""
        steps_taken = not self._warming_up
        self.num_iterations += 1
        if self.step_kl_control is None or not steps_taken:
            return Metrics()
        logprobs = self.networks.logprobs(experience.sequences).logprobs
        mask = experience.counted
        assert experience.old_logprobs is not None, "the KL of a step is measured from them"
        correction, _ = importance_weights(experience, experience.old_logprobs, self.config)
        total, num = masked_sum(correction * _step_kl(experience, logprobs), mask), mask.sum()
        metrics = Metrics(
            {"policy/step_kl": Mean(total, num), "policy/step_kl_coef": Mean(self.step_kl_control.coef, 1.0)}
        )
        if num:
            self.step_kl_control.update(float(total / num))
        return metrics

    @property
    def _warming_up(self) -> bool:
        """Whether this iteration trains the critic alone."""
        return self.num_iterations < self.warmup_iterations

    def _control_kl(self, kl: Float[Tensor, "B T"], mask: Bool[Tensor, "B T"]) -> Metrics:
        """KL metrics, and the controller's step from them (none during the critic's warm-up)."""
        measured = kl_metrics(kl, mask)
        metrics = Metrics({**measured, "kl/coef": Mean(self.kl_control.coef, 1.0)})
        total, num_responses = measured["kl/sequence"]
        if num_responses and not self._warming_up:
            self.kl_control.update(float(total / num_responses), int(num_responses))
        return metrics

    def state_dict(self) -> dict[str, Any]:
        """KL coefficients, moments of the scores, and the number of iterations done."""
        step = {} if self.step_kl_control is None else {"step_kl": self.step_kl_control.state_dict()}
        return {
            "kl": self.kl_control.state_dict(),
            **step,
            "score_moments": list(self.score_moments),
            "num_iterations": self.num_iterations,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.kl_control.load_state_dict(state["kl"])
        if self.step_kl_control is not None and "step_kl" in state:
            self.step_kl_control.load_state_dict(state["step_kl"])
        count, total, square = state["score_moments"]
        self.score_moments = (count, total, square)
        self.num_iterations = state["num_iterations"]


def _value_metrics(experience: PPOExperience, rewards: Float[Tensor, "B T"]) -> dict[str, Statistic]:
    """Moments of summed rewards and of values, and explained variance of the returns, over the tokens that count."""
    mask = experience.counted
    return {
        "reward": Moments(*masked_moments(torch.where(mask, rewards, 0.0).sum(dim=1), mask.any(dim=1))),
        "value": Moments(*masked_moments(experience.old_values, mask)),
        "value/explained_variance": Explained(
            *masked_moments(experience.returns, mask),
            *masked_moments(experience.returns - experience.old_values, mask)[1:],
        ),
    }


def _step_kl(batch: PPOExperience, logprobs: Float[Tensor, "B T"]) -> Float[Tensor, "B T"]:
    """KL(old, current) per token by k3, whose expectation and gradient are exact where the tokens are the old actor's;
    for those of another policy it takes `importance_weights`."""
    assert batch.old_logprobs is not None, "the KL of a step is measured from them"
    mask = batch.counted
    old, current = (torch.where(mask, x, 0.0) for x in (batch.old_logprobs, logprobs))
    return estimate_kl(old, current, estimator="k3")
