"""Deep Q-learning on the tables: replay, target network, Huber loss; double, dueling and prioritized variants."""

import copy
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float64, Int
from torch import Tensor, nn
from torch.nn.functional import huber_loss

from llmrl.tabular.bellman import check_policy
from llmrl.tabular.mdp import MDP
from llmrl.tabular.simulator import Simulator

PRIORITY_FLOOR = 1e-3
"""Added to a TD error, so that no move is never drawn again."""


class LinearQ(nn.Module):
    """Action values linear in features of the state, from 0: q(s, a) = φ(s)·w_a. Identity features: a table."""

    def __init__(self, features: Float64[Tensor, "S K"], num_actions: int) -> None:
        super().__init__()
        self.features = features
        self.weight = nn.Parameter(features.new_zeros(features.shape[1], num_actions))

    def forward(self, states: Int[Tensor, " M"]) -> Float64[Tensor, "M A"]:
        return self.features[states] @ self.weight


class DuelingQ(nn.Module):
    """A state value and advantages around their mean: q(s, a) = v(s) + u(s, a) - mean_a' u(s, a').

    Every action tried teaches the value that all actions share.

    Reference: Wang et al. 2016, arXiv:1511.06581, eq. 9.
    """

    def __init__(self, features: Float64[Tensor, "S K"], num_actions: int) -> None:
        super().__init__()
        self.value, self.advantage = LinearQ(features, 1), LinearQ(features, num_actions)

    def forward(self, states: Int[Tensor, " M"]) -> Float64[Tensor, "M A"]:
        advantages = self.advantage(states)
        return self.value(states) + advantages - advantages.mean(dim=1, keepdim=True)


@dataclass(frozen=True)
class Replay:
    """Stored moves, in any order: what each one of M began with, did, got, and led to."""

    states: Int[Tensor, " M"]
    actions: Int[Tensor, " M"]
    rewards: Float64[Tensor, " M"]
    next_states: Int[Tensor, " M"]
    ended: Bool[Tensor, " M"]

    def __getitem__(self, rows: Int[Tensor, " N"]) -> "Replay":
        return Replay(*(getattr(self, name)[rows] for name in self.__dataclass_fields__))


def collect_replay(mdp: MDP, policy: Tensor, *, num_moves: int, max_steps: int, generator: torch.Generator) -> Replay:
    """The moves of a policy that acts, from episodes of at most `max_steps`."""
    simulator = Simulator(mdp, generator)
    table = check_policy(mdp, policy).tolist()
    moves = []
    while len(moves) < num_moves:
        moves += simulator.episode(table, max_steps=max_steps)
    moves = moves[:num_moves]
    return Replay(
        states=torch.tensor([move.state for move in moves]),
        actions=torch.tensor([move.action for move in moves]),
        rewards=torch.tensor([move.reward for move in moves], dtype=torch.float64),
        next_states=torch.tensor([move.next_state for move in moves]),
        ended=torch.tensor([move.ended for move in moves]),
    )


def bellman_targets(
    network: nn.Module, target: nn.Module, moves: Replay, *, gamma: float, double: bool
) -> Float64[Tensor, " M"]:
    """y = r + γ q_target(s', a*), and y = r where the move ended the episode; without a gradient.

    Args:
        network: What is learned.
        target: What values the next state: an older copy of it, or itself.
        moves: Moves to learn from.
        gamma: Discount.
        double: a* is the best action of `network`; else of `target`, whose errors are then maximized.

    Reference: Mnih et al. 2015, "Human-level control through deep reinforcement learning"; van Hasselt et al. 2016,
    arXiv:1509.06461, eq. 4.
    """
    with torch.no_grad():
        values = target(moves.next_states)
        best = (network(moves.next_states) if double else values).argmax(dim=1, keepdim=True)
        return moves.rewards + gamma * torch.where(moves.ended, 0.0, values.gather(1, best).squeeze(1))


def deep_q_learning(
    network: nn.Module,
    replay: Replay,
    *,
    gamma: float,
    num_steps: int,
    batch_size: int,
    learning_rate: float,
    generator: torch.Generator,
    target_every: int | None,
    double: bool = False,
    priority: float = 0.0,
) -> list[float]:
    """Trains a network of action values on stored moves, and returns the loss of each step.

        loss = mean of w_i Huber(q(s_i, a_i) - y_i),    P(i) ∝ (|δ_i| + 1e-3)^priority,    w_i = 1 / (M P(i))

    The weights undo the priorities, which then change the variance of the gradient and not its mean.

    Args:
        network: From states (M,) to action values (M, A), such as `LinearQ`; trained in place by plain gradient steps.
        replay: What is learned from; nothing is added to it.
        gamma: Discount.
        num_steps: Gradient steps.
        batch_size: Moves of a step, drawn with replacement.
        learning_rate: Length of a step, times the gradient.
        generator: Where every draw comes from.
        target_every: Steps between two copies to the target network. None: no target network, and the targets move
            with every step.
        double: See `bellman_targets`.
        priority: 0 draws uniformly; 1 in proportion to the last TD error.

    Reference: Mnih et al. 2015; Schaul et al. 2016, arXiv:1511.05952, section 3.3, with β = 1.
    """
    optimizer = torch.optim.SGD(network.parameters(), lr=learning_rate)
    target = network
    priorities, losses = torch.ones_like(replay.rewards), []
    for step in range(num_steps):
        if target_every is not None and step % target_every == 0:
            target = copy.deepcopy(network)
        probabilities = priorities / priorities.sum()
        rows = torch.multinomial(probabilities, batch_size, replacement=True, generator=generator)
        moves = replay[rows]
        wanted = bellman_targets(network, target, moves, gamma=gamma, double=double)
        chosen = network(moves.states).gather(1, moves.actions[:, None]).squeeze(1)
        weights = 1 / (len(priorities) * probabilities[rows])
        loss = (weights * huber_loss(chosen, wanted, reduction="none")).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        priorities[rows] = ((chosen - wanted).detach().abs() + PRIORITY_FLOOR) ** priority
        losses.append(loss.item())
    return losses
