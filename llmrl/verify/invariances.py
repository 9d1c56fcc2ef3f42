"""What must not change a gradient: how a minibatch is split and dealt to ranks, its padding, the order of groups."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from llmrl.batches import pad_columns
from llmrl.user_code import UserCodeFailure
from llmrl.verify.estimators import Estimator
from llmrl.verify.faults import CONTENT, MICROBATCHES, ORDER, RANKS, WIDTH, Fault
from llmrl.verify.game import NUM_TOKENS, Draws, Game, Gradient, enumeration
from llmrl.verify.rows import Row

NUM_GROUPS = 24
PARTS = (5, 1, 10, 8)
"""Groups in each microbatch."""
TOLERANCE = 1e-6
"""Relative; weights are in float32."""


def broken_invariances(row: Row, game: Game) -> list[Fault]:
    """The invariances that an estimator does not have on a rollout of a few groups, as faults."""
    draws = _some(enumeration(game, row.group_size))
    whole = Estimator(row, game).expected(draws).flat
    checks: dict[Fault, Callable[[], Gradient]] = {
        WIDTH: lambda: Estimator(row, game).expected(_padded(draws)),
        CONTENT: lambda: Estimator(row, game, off_mask=torch.nan).expected(_padded(draws)),
        MICROBATCHES: lambda: _in_parts([Estimator(row, game)] * len(PARTS), draws, PARTS),
        RANKS: lambda: _in_parts([Estimator(row, game) for _ in range(2)], draws, (NUM_GROUPS // 2,) * 2),
        ORDER: lambda: Estimator(row, game).expected(_select(draws, torch.arange(NUM_GROUPS).roll(7).flip(0))),
    }
    broken = [fault for fault, gradient in checks.items() if not _is_close(gradient, whole)]
    return [fault for fault in broken if not (fault is RANKS and MICROBATCHES in broken)]


def _is_close(gradient: Callable[[], Gradient], whole: Tensor) -> bool:
    try:
        found = gradient().flat
    except UserCodeFailure:  # NaN in the loss is refused
        return False
    return bool((found - whole).abs().max() <= TOLERANCE * whole.abs().max())


def _in_parts(ranks: list[Estimator], draws: Draws, parts: tuple[int, ...]) -> Gradient:
    """The sum of the gradients of parts of a minibatch, each by its own rank, which has seen the whole rollout."""
    gradients: list[Gradient] = []
    experiences: dict[int, Any] = {}
    for rank, groups in zip(ranks, torch.arange(NUM_GROUPS).split(list(parts)), strict=True):
        if id(rank) not in experiences:
            experiences[id(rank)] = rank.experience(draws)
        experience = experiences[id(rank)]
        rows = _rows(groups, draws.unit_size)
        gradients.append(rank.gradient_of(experience.select(rows), rank.weights(experience, draws)[rows]))
    return sum(gradients[1:], start=gradients[0])


def _some(draws: Draws) -> Draws:
    """A few groups, of both prompts."""
    num_groups = len(draws.frequency) // draws.unit_size
    chosen = torch.randperm(num_groups, generator=torch.Generator().manual_seed(0))[:NUM_GROUPS].sort().values
    return _select(draws, chosen)


def _select(draws: Draws, groups: Int[Tensor, " N"]) -> Draws:
    rows = _rows(groups, draws.unit_size)
    return replace(
        draws,
        rollout=draws.rollout.select(rows),
        scores=draws.scores.select(rows),
        frequency=draws.frequency[rows],
    )


def _rows(groups: Int[Tensor, " N"], group_size: int) -> Int[Tensor, " B"]:
    return (groups[:, None] * group_size + torch.arange(group_size)).flatten()


def _padded(draws: Draws) -> Draws:
    """The same responses in two more columns, with other ids and NaN for the engine's log-probabilities there."""
    rollout, width = draws.rollout, draws.rollout.sequences.response_ids.shape[1] + 2
    mask = pad_columns(rollout.sequences.response_mask, width, left=False)
    ids = pad_columns(rollout.sequences.response_ids, width, left=False)
    sequences = replace(rollout.sequences, response_ids=torch.where(mask, ids, NUM_TOKENS - 1), response_mask=mask)
    logprobs = pad_columns(rollout.rollout_logprobs, width, left=False).masked_fill(~mask, torch.nan)
    per_token = pad_columns(draws.scores.per_token, width, left=False)
    return replace(
        draws,
        rollout=replace(rollout, sequences=sequences, rollout_logprobs=logprobs),
        scores=replace(draws.scores, per_token=per_token),
    )
