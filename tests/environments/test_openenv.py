"""Environments behind an OpenEnv server: against a client that a test plays, and against a real server."""

import time
from random import Random
from threading import Thread
from types import SimpleNamespace
from typing import Any

import pytest

from llmrl.environments.environment import Message, Turn


@pytest.fixture(autouse=True)
def library():
    return pytest.importorskip("openenv")


class Server:
    """A client whose server echoes the field ``message``."""

    def __init__(self) -> None:
        self.resets: list[dict[str, Any]] = []
        self.is_closed = False

    def reset(self, **arguments: Any) -> SimpleNamespace:
        self.resets.append(arguments)
        return SimpleNamespace(observation={"echo": "ready", "size": 0}, reward=None, done=False)

    def step(self, action: dict[str, Any]) -> SimpleNamespace:
        if "message" not in action:
            raise RuntimeError("Server error: Invalid message (code: VALIDATION_ERROR)")
        text = action["message"]
        if text == "crash":
            raise RuntimeError("Server error: broken (code: EXECUTION_ERROR)")
        return SimpleNamespace(observation={"echo": text, "size": len(text)}, reward=len(text), done=text == "bye")

    def close(self) -> None:
        self.is_closed = True


def to_server(url: str, **arguments: Any) -> Any:
    from llmrl.environments.openenv import OpenEnv

    return OpenEnv(url, **arguments)


def made(**arguments: Any) -> Any:
    environment = to_server("http://127.0.0.1:1", **arguments)
    environment.client = Server()
    environment.random = Random(1)
    return environment


def say(environment: Any, text: str) -> Turn:
    return environment.respond(Message(text, 1, []))


def test_texts_go_by_the_fields_that_are_named():
    environment = made(action="message", observation="echo", instructions="Say bye.")
    assert environment.start({}) == "Say bye.\nready"
    assert say(environment, "hi") == Turn("hi", False, 2.0)
    assert say(environment, "bye") == Turn("bye", True, 3.0)
    assert say(environment, "").observation == '""'  # an observation is never empty
    environment.close()
    assert environment.client.is_closed


def test_without_fields_both_are_json():
    environment = made()
    assert environment.start({}) == '{"echo": "ready", "size": 0}'
    assert say(environment, '{"message": "é"}').observation == '{"echo": "é", "size": 1}'


@pytest.mark.parametrize("text", ["hi", "[1]", '{"massage": 1}'])
def test_what_is_no_action_is_answered_with_the_error(text: str):
    turn = say(made(), text)
    assert turn.observation.startswith("error: ")
    assert (turn.done, turn.reward) == (False, 0.0)


def test_a_server_that_fails_is_no_answer():
    with pytest.raises(RuntimeError, match="broken"):
        say(made(action="message"), "crash")


def test_a_group_has_one_seed_and_a_row_further_arguments():
    one, other, third = made(), made(), made()
    one.start({"reset": {"level": 2}})
    other.start({"reset": None})
    third.start({"reset": {"seed": 5}})
    assert one.client.resets == [{"seed": other.client.resets[0]["seed"], "level": 2}]
    assert third.client.resets == [{"seed": 5}]


@pytest.mark.slow
def test_two_episodes_of_a_real_server():
    from openenv.core.env_server import Action, Environment, Observation, State, create_app

    uvicorn = pytest.importorskip("uvicorn")

    class Say(Action):
        message: str

    class Heard(Observation):
        echo: str

    class Echo(Environment):
        SUPPORTS_CONCURRENT_SESSIONS = True
        state = State()

        def reset(self, seed=None, episode_id=None, **_):
            self.heard = f"{seed}"
            return Heard(echo=self.heard)

        def step(self, action, **_):
            self.heard += action.message
            return Heard(echo=self.heard, reward=0.5, done=action.message == "!")

    server = uvicorn.Server(
        uvicorn.Config(create_app(Echo, Say, Heard, max_concurrent_envs=2), port=0, log_level="error")
    )
    Thread(target=server.run, daemon=True).start()
    while not server.started:
        time.sleep(0.01)
    url = f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    first, second = (to_server(url, action="message", observation="echo") for _ in range(2))
    first.random = second.random = Random(1)
    assert first.start({"reset": {"seed": 7}}) == "7"
    assert second.start({"reset": {"seed": 8}}) == "8"
    assert say(first, "a") == Turn("7a", False, 0.5)
    assert say(second, "!") == Turn("8!", True, 0.5)
    assert say(first, "b") == Turn("7ab", False, 0.5)
    first.close()
    second.close()
    server.should_exit = True
