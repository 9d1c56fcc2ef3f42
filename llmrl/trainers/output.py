"""The output folder: whether a run may write it, what an earlier run left there, and the lock that one run holds."""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryFile
from typing import Literal

from filelock import FileLock, Timeout

from llmrl.errors import Error
from llmrl.files import read_object, writing
from llmrl.lines import last_iteration
from llmrl.roles import Collectives
from llmrl.trainers.checkpoint import list_checkpoints

RECORDS = ("config.json", "metrics.jsonl", "samples.jsonl", "checkpoints", "best", "final")
"""Files and folders that a run leaves."""
REPLACED = ("checkpoints", "best", "final")
"""Folders among these that a resumed run writes over."""
MODEL_FILES = ("adapter_config.json", "tokenizer.json", "tokenizer_config.json", "*.safetensors", "*.bin", "*.gguf")
"""Files that mark the folder of a model, beside its config.json."""
LOCK = ".lock"
"""File that the process which writes the folder holds a lock on. The system releases it when the process ends."""


class RunError(Error, ValueError):
    """A run that cannot start as it was asked to."""


def check_folder(folder: Path, *, resume: Literal["auto", True, False], inputs: Mapping[str, str]) -> None:
    """Refuses to write where nothing can be written, over what a run reads, over another run, and over anything else.

    Args:
        inputs: Setting paths of what the run reads, with their values: local paths, or names on the hub.

    Raises:
        RunError: With the reason.
    """
    _check_place(folder)
    for setting, path in inputs.items():
        place, read = folder.resolve(), Path(path).resolve()
        if read.is_dir() and (place == read or read in place.parents):
            raise RunError(
                f"run.output_dir ({folder}) is {'' if place == read else 'inside '}{setting} ({path}), which the run "
                "reads; choose another folder"
            )
        if read.exists() and any(read.is_relative_to((place / name).resolve()) for name in REPLACED):
            raise RunError(
                f"run.output_dir ({folder}) holds {setting} ({path}), which the run reads and would write over; choose "
                "another folder"
            )
    if is_run(folder):
        _check_run(folder, resume)
    elif found := _first_found(folder):
        raise RunError(
            f"run.output_dir ({folder}) holds {found.name}, which no run of llmrl wrote there, and a run might write "
            "over it; choose another folder, or move it away"
        )
    elif resume is True:
        raise RunError(f"run.resume is true, and run.output_dir ({folder}) holds no run; run.resume=auto begins one")


def _check_run(folder: Path, resume: Literal["auto", True, False]) -> None:
    """Refuses a run that is not to be touched, and one that nothing can go on from."""
    if not resume:
        raise RunError(
            f"run.output_dir ({folder}) already holds a run; leave run.resume at auto to go on with it, choose another "
            "folder, or move it away"
        )
    if list_checkpoints(folder / "checkpoints") or finished_iterations(folder) is not None:
        return
    check_nothing_is_lost(folder)
    if resume is True:
        raise RunError(
            f"run.resume is true, and run.output_dir ({folder}) holds no checkpoint; run.resume=auto begins anew"
        )


def check_nothing_is_lost(folder: Path) -> None:
    """Refuses to begin anew in the folder of a run that has learned something.

    One that was killed before its first checkpoint, which is written after the first iteration, has not.

    Raises:
        RunError: It names what would be lost.
    """
    best = read_object(folder / "best" / "best.json") or {}
    left = {
        "final/": _holds_something(folder / "final"),
        "best/": _holds_something(folder / "best") and best.get("iteration") not in (0, 1),
        **{name: last_iteration(folder / name) > 1 for name in ("metrics.jsonl", "samples.jsonl")},
    }
    names = [name for name, is_there in left.items() if is_there]
    if names:
        raise RunError(
            f"run.output_dir ({folder}) holds {', '.join(names)} of a run, and no checkpoint to go on from; choose "
            "another folder, or move it away"
        )


def _holds_something(folder: Path) -> bool:
    """Whether there is such a folder, or a link to one, that is not empty."""
    return folder.is_dir() and any(folder.iterdir())


def finished_iterations(folder: Path) -> int | None:
    """Iterations of the run in a folder, if it has come to its end; None where it has not, or final/ is gone."""
    finished = (read_object(folder / "config.json") or {}).get("finished")
    return finished if isinstance(finished, int) and _holds_something(folder / "final") else None


def model_of_run(folder: Path, *, best: bool) -> Path:
    """The folder of a run's model: final/ of one that has come to its end, or best/ of any.

    Raises:
        RunError: There is none.
    """
    if not is_run(folder):
        raise RunError(f"RUN ({folder}) is not the folder of a run; name the run.output_dir of one")
    if best:
        if not _holds_something(folder / "best"):
            raise RunError(f"RUN ({folder}) has no best/; leave --best out, or set run.best_metric in its recipe")
        return folder / "best"
    if finished_iterations(folder) is None:
        raise RunError(
            f"RUN ({folder}) has not come to its end; let it go on with the command that began it, or add --best for "
            "the best model so far"
        )
    return folder / "final"


@contextmanager
def locked(folder: Path, collectives: Collectives) -> Iterator[None]:
    """Context in which no other process writes the folder, which is made. Collective; the first rank holds the lock.

    Raises:
        RunError: Another process writes it.
    """
    lock = FileLock(folder / LOCK, timeout=0, mode=0o600)
    problem = None
    if collectives.is_first:
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        with writing(folder / LOCK):
            try:
                lock.acquire()
            except Timeout:
                problem = (
                    f"run.output_dir ({folder}) is being written by another process; wait until it ends, or choose "
                    "another folder"
                )
    if problem := collectives.from_first(problem):
        raise RunError(problem)
    try:
        yield
    finally:
        lock.release()


def check_models(folder: Path) -> None:
    """Refuses a best/ or final/ that no model could be written to once it is learned. Links are followed.

    Raises:
        RunError: With the reason.
    """
    for path in (folder / "best", folder / "final"):
        try:
            place = path.resolve()
            if place.exists() and not place.is_dir():
                problem = "is a file"
            elif path.is_symlink() and not place.parent.is_dir():
                problem = f"is a link to {place}, and there is no folder {place.parent}"
            elif place.is_mount():
                problem = f"is the root of a file system ({place}), which cannot be replaced; link it to a folder there"
            elif path.is_symlink() and not os.access(place.parent, os.W_OK):
                problem = f"is a link to {place}, and nothing can be written to {place.parent}"
            else:
                continue
        except (OSError, RuntimeError):
            problem = "is a link that leads nowhere"
        raise RunError(f"run.output_dir ({folder}): {path.name} {problem}; move it away, or mend it")


def is_run(folder: Path) -> bool:
    """Whether a run made the folder: its config.json says so or, where none is readable, there are checkpoints."""
    config = read_object(folder / "config.json")
    if config is not None:
        return {"settings", "versions"} <= config.keys()
    return bool(list_checkpoints(folder / "checkpoints"))


def _check_place(folder: Path) -> None:
    """Refuses a folder that can neither be made nor be written to. Leaves nothing behind."""
    place = folder
    while not os.path.lexists(place) and place != place.parent:
        place = place.parent
    if not place.is_dir():
        where = "is" if place == folder else f"cannot be made: {place} is"
        raise RunError(
            f"run.output_dir ({folder}) {where} {'a file' if place.is_file() else 'no folder'}; name a folder"
        )
    try:
        with suppress(FileNotFoundError, NotADirectoryError):
            folder.lstat()  # which knows names that are too long
        with TemporaryFile(dir=place):
            pass
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise RunError(
            f"run.output_dir ({folder}) cannot be written: {place}: {reason}; choose another folder"
        ) from error


def _first_found(folder: Path) -> Path | None:
    """A file or folder that is not to be written over; the first of them. An empty folder, or a link to one, is a place
    for a model to come."""
    for pattern in (*RECORDS, *MODEL_FILES):
        for path in sorted(folder.glob(pattern)):
            if not path.is_dir() or any(path.iterdir()):
                return path
    return None
