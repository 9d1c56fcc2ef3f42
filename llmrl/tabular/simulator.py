"""Samples of a process: single moves, and whole episodes, from one seeded generator."""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from llmrl.tabular.bellman import check_policy, check_stationary
from llmrl.tabular.mdp import MDP

BLOCK = 4096
"""Uniforms drawn at once: a call of torch for each would take most of the time."""


@dataclass(frozen=True)
class Move:
    """One step: r is what the action paid, `ended` says that the next state is terminal."""

    state: int
    action: int
    reward: float
    next_state: int
    ended: bool


class Simulator:
    """Draws from a process without a horizon, in plain Python numbers, which are fast for small tables.

    Raises:
        ValueError: The process has a horizon.
    """

    def __init__(self, mdp: MDP, generator: torch.Generator) -> None:
        check_stationary(mdp)
        self.mdp = mdp
        self.terminal: list[bool] = mdp.terminal.tolist()
        self._generator = generator
        self._uniforms: list[float] = []
        self._start = mdp.start.tolist()
        self._transitions = mdp.transitions.tolist()
        self._rewards = mdp.rewards_of_moves.tolist()

    def draw(self, probabilities: Sequence[float]) -> int:
        """An index with these probabilities, which need not sum to 1."""
        sums = list(accumulate(probabilities))
        if not self._uniforms:
            self._uniforms = torch.rand(BLOCK, generator=self._generator, dtype=torch.float64).tolist()
        return bisect_right(sums, self._uniforms.pop() * sums[-1])

    def start(self) -> int:
        """A first state."""
        return self.draw(self._start)

    def any_pair(self) -> tuple[int, int]:
        """A state that is not terminal and an action, each pair alike."""
        state = self.draw([0.0 if ended else 1.0 for ended in self.terminal])
        return state, self.draw([1.0] * self.mdp.num_actions)

    def move(self, state: int, action: int) -> Move:
        """One step from a state by an action."""
        target = self.draw(self._transitions[state][action])
        return Move(state, action, self._rewards[state][action][target], target, self.terminal[target])

    def episode(
        self, policy: Sequence[Sequence[float]], *, max_steps: int, pair: tuple[int, int] | None = None
    ) -> list[Move]:
        """The moves of an episode under a policy, until it ends or for `max_steps`.

        Args:
            policy: Probability of each action, by state.
            max_steps: Where a longer episode is truncated.
            pair: First state and action. None: drawn from the start and the policy.
        """
        state, action = pair if pair is not None else (self.start(), None)
        moves: list[Move] = []
        while len(moves) < max_steps and not self.terminal[state]:
            moves.append(self.move(state, self.draw(policy[state]) if action is None else action))
            state, action = moves[-1].next_state, None
        return moves


def sample_episodes(
    mdp: MDP, policy: Tensor, *, num_episodes: int, max_steps: int, generator: torch.Generator
) -> list[list[Move]]:
    """Episodes of a stationary policy.

    Raises:
        ValueError: The policy is no distribution or has another shape, or the process has a horizon.
    """
    simulator = Simulator(mdp, generator)
    table = check_policy(mdp, policy).tolist()
    return [simulator.episode(table, max_steps=max_steps) for _ in range(num_episodes)]


def discounted_sums(rewards: Sequence[float], gamma: float) -> list[float]:
    """Return from each step on: G_t = r_t + γ G_{t+1}.

    Reference: Sutton and Barto 2018, eq. 3.9.
    """
    sums = accumulate(reversed(rewards), lambda later, reward: reward + gamma * later)
    return list(sums)[::-1]
