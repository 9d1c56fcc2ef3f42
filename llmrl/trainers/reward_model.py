"""Training of reward models on pairs of responses, by the optimizer step of every trainer."""

import time
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from llmrl.batches import PreferencePairs
from llmrl.functional.intervals import wilson_interval
from llmrl.functional.losses import bradley_terry_loss
from llmrl.functional.statistics import Mean, Statistic, Total
from llmrl.metrics import Metrics
from llmrl.microbatches import parts_of_rank
from llmrl.roles import Collectives, PairSource, Progress, Scorer, Trainable
from llmrl.trainers.config import RewardModelConfig
from llmrl.trainers.optimize import optimizer_step
from llmrl.trainers.resumable import Resumable


class RewardModelTrainer(Resumable):
    """Bradley-Terry: the chosen response wins with probability sigmoid(its score - the other's - margin)."""

    def __init__(
        self,
        config: RewardModelConfig,
        *,
        scorer: Scorer,
        trained: Mapping[str, Trainable],
        pairs: PairSource,
        held_out: PreferencePairs,
        collectives: Collectives,
        progress: Progress,
    ) -> None:
        self.config = config
        self.scorer = scorer
        self.pairs = pairs
        self.held_out = held_out
        self.collectives = collectives
        self.progress = progress
        self.device = trained["reward_model"].device
        self.scored: tuple[int, tuple[Tensor, Tensor]] | None = None
        """Scores of the held-out pairs, and after how many iterations."""
        super().__init__(trained, pairs)

    def iterate(self) -> Metrics:
        """One optimizer step on the next pairs."""
        started = time.perf_counter()
        batch = self.pairs.next(self.config.batch_size).to(self.device)
        num_pairs = torch.tensor(len(batch.margin), device=self.device)

        def losses(index: Tensor) -> Iterator[tuple[str, Tensor, Metrics]]:
            part = batch.select(index)
            loss, statistics = self.loss(*self.scorer.pair_scores(part), part.margin, num_pairs)
            yield "reward_model", loss, Metrics({"loss": Total(loss.detach()), **statistics})

        parts, idle = parts_of_rank(
            self.scorer.pair_tokens(batch),
            self.config.microbatch_tokens,
            self.collectives.rank,
            self.collectives.world_size,
        )
        self.progress.phase("update", len(parts))
        metrics = optimizer_step(
            self.trained, map(losses, parts), self.collectives, self.progress, idle=map(losses, idle)
        )
        self.finish_iteration(self.iteration + 1)
        seconds = time.perf_counter() - started
        timing = {"time/iteration_s": Total(seconds), "tokens/per_s": Mean(batch.num_tokens.sum(), seconds)}
        return metrics.merge(Metrics(timing))

    def loss(
        self, chosen: Tensor, rejected: Tensor, margin: Tensor, num_pairs: Tensor
    ) -> tuple[Tensor, dict[str, Statistic]]:
        """The part of pairs with these scores in the loss of an optimizer step on so many."""
        return bradley_terry_loss(
            chosen,
            rejected,
            margin=margin if self.config.use_margin else None,
            center_coef=self.config.center_coef,
            num_pairs=num_pairs,
        )

    @torch.no_grad()
    def held_out_scores(self) -> tuple[Tensor, Tensor]:
        """Raw scores of ``(chosen, rejected)`` of the model as it is; computed once an iteration."""
        if self.scored is None or self.scored[0] != self.iteration:
            self.progress.phase("evaluation", 1)
            self.scored = self.iteration, self.scorer.pair_scores(self.held_out)
            self.progress.advance()
        return self.scored[1]

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """``eval/accuracy``, a tie as half, with its interval at 95 %, and ``eval/loss`` on the held-out pairs."""
        num_pairs = len(self.held_out.margin)
        count = torch.tensor(num_pairs, device=self.device)
        loss, statistics = self.loss(*self.held_out_scores(), self.held_out.margin, count)
        accuracy = Metrics({"accuracy": statistics["pairs/accuracy"]}).values()["accuracy"]
        low, high = wilson_interval(accuracy * num_pairs, num_pairs)
        return {
            "eval/accuracy": accuracy,
            "eval/accuracy_low": low,
            "eval/accuracy_high": high,
            "eval/loss": float(loss),
        }
