"""The roles of a run, as protocols. Algorithms and the loop see these and nothing else.

An adapter that has the methods plays the part: a new engine or a new distributed backend touches no algorithm.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from llmrl.batches import Experience, PreferencePairs, Prompts, ReadBatch, Rollout, Scores, Sequences, TokenOutputs
from llmrl.errors import Error
from llmrl.functional.aggregation import Aggregation
from llmrl.functional.streams import Purpose
from llmrl.metrics import Metrics


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How an engine draws responses. There is no top-k and no top-p: the policy that samples is the one trained."""

    temperature: float
    """Divides the logits; greater than 0."""
    num_responses: int
    """Responses per prompt, G."""
    max_response_tokens: int
    """Length limit of a response, EOS included."""
    greedy: bool
    """Takes the likeliest token instead of drawing one. Log-probabilities are those at `temperature` all the same."""
    seed: int
    purpose: Purpose
    """Use of the random streams: training and evaluation never share a number."""
    first_response: int
    """Global number of the first response. Response g of prompt n has the number first_response + n * G + g, and that
    number over G, rounded down, is its group."""
    max_turn_tokens: int | None = None
    """Length limit of a turn, EOS included; None: that of the response."""


@runtime_checkable
class Replies(Protocol):
    """Whatever answers the turns of the responses that an engine is decoding. Responses are known by their index in the
    rollout. What it does depends on what it is asked and not on when."""

    def ask(self, turns: Mapping[int, Sequence[int]]) -> None:
        """Turns of these responses have ended by themselves, with these ids, EOS included. Returns at once."""
        ...

    def take(self, indices: Sequence[int]) -> Mapping[int, Sequence[int]]:
        """What is fed to each of these responses, whose turns have ended: waits until it is known. Nothing where the
        response is complete; a `NewContext` where the response goes on without what is before; and never so much that
        no room is left for a further token."""
        ...


@runtime_checkable
class RolloutEngine(Protocol):
    """Draws responses from the policy."""

    def generate(self, prompts: Prompts, sampling: Sampling) -> Rollout:
        """G responses to each prompt, those of one prompt adjacent, prompts in order."""
        ...

    def load_weights(self, trained: "Trainable") -> None:
        """Publishes weights: later responses are sampled from these."""
        ...


@runtime_checkable
class RewardFunction(Protocol):
    """Scores each response of a rollout."""

    def __call__(self, rollout: Rollout) -> Scores: ...


@runtime_checkable
class Policy(Protocol):
    """Log-probabilities that a language model gives to responses."""

    def logprobs(self, sequences: Sequences) -> TokenOutputs:
        """`logprobs` and `entropy` of the response tokens, and other outputs of the same pass."""
        ...


@runtime_checkable
class ValueFunction(Protocol):
    """Values of a critic: rewards still to come."""

    def values(self, sequences: Sequences) -> TokenOutputs:
        """`values` before each response token is chosen, `last_values` after the last one."""
        ...


@runtime_checkable
class ActorCritic(Policy, ValueFunction, Protocol):
    """Actor and critic: two networks, or two heads of one."""

    share_trunk: bool
    """Whether both are one trained module, so that their losses are one."""

    def both(self, sequences: Sequences) -> TokenOutputs:
        """Outputs of actor and critic, computed in one pass if they share a trunk."""
        ...


class StateMismatch(Error, ValueError):
    """A saved state of other weights than those it was to be loaded into."""


@runtime_checkable
class Scorer(Protocol):
    """Raw scores of a reward model, before normalization."""

    def scores(self, sequences: Sequences) -> Float[Tensor, " B"]:
        """Score of each sequence, without gradient."""
        ...

    def pair_scores(self, pairs: PreferencePairs) -> tuple[Float[Tensor, " B"], Float[Tensor, " B"]]:
        """Scores of both sides of each pair: ``(chosen, rejected)``."""
        ...


@runtime_checkable
class Trainable(Protocol):
    """A module with its optimizer. The only place that knows how gradients are summed over ranks, and how weights are
    split over them."""

    module: nn.Module
    wrapped: nn.Module
    """The wrapper that is called in place of the module."""
    device: torch.device
    """Device on which it computes."""
    holds_all: bool
    """Whether this rank has the whole state by itself; if not, `state_dict` is collective."""
    num_steps_done: int
    """Optimizer steps begun so far in this run."""

    @property
    def learning_rate(self) -> float:
        """Learning rate of the next optimizer step."""
        ...

    def backward(self, loss: Tensor) -> None:
        """Adds the gradient of the loss to what earlier microbatches left."""
        ...

    def optimizer_step(self) -> Tensor:
        """Clips, steps, clears the gradient and advances the learning rate. Returns the global norm before clipping."""
        ...

    def whole(self, part: nn.Module) -> Iterator[tuple[str, Tensor]]:
        """Yields ``(name, full parameter)`` of a submodule. Each tensor is valid until the next is yielded. Collective:
        every rank must iterate."""
        ...

    def assign(self, name: str, value: Tensor) -> None:
        """Sets a frozen parameter of the module to this full value, the same on every rank. Collective."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """The whole state, at least on the first rank."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises StateMismatch, and changes nothing, where the state is of other weights."""
        ...


@runtime_checkable
class Balance(Protocol):
    """What keeps the experts of a mixture evenly used."""

    def finish_step(self, metrics: Metrics) -> None:
        """Called after each optimizer step with its metrics, pooled over microbatches and ranks."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """What the next step depends on, the same on every rank."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes over what `state_dict` returned."""
        ...


@runtime_checkable
class MovingReference(Protocol):
    """The reference, where it follows the actor."""

    @property
    def holds_all(self) -> bool:
        """Whether this rank has all its weights by itself; if not, `state_dict` is collective."""
        ...

    def finish_iteration(self, number: int) -> Metrics:
        """Called at the end of iteration `number`, counted from 1: moves the reference if its time has come. Returns
        its metrics. Collective."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Its weights, at least on the first rank."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes over what `state_dict` returned."""
        ...


@runtime_checkable
class AuxiliaryPhase(Protocol):
    """What is learned from the experience of several iterations together, after their own updates."""

    num_epochs: int
    """Epochs over that experience."""

    def collect(self, iteration: int, experience: Any) -> Any | None:
        """Keeps the experience of an iteration, counted from 0. If the phase follows this one, returns all that was
        kept, which it learns from, and keeps no more of it; else None. Called without gradient. Collective."""
        ...

    def losses(self, batch: Any, weights: Float[Tensor, "B T"]) -> Iterator[tuple[str, Tensor, Metrics]]:
        """Losses of rows of that experience; see `Algorithm`."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """What it keeps, the same on every rank."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes over what `state_dict` returned."""
        ...


@runtime_checkable
class MovingTargets(Protocol):
    """Target heads: a slow copy of what learns, which its targets are computed by."""

    def move(self, rate: float) -> None:
        """Polyak average: target <- (1 - rate) target + rate live, weight by weight."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Their weights."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes over what `state_dict` returned."""
        ...


@runtime_checkable
class Collectives(Protocol):
    """Communication between the processes of a run, called ranks. Every rank makes the same calls in the same order."""

    rank: int
    world_size: int

    @property
    def is_first(self) -> bool:
        """Whether this is rank 0, which writes files and reports progress."""
        return self.rank == 0

    def sum(self, x: Tensor) -> Tensor:
        """Elementwise sum over ranks, the same on every rank."""
        ...

    def gather(self, x: Any) -> list[Any]:
        """One object per rank, in rank order, on every rank. Also a barrier."""
        ...

    def from_first(self, x: Any) -> Any:
        """The object of rank 0, on every rank. Also a barrier."""
        return self.gather(x)[0]

    def barrier(self) -> None:
        """Returns when every rank has called it."""
        self.gather(None)


@runtime_checkable
class Progress(Protocol):
    """Receives progress: iterations, phases, messages."""

    def begin(self, num_iterations: int, num_done: int = 0) -> None:
        """Called once, before the first iteration of this process; `num_done` were done before a resume."""
        ...

    def iteration(self, number: int, values: Mapping[str, float]) -> None:
        """Iteration `number`, counted from 1, is done; these are its metrics."""
        ...

    def message(self, text: str) -> None:
        """Prints a message."""
        ...

    def phase(self, name: str, total: int) -> None:
        """A new phase begins: rollout, reward, logprobs (with advantages and whatever else an algorithm's `experience`
        computes), update, evaluation; after the iteration checkpoint or saving. It has `total` units of work."""
        ...

    def advance(self, amount: int = 1) -> None:
        """`amount` more units of the current phase are done; 0: a sign of life; negative: they are to be done again."""
        ...


@runtime_checkable
class Algorithm(Protocol):
    """An algorithm: what is learned from a rollout, and its losses. A subclass that keeps no state and makes every
    update writes `experience` and `losses`, and sets the three attributes."""

    max_redraws: int
    """Limit on replacements of groups that teach nothing, per iteration; 0 keeps them."""
    aggregation: Aggregation
    """Aggregation of token losses to one number: see `token_weights`."""
    max_response_tokens: int
    """Length limit of a response, and what aggregation by a constant divides by."""

    def experience(self, rollout: Rollout, scores: Scores) -> tuple[Experience, Metrics]:
        """The experience that the update learns from, and its metrics. Called without gradient."""
        ...

    def losses(self, batch: Any, weights: Float[Tensor, "B T"]) -> Iterator[tuple[str, Tensor, Metrics]]:
        """Yields ``(trained module, loss, metrics)`` one at a time: each is run backward before the next forward. Asked
        about rows again where memory ran out, so it changes nothing of its own."""
        ...

    def should_stop(self, update: Metrics) -> bool:
        """Whether the updates of this iteration end here."""
        return False

    def finish(self, experience: Any) -> Metrics:
        """Called without gradient after the updates on an experience: here controllers take their step. Returns its
        metrics."""
        return Metrics()

    def state_dict(self) -> dict[str, Any]:
        """State that the next iteration depends on: numbers, strings and tensors, nested by name."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes over what `state_dict` returned."""


@runtime_checkable
class Source(Protocol):
    """An endless stream of data that knows where it is."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


@runtime_checkable
class PromptSource(Source, Protocol):
    """Source of prompts."""

    def next(self, num_prompts: int) -> Prompts: ...


@runtime_checkable
class BatchSource(Source, Protocol):
    """Source of prompts with the responses to learn, or of preference pairs."""

    def next(self, num_rows: int, /) -> ReadBatch: ...


@runtime_checkable
class Objective(Protocol):
    """Loss that training on batches of one kind of data minimizes, and metrics of its evaluation."""

    def denominator(self, batch: Any) -> Int[Tensor, ""]:
        """Number of things that the loss of a batch averages over: its response tokens, or its pairs."""
        ...

    def outputs(self, batch: Any) -> Any:
        """Outputs of a forward pass on a batch."""
        ...

    def loss(self, outputs: Any, batch: Any, denominator: Int[Tensor, ""]) -> tuple[Tensor, Metrics]:
        """This microbatch's part of the loss of a batch with this denominator, and its metrics."""
        ...

    def evaluate(self, outputs: Any, batch: Any) -> dict[str, float]:
        """The metrics ``eval/...`` of held-out data. Called without gradient."""
        ...


@runtime_checkable
class Trainer(Protocol):
    """Iterations that a run drives: stopped between two, saved and continued."""

    iteration: int
    """Iterations done so far."""

    @property
    def holds_all(self) -> bool:
        """Whether this rank has the whole state by itself; if not, `state_dict` is collective."""
        ...

    def iterate(self) -> Metrics:
        """Runs the next iteration and returns its metrics."""
        ...

    @property
    def has_moved(self) -> bool:
        """Whether the current iteration has begun an optimizer step: there is no way back to its start."""
        ...

    def rewind(self) -> bool:
        """Returns to the start of the iteration after a failure. False if weights have moved: there is no way back."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Everything that the next iteration depends on: numbers, strings and tensors, nested by name."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...
