"""Files of JSON lines, each of an iteration: metrics.jsonl and samples.jsonl."""

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from time import monotonic
from typing import Any

from llmrl.files import WriteError, flush_to_disk, replace_file, writing
from llmrl.messages import counted, in_spans

Lines = Sequence[tuple[int, Mapping[str, float]]]
"""The metrics of a run, as ``(iteration, values)``."""
SYNC_S = 10.0
"""Seconds after which lines are brought to disk: a power cut costs at most these, and no line of a checkpoint."""
MAX_UNWRITTEN = 1000
"""Lines that are kept while the file cannot be written. Those of one more iteration end the run."""


class LineFile:
    """A file of JSON lines, appended to without holes: lines are kept until they are on disk, so those that could not
    be written are written with the next ones.

    Args:
        file: The file.
        report: Receives what is odd about it.
    """

    def __init__(self, file: Path, report: Callable[[str], None]) -> None:
        self.file = file
        self.report = report
        self.unsynced: list[bytes] = []
        """Lines that may not be on disk yet."""
        self.start: int | None = None
        """Bytes of the file before these lines; None where there are none."""
        self.is_torn = False
        """Whether what the file holds after `start` is something else than these lines."""
        self.has_failed = False
        self.synced_at = monotonic()

    def append(self, entries: Iterable[Mapping[str, Any]]) -> None:
        """Appends a line for each entry, or keeps it and reports why.

        Raises:
            WriteError: The file has been unwritable for more than `MAX_UNWRITTEN` lines.
        """
        lines = [json.dumps(entry).encode() + b"\n" for entry in entries]
        is_full = len(self.unsynced) >= MAX_UNWRITTEN
        self.unsynced += lines
        try:
            self._write(b"".join(lines), syncs=monotonic() - self.synced_at >= SYNC_S)
        except WriteError as error:
            if is_full:
                raise
            if not self.has_failed:
                self.report(f"warning: {error}; its lines are kept, and written with the next ones")
            self.has_failed = True

    def sync(self) -> None:
        """Writes what is kept, and returns when every line is on disk.

        Raises:
            WriteError: The file system refused; the lines are kept.
        """
        if self.unsynced:
            self._write(b"", syncs=True)

    def _write(self, new: bytes, *, syncs: bool) -> None:
        """Appends what is new, or all that is not on disk where the file may not hold it."""
        was_torn, self.is_torn = self.is_torn, True  # until all of this has worked
        content = b"".join(self.unsynced) if was_torn else new
        with writing(self.file, len(content)):
            with self.file.open("ab", buffering=0) as stream:
                size = stream.tell()
                self.start = size if self.start is None else min(size, self.start)
                if was_torn:
                    stream.truncate(self.start)
                while content:
                    content = content[stream.write(content) :]
                if syncs:
                    os.fsync(stream.fileno())
            if syncs:
                flush_to_disk(self.file.parent)
        self.is_torn = False
        if syncs:
            self._forget()

    def _forget(self) -> None:
        """Every line is on disk."""
        self.unsynced, self.start, self.is_torn = [], None, False
        self.synced_at = monotonic()

    def read(self) -> dict[int, dict[str, Any]]:
        """The last entry of each iteration, by its number. Lines that cannot be read are passed over."""
        entries = (_entry(line) for _, line in self._lines())
        return {entry.pop("iteration"): entry for entry in entries if entry is not None}

    def keep(self, last: int, *, several: bool = False) -> set[int]:
        """Removes what comes after iteration `last`, and reports other lines that go: those that are no entry, and,
        unless an iteration has `several`, those with a later line of the same iteration. A last line that a crash has
        torn goes unreported.

        Returns:
            The iterations that are left.

        Raises:
            WriteError: The file system refused; the file is as it was.
        """
        kept: dict[int, bytes] = {}
        numbers: dict[int, int] = {}
        broken, doubled = [], []
        for number, line in self._lines():
            entry = _entry(line)
            if entry is None:
                broken += [number] if line.endswith(b"\n") and line.strip() else []
                continue
            iteration = entry["iteration"]
            if iteration > last:
                continue
            if iteration in numbers and not several:
                doubled.append(numbers[iteration])
                del kept[numbers[iteration]]
            numbers[iteration] = number
            kept[number] = line if line.endswith(b"\n") else line + b"\n"
        self._replace(kept.values())
        self._report_removed(broken, "that could not be read")
        self._report_removed(doubled, "with a later one of the same iteration")
        return set(numbers)

    def _report_removed(self, numbers: list[int], reason: str) -> None:
        if numbers:
            what = counted(len(numbers), "line")
            self.report(f"{self.file}: {what} {reason} removed: {in_spans(sorted(numbers))}")

    def replace(self, iteration: int, entry: Mapping[str, Any]) -> None:
        """Puts an entry in the place of all of this iteration and later ones.

        Raises:
            WriteError: The file system refused; the file is as it was.
        """
        self.sync()
        earlier = [line for _, line in self._lines() if (read := _entry(line)) and read["iteration"] < iteration]
        self._replace([*earlier, json.dumps(entry).encode() + b"\n"])

    def _replace(self, lines: Iterable[bytes]) -> None:
        content = b"".join(lines)
        with writing(self.file):
            is_same = content == (self.file.read_bytes() if self.file.exists() else b"")
        if not is_same:
            replace_file(self.file, content)
        self._forget()

    def _lines(self) -> Iterator[tuple[int, bytes]]:
        """Every line with its number, counted from 1."""
        with writing(self.file):
            lines = self.file.read_bytes().splitlines(keepends=True) if self.file.exists() else []
        return enumerate(lines, start=1)


def read_entries(file: Path) -> list[dict[str, Any]]:
    """Every entry of a file of JSON lines, in order; lines that cannot be read are passed over. Empty where there is no
    file."""
    try:
        lines = file.read_bytes().splitlines()
    except OSError:
        return []
    return [entry for line in lines if (entry := _entry(line)) is not None]


def last_iteration(file: Path) -> int:
    """The greatest iteration in a file of JSON lines; 0 where there is none."""
    return max((entry["iteration"] for entry in read_entries(file)), default=0)


def _entry(line: bytes) -> dict[str, Any] | None:
    """The entry in a line; None where it is no object with the number of an iteration."""
    try:
        entry = json.loads(line.decode(errors="replace"))
    except (ValueError, RecursionError):
        return None
    number = entry.get("iteration") if isinstance(entry, dict) else None
    return entry if type(number) is int and number >= 0 else None
