"""The real loop, engine and conversations against theory: a game of two turns that can be enumerated.

A play names a token a, is shown o, which the environment draws by a, and names b. The policy that maximizes
E[rewards] - kl_coef KL(policy, reference), the KL over both tokens, is known from its end:

    policy(b | a, o)  ∝  reference(b | a, o) exp(r(o, b) / kl_coef)
    policy(a)         ∝  reference(a) exp((r(a) + E_o[V(a, o)]) / kl_coef)

With the KL in the rewards, as PPO has it, V is what the second turn is worth with its own KL, kl_coef log Σ_b
reference(b) exp(r / kl_coef). With the KL of each token in the loss, as GRPO has it, the first token does not pay for
that of the second one, and V is the second turn's expected reward.
"""

import copy
import math
from importlib import import_module
from itertools import product
from pathlib import Path

import pytest
import torch

from llmrl.algorithms.config import GRPOConfig, PPOConfig
from llmrl.algorithms.grpo import GRPO
from llmrl.models.critic import TransformersValueFunction, ValueHead, ValueModule
from llmrl.models.policy import TransformersPolicy
from llmrl.optim.config import OptimizerConfig
from llmrl.optim.local import LocalTrainable
from tests.algorithms.tabular import Pair, make_ppo

KL_COEF = 0.4
ITERATIONS = 80
RESPONSES = 256


@pytest.fixture(scope="module")
def game():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(Path(__file__).parents[2] / "benchmarks")
        yield import_module("credit")


def optimum(game, reference, *, pays_later):
    first, second = reference
    best, worth = {}, {}
    for a, o in second:
        weights = [p * math.exp(r / KL_COEF) for p, r in zip(second[a, o], game.SECOND[o], strict=True)]
        best[a, o] = [x / sum(weights) for x in weights]
        expected = sum(p * r for p, r in zip(best[a, o], game.SECOND[o], strict=True))
        worth[a, o] = KL_COEF * math.log(sum(weights)) if pays_later else expected
    totals = [game.FIRST[a] + sum(game.chance(a, o) * worth[a, o] for o in game.SHOWN) for a in game.ACTIONS]
    weights = [p * math.exp(total / KL_COEF) for p, total in zip(first, totals, strict=True)]
    return [x / sum(weights) for x in weights], best


def total_variation(game, left, right):
    """Between the plays of two policies."""
    (first, second), (other_first, other_second) = left, right
    return (
        sum(
            game.chance(a, o) * abs(first[a] * second[a, o][b] - other_first[a] * other_second[a, o][b])
            for a, o, b in product(game.ACTIONS, game.SHOWN, game.ACTIONS)
        )
        / 2
    )


def train(game, make, *, group_size):
    """The policy before and after."""
    model = game.make_model(1, spread=0.4)
    reference = TransformersPolicy(game.policy_over(copy.deepcopy(model).requires_grad_(False)))
    before = game.policy_of(model)
    modules = {"actor": game.policy_over(model)}
    algorithm = make(modules, reference)
    optimizer = OptimizerConfig(learning_rate=0.002, schedule="linear", max_grad_norm=math.inf)
    trained = {name: LocalTrainable(module, optimizer, num_steps=ITERATIONS) for name, module in modules.items()}
    trainer = game.make_trainer(
        algorithm, model, trained, coin=0.0, group_size=group_size, seed=0, num_responses=RESPONSES
    )
    for _ in range(ITERATIONS):
        trainer.iterate()
    return before, game.policy_of(model)


@pytest.mark.slow
@pytest.mark.parametrize("credit", ["response", "turn"])
def test_grpo_reaches_the_optimum(game, credit):
    config = GRPOConfig(
        group_size=8, baseline="leave_one_out", scale="none", kl_coef=KL_COEF, kl_form="k3", credit=credit
    )
    before, after = train(
        game,
        lambda modules, reference: GRPO(
            config, actor=TransformersPolicy(modules["actor"]), reference=reference, max_response_tokens=4
        ),
        group_size=8,
    )
    best = optimum(game, before, pays_later=False)
    assert total_variation(game, before, best) > 0.3
    assert total_variation(game, after, best) < 0.03


@pytest.mark.slow
def test_ppo_reaches_the_optimum(game):
    def make(modules, reference):
        critic = ValueModule(game.make_model(2).model, ValueHead(32), dtype=torch.float32)
        modules["critic"] = critic
        networks = Pair(TransformersPolicy(modules["actor"]), TransformersValueFunction(critic))
        config = PPOConfig(kl_coef=KL_COEF, gae_lambda=1.0)
        return make_ppo(config, networks, reference=reference, max_response_tokens=4)

    before, after = train(game, make, group_size=1)
    best = optimum(game, before, pays_later=True)
    assert total_variation(game, before, best) > 0.3
    assert total_variation(game, after, best) < 0.03
