"""Rollouts that are eight iterations old, against the optimum that is known for a bandit of one token.

Where GRPO has the KL in its loss, the gradient of responses of another policy is 0 elsewhere than at the optimum.
"""

import copy

import pytest

from llmrl.algorithms.config import GRPOConfig
from llmrl.algorithms.grpo import GRPO

from .tabular import TabularActor, TabularEngine, make_trainer, random_logits, reward_of
from .test_ppo_theory import distribution, optimizers, optimum, total_variation

STALENESS = 8
NUM_ITERATIONS = 40
KL_COEF = 0.1
SCORES = {(a,): score for a, score in enumerate([1.0, 0.2, 0.8, 0.0, 0.5, 0.9])}


def distance_at_the_end(importance, *, seed, learning_rate=0.15):
    """Total variation between the actor and the optimum after training: 512 responses an iteration, two epochs."""
    actor = TabularActor(random_logits(6, 1))
    reference = copy.deepcopy(actor).requires_grad_(False)
    best = optimum(distribution(actor, SCORES), SCORES, KL_COEF)
    config = GRPOConfig(baseline="leave_one_out", scale="none", kl_coef=KL_COEF, importance=importance)
    trainer = make_trainer(
        GRPO(config, actor=actor, reference=reference, max_response_tokens=1),
        TabularEngine(actor),
        reward_of(SCORES),
        optimizers({"actor": actor}, {"actor": learning_rate}, num_steps=4 * NUM_ITERATIONS),
        update={"num_epochs": 2, "minibatch_size": 256, "microbatch_tokens": 10**6, "staleness": STALENESS},
        prompts_per_iteration=512 // config.group_size,
        group_size=config.group_size,
        seed=seed,
    )
    for _ in range(NUM_ITERATIONS):
        trainer.iterate()
    return total_variation(distribution(actor, SCORES), best)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_truncated_weights_end_near_the_optimum_and_uncorrected_stale_rollouts_do_not(seed):
    assert distance_at_the_end("none", seed=seed) > 0.08
    assert distance_at_the_end("truncated", seed=seed) < 0.03
