"""What a model computes in where its recipe leaves that open. No GPU is needed: only its name counts."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from llmrl.models.config import ModelConfig
from llmrl.rewards.config import LearnedRewardConfig, RewardConfig
from llmrl.wiring import precision
from llmrl.wiring.actors import load_actor
from llmrl.wiring.checks import reward_model_config
from llmrl.wiring.engines import load_for_sampling
from llmrl.wiring.precision import dtype_of, precision_warnings, with_dtypes
from tests.contexts import CPU
from tests.models.tiny import gpt2, llama, qwen2

from .conftest import TINY, build_run

OPEN = replace(TINY, dtype=None)


@pytest.fixture
def config(config):
    return replace(config, model=OPEN)


@pytest.fixture
def on(monkeypatch):
    """The machine has a device of this type."""

    def have(device_type):
        monkeypatch.setattr(precision, "pick_device", lambda: torch.device(device_type))

    return have


@pytest.mark.parametrize(("device", "open_dtype"), [("cpu", torch.float32), ("cuda", torch.bfloat16)])
def test_null_is_what_suits_the_device(on, device, open_dtype):
    on(device)
    assert dtype_of(ModelConfig(path="x")) == open_dtype
    assert dtype_of(ModelConfig(path="x", dtype="float32")) == torch.float32
    assert dtype_of(ModelConfig(path="x", dtype="bfloat16")) == torch.bfloat16


@pytest.mark.parametrize(("device", "name"), [("cpu", "float32"), ("cuda", "bfloat16")])
def test_no_dtype_of_a_run_stays_open(on, config, device, name):
    on(device)
    learned = replace(config, reward=RewardConfig(model=LearnedRewardConfig(path="x")))
    filled = with_dtypes(learned)
    assert (filled.model.dtype, reward_model_config(filled).dtype) == (name, name)
    assert replace(filled, model=learned.model) == learned
    assert with_dtypes(filled) == filled


def test_a_run_records_what_it_computes_in(on, config):
    on("cuda")
    run, _ = build_run(config)
    run.prepare()
    settings = json.loads(Path(config.run.output_dir, "config.json").read_text())["settings"]
    assert settings["model"]["dtype"] == "bfloat16"
    assert run.trainer.trained["actor"].module.dtype == torch.bfloat16


def test_a_run_that_goes_on_elsewhere_is_told(on, config):
    on("cuda")
    run, _ = build_run(config)
    run.train()
    on("cpu")
    run, messages = build_run(replace(config, run=replace(config.run, resume=True, num_iterations=4)))
    run.prepare()
    assert "changed since the run was last started: model.dtype was bfloat16, is float32" in messages


@pytest.mark.parametrize(
    ("model", "dtype", "device", "told"),
    [
        (llama, torch.float32, "cuda", True),  # 4 heads on 2 keys
        (llama, torch.float32, "cpu", False),
        (llama, torch.bfloat16, "cuda", False),
        (gpt2, torch.float32, "cuda", False),
        (qwen2, torch.float32, "cuda", True),
        (lambda: llama(num_key_value_heads=4), torch.float32, "cuda", False),
    ],
)
def test_float32_with_shared_keys_on_a_gpu_is_told(model, dtype, device, told):
    loaded = SimpleNamespace(config=model().config, device=torch.device(device))
    warnings = list(precision_warnings(loaded, dtype))
    assert len(warnings) == told
    assert all("share 2 keys" in warning and "model.dtype=bfloat16" in warning for warning in warnings)


def test_a_model_that_only_samples_is_loaded_in_what_suits_the_device(on):
    on("cuda")
    _, model = load_for_sampling(OPEN, CPU)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


def test_an_actor_on_its_own_computes_in_what_suits_the_device(on):
    on("cuda")
    actor = load_actor(OPEN, CPU, temperature=1.0, seed=0)
    assert actor.dtype == actor.module.dtype == torch.bfloat16
    assert {p.dtype for p in actor.model.parameters()} == {torch.float32}
