import json

import pytest
import torch
from safetensors.torch import save_file

from llmrl.models.folders import (
    ModelError,
    check_safetensors,
    find_folder,
    json_object,
    neighbour,
    reading_files,
    resolved,
    weight_files,
)

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:77\nsize 123456\n"


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def make_model(folder):
    folder.mkdir(parents=True)
    (folder / "config.json").write_text('{"model_type": "llama"}')
    save_file({"a": torch.zeros(10), "b": torch.zeros(2, 3)}, folder / "model.safetensors")
    return folder


def refusal(function, *args) -> str:
    with pytest.raises(ModelError) as error:
        function(*args)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_folder_is_named_from_the_root(here, monkeypatch):
    (here / "m").mkdir()
    monkeypatch.setenv("HOME", str(here / "someone"))
    assert [resolved(path) for path in ("m", "~/m", "other/m")] == [
        str(here / "m"),
        str(here / "someone" / "m"),
        "other/m",
    ]


# --- which folder is meant --------------------------------------------------------------------------------------------


def test_no_folder():
    assert refusal(find_folder, "./nowhere") == "model.path (./nowhere) is no folder; give a folder or a hub name"


def test_a_mistyped_folder_has_a_neighbour(here):
    make_model(here / "models" / "tiny_llama" / "final")
    told = "model.path (./modles/tiny_llama/final) is no folder; did you mean models/tiny_llama/final?"
    assert refusal(find_folder, "./modles/tiny_llama/final") == told
    assert neighbour("models/tiny_lama") == "models/tiny_llama"
    assert neighbour("models/tiny_llama") is None  # it is there
    assert neighbour("modles/nothing_of_the_kind") is None


def test_a_file(here):
    folder = make_model(here / "m")
    assert "is a file; name the folder that it lies in: m" in refusal(find_folder, "m/config.json")
    assert find_folder("m") == folder.relative_to(here)


def test_the_folder_of_a_run(here):
    make_model(here / "run" / "best")
    make_model(here / "run" / "final")
    (here / "run" / "config.json").write_text('{"settings": {"model": {}}, "versions": {}}')
    assert refusal(find_folder, "run").endswith("did you mean run/final?")
    (here / "run" / "final" / "config.json").unlink()
    assert refusal(find_folder, "run").endswith("did you mean run/best?")
    (here / "run" / "best" / "config.json").unlink()
    (here / "run" / "checkpoints").mkdir()
    assert "has saved no model yet" in refusal(find_folder, "run")


def test_a_checkpoint(here):
    folder = here / "run" / "checkpoints" / "step_000010"
    folder.mkdir(parents=True)
    for name in ("manifest.json", "state.json", "state.safetensors"):
        (folder / name).touch()
    told = refusal(find_folder, "run/checkpoints/step_000010")
    assert f"a run with run.output_dir={here / 'run'}" in told
    assert told.endswith(str(here / "run" / "final"))


def test_what_the_file_system_refuses_is_one_line():
    told = r"^model\.path \(m\) cannot be read: Permission denied: m/config\.json$"
    with pytest.raises(ModelError, match=told), reading_files("m"):
        raise PermissionError(13, "Permission denied", "m/config.json")


# --- whole files ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("content", ["", "{", "[1]", "null", "\xff", "[" * 100_000], ids=lambda content: content[:4])
def test_settings_that_are_no_object(here, content):
    (here / "config.json").write_text(content, encoding="latin-1")
    assert "has a config.json that is no JSON object" in refusal(json_object, here / "config.json", "m")


def test_pointers_of_git_lfs(here):
    folder = make_model(here / "m")
    for name in ("model.safetensors", "config.json"):
        (folder / name).write_text(POINTER)
    assert "config.json that is a Git LFS pointer" in refusal(json_object, folder / "config.json", "m")
    told = refusal(weight_files, folder, "m")
    assert "model.safetensors that is a Git LFS pointer" in told
    assert "`git lfs pull`" in told


def test_whole_weights(here):
    folder = make_model(here / "m")
    assert weight_files(folder, "m") == [folder / "model.safetensors"]
    (folder / "model.safetensors").unlink()
    assert weight_files(folder, "m") == []


@pytest.mark.parametrize("missing", [1, 30])
def test_weights_that_are_cut(here, missing):
    file = make_model(here / "m") / "model.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[:-missing])
    told = f"of {len(content) - missing} bytes, but its header promises {len(content)}: it is truncated"
    assert told in refusal(check_safetensors, file, "m")


@pytest.mark.parametrize(
    "content", [b"", b"PK\x03\x04", b"\x05" + bytes(7) + b"hello", b"\x02" + bytes(7) + b"[]", b"\xff" * 9]
)
def test_weights_of_another_format(here, content):
    file = here / "model.safetensors"
    file.write_bytes(content)
    assert "is no safetensors file" in refusal(check_safetensors, file, "m")


def test_weights_in_shards(here):
    folder = make_model(here / "m")
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    index = folder / "model.safetensors.index.json"
    names = {"a": "model-00001-of-00002.safetensors", "b": "model-00001-of-00002.safetensors"}
    index.write_text(json.dumps({"weight_map": names}))
    assert weight_files(folder, "m") == [folder / "model-00001-of-00002.safetensors"]
    index.write_text(json.dumps({"weight_map": names | {"c": "model-00002-of-00002.safetensors"}}))
    assert "lacks 1 of the 2 files" in refusal(weight_files, folder, "m")
    index.write_text("{}")
    assert "without a weight_map" in refusal(weight_files, folder, "m")


BINARY = ("pytorch_model.bin", "x.pkl", "..")
OUTSIDE = ("../other/a.safetensors", "/etc/a.safetensors", "b/a.safetensors")


@pytest.mark.parametrize("name", [*BINARY, *OUTSIDE])
def test_an_index_names_only_safetensors_files_of_its_folder(here, name):
    (here / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "m.safetensors", "b": name}}))
    assert f"names {name!r}, which is no safetensors file in the same folder" in refusal(weight_files, here, "m")
