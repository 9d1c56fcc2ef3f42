"""Environments of gymnasium whose observations are texts, or which print themselves."""

import json
import re
from collections.abc import Mapping, Sequence
from importlib import import_module
from typing import Any

try:
    import gymnasium
    from gymnasium.envs.registration import load_env_creator
    from gymnasium.spaces import Discrete, Text
    from gymnasium.utils.seeding import np_random
except ImportError as error:
    raise ImportError('gymnasium is not installed: pip install "llmrl[gymnasium]"') from error

from llmrl.environments.environment import Environment, Message, Turn

_HIGHLIGHTED = re.compile(r"\x1b\[[\d;]+m(.*?)\x1b\[0m")
"""What a terminal would show in colours."""


class Gymnasium(Environment):
    """An environment of gymnasium, whose actions are numbers, which may have names, or texts.

    The actor reads the observation and, where the environment prints itself (``render_mode="ansi"``), what it prints;
    coloured characters stand in brackets. The last action that a message names is taken; a message that names none is
    answered with those that there are, and no step is made. A class that derives from this one can read and write in
    other ways, by `action` and `text`.

    A row's column ``seed`` fixes how its episodes begin; without one, each group begins by its own random numbers. What
    follows is random for each response.

    Args:
        id: Name in gymnasium's registry, such as ``FrozenLake-v1``; in ``module:name`` the module is imported first.
        options: Further arguments of ``gymnasium.make``.
        actions: Names of the actions, in the order of their numbers.
        instructions: What the actor reads before anything else.
    """

    def __init__(
        self, id: str, options: Mapping[str, Any] = {}, actions: Sequence[str] = (), instructions: str = ""
    ) -> None:
        self.environment: gymnasium.Env[Any, Any] = gymnasium.make(id, **{**_printing(id), **options})
        space = self.environment.action_space
        self.numbers = _numbers(space, actions) if isinstance(space, Discrete) else {}
        self.instructions = instructions
        if not self.numbers and not isinstance(space, Text):
            raise TypeError(
                f"{id} takes actions of {space}, which are neither numbers nor texts; wrap it in one that takes these"
            )

    def start(self, row: Mapping[str, Any]) -> str:
        """The instructions, the actions, and the first observation."""
        seed = row.get("seed")
        observation, _ = self.environment.reset(seed=self.random.getrandbits(31) if seed is None else seed)
        spaces = f"Observations are of {self.environment.observation_space}. Answer with one action: {self._actions()}."
        return "\n".join(part for part in (self.instructions, spaces, self.text(observation)) if part)

    def respond(self, message: Message) -> Turn:
        """The next observation."""
        if message.turn == 1:
            self.environment.unwrapped.np_random, _ = np_random(self.random.getrandbits(31))
        action = self.action(message.text)
        if action is None:
            return Turn(f"error: the message names no action; write one of {self._actions()}")
        observation, reward, terminated, truncated, _ = self.environment.step(action)
        return Turn(self.text(observation), bool(terminated or truncated), float(reward))

    def close(self) -> None:
        """Ends the environment."""
        self.environment.close()

    def action(self, text: str) -> Any:
        """The action that a message names; None where it names none."""
        if not self.numbers:
            return text if self.environment.action_space.contains(text) else None
        pattern = "|".join(rf"(?<![\w.-]){re.escape(name)}(?![\w-]|\.\d)" for name in self.numbers)
        named = re.findall(pattern, text.lower())
        return self.numbers[named[-1]] if named else None

    def text(self, observation: Any) -> str:
        """An observation as the actor reads it."""
        read = observation if isinstance(observation, str) else f"observation: {_data(observation)}"
        if self.environment.render_mode != "ansi":
            return read
        printed = _HIGHLIGHTED.sub(r"[\1]", str(self.environment.render()))
        return f"{read}\n{printed.strip()}"

    def _actions(self) -> str:
        return ", ".join(self.numbers) if self.numbers else f"a text of {self.environment.action_space}"


def _printing(id: str) -> dict[str, str]:
    """The argument by which an environment prints itself, where it can."""
    module, _, name = id.rpartition(":")
    if module:
        import_module(module)  # which registers it
    entry_point = gymnasium.spec(name).entry_point
    creator = load_env_creator(entry_point) if isinstance(entry_point, str) else entry_point
    return {"render_mode": "ansi"} if "ansi" in getattr(creator, "metadata", {}).get("render_modes", ()) else {}


def _numbers(space: Discrete, names: Sequence[str]) -> dict[str, int]:
    """Actions by what the actor calls them: their names, or else their numbers."""
    first, count = int(space.start), int(space.n)
    if names and len({name.lower() for name in names}) != count:
        raise ValueError(f"actions has the names {', '.join(names)}, and there are {count} actions; name each of them")
    known = [name.lower() for name in names] or [str(number) for number in range(first, first + count)]
    return dict(zip(known, range(first, first + count), strict=True))


def _data(observation: Any) -> str:
    """Numbers, arrays, and tuples and dicts of them, as JSON."""
    return json.dumps(observation, default=lambda value: value.tolist())
