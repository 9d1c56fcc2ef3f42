"""Settings of environments and tools."""

from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from llmrl.paths import UserPath
from llmrl.section import Bound, Section
from llmrl.user_code import names_code


@dataclass(frozen=True, kw_only=True)
class EnvironmentConfig(Section, place="environment"):
    """What answers the actor, so that a response has several turns."""

    name: UserPath | None = None
    """A subclass of `llmrl.Environment`, ``path/to/file.py:Class`` or ``package.module:Class``. null: the prompt of
    the row opens an episode, and its first message without a call of a tool ends it."""
    arguments: dict[str, Any] = field(default_factory=dict)
    """Keyword arguments with which the class is made."""
    tools: tuple[UserPath, ...] = ()
    """Functions that the actor can call, ``path/to/file.py:function``: with type hints, and a docstring that the chat
    template shows."""
    tool_format: Literal["auto", "hermes", "llama3", "mistral", "python"] = "auto"
    """How the model writes calls; `auto` reads it from the tokenizer."""
    max_turns: Annotated[int, Bound(least=1)] = 8
    """Turns of the actor in an episode."""
    max_turn_tokens: Annotated[int | None, Bound(least=1)] = None
    """Length limit of a turn, EOS included; a turn that it truncates ends the episode. null: that of the response."""
    timeout_s: Annotated[float, Bound(above=0)] = 60.0
    """Time limit of each call of the environment or of a tool, in seconds."""
    history: Literal["refuse", "branch", "keep"] = "refuse"
    """Where the chat template writes earlier turns differently once a conversation goes on, as those do that leave
    earlier reasoning out: `refuse` ends before training, `branch` has the actor read the rewritten conversation, as a
    training sequence of its own, `keep` has it read on what it wrote."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.name is None and not self.tools:
            raise ValueError(
                "environment names neither a class (environment.name) nor tools (environment.tools); name one, or "
                "leave the section out"
            )
        for setting, name in [("name", self.name), *((f"tools.{n}", tool) for n, tool in enumerate(self.tools))]:
            if name is not None and not names_code(name):
                raise ValueError(
                    f"environment.{setting} ({name!r}) must be path/to/file.py:name or package.module:name"
                )
        if self.name is None and self.arguments:
            raise ValueError("environment.arguments are those of environment.name, which is null; name a class")
