"""The records of a run: config.json and metrics.jsonl, and what a resume takes out of them."""

import math
import platform
import subprocess
import sys
import time
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from llmrl.files import WriteError, read_object, write_atomically
from llmrl.lines import LineFile
from llmrl.messages import in_spans
from llmrl.roles import Progress

VERSIONED = ("llmrl", "torch", "transformers", "accelerate", "deepspeed", "peft", "datasets", "safetensors")


class Records:
    """config.json, metrics.jsonl and samples.jsonl of a run: its settings, its metrics and some responses. One rank
    writes them, the samples by a `SampleWriter`.

    Args:
        folder: The output folder.
        settings: Every setting of the run, resolved.
        contents: Digests of what the run reads, by what it is.
        progress: Receives what is odd about files of earlier processes.
        samples: samples.jsonl, if the trainer writes it.
    """

    def __init__(
        self,
        folder: Path,
        settings: Mapping[str, Any],
        contents: Mapping[str, str],
        progress: Progress,
        samples: LineFile | None = None,
    ) -> None:
        self.config_file = folder / "config.json"
        self.metrics = LineFile(folder / "metrics.jsonl", progress.message)
        self.samples = samples or LineFile(folder / "samples.jsonl", progress.message)
        self.settings = settings
        self.contents = contents
        self.progress = progress

    def keep(self, last: int) -> None:
        """Removes what came after iteration `last`, and lines that cannot be read, from metrics and samples. Reports
        these, and iterations that have no metrics."""
        self.samples.keep(last, several=True)
        found = self.metrics.keep(last)
        if missing := [number for number in range(1, last + 1) if number not in found]:
            self.progress.message(
                f"warning: {self.metrics.file} has no line of these iterations, which are done: {in_spans(missing)}"
            )

    def sync(self) -> None:
        """Returns when every line of metrics and samples is on disk.

        Raises:
            WriteError: The file system refused; the lines are kept.
        """
        self.metrics.sync()
        self.samples.sync()

    def sync_or_report(self) -> None:
        """Brings every line of metrics and samples to disk when a run fails: reports what cannot be written."""
        for lines in (self.metrics, self.samples):
            try:
                lines.sync()
            except WriteError as error:
                self.progress.message(f"warning: {error}: its last lines are lost")

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
        self.metrics.append([_line(iteration, values)])

    def rewrite_last(self, iteration: int, values: Mapping[str, float]) -> None:
        """Replaces the line of the last iteration, if there is one."""
        self.metrics.replace(iteration, _line(iteration, values))

    def lines(self) -> list[tuple[int, dict[str, float]]]:
        """metrics.jsonl, as ``(iteration, values)``: what is a number or null there."""
        return [
            (number, {name: math.nan if x is None else float(x) for name, x in entry.items() if _is_number(x)})
            for number, entry in self.metrics.read().items()
        ]


def _line(iteration: int, values: Mapping[str, float]) -> dict[str, Any]:
    return {"iteration": iteration, **{name: x if math.isfinite(x) else None for name, x in values.items()}}


def _is_number(x: object) -> bool:
    """Whether a value of JSON is null, or a number that a float holds."""
    return x is None or isinstance(x, float) or (type(x) is int and abs(x) <= sys.float_info.max)


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
