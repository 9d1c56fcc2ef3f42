"""The policy gradient: the theorem against autograd, estimates against the theorem, baselines and their variance."""

import pytest
import torch
from torch.testing import assert_close

from llmrl.tabular import (
    Move,
    evaluate,
    exact_gradient,
    gridworld,
    objective,
    policy_iteration,
    reinforce,
    sampled_gradients,
    softmax_policy,
)
from llmrl.tabular.policy_gradient import score_gradient, softmax_row


@pytest.fixture
def logits():
    return torch.randn(6, 3, generator=torch.Generator().manual_seed(7), dtype=torch.float64)


def test_the_theorem_is_the_gradient_of_the_objective(random_mdp, logits):
    live = logits.clone().requires_grad_()
    objective(random_mdp, softmax_policy(live)).backward()
    assert_close(exact_gradient(random_mdp, logits), live.grad, rtol=0, atol=1e-10)


def test_the_gradient_of_two_actions_by_hand(walk):
    """Of the middle state with its neighbours: 1.5 visits, 1/2 each, and q 2/6 and 4/6."""
    gradient = exact_gradient(walk, torch.zeros(7, 2).double())
    assert gradient[3].tolist() == pytest.approx([-3 * 0.5 / 6, 3 * 0.5 / 6])


def test_a_score_gradient_is_that_of_autograd(logits):
    moves = [Move(1, 0, 0.0, 2, False), Move(2, 1, 0.0, 1, False), Move(1, 2, 0.0, 5, True)]
    weights = [2.0, -1.0, 0.5]
    live = logits.clone().requires_grad_()
    logprobs = live.log_softmax(dim=1)
    sum(weight * logprobs[move.state, move.action] for move, weight in zip(moves, weights, strict=True)).backward()
    assert_close(score_gradient(logits.softmax(dim=1), moves, weights), live.grad)


@pytest.mark.usefixtures("production")
@pytest.mark.parametrize("baseline", ["none", "constant", "values"])
def test_estimates_have_the_gradient_as_mean_whatever_the_baseline(random_mdp, logits, generator, baseline):
    values, _ = evaluate(random_mdp, softmax_policy(logits))
    known = {"none": None, "constant": torch.full_like(values, 3.0), "values": values}[baseline]
    samples = sampled_gradients(
        random_mdp, logits, baseline=known, num_episodes=2000, max_steps=300, generator=generator
    )
    error = samples.std(dim=0) / 2000**0.5
    assert bool(((samples.mean(dim=0) - exact_gradient(random_mdp, logits)).abs() <= 4.5 * error + 1e-12).all())


@pytest.mark.usefixtures("production")
def test_the_value_as_baseline_lowers_the_variance_and_a_large_constant_raises_it(random_mdp, logits):
    values, _ = evaluate(random_mdp, softmax_policy(logits))
    variances = [
        sampled_gradients(
            random_mdp,
            logits,
            baseline=baseline,
            num_episodes=1000,
            max_steps=300,
            generator=torch.Generator().manual_seed(0),
        )
        .var(dim=0)
        .sum()
        for baseline in (values, None, torch.full_like(values, 10.0))
    ]
    assert variances[0] < variances[1] < 0.2 * variances[2]


@pytest.mark.usefixtures("production")
@pytest.mark.parametrize("baseline_rate", [0.0, 0.1])
def test_reinforce_reaches_the_optimum(generator, baseline_rate):
    mdp = gridworld("S.\n.G", gamma=0.9)
    logits = reinforce(
        mdp, num_episodes=1500, max_steps=100, learning_rate=0.1, baseline_rate=baseline_rate, generator=generator
    )
    best = objective(mdp, policy_iteration(mdp).policy)
    assert objective(mdp, softmax_policy(logits)) == pytest.approx(best.item(), abs=0.1)


def test_one_row_is_a_softmax():
    assert softmax_row([1000.0, 1000.0]) == [0.5, 0.5]
