"""Files of rules as modules: of a name that no other module has, and that worker processes can import too.

A file ``/srv/rewards/judge.py`` is the module ``llmrl.rewards.files./srv/rewards/judge%2Epy``. So it can
neither hide a module nor be hidden by one, be it called math.py or my rule.py, and its functions can be sent to workers
that are forked or spawned.

Modules that lie beside a file are found as well: its folder is put at the end of ``sys.path``, after what is installed.
One that something installed would hide is refused.
"""

import ast
import importlib
import importlib.util
import os
import sys
from collections.abc import Iterable, Iterator
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from urllib.parse import quote, unquote_to_bytes

__path__: list[str] = []  # makes this module a package, whose modules the finder finds


def import_file(path: Path) -> ModuleType:
    """The module of a file, which runs once in a process.

    Raises:
        ImportError: It imports a module that lies beside it, and would get another of that name, unless that is of the
            standard library.
    """
    path = path.resolve()
    if str(path.parent) not in sys.path:
        sys.path.append(str(path.parent))
    for name in _imported_names(path):
        _check_neighbour(path, name)
    return importlib.import_module(f"{__name__}.{quote(os.fsencode(path)).replace('.', '%2E')}")


class _Finder(MetaPathFinder):
    def find_spec(
        self, fullname: str, path: Iterable[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        package, _, name = fullname.rpartition(".")
        if package != __name__:
            return None
        return importlib.util.spec_from_file_location(fullname, os.fsdecode(unquote_to_bytes(name)))


def _imported_names(path: Path) -> Iterator[str]:
    """What a file imports, wherever in it, up to the first dot."""
    for node in ast.walk(ast.parse(path.read_bytes(), str(path))):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module.partition(".")[0]


def _check_neighbour(path: Path, name: str) -> None:
    """Raises ImportError where a module that lies beside the file is hidden by one that is found before it."""
    beside = [place.resolve() for place in _places(path.parent, name) if place.is_file() and place != path]
    spec = importlib.util.find_spec(name) if beside and name not in sys.stdlib_module_names else None
    if spec is None or spec.origin is None:
        return
    found = Path(spec.origin).resolve()
    if found not in beside:
        raise ImportError(f"it imports {name}, and gets {found}, not the one in {path.parent}; rename that one")


def _places(folder: Path, name: str) -> tuple[Path, Path]:
    """Where a module may lie in a folder."""
    return folder / f"{name}.py", folder / name / "__init__.py"


sys.meta_path.append(_Finder())
