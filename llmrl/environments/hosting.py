"""`Host`: where environments run, many episodes at once, and what comes back from them."""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from llmrl.environments.calls import ToolCall
from llmrl.environments.environment import Message, Opening, Turn

START, RESPOND, CLOSE = "start", "respond", "close"
"""Names by which failures of an environment's methods are counted; those of a tool have its name."""
PROCESS = "process"
"""Failures that are none of an environment: its process could not be started, or the one that starts them ended."""


@dataclass(frozen=True)
class Failure:
    """Why an episode brings no score."""

    name: str
    """What failed: ``start``, ``respond``, ``close``, the name of a tool, or ``process``."""
    what: str
    """One line, such as ``raised KeyError: 'x' at guess.py:3`` or ``took longer than 60 s``."""

    @property
    def kind(self) -> tuple[str, str]:
        """What failed, and the class of the exception or else the first word of `what`, such as ``took``."""
        verb, *rest = self.what.split()
        return self.name, rest[0].rstrip(":") if verb == "raised" and rest else verb


@dataclass(frozen=True)
class ToolResult:
    """What the actor reads after a call of a tool."""

    text: str
    is_bad: bool
    """Whether the call was the actor's mistake, and the text says which."""


Answer = Opening | Turn | list[ToolResult] | float | Failure
"""To `Host.open` an `Opening`, to `respond` a `Turn`, to `call` a result for each call, to `close` a reward, which is 0
where the environment gives none; to any of them a `Failure`."""


@runtime_checkable
class Host(Protocol):
    """Runs episodes side by side. A request returns at once; its answer comes from `wait`, and before it the same
    episode gets no other request. An episode that has failed answers its failure to every further one."""

    @property
    def code(self) -> Mapping[str, Mapping[Path, str | None]]:
        """Digests of the files of the environment and of each tool, by their names in the recipe, as they were
        loaded."""
        ...

    def load(self) -> None:
        """Loads the environment and the tools.

        Raises:
            UserCodeError: One of them is missing, does not load, or cannot be used.
        """
        ...

    def open(self, number: int, row: Mapping[str, Any], *, opening_seed: int, seed: int) -> None:
        """Begins the episode of response `number` with its environment's `start`.

        Args:
            number: Number of the response; no other open episode has it.
            row: Its data row.
            opening_seed: Seed of the environment's random numbers in `start`.
            seed: Their seed afterwards.
        """
        ...

    def respond(self, number: int, message: Message) -> None:
        """Asks the environment for its turn after a message."""
        ...

    def call(self, number: int, calls: Sequence[ToolCall]) -> None:
        """Has tools called, one after another."""
        ...

    def close(self, number: int) -> None:
        """Asks for the reward of the episode and ends it; once this is answered the number is free again."""
        ...

    def wait(self, numbers: Collection[int], look: Callable[[], None]) -> dict[int, Answer]:
        """The answer of each of these episodes to its last request, once all have come.

        Args:
            numbers: Numbers of open episodes.
            look: Called several times a second; an exception of it ends the wait.
        """
        ...

    def end(self) -> None:
        """Ends whatever is open, at once and unasked; further episodes can be opened."""
        ...
