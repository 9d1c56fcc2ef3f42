"""TRPO: Fisher matrix and natural gradient by autograd and by the known result; steps that rise within the KL."""

import pytest
import torch
from torch.testing import assert_close

from llmrl.tabular import (
    evaluate,
    exact_gradient,
    fisher_matrix,
    mean_kl,
    natural_gradient,
    objective,
    policy_iteration,
    softmax_policy,
    trpo_step,
    visitation,
)


@pytest.fixture
def logits():
    return torch.randn(6, 3, generator=torch.Generator().manual_seed(7), dtype=torch.float64)


def test_the_fisher_matrix_is_the_hessian_of_the_kl(random_mdp, logits):
    visits = visitation(random_mdp, softmax_policy(logits))
    hessian = torch.autograd.functional.hessian(lambda x: mean_kl(visits, logits, x.view(6, 3)), logits.flatten())
    assert_close(fisher_matrix(visits, logits), hessian, rtol=0, atol=1e-10)


def test_the_natural_gradient_is_the_advantages(random_mdp, logits):
    """Kakade's result, up to a constant in each state, which no softmax sees."""
    policy = softmax_policy(logits)
    values, action_values = evaluate(random_mdp, policy)
    visits = visitation(random_mdp, policy)
    advantages = (action_values - values[:, None]) * visits.sum()
    direction = natural_gradient(random_mdp, logits)
    centred = [x[:5] - x[:5].mean(dim=1, keepdim=True) for x in (direction, advantages)]
    assert_close(*centred, rtol=0, atol=1e-8)


def test_steps_rise_within_the_kl_to_the_optimum(random_mdp, logits):
    best = objective(random_mdp, policy_iteration(random_mdp).policy)
    for _ in range(60):
        before = objective(random_mdp, softmax_policy(logits))
        step = trpo_step(random_mdp, logits, max_kl=0.05)
        assert step.kl <= 0.05
        assert step.gain >= 0
        assert objective(random_mdp, softmax_policy(step.logits)) == pytest.approx((before + step.gain).item())
        logits = step.logits
    assert objective(random_mdp, softmax_policy(logits)) == pytest.approx(best.item(), abs=1e-3)


def test_a_small_step_moves_as_far_as_it_may(random_mdp, logits):
    step = trpo_step(random_mdp, logits, max_kl=1e-6)
    assert step.kl / 2**-step.num_halvings / 2**-step.num_halvings == pytest.approx(1e-6, rel=0.05)


def test_a_plain_gradient_step_of_that_length_gains_less(random_mdp, logits):
    """The failure: the same KL spent along the plain gradient."""
    visits = visitation(random_mdp, softmax_policy(logits))
    step = trpo_step(random_mdp, logits, max_kl=0.01)
    plain, size = exact_gradient(random_mdp, logits), 1e-3
    while mean_kl(visits, logits, logits + 1.05 * size * plain) < step.kl:
        size *= 1.05
    before = objective(random_mdp, softmax_policy(logits))
    assert objective(random_mdp, softmax_policy(logits + size * plain)) - before < step.gain


def test_no_step_is_made_at_an_optimum_or_with_no_kl(random_mdp):
    sure = 40 * policy_iteration(random_mdp).policy
    assert trpo_step(random_mdp, sure, max_kl=0.1).gain < 1e-9
    with pytest.raises(ValueError, match="max_kl"):
        trpo_step(random_mdp, sure, max_kl=0.0)
