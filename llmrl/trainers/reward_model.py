"""Training of reward models on pairs of responses, one of which was preferred."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from llmrl.batches import PreferencePairs
from llmrl.functional.intervals import wilson_interval
from llmrl.functional.losses import bradley_terry_loss
from llmrl.functional.statistics import Total
from llmrl.metrics import Metrics
from llmrl.roles import Scorer
from llmrl.trainers.config import RewardModelConfig

PairScores = tuple[Float[Tensor, " B"], Float[Tensor, " B"]]


class RewardModelObjective:
    """Bradley-Terry: the chosen response wins with probability sigmoid(its score - the other's - margin)."""

    def __init__(self, config: RewardModelConfig, *, scorer: Scorer) -> None:
        self.config = config
        self.scorer = scorer

    def denominator(self, batch: PreferencePairs) -> Int[Tensor, ""]:
        """Number of pairs in a batch."""
        return torch.tensor(len(batch.margin), device=batch.margin.device)

    def outputs(self, batch: PreferencePairs) -> PairScores:
        """Raw scores, ``(chosen, rejected)``."""
        return self.scorer.pair_scores(batch)

    def loss(
        self, outputs: PairScores, batch: PreferencePairs, denominator: Int[Tensor, ""]
    ) -> tuple[Float[Tensor, ""], Metrics]:
        """The negative log-likelihood of these preferences, over the pairs of the whole batch."""
        loss, statistics = bradley_terry_loss(
            *outputs,
            margin=batch.margin if self.config.use_margin else None,
            center_coef=self.config.center_coef,
            num_pairs=denominator,
        )
        return loss, Metrics({"loss": Total(loss.detach()), **statistics})

    def evaluate(self, outputs: PairScores, batch: PreferencePairs) -> dict[str, float]:
        """``eval/accuracy``, a tie as half, with its interval at 95 %, and ``eval/loss``."""
        _, metrics = self.loss(outputs, batch, self.denominator(batch))
        values, num_pairs = metrics.values(), len(batch.margin)
        accuracy = values["pairs/accuracy"]
        low, high = wilson_interval(accuracy * num_pairs, num_pairs)
        return {
            "eval/accuracy": accuracy,
            "eval/accuracy_low": low,
            "eval/accuracy_high": high,
            "eval/loss": values["loss"],
        }
