"""The roles of a run, as protocols. Algorithms and the loop see these and nothing else.

An adapter that has the methods plays the part: a new engine or a new distributed backend touches no algorithm.
"""

from dataclasses import dataclass
from typing import Any, Protocol

from jaxtyping import Float
from torch import Tensor, nn

from llmrl.experience import Prompts, Rollout, Scores, Sequences
from llmrl.functional.streams import Purpose


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How an engine draws responses. There is no top-k and no top-p: the policy that samples is the one that is trained."""

    temperature: float
    """Divides the logits; greater than 0."""
    num_responses: int
    """Responses per prompt, G."""
    max_response_tokens: int
    """Length limit of a response, EOS included."""
    greedy: bool
    """Takes the likeliest token instead of drawing one. Log-probabilities are still those at `temperature`."""
    seed: int
    purpose: Purpose
    """Which family of random streams: training and evaluation never share a number."""
    first_response: int
    """Global number of the first response. Response g of prompt n has the number first_response + n * G + g, and that
    number over G, rounded down, is its group."""


class RolloutEngine(Protocol):
    """Draws responses from the policy."""

    def generate(self, prompts: Prompts, sampling: Sampling) -> Rollout:
        """G responses to each prompt, those of one prompt adjacent, prompts in order."""
        ...

    def load_weights(self, trained: "Trainable") -> None:
        """From now on samples from these weights."""
        ...


class RewardFunction(Protocol):
    """Says how good each response is."""

    def __call__(self, rollout: Rollout) -> Scores: ...


class Policy(Protocol):
    """The probability that a language model gives to responses."""

    def logprobs(self, sequences: Sequences) -> tuple[Float[Tensor, "B T"], Float[Tensor, "B T"]]:
        """``(logprobs, entropy)`` of the response tokens at the sampling temperature, in nats, float32, 0 outside the mask."""
        ...


class Trainable(Protocol):
    """A module with its optimizer: the only place that knows how gradients are summed over ranks."""

    module: nn.Module

    def backward(self, loss: Tensor) -> None:
        """Adds the gradient of the loss to what earlier microbatches left."""
        ...

    def optimizer_step(self) -> Tensor:
        """Clips, steps, clears the gradient and advances the learning rate. Returns the global norm before clipping."""
        ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class Collectives(Protocol):
    """What ranks say to each other."""

    rank: int
    world_size: int

    def sum(self, x: Tensor) -> Tensor:
        """The elementwise sum over ranks, the same on every rank."""
        ...

    def max(self, x: Tensor) -> Tensor:
        """The elementwise maximum over ranks, the same on every rank."""
        ...


class Progress(Protocol):
    """Who is told how far the run is."""

    def phase(self, name: str, total: int) -> None:
        """A new phase of the iteration begins: rollout, reward, logprobs, update, evaluation; `total` units of work."""
        ...

    def advance(self, amount: int = 1) -> None:
        """So many more units of the current phase are done."""
        ...
