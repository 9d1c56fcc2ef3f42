"""Markov decision processes as tables: transitions, rewards, discount, start, terminal states, horizon."""

from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float64
from torch import Tensor

from llmrl.functional.masking import check_shapes

ROUNDING = 1e-9
"""How far a sum of probabilities may be from 1."""


@dataclass(frozen=True, kw_only=True)
class MDP:
    """Markov decision process of S states and A actions, in float64.

    A terminal state is left by no action and pays nothing, so its value is 0 and nothing is bootstrapped from it. A
    horizon H ends every episode after H actions; values then depend on the step (see `llmrl.tabular.bellman`).

    Raises:
        ValueError: Shapes or dtypes differ from those below, a probability or a discount is none, a terminal state can
            be left or pays.

    Reference: Sutton and Barto 2018, section 3.1; for terminal states section 3.4.
    """

    transitions: Float64[Tensor, "S A S"]
    """Probability of each next state."""
    rewards: Float64[Tensor, "S A S"] | Float64[Tensor, "S A"]
    """Reward of a move to a state, or of an action wherever it leads."""
    terminal: Bool[Tensor, " S"]
    """True where an episode has ended."""
    start: Float64[Tensor, " S"]
    """Distribution of the first state."""
    gamma: float
    """Discount, in [0, 1]."""
    horizon: int | None = None
    """Actions of an episode, at most; None: no limit."""

    def __post_init__(self) -> None:
        check_shapes(
            transitions=(self.transitions, "S A S"),
            rewards=(self.rewards, "S A S" if self.rewards.ndim == 3 else "S A"),
            terminal=(self.terminal, "S"),
            start=(self.start, "S"),
        )
        for name, rows in (("transitions", self.transitions), ("start", self.start)):
            check_distribution(name, rows)
        if self.rewards.dtype != torch.float64 or not bool(self.rewards.isfinite().all()):
            raise ValueError("rewards must be finite numbers in float64")
        if not 0.0 <= self.gamma <= 1.0:
            raise ValueError(f"gamma ({self.gamma}) must lie in [0, 1]")
        if self.horizon is not None and self.horizon < 1:
            raise ValueError(f"horizon ({self.horizon}) must be at least 1, or None for no limit")
        for state in self.terminal.nonzero().flatten().tolist():
            if bool((self.transitions[state, :, state] < 1.0).any()) or bool((self.expected_rewards[state] != 0).any()):
                raise ValueError(
                    f"terminal state {state} can be left or pays: each of its actions must lead back to it with "
                    "probability 1 and reward 0; give what it pays to the move that enters it"
                )

    @property
    def num_states(self) -> int:
        return self.transitions.shape[0]

    @property
    def num_actions(self) -> int:
        return self.transitions.shape[1]

    @property
    def rewards_of_moves(self) -> Float64[Tensor, "S A S"]:
        """Reward of each move from a state by an action to a state."""
        return self.rewards if self.rewards.ndim == 3 else self.rewards[:, :, None].expand_as(self.transitions)

    @property
    def expected_rewards(self) -> Float64[Tensor, "S A"]:
        """r(s, a) = Σ_s' p(s' | s, a) r(s, a, s')."""
        return (self.transitions * self.rewards).sum(dim=2) if self.rewards.ndim == 3 else self.rewards

    def uniform_policy(self) -> Float64[Tensor, "S A"]:
        """Every action alike, in every state."""
        return torch.full((self.num_states, self.num_actions), 1.0 / self.num_actions, dtype=torch.float64)

    def unrolled(self) -> "MDP":
        """The same process without a horizon: its states are (step, state), number step * S + state.

        A last layer of S states, which the H-th action leads to, is terminal. Methods for stationary values then solve
        finite horizons too.

        Raises:
            ValueError: The process has no horizon.
        """
        if self.horizon is None:
            raise ValueError("horizon (None) must be a number of actions; a process without a horizon is stationary")
        layers, size = self.horizon + 1, self.num_states
        transitions = torch.zeros(layers, size, self.num_actions, layers, size, dtype=torch.float64)
        rewards = torch.zeros_like(transitions)
        for step in range(self.horizon):
            transitions[step, :, :, step + 1] = self.transitions
            rewards[step, :, :, step + 1] = self.rewards_of_moves
        terminal = self.terminal.repeat(layers)
        terminal[-size:] = True
        transitions, rewards = (x.reshape(layers * size, -1, layers * size).clone() for x in (transitions, rewards))
        ended = terminal.nonzero().flatten()
        transitions[ended], rewards[ended] = 0.0, 0.0
        transitions[ended, :, ended] = 1.0
        start = torch.cat([self.start, self.start.new_zeros(self.horizon * size)])
        return replace(self, transitions=transitions, rewards=rewards, terminal=terminal, start=start, horizon=None)


def check_distribution(name: str, rows: Tensor) -> None:
    """Raises ValueError unless every row over the last axis is a distribution, in float64."""
    fits = (rows >= 0).all(dim=-1) & ((rows.sum(dim=-1) - 1).abs() <= ROUNDING)
    if rows.dtype != torch.float64 or not bool(fits.all()):
        wrong = (~fits).nonzero().tolist()[:1]
        raise ValueError(
            f"{name} must hold probabilities in float64 that sum to 1 over the last axis; dtype {rows.dtype}"
            + (f", first wrong row at {wrong[0]}" if wrong else "")
        )
