"""Code of users that a recipe names: ``path/to/file.py:name``, relative to the current folder, or
``package.module:name``.

A file ``/srv/rewards/judge.py`` is the module ``llmrl.user_code./srv/rewards/judge%2Epy``. So it can neither hide a
module nor be hidden by one, be it called math.py or my rule.py, and its functions can be sent to worker processes that
are forked or spawned. It runs once in a process.

Modules that lie beside a file are found as well: its folder is put at the end of ``sys.path``, after what is installed.
One that something installed would hide is refused.

Objects that a program hands over in Python have names too, ``given:name``, in the context `handed_over`.
"""

import ast
import hashlib
import importlib
import importlib.util
import inspect
import json
import os
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import MappingProxyType, ModuleType
from typing import Any
from urllib.parse import quote, unquote_to_bytes

from llmrl.errors import Error
from llmrl.messages import class_and_message, nearest

__path__: list[str] = []  # makes this module a package, whose modules the finder finds


GIVEN = "given"
"""Stands for the module in the name of an object that was handed over in Python."""
_HANDED_OVER: ContextVar[Mapping[str, Any]] = ContextVar("handed_over", default=MappingProxyType({}))


class UserCodeError(Error, ValueError):
    """Code that cannot be used as it was named; the message addresses the person who named it."""


class UserCodeFailure(Error, RuntimeError):
    """Code that failed in a run: it raised, or returned what cannot be used."""


def names_code(text: str) -> bool:
    """Whether a text has the form ``path/to/file.py:name`` or ``package.module:name``."""
    source, _, name = text.rpartition(":")
    is_module = all(part.isidentifier() for part in source.split("."))
    return name.isidentifier() and (source.endswith(".py") or is_module)


def load_object(name: str, *, role: str) -> Any:
    """The object that ``path/to/file.py:name`` or ``package.module:name`` names.

    Args:
        name: Name of an object that can be called.
        role: What errors call it, such as ``reward function``.

    Raises:
        UserCodeError: The file or module is missing or does not load, or has no such object.
    """
    source, _, attribute = name.rpartition(":")
    if source == GIVEN:
        return _given(name, attribute, role)
    module = _load_module(source, name, role)
    if not hasattr(module, attribute):
        known = [known for known, value in vars(module).items() if callable(value)]
        way_out = nearest(attribute, known) or "; define it there, or name another"
        raise UserCodeError(f"{role} {name}: {source} has no {attribute!r}{way_out}")
    return getattr(module, attribute)


@contextmanager
def handed_over(objects: Mapping[str, Any]) -> Iterator[None]:
    """Context in which ``given:name`` names these objects."""
    token = _HANDED_OVER.set(objects)
    try:
        yield
    finally:
        _HANDED_OVER.reset(token)


def is_given(name: str) -> bool:
    """Whether a name is that of an object which a program hands over in Python."""
    return name.startswith(f"{GIVEN}:")


def source_text(code: Any) -> str:
    """Source of a function or class that was handed over, or else its bytecode; of any other object that of its
    class; of a `partial` its arguments too. Values that a closure or an object holds are not in it."""
    if isinstance(code, partial):
        arguments = json.dumps([code.args, code.keywords], default=lambda x: type(x).__qualname__, skipkeys=True)
        return f"{source_text(code.func)} {arguments}"
    code = code if inspect.isroutine(code) or inspect.isclass(code) else type(code)
    try:
        return inspect.getsource(code)
    except (OSError, TypeError):
        compiled = getattr(code, "__code__", None)
        if compiled is None:
            return code.__qualname__
        constants = [each for each in compiled.co_consts if not hasattr(each, "co_code")]
        return f"{compiled.co_code.hex()} {compiled.co_names} {constants}"


def import_file(path: Path) -> ModuleType:
    """The module of a file, which runs once in a process.

    Raises:
        ImportError: It imports a module that lies beside it, and would get another of that name, unless that is of the
            standard library.
    """
    path = path.resolve()
    if str(path.parent) not in sys.path:
        sys.path.append(str(path.parent))
    for name in {name.partition(".")[0]: None for level, name in _imports(path) if level == 0}:
        _check_neighbour(path, name)
    return importlib.import_module(f"{__name__}.{quote(os.fsencode(path)).replace('.', '%2E')}")


def source_file(function: Callable[..., Any]) -> str | None:
    """The file that a function or class is written in; None where it is in none. A `partial` counts as its function."""
    if (file := getattr(function, "__source_file__", None)) is not None:  # it is loaded in another process
        return file
    module = sys.modules.get(_unbound(function).__module__)
    return getattr(module, "__file__", None)


def code_files(function: Callable[..., Any]) -> list[Path]:
    """The file of a function or class, and the modules below its folder that it imports, and those that they import,
    relative imports included."""
    file = source_file(function)
    if file is None:
        return []
    first = Path(file).resolve()
    found: list[Path] = []
    waiting = [first]
    while waiting:
        path = waiting.pop()
        if path in found or path.suffix != ".py" or not path.is_file():
            continue
        found.append(path)
        for level, name in _imports(path):
            if level == 0:
                waiting.extend(_files(first.parent, name))
            elif level <= len(path.parents):
                package = path.parents[level - 1]
                waiting.extend([package / "__init__.py", *_files(package, name)])
    return sorted(found)


def code_digests(function: Callable[..., Any]) -> dict[Path, str | None]:
    """SHA-256 of each of the `code_files` of a function or class."""
    return {file: _digest(file) for file in code_files(function)}


def changed_file(digests: Mapping[Path, str | None]) -> Path | None:
    """The first file whose content is not that of its digest by now; None where all are."""
    return next((file for file, digest in digests.items() if _digest(file) != digest), None)


def name_of(function: Callable[..., Any]) -> str:
    """Name of a function as a recipe writes it."""
    function = _unbound(function)
    named = function if hasattr(function, "__qualname__") else type(function)
    is_of_file = named.__module__.startswith(f"{__name__}.")
    return f"{source_file(function) if is_of_file else named.__module__}:{named.__qualname__}"


def describe_exception(function: Callable[..., Any], error: BaseException) -> str:
    """Exception that a function or class raised, with the last line of its own file that led to it."""
    file = source_file(function)
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == file]
    place = f" at {file}:{lines[-1]}" if lines else ""
    return f"raised {class_and_message(error)}{place}"


def _digest(file: Path) -> str | None:
    """SHA-256 of a file; None where it is gone."""
    try:
        return hashlib.sha256(file.read_bytes()).hexdigest()
    except OSError:
        return None


def _unbound(function: Callable[..., Any]) -> Callable[..., Any]:
    return function.func if isinstance(function, partial) else function


def _given(name: str, attribute: str, role: str) -> Any:
    objects = _HANDED_OVER.get()
    if attribute not in objects:
        raise UserCodeError(
            f"{role} {name} was handed over by a program in Python, and is only there; name it by file.py:name"
        )
    return objects[attribute]


def _load_module(source: str, name: str, role: str) -> ModuleType:
    if source.endswith(".py") and not Path(source).is_file():
        raise UserCodeError(
            f"{role} {name}: there is no file {Path(source).resolve()}; a path begins in the folder that you run in"
        )
    try:
        return import_file(Path(source)) if source.endswith(".py") else importlib.import_module(source)
    except (Exception, SystemExit) as error:
        way_out = ""
        if isinstance(error, ModuleNotFoundError) and error.name == source.partition(".")[0]:
            way_out = "; a file is named by its path, such as folder/file.py:function"
        raise UserCodeError(f"{role} {name}: {source} does not load: {class_and_message(error)}{way_out}") from error


class _Finder(MetaPathFinder):
    def find_spec(
        self, fullname: str, path: Iterable[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        package, _, name = fullname.rpartition(".")
        if package != __name__:
            return None
        return importlib.util.spec_from_file_location(fullname, os.fsdecode(unquote_to_bytes(name)))


def _imports(path: Path) -> Iterator[tuple[int, str]]:
    """Yields ``(level, name)`` of whatever a file imports, anywhere in it, as in ``from ..package.module import name``:
    level 2, ``package.module.name``. The last name may be a module or something in one."""
    for node in ast.walk(ast.parse(path.read_bytes(), str(path))):
        if isinstance(node, ast.Import):
            yield from ((0, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            before = f"{node.module}." if node.module else ""
            yield from ((node.level, f"{before}{alias.name}") for alias in node.names)


def _check_neighbour(path: Path, name: str) -> None:
    """Raises ImportError where a module that lies beside the file is hidden by one that is found before it."""
    beside = [place.resolve() for place in _places(path.parent, name) if place.is_file() and place != path]
    spec = importlib.util.find_spec(name) if beside and name not in sys.stdlib_module_names else None
    if spec is None or spec.origin is None:
        return
    found = Path(spec.origin).resolve()
    if found not in beside:
        raise ImportError(f"it imports {name}, and gets {found}, not the one in {path.parent}; rename that one")


def _files(folder: Path, name: str) -> Iterator[Path]:
    """Yields the paths that a module of a dotted name may have below a folder, and those of the packages around it."""
    for part in name.split("."):
        yield from _places(folder, part)
        folder /= part


def _places(folder: Path, name: str) -> tuple[Path, Path]:
    """Paths of a module in a folder: its file, or that of a package."""
    return folder / f"{name}.py", folder / name / "__init__.py"


sys.meta_path.append(_Finder())
