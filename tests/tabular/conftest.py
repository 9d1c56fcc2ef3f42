"""Small processes that several tests solve."""

import pytest
import torch

from llmrl.tabular import MDP, gridworld


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)


@pytest.fixture
def walk():
    """Random walk of Sutton and Barto, example 6.2: five states between two ends, of which the right one pays 1."""
    transitions = torch.eye(7, dtype=torch.float64)[:, None].repeat(1, 2, 1)
    rewards = torch.zeros(7, 2, 7, dtype=torch.float64)
    for state in range(1, 6):
        for action, step in enumerate((-1, 1)):
            transitions[state, action] = 0.0
            transitions[state, action, state + step] = 1.0
    rewards[5, 1, 6] = 1.0
    terminal = torch.tensor([True] + [False] * 5 + [True])
    start = torch.tensor([0, 0, 0, 1, 0, 0, 0], dtype=torch.float64)
    return MDP(transitions=transitions, rewards=rewards, terminal=terminal, start=start, gamma=1.0)


@pytest.fixture
def random_mdp():
    """Six states without an order in them, the last one terminal."""
    source = torch.Generator().manual_seed(1)
    transitions = torch.rand(6, 3, 6, generator=source, dtype=torch.float64)
    transitions /= transitions.sum(dim=2, keepdim=True)
    rewards = torch.randn(6, 3, 6, generator=source, dtype=torch.float64)
    transitions[5], rewards[5] = 0.0, 0.0
    transitions[5, :, 5] = 1.0
    return MDP(
        transitions=transitions,
        rewards=rewards,
        terminal=torch.arange(6) == 5,
        start=torch.tensor([0.5, 0.3, 0.2, 0.0, 0.0, 0.0], dtype=torch.float64),
        gamma=0.9,
    )


@pytest.fixture
def small_grid():
    return gridworld("S..\n.#C\n..G", gamma=0.9, cliff_reward=-5.0)


@pytest.fixture
def random_policy(random_mdp):
    return torch.randn(6, 3, generator=torch.Generator().manual_seed(2), dtype=torch.float64).softmax(dim=1)
