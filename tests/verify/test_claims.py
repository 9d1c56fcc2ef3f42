import itertools

import pytest
import torch
from torch.nn.functional import one_hot

from llmrl.algorithms.config import GRPOConfig, PPOConfig
from llmrl.verify.claims import Terms, expected_gradient, reasons, terms_of, without_kl
from llmrl.verify.game import LENGTHS, RESPONSE_IDS, make_game, probabilities, with_exact_critic

PLAIN = {"scale": "none", "aggregation": "constant"}
GAME = make_game(kl_coef=0.3)
SCORES_ALONE = make_game(kl_coef=0.0)


def test_scores_less_those_of_the_others_have_the_gradient_of_the_objective():
    terms = terms_of(GRPOConfig(group_size=2, baseline="leave_one_out", **PLAIN))
    assert terms is not None
    gradient = expected_gradient(terms, SCORES_ALONE).actor
    torch.testing.assert_close(gradient, -SCORES_ALONE.gradient() / 3)


def test_a_mean_with_the_own_score_in_it_takes_half_of_two():
    whole, others = (
        expected_gradient(Terms(baseline=baseline, aggregation="constant"), SCORES_ALONE).actor
        for baseline in ("mean", "leave_one_out")
    )
    torch.testing.assert_close(whole, others / 2)


@pytest.mark.parametrize("trace", [0.0, 0.5, 1.0])
def test_an_exact_critic_leaves_no_bias_at_any_lambda(trace):
    game = with_exact_critic(GAME)
    ours, truth = -expected_gradient(Terms(baseline="critic", trace=trace), game).actor, game.gradient()
    torch.testing.assert_close(ours * (truth.norm() / ours.norm()), truth)


def test_k3_alone_has_the_gradient_of_the_kl_in_the_other_direction():
    logits = GAME.current.clone().requires_grad_()
    reference = probabilities(GAME.reference)
    other = (reference * (reference.log() - probabilities(logits).log())).sum(1).mean()
    (forward,) = torch.autograd.grad(other, logits)
    with_kl = Terms(baseline="none", aggregation="constant", kl_form="k3_paper", policy_sign=0.0)
    ours = expected_gradient(with_kl, GAME).actor * 3 / 0.3
    first = (slice(None), 0)  # the first token: later states are reached by the policy here, by the reference there
    torch.testing.assert_close(ours[first], forward[first])


def test_k2_times_the_ratio_is_the_gradient_of_the_kl_of_each_state():
    logits = GAME.current.clone().requires_grad_()
    live, reference = (table.log_softmax(-1) for table in (logits, GAME.reference))
    (slope,) = torch.autograd.grad((live.exp() * (live - reference)).sum(-1)[:, 0].mean(), logits)
    ours = expected_gradient(Terms(baseline="none", aggregation="constant", kl_form="k2", policy_sign=0.0), GAME).actor
    torch.testing.assert_close(ours[:, 0] * 3 / 0.3, slope[:, 0])


def test_the_std_of_two_scores_leaves_only_their_order():
    likely, gradient = probabilities(SCORES_ALONE.sampler), torch.zeros(2, 3, dtype=torch.float64)
    for n, y, z in itertools.product(range(2), range(15), range(15)):
        sign = float((SCORES_ALONE.scores[n, y] - SCORES_ALONE.scores[n, z]).sign())
        score = one_hot(RESPONSE_IDS[y, 0], 3) - SCORES_ALONE.sampler[n, 0].softmax(0)
        gradient[n] -= likely[n, y] * likely[n, z] * sign * score / int(LENGTHS[y]) / 2
    ours = expected_gradient(Terms(baseline="mean", scale="std", aggregation="sequence"), SCORES_ALONE).actor
    torch.testing.assert_close(ours[:, 0], gradient, rtol=1e-4, atol=1e-8)


def test_settings_without_a_formula_make_no_claim():
    assert terms_of(GRPOConfig(mask_truncated=True)) is None
    assert terms_of(GRPOConfig(baseline="mine.py:baseline", scale="none")) is None
    assert terms_of(PPOConfig(score_clip=1.0)) is None


def test_settings_become_terms():
    terms = terms_of(PPOConfig(gamma=0.9, gae_lambda=0.5, value_lambda=1.0, value_clip=None))
    assert terms is not None
    assert (terms.trace, terms.value_trace, terms.value_clip) == (0.45, 0.9, float("inf"))


def test_reasons_are_those_of_the_terms():
    assert reasons(Terms(baseline="leave_one_out"), exact_critic=False) == []
    with_kl = Terms(baseline="leave_one_out", kl_form="k2")
    assert reasons(with_kl, exact_critic=False) == ["a token does not answer for the KL of later ones"]
    assert reasons(without_kl(with_kl), exact_critic=False) == []
    assert reasons(Terms(baseline="critic", trace=0.5), exact_critic=True) == []
    assert reasons(Terms(baseline="critic", trace=0.5), exact_critic=False) != []
