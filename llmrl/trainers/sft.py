"""Supervised fine-tuning: maximizes the log-probability of given responses."""

from jaxtyping import Float, Int
from torch import Tensor

from llmrl.batches import Sequences
from llmrl.functional.losses import token_weights
from llmrl.functional.masking import masked_sum
from llmrl.functional.statistics import Mean
from llmrl.metrics import Metrics
from llmrl.roles import Policy


class SFTObjective:
    """Every response token counts the same: loss = -Σ log p / number of response tokens in the batch."""

    def __init__(self, actor: Policy) -> None:
        self.actor = actor

    def denominator(self, batch: Sequences) -> Int[Tensor, ""]:
        """Number of response tokens in a batch."""
        return batch.response_mask.sum()

    def outputs(self, batch: Sequences) -> Float[Tensor, "B T"]:
        """Log-probabilities of the response tokens."""
        return self.actor.logprobs(batch).logprobs

    def loss(
        self, outputs: Float[Tensor, "B T"], batch: Sequences, denominator: Int[Tensor, ""]
    ) -> tuple[Float[Tensor, ""], Metrics]:
        """The negative log-probabilities of these responses, over the response tokens of the whole batch."""
        mask = batch.response_mask
        weights = token_weights(
            mask, aggregation="token", num_tokens=denominator, num_responses=0, max_response_tokens=1
        )
        return -masked_sum(weights * outputs, mask), Metrics({"loss": _mean_loss(outputs.detach(), batch)})

    def evaluate(self, outputs: Float[Tensor, "B T"], batch: Sequences) -> dict[str, float]:
        """``eval/loss``: nats per response token."""
        return Metrics({"eval/loss": _mean_loss(outputs, batch)}).values()


def _mean_loss(logprobs: Float[Tensor, "B T"], sequences: Sequences) -> Mean:
    mask = sequences.response_mask
    return Mean(-masked_sum(logprobs, mask), mask.sum())
