"""Training on batches of data, one optimizer step an iteration: supervised fine-tuning, reward models."""

import time
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from llmrl.batches import ReadBatch
from llmrl.distributed.context import Context
from llmrl.distributed.microbatcher import Microbatcher
from llmrl.functional.statistics import Mean, Total
from llmrl.metrics import Metrics
from llmrl.microbatches import TokenBudget
from llmrl.roles import BatchSource, Objective, Trainable
from llmrl.trainers.optimize import accumulate_and_step
from llmrl.trainers.resumable import Resumable


class BatchTrainer(Resumable):
    """Minimizes an objective, whatever it is, on the batches of a source.

    Args:
        objective: The loss that is minimized, and the metrics of an evaluation.
        trained: The one module that learns, by its name in the metrics.
        source: The data.
        held_out: Data of evaluations, on the device; None for a run without them.
        batch_size: Rows per optimizer step, over all ranks.
        budget: Token budget of one forward pass on one device.
        context: Context of the run.
    """

    def __init__(
        self,
        *,
        objective: Objective,
        trained: Mapping[str, Trainable],
        source: BatchSource,
        held_out: ReadBatch | None,
        batch_size: int,
        budget: TokenBudget,
        context: Context,
    ) -> None:
        ((self.name, trainable),) = trained.items()
        self.device = trainable.device
        self.objective = objective
        self.source: BatchSource = source
        self.held_out = held_out
        self.batch_size = batch_size
        self.microbatcher = Microbatcher(budget, context)
        self.progress = context.progress
        self.evaluated: tuple[int, Any] | None = None
        """``(iterations done, outputs)`` of the last evaluation on the held-out data."""
        super().__init__(trained, source)

    def iterate(self) -> Metrics:
        """One optimizer step on the next batch."""
        started = time.perf_counter()
        batch = self.source.next(self.batch_size).to(self.device)
        denominator = self.objective.denominator(batch)

        def losses(index: Tensor) -> Iterator[tuple[str, Tensor, Metrics]]:
            part = batch.select(index)
            yield self.name, *self.objective.loss(self.objective.outputs(part), part, denominator)

        metrics = accumulate_and_step(self.trained, losses, batch, self.microbatcher)
        self.finish_iteration(self.iteration + 1)
        seconds = time.perf_counter() - started
        timing = {"time/iteration_s": Total(seconds), "tokens/trained_per_s": Mean(batch.num_tokens.sum(), seconds)}
        return metrics.merge(Metrics(timing))

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """Metrics of the objective on the held-out data."""
        return self.objective.evaluate(*self.held_out_outputs())

    @torch.no_grad()
    def held_out_outputs(self) -> tuple[Any, Any]:
        """``(outputs, data)``: outputs of the current model on the held-out data, computed once an iteration."""
        assert self.held_out is not None, "evaluation without held-out data"
        if self.evaluated is None or self.evaluated[0] != self.iteration:
            self.progress.phase("evaluation", 1)
            self.evaluated = self.iteration, self.objective.outputs(self.held_out)
            self.progress.advance()
        return self.evaluated[1], self.held_out
