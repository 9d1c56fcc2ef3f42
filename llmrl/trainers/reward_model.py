"""Training of reward models on pairs of responses, by the optimizer step of every trainer."""

import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from llmrl.batches import PreferencePairs
from llmrl.functional.intervals import wilson_interval
from llmrl.functional.losses import bradley_terry_loss
from llmrl.functional.statistics import Mean, Statistic, Total
from llmrl.metrics import Metrics
from llmrl.microbatches import parts_of_rank
from llmrl.roles import Collectives, PairSource, Progress, Scorer, Trainable
from llmrl.trainers.optimize import optimizer_step
from llmrl.trainers.resumable import Resumable


@dataclass(frozen=True, kw_only=True)
class RewardModelConfig:
    """How pairs are cut up for the optimizer, and what is learned from them. An iteration is one optimizer step."""

    num_epochs: int = 1
    """Passes over the pairs; a reward model learns them by heart in the second."""
    batch_size: int = 32
    """Pairs per optimizer step, over all ranks."""
    microbatch_tokens: int = 8192
    """Tokens per forward pass on one device, padding included. Changes memory, never the result."""
    head_init: Literal["zero", "normal"] = "normal"
    """A new head: zeros, or normal with variance 1 / (hidden size + 1) (Stiennon et al. 2020, arXiv:2009.01325)."""
    use_margin: bool = True
    """Asks for the margin that a pair brings (Touvron et al. 2023, arXiv:2307.09288); a pair without one asks for 0."""
    center_coef: float = 0.0
    """Pulls the sum of a pair's scores to 0 (Eisenstein et al. 2023, arXiv:2312.09244); 0.01 is usual; 0 for none."""
    evaluate_every: int | None = None
    """Iterations between evaluations on `evaluation_data`; before the first and after the last too. null for these two
    only; 0 for none."""
    num_reference_pairs: int = 512
    """Scores have mean 0 and standard deviation 1 on both responses of so many pairs, spread over the data."""

    def __post_init__(self) -> None:
        for name in ("num_epochs", "batch_size", "microbatch_tokens", "num_reference_pairs"):
            if getattr(self, name) < 1:
                raise ValueError(f"reward_model.{name} ({getattr(self, name)}) must be at least 1")
        if self.evaluate_every is not None and self.evaluate_every < 0:
            raise ValueError(f"reward_model.evaluate_every ({self.evaluate_every}) must be 0 or greater")
        if not 0 <= self.center_coef < math.inf:
            raise ValueError(f"reward_model.center_coef ({self.center_coef}) must be 0 or greater")


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
        metrics = optimizer_step(self.trained, parts, losses, self.collectives, self.progress, idle=idle)
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
