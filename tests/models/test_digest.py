"""The digest of a model's files."""

import json
import shutil
from pathlib import Path

import pytest

from llmrl.models.config import ModelConfig
from llmrl.models.digest import BLOCK_BYTES, NUM_BLOCKS, WHOLE_BYTES, digest_of_file, digest_of_model


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "llama"}')
    (folder / "model.safetensors").write_bytes(bytes(1000))
    (folder / "README.md").write_text("about")
    return folder


def digest(folder: Path) -> str:
    return digest_of_model(ModelConfig(path=str(folder)))


def test_a_copy_has_the_same_digest_and_what_is_written_about_it_does_not_count(model: Path, tmp_path: Path):
    shutil.copytree(model, tmp_path / "copy")
    (tmp_path / "copy" / "README.md").write_text("else")
    assert digest(tmp_path / "copy") == digest(model)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "new.json"])
def test_every_file_of_the_model_counts(model: Path, name: str):
    before = digest(model)
    (model / name).write_bytes(bytes(999) + b"x")
    assert digest(model) != before


def test_names_count(model: Path):
    before = digest(model)
    (model / "model.safetensors").rename(model / "other.safetensors")
    assert digest(model) != before


def test_an_adapter_counts_with_its_base(model: Path, tmp_path: Path):
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(model)}))
    before = digest(adapter)
    (model / "model.safetensors").write_bytes(bytes(1001))
    assert digest(adapter) != before


def sparse(file: Path, *changed: int) -> str:
    """Digest of a large file of zeros, with other bytes at some places."""
    with file.open("wb") as stream:
        stream.truncate(WHOLE_BYTES * 4)
        for place in changed:
            stream.seek(place)
            stream.write(b"x")
    return digest_of_file(file)


def test_of_a_large_file_its_ends_and_blocks_between_count(tmp_path: Path):
    size = WHOLE_BYTES * 4
    gap = (size - BLOCK_BYTES) / (NUM_BLOCKS - 1)
    digests = [
        sparse(tmp_path / "w", *changed)
        for changed in [(), (0,), (size - 1,), (round(gap * 7) + 1,), (round(gap * 200) + BLOCK_BYTES // 2,)]
    ]
    assert len(set(digests)) == len(digests)
    assert sparse(tmp_path / "w", round(gap * 7) + 2 * BLOCK_BYTES) == digests[0]  # which is between two blocks
    with (tmp_path / "w").open("ab") as stream:
        stream.write(b"\0")
    assert digest_of_file(tmp_path / "w") != digests[0]
