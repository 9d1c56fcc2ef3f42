"""The runs into which faults are planted, and the comparison of what they leave with what an undisturbed one leaves."""

import json
import shutil
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from tests.processes import write_recipes
from tests.reliability.commands import Ended, run

TRAINERS = ("grpo", "ppo", "sft", "reward-model")
TIMES = ("_s", "/per_s", "trained_per_s")
"""Ends of the names of metrics that say how long something took."""


@dataclass(frozen=True)
class Undisturbed:
    """A run that nothing disturbs."""

    trainer: str
    folder: Path
    ended: Ended

    @property
    def left(self) -> dict[str, object]:
        """What it left in its output folder."""
        return left_by(self.folder / "out")


@cache
def undisturbed(trainer: str, work: Path) -> Undisturbed:
    """The run of a trainer in a folder of its own; run once."""
    folder = new_folder(work, f"undisturbed_{trainer}")
    ended = run(folder, trainer, f"{trainer}.yaml")
    assert ended.status == 0, ended.told
    return Undisturbed(trainer, folder, ended)


def new_folder(work: Path, name: str) -> Path:
    """A folder with the recipes and what they read."""
    folder = work / name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    write_recipes(folder)
    return folder


def left_by(output: Path) -> dict[str, object]:
    """What can be compared of an output folder: weights bit for bit, metrics without times, samples."""
    final = output / "final"
    return {
        "weights": {file.name: file.read_bytes() for file in sorted(final.glob("*.safetensors"))},
        "metrics": [without_times(line) for line in lines_of(output / "metrics.jsonl")],
        "samples": lines_of(output / "samples.jsonl") if (output / "samples.jsonl").exists() else None,
    }


def difference(output: Path, expected: dict[str, object]) -> str | None:
    """What of a folder is not as expected; None where all of it is."""
    try:
        left = left_by(output)
    except (OSError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    wrong = [name for name, value in expected.items() if left[name] != value]
    return ", ".join(wrong) or None


def lines_of(file: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def without_times(line: dict[str, object]) -> dict[str, object]:
    return {name: value for name, value in line.items() if not name.endswith(TIMES)}


def has_traceback(told: str) -> bool:
    return "Traceback (most recent call last)" in told
