"""Deep Q-learning on tables: exact where nothing is random, every variant; and what each part is there for."""

import pytest
import torch
from torch.testing import assert_close

from llmrl.tabular import (
    MDP,
    DuelingQ,
    LinearQ,
    Replay,
    bellman_targets,
    collect_replay,
    deep_q_learning,
    evaluate,
    gridworld,
    policy_iteration,
)

pytestmark = pytest.mark.usefixtures("production")  # a check of types takes longer than a move

STATES = torch.arange(2)


@pytest.fixture
def corridor():
    return gridworld("S.G", gamma=0.8)


@pytest.fixture
def replay(corridor, generator):
    return collect_replay(corridor, corridor.uniform_policy(), num_moves=200, max_steps=20, generator=generator)


@pytest.mark.parametrize("network", [LinearQ, DuelingQ])
@pytest.mark.parametrize("settings", [{}, {"double": True}, {"priority": 0.6}], ids=["plain", "double", "prioritized"])
def test_every_variant_finds_the_optimum(corridor, replay, generator, network, settings):
    q = network(torch.eye(3, dtype=torch.float64), 4)
    deep_q_learning(
        q,
        replay,
        gamma=0.8,
        num_steps=900,
        batch_size=32,
        learning_rate=1.0,
        target_every=60,
        generator=generator,
        **settings,
    )
    assert_close(q(STATES).detach(), policy_iteration(corridor).action_values[:2], rtol=0, atol=0.02)


def fixed(*rows):
    network = LinearQ(torch.eye(len(rows), dtype=torch.float64), len(rows[0]))
    network.weight.data = torch.tensor(rows, dtype=torch.float64)
    return network


def test_targets_by_hand():
    """Of state 1, the network prefers action 0, the target action 1; the end is its reward, whatever stands there."""
    moves = Replay(
        states=torch.tensor([0, 0]),
        actions=torch.tensor([0, 1]),
        rewards=torch.tensor([1.0, 5.0]).double(),
        next_states=torch.tensor([1, 1]),
        ended=torch.tensor([False, True]),
    )
    network, target = fixed([0.0, 0.0], [9.0, 8.0]), fixed([0.0, 0.0], [2.0, 4.0])
    assert bellman_targets(network, target, moves, gamma=0.5, double=False).tolist() == [3.0, 5.0]
    assert bellman_targets(network, target, moves, gamma=0.5, double=True).tolist() == [2.0, 5.0]


def test_a_double_target_does_not_maximize_noise(generator):
    """Both networks know the true values, 0, up to noise of their own: the largest of eight has a mean of 1.42."""
    moves = Replay(
        states=torch.arange(500),
        actions=torch.zeros(500, dtype=torch.long),
        rewards=torch.zeros(500).double(),
        next_states=torch.arange(500),
        ended=torch.zeros(500, dtype=torch.bool),
    )
    network, target = (fixed(*torch.randn(500, 8, generator=generator).tolist()) for _ in range(2))
    plain, double = (bellman_targets(network, target, moves, gamma=1.0, double=d).mean() for d in (False, True))
    assert plain == pytest.approx(1.42, abs=0.1)
    assert double == pytest.approx(0.0, abs=4 / 500**0.5)


def test_a_dueling_network_is_a_value_and_advantages_of_mean_zero():
    network = DuelingQ(torch.eye(2, dtype=torch.float64), 3)
    network.value.weight.data = torch.tensor([[5.0], [0.0]]).double()
    network.advantage.weight.data = torch.tensor([[1.0, 2.0, 6.0], [0.0, 0.0, 0.0]]).double()
    assert network(STATES).tolist() == [[3.0, 4.0, 8.0], [0.0, 0.0, 0.0]]


def test_the_first_loss_is_that_of_huber(replay, generator):
    """All values are 0 and all rewards -1, or 0 into the goal: 0.5 d^2 with d in {0, 1}, so half the share of -1."""
    (loss,) = deep_q_learning(
        fixed([0.0] * 4, [0.0] * 4, [0.0] * 4),
        replay,
        gamma=0.8,
        num_steps=1,
        batch_size=5000,
        learning_rate=0.0,
        target_every=1,
        generator=generator,
    )
    assert loss == pytest.approx(-0.5 * replay.rewards.mean().item(), abs=0.02)


@pytest.fixture
def chain():
    """Two states, one action: the first leads to the second, which pays 1 and ends. Values 0.99 and 1."""
    transitions = torch.zeros(3, 1, 3).double()
    transitions[0, 0, 1] = transitions[1, 0, 2] = transitions[2, 0, 2] = 1.0
    return MDP(
        transitions=transitions,
        rewards=torch.tensor([[0.0], [1.0], [0.0]]).double(),
        terminal=torch.tensor([False, False, True]),
        start=torch.tensor([1.0, 0.0, 0.0]).double(),
        gamma=0.99,
    )


def test_without_a_target_network_values_diverge(chain):
    """The failure: features (1, 0) and (2, 1), and nine moves of ten from the first state. A step there lifts the
    value of the second, which is its target, by twice as much. With a copy as target the same steps are exact."""
    first = torch.arange(100) % 10 < 9
    moves = Replay(
        states=torch.where(first, 0, 1),
        actions=torch.zeros(100, dtype=torch.long),
        rewards=torch.where(first, 0.0, 1.0).double(),
        next_states=torch.where(first, 1, 2),
        ended=~first,
    )
    errors = {}
    for target_every in (None, 100):
        network = LinearQ(torch.tensor([[1.0, 0.0], [2.0, 1.0], [0.0, 0.0]]).double(), 1)
        deep_q_learning(
            network,
            moves,
            gamma=0.99,
            num_steps=700,
            batch_size=32,
            learning_rate=0.3,
            target_every=target_every,
            generator=torch.Generator().manual_seed(0),
        )
        errors[target_every] = (network(STATES) - evaluate(chain, chain.uniform_policy())[1][:2]).abs().max().item()
    assert errors[100] < 0.05
    assert errors[None] > 5
