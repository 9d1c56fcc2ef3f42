"""The records of a run: config.json and metrics.jsonl, and what a resume takes out of them."""

import json
import math
import platform
import subprocess
import time
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from llmrl.files import read_object, write_atomically, writing
from llmrl.messages import counted
from llmrl.roles import Progress
from llmrl.trainers.output import keep_iterations

VERSIONED = ("llmrl", "torch", "transformers", "accelerate", "deepspeed", "peft", "datasets", "safetensors")


class Records:
    """config.json and metrics.jsonl of a run: its settings and its metrics. One rank writes them.

    Args:
        folder: The output folder.
        settings: Every setting of the run, resolved.
        progress: Receives what is odd about files of earlier processes.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any], progress: Progress) -> None:
        self.config_file = folder / "config.json"
        self.metrics_file = folder / "metrics.jsonl"
        self.samples_file = folder / "samples.jsonl"
        self.settings = settings
        self.progress = progress

    def keep(self, last: int) -> None:
        """Removes what came after iteration `last`, and lines that cannot be read, from metrics and samples."""
        for file in (self.metrics_file, self.samples_file):
            if num_torn := keep_iterations(file, last):
                self.progress.message(f"{file}: {counted(num_torn, 'line')} that could not be read removed")

    def write_config(self) -> None:
        """Writes the settings of the run, with versions and the git state."""
        write_atomically(self.config_file, {"settings": self.settings, **provenance()})

    def report_changes(self) -> None:
        """Reports which settings differ from those that the run was started with."""
        file = self.config_file
        record = read_object(file)
        if record is None:
            state = "cannot be read" if file.exists() else "is gone"
            self.progress.message(f"{file} {state}: which settings have changed since the run began is not known")
            return
        before = _leaves(record["settings"])
        now = _leaves(json.loads(json.dumps(self.settings)))
        for path in sorted(before.keys() | now.keys()):
            if before.get(path) != now.get(path) and path != "run.resume":
                self.progress.message(
                    f"changed since the run was last started: {path} was {before.get(path)}, is {now.get(path)}"
                )

    def write(self, iteration: int, values: Mapping[str, float]) -> None:
        """Appends a line to metrics.jsonl; a number that is not finite becomes null, which JSON can hold."""
        line = {"iteration": iteration, **{name: x if math.isfinite(x) else None for name, x in values.items()}}
        with writing(self.metrics_file), self.metrics_file.open("a") as file:
            file.write(json.dumps(line) + "\n")

    def rewrite_last(self, iteration: int, values: Mapping[str, float]) -> None:
        """Replaces the line of the last iteration, if there is one."""
        keep_iterations(self.metrics_file, iteration - 1)
        self.write(iteration, values)

    def lines(self) -> list[tuple[int, dict[str, float]]]:
        """metrics.jsonl, as ``(iteration, values)``."""
        file = self.metrics_file
        entries = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
        return [
            (entry.pop("iteration"), {name: math.nan if x is None else x for name, x in entry.items()})
            for entry in entries
        ]


def provenance() -> dict[str, Any]:
    """Versions, time and the git state of the current folder: what is needed to repeat a run."""
    changes = _git("status", "--porcelain")
    return {
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "versions": {name: _version(name) for name in VERSIONED},
        "git": {"commit": _git("rev-parse", "HEAD"), "dirty": None if changes is None else changes != ""},
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _git(*arguments: str) -> str | None:
    """Output of git in the current folder; None where there is no git or no repository."""
    try:
        answer = subprocess.run(["git", *arguments], capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return answer.stdout.strip()


def _leaves(settings: Any, path: str = "") -> dict[str, Any]:
    if not isinstance(settings, Mapping):
        return {path: settings}
    leaves: dict[str, Any] = {}
    for name, value in settings.items():
        leaves |= _leaves(value, f"{path}.{name}" if path else name)
    return leaves
