"""Loading of an environment and of tools by name. Imports no heavy library."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ConfigDict, validate_call

from llmrl.environments.environment import Environment
from llmrl.messages import class_and_message
from llmrl.rewards.loading import bind_arguments
from llmrl.user_code import UserCodeError, code_digests, describe_exception, is_given, load_object

ENVIRONMENT = "environment"
"""The role of an environment in errors."""


@dataclass(frozen=True)
class Code:
    """What a host runs, by its names in the recipe."""

    name: str | None
    """Class of the environment; None: `Environment` itself, where the actor has tools and no environment."""
    arguments: Mapping[str, Any]
    """Arguments of the class."""
    tools: Sequence[str]


@dataclass(frozen=True)
class Loaded:
    """Code that has been loaded."""

    make: Callable[[], Environment]
    """Makes the environment of an episode."""
    tools: Mapping[str, Callable[..., Any]]
    """Functions by the names by which the actor calls them. A call checks its arguments: `pydantic.ValidationError`."""
    digests: dict[str, dict[Path, str | None]]
    """Digests of the files of each, by its name in the recipe."""


def load_code(code: Code) -> Loaded:
    """Loads an environment and its tools.

    Raises:
        UserCodeError: One of them is missing, does not load, or cannot be used.
    """
    make = Environment if code.name is None else load_environment(code.name, code.arguments)
    functions = {name: _load_function(name) for name in code.tools}
    digests = {name: code_digests(function) for name, function in functions.items()}
    if code.name is not None:
        digests[code.name] = code_digests(make)
    return Loaded(make, _by_attribute(functions), digests)


def load_environment(name: str, arguments: Mapping[str, Any]) -> Callable[[], Environment]:
    """What makes an environment: a class with its arguments filled in. One that is handed over in Python may also be a
    function that makes it. One is made here, so that what its arguments have wrong shows before a model loads."""
    made = load_object(name, role=ENVIRONMENT)
    if inspect.isclass(made):
        _check_class(name, made)
    elif not (is_given(name) and callable(made)):
        raise UserCodeError(
            f"{ENVIRONMENT} {name} is no class but {type(made).__name__}; name one that derives from llmrl.Environment"
        )
    bound = bind_arguments(made, arguments, role=ENVIRONMENT)
    try:
        inspect.signature(bound).bind()
    except TypeError as error:
        raise UserCodeError(
            f"{ENVIRONMENT} {name}: {error}; set it in environment.arguments, or give it a default"
        ) from error
    try:
        first = bound()
    except (Exception, SystemExit) as error:
        raise UserCodeError(f"{ENVIRONMENT} {name}: making one {describe_exception(made, error)}") from error
    if "random" in getattr(first, "__dict__", {}):
        raise UserCodeError(
            f"{ENVIRONMENT} {name} reads self.random in __init__, where every episode would draw the same; draw in "
            "start"
        )
    return bound


def _check_class(name: str, made: type) -> None:
    if not issubclass(made, Environment):
        raise UserCodeError(
            f"{ENVIRONMENT} {name} does not derive from llmrl.Environment; "
            f"write class {made.__name__}(llmrl.Environment)"
        )
    if made.respond is Environment.respond:
        raise UserCodeError(
            f"{ENVIRONMENT} {name} has no method respond(self, message), which answers the actor; define it"
        )


def _load_function(name: str) -> Callable[..., Any]:
    function = load_object(name, role="tool")
    if not inspect.isroutine(function):
        raise UserCodeError(
            f"tool {name} is no function but {type(function).__name__}; wrap what it does in a function"
        )
    return function


def _by_attribute(functions: Mapping[str, Callable[..., Any]]) -> dict[str, Callable[..., Any]]:
    """The functions that check their arguments, by the last part of their names."""
    checked: dict[str, Callable[..., Any]] = {}
    for name, function in functions.items():
        attribute = name.rpartition(":")[2]
        if attribute in checked:
            raise UserCodeError(
                f"tool {name}: two tools are called {attribute!r}, and the actor calls them by that; rename one"
            )
        try:
            checked[attribute] = validate_call(config=ConfigDict(arbitrary_types_allowed=True))(function)
        except Exception as error:  # whatever the text of an annotation raises
            raise UserCodeError(f"tool {name}: its parameters cannot be read: {class_and_message(error)}") from error
    return checked
