"""Optimal values: by brute force over policies, the rate of contraction, the known optimum with a KL."""

import itertools
from dataclasses import replace

import pytest
import torch
from torch.testing import assert_close

from llmrl.tabular import (
    MDP,
    evaluate,
    finite_horizon,
    objective,
    policy_iteration,
    regularized_iteration,
    truncated_policy_iteration,
    value_iteration,
)
from llmrl.tabular.bellman import one_hot


def best_of_all(mdp):
    """Values of the best of all deterministic policies, by enumeration and linear algebra."""
    free = (~mdp.terminal).nonzero().flatten()
    best = torch.full_like(mdp.start, -torch.inf)
    for actions in itertools.product(range(mdp.num_actions), repeat=len(free)):
        chosen = torch.zeros(mdp.num_states, dtype=torch.long)
        chosen[free] = torch.tensor(actions)
        best = torch.maximum(best, evaluate(mdp, one_hot(chosen, mdp.num_actions))[0])
    return best


@pytest.mark.parametrize(
    "solve",
    [value_iteration, policy_iteration, lambda mdp: truncated_policy_iteration(mdp, num_sweeps=5)],
    ids=["value", "policy", "truncated"],
)
def test_solvers_find_the_best_of_all_policies(random_mdp, solve):
    solution = solve(random_mdp)
    best = best_of_all(random_mdp)
    assert_close(solution.action_values.amax(dim=1), best, rtol=0, atol=1e-8)
    assert_close(evaluate(random_mdp, solution.policy)[0], best, rtol=0, atol=1e-8)


def test_value_iteration_contracts_by_gamma(random_mdp):
    changes = [change for change in value_iteration(random_mdp).changes if change > 1e-9]
    assert all(later <= 0.9 * earlier + 1e-12 for earlier, later in itertools.pairwise(changes))


def test_more_sweeps_take_fewer_iterations(random_mdp):
    lengths = [len(truncated_policy_iteration(random_mdp, num_sweeps=n).changes) for n in (1, 5, 50)]
    assert lengths == sorted(lengths, reverse=True)
    assert lengths[0] > 3 * lengths[1]
    assert len(policy_iteration(random_mdp).changes) <= 5


def test_a_horizon_against_every_sequence_of_policies(random_mdp):
    small = replace(random_mdp, horizon=2)
    action_values, policy = finite_horizon(small)
    values, _ = evaluate(small, policy)
    assert_close(values, action_values.amax(dim=2), rtol=0, atol=1e-12)
    generator = torch.Generator().manual_seed(3)
    for _ in range(50):
        other = torch.rand(2, 6, 3, generator=generator, dtype=torch.float64).softmax(dim=2)
        assert bool((evaluate(small, other)[0] <= values + 1e-12).all())


def test_gamma_one_needs_a_price():
    stays = MDP(
        transitions=torch.tensor([[[1.0, 0.0], [0.0, 1.0]], [[0.0, 1.0], [0.0, 1.0]]]).double(),
        rewards=torch.tensor([[1.0, 0.0], [0.0, 0.0]]).double(),
        terminal=torch.tensor([False, True]),
        start=torch.tensor([1.0, 0.0]).double(),
        gamma=1.0,
    )
    with pytest.raises(ValueError, match="never does from state 0"):
        policy_iteration(stays)


def test_with_a_kl_one_action_has_the_known_optimum():
    scores, reference = torch.tensor([[1.0, 0.2, -0.5], [0.2, 0.3, 0.5]], dtype=torch.float64)
    transitions = torch.zeros(2, 3, 2).double()
    transitions[:, :, 1] = 1.0
    bandit = MDP(
        transitions=transitions,
        rewards=torch.stack([scores, torch.zeros_like(scores)]),
        terminal=torch.tensor([False, True]),
        start=torch.tensor([1.0, 0.0]).double(),
        gamma=1.0,
    )
    solution = regularized_iteration(bandit, torch.stack([reference, reference]), kl_coef=0.5)
    weights = reference * (scores / 0.5).exp()
    assert_close(solution.policy[0], weights / weights.sum())


def test_with_a_kl_no_other_policy_is_better(random_mdp, random_policy):
    def regularized(policy):
        penalty = 0.3 * (policy.log() - random_policy.log())
        return objective(replace(random_mdp, rewards=random_mdp.expected_rewards - masked(penalty)), policy)

    def masked(penalty):
        return torch.where(random_mdp.terminal[:, None], 0.0, penalty)

    best = regularized_iteration(random_mdp, random_policy, kl_coef=0.3).policy
    generator = torch.Generator().manual_seed(4)
    for scale in (0.01, 0.1, 1.0):
        noise = scale * torch.randn(6, 3, generator=generator, dtype=torch.float64)
        assert regularized((best.log() + noise).softmax(dim=1)) < regularized(best)


def test_numbers_out_of_range_and_horizons_are_refused(random_mdp, random_policy):
    with pytest.raises(ValueError, match="num_sweeps"):
        truncated_policy_iteration(random_mdp, num_sweeps=0)
    with pytest.raises(ValueError, match="kl_coef"):
        regularized_iteration(random_mdp, random_policy, kl_coef=0.0)
    with pytest.raises(ValueError, match="unrolled"):
        value_iteration(replace(random_mdp, horizon=2))
    with pytest.raises(ValueError, match="value_iteration"):
        finite_horizon(random_mdp)
