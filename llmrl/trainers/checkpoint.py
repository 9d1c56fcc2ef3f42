"""Checkpoints: a folder each, written whole or not at all, without pickle.

    checkpoints/step_000123/
        state.safetensors   every tensor of the state, by path: "trained/actor/parameters/..."
        state.json          everything else in it, nested as it was
        manifest.json       size and SHA-256 of the two: a torn or altered checkpoint is refused

A folder is written under another name and renamed at the end, so a name that exists is a checkpoint that is complete.
A state with a number that is not finite is not worth keeping: see `not_finite`.
"""

import hashlib
import json
import math
import shutil
from collections.abc import Callable, Mapping
from itertools import chain, count
from pathlib import Path
from typing import Any

from torch import Tensor

from llmrl.errors import Error
from llmrl.files import flush_to_disk, writing
from llmrl.trainers.records import versions

STATE_FILES = ("state.safetensors", "state.json")


class CheckpointError(Error, ValueError):
    """A checkpoint that cannot be continued from."""


def save_checkpoint(folder: Path, state: Mapping[str, Any], *, keep: int | None) -> None:
    """Writes the state to a new folder, then removes all but the newest `keep` beside it; None removes none.

    Raises:
        WriteError: The file system refused; older checkpoints are as they were.
    """
    from safetensors.torch import save_file

    partial = folder.with_name(f".{folder.name}.partial")
    tensors, rest = split_state(state)
    with writing(folder, sum(tensor.nbytes for tensor in tensors.values())):
        for torn in folder.parent.glob(".step_*.partial"):
            shutil.rmtree(torn)
        partial.mkdir(parents=True)
        try:
            save_file(in_own_memory(tensors), partial / "state.safetensors")
            (partial / "state.json").write_text(json.dumps(rest, indent=1))
            files = {name: _fingerprint(partial / name) for name in STATE_FILES}
            (partial / "manifest.json").write_text(json.dumps({"llmrl": versions()["llmrl"], "files": files}, indent=1))
            for path in (*partial.iterdir(), partial):
                flush_to_disk(path)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)  # a full disk needs the room
            raise
        shutil.rmtree(folder, ignore_errors=True)
        partial.rename(folder)
        flush_to_disk(folder.parent)
        for old in list_checkpoints(folder.parent)[:-keep] if keep else []:
            shutil.rmtree(old.rename(old.with_name(f".{old.name}.partial")))  # half of one is none


def read_state(folder: Path) -> dict[str, Any]:
    """The state in a checkpoint that was verified, its tensors on the CPU."""
    from safetensors.torch import load_file

    return join_state(load_file(folder / "state.safetensors"), json.loads((folder / "state.json").read_text()))


def verify_checkpoint(folder: Path) -> None:
    """Compares the files of a checkpoint with its manifest.

    Raises:
        CheckpointError: A file is missing, or differs from what the manifest says of it.
    """
    try:
        manifest = json.loads((folder / "manifest.json").read_text())
        for name in STATE_FILES:
            if _fingerprint(folder / name) != manifest["files"][name]:
                raise CheckpointError(f"{folder / name} is not what was saved")
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{folder} is no complete checkpoint ({error})") from error


def newest_sound(folder: Path, report: Callable[[str], None]) -> tuple[Path | None, list[Path]]:
    """The newest checkpoint of a folder whose files are what was saved, and the newer ones whose are not; `report`
    receives what is wrong with them.

    Raises:
        CheckpointError: There are checkpoints, and none of them is sound.
    """
    damaged: dict[Path, CheckpointError] = {}
    for path in reversed(list_checkpoints(folder)):
        try:
            verify_checkpoint(path)
        except CheckpointError as error:
            damaged[path] = error
            continue
        for other, error in damaged.items():
            report(f"warning: {error}: {other.name} is passed over, and kept as {set_aside(other).name}")
        return path, list(damaged)
    if damaged:
        reasons = "; ".join(str(error) for error in damaged.values())
        raise CheckpointError(
            f"no checkpoint in {folder} can be continued from: {reasons}. Put a copy of one back, or name another "
            "run.output_dir to begin anew"
        )
    return None, []


def set_aside(checkpoint: Path) -> Path:
    """What a damaged checkpoint is renamed to, so that it is no longer one."""
    names = (f"{checkpoint.name}.damaged{number}" for number in chain([""], count(2)))
    return next(path for path in map(checkpoint.with_name, names) if not path.exists())


def not_finite(state: Mapping[str, Any], prefix: str = "") -> str | None:
    """Path of a tensor or number in a state that is not finite; None where all are."""
    for key, value in state.items():
        if isinstance(value, Mapping):
            if found := not_finite(value, f"{prefix}{key}/"):
                return found
        elif isinstance(value, Tensor):
            if value.is_floating_point() and not value.isfinite().all():
                return f"{prefix}{key}"
        elif isinstance(value, float) and not math.isfinite(value):
            return f"{prefix}{key}"
    return None


def list_checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    return sorted((path for path in folder.glob("step_*") if path.name[5:].isdecimal()), key=iteration_of)


def iteration_of(checkpoint: Path) -> int:
    """Iterations that were done when a checkpoint was written."""
    return int(checkpoint.name.removeprefix("step_"))


def split_state(state: Mapping[str, Any], prefix: str = "") -> tuple[dict[str, Tensor], dict[str, Any]]:
    """A nested state as tensors by path, ``outer/inner/name``, and the same nesting with what is left."""
    tensors: dict[str, Tensor] = {}
    rest: dict[str, Any] = {}
    for key, value in state.items():
        assert "/" not in key, f"{key!r}: the slash is what separates the names of a path"
        if isinstance(value, Tensor):
            tensors[f"{prefix}{key}"] = value
        elif isinstance(value, Mapping):
            inner, rest[key] = split_state(value, f"{prefix}{key}/")
            tensors |= inner
        else:
            rest[key] = value
    return tensors, rest


def join_state(tensors: Mapping[str, Tensor], rest: dict[str, Any]) -> dict[str, Any]:
    """The nested state that `split_state` took apart."""
    for path, tensor in tensors.items():
        *parents, name = path.split("/")
        place = rest
        for parent in parents:
            place = place[parent]
        place[name] = tensor
    return rest


def in_own_memory(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors, contiguous, and copied where two would share memory: safetensors refuses that."""
    own: dict[str, Tensor] = {}
    taken: set[int] = set()
    for name, tensor in tensors.items():
        own[name] = tensor.contiguous()
        if own[name].untyped_storage().data_ptr() in taken:
            own[name] = own[name].clone()
        taken.add(own[name].untyped_storage().data_ptr())
    return own


def _fingerprint(file: Path) -> dict[str, Any]:
    with file.open("rb") as stream:
        return {"bytes": file.stat().st_size, "sha256": hashlib.file_digest(stream, "sha256").hexdigest()}
