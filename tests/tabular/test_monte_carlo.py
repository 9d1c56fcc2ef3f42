"""Monte Carlo control against the optimum; without exploration it misses it."""

import pytest
import torch
from torch.testing import assert_close

from llmrl.tabular import (
    MDP,
    basic_monte_carlo,
    epsilon_greedy,
    exploring_starts,
    greedy,
    objective,
    on_policy_control,
    policy_iteration,
    value_iteration,
)
from llmrl.tabular.bellman import evaluate

pytestmark = pytest.mark.usefixtures("production")  # a check of types takes longer than a move


@pytest.fixture
def fork():
    """Left pays 1 at once; right pays 0, then 2."""
    transitions = torch.zeros(3, 2, 3).double()
    transitions[0, 0, 2] = transitions[0, 1, 1] = transitions[1, :, 2] = transitions[2, :, 2] = 1.0
    return MDP(
        transitions=transitions,
        rewards=torch.tensor([[1.0, 0.0], [2.0, 2.0], [0.0, 0.0]]).double(),
        terminal=torch.tensor([False, False, True]),
        start=torch.tensor([1.0, 0.0, 0.0]).double(),
        gamma=0.9,
    )


def test_epsilon_greedy_by_hand():
    assert epsilon_greedy([0.0, 3.0, 3.0, 1.0], 0.4) == pytest.approx([0.1, 0.7, 0.1, 0.1])


def test_basic_is_exact_where_nothing_is_random(small_grid, generator):
    found = basic_monte_carlo(small_grid, num_iterations=8, episodes_per_pair=1, max_steps=300, generator=generator)
    assert_close(found, value_iteration(small_grid).action_values, rtol=0, atol=1e-8)


def test_basic_within_its_confidence(random_mdp, generator):
    """300 returns of spread about 2 per pair: 5 standard errors are 0.6."""
    found = basic_monte_carlo(random_mdp, num_iterations=2, episodes_per_pair=300, max_steps=60, generator=generator)
    assert (found - policy_iteration(random_mdp).action_values).abs().max() < 0.6


def test_exploring_starts_find_the_optimum(random_mdp, generator):
    found = exploring_starts(random_mdp, num_episodes=8000, max_steps=60, generator=generator)
    best = policy_iteration(random_mdp)
    assert objective(random_mdp, greedy(found)) > objective(random_mdp, best.policy) - 0.05


def test_epsilon_greedy_control_finds_the_best_soft_policy(fork, generator):
    found = on_policy_control(fork, epsilon=0.2, num_episodes=2000, max_steps=10, generator=generator)
    assert greedy(found)[0].tolist() == [0.0, 1.0]
    assert_close(found[0], torch.tensor([1.0, 1.8]).double(), rtol=0, atol=1e-6)


def test_without_exploration_the_optimum_is_missed(fork, generator):
    """The failure: the first action that pays is taken for ever, and the other one never tried."""
    found = on_policy_control(fork, epsilon=0.0, num_episodes=2000, max_steps=10, generator=generator)
    assert found[0].tolist() == [1.0, 0.0]
    assert evaluate(fork, greedy(found))[0][0] == 1.0
    assert evaluate(fork, policy_iteration(fork).policy)[0][0] == pytest.approx(1.8)
