"""What the environment of a launcher says, and what of it is refused."""

import pytest

from llmrl.distributed.launch import (
    Launch,
    LaunchError,
    check_mixed_precision,
    check_rendezvous,
    gpu_warning,
    local_rank,
    read_launch,
)

DEEPSPEED = {"ACCELERATE_USE_DEEPSPEED": "true"}
RENDEZVOUS = {"WORLD_SIZE": "2", "RANK": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}
FSDP = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}


@pytest.fixture(autouse=True)
def nobody(monkeypatch: pytest.MonkeyPatch):
    """No launcher's environment but what a test sets."""
    import os

    for name in list(os.environ):
        if name.startswith(("ACCELERATE_", "FSDP_")) or name in (*RENDEZVOUS, "LOCAL_RANK", "CUDA_VISIBLE_DEVICES"):
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
    ("precision", "dtype"), [("no", "float32"), ("no", "bfloat16"), ("", "bfloat16"), ("bf16", "bfloat16")]
)
def test_a_mixed_precision_that_is_the_recipes_is_accepted(monkeypatch, precision, dtype):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", precision)
    check_mixed_precision(dtype)


@pytest.mark.parametrize(
    ("precision", "dtype", "way_out"),
    [
        ("bf16", "float32", 'set mixed_precision to "no", or model.dtype to bfloat16'),
        ("fp16", "bfloat16", 'set mixed_precision to "no"'),
        ("fp8", "float32", 'set mixed_precision to "no"'),
    ],
)
def test_a_mixed_precision_that_differs_is_refused_by_both_names(monkeypatch, precision, dtype, way_out):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", precision)
    with pytest.raises(LaunchError) as refusal:
        check_mixed_precision(dtype)
    message = str(refusal.value)
    assert message.startswith(f"mixed_precision ({precision}) of the launch")
    assert f"differs from model.dtype ({dtype})" in message
    assert message.endswith(way_out)


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


# --- what a launcher leaves behind ------------------------------------------------------------------------------------


@pytest.mark.parametrize("environment", [{"WORLD_SIZE": ""}, {"WORLD_SIZE": "1", "RANK": "0"}, {"LOCAL_RANK": "-1"}])
def test_leftovers_that_say_nothing_are_passed_over(monkeypatch, environment):
    assert launched(monkeypatch, **environment) == Launch(world_size=1, sharding="none")


@pytest.mark.parametrize("size", ["0", "-1", "two", "1.5", "²"])
def test_a_number_of_processes_that_is_none_is_refused(monkeypatch, size):
    with pytest.raises(
        LaunchError, match=rf"^WORLD_SIZE \({size}\) in the environment must be a whole number from 1 on"
    ):
        launched(monkeypatch, WORLD_SIZE=size)


@pytest.mark.parametrize(("rank", "expected"), [(None, 0), ("", 0), ("-1", 0), ("0", 0), ("3", 3)])
def test_the_number_of_a_process_on_its_machine(monkeypatch, rank, expected):
    if rank is not None:
        monkeypatch.setenv("LOCAL_RANK", rank)
    assert local_rank() == expected


def test_a_number_on_the_machine_that_is_none_is_refused(monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "first")
    with pytest.raises(LaunchError, match=r"^LOCAL_RANK \(first\)"):
        local_rank()


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({}, None),
        ({"RANK": ""}, r"^WORLD_SIZE \(2\) is set .* and RANK not: unset WORLD_SIZE for one process, or start several"),
        ({"RANK": "", "MASTER_ADDR": "", "MASTER_PORT": ""}, "and RANK and MASTER_ADDR and MASTER_PORT not:"),
        ({"RANK": "2"}, r"^RANK \(2\) in the environment must be less than WORLD_SIZE \(2\)"),
        ({"RANK": "-1"}, r"^RANK \(-1\) in the environment must be a whole number from 0 on"),
        ({"MASTER_PORT": "port"}, r"^MASTER_PORT \(port\) in the environment must be a whole number"),
    ],
)
def test_ranks_that_could_not_meet_do_not_wait(monkeypatch, changed, told):
    for name, value in (RENDEZVOUS | changed).items():
        monkeypatch.setenv(name, value)
    if told is None:
        check_rendezvous(2)
        return
    with pytest.raises(LaunchError, match=told):
        check_rendezvous(2)


@pytest.mark.parametrize(
    ("environment", "warns"),
    [
        ({}, False),
        ({"ACCELERATE_MIXED_PRECISION": "no"}, True),
        ({"ACCELERATE_MIXED_PRECISION": "no", "ACCELERATE_USE_CPU": "False"}, True),
        ({"ACCELERATE_MIXED_PRECISION": "no", "ACCELERATE_USE_CPU": "True"}, False),
        ({"ACCELERATE_MIXED_PRECISION": "no", "CUDA_VISIBLE_DEVICES": ""}, False),
        ({"ACCELERATE_MIXED_PRECISION": "no", "CUDA_VISIBLE_DEVICES": "-1,-1"}, False),
        ({"ACCELERATE_MIXED_PRECISION": "no", "CUDA_VISIBLE_DEVICES": "0,1"}, True),
        (RENDEZVOUS, True),
    ],
)
def test_a_launch_for_gpus_that_computes_on_the_cpu_is_told(monkeypatch, environment, warns):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert (gpu_warning(has_gpu=False) is not None) == warns
    assert gpu_warning(has_gpu=True) is None
