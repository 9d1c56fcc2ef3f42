"""Temporal differences against linear algebra, and the failures that they are known for."""

from dataclasses import replace

import pytest
import torch
from torch.testing import assert_close

from llmrl.tabular import (
    MDP,
    discounted_sums,
    double_q_learning,
    evaluate,
    expected_sarsa,
    greedy,
    gridworld,
    objective,
    policy_iteration,
    q_learning,
    sarsa,
    step_size,
    td_prediction,
    td_target,
)
from llmrl.tabular.monte_carlo import epsilon_greedy

pytestmark = pytest.mark.usefixtures("production")  # a check of types takes longer than a move

CLIFF = "......\n......\nSCCCCG"
EPSILON = 0.1


def soft(action_values, epsilon=EPSILON):
    return torch.tensor([epsilon_greedy(row, epsilon) for row in action_values.tolist()], dtype=torch.float64)


def best_soft(mdp, epsilon=EPSILON):
    """Action values of the best ε-greedy policy: the optimum of a process whose actions are replaced at random."""

    def mixed(x):
        return (1 - epsilon) * x + epsilon * x.mean(dim=1, keepdim=True)

    slippery = replace(mdp, transitions=mixed(mdp.transitions), rewards=mixed(mdp.expected_rewards))
    return evaluate(mdp, soft(policy_iteration(slippery).action_values, epsilon))[1]


# --- the target ------------------------------------------------------------------------------------------------------


def test_the_target_by_hand():
    assert td_target([1.0, 2.0], [10.0, 20.0], [0.25, 0.75], gamma=0.5) == 1 + 1 + 0.25 * 17.5


def test_without_a_bootstrap_the_target_is_the_return():
    assert td_target([1.0, 0.0, 4.0], [9.0, 9.0], [0.0, 0.0], gamma=0.5) == discounted_sums([1.0, 0.0, 4.0], 0.5)[0]


def test_the_expectation_of_the_target_is_the_bellman_equation(random_mdp, random_policy):
    _, action_values = evaluate(random_mdp, random_policy)
    expected = sum(
        random_mdp.transitions[1, 0, s].item()
        * td_target(
            [random_mdp.rewards[1, 0, s].item()],
            action_values[s].tolist(),
            [0.0] * 3 if s == 5 else random_policy[s].tolist(),
            gamma=0.9,
        )
        for s in range(6)
    )
    assert expected == pytest.approx(action_values[1, 0].item(), abs=1e-10)


def test_step_sizes_meet_robbins_and_monro():
    assert step_size(4, power=1.0) == 0.25
    for power in (0.5, 1.1):
        with pytest.raises(ValueError, match="power"):
            step_size(4, power=power)


# --- against linear algebra ------------------------------------------------------------------------------------------


def test_prediction_of_the_random_walk(walk, generator):
    values = td_prediction(walk, walk.uniform_policy(), num_steps=60_000, power=0.7, generator=generator)
    assert_close(values, torch.tensor([0, 1, 2, 3, 4, 5, 0]).double() / 6, rtol=0, atol=0.06)


@pytest.mark.parametrize(
    "learn",
    [sarsa, lambda mdp, **rest: sarsa(mdp, n=3, **rest), expected_sarsa],
    ids=["sarsa", "3-step sarsa", "expected sarsa"],
)
def test_on_policy_learns_the_best_soft_policy(random_mdp, generator, learn):
    found = learn(random_mdp, epsilon=0.5, num_steps=60_000, power=0.7, generator=generator)
    assert_close(found, best_soft(random_mdp, 0.5), rtol=0, atol=0.25)


def test_q_learning_learns_the_optimum_whoever_acts(random_mdp, random_policy, generator):
    best = policy_iteration(random_mdp).action_values
    for behaviour in (0.5, random_policy, random_mdp.uniform_policy()):
        found = q_learning(random_mdp, behaviour=behaviour, num_steps=60_000, power=0.7, generator=generator)
        assert_close(found, best, rtol=0, atol=0.25)


def test_q_learning_is_exact_where_nothing_is_random(small_grid, generator):
    found = q_learning(
        small_grid, behaviour=small_grid.uniform_policy(), num_steps=60_000, power=0.6, generator=generator
    )
    assert_close(found, policy_iteration(small_grid).action_values, rtol=0, atol=1e-3)


def test_double_q_learning_learns_the_optimum(random_mdp, generator):
    found = double_q_learning(
        random_mdp, behaviour=random_mdp.uniform_policy(), num_steps=80_000, power=0.7, generator=generator
    )
    assert_close(found, policy_iteration(random_mdp).action_values, rtol=0, atol=0.25)


# --- failures --------------------------------------------------------------------------------------------------------


def noisy_rooms(num_actions=8):
    """One action from the start, worth 0.9 * max = 0 in truth: eight doors that pay -1 or 1, alike."""
    transitions = torch.zeros(4, num_actions, 4).double()
    transitions[0, :, 1] = 1.0
    transitions[1, :, 2] = transitions[1, :, 3] = 0.5
    transitions[2, :, 2] = transitions[3, :, 3] = 1.0
    rewards = torch.zeros(4, num_actions, 4).double()
    rewards[1, :, 2], rewards[1, :, 3] = -1.0, 1.0
    return MDP(
        transitions=transitions,
        rewards=rewards,
        terminal=torch.tensor([False, False, True, True]),
        start=torch.tensor([1.0, 0.0, 0.0, 0.0]).double(),
        gamma=0.9,
    )


def test_q_learning_overestimates_and_two_tables_do_not():
    rooms, means = noisy_rooms(), {}
    for learn in (q_learning, double_q_learning):
        found = [
            learn(
                rooms,
                behaviour=rooms.uniform_policy(),
                num_steps=400,
                power=1.0,
                generator=torch.Generator().manual_seed(seed),
            )[0].mean()
            for seed in range(40)
        ]
        means[learn] = torch.stack(found).mean().item()
    assert means[q_learning] > 0.15
    assert abs(means[double_q_learning]) < 0.05


def test_on_the_cliff_sarsa_goes_around_and_q_learning_along_the_edge(generator):
    """Q-learning's path is the shorter one, and worse for a policy that explores while it walks."""
    cliff = gridworld(CLIFF, gamma=0.95)
    bold = q_learning(cliff, behaviour=EPSILON, num_steps=40_000, power=0.6, generator=generator)
    careful = sarsa(cliff, epsilon=EPSILON, num_steps=40_000, power=0.6, generator=generator)
    assert objective(cliff, greedy(bold)) == pytest.approx(objective(cliff, policy_iteration(cliff).policy).item())
    assert objective(cliff, greedy(careful)) < objective(cliff, greedy(bold)) - 0.5
    assert objective(cliff, soft(careful)) > objective(cliff, soft(bold)) + 0.5


def test_without_exploration_q_learning_misses_the_optimum(generator):
    near = gridworld("GS...G", gamma=0.9, goal_reward=1.0)
    rewards = near.rewards.clone()
    rewards[4, 1] = 20.0
    mdp = replace(near, rewards=rewards)
    greedy_only = q_learning(mdp, behaviour=0.0, num_steps=5000, generator=generator)
    explored = q_learning(mdp, behaviour=0.5, num_steps=20_000, power=0.6, generator=generator)
    assert objective(mdp, greedy(explored)) == pytest.approx(-1 - 0.9 - 0.81 + 0.729 * 20)
    assert objective(mdp, greedy(greedy_only)) == pytest.approx(1.0)
