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
        contents: Digests of what the run reads, by what it is.
        progress: Receives what is odd about files of earlier processes.
    """

    def __init__(
        self, folder: Path, settings: Mapping[str, Any], contents: Mapping[str, str], progress: Progress
    ) -> None:
        self.config_file = folder / "config.json"
        self.metrics_file = folder / "metrics.jsonl"
        self.samples_file = folder / "samples.jsonl"
        self.settings = settings
        self.contents = contents
        self.progress = progress

    def keep(self, last: int) -> None:
        """Removes what came after iteration `last`, and lines that cannot be read, from metrics and samples."""
        for file in (self.metrics_file, self.samples_file):
            if num_torn := keep_iterations(file, last):
                self.progress.message(f"{file}: {counted(num_torn, 'line')} that could not be read removed")

    def write_config(self) -> None:
        """Writes the settings of the run, what it reads, versions and the git state."""
        write_atomically(self.config_file, self.config())

    def mark_finished(self, iterations: int) -> None:
        """Adds to config.json that the run has come to its end after this many iterations."""
        record = read_object(self.config_file) or self.config()
        write_atomically(self.config_file, {**record, "finished": iterations})

    def config(self) -> dict[str, Any]:
        """Content of config.json while the run is under way."""
        return {"settings": self.settings, "contents": self.contents, **provenance()}

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
        "versions": versions(),
        "git": {"commit": _git("rev-parse", "HEAD"), "dirty": None if changes is None else changes != ""},
    }


def versions() -> dict[str, str | None]:
    """Version of llmrl and of each package that its numbers depend on; None where one is not installed."""
    return {name: _version(name) for name in VERSIONED}


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
