"""Environments of gymnasium as the actor meets them."""

from random import Random

import pytest

from llmrl.environments.environment import Message, Turn

gymnasium = pytest.importorskip("gymnasium")

from llmrl.environments.gymnasium import Gymnasium  # noqa: E402

MOVES = ("left", "down", "right", "up")


class Riddle(gymnasium.Env):
    """Texts in both directions; a wrong answer is answered by a number that it draws."""

    observation_space = gymnasium.spaces.Text(100)
    action_space = gymnasium.spaces.Text(3, charset="abc")

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return f"Which word? {self.np_random.integers(10**9)}", {}

    def step(self, action):
        right = action == "cab"
        return str(self.np_random.integers(10**9)), float(right), right, False, {}


gymnasium.register("Riddle-v0", Riddle)
gymnasium.register("Drive-v0", lambda: gymnasium.make("Pendulum-v1").unwrapped)


def started(id: str, row=None, *, seed: int = 3, **arguments) -> tuple[Gymnasium, str]:
    environment = Gymnasium(id, **arguments)
    environment.random = Random(seed)
    opening = environment.start(row or {})
    environment.random.seed(seed + 100)
    return environment, opening


def say(environment: Gymnasium, text: str, turn: int = 1) -> Turn:
    return environment.respond(Message(text, turn, []))


def lake(**arguments) -> tuple[Gymnasium, str]:
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
    environment, opening = started("Riddle-v0")
    assert "Which word? " in opening
    assert "observation:" not in opening
    assert say(environment, "dog").observation.startswith("error: ")  # no text of the space
    assert say(environment, "abc", 2).reward == 0.0
    last = say(environment, "cab", 3)
    assert (last.done, last.reward) == (True, 1.0)


def test_a_group_opens_alike_and_its_responses_go_on_by_their_own_random_numbers():
    (first, one), (second, other) = started("Riddle-v0"), started("Riddle-v0")
    second.random.seed(7)
    assert one == other
    assert say(first, "abc") != say(second, "abc")
    third, _ = started("Riddle-v0")
    fourth, _ = started("Riddle-v0")
    assert say(third, "abc") == say(fourth, "abc")
    assert say(third, "bca", 2) == say(fourth, "bca", 2)


def test_the_seed_of_a_row_counts():
    assert started("Riddle-v0", {"seed": 5}, seed=1)[1] == started("Riddle-v0", {"seed": 5}, seed=2)[1]
    assert started("Riddle-v0", seed=1)[1] != started("Riddle-v0", seed=2)[1]


def test_tuples_and_arrays_are_read_as_json():
    _, opening = started("Blackjack-v1", actions=("stick", "hit"))
    assert opening.splitlines()[-1].startswith("observation: [")


def test_what_cannot_be_played_is_refused_when_it_is_made():
    with pytest.raises(ValueError, match="there are 4 actions; name each of them"):
        Gymnasium("FrozenLake-v1", actions=("left", "right"))
    with pytest.raises(TypeError, match="neither numbers nor texts"):
        Gymnasium("Drive-v0")
    with pytest.raises(gymnasium.error.NameNotFound):
        Gymnasium("FrozenLak-v1")
