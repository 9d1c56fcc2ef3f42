"""Batches that pass from stage to stage of an iteration: Prompts -> Rollout -> Scores -> Experience.

Every per-token tensor is ``(B, T)`` over the *response*: entry t belongs to response token t. Prompts are padded left,
responses right. Two prompts "ab" and "c"; two responses to the first, "x" (ended with EOS ``$``) and "yzw" (truncated
by the limit of 3), and "v" to the second, which no reward function could score:

    unique_prompt_ids  a b    prompt_of_row  0    response_ids  x $ .    response_mask  1 1 0    counted  1 1 0
                       . c                   0                  y z w                   1 1 1             1 1 1
                                             1                  v $ .                   1 1 0             0 0 0

    stop_reason        EOS LENGTH EOS    scores.total  1.0 0.0 nan
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from enum import IntEnum
from typing import Any, TypeVar

import torch
from jaxtyping import Bool, Float, Int, Int16
from torch import Tensor

Row = Mapping[str, Any]
B = TypeVar("B", bound="Batch")
S = TypeVar("S", bound="Sequences")


@dataclass(frozen=True, kw_only=True)
class Batch:
    """A batch of rows: the first axis of every tensor and every tuple is the row, unless its class says otherwise."""

    def select(self: B, index: Tensor) -> B:
        """The rows that an index tensor names, in its order."""
        return replace(self, **{f.name: _select(getattr(self, f.name), index) for f in fields(self)})

    def to(self: B, device: torch.device | str) -> B:
        """This batch with every tensor on another device."""
        return replace(self, **{f.name: _to(getattr(self, f.name), device) for f in fields(self)})

    @property
    def device(self) -> torch.device:
        """Device of its tensors."""
        return next(x.device for f in fields(self) if isinstance(x := getattr(self, f.name), Tensor | Batch))

    @classmethod
    def cat(cls: type[B], parts: Sequence[B]) -> B:
        """The rows of several batches as one, padded to the widest: prompts on the left, all else on the right."""
        return cls(**{f.name: _cat([getattr(part, f.name) for part in parts], f.name) for f in fields(cls)})


@dataclass(frozen=True, kw_only=True)
class PassTokens:
    """Numbers of tokens that a forward pass over some rows reads, padding left out."""

    own: Int[Tensor, " B"]
    """Tokens that each row adds."""
    prompt_of_row: Int[Tensor, " B"] | None = None
    of_prompt: Int[Tensor, " N"] | None = None
    """Tokens of each prompt, which its rows add once, together; None: a row's own tokens include its prompt."""
    num_contexts: Int[Tensor, " B"] | None = None
    """Contexts of each row, if they are padded to the longest, whose tokens `own` counts; None: one each."""


class NewContext(list[int]):
    """Ids with which a response goes on in a context of its own: no later token attends to what is before them."""


@dataclass(frozen=True, kw_only=True)
class Sequences(Batch):
    """Prompts and the responses to them, as token ids: the input of `Policy` and `ValueFunction`.

    A prompt is held once, however many of the rows respond to it.
    """

    unique_prompt_ids: Int[Tensor, "N P"]
    unique_prompt_mask: Bool[Tensor, "N P"]
    prompt_of_row: Int[Tensor, " B"]
    """Index of the prompt that each row responds to."""
    response_ids: Int[Tensor, "B T"]
    response_mask: Bool[Tensor, "B T"]
    """True on the tokens that the actor chose, its EOS included."""
    response_lengths: Int[Tensor, " B"]
    """Every attended response token, tool output included."""
    restarts: Bool[Tensor, "B T"] | None = None
    """True on the first token of each `NewContext`, which no token attends beyond; None: every row is one context."""

    @classmethod
    def from_rows(
        cls,
        *,
        prompt_ids: Int[Tensor, "B P"],
        prompt_mask: Bool[Tensor, "B P"],
        response_ids: Int[Tensor, "B T"],
        response_mask: Bool[Tensor, "B T"],
        response_lengths: Int[Tensor, " B"],
    ) -> "Sequences":
        """Sequences in which each row has a prompt of its own."""
        return cls(
            unique_prompt_ids=prompt_ids,
            unique_prompt_mask=prompt_mask,
            prompt_of_row=torch.arange(len(prompt_ids), device=prompt_ids.device),
            response_ids=response_ids,
            response_mask=response_mask,
            response_lengths=response_lengths,
        )

    @property
    def prompt_ids(self) -> Int[Tensor, "B P"]:
        """The prompt of each row."""
        return self.unique_prompt_ids[self.prompt_of_row]

    @property
    def prompt_mask(self) -> Bool[Tensor, "B P"]:
        """True on the tokens of the prompt of each row."""
        return self.unique_prompt_mask[self.prompt_of_row]

    @property
    def prompt_lengths(self) -> Int[Tensor, " B"]:
        """Number of prompt tokens of each row, padding left out."""
        return self.unique_prompt_mask.sum(dim=1)[self.prompt_of_row]

    @property
    def num_tokens(self) -> Int[Tensor, " B"]:
        """Number of prompt and response tokens of each row, padding left out."""
        return self.prompt_lengths + self.response_lengths

    def pass_tokens(self, *, packed: bool) -> PassTokens:
        """Tokens of each row in a forward pass, which reads a prompt once for all its rows if it is packed."""
        if not packed and self.restarts is not None:
            contexts = Contexts.of(self)
            num_contexts = contexts.row.bincount(minlength=len(self.response_lengths))
            tokens = contexts.sequences.num_tokens
            longest = torch.zeros_like(num_contexts).scatter_reduce(0, contexts.row, tokens, "amax")
            return PassTokens(own=longest, num_contexts=num_contexts)
        if not packed:
            return PassTokens(own=self.num_tokens)
        return PassTokens(
            own=self.response_lengths, prompt_of_row=self.prompt_of_row, of_prompt=self.unique_prompt_mask.sum(dim=1)
        )

    def select(self: S, index: Tensor) -> S:
        """The rows that an index tensor names, in its order.

        Prompts that none of them responds to are dropped; the others keep their order and their width.
        """
        used, prompt_of_row = _select(self.prompt_of_row, index).unique(return_inverse=True)
        return type(self)(
            unique_prompt_ids=self.unique_prompt_ids[used],
            unique_prompt_mask=self.unique_prompt_mask[used],
            prompt_of_row=prompt_of_row,
            response_ids=_select(self.response_ids, index),
            response_mask=_select(self.response_mask, index),
            response_lengths=_select(self.response_lengths, index),
            restarts=_select(self.restarts, index),
        )

    @classmethod
    def cat(cls: type[S], parts: Sequence[S]) -> S:  # type: ignore[override]
        """The rows of several batches as one; a prompt that two of them hold is held twice."""
        num_prompts, renumbered = 0, []
        any_restarts = any(part.restarts is not None for part in parts)
        for part in parts:
            restarts = torch.zeros_like(part.response_mask) if part.restarts is None else part.restarts
            renumbered.append(
                replace(
                    part,
                    prompt_of_row=part.prompt_of_row + num_prompts,
                    restarts=restarts if any_restarts else None,
                )
            )
            num_prompts += len(part.unique_prompt_ids)
        return super().cat(renumbered)


@dataclass(frozen=True, kw_only=True)
class Contexts:
    """The contexts of some sequences, as sequences without restarts: what a forward pass reads. Row by row, in order.

    The response "a b" to the prompt "p", then a new context "q r" and the response "c" to it:

        response_ids  a b q r c      contexts  prompt p, response a b
        restarts      0 0 1 0 0                prompt q, response r c
    """

    sequences: Sequences
    row: Int[Tensor, " S"]
    """The row that each context is part of."""
    first: Int[Tensor, " S"]
    """Column in the row of its first response token."""
    of_token: Int[Tensor, "B T"]
    """The context that each response token is in."""

    @classmethod
    def of(cls, sequences: Sequences) -> "Contexts":
        """`sequences` has `restarts`."""
        restarts, lengths = sequences.restarts, sequences.response_lengths
        assert restarts is not None, "there are several contexts"
        begins = restarts.clone()
        begins[:, 0] = True
        row, start = begins.nonzero(as_tuple=True)
        is_new = start > 0
        goes_on = torch.cat([row[1:] == row[:-1], row.new_zeros(len(row) and 1, dtype=torch.bool)])
        end = torch.where(goes_on, start.roll(-1), lengths[row])
        first = start + is_new.long()  # the first token of a new context is its prompt: a pass needs one
        width = int((end - first).max()) if len(row) else 0
        columns = first[:, None] + torch.arange(width, device=row.device)
        attended = columns < end[:, None]
        columns = columns.clamp(max=restarts.shape[1] - 1)
        new_prompts = sequences.response_ids[row[is_new], start[is_new]][:, None]
        width_of_prompts = sequences.unique_prompt_ids.shape[1]
        prompt_of_row = sequences.prompt_of_row[row]
        prompt_of_row[is_new] = len(sequences.unique_prompt_ids) + torch.arange(len(new_prompts), device=row.device)
        return cls(
            sequences=Sequences(
                unique_prompt_ids=torch.cat(
                    [sequences.unique_prompt_ids, pad_columns(new_prompts, width_of_prompts, left=True)]
                ),
                unique_prompt_mask=torch.cat(
                    [
                        sequences.unique_prompt_mask,
                        pad_columns(torch.ones_like(new_prompts, dtype=torch.bool), width_of_prompts, left=True),
                    ]
                ),
                prompt_of_row=prompt_of_row,
                response_ids=sequences.response_ids[row[:, None], columns].where(attended, 0),
                response_mask=sequences.response_mask[row[:, None], columns] & attended,
                response_lengths=end - first,
            ),
            row=row,
            first=first,
            of_token=begins.flatten().cumsum(0).view_as(begins) - 1,
        )

    @property
    def last(self) -> Int[Tensor, " B"]:
        """The last context of each row."""
        return self.of_token[:, -1]

    def find(self, row: Int[Tensor, " M"], token: Int[Tensor, " M"]) -> tuple[Int[Tensor, " M"], Int[Tensor, " M"]]:
        """The context of each of some response tokens, none of which begins one, and its column there."""
        context = self.of_token[row, token]
        return context, token - self.first[context]


@dataclass(frozen=True, kw_only=True)
class TokenOutputs(Batch):
    """Outputs of a forward pass over `Sequences`, by name: (B, T, ...) or (B, ...), float32 except `routes`. Per-token
    outputs are 0 off the response mask. An output that the module does not have is absent; reading it raises
    KeyError."""

    named: Mapping[str, Tensor]
    """Every output, those without a property of their own too."""

    @property
    def logprobs(self) -> Float[Tensor, "B T"]:
        """Log-probabilities of the response tokens at the sampling temperature, nats."""
        return self.named["logprobs"]

    @property
    def entropy(self) -> Float[Tensor, "B T"]:
        """Entropy of the distribution that each response token was drawn from, nats."""
        return self.named["entropy"]

    @property
    def values(self) -> Float[Tensor, "B T"]:
        """Values of the critic before each response token is chosen."""
        return self.named["values"]

    @property
    def last_values(self) -> Float[Tensor, " B"]:
        """Value of the critic after the last token of each response."""
        return self.named["last_values"]

    def merge(self, other: "TokenOutputs") -> "TokenOutputs":
        """These outputs and those of another module on the same sequences."""
        return TokenOutputs(named={**self.named, **other.named})


@dataclass(frozen=True, kw_only=True)
class PreferencePairs(Batch):
    """Two responses to each prompt, one of which was preferred. Both sides hold the same prompts."""

    chosen: Sequences
    rejected: Sequences
    margin: Float[Tensor, " B"]
    """How much better the chosen response is known to be; 0 where the data does not say."""

    @property
    def num_tokens(self) -> Int[Tensor, " B"]:
        """Number of tokens in both sequences of each pair, the prompt in each."""
        return self.chosen.num_tokens + self.rejected.num_tokens

    def pass_tokens(self, *, packed: bool) -> PassTokens:
        """Tokens of each pair in a forward pass: with its prompt once if it is packed, otherwise twice the longer
        side's."""
        if not packed:
            return PassTokens(own=2 * torch.maximum(self.chosen.num_tokens, self.rejected.num_tokens))
        chosen = self.chosen.pass_tokens(packed=True)
        return replace(chosen, own=self.chosen.response_lengths + self.rejected.response_lengths)

    @property
    def sequences(self) -> Sequences:
        """Both sides of each pair as two rows, chosen and rejected in turn, that respond to one prompt."""
        sides = self.chosen, self.rejected
        width = max(side.response_ids.shape[1] for side in sides)
        ids, mask = (
            torch.stack([pad_columns(getattr(side, name), width, left=False) for side in sides], dim=1).flatten(0, 1)
            for name in ("response_ids", "response_mask")
        )
        return Sequences(
            unique_prompt_ids=self.chosen.unique_prompt_ids,
            unique_prompt_mask=self.chosen.unique_prompt_mask,
            prompt_of_row=self.chosen.prompt_of_row.repeat_interleave(2),
            response_ids=ids,
            response_mask=mask,
            response_lengths=torch.stack([side.response_lengths for side in sides], dim=1).flatten(),
        )


@dataclass(frozen=True, kw_only=True)
class ScoredResponses(Batch):
    """Responses and the score that each of them got."""

    sequences: Sequences
    scores: Float[Tensor, " B"]

    @property
    def num_tokens(self) -> Int[Tensor, " B"]:
        """Number of prompt and response tokens of each row, padding left out."""
        return self.sequences.num_tokens

    def pass_tokens(self, *, packed: bool) -> PassTokens:
        """See `Sequences.pass_tokens`."""
        return self.sequences.pass_tokens(packed=packed)


ReadBatch = Sequences | PreferencePairs | ScoredResponses
"""Batches that a forward pass reads."""


@dataclass(frozen=True, kw_only=True)
class Prompts(Batch):
    """Tokenized prompts, and the data rows that they came from."""

    ids: Int[Tensor, "N P"]
    mask: Bool[Tensor, "N P"]
    rows: tuple[Row, ...]
    """The data row of each prompt, unchanged, for rewards and samples."""


class StopReason(IntEnum):
    """Why a response ended, or a turn of it."""

    NONE = 0
    """It is still being decoded. Never in a `Rollout`."""
    EOS = 1
    """The actor chose an end-of-sequence token."""
    LENGTH = 2
    """A length limit truncated it."""
    TURNS = 3
    """The limit on turns truncated it."""
    FAILED = 4
    """Its environment failed, or one of its tools."""


@dataclass(frozen=True, kw_only=True)
class Episodes(Batch):
    """What environments answered to responses of several turns. Turn k of an episode that has fewer is all zeros.

    A response "a b $" to which "1 2" was fed, and then "c $":

        response_ids  a b $ 1 2 c $    response_mask  1 1 1 0 0 1 1    turn_ends  3 7    turn_rewards  -0.5 1.0
    """

    turn_ends: Int[Tensor, "B K"]
    """Number of response tokens up to the end of each turn of the actor: its last token has the index turn_ends - 1."""
    turn_rewards: Float[Tensor, "B K"]
    """Reward of each turn."""
    end_reward: Float[Tensor, " B"]
    """Reward of the episode as a whole."""
    num_calls: Int[Tensor, " B"]
    """Calls of tools."""
    num_bad_calls: Int[Tensor, " B"]
    """Calls that were answered with an error."""
    failures: tuple[str | None, ...]
    """Name of what failed: a method of the environment, or a tool; None where nothing did."""
    reasons: tuple[str | None, ...]
    """How it failed, in words."""
    openings: tuple[Any, ...]
    """What each actor read first: a text, or messages."""
    messages: tuple[tuple[Row, ...], ...]
    """The conversation after that: messages of the actor, of the environment and of tools."""

    @property
    def num_turns(self) -> Int[Tensor, " B"]:
        """Turns of the actor in each episode."""
        return (self.turn_ends > 0).sum(dim=1)

    @property
    def failed(self) -> Bool[Tensor, " B"]:
        """True where an environment or a tool failed, so that the response cannot be scored."""
        return torch.tensor([name is not None for name in self.failures], device=self.turn_ends.device)

    def failure(self, row: int) -> str | None:
        """What failed in an episode and how, such as ``respond raised KeyError: 'x'``; None where nothing did."""
        return None if self.failures[row] is None else f"{self.failures[row]} {self.reasons[row]}"

    def total_failure(self) -> str | None:
        """Sentence on the first failure, where every episode failed; else None."""
        return f"every episode failed: {self.failure(0)}" if all(self.failures) else None


@dataclass(frozen=True, kw_only=True)
class Rollout(Batch):
    """Responses that the engine sampled."""

    sequences: Sequences
    rollout_logprobs: Float[Tensor, "B T"]
    """Log-probabilities that the engine reports, nats, at the sampling temperature; 0 outside the mask."""
    stop_reason: Int[Tensor, " B"]
    """Why each response ended, a `StopReason`."""
    group_ids: Int[Tensor, " B"]
    """Number of the group of each response: unique per draw of a prompt, never used twice in a run."""
    rows: tuple[Row, ...]
    episodes: Episodes | None = None
    """What environments answered; None where each response is one turn."""
    routes: Int16[Tensor, "B T L"] | None = None
    """Which experts each layer of a mixture chose as the engine predicted each token, see `routing`; 0 outside the
    mask. None where the engine did not record it."""

    @property
    def num_chosen(self) -> Int[Tensor, " B"]:
        """Number of tokens of each response that the actor chose."""
        return self.sequences.response_mask.sum(dim=1)

    @property
    def last_turn_starts(self) -> Int[Tensor, " B"]:
        """Index of the first token of each response's last turn."""
        if self.episodes is None:
            return torch.zeros_like(self.stop_reason)
        mask = self.sequences.response_mask
        before = torch.arange(mask.shape[1], device=mask.device) < self.sequences.response_lengths[:, None]
        fed = torch.where(~mask & before, torch.arange(1, mask.shape[1] + 1, device=mask.device), 0)
        ends = self.episodes.turn_ends
        is_earlier = (ends > 0) & (ends < self.sequences.response_lengths[:, None])
        return torch.maximum(fed.amax(dim=1), torch.where(is_earlier, ends, 0).amax(dim=1))

    @property
    def turn_of_token(self) -> Int[Tensor, "B T"]:
        """Number of the turn, from 0, that each token which the actor chose is of; that of the next one elsewhere."""
        columns = torch.arange(self.sequences.response_ids.shape[1], device=self.device)
        if self.episodes is None:
            return torch.zeros_like(self.sequences.response_ids)
        ends = self.episodes.turn_ends[:, None]
        return ((ends > 0) & (ends <= columns[:, None])).sum(dim=2)

    @property
    def finished(self) -> Bool[Tensor, " B"]:
        """True where a response ended by itself, False where a limit truncated it or its environment failed."""
        return self.stop_reason == StopReason.EOS


@dataclass(frozen=True, kw_only=True)
class Scores(Batch):
    """Scores of responses by reward functions and reward models. NaN in `total` means "could not be scored"."""

    total: Float[Tensor, " B"]
    per_token: Float[Tensor, "B T"]
    """Scores of single tokens; 0 where a reward gives none."""
    parts: Mapping[str, Float[Tensor, " B"]]
    failed: Mapping[str, Bool[Tensor, " B"]] = field(default_factory=dict)
    """Where the function of a part failed, for parts whose settings exclude such responses."""

    @property
    def per_response(self) -> Float[Tensor, " B"]:
        """Score of each response and its tokens together: `total` plus the sum of `per_token`."""
        return self.total + self.per_token.sum(dim=1)

    def only_finite(self) -> "Scores":
        """These scores, where a response whose sum of scores is infinite or overflows counts as unscored."""
        return replace(self, total=self.total.where(self.per_response.isfinite(), torch.nan))


@dataclass(frozen=True, kw_only=True)
class Experience(Batch):
    """Input of an update: a rollout with scores, old log-probabilities and advantages. Frozen for the iteration."""

    rollout: Rollout
    scores: Scores
    old_logprobs: Float[Tensor, "B T"] | None
    """By the trainer's own pass, before the first update; the engine's are `rollout.rollout_logprobs`. None where a
    single optimizer step learns from the rollout, whose own log-probabilities, detached, are the old ones."""
    advantages: Float[Tensor, "B T"]

    @property
    def sequences(self) -> Sequences:
        return self.rollout.sequences

    @property
    def counted(self) -> Bool[Tensor, "B T"]:
        """True on the tokens that baselines, losses and metrics count; see `counted_tokens`."""
        return counted_tokens(self.rollout, self.scores)


@dataclass(frozen=True, kw_only=True)
class FilteredExperience(Experience):
    """Experience in which scored responses may be left out of the losses."""

    learned: Bool[Tensor, " B"]
    """False for a response that the losses leave out, whatever its score: see `learned_responses`."""

    @property
    def counted(self) -> Bool[Tensor, "B T"]:
        """True on the tokens that losses and metrics count: those of learned responses that could be scored."""
        return super().counted & self.learned[:, None]


@dataclass(frozen=True, kw_only=True)
class GRPOExperience(FilteredExperience):
    """Experience with log-probabilities of the reference, for the KL in the loss; zeros where there is no reference."""

    ref_logprobs: Float[Tensor, "B T"]


@dataclass(frozen=True, kw_only=True)
class PPOExperience(FilteredExperience):
    """Experience with the critic's values at collection and their targets, the returns. Advantages are standardized,
    returns are not."""

    old_values: Float[Tensor, "B T"]
    returns: Float[Tensor, "B T"]


@dataclass(frozen=True, kw_only=True)
class AuxiliaryExperience(Batch):
    """What an auxiliary phase learns from: experience of several iterations, and of it only what the phase reads."""

    sequences: Sequences
    counted: Bool[Tensor, "B T"]
    """True on the tokens that the losses count."""
    returns: Float[Tensor, "B T"]
    """Targets of the values, of the iteration that sampled the row."""
    rollout_logprobs: Float[Tensor, "B T"]
    """Log-probabilities of the policy that sampled the row, as the engine reported them."""
    old_logprobs: Float[Tensor, "B T"] | None
    """Log-probabilities of the actor as the phase begins; None until then."""


@dataclass(frozen=True, kw_only=True)
class MTPExperience(PPOExperience):
    """Experience with a target for the value of every head of multi-token prediction."""

    value_targets: Mapping[str, Float[Tensor, "B T"]]
    """Targets by the names that the values have in `TokenOutputs`."""


def counted_tokens(rollout: Rollout, scores: Scores) -> Bool[Tensor, "B T"]:
    """The response mask, all False for a response that could not be scored."""
    return rollout.sequences.response_mask & ~scores.total.isnan()[:, None]


def _select(value: Any, index: Tensor) -> Any:
    match value:
        case Tensor():
            return value[index.to(value.device)]
        case Batch():
            return value.select(index)
        case tuple():
            return tuple(value[i] for i in index.tolist())
        case Mapping():
            return {name: _select(part, index) for name, part in value.items()}
        case None:
            return None
    raise TypeError(f"a batch holds tensors, tuples, mappings and batches, not {type(value).__name__}")


def _to(value: Any, device: torch.device | str) -> Any:
    match value:
        case Tensor() | Batch():
            return value.to(device)
        case Mapping():
            return {name: _to(part, device) for name, part in value.items()}
    return value


def _cat(values: list[Any], name: str) -> Any:
    if any(value is None for value in values):  # a checkpoint may hold rollouts of before routes were recorded
        return None
    match values[0]:
        case Tensor() if values[0].dim() == 1:
            return torch.cat(values)
        case Tensor():
            width = max(value.shape[1] for value in values)
            left = name in ("ids", "mask", "unique_prompt_ids", "unique_prompt_mask")
            return torch.cat([pad_columns(value, width, left=left) for value in values])
        case Batch():
            return type(values[0]).cat(values)
        case tuple():
            return tuple(row for value in values for row in value)
        case Mapping():
            return {key: _cat([value[key] for value in values], key) for key in values[0]}
    raise TypeError(f"a batch holds tensors, tuples, mappings and batches, not {type(values[0]).__name__}")


def pad_columns(x: Tensor, width: int, *, left: bool) -> Tensor:
    """``(B, C, ...)`` widened to ``(B, width, ...)`` with zeros."""
    padding = x.new_zeros(x.shape[0], width - x.shape[1], *x.shape[2:])
    return torch.cat([padding, x] if left else [x, padding], dim=1)


def fingerprint(rows: Sequence[Row]) -> str:
    """SHA-256 of rows, content and order. A value that JSON cannot hold counts by its type only."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json.dumps(row, skipkeys=True, default=lambda value: type(value).__name__).encode())
        digest.update(b"\n")
    return digest.hexdigest()
