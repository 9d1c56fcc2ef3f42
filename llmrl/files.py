"""Files and folders of a run: there whole or not at all, and on disk; a failure of the file system is one line."""

import errno
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from llmrl.errors import Error
from llmrl.messages import in_units

LFS_POINTER = b"version https://git-lfs"
"""First bytes of the pointer that Git LFS leaves in place of a file that was not fetched."""
UNSYNCED = frozenset({errno.EINVAL, errno.ENOTSUP, errno.EBADF})
"""What file systems say that have no way to bring the names in a folder to disk."""


REFUSALS = frozenset(
    {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.ENOTDIR, errno.ENAMETOOLONG, errno.EIO}
)
"""Errors of a file system whose cause lies outside of llmrl."""


class WriteError(Error):
    """A file of a run that cannot be written."""


@contextmanager
def writing(path: Path, num_bytes: int | None = None) -> Iterator[None]:
    """Context of writing `path`: `num_bytes`, where that is known.

    Raises:
        WriteError: The file system refused: no space, no permission, a broken disk.
    """
    from safetensors import SafetensorError

    try:
        yield
    except OSError as error:
        raise _refusal(path, error.strerror or str(error), num_bytes) from error
    except SafetensorError as error:
        number = re.search(r"os error (\d+)", str(error))
        if number is None:
            raise  # it was handed something wrong, which is a bug
        raise _refusal(path, os.strerror(int(number[1])), num_bytes) from error


def _refusal(path: Path, reason: str, num_bytes: int | None) -> WriteError:
    """``x/final cannot be written: No space left on device (1.2 GiB needed, 300 MiB free)``."""
    room = ""
    if num_bytes is not None:
        free = ""
        with suppress(OSError):
            place = next(place for place in (path, *path.absolute().parents) if place.exists())
            free = f", {in_units(shutil.disk_usage(place).free)} free"
        room = f" ({in_units(num_bytes)} needed{free})"
    return WriteError(f"{path} cannot be written: {reason}{room}")


def flush_to_disk(path: Path) -> None:
    """Returns when a file, or the names in a folder, would outlive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in UNSYNCED or not path.is_dir():
            raise
    finally:
        os.close(descriptor)


# --- files ------------------------------------------------------------------------------------------------------------


def replace_file(file: Path, content: bytes, *, syncs: bool = True) -> None:
    """Writes a file that is there whole or not at all, also after a power cut where it `syncs`. A link stays: the file
    that it points to is replaced.

    Raises:
        WriteError: The file system refused; the file is as it was.
    """
    with writing(file, len(content)):
        place = file.resolve()
        partial = place.with_name(f".{place.name}.partial")
        try:
            with partial.open("wb") as stream:
                stream.write(content)
                stream.flush()
                if syncs:
                    os.fsync(stream.fileno())
            partial.replace(place)
        except BaseException:
            with suppress(OSError):
                partial.unlink()
            raise
        if syncs:
            flush_to_disk(place.parent)


def write_atomically(file: Path, content: Mapping[str, Any], *, syncs: bool = True) -> None:
    """Writes a JSON file: see `replace_file`."""
    replace_file(file, (json.dumps(content, indent=1) + "\n").encode(), syncs=syncs)


def read_object(file: Path) -> dict[str, Any] | None:
    """The JSON object in a file; None where there is no file, or something else in it."""
    try:
        content = json.loads(file.read_text())
    except (OSError, ValueError, RecursionError):
        return None
    return content if isinstance(content, dict) else None


# --- folders ----------------------------------------------------------------------------------------------------------


def staged(folder: Path) -> Path:
    """Where a folder is written before it gets its name. A link is followed: a rename stays on one file system."""
    place = folder.resolve()
    return place.with_name(f".{place.name}.new")


@contextmanager
def replaced_folder(folder: Path, num_bytes: int | None = None) -> Iterator[Path]:
    """Context of writing a folder that is there whole or not at all, and on disk: yields the folder to write to, which
    gets the name at the end. A link stays: the folder that it points to is replaced.

    A process that is killed leaves the old folder or the new one, once `restore_folder` was called.

    Raises:
        WriteError: The file system refused; the folder is the old one or the new one.
    """
    new = staged(folder)
    with writing(folder, num_bytes):
        if new.exists():
            shutil.rmtree(new)
        try:
            new.mkdir(parents=True)
            yield new
            for path in (*new.rglob("*"), new):
                flush_to_disk(path)
            _swap(new, folder)
        except BaseException:
            shutil.rmtree(new, ignore_errors=True)  # a full disk needs the room
            raise


def _swap(new: Path, folder: Path) -> None:
    """Gives the name of a folder to another one beside it, and removes the one that had it."""
    place, old = folder.resolve(), _replaced(folder)
    shutil.rmtree(old, ignore_errors=True)
    try:
        if place.exists():
            place.rename(old)
        new.rename(place)
        flush_to_disk(place.parent)
    except BaseException:
        restore_folder(folder)
        raise
    shutil.rmtree(old, ignore_errors=True)


def restore_folder(folder: Path) -> None:
    """Puts right what a kill left of a folder that was being replaced: the old one, if no new one has its name yet.

    Raises:
        WriteError: The file system refused.
    """
    place, old = folder.resolve(), _replaced(folder)
    with writing(folder):
        if old.exists() and not place.exists():
            old.rename(place)
        for left in (old, staged(folder)):
            if left.exists():
                shutil.rmtree(left)


def _replaced(folder: Path) -> Path:
    """Where a folder is while another one gets its name."""
    place = folder.resolve()
    return place.with_name(f".{place.name}.old")
