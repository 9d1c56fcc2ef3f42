"""The newest checkpoint of a run that was killed is damaged; then the same command."""

import os
import random
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from llmrl.trainers.checkpoint import CheckpointError, newest_sound, read_state
from tests.reliability.commands import run
from tests.reliability.kills import on_operations
from tests.reliability.runs import TRAINERS, difference, has_traceback, new_folder, undisturbed

STATE_FILES = ("state.safetensors", "state.json")
FILES = (*STATE_FILES, "manifest.json")
MANIFESTS = ("", "{", "[]", "null", "7", "{}", '{"files": null}', '{"files": []}', '{"files": {"state.json": 1}}', "\0")


def flip(draw: random.Random, checkpoint: Path, _: Path) -> str:
    """Flips a bit of a file with state."""
    file = checkpoint / draw.choice(STATE_FILES)
    content = bytearray(file.read_bytes())
    place = draw.randrange(len(content) * 8)
    content[place // 8] ^= 1 << place % 8
    file.write_bytes(content)
    return f"bit {place} of {file.name}"


def cut(draw: random.Random, checkpoint: Path, _: Path) -> str:
    """Truncates a file."""
    file = checkpoint / draw.choice(FILES)
    left = draw.randrange(file.stat().st_size)
    file.write_bytes(file.read_bytes()[:left])
    return f"{file.name} cut to {left} bytes"


def remove(draw: random.Random, checkpoint: Path, _: Path) -> str:
    """Deletes a file."""
    file = checkpoint / draw.choice(FILES)
    file.unlink()
    return f"{file.name} deleted"


def swap(draw: random.Random, checkpoint: Path, older: Path) -> str:
    """Puts a file of the older checkpoint in place of the newer one's."""
    name = draw.choice(STATE_FILES)
    shutil.copy(older / name, checkpoint / name)
    return f"{name} of {older.name}"


def rewrite(draw: random.Random, checkpoint: Path, _: Path) -> str:
    """Writes an odd manifest."""
    text = draw.choice(MANIFESTS)
    (checkpoint / "manifest.json").write_text(text)
    return f"manifest {text!r}"


DAMAGES: tuple[Callable[[random.Random, Path, Path], str], ...] = (flip, cut, remove, swap, rewrite)


def by_command(seed: int, num: int, work: Path) -> Iterator[dict[str, Any]]:
    """The whole way: killed, damaged, continued by the same command."""
    killed = {trainer: _killed(trainer, work) for trainer in TRAINERS}
    for number in range(num):
        draw = random.Random(f"damage by command {seed} {number}")
        trainer = TRAINERS[number % len(TRAINERS)]
        folder = work / "damaged"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(killed[trainer], folder)
        older, newest = sorted((folder / "out" / "checkpoints").glob("step_*"))[-2:]
        done = DAMAGES[number // len(TRAINERS) % len(DAMAGES)](draw, newest, older)
        ended = run(folder, trainer, f"{trainer}.yaml", "run.checkpoint_every=1")
        wrong = difference(folder / "out", undisturbed(trainer, work).left)
        if ended.status or has_traceback(ended.told) or f"{newest.name} is passed over" not in ended.told:
            wrong = f"status {ended.status}: {ended.told[-500:]}"
        if f"goes on after iteration {int(older.name[-6:])} " not in ended.told:
            wrong = f"the older one was not used: {ended.told[-500:]}"
        yield {"trainer": trainer, "damage": done, "wrong": wrong}


def by_function(seed: int, num: int, work: Path) -> Iterator[dict[str, Any]]:
    """The search for the newest sound checkpoint alone."""
    killed = _killed("grpo", work)
    before = read_state(sorted((killed / "out" / "checkpoints").glob("step_*"))[-2])["cursor"]
    for number in range(num):
        draw = random.Random(f"damage by function {seed} {number}")
        folder = work / "damaged_alone"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(killed / "out" / "checkpoints", folder)
        older, newest = sorted(folder.glob("step_*"))[-2:]
        done = DAMAGES[number % len(DAMAGES)](draw, newest, older)
        told: list[str] = []
        try:
            used, damaged = newest_sound(folder, told.append)
        except CheckpointError as error:
            used, damaged = None, [Path(str(error))]
        is_right = (used, damaged) == (older, [newest]) and len(told) == 1 and read_state(older)["cursor"] == before
        yield {"damage": done, "wrong": None if is_right else f"{used} was used; told: {told}"}


def _killed(trainer: str, work: Path) -> Path:
    """Folder of a run that was killed after its second checkpoint."""
    folder = new_folder(work, f"killed_{trainer}")
    second = folder / "out" / "checkpoints" / "step_000002"

    def end(_: int) -> None:
        if second.exists():
            os.kill(os.getpid(), signal.SIGKILL)

    ended = run(
        folder, trainer, f"{trainer}.yaml", "run.checkpoint_every=1", plant=lambda: on_operations(folder / "out", end)
    )
    assert ended.status == -signal.SIGKILL, ended.told
    return folder
