"""Recipes: YAML files and dotted overrides, read into the frozen dataclasses that hold every setting and its default.

OmegaConf reads and interpolates, pydantic checks types strictly. Whatever is wrong becomes one `SettingError` that
names the path of each setting, its value, the rule and the way out.

An override means what the shell hands over. The type of the setting says how that is read:

    text, path, choice     the text itself, character by character, quotes included; null where the setting may be null
    number                 decimal: 1e-5, .5, 1_000, 007; or null
    all else               YAML: true, [a, b], {path: x}, null
    argument of a reward   a number, true, false, null, a text in quotes, [a, b] or {a: b}; any other text as it is

In every text ``${a.b}`` is the value of another setting, as in a recipe, and ``\\${`` stands for the characters ``${``.
"""

import ast
import copy
import difflib
import inspect
import json
import math
import os
import re
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import MISSING, Field, fields, is_dataclass
from fnmatch import fnmatchcase
from itertools import pairwise
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, NamedTuple, TypeGuard, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import (
    GrammarParseError,
    InterpolationKeyError,
    OmegaConfBaseException,
    UnsupportedInterpolationType,
)
from pydantic import TypeAdapter, ValidationError

from llmrl.errors import Error
from llmrl.paths import UserPath
from llmrl.secrets import remember_from_environment, remember_settings
from llmrl.section import Bound, Like, bounds, likes

T = TypeVar("T")


MAX_BYTES = 1_000_000
"""Bytes of the longest recipe."""
MAX_NODES = 100_000
"""Values of the longest recipe, those that aliases stand for included."""


class SettingError(Error, ValueError):
    """A recipe or an override that cannot be used; the message is meant for the person who wrote it."""


class Setting(NamedTuple):
    """One setting as a listing shows it."""

    path: str
    """Dotted; ``<n>`` stands for the index in a list, ``<name>`` for the key of a mapping."""
    type: str
    """Type with its bounds, as in "whole number, at least 1"."""
    default: str
    """Default as a recipe writes it, or "required"; empty for a section whose settings have defaults of their own."""
    help: str


def read_recipe(cls: type[T], path: Path, overrides: Sequence[str]) -> T:
    """The run that a recipe describes.

    Args:
        cls: Frozen dataclass of frozen dataclasses, tuples and dicts of them, ``X | None``, ``Literal`` and scalars.
            Its ``moved``, if it has one, says of each setting that is gone, by its dotted path, what to write now, and
            its ``elsewhere`` what the names of other frameworks are here.
        path: YAML file; OmegaConf's interpolation ``${a.b}`` is resolved after the overrides.
        overrides: ``a.b=value``, read by the type of the setting; list items by index, as in
            ``reward.functions.0.weight=2``.

    Raises:
        SettingError: The file, an override or a setting cannot be used. All bad settings are in one message.
    """
    return read_either([cls], path, overrides)


def read_either(classes: Sequence[type[T]], path: Path, overrides: Sequence[str]) -> T:
    """The run that a recipe describes, of the class that knows most of the names in it.

    Where several know as many, it is the first that takes the settings.
    """
    settings = _resolved(classes, path, overrides)
    remember_settings(settings)
    num_unknown = [len(_all_unknown_names(cls, settings)) for cls in classes]
    fitting = [cls for cls, number in zip(classes, num_unknown, strict=True) if number == min(num_unknown)]
    refusals = []
    for cls in fitting:
        try:
            return _validated(cls, path, settings)
        except SettingError as error:
            refusals.append(error)
    raise refusals[0]


def compose(cls: type[T], given: Mapping[str, Any], settings: Mapping[str, Any]) -> T:
    """The run that settings in Python describe, with the checks and the messages of a recipe.

    Args:
        cls: As for `read_recipe`.
        given: Sections of a recipe, made from the arguments of a function.
        settings: Values by dotted name, laid over these; a text stands for itself, ``${`` included.

    Raises:
        SettingError: A setting cannot be used, or an argument gives it already. All bad settings are in one message.
    """
    tree = _as_json(given, ())
    for name, value in settings.items():
        _put(tree, name, _as_json(value, (name,)))
    remember_settings(tree)
    return _validated(cls, Path("settings"), tree)


def owner(classes: Mapping[str, type], path: Path) -> str | None:
    """The name of the only class that knows every name in a recipe, overrides left aside; None if there is no such."""
    settings = OmegaConf.to_container(_load(path))
    fitting = [name for name, cls in classes.items() if not _all_unknown_names(cls, settings)]
    return fitting[0] if len(fitting) == 1 else None


def unknown_names(cls: type, path: Path) -> list[str]:
    """The settings of a recipe that a class does not have, by their dotted names, overrides left aside."""
    return [problem.partition(" ")[0] for problem in _all_unknown_names(cls, OmegaConf.to_container(_load(path)))]


def to_dict(config: Any) -> dict[str, Any]:
    """Every setting resolved, as JSON has it: lists for tuples, text for paths."""
    return _jsonable(config)


def to_yaml(config: Any) -> str:
    """Every setting resolved, as a recipe that reads back to an equal config."""
    return OmegaConf.to_yaml(OmegaConf.create(_escape(to_dict(config))))


def describe(cls: type) -> Iterator[Setting]:
    """Every setting with its type, its default and the help under its field, each section before what is in it."""
    return _describe(cls, "", None)


def is_unicode(text: str) -> bool:
    """Whether a text of the command line was UTF-8: Python marks bytes that are not by lone surrogates."""
    return not any("\ud800" <= character <= "\udfff" for character in text)


# --- the file and the overrides ---------------------------------------------------------------------------------------


def _resolved(classes: Sequence[type], path: Path, overrides: Sequence[str]) -> Any:
    """Settings of the file with the overrides laid over them."""
    tree = _load(path)
    _override(tree, overrides, classes)
    _remember_environment(classes, OmegaConf.to_container(tree))
    try:
        return OmegaConf.to_container(tree, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        raise SettingError(f"{path}: {_refused(error)}") from error


def _remember_environment(classes: Sequence[type], value: Any, key: str = "") -> None:
    """Masks what ``${oc.env:NAME}`` stands for in a value, from now on; a choice of its setting is no secret."""
    match value:
        case dict() | list():
            for name, item in value.items() if isinstance(value, dict) else enumerate(value):
                _remember_environment(classes, item, f"{key}.{name}" if key else str(name))
        case str():
            for name in re.findall(r"\$\{oc\.env:\s*([^,}]+)", value):
                given = os.environ.get(name.strip(), "")
                if not any(given in _choices(member) for member in _members(_annotation(classes, key))):
                    remember_from_environment(given)


def _load(path: Path) -> DictConfig:
    text = _read(path)
    try:
        root = yaml.compose(text, yaml.SafeLoader)
        if _num_nodes(root, {}) > MAX_NODES:
            raise SettingError(f"{path} is not a recipe: its aliases stand for more than {MAX_NODES:,} values")
        is_mapping = isinstance(root, yaml.MappingNode | None)
        tree = OmegaConf.create(text if root is not None else {}) if is_mapping else None
    except yaml.YAMLError as error:
        raise SettingError(f"{path}{_yaml_problem(error)}") from error
    except OmegaConfBaseException as error:
        raise SettingError(f"{path}: {_refused(error)}") from error
    except RecursionError as error:
        raise SettingError(f"{path} is not a recipe: its lists and mappings are nested too deeply") from error
    except ValueError as error:  # of a number with thousands of digits
        raise SettingError(f"{path}: {_first_line(error)}") from error
    if not isinstance(tree, DictConfig):
        raise SettingError(f"{path} is not a recipe: write a mapping, with lines such as 'run: {{seed: 1}}'")
    return tree


def _read(path: Path) -> str:
    if path.is_dir():
        raise SettingError(f"{path} is a folder, not a recipe; name a YAML file{_nearest_file(path / 'recipe.yaml')}")
    if not path.exists():
        listed = "; `llmrl recipes` lists and prints those that come with llmrl"
        raise SettingError(f"there is no recipe {path}{_nearest_file(path) or listed}")
    try:
        with path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
        if len(content) > MAX_BYTES:
            raise SettingError(f"{path} is not a recipe: it is longer than {MAX_BYTES:,} bytes")
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise SettingError(f"{path} is not a recipe: it is no UTF-8 text, at byte {error.start}") from error
    except OSError as error:
        raise SettingError(f"{path} cannot be read: {error.strerror}") from error


def _num_nodes(node: yaml.Node | None, counted: dict[int, int]) -> int:
    """Values of a YAML document, those that an alias stands for each time that it does."""
    if node is None or id(node) in counted:
        return 0 if node is None else counted[id(node)]
    counted[id(node)] = 1
    children: list[yaml.Node] = []
    if isinstance(node, yaml.SequenceNode):
        children = node.value
    elif isinstance(node, yaml.MappingNode):
        children = [child for pair in node.value for child in pair]
    counted[id(node)] += sum(_num_nodes(child, counted) for child in children)
    return counted[id(node)]


def _nearest_file(path: Path) -> str:
    siblings = [sibling.name for sibling in path.parent.glob("*") if sibling.is_file()]
    nearest = difflib.get_close_matches(path.name, siblings, n=1)
    return f"; did you mean {path.with_name(nearest[0])}?" if nearest else ""


def _override(tree: DictConfig, overrides: Sequence[str], classes: Sequence[type]) -> None:
    """Writes the overrides into the tree."""
    for override in overrides:
        key, value = _parse(override, classes)
        _refuse_interpolated(tree, key, override)
        try:
            OmegaConf.update(tree, key, value)
        except ValueError as error:
            raise SettingError(
                f"override {override!r}: an item of a list is named by its number, as in reward.functions.0.weight=2"
            ) from error
        except (OmegaConfBaseException, TypeError) as error:
            raise SettingError(f"override {override!r}: {_first_line(error)}{_text_instead(error)}") from error


def _parse(override: str, classes: Sequence[type]) -> tuple[str, Any]:
    key, equals, text = override.partition("=")
    if not equals or not all(key.split(".")):
        raise SettingError(f"override {override!r} must be written key=value, such as run.seed=1")
    if not is_unicode(override):
        raise SettingError(f"override {override!r} is no UTF-8 text")
    if text == "???":
        raise SettingError(f"override {override!r}: ??? is the sign for a value that is missing; write another text")
    try:
        return key, _meant(text, _annotation(classes, key))
    except yaml.YAMLError as error:
        raise SettingError(f"override {override!r}: the value is not YAML; put it in quotes") from error


def _meant(text: str, annotation: Any) -> Any:
    """Value of the text after the equals sign of an override, for a setting of this type; see the top of the file."""
    members = _members(annotation)
    if all(_is_text(member) or member is NoneType for member in members):
        return None if text == "null" and NoneType in members else text
    is_plain = any(_is_text(member) or member in (int, float, Any) for member in members)
    return _literal(text) if is_plain else _yaml_value(text)


def _members(annotation: Any) -> tuple[Any, ...]:
    return get_args(annotation) if get_origin(annotation) in (Union, UnionType) else (annotation,)


def _choices(annotation: Any) -> tuple[Any, ...]:
    return get_args(annotation) if get_origin(annotation) is Literal else ()


def _is_text(annotation: Any) -> bool:
    if get_origin(annotation) is Literal:
        return all(isinstance(choice, str) for choice in get_args(annotation))
    return annotation in (str, Path, UserPath)


def _unquoted(text: str) -> str:
    """Text between the quotes of a line that is a quoted text of YAML as a whole; any other text as it is."""
    node = _node(text) if text[:1] in ("'", '"') and len(text.splitlines()) == 1 else None
    return node.value if isinstance(node, yaml.ScalarNode) else text


def _number(text: str) -> int | float | None:
    """A decimal number, as people write one, not as YAML 1.1 reads 010 or 1:30, or .inf; None for any other text."""
    if re.fullmatch(r"[-+]?\.(inf|Inf|INF)", text):
        return float(text.replace(".", ""))
    if re.match(r"[-+]?\.?[0-9]", text):
        for read in (int, float):
            with suppress(ValueError):
                return read(text)
    return None


def _literal(text: str) -> Any:
    """A number, true, false, null, a text in quotes, or a list or mapping in brackets; else the text as it is."""
    if (number := _number(text)) is not None:
        return number
    if text.lower() in ("true", "false", "null"):
        return _yaml_value(text)
    node = _node(text)
    is_meant = isinstance(node, yaml.CollectionNode) and node.flow_style
    return _yaml_value(text) if is_meant else _unquoted(text)


def _node(text: str) -> yaml.Node | None:
    """The node of YAML that a text is as a whole, comments excluded; None where there is no such."""
    try:
        node = yaml.compose(text, yaml.SafeLoader)
    except yaml.YAMLError:
        return None
    return node if node is not None and node.end_mark.index == len(text) else None


def _yaml_value(text: str) -> Any:
    parsed = OmegaConf.to_container(OmegaConf.from_dotlist([f"value={text}"]))
    assert isinstance(parsed, dict)
    return parsed["value"]


def _annotation(classes: Sequence[type], key: str) -> Any:
    """The type of the setting that a key names, by the first of the classes that has it; Any if none does."""
    names = re.sub(r"\[([^]]*)\]", r".\1", key).split(".")
    for cls in classes:
        annotation: Any = cls
        for name in names:
            annotation = _annotation_below(_not_null(annotation), name)
        if annotation is not None:
            return annotation
    return Any


def _annotation_below(annotation: Any, name: str) -> Any:
    """The type of what stands under a name, or at an index, in a value of a type; None where nothing can stand."""
    if _is_section(annotation):
        return _hints(annotation).get(name)
    if get_origin(annotation) in (dict, Mapping):
        return get_args(annotation)[1]
    if get_origin(annotation) is tuple:
        return get_args(annotation)[0]
    return Any if annotation is Any else None


def _refuse_interpolated(tree: DictConfig, key: str, override: str) -> None:
    """Below ``critic: ${model}`` there is only the model's section, and an override there would change both."""
    node: Any = OmegaConf.to_container(tree)
    sections = key.split(".")[:-1]
    for depth, name in enumerate(sections, 1):
        match node:
            case dict():
                node = node.get(name)
            case list() if name.isdecimal() and int(name) < len(node):
                node = node[int(name)]
        if isinstance(node, str) and "${" in node:
            raise SettingError(
                f"override {override!r}: {_dotted(*sections[:depth])} is {node}; override that section, "
                "or write this one out in the recipe"
            )


def _yaml_problem(error: yaml.YAMLError) -> str:
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark:
        return f", line {error.problem_mark.line + 1}: {error.problem}"
    return f": {_first_line(error)}"


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _refused(error: OmegaConfBaseException) -> str:
    return f"{error.full_key or 'a name'}: {_first_line(error)}{_text_instead(error)}"


def _text_instead(error: Exception) -> str:
    """The way out of a ``${`` that was meant as text."""
    is_interpolation = isinstance(error, InterpolationKeyError | UnsupportedInterpolationType | GrammarParseError)
    return "; ${a.b} is the value of the setting a.b, and \\${ stands for the characters ${" if is_interpolation else ""


# --- names, defaults and types ----------------------------------------------------------------------------------------

Place = tuple[str | int, ...]


def _validated(cls: type[T], path: Path, settings: Any) -> T:
    """The settings as the class has them, which `path` is named for in errors."""
    settings = copy.deepcopy(settings)
    _raise_any(path, _all_unknown_names(cls, settings))
    _raise_any(path, [f"{_dotted(*place)}: nan is no value of a setting" for place in _nans(settings)])
    for name, like in likes(cls).items():
        _inherit(cls, settings, name, like)
    for _, section, given in _sections(cls, settings):
        _fill(section, given)
    try:
        return TypeAdapter(cls).validate_json(json.dumps(settings, default=list), strict=True)
    except ValidationError as error:
        problems = _once([_problem(details) for details in error.errors()], likes(cls))
        raise SettingError(_message(path, problems)) from error


def _once(problems: list[str], likes: Mapping[str, Like]) -> list[str]:
    """The problems, without those that a section only took over from the section that it is like."""
    pairs = [(f"{name}.", f"{like.source}.") for name, like in likes.items()]
    return [
        problem
        for problem in problems
        if not any(problem.startswith(name) and problem.replace(name, source) in problems for name, source in pairs)
    ]


def _all_unknown_names(cls: type, settings: Any) -> list[str]:
    moved: Mapping[str, str] = getattr(cls, "moved", {})
    elsewhere: Mapping[str, str] = getattr(cls, "elsewhere", {})
    return [problem for place in _sections(cls, settings) for problem in _unknown_names(*place, moved, elsewhere)]


def _sections(annotation: Any, value: Any, path: Place = ()) -> Iterator[tuple[Place, type, dict[Any, Any]]]:
    """``(path, dataclass, mapping)`` of every section in the settings, outer ones first.

    A mapping may be added to while it is looked at: what is in it is visited after.
    """
    inner = _not_null(annotation)
    children: list[tuple[Any, Any]] = []
    match value:
        case dict() if _is_section(inner):
            yield path, inner, value
            children = [(name, hint) for name, hint in _hints(inner).items() if name in value]
        case dict() if get_origin(inner) in (dict, Mapping):
            children = [(key, get_args(inner)[1]) for key in value]
        case list() if get_origin(inner) is tuple:
            children = [(i, get_args(inner)[0]) for i in range(len(value))]
    for key, hint in children:
        yield from _sections(hint, value[key], (*path, key))


def _not_null(annotation: Any) -> Any:
    """X for ``X | None``, and every other annotation as it is."""
    members = [member for member in _members(annotation) if member is not NoneType]
    if len(members) > 1 and any(_is_section(member) for member in members):
        raise TypeError(f"{annotation} is a choice of sections, and no recipe says which")
    return members[0] if len(members) == 1 else annotation


def _is_section(annotation: Any) -> TypeGuard[type]:
    return isinstance(annotation, type) and is_dataclass(annotation)


def _hints(cls: type) -> dict[str, Any]:
    """The type of each field, without its marks."""
    hints = get_type_hints(cls, include_extras=True)
    return {field.name: _unmarked(hints[field.name]) for field in fields(cls)}


def _unmarked(annotation: Any) -> Any:
    is_marked = any(isinstance(mark, Bound | Like) for mark in getattr(annotation, "__metadata__", ()))
    return annotation.__origin__ if is_marked else annotation


def _unknown_names(
    path: Place, section: type, given: dict[Any, Any], moved: Mapping[str, str], elsewhere: Mapping[str, str]
) -> Iterator[str]:
    known = list(_hints(section))
    for name in given:
        fixed = getattr(section, str(name), None)
        if isinstance(fixed, property) and fixed.__doc__:
            yield f"{_dotted(*path, name)} cannot be set: {fixed.__doc__.rstrip('.')}"
        elif (old := _dotted(*path, name)) in moved:
            yield f"{old} is not a setting any more; {moved[old]}"
        elif name not in known:
            nearest = difflib.get_close_matches(str(name), known, n=1)
            way_out = f"did you mean {_dotted(*path, nearest[0])}?" if nearest else f"known here: {', '.join(known)}"
            yield f"{_dotted(*path, name)} is not a setting; {_called_here(str(name), elsewhere)}{way_out}"


def _called_here(name: str, elsewhere: Mapping[str, str]) -> str:
    """Clause on what is meant by a name of another framework; empty for any other name."""
    meant = next((here for pattern, here in elsewhere.items() if fnmatchcase(name, pattern)), None)
    return f"what other frameworks call {name} is {meant}; " if meant else ""


def _nans(value: Any, path: Place = ()) -> Iterator[Place]:
    """The paths of all that is not a number: every comparison with it is false, so no check would notice."""
    match value:
        case float() if math.isnan(value):
            yield path
        case dict() | list():
            for key, item in value.items() if isinstance(value, dict) else enumerate(value):
                yield from _nans(item, (*path, key))


def _fill(section: type, given: dict[Any, Any]) -> None:
    """Lays a recipe's section over the default that a class gives it. A required section that is left out is empty, so
    that errors name the settings that it lacks."""
    for field in fields(section):
        name, hint = field.name, _hints(section)[field.name]
        if name in given:
            given[name] = _over(_default(field), given[name])
            if UserPath in _members(hint) and isinstance(given[name], str):
                given[name] = os.path.expanduser(given[name])
        elif _is_section(hint) and _default(field) is MISSING:
            given[name] = {}


def _inherit(cls: type, settings: Any, name: str, like: Like) -> None:
    """Gives a section what it leaves out and its source names; a section that is left out too, if it has a default."""
    (field,) = (field for field in fields(cls) if field.name == name)
    given = settings.get(name, {} if is_dataclass(_default(field)) else None)
    source = settings.get(like.source)
    if isinstance(given, dict) and isinstance(source, dict):
        settings[name] = {key: copy.deepcopy(value) for key, value in source.items() if key not in like.own} | given


def _over(default: Any, given: Any) -> Any:
    if not is_dataclass(default) or not isinstance(given, dict):
        return given
    return to_dict(default) | {name: _over(getattr(default, name), value) for name, value in given.items()}


def _default(field: Field[Any]) -> Any:
    return field.default_factory() if field.default_factory is not MISSING else field.default


_RULES = {
    "float_type": "is not a number (write 0.5 or 1e-5, without quotes)",
    "int_type": "is not a whole number (write 8, without quotes)",
    "bool_type": "is neither true nor false",
    "string_type": "is not text; put it in quotes",
    "dataclass_type": "is not a section; write its settings as a mapping",
    "dict_type": "is not a mapping",
    "tuple_type": "is not a list",
}


def _problem(error: Mapping[str, Any]) -> str:
    path, value = _dotted(*error["loc"]), error["input"]
    match error:
        case {"type": "missing"}:
            return f"{path} must be set: in the recipe, or as {path}=..."
        case {"type": "value_error", "ctx": {"error": raised}}:
            return _in_place(str(raised), error["loc"])
        case {"type": "literal_error", "ctx": {"expected": expected}}:
            rule = f"is not one of {expected}"
        case _:
            rule = _RULES.get(error["type"]) or error["msg"]
    if value is None:
        rule += "; leave it out to get its default"
    return f"{path}: {repr(value) if isinstance(value, str) else json.dumps(value)} {rule}"


def _in_place(sentence: str, path: Place) -> str:
    """The sentence with the place of its section in this run: a class names the one that most have, as ``optimizer`` or
    ``reward.functions.<n>``."""
    named, dot, _ = sentence.partition(".")
    if not (path and dot and named.isidentifier()):
        return sentence
    index = next((str(step) for step in path if isinstance(step, int)), "<n>")
    return re.sub(rf"\b{named}\.", f"{path[0]}.", sentence).replace("<n>", index)


def _raise_any(path: Path, problems: list[str]) -> None:
    if problems:
        raise SettingError(_message(path, problems))


def _message(path: Path, problems: list[str]) -> str:
    return "\n  ".join([f"{path}:", *problems])


def _dotted(*parts: Any) -> str:
    return ".".join(str(part) for part in parts)


def _escape(value: Any) -> Any:
    """Text as OmegaConf reads it back: a backslash before each ``${``, and those that stood there doubled."""
    match value:
        case str():
            return re.sub(r"(\\*)\$\{", r"\1\1\\${", value)
        case list():
            return [_escape(item) for item in value]
        case dict():
            return {key: _escape(item) for key, item in value.items()}
    return value


# --- settings in Python -----------------------------------------------------------------------------------------------


def _as_json(value: Any, place: Place) -> Any:
    """A value as a recipe would hold it: lists for tuples, text for paths."""
    match value:
        case None | bool() | int() | float() | str():
            return value
        case Path():
            return str(value)
        case Mapping():
            return {str(name): _as_json(item, (*place, name)) for name, item in value.items()}
        case list() | tuple():
            return [_as_json(item, (*place, number)) for number, item in enumerate(value)]
    raise SettingError(f"settings: {_dotted(*place)} is {value!r}, which no recipe can hold; write a number or a text")


def _put(tree: dict[str, Any], name: str, value: Any) -> None:
    """Writes a setting into the sections of a recipe, in which an argument may stand already."""
    *sections, last = str(name).split(".")
    node: Any = tree
    for section in sections:
        if isinstance(node, list) and section.isdecimal() and int(section) < len(node):
            node = node[int(section)]
        elif isinstance(node, dict) and isinstance(inner := node.setdefault(section, {}), dict | list):
            node = inner
        else:
            raise SettingError(f"settings: {name}: there is no section {section} to put it in")
    if isinstance(node, dict) and isinstance(value, dict) and isinstance(node.get(last), dict):
        for inner, item in value.items():
            _put(tree, f"{name}.{inner}", item)
    elif isinstance(node, dict) and last not in node:
        node[last] = value
    else:
        raise SettingError(
            f"settings: {name} is given already, as an argument or by another name; leave one of them out"
        )


# --- the listing ------------------------------------------------------------------------------------------------------


def _describe(cls: type, prefix: str, instance: Any) -> Iterator[Setting]:
    helps, limits, sources = _helps(cls), bounds(cls), likes(cls)
    for field, annotation in zip(fields(cls), _hints(cls).values(), strict=True):
        path = f"{prefix}{field.name}"
        default = _default(field) if instance is None else getattr(instance, field.name)
        bound, _ = limits.get(field.name, (Bound(), False))
        kind = ", ".join(part for part in (_type_text(annotation), bound.rule) if part)
        like = sources.get(field.name)
        rest = f" Every other setting of `{like.source}` may stand here too; left out, it is as there." if like else ""
        yield Setting(path, kind, _default_text(default), helps.get(field.name, "") + rest)
        section, step = _section_of(annotation)
        if _is_section(section):
            inner = _describe(section, f"{path}{step}.", default if is_dataclass(default) else None)
            yield from (setting for setting in inner if like is None or setting.path.rpartition(".")[2] in like.own)


def _section_of(annotation: Any) -> tuple[Any, str]:
    """Type of a field, or of each item of it, and the step of a path from the field to it."""
    inner = _not_null(annotation)
    arguments = get_args(inner)
    if get_origin(inner) is tuple:
        return arguments[0], ".<n>"
    if get_origin(inner) in (dict, Mapping):
        return arguments[1], ".<name>"
    return inner, ""


def _helps(cls: type) -> dict[str, str]:
    """The string under each field, those of base classes included."""
    helps: dict[str, str] = {}
    for base in filter(_is_section, reversed(cls.__mro__)):
        (definition,) = ast.parse(textwrap.dedent(inspect.getsource(base))).body
        assert isinstance(definition, ast.ClassDef)
        helps |= dict(_documented(definition.body))
    return helps


def _documented(body: list[ast.stmt]) -> Iterator[tuple[str, str]]:
    for statement, below in pairwise(body):
        match statement, below:
            case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(text))):
                yield name, " ".join(text.split())


_TYPE_NAMES = {
    str: "text",
    int: "whole number",
    float: "number",
    bool: "true | false",
    Path: "path",
    UserPath: "path",
    NoneType: "null",
}


def _type_text(annotation: Any) -> str:
    arguments = get_args(annotation)
    origin = get_origin(annotation)
    if origin is Literal:
        return " | ".join(argument if isinstance(argument, str) else json.dumps(argument) for argument in arguments)
    if origin in (Union, UnionType):
        return " | ".join(_type_text(argument) for argument in _members(annotation))
    if origin is tuple:
        return f"list of {_type_text(arguments[0])}"
    if origin in (dict, Mapping):
        return f"mapping to {_type_text(arguments[1])}"
    return _TYPE_NAMES.get(annotation) or annotation.__name__


def _jsonable(value: Any) -> Any:
    return TypeAdapter(Any).dump_python(value, mode="json")


def _default_text(default: Any) -> str:
    if default is MISSING:
        return "required"
    return "" if is_dataclass(default) else json.dumps(_jsonable(default))
