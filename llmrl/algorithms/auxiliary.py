"""The auxiliary phase of phasic policy gradient: values are distilled into the trunk of the actor.

A policy phase is some iterations of PPO with a critic of its own. Then everything that they sampled is learned from
once more, in several epochs:

    actor    Σ w_t [ (V_aux,t - R_t)² / 2 + kl_coef KL(π_old, π)_t ]        V_aux: a head on the actor's trunk
    critic   Σ w_t (V_t - R_t)² / 2

π_old is the actor as the phase begins and R_t the return of the iteration that sampled token t, both frozen. So the
trunk learns what predicts returns, while the policy stays where it is. The auxiliary head is read by nothing else.

The paper's KL is over all actions. Here it is estimated from the sampled token, by k3 times π_old / π_rollout, since an
older policy sampled it: value and gradient have the exact expectation, and no distribution over the vocabulary is kept.

Cobbe et al. 2020, arXiv:2009.04416, algorithm 1.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from llmrl.batch_states import batch_of, state_of
from llmrl.batches import AuxiliaryExperience, PPOExperience
from llmrl.functional.losses import clipped_value_loss, cloning_loss
from llmrl.functional.masking import masked_moments
from llmrl.functional.statistics import Explained, Total
from llmrl.metrics import Metrics
from llmrl.roles import ActorCritic


class DistillValues:
    """`AuxiliaryPhase` of phasic policy gradient.

    Args:
        networks: Actor and critic. With the log-probabilities of the actor come its `auxiliary_values`.
        every: Iterations of a policy phase.
        num_epochs: Epochs of the auxiliary phase.
        kl_coef: Weight of the KL to the actor as the phase begins.
        warmup_iterations: Iterations at the start that train the critic alone, and belong to no phase.
    """

    def __init__(
        self, *, networks: ActorCritic, every: int, num_epochs: int, kl_coef: float, warmup_iterations: int
    ) -> None:
        self.networks = networks
        self.every = every
        self.num_epochs = num_epochs
        self.kl_coef = kl_coef
        self.warmup_iterations = warmup_iterations
        self.kept: list[AuxiliaryExperience] = []
        """What each iteration of the current policy phase sampled, on the CPU."""

    def collect(self, iteration: int, experience: PPOExperience) -> AuxiliaryExperience | None:
        """See `AuxiliaryPhase`."""
        if iteration < self.warmup_iterations:
            return None
        self.kept.append(_kept_of(experience))
        if len(self.kept) < self.every:
            return None
        whole, self.kept = AuxiliaryExperience.cat(self.kept).to(experience.device), []
        return replace(whole, old_logprobs=self.networks.logprobs(whole.sequences).logprobs)

    def losses(
        self, batch: AuxiliaryExperience, weights: Float[Tensor, "B T"]
    ) -> Iterator[tuple[str, Tensor, Metrics]]:
        """See `AuxiliaryPhase`: the joint loss of the actor, and the squared error of the critic."""
        assert batch.old_logprobs is not None, "set as the phase begins"
        outputs = self.networks.logprobs(batch.sequences)
        values = outputs.named["auxiliary_values"]
        value_loss = _squared_error(values, batch, weights)
        kl, measured = cloning_loss(outputs.logprobs, batch.old_logprobs, batch.rollout_logprobs, weights)
        returns, mask = batch.returns, batch.counted
        explained = Explained(*masked_moments(returns, mask), *masked_moments(returns - values.detach(), mask)[1:])
        metrics = {"auxiliary/value_loss": Total(value_loss.detach()), "auxiliary/explained_variance": explained}
        yield "actor", value_loss + self.kl_coef * kl, Metrics({**metrics, "auxiliary/kl": measured})
        loss = _squared_error(self.networks.values(batch.sequences).values, batch, weights)
        yield "critic", loss, Metrics({"auxiliary/critic_loss": Total(loss.detach())})

    def state_dict(self) -> dict[str, Any]:
        """What each iteration of the current policy phase sampled, by its number in the phase."""
        return {"kept": {str(number): state_of(part) for number, part in enumerate(self.kept)}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes over what `state_dict` returned."""
        kept = state["kept"]
        self.kept = [batch_of(kept[str(number)]) for number in range(len(kept))]


def _kept_of(experience: PPOExperience) -> AuxiliaryExperience:
    counted = experience.counted
    return AuxiliaryExperience(
        sequences=experience.sequences,
        counted=counted,
        returns=torch.where(counted, experience.returns, 0.0),
        rollout_logprobs=torch.where(counted, experience.rollout.rollout_logprobs, 0.0),
        old_logprobs=None,
    ).to("cpu")


def _squared_error(
    values: Float[Tensor, "B T"], batch: AuxiliaryExperience, weights: Float[Tensor, "B T"]
) -> Float[Tensor, ""]:
    """Half the squared error of values, without a clip."""
    return clipped_value_loss(values, values.detach(), batch.returns, weights, value_clip=None)[0]
