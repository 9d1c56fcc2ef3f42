"""Calls of tools that an actor wrote."""

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class ToolCall:
    """One call of a tool, as the actor wrote it."""

    name: str
    arguments: dict[str, Any] = field(default_factory=dict)
    id: str | None = None
    """The actor's name for the call, where its format has one."""
    problem: str | None = None
    """Why the text of the call could not be read; None if it could."""
