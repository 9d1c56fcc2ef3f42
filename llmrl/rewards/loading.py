"""Loading of reward functions by name, with checks of whatever can be wrong before a model loads."""

import inspect
from collections.abc import Callable, Iterable, Mapping
from copy import deepcopy
from functools import partial
from typing import Any

from pydantic import PydanticUserError, TypeAdapter, ValidationError

from llmrl.messages import class_and_message, nearest
from llmrl.rewards.config import AMBIGUOUS_COLUMNS, ROLLOUT_COLUMNS, RewardConfig
from llmrl.user_code import UserCodeError, load_object, name_of

Function = Callable[..., Any]


def load_function(name: str) -> Function:
    """The function that ``path/to/file.py:function`` or ``package.module:function`` names.

    A file is found from the current folder and runs once, as an imported module does.
    """
    function = load_object(name, role="reward function")
    attribute = name.rpartition(":")[2]
    if not callable(function):
        raise UserCodeError(f"reward function {name}: {attribute!r} is not a function but {type(function).__name__}")
    if problem := _signature_problem(function):
        raise UserCodeError(f"reward function {name}: {attribute!r} {problem}")
    return function


def bind_arguments(function: Function, arguments: Mapping[str, Any], *, role: str = "reward function") -> Function:
    """The function with extra keyword arguments filled in, each read as the type that its parameter is annotated with;
    errors call it by its role.

    So a parameter ``pattern: re.Pattern[str]`` gets a compiled pattern, and a text that is none is refused here.
    """
    if not arguments:
        return function
    known = _keyword_parameters(function)
    bound = {}
    for name, value in arguments.items():
        if name not in known and not _takes_any(function):
            raise UserCodeError(
                f"{role} {name_of(function)} has no parameter {name!r} for its argument{nearest(name, known)}"
            )
        annotation = _annotation(function, name, role) if name in known else Any
        bound[name] = _read_argument(function, name, value, annotation, role)
    return partial(function, **bound)


def check_columns(function: Function, columns: Iterable[str]) -> None:
    """Raises `UserCodeError` when a function needs something that is neither of the rollout nor a data column, or
    that could be either."""
    columns = list(columns)
    known = list(dict.fromkeys([*ROLLOUT_COLUMNS, *columns]))
    for name in AMBIGUOUS_COLUMNS:
        if name in columns and name in _keyword_parameters(function):
            raise UserCodeError(
                f"reward function {name_of(function)} takes {name!r}, which comes from the rollout, and the data has a "
                f"column {name!r} too; rename the column, such as by data.rename_columns={{{name}: my_{name}}}"
            )
    for name in _required(function):
        if name not in known:
            raise UserCodeError(
                f"reward function {name_of(function)} needs {name!r}, and there is no such column; "
                f"there are {', '.join(known)}{nearest(name, known)}; or set it under the function's arguments"
            )


def required_columns(config: RewardConfig, functions: Iterable[Function]) -> dict[str, str]:
    """Every data column that a function cannot do without, and the name of that function."""
    return {
        column: setting.name
        for setting, function in zip(config.functions, functions, strict=True)
        for column in _required(function)
        if column not in ROLLOUT_COLUMNS
    }


def row_problem(row: Mapping[str, Any], required: Mapping[str, str]) -> str | None:
    """Why no response to a row can be scored by the functions of `required_columns`; None if it can."""
    missing = [f"no column {column!r}, which {name} reads" for column, name in required.items() if column not in row]
    return "; ".join(missing) or None


def select_columns(function: Function, columns: Mapping[str, list[Any]]) -> dict[str, list[Any]]:
    """A copy of each column that a function takes: those that its signature names, or all with ``**kwargs``.

    What the function does to an entry of one, such as to append to a row's messages, changes no other entry, though the
    responses to a prompt share its row. An argument that is filled in already stays, though a column has the same name.
    """
    return {name: [deepcopy(value) for value in column] for name, column in columns.items() if takes(function, name)}


def takes(function: Function, column: str) -> bool:
    """Whether a function gets a column: its signature names it, and no argument fills it in; or it has ``**kwargs``."""
    filled = function.keywords if isinstance(function, partial) else {}
    return column not in filled and (_takes_any(function) or column in _keyword_parameters(function))


def _signature_problem(function: Function) -> str | None:
    """Why columns cannot be handed to a function by their names; None if they can."""
    if inspect.isclass(function):
        return "is a class, whose call makes an object; make one in the file, such as judge = Judge(), and name that"
    try:
        parameters = inspect.signature(function).parameters.values()
    except (ValueError, TypeError) as error:
        return f"has no signature that can be read ({error}); wrap it in a function, such as def score(responses)"
    unnamed = [p.name for p in parameters if p.kind is p.POSITIONAL_ONLY and p.default is p.empty]
    return f"takes {unnamed[0]!r} by its position only, and it is handed over by its name" if unnamed else None


def _annotation(function: Function, name: str, role: str) -> Any:
    try:
        return inspect.signature(function, eval_str=True).parameters[name].annotation
    except Exception as error:  # whatever the text of an annotation raises
        raise UserCodeError(
            f"{role} {name_of(function)}: its annotations cannot be read: {class_and_message(error)}; "
            "import what they name"
        ) from error


def _read_argument(function: Function, name: str, value: Any, annotation: Any, role: str) -> Any:
    if annotation is inspect.Parameter.empty:
        return value
    try:
        return TypeAdapter(annotation).validate_python(value)
    except ValidationError as error:
        rule = error.errors()[0]["msg"]
        raise UserCodeError(f"{role} {name_of(function)}: argument {name} ({value!r}): {rule}") from error
    except PydanticUserError as error:
        kind = inspect.formatannotation(annotation)
        raise UserCodeError(
            f"{role} {name_of(function)}: argument {name} ({value!r}) cannot be made {kind}; "
            "annotate the parameter with a plain type, or leave its annotation out"
        ) from error


def _keyword_parameters(function: Function) -> dict[str, inspect.Parameter]:
    parameters = inspect.signature(function).parameters.items()
    return {name: p for name, p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}


def takes_rollout(function: Function) -> bool:
    """Whether a function is a `RewardFunction` of `llmrl.roles`: it takes a rollout, and no columns."""
    return [name for name in _keyword_parameters(function) if takes(function, name)] == ["rollout"]


def _required(function: Function) -> list[str]:
    if takes_rollout(function):
        return []
    return [name for name, p in _keyword_parameters(function).items() if p.default is p.empty]


def _takes_any(function: Function) -> bool:
    return any(p.kind is p.VAR_KEYWORD for p in inspect.signature(function).parameters.values())
