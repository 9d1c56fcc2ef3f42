import math

import pytest
import torch
from torch.testing import assert_close

from llmrl.functional.kl import estimate_kl, shape_rewards
from llmrl.functional.losses import importance_ratio
from llmrl.functional.masking import masked_sum

ESTIMATORS = ["k1", "k2", "k3"]


def row(*x):
    return torch.tensor([x])


def test_by_hand():
    logprobs, ref = row(math.log(2.0), 0.0), row(0.0, 3.0)
    k1, k2, k3 = (estimate_kl(logprobs, ref, estimator=e) for e in ESTIMATORS)
    assert_close(k1, row(math.log(2.0), -3.0))
    assert_close(k2, row(math.log(2.0) ** 2 / 2, 4.5))
    assert_close(k3, row(0.5 - 1 + math.log(2.0), math.exp(3.0) - 4))


def test_k3_is_accurate_for_close_policies():
    # exp(-d) - 1 in float32 would leave noise of 3e-8
    expected = 1e-3**2 / 2 - 1e-3**3 / 6
    assert estimate_kl(row(1e-3), row(0.0), estimator="k3").item() == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_equal_policies_have_no_divergence(estimator):
    logprobs = torch.randn(3, 4)
    assert (estimate_kl(logprobs, logprobs.clone(), estimator=estimator) == 0).all()


@pytest.mark.parametrize("estimator", ["k2", "k3"])
def test_k2_and_k3_are_never_negative(estimator):
    assert (estimate_kl(torch.randn(50, 50), torch.randn(50, 50), estimator=estimator) >= 0).all()


class Categorical:
    """A policy, an older one that sampled, and a reference over five tokens: every expectation is a finite sum."""

    def __init__(self):
        self.logits = torch.randn(1, 5, dtype=torch.float64, requires_grad=True)
        self.old, self.ref = torch.randn(2, 1, 5, dtype=torch.float64).log_softmax(-1)
        self.logprobs = self.logits.log_softmax(-1)
        self.everything = torch.ones(1, 5, dtype=torch.bool)
        self.ratio = importance_ratio(self.logprobs, self.old, self.everything)

    def kl(self, estimator):
        return estimate_kl(self.logprobs, self.ref, estimator=estimator)

    def exact(self):
        """KL(policy, reference) and its gradient in the logits: p_i (d_i - KL)."""
        p = self.logits.detach().softmax(-1)
        d = p.log() - self.ref
        kl = (p * d).sum()
        return kl, p * (d - kl)

    def expected_gradient(self, per_token, sampler):
        """Of a loss whose tokens are drawn from `sampler` and stay fixed under differentiation."""
        (gradient,) = torch.autograd.grad((sampler.detach().exp() * per_token).sum(), self.logits)
        return gradient


@pytest.mark.parametrize("estimator", ["k1", "k3"])
def test_k1_and_k3_are_unbiased(estimator):
    policy = Categorical()
    expected = (policy.logprobs.exp() * policy.kl(estimator)).sum()
    assert_close(expected.detach(), policy.exact()[0])


def test_k2_times_the_detached_ratio_has_the_gradient_of_the_kl_off_policy():
    policy = Categorical()
    gradient = policy.expected_gradient(policy.ratio.detach() * policy.kl("k2"), sampler=policy.old)
    assert_close(gradient, policy.exact()[1])


def test_k3_times_the_live_ratio_has_the_gradient_of_the_kl_off_policy():
    policy = Categorical()
    gradient = policy.expected_gradient(policy.ratio * policy.kl("k3"), sampler=policy.old)
    assert_close(gradient, policy.exact()[1])


def test_k3_times_the_detached_ratio_has_another_gradient():
    policy = Categorical()
    gradient = policy.expected_gradient(policy.ratio.detach() * policy.kl("k3"), sampler=policy.old)
    assert (gradient - policy.exact()[1]).abs().max() > 0.01


def test_k1_as_a_loss_has_no_expected_gradient():
    policy = Categorical()
    gradient = policy.expected_gradient(policy.kl("k1"), sampler=policy.logprobs)
    assert_close(gradient, torch.zeros_like(gradient))


def test_the_gradient_of_k2_is_the_log_ratio():
    logprobs, ref = torch.randn(2, 3, requires_grad=True), torch.randn(2, 3)
    estimate_kl(logprobs, ref, estimator="k2").sum().backward()
    assert_close(logprobs.grad, logprobs.detach() - ref)


@pytest.mark.usefixtures("production")
def test_unknown_estimators_and_shapes_are_refused():
    with pytest.raises(ValueError, match="'k4'"):
        estimate_kl(torch.zeros(1, 1), torch.zeros(1, 1), estimator="k4")
    with pytest.raises(ValueError, match=r"logprobs \(2, 3\), ref_logprobs \(1, 3\)"):
        estimate_kl(torch.zeros(2, 3), torch.zeros(1, 3), estimator="k1")
    with pytest.raises(ValueError, match=r"scores \(3,\), kl \(2, 3\), response_mask \(2, 3\)"):
        shape_rewards(torch.zeros(3), torch.zeros(2, 3), torch.ones(2, 3, dtype=torch.bool), kl_coef=0.1)


def test_the_score_lands_on_the_last_chosen_token(mask):
    scores = torch.tensor([1.0, 2.0, 3.0, 4.0, torch.nan])  # the last row has no token and is not read
    rewards = shape_rewards(scores, torch.ones(mask.shape), mask, kl_coef=0.5)
    last = [6, 5, 2, 0]
    expected = torch.where(mask, -0.5, 0.0)
    for b, t in enumerate(last):
        expected[b, t] += scores[b]
    assert_close(rewards, expected)


def test_rewards_sum_to_the_score_less_the_price_of_the_kl(mask):
    scores, kl = torch.randn(5), torch.randn(mask.shape)
    rewards = shape_rewards(scores, kl, mask, kl_coef=0.2)
    for b in range(4):
        assert_close(rewards[b].sum(), scores[b] - 0.2 * masked_sum(kl[b], mask[b]))
    assert (rewards[~mask] == 0).all()


def test_rewards_do_not_read_outside_the_mask(mask, poison):
    scores, tensors = torch.randn(5), {"kl": torch.randn(mask.shape)}
    clean = shape_rewards(scores, **tensors, response_mask=mask, kl_coef=0.2)
    assert_close(shape_rewards(scores, **poison(tensors), response_mask=mask, kl_coef=0.2), clean, rtol=0, atol=0)


def test_without_a_coefficient_only_the_score_is_left():
    rewards = shape_rewards(torch.tensor([2.0]), row(5.0, 5.0), torch.ones(1, 2, dtype=torch.bool), kl_coef=0.0)
    assert rewards.tolist() == [[0, 2]]
