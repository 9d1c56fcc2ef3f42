"""Values and visits against textbook numbers, sums over time, and simulation."""

from dataclasses import replace

import pytest
import torch
from torch.testing import assert_close

from llmrl.tabular import MDP, backup, evaluate, greedy, objective, sample_episodes, visitation


def test_the_random_walk_of_the_book(walk):
    values, _ = evaluate(walk, walk.uniform_policy())
    assert_close(values, torch.tensor([0, 1, 2, 3, 4, 5, 0], dtype=torch.float64) / 6)


def test_values_are_the_sum_over_time(random_mdp, random_policy):
    """v = Σ_t γ^t P^t r, by a long loop instead of a solve."""
    moves = torch.einsum("sa,san->sn", random_policy, random_mdp.transitions)
    rewards = (random_policy * random_mdp.expected_rewards).sum(dim=1)
    total, now, visits = torch.zeros(6).double(), rewards, torch.zeros(6).double()
    there = random_mdp.start
    for step in range(400):
        total, now = total + 0.9**step * now, moves @ now
        visits, there = visits + 0.9**step * there, there @ moves
    values, action_values = evaluate(random_mdp, random_policy)
    assert_close(values, total, rtol=0, atol=1e-8)
    assert_close((random_policy * action_values).sum(dim=1), values, rtol=0, atol=1e-8)
    assert_close(visitation(random_mdp, random_policy)[:5], visits[:5], rtol=0, atol=1e-8)


def test_visits_pay_the_objective(random_mdp, random_policy):
    rewards = (random_policy * random_mdp.expected_rewards).sum(dim=1)
    paid = visitation(random_mdp, random_policy) @ rewards
    assert_close(objective(random_mdp, random_policy), paid, rtol=0, atol=1e-8)
    limited = replace(random_mdp, horizon=3)
    paid = visitation(limited, random_policy).sum(dim=0) @ rewards
    assert_close(objective(limited, random_policy), paid, rtol=0, atol=1e-8)


def test_a_long_horizon_is_none(random_mdp, random_policy):
    values, action_values = evaluate(replace(random_mdp, horizon=400), random_policy)
    endless, endless_q = evaluate(random_mdp, random_policy)
    assert_close(values[0], endless, rtol=0, atol=1e-8)
    assert_close(action_values[0], endless_q, rtol=0, atol=1e-8)
    assert_close(action_values[-1], random_mdp.expected_rewards)


def test_a_horizon_of_two_by_hand(walk):
    """From the state beside the right end: up pays 1; down, then up again takes a third action."""
    values, action_values = evaluate(replace(walk, horizon=2), walk.uniform_policy())
    assert values[:, 5].tolist() == [0.5, 0.5]
    assert action_values[0, 4].tolist() == [0.0, 0.5]


def test_values_are_the_mean_of_simulated_returns(walk, generator):
    episodes = sample_episodes(walk, walk.uniform_policy(), num_episodes=2000, max_steps=500, generator=generator)
    mean = sum(episode[-1].reward for episode in episodes) / len(episodes)
    assert mean == pytest.approx(0.5, abs=4 * (0.25 / 2000) ** 0.5)
    length = sum(map(len, episodes)) / len(episodes)
    assert length == pytest.approx(visitation(walk, walk.uniform_policy()).sum().item(), rel=0.06)


def test_nothing_is_bootstrapped_from_a_terminal_state(walk):
    poisoned = torch.where(walk.terminal, torch.nan, 1.0).double()
    assert bool(backup(walk, poisoned)[1:6].isfinite().all())
    assert backup(walk, poisoned)[5].tolist() == [1.0, 1.0]


def test_bootstrapping_the_end_pays_it_for_ever():
    """The failure: with no terminal flag, the goal's reward comes again in every step, 1 / (1 - γ) in all."""
    transitions = torch.tensor([[[0.0, 1.0]], [[0.0, 1.0]]]).double()
    right = MDP(
        transitions=transitions,
        rewards=torch.tensor([[1.0], [0.0]]).double(),
        terminal=torch.tensor([False, True]),
        start=torch.tensor([1.0, 0.0]).double(),
        gamma=0.9,
    )
    wrong = replace(right, rewards=torch.ones(2, 1).double(), terminal=torch.tensor([False, False]))
    policy = right.uniform_policy()
    assert objective(right, policy).item() == pytest.approx(1.0)
    assert objective(wrong, policy).item() == pytest.approx(10.0)


def test_a_policy_that_never_ends_has_no_value_without_a_discount(walk):
    back_and_forth = greedy(torch.tensor([[0, 1], [0, 1], [1, 0], [1, 0], [1, 0], [1, 0], [0, 1]]).double())
    with pytest.raises(ValueError, match="never does from state 1"):
        evaluate(walk, back_and_forth)
    assert evaluate(replace(walk, gamma=0.5), back_and_forth)[0].tolist() == [0.0] * 7


@pytest.mark.usefixtures("production")
def test_what_is_no_policy_is_refused(walk):
    with pytest.raises(ValueError, match="policy must hold probabilities"):
        evaluate(walk, torch.ones(7, 2, dtype=torch.float64))
    with pytest.raises(ValueError, match="shapes do not fit"):
        evaluate(walk, torch.ones(7, 1, dtype=torch.float64))
    with pytest.raises(ValueError, match="one entry per step"):
        evaluate(replace(walk, horizon=3), walk.uniform_policy().expand(2, 7, 2))
