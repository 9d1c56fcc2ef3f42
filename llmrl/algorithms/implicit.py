"""PPO with an implicit critic: the heads that predict the next tokens also predict their value.

    head k at token t     a distribution of token t+k, and v_k, the expected value of the state before that token
    advantages            GAE of PPO on v_0, the value of the state before token t
    targets               y_k(t) = r_{t+k} + γ v̄_{k+1}(t),  y_K(t) = r_{t+K} + γ v̄_K(t+1)    by the target heads v̄
    loss                  PPO's loss of the actor
                          + value_coef (1 / (K+1)) Σ_k of half the squared error of v_k, its gradient clamped
                          + prediction_coef (1 / K) Σ_k>0 of minus the log-probability of the token that was sampled
    after an iteration    v̄ <- (1 - target_rate) v̄ + target_rate v, weight by weight

Only the ratios of the three weights matter to Adam, so that of the policy is 1. Targets are frozen for the iteration,
as all that PPO learns from. We know of no paper with this critic; what it is made of has its sources in
`functional/mtp.py` and `models/mtp.py`.
"""

from dataclasses import fields
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from llmrl.algorithms.config import PPOConfig
from llmrl.algorithms.ppo import PPO
from llmrl.batches import MTPExperience, PPOExperience, TokenOutputs
from llmrl.functional.masking import masked_sum
from llmrl.functional.mtp import clamped_value_loss, head_targets
from llmrl.functional.statistics import Total
from llmrl.metrics import Metrics
from llmrl.roles import MovingTargets


class ImplicitPPO(PPO):
    """`Algorithm` of PPO whose critic is a value at each head of multi-token prediction.

    Args:
        config: The settings of the algorithm; its value_clip and value_lambda are not read.
        targets: The target heads.
        num_heads: Heads beyond the policy's own, K.
        prediction_coef: Weight of the loss of their predictions.
        target_rate: Share of the heads when the target heads move, after each iteration.
        value_grad_clamp: Largest gradient of a value loss by its value.
        others: Those of `PPO`; its networks share a trunk and have the outputs of `MTPModule`.
    """

    def __init__(
        self,
        config: PPOConfig,
        *,
        targets: MovingTargets,
        num_heads: int,
        prediction_coef: float,
        target_rate: float,
        value_grad_clamp: float,
        **others: Any,
    ) -> None:
        super().__init__(config, **others)
        self.targets = targets
        self.num_heads = num_heads
        self.prediction_coef = prediction_coef
        self.target_rate = target_rate
        self.value_grad_clamp = value_grad_clamp

    def with_targets(
        self,
        experience: PPOExperience,
        outputs: TokenOutputs,
        rewards: Float[Tensor, "B T"],
        bootstrapped: Bool[Tensor, " B"],
    ) -> MTPExperience:
        """The experience with the TD target of every head at every token."""
        targets = head_targets(
            rewards,
            [outputs.named[f"target_values/{k}"] for k in range(1 + self.num_heads)],
            experience.counted,
            torch.where(bootstrapped, outputs.named["target_last_values"], 0.0),
            gamma=self.config.gamma,
        )
        of_ppo = {field.name: getattr(experience, field.name) for field in fields(experience)}
        return MTPExperience(**of_ppo, value_targets={f"values/{k}": target for k, target in enumerate(targets)})

    def critic_loss(
        self, outputs: TokenOutputs, batch: MTPExperience, weights: Float[Tensor, "B T"]
    ) -> tuple[Float[Tensor, ""], Metrics]:
        """Losses of values and predictions, with their weights."""
        value, metrics = self._value_loss(outputs, batch, weights)
        prediction = self._prediction_loss(outputs, batch, weights)
        loss = self.value_coef * value + self.prediction_coef * prediction
        return loss, metrics.merge(Metrics({"mtp/loss": Total(prediction.detach())}))

    def _value_loss(
        self, outputs: TokenOutputs, batch: MTPExperience, weights: Float[Tensor, "B T"]
    ) -> tuple[Float[Tensor, ""], Metrics]:
        """The loss of the values, mean over heads."""
        losses, metrics = [], Metrics()
        for name, targets in batch.value_targets.items():
            loss, statistics = clamped_value_loss(
                outputs.named[name], targets, weights, grad_clamp=self.value_grad_clamp
            )
            losses.append(loss)
            metrics = metrics.merge(Metrics(statistics))
        mean = torch.stack(losses).mean()
        return mean, metrics.merge(Metrics({"value/loss": Total(mean.detach())}))

    def _prediction_loss(
        self, outputs: TokenOutputs, batch: MTPExperience, weights: Float[Tensor, "B T"]
    ) -> Float[Tensor, ""]:
        """Minus the log-probability of what was sampled, mean over heads; 0 where a response ends before it."""
        predicted = sum(outputs.named[f"predicted/{k}"] for k in range(1, 1 + self.num_heads))
        return -masked_sum(weights * predicted / self.num_heads, batch.counted)

    def finish(self, experience: PPOExperience) -> Metrics:
        """PPO's metrics; the target heads move."""
        metrics = super().finish(experience)
        self.targets.move(self.target_rate)
        return metrics

    def state_dict(self) -> dict[str, Any]:
        """PPO's state, and the target heads."""
        return {**super().state_dict(), "targets": self.targets.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.targets.load_state_dict(state["targets"])
