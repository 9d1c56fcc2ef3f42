"""The base class, and what its methods return; that it is light to import is tested in test_serve.py."""

from dataclasses import FrozenInstanceError
from random import Random

import pytest

import llmrl
from llmrl.environments.environment import Environment, Message, Turn


def test_the_public_names_are_these():
    assert (llmrl.Environment, llmrl.Message, llmrl.Turn) == (Environment, Message, Turn)


def test_the_base_class_opens_with_the_prompt_and_ends_with_the_first_message():
    environment = Environment()
    message = Message("hi", 1, [{"role": "assistant", "content": "hi"}])
    assert environment.start({"prompt": "x"}) is None
    assert environment.respond(message) == Turn(observation=None, done=True, reward=0.0)
    assert environment.close() is None


def test_an_environment_can_be_tried_by_hand():
    class Dice(Environment):
        def start(self, row):
            self.thrown = self.random.randint(1, 6)
            return "go"

        def respond(self, message):
            return Turn(f"{self.random.randint(1, 6)} {message.text} {message.turn} {message.messages}")

    first, second = Dice(), Dice()
    first.start({})
    assert first.respond(Message("+2")).observation.endswith(" +2 1 []")
    second.start({})
    assert second.thrown == first.thrown == Random(0).randint(1, 6)


def test_a_turn_goes_on_without_reward_and_does_not_change():
    turn = Turn("go on")
    assert (turn.done, turn.reward) == (False, 0.0)
    with pytest.raises(FrozenInstanceError):
        turn.done = True  # type: ignore[misc]
