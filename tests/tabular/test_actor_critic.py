"""Actor-critic against linear algebra: its critic with the actor still, its actor against the optimum."""

import pytest
import torch
from torch.testing import assert_close

from llmrl.tabular import (
    advantage_actor_critic,
    evaluate,
    gridworld,
    objective,
    policy_iteration,
    qac,
    softmax_policy,
    td_prediction,
)

pytestmark = pytest.mark.usefixtures("production")  # a check of types takes longer than a move


@pytest.fixture
def logits(random_policy):
    return random_policy.log()


def test_the_critic_of_a_still_actor_knows_its_values(random_mdp, random_policy, logits, generator):
    found = advantage_actor_critic(
        random_mdp, num_steps=40_000, actor_rate=0.0, critic_rate=0.01, logits=logits, generator=generator
    )
    assert torch.equal(found.logits, logits)
    assert_close(found.values, evaluate(random_mdp, random_policy)[0], rtol=0, atol=0.35)


def test_off_policy_it_knows_them_too_and_without_the_ratio_those_of_the_other(random_mdp, generator):
    behaviour = random_mdp.uniform_policy()
    target = policy_iteration(random_mdp).policy * 0.9 + 0.1 / 3
    found = advantage_actor_critic(
        random_mdp,
        num_steps=60_000,
        actor_rate=0.0,
        critic_rate=0.01,
        logits=target.log(),
        behaviour=behaviour,
        generator=generator,
    )
    truth, other = (evaluate(random_mdp, policy)[0] for policy in (target, behaviour))
    assert (truth - other)[:5].abs().min() > 1.0
    assert_close(found.values, truth, rtol=0, atol=0.6)
    unweighted = td_prediction(random_mdp, behaviour, num_steps=20_000, power=0.7, generator=generator)
    assert_close(unweighted, other, rtol=0, atol=0.35)


def test_the_critic_of_qac_knows_the_action_values(random_mdp, generator):
    found = qac(random_mdp, num_steps=40_000, actor_rate=0.0, critic_rate=0.02, generator=generator)
    truth = evaluate(random_mdp, random_mdp.uniform_policy())[1]
    assert_close(found.values, truth, rtol=0, atol=0.6)


@pytest.mark.parametrize("off_policy", [False, True])
def test_a2c_reaches_the_optimum(generator, off_policy):
    mdp = gridworld("S.\n.G", gamma=0.9)
    found = advantage_actor_critic(
        mdp,
        num_steps=20_000,
        actor_rate=0.1,
        critic_rate=0.1,
        behaviour=mdp.uniform_policy() if off_policy else None,
        generator=generator,
    )
    best = objective(mdp, policy_iteration(mdp).policy)
    assert objective(mdp, softmax_policy(found.logits)) == pytest.approx(best.item(), abs=0.1)


def test_qac_reaches_the_optimum(generator):
    mdp = gridworld("S.\n.G", gamma=0.9)
    found = qac(mdp, num_steps=20_000, actor_rate=0.05, critic_rate=0.1, generator=generator)
    best = objective(mdp, policy_iteration(mdp).policy)
    assert objective(mdp, softmax_policy(found.logits)) == pytest.approx(best.item(), abs=0.1)


def test_an_impossible_action_is_refused(random_mdp, generator):
    impossible = torch.tensor([[0.0, 0.5, 0.5]]).double().expand(6, 3)
    with pytest.raises(ValueError, match="probability 0"):
        advantage_actor_critic(
            random_mdp, num_steps=1, actor_rate=0.1, critic_rate=0.1, behaviour=impossible, generator=generator
        )
