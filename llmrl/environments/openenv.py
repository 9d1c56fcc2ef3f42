"""Environments that a server of OpenEnv runs."""

import json
from collections.abc import Mapping
from typing import Any

try:
    from openenv.core import GenericEnvClient
except ImportError as error:
    raise ImportError('openenv is not installed: pip install "llmrl[openenv]"') from error

from llmrl.environments.environment import Environment, Message, Turn

_NO_LIMIT_S = 1e6
"""Time limit of the client; environment.timeout_s is the one that counts."""


class OpenEnv(Environment):
    """An environment behind an OpenEnv server. Each episode is a session there, so the server must allow as many at
    once as a rollout has responses.

    A message that is no action, by itself or as the server says, is answered with the error. A class that derives from
    this one can read and write in other ways, by `action` and `text`.

    Each group begins by a seed of its own, where the environment's ``reset`` takes one. A row's column ``reset`` holds
    further arguments of it, or another seed.

    Args:
        url: Address of the server, such as ``http://localhost:8000``.
        action: Field of the action that is the text of a message. null: the text is the action, an object in JSON.
        observation: Field of the observation that the actor reads. null: all of it, in JSON.
        instructions: What the actor reads before anything else.
    """

    def __init__(
        self, url: str, action: str | None = None, observation: str | None = None, instructions: str = ""
    ) -> None:
        # a thread of the client's own answers the pings of the server while the actor writes
        self.client = GenericEnvClient(base_url=url, message_timeout_s=_NO_LIMIT_S).sync()
        self.action_field = action
        self.observation_field = observation
        self.instructions = instructions

    def start(self, row: Mapping[str, Any]) -> str:
        """The instructions and the first observation."""
        arguments = {"seed": self.random.getrandbits(31), **(row.get("reset") or {})}
        observation = self.text(self.client.reset(**arguments).observation)
        return "\n".join(part for part in (self.instructions, observation) if part)

    def respond(self, message: Message) -> Turn:
        """The next observation."""
        try:
            result = self.client.step(self.action(message.text))
        except ValueError as error:
            return Turn(f"error: {error}")
        except RuntimeError as error:
            if "VALIDATION_ERROR" not in str(error):
                raise
            return Turn(f"error: {error}")
        return Turn(self.text(result.observation), bool(result.done), float(result.reward or 0.0))

    def close(self) -> None:
        """Ends the session."""
        self.client.close()

    def action(self, text: str) -> dict[str, Any]:
        """The action that a message is.

        Raises:
            ValueError: It is none, with what the actor reads.
        """
        if self.action_field is not None:
            return {self.action_field: text}
        action = json.loads(text)
        if not isinstance(action, dict):
            raise ValueError("an action is an object in JSON")
        return action

    def text(self, observation: Mapping[str, Any]) -> str:
        """An observation as the actor reads it."""
        read = observation if self.observation_field is None else observation[self.observation_field]
        return read if isinstance(read, str) and read else json.dumps(read, ensure_ascii=False)
