"""Environments of gymnasium as the actor meets them."""

from random import Random
from typing import Any

import pytest

from llmrl.environments.environment import Message, Turn

RIDDLE = "tests.environments.riddle:Riddle-v0"
MOVES = ("left", "down", "right", "up")


@pytest.fixture(autouse=True)
def library():
    return pytest.importorskip("gymnasium")


def made(id: str, **arguments) -> Any:
    from llmrl.environments.gymnasium import Gymnasium

    return Gymnasium(id, **arguments)


def started(id: str, row=None, *, seed: int = 3, **arguments) -> tuple[Any, str]:
    environment = made(id, **arguments)
    environment.random = Random(seed)
    opening = environment.start(row or {})
    environment.random.seed(seed + 100)
    return environment, opening


def say(environment: Any, text: str, turn: int = 1) -> Turn:
    return environment.respond(Message(text, turn, []))


def lake(**arguments) -> tuple[Any, str]:
    return started("FrozenLake-v1", options={"is_slippery": False}, actions=MOVES, **arguments)


def test_the_opening_has_instructions_spaces_and_the_observation():
    _, opening = lake(instructions="Reach G.")
    assert opening == (
        "Reach G.\n"
        "Observations are of Discrete(16). Answer with one action: left, down, right, up.\n"
        "observation: 0\n"
        "[S]FFF\nFHFH\nFFFH\nHFFG"
    )


def test_the_way_to_the_goal_is_rewarded_at_its_end():
    environment, _ = lake()
    way = ["down", "down", "right", "right", "down", "right"]
    turns = [say(environment, move, n) for n, move in enumerate(way, start=1)]
    assert [turn.done for turn in turns] == [False] * 5 + [True]
    assert [turn.reward for turn in turns] == [0.0] * 5 + [1.0]
    assert turns[0].observation == "observation: 4\n(Down)\nSFFF\n[F]HFH\nFFFH\nHFFG"
    environment.close()


def test_a_time_limit_of_gymnasium_ends_the_episode():
    environment, _ = started("FrozenLake-v1", options={"is_slippery": False, "max_episode_steps": 2}, actions=MOVES)
    assert [say(environment, "left", n).done for n in (1, 2)] == [False, True]


@pytest.mark.parametrize(
    ("text", "action"),
    [
        ("right", 2),
        ("I could go left, but I go RIGHT.", 2),
        ("<answer>up</answer>", 3),
        ("upright", None),
        ("left-hand", None),
        ("2", None),  # it has names
        ("", None),
    ],
)
def test_the_last_named_action_is_taken(text: str, action: int | None):
    assert lake()[0].action(text) == action


@pytest.mark.parametrize(
    ("text", "action"), [("Action: 1.", 1), ("0, then 3", 3), ("1.5", None), ("-1", None), ("4", None), ("10", None)]
)
def test_actions_without_names_are_numbers(text: str, action: int | None):
    assert started("FrozenLake-v1")[0].action(text) == action


def test_a_message_without_an_action_makes_no_step():
    environment, _ = lake()
    assert say(environment, "jump") == Turn("error: the message names no action; write one of left, down, right, up")
    assert say(environment, "down").observation.startswith("observation: 4\n")


def test_texts_go_in_and_come_out_as_they_are():
    environment, opening = started(RIDDLE)
    assert "Which word? " in opening
    assert "observation:" not in opening
    assert say(environment, "dog").observation.startswith("error: ")  # no text of the space
    assert say(environment, "abc", 2).reward == 0.0
    last = say(environment, "cab", 3)
    assert (last.done, last.reward) == (True, 1.0)


def test_a_group_opens_alike_and_its_responses_go_on_by_their_own_random_numbers():
    (first, one), (second, other) = (
        started(RIDDLE),
        started(RIDDLE),
    )
    second.random.seed(7)
    assert one == other
    assert say(first, "abc") != say(second, "abc")
    third, _ = started(RIDDLE)
    fourth, _ = started(RIDDLE)
    assert say(third, "abc") == say(fourth, "abc")
    assert say(third, "bca", 2) == say(fourth, "bca", 2)


def test_the_seed_of_a_row_counts():
    assert started(RIDDLE, {"seed": 5}, seed=1)[1] == started(RIDDLE, {"seed": 5}, seed=2)[1]
    assert started(RIDDLE, seed=1)[1] != started(RIDDLE, seed=2)[1]


def test_tuples_and_arrays_are_read_as_json():
    _, opening = started("Blackjack-v1", actions=("stick", "hit"))
    assert opening.splitlines()[-1].startswith("observation: [")


def test_what_cannot_be_played_is_refused_when_it_is_made(library):
    with pytest.raises(ValueError, match="there are 4 actions; name each of them"):
        made("FrozenLake-v1", actions=("left", "right"))
    with pytest.raises(TypeError, match="neither numbers nor texts"):
        made("tests.environments.riddle:Drive-v0")
    with pytest.raises(library.error.NameNotFound):
        made("FrozenLak-v1")
