from dataclasses import replace

import pytest
import torch

from llmrl.verify.estimators import Estimator
from llmrl.verify.game import enumeration, make_game, population
from llmrl.verify.rows import PLAIN, Row

RLOO = Row(name="rloo", algorithm="grpo", settings={"baseline": "leave_one_out", **PLAIN})
GAME = make_game(kl_coef=0.0)


def test_the_expected_gradient_is_that_of_the_objective():
    gradient = Estimator(RLOO, GAME).expected(population(GAME, 2))
    assert gradient.critic is None
    torch.testing.assert_close(gradient.actor, -GAME.gradient() / 3, rtol=1e-6, atol=1e-9)


def test_every_group_once_by_its_probability_is_the_same():
    by_chance, by_count = (Estimator(RLOO, GAME).expected(draw(GAME, 2)).flat for draw in (enumeration, population))
    torch.testing.assert_close(by_chance, by_count, rtol=1e-6, atol=1e-9)


def test_the_variance_is_that_of_single_groups():
    estimator, draws = Estimator(RLOO, GAME), population(GAME, 2)
    experience = estimator.experience(draws)
    weights = estimator.weights(experience, draws) * 8192
    drawn = torch.randperm(8192, generator=torch.Generator().manual_seed(0))[:600]
    single = []
    for group in drawn.tolist():
        rows = torch.tensor([2 * group, 2 * group + 1])
        single.append(estimator.gradient_of(experience.select(rows), weights[rows]).flat)
    spread = 2 * torch.stack(single).var(dim=0).sum() / (GAME.gradient() / 3).square().sum()
    assert estimator.variance(draws) == pytest.approx(float(spread), rel=0.15)


def test_old_log_probabilities_are_those_of_the_old_actor():
    away = replace(GAME, current=GAME.current + 1.0, old=GAME.old + torch.arange(3))
    experience = Estimator(RLOO, away).experience(population(GAME, 2))
    assert not torch.allclose(experience.old_logprobs, experience.rollout.rollout_logprobs)
    live = Estimator(RLOO, replace(away, current=away.old))
    torch.testing.assert_close(experience.old_logprobs, live.experience(population(GAME, 2)).old_logprobs)
