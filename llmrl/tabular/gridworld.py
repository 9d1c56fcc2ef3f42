"""Gridworlds: a map of text as a Markov decision process."""

import torch
from jaxtyping import Float64
from torch import Tensor

from llmrl.tabular.mdp import MDP

MOVES = ((-1, 0), (0, 1), (1, 0), (0, -1))
"""Row and column steps of the four actions: up, right, down, left."""
ARROWS = "↑→↓←"
WALKABLE = ".S"


def gridworld(
    text: str,
    *,
    gamma: float,
    step_reward: float = -1.0,
    goal_reward: float = 0.0,
    cliff_reward: float = -100.0,
    slip: float = 0.0,
) -> MDP:
    """A process of one state per cell of a map, in reading order, and four actions: up, right, down, left.

        S  start, with the same probability each        G  goal, terminal
        C  cliff: entering leads back to a start        #  wall: a move into it, or off the map, stays
        .  floor

    Args:
        text: Rows of equal length, one a line.
        gamma: Discount, in [0, 1].
        step_reward: Reward of a move to floor or start, or against a wall.
        goal_reward: Reward of the move that enters a goal.
        cliff_reward: Reward of the move that falls off a cliff.
        slip: Probability that the direction is drawn at random instead. The reward is then the mean over directions.

    Raises:
        ValueError: Rows differ in length, a letter is unknown, there is no start, or slip is no probability.

    Reference: Sutton and Barto 2018, example 3.5, and example 6.6 for the cliff.
    """
    rows = _read_rows(text)
    if not 0.0 <= slip <= 1.0:
        raise ValueError(f"slip ({slip}) must lie in [0, 1]")
    cells, width = "".join(rows), len(rows[0])
    start = torch.tensor([cell == "S" for cell in cells], dtype=torch.float64)
    start /= start.sum()
    prices = {"G": goal_reward, "C": cliff_reward}
    moves = torch.eye(len(cells), dtype=torch.float64)[:, None].repeat(1, len(MOVES), 1)
    rewards = torch.zeros(len(cells), len(MOVES), dtype=torch.float64)
    for state in (state for state, cell in enumerate(cells) if cell in WALKABLE):
        for action, move in enumerate(MOVES):
            target = _neighbour(rows, divmod(state, width), move)
            moves[state, action] = 0.0
            moves[state, action, target] = 1.0
            if cells[target] == "C":
                moves[state, action] = start
            rewards[state, action] = prices.get(cells[target], step_reward)
    return MDP(
        transitions=_slipping(moves, slip),
        rewards=_slipping(rewards, slip),
        terminal=torch.tensor([cell not in WALKABLE for cell in cells]),
        start=start,
        gamma=gamma,
    )


def draw_policy(text: str, policy: Float64[Tensor, "S A"]) -> str:
    """The map with an arrow for the likeliest action in each cell of floor or start."""
    rows = _read_rows(text)
    best, width = policy.argmax(dim=1).tolist(), len(rows[0])
    return "\n".join(
        "".join(ARROWS[best[r * width + c]] if cell in WALKABLE else cell for c, cell in enumerate(row))
        for r, row in enumerate(rows)
    )


def _read_rows(text: str) -> list[str]:
    rows = text.split()
    cells = "".join(rows)
    if unknown := sorted(set(cells) - set("SGC#.")):
        raise ValueError(f"map has the letter {unknown[0]!r}; each cell must be one of S G C # .")
    if len({len(row) for row in rows}) > 1 or "S" not in cells:
        raise ValueError(f"map of {len(rows)} rows must have rows of equal length, and an S")
    return rows


def _neighbour(rows: list[str], cell: tuple[int, int], move: tuple[int, int]) -> int:
    """Number of the cell that a move leads to, which stays where there is no way."""
    row, column = cell[0] + move[0], cell[1] + move[1]
    if not (0 <= row < len(rows) and 0 <= column < len(rows[0])) or rows[row][column] == "#":
        row, column = cell
    return row * len(rows[0]) + column


def _slipping(by_action: Tensor, slip: float) -> Tensor:
    """What an action leads to where it is replaced by one drawn at random with this probability."""
    return (1 - slip) * by_action + slip * by_action.mean(dim=1, keepdim=True)
