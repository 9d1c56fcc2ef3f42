"""`Environment`, the base class of what answers an actor, and what its methods take and return.

Imports no heavy library: the processes in which environments run start with this.
"""

from collections.abc import Awaitable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from random import Random
from typing import Any


@dataclass(frozen=True)
class Turn:
    """What an environment answers to a message of the actor."""

    observation: str | list[dict[str, Any]] | None = None
    """What the actor reads next: a text, which is a message of the user, or messages. None: only where `done`."""
    done: bool = False
    """Whether the episode ends here; an observation is then not read."""
    reward: float = 0.0
    """Reward of the actor's message."""


@dataclass(frozen=True)
class Message:
    """What the actor wrote in one of its turns."""

    text: str
    """Its text, without special tokens."""
    turn: int = 1
    """Number of the turn in the episode, from 1."""
    messages: list[dict[str, Any]] = field(default_factory=list)
    """The conversation so far, this message included."""


Opening = str | list[dict[str, Any]] | None
"""What the actor reads first; None: the prompt of its row."""
Reply = Turn | str | list[dict[str, Any]]
"""What an environment answers; a text or messages mean ``Turn(observation)``."""


class Environment:
    """Answers the actor, one object an episode. A subclass defines `respond`, and the other methods if it needs them:

        class Guess(llmrl.Environment):
            def start(self, row):
                self.secret = self.random.randint(1, 64)
                return "I think of a number from 1 to 64. Which one?"

            def respond(self, message):
                guess = int(message.text)
                if guess == self.secret:
                    return llmrl.Turn(done=True, reward=1.0)
                return "higher" if guess < self.secret else "lower"

    ``__init__`` gets the arguments that the recipe sets, by name. A first object is made, and not used, before a model
    loads, so that wrong arguments show. Each method may be ``async``. An exception, a call that exceeds its time limit,
    the end of the process and an answer of another type leave the response unscored.
    """

    @cached_property
    def random(self) -> Random:
        """Random numbers of the episode: the same for a whole group of responses in `start`, other ones for each
        response afterwards. A run that is repeated or resumed gets the same again. ``__init__`` must draw none.

        An object that no run has made has those of the seed 0.
        """
        return Random(0)

    def start(self, row: Mapping[str, Any]) -> Opening | Awaitable[Opening]:
        """What the actor reads first: a text, messages, or None, which is the prompt of the row.

        Args:
            row: The data row, every column by its name.
        """
        return None

    def respond(self, message: Message) -> Reply | Awaitable[Reply]:
        """What the actor reads after one of its messages that calls no tool, and the message's reward.

        The one of this class ends the episode.
        """
        return Turn(done=True)

    def close(self) -> float | Awaitable[float | None] | None:
        """Called once at the end of an episode that has been started, whatever ends it, unless its process was ended.

        A number is the reward of the whole episode, which is added to those of its turns.
        """
        return None
