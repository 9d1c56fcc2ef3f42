import errno
import json
import os
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from llmrl.files import WriteError, read_object, write_atomically, writing


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
    with pytest.raises(WriteError, match=r"folder cannot be written: .*os error 2"), writing(place):
        save_file({"x": torch.zeros(1)}, place / "w.safetensors")
    with pytest.raises(SafetensorError, match="shape"), writing(place):
        raise SafetensorError("shape of a tensor")
