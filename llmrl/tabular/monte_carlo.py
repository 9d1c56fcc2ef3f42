"""Monte Carlo control: action values as means of sampled returns, and the policy that is greedy in them."""

import torch
from jaxtyping import Float64
from torch import Tensor

from llmrl.tabular.bellman import greedy
from llmrl.tabular.mdp import MDP
from llmrl.tabular.simulator import Simulator, discounted_sums

Table = list[list[float]]
"""One row per state, one entry per action."""


def epsilon_greedy(row: list[float], epsilon: float) -> list[float]:
    """Probability of each action: 1 - ε on the best one, the first of equal ones, and ε spread over all alike.

    Reference: Sutton and Barto 2018, section 5.4.
    """
    spread = epsilon / len(row)
    best = row.index(max(row))
    return [spread + (1 - epsilon) * (action == best) for action in range(len(row))]


def basic_monte_carlo(
    mdp: MDP, *, num_iterations: int, episodes_per_pair: int, max_steps: int, generator: torch.Generator
) -> Float64[Tensor, "S A"]:
    """Policy iteration whose evaluation is a mean of returns from every state and action.

        q(s, a) <- mean return of episodes that begin with (s, a) and follow the greedy policy

    Args:
        mdp: The process, without a horizon.
        num_iterations: Improvements of the policy.
        episodes_per_pair: Episodes from each pair in an iteration.
        max_steps: Where an episode is truncated; what follows is missing from its return.
        generator: Where every draw comes from.

    Reference: Zhao 2025, "Mathematical foundations of reinforcement learning", algorithm 5.1.
    """
    simulator = Simulator(mdp, generator)
    action_values = torch.zeros_like(mdp.expected_rewards)
    for _ in range(num_iterations):
        policy = greedy(action_values).tolist()
        for state in (~mdp.terminal).nonzero().flatten().tolist():
            for action in range(mdp.num_actions):
                total = 0.0
                for _ in range(episodes_per_pair):
                    moves = simulator.episode(policy, max_steps=max_steps, pair=(state, action))
                    total += discounted_sums([move.reward for move in moves], mdp.gamma)[0]
                action_values[state, action] = total / episodes_per_pair
    return action_values


def exploring_starts(
    mdp: MDP, *, num_episodes: int, max_steps: int, generator: torch.Generator
) -> Float64[Tensor, "S A"]:
    """Action values from episodes that begin with any state and action, and are greedy afterwards.

    Reference: Sutton and Barto 2018, section 5.3.
    """
    return _control(mdp, 0.0, num_episodes, max_steps, generator, explores_at_start=True)


def on_policy_control(
    mdp: MDP, *, epsilon: float, num_episodes: int, max_steps: int, generator: torch.Generator
) -> Float64[Tensor, "S A"]:
    """Action values of the best ε-greedy policy, from its own episodes. With ε = 0 nothing is explored.

    Reference: Sutton and Barto 2018, section 5.4.
    """
    return _control(mdp, epsilon, num_episodes, max_steps, generator, explores_at_start=False)


def _control(
    mdp: MDP, epsilon: float, num_episodes: int, max_steps: int, generator: torch.Generator, *, explores_at_start: bool
) -> Float64[Tensor, "S A"]:
    """Every visit is one observation of its pair, and returns of early policies fade: the k-th moves by 2 / (k + 1)."""
    simulator = Simulator(mdp, generator)
    table: Table = torch.zeros_like(mdp.expected_rewards).tolist()
    counts: Table = torch.zeros_like(mdp.expected_rewards).tolist()
    policy = [epsilon_greedy(row, epsilon) for row in table]
    for _ in range(num_episodes):
        pair = simulator.any_pair() if explores_at_start else None
        moves = simulator.episode(policy, max_steps=max_steps, pair=pair)
        returns = discounted_sums([move.reward for move in moves], mdp.gamma)
        for move, total in zip(moves, returns, strict=True):
            counts[move.state][move.action] += 1
            row = table[move.state]
            row[move.action] += 2 / (counts[move.state][move.action] + 1) * (total - row[move.action])
            policy[move.state] = epsilon_greedy(row, epsilon)
    return torch.tensor(table, dtype=torch.float64)
