"""The whole loop of PPO against theory, on tables small enough to enumerate every response.

The policy that maximizes E[score] - kl_coef * KL(policy, reference), both over whole responses, is known:

    policy(y)  ∝  reference(y) * exp(score(y) / kl_coef)

and so is the value of each state under any policy: the mean of what can still come, weighted by its probability.
"""

import copy
import math
from typing import Literal

import pytest
import torch

from llmrl.algorithms.config import GRPOConfig, PPOConfig
from llmrl.algorithms.grpo import GRPO
from llmrl.optim.config import OptimizerConfig
from llmrl.optim.local import LocalTrainable

from .tabular import (
    END,
    Pair,
    TabularActor,
    TabularCritic,
    TabularEngine,
    all_responses,
    make_ppo,
    make_trainer,
    random_logits,
    reward_of,
    state_of,
)

KL_COEF = 0.3


def total_variation(p, q):
    return sum(abs(p[y] - q[y]) for y in p) / 2


def distribution(actor, responses):
    return {y: actor.probability(y) for y in responses}


def optimum(reference, scores, kl_coef):
    weights = {y: reference[y] * math.exp(scores[y] / kl_coef) for y in reference}
    return {y: weight / sum(weights.values()) for y, weight in weights.items()}


def optimizers(networks, rates, *, num_steps, schedule: Literal["constant", "linear"] = "linear"):
    """Adam without weight decay, a learning rate for each network."""
    return {
        name: LocalTrainable(
            module,
            OptimizerConfig(learning_rate=rates[name], schedule=schedule, max_grad_norm=math.inf),
            num_steps=num_steps,
        )
        for name, module in networks.items()
    }


def train(config, actor, critic, scores, *, num_iterations, reference=None, actor_rate=0.08):
    """PPO in the real loop: 512 responses an iteration, two epochs of two minibatches."""
    if reference is None and config.kl_coef:
        reference = copy.deepcopy(actor).requires_grad_(False)
    limit = max(map(len, scores))
    trainer = make_trainer(
        make_ppo(config, Pair(actor, critic), reference=reference, max_response_tokens=limit),
        TabularEngine(actor),
        reward_of(scores),
        optimizers(
            {"actor": actor, "critic": critic}, {"actor": actor_rate, "critic": 0.1}, num_steps=4 * num_iterations
        ),
        update={"num_epochs": 2, "minibatch_size": 256, "microbatch_tokens": 10**6},
        prompts_per_iteration=512,
    )
    for _ in range(num_iterations):
        trainer.iterate()


def critic_for(actor):
    num_states, num_tokens = actor.logits.shape
    return TabularCritic(torch.zeros(num_states), num_tokens=num_tokens)


def test_the_bandit_of_one_token_reaches_its_optimum():
    scores = {(a,): score for a, score in enumerate([1.0, 0.2, 0.8, 0.0, 0.5, 0.9])}
    actor = TabularActor(random_logits(6, 1))
    before = distribution(actor, scores)
    best = optimum(before, scores, KL_COEF)
    assert total_variation(before, best) > 0.2
    train(PPOConfig(kl_coef=KL_COEF), actor, critic_for(actor), scores, num_iterations=30)
    assert total_variation(distribution(actor, scores), best) < 0.025


def pair_scores():
    """A first token is as good as the second that follows it: neither token has a worth of its own."""
    match = {(1, 2), (2, 3), (3, 1)}
    return {y: 0.3 if y == (END,) else 1.0 if y in match else 0.0 for y in all_responses(4, 2)}


def test_the_bandit_of_two_tokens_reaches_its_optimum():
    scores = pair_scores()
    actor = TabularActor(random_logits(4, 2, seed=1))
    before = distribution(actor, scores)
    assert sum(before.values()) == pytest.approx(1.0)
    best = optimum(before, scores, KL_COEF)
    assert total_variation(before, best) > 0.3
    train(PPOConfig(kl_coef=KL_COEF), actor, critic_for(actor), scores, num_iterations=40)
    assert total_variation(distribution(actor, scores), best) < 0.025


def values_by_enumeration(actor, reference, scores, *, kl_coef, gamma):
    """State -> (how often a response comes through it, mean discounted reward from there on)."""
    num_tokens = actor.logits.shape[1]
    reach, worth = {}, {}
    for response, score in scores.items():
        chance = actor.probability(response)
        nats = [
            math.log(actor.probability(response[: t + 1]) / actor.probability(response[:t]))
            - math.log(reference.probability(response[: t + 1]) / reference.probability(response[:t]))
            for t in range(len(response))
        ]
        rewards = [-kl_coef * x for x in nats]
        rewards[-1] += score
        for t in range(len(response)):
            state = state_of(response[:t], num_tokens)
            come = sum(gamma**k * reward for k, reward in enumerate(rewards[t:]))
            reach[state] = reach.get(state, 0.0) + chance
            worth[state] = worth.get(state, 0.0) + chance * come
    return {state: (reach[state], worth[state] / reach[state]) for state in reach}


def weighted_variance(x, reach):
    mean = sum(reach[state] * x[state] for state in x) / sum(reach.values())
    return sum(reach[state] * (x[state] - mean) ** 2 for state in x) / sum(reach.values())


@pytest.mark.parametrize("lambdas", [{"gae_lambda": 1.0}, {"gae_lambda": 0.5, "value_lambda": 1.0}])
def test_the_critic_of_a_frozen_actor_learns_the_values_of_its_policy(lambdas):
    scores = {y: 1 + 2 * score for y, score in pair_scores().items()}
    actor, reference = (TabularActor(random_logits(4, 2, seed=seed)) for seed in (1, 2))
    critic, before = critic_for(actor), copy.deepcopy(actor)
    known = values_by_enumeration(actor, reference, scores, kl_coef=0.3, gamma=0.7)
    reach, true = ({state: pair[k] for state, pair in known.items()} for k in (0, 1))
    config = PPOConfig(kl_coef=0.3, gamma=0.7, **lambdas)
    train(config, actor, critic, scores, num_iterations=30, reference=reference, actor_rate=0.0)
    assert torch.equal(actor.logits, before.logits)
    learned = critic.table.tolist()
    missed = {state: learned[state] - value for state, value in true.items()}
    assert 1 - weighted_variance(missed, reach) / weighted_variance(true, reach) >= 0.95
    assert max(map(abs, missed.values())) < 0.06  # no common shift either


def ninety_percent():
    return dict.fromkeys(all_responses(4, 2), 0.9)


@pytest.mark.parametrize("value", [0.9, 0.8])
def test_exact_values_of_a_constant_score_leave_every_weight_as_it_was(value):
    """Nothing is better than expected; and just that keeps the actor still, as a critic that is wrong shows."""
    actor = TabularActor(random_logits(4, 2))
    critic = TabularCritic(torch.full((12,), value), num_tokens=4)
    before = copy.deepcopy(actor), copy.deepcopy(critic)
    train(PPOConfig(kl_coef=0.0), actor, critic, ninety_percent(), num_iterations=2)
    still = value == 0.9
    assert torch.equal(actor.logits, before[0].logits) == still
    assert torch.equal(critic.table, before[1].table) == still


@pytest.mark.parametrize("scores", [ninety_percent(), pair_scores()], ids=["constant", "varied"])
def test_a_constant_score_leaves_the_actor_of_grpo_bit_identical(scores):
    actor = TabularActor(random_logits(4, 2))
    before = copy.deepcopy(actor)
    trainer = make_trainer(
        GRPO(GRPOConfig(group_size=4), actor=actor, reference=None, max_response_tokens=2),
        TabularEngine(actor),
        reward_of(scores),
        optimizers({"actor": actor}, {"actor": 0.1}, num_steps=8, schedule="constant"),
        update={"num_epochs": 2, "minibatch_size": 32},
        prompts_per_iteration=16,
        group_size=4,
    )
    for _ in range(2):
        trainer.iterate()
    assert torch.equal(actor.logits, before.logits) == (set(scores.values()) == {0.9})
