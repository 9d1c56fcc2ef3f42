"""Checkpoints come back as they were, or not at all."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor
from torch.testing import assert_close
from transformers import LlamaConfig, LlamaForCausalLM

from llmrl.files import WriteError
from llmrl.optim.config import OptimizerConfig
from llmrl.optim.local import LocalTrainable
from llmrl.trainers import checkpoint
from llmrl.trainers.checkpoint import (
    CheckpointError,
    list_checkpoints,
    newest_sound,
    not_finite,
    read_state,
    save_checkpoint,
    verify_checkpoint,
)

STATE = {
    "cursor": {"iteration": 3, "examples": {"position": 12, "name": "a/b.c", "order": [2, 0, 1]}},
    "trained": {
        "actor": {
            "parameters": {
                "model.layers.0.weight": torch.tensor([[1.0, -0.0], [float("inf"), 1e-40]]),
                "model.norm.bias": torch.tensor([0.1, 3.0], dtype=torch.bfloat16),
            },
            "optimizer": {"model.norm.bias": {"step": torch.tensor(7.0), "count": torch.tensor(9, dtype=torch.int64)}},
            "mask": torch.tensor([True, False]),
            "none": torch.zeros(0, 2),
            "num_skipped": 0,
        },
        "critic": {},
    },
    "kl_coef": 0.05,
    "best": None,
    "done": False,
}


def save(folder: Path, number: int, state: dict[str, Any] = STATE, *, keep: int = 9) -> Path:
    step = folder / f"step_{number:06d}"
    save_checkpoint(step, state, keep=keep)
    return step


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def assert_same(loaded: Any, saved: Any) -> None:
    if isinstance(saved, dict):
        assert loaded.keys() == saved.keys()
        for key in saved:
            assert_same(loaded[key], saved[key])
    elif isinstance(saved, Tensor):
        assert_close(loaded, saved, rtol=0.0, atol=0.0)
        assert loaded.shape == saved.shape
    else:
        assert loaded == saved
        assert type(loaded) is type(saved)


# --- what comes back --------------------------------------------------------------------------------------------------


def test_a_state_comes_back_as_it_was(tmp_path: Path):
    assert_same(read_state(save(tmp_path, 3)), STATE)


def test_saving_leaves_the_state_alone(tmp_path: Path):
    state = {"a": {"x": torch.ones(2), "n": 1}}
    save(tmp_path, 1, state)
    assert_same(state, {"a": {"x": torch.ones(2), "n": 1}})


@pytest.mark.parametrize("state", [{}, {"a": {"b": {}}}, {"n": 1}, {"x": torch.ones(1)}])
def test_a_state_may_lack_tensors_or_numbers(tmp_path: Path, state: dict):
    assert_same(read_state(save(tmp_path, 1, state)), state)


def test_tensors_that_share_memory_are_each_saved_whole(tmp_path: Path):
    table = torch.arange(6.0).view(2, 3)
    state = {
        "embedding": table,
        "head": table,
        "row": table[1],
        "transposed": table.T,
        "expanded": torch.tensor([[5.0]]).expand(2, 2),
        "strided": torch.arange(8.0)[::2],
    }
    expected = {
        "embedding": torch.tensor([[0.0, 1.0, 2.0], [3.0, 4.0, 5.0]]),
        "head": torch.tensor([[0.0, 1.0, 2.0], [3.0, 4.0, 5.0]]),
        "row": torch.tensor([3.0, 4.0, 5.0]),
        "transposed": torch.tensor([[0.0, 3.0], [1.0, 4.0], [2.0, 5.0]]),
        "expanded": torch.tensor([[5.0, 5.0], [5.0, 5.0]]),
        "strided": torch.tensor([0.0, 2.0, 4.0, 6.0]),
    }
    assert_same(read_state(save(tmp_path, 1, state)), expected)


def tied_model() -> LlamaForCausalLM:
    sizes: dict[str, Any] = {"vocab_size": 8, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2, tie_word_embeddings=True))


def test_a_trained_model_with_tied_embeddings_comes_back_with_its_moments(tmp_path: Path):
    before, after = tied_model(), tied_model()
    trainable = LocalTrainable(before, OptimizerConfig(learning_rate=0.1), num_steps=2)
    ids = torch.arange(8)[None]
    trainable.backward(before(input_ids=ids, labels=ids).loss)
    trainable.optimizer_step()
    step = save(tmp_path, 1, trainable.state_dict())

    restored = LocalTrainable(after, OptimizerConfig(learning_rate=0.1), num_steps=2)
    restored.load_state_dict(read_state(step))
    assert_same(restored.state_dict(), trainable.state_dict())
    assert after.lm_head.weight is after.model.embed_tokens.weight
    assert not torch.equal(after.lm_head.weight, tied_model().lm_head.weight)


def test_a_name_may_not_hold_the_separator(tmp_path: Path):
    with pytest.raises(AssertionError, match="policy/loss"):
        save(tmp_path, 1, {"policy/loss": 1.0})


def test_the_files_are_safetensors_and_json(tmp_path: Path):
    step = save(tmp_path, 3)
    assert names(step) == ["manifest.json", "state.json", "state.safetensors"]
    with safe_open(step / "state.safetensors", "pt") as tensors:
        assert "trained/actor/parameters/model.layers.0.weight" in set(tensors.keys())
    assert json.loads((step / "state.json").read_text())["kl_coef"] == 0.05
    assert json.loads((step / "manifest.json").read_text())["files"].keys() == {"state.json", "state.safetensors"}


# --- whole or not at all ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("moment", ["_fingerprint", "flush_to_disk", "rename"])
def test_a_write_that_breaks_off_is_never_seen_and_later_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
):
    def fail(*_: object) -> None:
        raise OSError("No space left on device")

    old = save(tmp_path, 1, {"n": 1}, keep=1)
    with monkeypatch.context() as patch:
        patch.setattr(*(Path, "rename") if moment == "rename" else (checkpoint, moment), fail)
        with pytest.raises(WriteError, match=r"step_000002 cannot be written: No space"):
            save(tmp_path, 2, {"n": 2}, keep=1)
    assert names(tmp_path) == [*([".step_000002.partial"] if moment == "rename" else []), "step_000001"]
    assert list_checkpoints(tmp_path) == [old]
    assert read_state(old) == {"n": 1}

    new = save(tmp_path, 3, {"n": 3}, keep=1)
    assert names(tmp_path) == ["step_000003"]
    assert read_state(new) == {"n": 3}


def test_the_manifest_is_the_last_file_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    seen = []
    real = checkpoint._fingerprint
    monkeypatch.setattr(checkpoint, "_fingerprint", lambda file: seen.append(names(file.parent)) or real(file))
    save(tmp_path, 1)
    assert seen == [["state.json", "state.safetensors"]] * 2


@pytest.mark.parametrize("name", ["state.safetensors", "state.json"])
def test_an_altered_file_is_refused_by_name(tmp_path: Path, name: str):
    step = save(tmp_path, 3)
    content = bytearray((step / name).read_bytes())
    content[-2] ^= 1
    (step / name).write_bytes(bytes(content))
    with pytest.raises(CheckpointError, match=rf"step_000003/{name} is not what was saved"):
        verify_checkpoint(step)


@pytest.mark.parametrize("name", ["state.safetensors", "state.json"])
def test_a_shortened_file_is_refused(tmp_path: Path, name: str):
    step = save(tmp_path, 3)
    (step / name).write_bytes((step / name).read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="is not what was saved"):
        verify_checkpoint(step)


@pytest.mark.parametrize("name", ["state.safetensors", "state.json", "manifest.json"])
def test_a_missing_file_is_refused(tmp_path: Path, name: str):
    step = save(tmp_path, 3)
    (step / name).unlink()
    with pytest.raises(CheckpointError, match=rf"step_000003 is no complete checkpoint .*{name}"):
        verify_checkpoint(step)


@pytest.mark.parametrize(
    "text", ["{", "", "[]", "null", "7", "[" * 10_000, '{"files": {}}', '{"files": null}', '{"files": []}']
)
def test_a_broken_manifest_is_refused(tmp_path: Path, text: str):
    step = save(tmp_path, 3)
    (step / "manifest.json").write_text(text)
    with pytest.raises(CheckpointError, match="no complete checkpoint"):
        verify_checkpoint(step)


# --- which are there --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("keep", "kept"), [(1, [4]), (2, [3, 4]), (9, [1, 2, 3, 4])])
def test_the_newest_are_kept(tmp_path: Path, keep: int, kept: list[int]):
    for number in (1, 2, 3, 4):
        save(tmp_path, number, {"n": number}, keep=keep)
    assert [read_state(step)["n"] for step in list_checkpoints(tmp_path)] == kept
    assert len(names(tmp_path)) == len(kept)


def test_none_is_removed_where_none_is_to_be(tmp_path: Path):
    for number in (1, 2, 3):
        save_checkpoint(tmp_path / f"step_{number:06d}", {"n": number}, keep=None)
    assert names(tmp_path) == ["step_000001", "step_000002", "step_000003"]


def damage(step: Path) -> None:
    (step / "state.json").write_text("{}")


def test_damaged_ones_are_passed_over_and_told(tmp_path: Path):
    told: list[str] = []
    steps = [save(tmp_path, number) for number in (1, 2, 3, 4)]
    assert newest_sound(tmp_path, told.append) == (steps[3], [])
    damage(steps[3])
    (steps[2] / "manifest.json").unlink()
    assert newest_sound(tmp_path, told.append) == (steps[1], [steps[3], steps[2]])
    assert [text.partition(":")[0] for text in told] == ["warning", "warning"]
    assert "step_000004/state.json is not what was saved" in told[0]
    assert "step_000003 is no complete checkpoint" in told[1]


def test_none_that_is_sound_is_an_error_that_names_all(tmp_path: Path):
    for number in (1, 2):
        damage(save(tmp_path, number))
    with pytest.raises(CheckpointError, match=r"can be continued from: .*step_000002.*step_000001"):
        newest_sound(tmp_path, print)
    assert newest_sound(tmp_path / "missing", print) == (None, [])


@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("place", ["a/b", "number", "a/half"])
def test_what_is_not_finite_is_found(place: str, wrong: float):
    state: dict[str, Any] = {
        "a": {"b": torch.zeros(2, 2), "half": torch.zeros(3, dtype=torch.bfloat16), "count": torch.tensor([7])},
        "number": 1.0,
        "other": [None, "nan", 3, True],
    }
    assert not_finite(state) is None
    if place == "number":
        state["number"] = wrong
    else:
        state["a"][place.removeprefix("a/")].view(-1)[1] = wrong
    assert not_finite(state) == place


def test_a_step_that_is_there_is_replaced_whole(tmp_path: Path):
    step = save(tmp_path, 1, {"n": 1})
    (step / "left_over").touch()
    save(tmp_path, 1, {"n": 2})
    assert read_state(step) == {"n": 2}
    assert names(step) == ["manifest.json", "state.json", "state.safetensors"]


def test_the_list_is_ordered_by_number_and_holds_nothing_else(tmp_path: Path):
    for name in ("step_1000000", "step_000002", "step_999999", "step_000001_mine", "notes", ".step_000003.partial"):
        (tmp_path / name).mkdir()
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step_000002", "step_999999", "step_1000000"]
    assert list_checkpoints(tmp_path / "missing") == []
