"""Draws: frequencies, truncation, seeds; returns by hand."""

from dataclasses import replace

import pytest
import torch

from llmrl.tabular import Simulator, discounted_sums, sample_episodes


def test_moves_come_as_often_as_they_should(random_mdp, generator):
    simulator = Simulator(random_mdp, generator)
    drawn = torch.tensor([simulator.move(1, 2).next_state for _ in range(20_000)])
    probability = random_mdp.transitions[1, 2]
    frequency = torch.bincount(drawn, minlength=6) / 20_000
    assert bool(((frequency - probability).abs() < 4.5 * (probability * (1 - probability) / 20_000).sqrt()).all())


def test_a_move_pays_what_its_next_state_does(random_mdp, generator):
    move = Simulator(random_mdp, generator).move(0, 1)
    assert move.reward == random_mdp.rewards[0, 1, move.next_state].item()
    assert move.ended == (move.next_state == 5)


def test_impossible_actions_are_never_drawn(walk, generator):
    simulator = Simulator(walk, generator)
    assert {simulator.draw([0.0, 0.5, 0.0]) for _ in range(5000)} == {1}


def test_episodes_end_or_are_truncated(walk, generator):
    episodes = sample_episodes(walk, walk.uniform_policy(), num_episodes=200, max_steps=5, generator=generator)
    assert {len(episode) for episode in episodes} == {3, 5}
    assert all(episode[-1].ended == (len(episode) == 3) or episode[-1].ended for episode in episodes)


def test_an_episode_begins_with_a_given_pair(walk, generator):
    (first, *_) = Simulator(walk, generator).episode([[0.0, 1.0]] * 7, max_steps=9, pair=(4, 0))
    assert (first.state, first.action, first.next_state) == (4, 0, 3)


def test_a_seed_is_a_sample(walk):
    first, second = (
        sample_episodes(
            walk, walk.uniform_policy(), num_episodes=3, max_steps=9, generator=torch.Generator().manual_seed(5)
        )
        for _ in range(2)
    )
    assert first == second


def test_returns_by_hand():
    assert discounted_sums([1.0, 0.0, 4.0], 0.5) == [2.0, 2.0, 4.0]
    assert discounted_sums([], 0.5) == []


def test_a_horizon_is_refused(walk, generator):
    with pytest.raises(ValueError, match="unrolled"):
        Simulator(replace(walk, horizon=2), generator)
