"""Supervised fine-tuning: maximizes the log-probability of given responses, by the optimizer step of every trainer."""

import time
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from llmrl.batches import Sequences
from llmrl.functional.losses import token_weights
from llmrl.functional.masking import masked_sum
from llmrl.functional.statistics import Mean, Total
from llmrl.metrics import Metrics
from llmrl.microbatches import parts_of_rank
from llmrl.roles import Collectives, ExampleSource, Policy, Progress, Trainable
from llmrl.trainers.config import SFTConfig
from llmrl.trainers.optimize import optimizer_step
from llmrl.trainers.resumable import Resumable


class SFTTrainer(Resumable):
    """Every response token counts the same: loss = -Σ log p / number of response tokens in the batch."""

    def __init__(
        self,
        config: SFTConfig,
        *,
        actor: Policy,
        trained: Mapping[str, Trainable],
        examples: ExampleSource,
        held_out: Sequences | None,
        collectives: Collectives,
        progress: Progress,
    ) -> None:
        self.config = config
        self.actor = actor
        self.examples = examples
        self.held_out = held_out
        self.collectives = collectives
        self.progress = progress
        self.device = trained["actor"].device
        super().__init__(trained, examples)

    def iterate(self) -> Metrics:
        """One optimizer step on the next examples."""
        started = time.perf_counter()
        batch = self.examples.next(self.config.batch_size).to(self.device)
        num_tokens = batch.response_mask.sum()

        def losses(index: Tensor) -> Iterator[tuple[str, Tensor, Metrics]]:
            part = batch.select(index)
            weights = token_weights(
                part.response_mask, aggregation="token", num_tokens=num_tokens, num_responses=0, max_response_tokens=1
            )
            logprobs = self.actor.logprobs(part).logprobs
            loss = -masked_sum(weights * logprobs, part.response_mask)
            yield "actor", loss, Metrics({"loss": self._mean_loss(part, logprobs.detach())})

        parts, idle = parts_of_rank(
            batch.num_tokens, self.config.microbatch_tokens, self.collectives.rank, self.collectives.world_size
        )
        self.progress.phase("update", len(parts))
        metrics = optimizer_step(
            self.trained, map(losses, parts), self.collectives, self.progress, idle=map(losses, idle)
        )
        self.finish_iteration(self.iteration + 1)
        seconds = time.perf_counter() - started
        timing = {"time/iteration_s": Total(seconds), "tokens/per_s": Mean(batch.num_tokens.sum(), seconds)}
        return metrics.merge(Metrics(timing))

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """``eval/loss``: nats per response token on the held-out examples."""
        assert self.held_out is not None, "evaluation without held-out examples"
        self.progress.phase("evaluation", 1)
        logprobs = self.actor.logprobs(self.held_out).logprobs
        self.progress.advance()
        return Metrics({"eval/loss": self._mean_loss(self.held_out, logprobs)}).values()

    def _mean_loss(self, sequences: Sequences, logprobs: Tensor) -> Mean:
        mask = sequences.response_mask
        return Mean(-masked_sum(logprobs, mask), mask.sum())
