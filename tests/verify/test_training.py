from dataclasses import replace

import pytest

from llmrl.verify import training
from llmrl.verify.game import make_game, probabilities
from llmrl.verify.rows import PLAIN, Row
from llmrl.verify.training import distance_from_optimum

GAME = make_game(kl_coef=0.3)


def test_ppo_comes_to_the_optimum():
    start = (probabilities(GAME.reference) - GAME.optimum()).abs().sum(1).mean() / 2
    assert float(start) > 0.2
    assert distance_from_optimum(Row(name="ppo", algorithm="ppo", settings={"gae_lambda": 1.0}), GAME) < 0.001


def test_nothing_is_learned_without_steps(monkeypatch):
    monkeypatch.setattr(training, "NUM_STEPS", 1)
    monkeypatch.setattr(training, "LEARNING_RATE", 0.0)
    start = (probabilities(GAME.reference) - GAME.optimum()).abs().sum(1).mean() / 2
    row = Row(name="rloo", algorithm="grpo", settings={"baseline": "leave_one_out", **PLAIN})
    assert distance_from_optimum(row, GAME) == pytest.approx(float(start))
    assert distance_from_optimum(row, replace(GAME, scores=GAME.scores * 0)) == pytest.approx(0.0, abs=1e-12)
