import errno
import json
import os
import shutil
import stat
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from llmrl.files import WriteError, read_object, replaced_folder, restore_folder, write_atomically, writing


def test_what_is_written_reads_back_and_nothing_lies_beside_it(tmp_path: Path):
    file = tmp_path / "a.json"
    write_atomically(file, {"n": [1, None], "ü": "🙂"})
    assert json.loads(file.read_text()) == {"n": [1, None], "ü": "🙂"} == read_object(file)
    assert list(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"\xff\xfe\x00", b"null"])
def test_what_is_no_object_is_none(tmp_path: Path, content: bytes):
    (tmp_path / "a.json").write_bytes(content)
    assert read_object(tmp_path / "a.json") is None
    assert read_object(tmp_path / "b.json") is None
    assert read_object(tmp_path) is None


def test_a_failure_of_the_file_system_is_one_line_with_the_place(tmp_path: Path):
    with pytest.raises(WriteError) as failed, writing(tmp_path / "x"):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert str(failed.value) == f"{tmp_path / 'x'} cannot be written: No space left on device"


def test_so_is_that_of_safetensors_and_its_other_complaints_are_not(tmp_path: Path):
    place = tmp_path / "no" / "such" / "folder"
    with pytest.raises(WriteError, match=r"folder cannot be written: No such file or directory$"), writing(place):
        save_file({"x": torch.zeros(1)}, place / "w.safetensors")
    with pytest.raises(SafetensorError, match="shape"), writing(place):
        raise SafetensorError("shape of a tensor")


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.EACCES, errno.EFBIG])
def test_a_failure_says_how_much_was_to_be_written_and_what_is_free(
    tmp_path: Path, number: int, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(shutil, "disk_usage", lambda place: mock.Mock(free=3 * 2**19) if place == tmp_path else None)
    with pytest.raises(WriteError) as failed, writing(tmp_path / "x" / "y", 5 * 2**30):
        raise OSError(number, os.strerror(number))
    assert str(failed.value) == (
        f"{tmp_path / 'x' / 'y'} cannot be written: {os.strerror(number)} (5 GiB needed, 1.5 MiB free)"
    )


def test_a_disk_that_does_not_say_what_is_free_hides_no_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(shutil, "disk_usage", mock.Mock(side_effect=OSError(errno.EIO, "")))
    with pytest.raises(WriteError, match=r"Input/output error \(1 KiB needed\)$"), writing(tmp_path, 1024):
        raise OSError(errno.EIO, os.strerror(errno.EIO))


# --- on disk ----------------------------------------------------------------------------------------------------------


class Calls:
    """Counts the calls that change files, by name and path, and lets one of them fail or be the last."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.made: list[tuple[str, str]] = []
        self.fails = 0
        self.error: BaseException = OSError(errno.EIO, os.strerror(errno.EIO))
        for name in ("fsync", "rename", "replace", "mkdir", "unlink", "rmdir"):
            monkeypatch.setattr(os, name, self.counted(name, getattr(os, name)))

    def counted(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(first: Any, *rest: Any, **named: Any) -> Any:
            place = os.readlink(f"/proc/self/fd/{first}") if isinstance(first, int) else str(first)
            self.made.append((name, Path(place).name))
            if self.fails and len(self.made) >= self.fails and (self.is_dead or len(self.made) == self.fails):
                raise self.error
            return real(first, *rest, **named)

        return call

    @property
    def is_dead(self) -> bool:
        """Whether the process was killed: nothing more can be done."""
        return isinstance(self.error, Killed)


class Killed(BaseException):
    """The process ends here."""


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    return Calls(monkeypatch)


def test_a_file_is_on_disk_before_it_gets_its_name_and_so_is_the_name(tmp_path: Path, calls: Calls):
    write_atomically(tmp_path / "a.json", {})
    assert calls.made == [
        ("fsync", ".a.json.partial"),
        ("replace", ".a.json.partial"),
        ("fsync", tmp_path.name),
    ]
    write_atomically(tmp_path / "a.json", {}, syncs=False)
    assert calls.made[3:] == [("replace", ".a.json.partial")]


def test_a_folder_is_on_disk_before_it_gets_its_name_and_so_is_the_name(tmp_path: Path, calls: Calls):
    write_model(tmp_path / "final", "1")
    synced = [place for call, place in calls.made[:-2] if call == "fsync"]
    assert sorted(synced) == [".final.new", "adapter", "w", "x"]
    assert calls.made[-2:] == [("rename", ".final.new"), ("fsync", tmp_path.name)]


def write_model(folder: Path, content: str) -> None:
    with replaced_folder(folder) as new:
        (new / "w").write_text(content)
        (new / "adapter").mkdir()
        (new / "adapter" / "x").write_text(content)


def assert_is_model(folder: Path, *contents: str) -> None:
    assert (folder / "w").read_text() == (folder / "adapter" / "x").read_text()
    assert (folder / "w").read_text() in contents


@pytest.mark.parametrize("is_linked", [False, True])
@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "full"), Killed()])
def test_a_folder_is_the_old_one_or_the_new_one_wherever_it_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException, is_linked: bool
):
    (tmp_path / "run").mkdir()
    folder = tmp_path / "run" / "final"
    if is_linked:
        folder.symlink_to(tmp_path / "disk" / "m")
        (tmp_path / "disk").mkdir()
    write_model(folder, "0")
    write_model(folder, "1")
    for k in range(1, 100):
        with monkeypatch.context() as patch:
            calls = Calls(patch)
            calls.fails, calls.error = k, error
            with suppress(WriteError, Killed):
                write_model(folder, "2")
        if isinstance(error, OSError):
            assert_is_model(folder, "1", "2")
        restore_folder(folder)
        assert_is_model(folder, "1", "2")
        assert folder.is_symlink() == is_linked
        assert [path.name for path in folder.parent.iterdir()] == ["final"]
        assert [path.name for path in folder.resolve().parent.iterdir()] == [folder.resolve().name]
        if len(calls.made) < k:
            break
        write_model(folder, "1")
    assert k > 12
    assert_is_model(folder, "2")


def test_a_failure_that_is_none_of_the_file_system_leaves_the_folder_and_nothing_else(tmp_path: Path):
    write_model(tmp_path / "final", "1")
    with suppress(ZeroDivisionError), replaced_folder(tmp_path / "final") as new:
        (new / "w").write_text("2")
        raise ZeroDivisionError
    assert_is_model(tmp_path / "final", "1")
    assert [path.name for path in tmp_path.iterdir()] == ["final"]


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP])
def test_a_file_system_that_cannot_sync_names_is_written_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
):
    real = os.fsync

    def refuse_folders(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(number, os.strerror(number))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", refuse_folders)
    write_model(tmp_path / "final", "1")
    assert_is_model(tmp_path / "final", "1")


def test_a_file_that_cannot_be_brought_to_disk_is_as_it_was(tmp_path: Path, calls: Calls):
    write_atomically(tmp_path / "a.json", {"n": 1})
    calls.fails = len(calls.made) + 1
    with pytest.raises(WriteError, match=r"a\.json cannot be written: Input/output error \(12 B needed"):
        write_atomically(tmp_path / "a.json", {"n": 2})
    assert read_object(tmp_path / "a.json") == {"n": 1}
    assert len(list(tmp_path.iterdir())) == 1


def test_a_link_to_a_file_stays(tmp_path: Path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "a.json").symlink_to(tmp_path / "disk" / "b.json")
    write_atomically(tmp_path / "a.json", {"n": 1})
    assert (tmp_path / "a.json").is_symlink()
    assert read_object(tmp_path / "disk" / "b.json") == {"n": 1}
