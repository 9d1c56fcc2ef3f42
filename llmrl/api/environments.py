"""Environments and tools that a program hands over, as the section of a recipe."""

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

from llmrl.api.given import Given
from llmrl.environments.environment import Environment
from llmrl.settings import SettingError

Playing: TypeAlias = type[Environment] | Callable[[], Environment] | str
"""A class, also by its name ``file.py:Class``; or a function that makes the environment of an episode."""
Tools: TypeAlias = Sequence[Callable[..., Any] | str]
"""Functions, also by their names ``file.py:function``."""


def environment_section(environment: Playing | None, tools: Tools, given: Given) -> dict[str, Any]:
    """Section `environment` of a recipe; empty where there is neither an environment nor a tool.

    Raises:
        SettingError: They are neither code nor names of code.
    """
    if isinstance(tools, str) or not isinstance(tools, Sequence):
        raise SettingError(f"tools is a {type(tools).__name__}; hand over a list of functions, such as tools=[search]")
    section: dict[str, Any] = {}
    if environment is not None:
        section["name"] = _code(environment, "environment", "its class, which is made anew for each episode", given)
    if tools:
        section["tools"] = [_code(tool, "tools", "functions", given) for tool in tools]
    return {"environment": section} if section else {}


def _code(code: Any, argument: str, way_out: str, given: Given) -> str:
    if isinstance(code, str):
        return code
    if not callable(code):
        raise SettingError(f"{argument} has a {type(code).__name__}, which cannot be called; hand over {way_out}")
    return given.code(code)
