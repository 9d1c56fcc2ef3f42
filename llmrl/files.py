"""Files of a run: written whole or not at all; a failure of the file system names the file and what went wrong."""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

LFS_POINTER = b"version https://git-lfs"
"""First bytes of the pointer that Git LFS leaves in place of a file that was not fetched."""


class WriteError(Exception):
    """A file of a run that cannot be written."""


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Context of writing `path`.

    Raises:
        WriteError: The file system refused: no space, no permission, a broken disk.
    """
    from safetensors import SafetensorError

    try:
        yield
    except OSError as error:
        raise WriteError(f"{path} cannot be written: {error.strerror or error}") from error
    except SafetensorError as error:
        if "os error" not in str(error):
            raise  # it was handed something wrong, which is a bug
        raise WriteError(f"{path} cannot be written: {error}") from error


def write_atomically(file: Path, content: Mapping[str, Any]) -> None:
    """Writes a JSON file, which is there whole or not at all."""
    partial = file.with_name(f".{file.name}.partial")
    with writing(file):
        partial.write_text(json.dumps(content, indent=1) + "\n")
        partial.replace(file)


def read_object(file: Path) -> dict[str, Any] | None:
    """The JSON object in a file; None where there is no file, or something else in it."""
    try:
        content = json.loads(file.read_text())
    except (OSError, ValueError, RecursionError):
        return None
    return content if isinstance(content, dict) else None
