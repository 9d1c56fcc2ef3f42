"""Supervised fine-tuning: maximizes the log-probability of given responses, by the optimizer step of every trainer."""

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from llmrl.experience import Sequences, by_token_budget
from llmrl.functional.losses import token_weights
from llmrl.functional.masking import masked_sum
from llmrl.functional.statistics import Mean, Total
from llmrl.metrics import Metrics
from llmrl.roles import Collectives, ExampleSource, Policy, Progress, Trainable
from llmrl.trainers.optimize import optimizer_step


@dataclass(frozen=True, kw_only=True)
class SFTConfig:
    """How examples are cut up for the optimizer. An iteration is one optimizer step."""

    batch_size: int = 32
    """Examples per optimizer step, over all ranks."""
    microbatch_tokens: int = 8192
    """Tokens per forward pass on one device, padding included. Changes memory, never the result."""
    evaluate_every: int = 0
    """Iterations between evaluations of the loss on `evaluation_data`; the first and the last included; 0 for none."""

    def __post_init__(self) -> None:
        for name in ("batch_size", "microbatch_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"sft.{name} ({getattr(self, name)}) must be at least 1")
        if self.evaluate_every < 0:
            raise ValueError(f"sft.evaluate_every ({self.evaluate_every}) must be 0 or greater")


class SFTTrainer:
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
        self.trained = trained
        self.examples = examples
        self.held_out = held_out
        self.collectives = collectives
        self.progress = progress
        self.device = next(trained["actor"].module.parameters()).device
        self.iteration = 0
        self.weights_moved = False
        """In the middle of an iteration, after its optimizer step has begun."""
        self.start = self.cursor()
        """Where the current iteration began."""

    def iterate(self) -> Metrics:
        """One optimizer step on the next examples."""
        started = time.perf_counter()
        batch = self.examples.next(self.config.batch_size).to(self.device)
        num_tokens = self.collectives.sum(batch.response_mask.sum())

        def losses(index: Tensor) -> Iterator[tuple[str, Tensor, Metrics]]:
            part = batch.select(index)
            weights = token_weights(
                part.response_mask, aggregation="token", num_tokens=num_tokens, num_responses=0, max_response_tokens=1
            )
            logprobs, _ = self.actor.logprobs(part)
            loss = -masked_sum(weights * logprobs, part.response_mask)
            yield "actor", loss, Metrics({"loss": self._mean_loss(part, logprobs.detach())})

        parts = by_token_budget(batch.num_tokens, self.config.microbatch_tokens)
        self.progress.phase("update", len(parts))
        self.weights_moved = True
        metrics = optimizer_step(self.trained, parts, losses, self.progress)
        self.iteration += 1
        self.weights_moved = False
        self.start = self.cursor()
        seconds = time.perf_counter() - started
        timing = {"time/iteration_s": Total(seconds), "tokens/per_s": Mean(batch.num_tokens.sum(), seconds)}
        return metrics.merge(Metrics(timing))

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """``eval/loss``: nats per response token on the held-out examples."""
        assert self.held_out is not None, "evaluation without held-out examples"
        self.progress.phase("evaluation", 1)
        logprobs, _ = self.actor.logprobs(self.held_out)
        self.progress.advance()
        return Metrics({"eval/loss": self._mean_loss(self.held_out, logprobs)}).values()

    def _mean_loss(self, sequences: Sequences, logprobs: Tensor) -> Mean:
        mask = sequences.response_mask
        return Mean(-masked_sum(logprobs, mask), mask.sum())

    def rewind(self) -> bool:
        """After a failure: back to where the iteration began, unless weights have moved since."""
        if self.weights_moved:
            return False
        self._go_to(self.start)
        return True

    def cursor(self) -> dict[str, Any]:
        """Where the run stands, but for the weights: the next iteration and example."""
        return {"iteration": self.iteration, "examples": self.examples.state_dict()}

    def _go_to(self, cursor: dict[str, Any]) -> None:
        self.iteration = cursor["iteration"]
        self.examples.load_state_dict(cursor["examples"])
        self.start = self.cursor()

    def state_dict(self) -> dict[str, Any]:
        """Everything that the next iteration depends on."""
        return {
            "cursor": self.cursor(),
            "trained": {name: module.state_dict() for name, module in self.trained.items()},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._go_to(state["cursor"])
        for name, module in self.trained.items():
            module.load_state_dict(state["trained"][name])
