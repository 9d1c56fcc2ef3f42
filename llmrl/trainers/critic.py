"""A critic trained before PPO: regression of its values on the returns of scored responses."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from llmrl.batches import ScoredResponses
from llmrl.functional.advantages import gae
from llmrl.functional.losses import clipped_value_loss, token_weights
from llmrl.functional.masking import masked_moments
from llmrl.functional.statistics import Explained, Total
from llmrl.metrics import Metrics
from llmrl.roles import ValueFunction


class CriticObjective:
    """Half the squared error of each value, every response token counting the same.

        R_t = gamma^(L-1-t) score    the return before token t of a response of L tokens

    That is PPO's return with lambda 1 and without a KL: the score comes with the last token, and no value of the
    critic itself is in it.
    """

    def __init__(self, critic: ValueFunction, *, gamma: float) -> None:
        self.critic = critic
        self.gamma = gamma

    def denominator(self, batch: ScoredResponses) -> Int[Tensor, ""]:
        """Number of response tokens in a batch."""
        return batch.sequences.response_mask.sum()

    def outputs(self, batch: ScoredResponses) -> Float[Tensor, "B T"]:
        """Values before the response tokens."""
        return self.critic.values(batch.sequences).values

    def loss(
        self, outputs: Float[Tensor, "B T"], batch: ScoredResponses, denominator: Int[Tensor, ""]
    ) -> tuple[Float[Tensor, ""], Metrics]:
        """The squared errors on these responses, over the response tokens of the whole batch."""
        mask, returns = batch.sequences.response_mask, self.returns(batch)
        weights = token_weights(
            mask, aggregation="token", num_tokens=denominator, num_responses=0, max_response_tokens=1
        )
        loss, _ = clipped_value_loss(outputs, outputs.detach(), returns, weights, value_clip=None)
        explained = Explained(*masked_moments(returns, mask), *masked_moments(returns - outputs.detach(), mask)[1:])
        return loss, Metrics({"value/loss": Total(loss.detach()), "value/explained_variance": explained})

    def evaluate(self, outputs: Float[Tensor, "B T"], batch: ScoredResponses) -> dict[str, float]:
        """``eval/loss`` and ``eval/explained_variance``."""
        _, metrics = self.loss(outputs, batch, self.denominator(batch))
        values = metrics.values()
        names = ("loss", "explained_variance")
        return {f"eval/{name}": values[f"value/{name}"] for name in names if f"value/{name}" in values}

    def returns(self, batch: ScoredResponses) -> Float[Tensor, "B T"]:
        """Targets of the values."""
        mask = batch.sequences.response_mask
        last = torch.arange(mask.shape[1], device=mask.device) == batch.sequences.response_lengths[:, None] - 1
        rewards = torch.where(last, batch.scores[:, None], 0.0)
        nothing = torch.zeros_like(rewards)
        _, returns = gae(rewards, nothing, mask, nothing[:, 0], gamma=self.gamma, gae_lambda=1.0)
        return returns
