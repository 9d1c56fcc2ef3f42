"""What the environment of a launcher says, and what of it is refused."""

import pytest

from llmrl.distributed.launch import Launch, LaunchError, read_launch

DEEPSPEED = {"ACCELERATE_USE_DEEPSPEED": "true"}
FSDP = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}


@pytest.fixture(autouse=True)
def nobody(monkeypatch: pytest.MonkeyPatch):
    """No launcher's environment but what a test sets."""
    import os

    for name in list(os.environ):
        if name.startswith(("ACCELERATE_", "FSDP_")) or name == "WORLD_SIZE":
            monkeypatch.delenv(name)


def launched(monkeypatch: pytest.MonkeyPatch, **environment: str) -> Launch:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    return read_launch()


def test_without_a_launcher_there_is_one_process_with_all_weights(monkeypatch):
    launch = launched(monkeypatch)
    assert launch == Launch(world_size=1, sharding="none")
    assert not launch.splits_weights


@pytest.mark.parametrize(
    ("environment", "sharding", "stage", "splits"),
    [
        ({}, "none", 0, False),
        (FSDP, "fsdp", 0, True),
        (DEEPSPEED, "deepspeed", 2, False),  # accelerate's default stage
        (DEEPSPEED | {"ACCELERATE_DEEPSPEED_ZERO_STAGE": "1"}, "deepspeed", 1, False),
        (DEEPSPEED | {"ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"}, "deepspeed", 3, True),
    ],
)
def test_what_a_launch_asks_for(monkeypatch, environment, sharding, stage, splits):
    launch = launched(monkeypatch, WORLD_SIZE="4", **environment)
    assert (launch.world_size, launch.sharding, launch.zero_stage, launch.splits_weights) == (
        4,
        sharding,
        stage,
        splits,
    )


@pytest.mark.parametrize(
    ("environment", "told"),
    [
        ({"ACCELERATE_MIXED_PRECISION": "bf16"}, r"mixed_precision \(bf16\).* model\.dtype to bfloat16"),
        ({"ACCELERATE_USE_MEGATRON_LM": "true"}, "Megatron-LM of the launch file is not supported"),
        (FSDP | {"FSDP_VERSION": "1"}, r"fsdp_version \(1\) of the launch file must be 2"),
        (FSDP | {"FSDP_OFFLOAD_PARAMS": "true"}, "fsdp_offload_params of the launch file is not supported"),
        (
            DEEPSPEED | {"ACCELERATE_DEEPSPEED_ZERO_STAGE": "0"},
            r"zero_stage \(0\) of the launch file must be 1, 2 or 3",
        ),
        (DEEPSPEED | {"ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE": "nvme"}, r"offload_param_device \(nvme\)"),
        (DEEPSPEED | {"ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": "nvme"}, r"offload_optimizer_device \(nvme\)"),
    ],
)
def test_what_is_not_served_is_refused_with_a_way_out(monkeypatch, environment, told):
    with pytest.raises(LaunchError, match=told):
        launched(monkeypatch, **environment)


@pytest.mark.parametrize(
    "section", ['"bf16": {"enabled": true}', '"fp16": {"enabled": true}', '"optimizer": {"type": "AdamW"}']
)
def test_a_file_of_deepspeed_may_not_say_what_the_recipe_says(monkeypatch, tmp_path, section):
    file = tmp_path / "deepspeed.json"
    file.write_text('{"zero_optimization": {"stage": 2}, ' + section + "}")
    with pytest.raises(LaunchError, match=f"^{section.split(chr(34))[1]} in the DeepSpeed file of the launch"):
        launched(monkeypatch, **DEEPSPEED, ACCELERATE_DEEPSPEED_CONFIG_FILE=str(file))


def test_a_file_of_deepspeed_says_the_stage(monkeypatch, tmp_path):
    file = tmp_path / "deepspeed.json"
    file.write_text('{"zero_optimization": {"stage": 3}, "bf16": {"enabled": false}}')
    assert launched(monkeypatch, **DEEPSPEED, ACCELERATE_DEEPSPEED_CONFIG_FILE=str(file)).zero_stage == 3


def test_deepspeed_that_is_not_installed_is_named(monkeypatch):
    monkeypatch.setattr("llmrl.distributed.launch.find_spec", lambda name: None)
    with pytest.raises(LaunchError, match=r"install llmrl\[deepspeed\]"):
        launched(monkeypatch, **DEEPSPEED)
