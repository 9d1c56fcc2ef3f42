"""A call of a tool, as the actor wrote it."""

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class ToolCall:
    """One call of a tool in a message of the actor."""

    name: str
    """Name of the tool; empty where the message names none."""
    arguments: dict[str, Any] = field(default_factory=dict)
    """Arguments by name."""
    id: str | None = None
    """What the result refers to, in templates that ask for it."""
    problem: str | None = None
    """Why it could not be read, if it could not: the actor gets this as its result."""
