import math

import pytest
import torch

from llmrl.batches import Episodes, Scores
from llmrl.environments.reward import EpisodeReward
from llmrl.rewards.combine import CombinedReward
from llmrl.trainers.rl import describe
from tests.environments.test_conversations import rollout_of


def make_rollout():
    """Turns "a b $" and "c $" around one fed token; one turn; two turns of an episode that failed."""
    chosen = [True, True, True, False, True, True]
    responses = [([7, 7, 2, 9, 7, 2], chosen), ([7, 2], [True] * 2), ([7, 2, 9, 2], [True, True, False, True])]
    rollout = rollout_of(responses, [1, 1, 4])
    episodes = Episodes(
        turn_ends=torch.tensor([[3, 6], [2, 0], [2, 4]]),
        turn_rewards=torch.tensor([[0.5, 0.25], [-1.0, 0.0], [1.0, 1.0]]),
        end_reward=torch.tensor([2.0, 0.0, 7.0]),
        num_calls=torch.zeros(3, dtype=torch.long),
        num_bad_calls=torch.zeros(3, dtype=torch.long),
        failures=(None, None, "respond"),
        reasons=(None, None, "raised KeyError: 'x'"),
        openings=("a",) * 3,
        messages=((),) * 3,
    )
    return type(rollout)(**{**vars(rollout), "episodes": episodes})


def test_rewards_of_turns_land_on_their_last_tokens():
    scores = EpisodeReward("environment")(make_rollout())
    assert scores.per_token.tolist() == [
        [0.0, 0.0, 0.5, 0.0, 0.0, 0.25],
        [0.0, -1.0, 0.0, 0.0, 0.0, 0.0],
        [0.0] * 6,
    ]
    assert scores.total[:2].tolist() == [2.0, 0.0]
    assert scores.parts["environment"][:2].tolist() == [2.75, -1.0]


def test_an_episode_that_failed_cannot_be_scored():
    scores = EpisodeReward("environment")(make_rollout())
    assert scores.total[2].isnan()
    assert scores.per_response[2].isnan()
    assert scores.parts["environment"][2].isnan()
    assert scores.failed == {}  # counted as environment/failed, from the episodes


def test_without_rewards_nothing_is_scored():
    scores = EpisodeReward(None)(make_rollout())
    assert scores.parts == {}
    assert all(math.isnan(x) for x in scores.total.tolist())


@pytest.mark.parametrize("label", ["environment", None])
def test_no_reward_scores_an_episode_that_failed(label):
    """A rule that says 0 of a conversation that broke off would teach the actor to avoid what it did right."""

    def rule(rollout):
        zeros = torch.zeros(3)
        return Scores(total=zeros, per_token=torch.zeros_like(rollout.rollout_logprobs), parts={"rule": zeros})

    scores = CombinedReward([EpisodeReward(label), rule])(make_rollout())
    assert scores.total.isnan().tolist() == [False, False, True]
    assert {name: part.isnan().tolist() for name, part in scores.parts.items()} == {
        name: [False, False, True] for name in ([label] if label else []) + ["rule"]
    }
    values = describe(make_rollout(), scores, 3).values()
    assert values["score/rule"] == 0.0
    assert (values["score/unscored"], values["environment/failed"], values["environment/failed/respond"]) == (1, 1, 1)
    assert "reward/environment/failed" not in values


def test_tokens_know_their_turn():
    rollout = make_rollout()
    assert torch.where(rollout.sequences.response_mask, rollout.turn_of_token, -1).tolist() == [
        [0, 0, 0, -1, 1, 1],
        [0, 0, -1, -1, -1, -1],
        [0, 0, -1, 1, -1, -1],
    ]
    assert rollout.last_turn_starts.tolist() == [4, 0, 3]
    assert rollout.num_chosen.tolist() == [5, 2, 3]
    assert rollout.episodes.num_turns.tolist() == [2, 1, 2]


def test_turns_that_nothing_stands_between_are_told_apart():
    rollout = make_rollout()
    mask = torch.tensor([[True] * 6, [True, True] + [False] * 4, [True] * 4 + [False] * 2])
    sequences = type(rollout.sequences)(**{**vars(rollout.sequences), "response_mask": mask})
    rollout = type(rollout)(**{**vars(rollout), "sequences": sequences})
    assert rollout.last_turn_starts.tolist() == [3, 0, 2]
    assert rollout.turn_of_token[0].tolist() == [0, 0, 0, 1, 1, 1]
