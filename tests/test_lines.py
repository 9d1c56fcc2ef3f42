"""Files of lines: nothing is lost, nothing is there twice, nothing that lies in them is a traceback."""

import errno
import io
import json
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from llmrl import lines
from llmrl.files import WriteError
from llmrl.lines import LineFile, read_entries


class Disk:
    """Replaces the calls that bring lines to disk: those from number `fails` on fail, `times` of them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: list[str] = []
        self.fails, self.times = 10**9, 0
        self.half = False
        """Whether a write that fails leaves half of its bytes, as a full disk does."""
        real_write, real_sync = io.FileIO.write, os.fsync
        disk = self

        class File(io.FileIO):
            def write(self, content: Any) -> int:
                if disk.is_due("write"):
                    if disk.half and not disk.is_over():
                        real_write(self, content[: len(content) // 2])
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                return real_write(self, content[: max(1, len(content) - 3)])  # a system may write less than it is given

            def truncate(self, size: int | None = None) -> int:
                if disk.is_due("truncate"):
                    raise OSError(errno.EIO, os.strerror(errno.EIO))
                return super().truncate(size)

        def sync(descriptor: int) -> None:
            if disk.is_due("fsync"):
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            real_sync(descriptor)

        real_open = Path.open

        def opened(path: Path, mode: str = "r", buffering: int = -1, *rest: Any, **named: Any) -> Any:
            if mode != "ab":
                return real_open(path, mode, buffering, *rest, **named)
            return File(path, mode)

        monkeypatch.setattr(Path, "open", opened)
        monkeypatch.setattr(os, "fsync", sync)

    def is_due(self, call: str) -> bool:
        self.calls.append(call)
        return self.fails <= len(self.calls) < self.fails + self.times

    def is_over(self) -> bool:
        return len(self.calls) >= self.fails + self.times


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Disk:
    return Disk(monkeypatch)


def make(folder: Path) -> tuple[LineFile, list[str]]:
    said: list[str] = []
    return LineFile(folder / "metrics.jsonl", said.append), said


def numbers(file: LineFile) -> list[int]:
    return [json.loads(line)["iteration"] for line in file.file.read_text().splitlines()]


def entries(*iterations: int) -> list[dict[str, Any]]:
    return [{"iteration": iteration, "x": 0.5} for iteration in iterations]


# --- writing ----------------------------------------------------------------------------------------------------------


def test_entries_are_lines_in_order(tmp_path: Path):
    file, said = make(tmp_path)
    file.append(entries(1))
    file.append(entries(2, 2))
    assert file.file.read_text() == '{"iteration": 1, "x": 0.5}\n' + 2 * '{"iteration": 2, "x": 0.5}\n'
    assert said == []


def test_what_could_not_be_written_is_written_with_the_next_lines(tmp_path: Path, disk: Disk):
    file, said = make(tmp_path)
    file.append(entries(1))
    disk.fails, disk.times, disk.half = len(disk.calls) + 1, 5, True
    file.append(entries(2))
    file.append(entries(3))
    disk.times = 0
    file.append(entries(4))
    assert numbers(file) == [1, 2, 3, 4]
    assert len(said) == 1
    assert said[0].startswith(f"warning: {file.file} cannot be written: No space left on device (27 B needed, ")
    assert said[0].endswith(" free); its lines are kept, and written with the next ones")


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("times", [1, 2, 3, 4])
@pytest.mark.parametrize("seconds", [0.0, 1e9])
def test_no_line_is_lost_or_doubled_whatever_call_fails(
    tmp_path: Path, disk: Disk, monkeypatch: pytest.MonkeyPatch, half: bool, times: int, seconds: float
):
    """Written and brought to disk at once, and at the end."""
    monkeypatch.setattr(lines, "SYNC_S", seconds)
    disk.half = half
    for k in range(1, 40):
        file, _ = make(tmp_path)
        file.file.unlink(missing_ok=True)
        disk.calls.clear()
        disk.fails, disk.times = k, times
        for iteration in (1, 2, 3, 4):
            file.append(entries(iteration, iteration))
        for _ in range(times):
            with suppress(WriteError):
                file.sync()
        file.sync()
        assert numbers(file) == [1, 1, 2, 2, 3, 3, 4, 4], k
        assert file.unsynced == []
    assert k > len(disk.calls)  # every call has failed once


def test_lines_that_were_written_but_not_brought_to_disk_are_written_again(tmp_path: Path, disk: Disk):
    """The system forgets what it could not bring there."""
    file, _ = make(tmp_path)
    file.append(entries(1, 2))
    disk.fails, disk.times = len(disk.calls) + 1, 1
    with pytest.raises(WriteError, match="Input/output error"):
        file.sync()
    disk.calls.clear()
    disk.fails = 10**9
    file.sync()
    assert disk.calls[0] == "truncate"
    assert "write" in disk.calls
    assert numbers(file) == [1, 2]


def test_lines_are_brought_to_disk_after_a_time_and_when_asked(
    tmp_path: Path, disk: Disk, monkeypatch: pytest.MonkeyPatch
):
    now = [100.0]
    monkeypatch.setattr(lines, "monotonic", lambda: now[0])
    file, _ = make(tmp_path)
    file.append(entries(1))
    assert "fsync" not in disk.calls
    now[0] += lines.SYNC_S
    file.append(entries(2))
    assert disk.calls.count("fsync") == 2  # the file, and its name in the folder
    file.append(entries(3))
    assert disk.calls.count("fsync") == 2
    file.sync()
    file.sync()
    assert disk.calls.count("fsync") == 4


def test_a_file_that_stays_unwritable_ends_the_run_in_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(lines, "MAX_UNWRITTEN", 3)
    file, said = make(tmp_path)
    file.file.mkdir()
    for iteration in (1, 2, 3):
        file.append(entries(iteration))
    with pytest.raises(WriteError, match="Is a directory"):
        file.append(entries(4))
    assert len(said) == 1
    file.file.rmdir()
    file.sync()
    assert numbers(file) == [1, 2, 3, 4]


def test_a_link_is_written_through(tmp_path: Path):
    (tmp_path / "disk").mkdir()
    file, _ = make(tmp_path)
    file.file.symlink_to(tmp_path / "disk" / "m")
    file.append(entries(1, 2))
    file.keep(1)
    file.append(entries(2))
    assert file.file.is_symlink()
    assert numbers(file) == [1, 2]


# --- what lies there --------------------------------------------------------------------------------------------------

BAD = [
    b"{", b"[]", b"7", b"null", b"\xff\xfe", b"\0\0\0", b"{}", b'{"iteration": "4"}', b'{"iteration": null}',
    b'{"iteration": true}', b'{"iteration": 1.0}', b'{"iteration": -1}', b"[" * 100_000, b"9" * 5000,
    b'{"iteration": 2, "we',
]  # fmt: skip


@pytest.mark.parametrize("bad", BAD)
def test_a_line_that_is_no_entry_is_named_and_hides_none_of_the_others(tmp_path: Path, bad: bytes):
    file, said = make(tmp_path)
    file.file.write_bytes(b'{"iteration": 1}\n' + bad + b'\n\n{"iteration": 2, "x": 3}\n')
    assert list(file.read()) == [1, 2]
    assert file.keep(5) == {1, 2}
    assert said == [f"{file.file}: 1 line that could not be read removed: 2"]
    assert file.file.read_text() == '{"iteration": 1}\n{"iteration": 2, "x": 3}\n'
    assert file.keep(5) == {1, 2}
    assert len(said) == 1


@pytest.mark.parametrize("torn", [b'{"iteration": 2, "we', b'{"iteration": 2}', b"{", b"\0\0\0", b"", b"\n"])
def test_a_torn_last_line_is_removed_and_a_whole_one_kept(tmp_path: Path, torn: bytes):
    file, said = make(tmp_path)
    file.file.write_bytes(b'{"iteration": 0}\n{"iteration": 1}\n' + torn)
    file.keep(5)
    whole = '{"iteration": 2}\n' if torn == b'{"iteration": 2}' else ""
    assert file.file.read_text() == '{"iteration": 0}\n{"iteration": 1}\n' + whole
    assert list(tmp_path.iterdir()) == [file.file]
    assert said == []


def test_the_last_line_of_an_iteration_counts(tmp_path: Path):
    file, said = make(tmp_path)
    text = '{"iteration": 1, "x": 1}\n{"iteration": 2}\n{"iteration": 1, "x": 2}\n{"iteration": 1, "x": 3}\n'
    file.file.write_text(text)
    assert file.read()[1] == {"x": 3}
    assert file.keep(5, several=True) == {1, 2}
    assert file.file.read_text() == text
    file.keep(5)
    assert file.file.read_text() == '{"iteration": 2}\n{"iteration": 1, "x": 3}\n'
    assert said == [f"{file.file}: 2 lines with a later one of the same iteration removed: 1, 3"]


def test_what_comes_after_an_iteration_is_removed(tmp_path: Path):
    file, said = make(tmp_path)
    file.append(entries(1, 2, 3, 4))
    assert file.keep(2) == {1, 2} == set(numbers(file))
    file.append(entries(3))
    assert numbers(file) == [1, 2, 3]
    assert said == []


def test_an_entry_takes_the_place_of_those_that_it_replaces(tmp_path: Path):
    file, _ = make(tmp_path)
    file.append(entries(1, 2, 3))
    file.replace(2, {"iteration": 2, "y": 1.0})
    assert file.read() == {1: {"x": 0.5}, 2: {"y": 1.0}}
    assert numbers(file) == [1, 2]


def test_a_replacement_that_fails_leaves_the_entry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    file, _ = make(tmp_path)
    file.append(entries(1, 2))
    file.sync()
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", refuse)
        with pytest.raises(WriteError, match=r"metrics\.jsonl cannot be written: No space"):
            file.replace(2, {"iteration": 2})
    assert file.read() == {1: {"x": 0.5}, 2: {"x": 0.5}}
    assert list(tmp_path.iterdir()) == [file.file]


def test_a_file_that_is_not_there_stays_away(tmp_path: Path):
    file, _ = make(tmp_path)
    assert file.keep(5) == set()
    assert file.read() == {}
    file.sync()
    assert list(tmp_path.iterdir()) == []


def test_every_entry_of_a_file_is_read_in_order(tmp_path):
    file = tmp_path / "samples.jsonl"
    assert read_entries(file) == []
    file.write_text('{"iteration": 1, "x": 1}\n[]\n{"iteration": 1, "x": 2}\n{"iteration": 0}\n{"iteration": 3, "x')
    assert read_entries(file) == [{"iteration": 1, "x": 1}, {"iteration": 1, "x": 2}, {"iteration": 0}]
