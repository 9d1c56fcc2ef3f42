"""DeepSpeed's ZeRO in a group of one. Several ranks: tests/test_many_processes.py."""

from types import SimpleNamespace

import pytest
import torch

from llmrl.distributed.launch import deepspeed_settings
from llmrl.optim.config import OptimizerConfig
from llmrl.optim.deepspeed import DeepSpeedTrainable
from llmrl.optim.factory import make_trainable
from tests.contexts import CPU, context_of
from tests.distributed.one_rank import group  # noqa: F401
from tests.distributed.sharded import LikeLocal, network

pytestmark = [pytest.mark.usefixtures("group"), pytest.mark.slow]
OFFLOADED = {"OFFLOAD_OPTIMIZER_DEVICE": "cpu"}


@pytest.fixture(
    params=[("1", {}), ("2", {}), ("3", {}), ("2", OFFLOADED), ("3", OFFLOADED | {"OFFLOAD_PARAM_DEVICE": "cpu"})],
    ids=["zero1", "zero2", "zero3", "zero2-offload", "zero3-offload"],
    autouse=True,
)
def launch(request, monkeypatch):
    stage, offload = request.param
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_ZERO_STAGE", stage)
    for name, value in offload.items():
        monkeypatch.setenv(f"ACCELERATE_DEEPSPEED_{name}", value)


class TestDeepSpeedTrainable(LikeLocal):
    kind = DeepSpeedTrainable


def test_the_launch_says_the_stage_and_the_recipe_the_clipping(group):  # noqa: F811
    stage = deepspeed_settings()["zero_optimization"]["stage"]
    for max_norm, clipping in ((0.25, 0.25), (float("inf"), 0.0)):
        config = OptimizerConfig(max_grad_norm=max_norm)
        engine = DeepSpeedTrainable(network(), config, num_steps=1, collectives=group, device=CPU).wrapped
        assert engine.zero_optimization_stage() == stage
        assert engine.gradient_clipping() == clipping


def test_a_role_calls_the_engine(group):  # noqa: F811
    role = SimpleNamespace(module=network())
    trainable = make_trainable(role, OptimizerConfig(), num_steps=1, context=context_of(group))
    assert isinstance(trainable, DeepSpeedTrainable)
    assert role.module is trainable.wrapped is not trainable.module
    assert role.module(torch.ones(1, 3)).requires_grad


def test_what_ranks_send_at_once_is_little_unless_the_file_says_so(monkeypatch, tmp_path):
    assert deepspeed_settings()["zero_optimization"]["reduce_bucket_size"] == 50_000_000
    file = tmp_path / "deepspeed.json"
    file.write_text('{"zero_optimization": {"stage": 2, "reduce_bucket_size": 7, "offload_optimizer": null}}')
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_CONFIG_FILE", str(file))
    assert deepspeed_settings()["zero_optimization"]["reduce_bucket_size"] == 7
