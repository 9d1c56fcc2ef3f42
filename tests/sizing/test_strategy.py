import json
from dataclasses import replace

import pytest

from llmrl.distributed.launch import Launch
from llmrl.sizing import Strategy, launched_strategy
from llmrl.sizing.strategy import Split, gradients, host, resident, transient

SPLIT = Split(trained=1000, frozen=0, layer=100, root=200, largest=150)
ALONE = Strategy()


def over(num_devices: int, zero_stage: int = 0, **settings) -> Strategy:
    sharding = "deepspeed" if zero_stage else "fsdp"
    return Strategy(sharding=sharding, zero_stage=zero_stage, num_devices=num_devices, bucket_elements=500, **settings)


@pytest.mark.parametrize(
    ("strategy", "always", "of_gradients"),
    [
        (ALONE, 4000 + 8000, 4000),
        (Strategy(num_devices=4), 4000 + 8000, 4000),
        (over(4, 1), 4000 + (4000 + 8000) // 4, 2 * 1000),
        (over(4, 2), 4000 + (4000 + 8000) // 4, 2 * 1000),
        (over(4, 3), 2000 + (4000 + 4000 + 8000) // 4, 1000),  # with a bucket of 500 elements, kept
        (over(4), (4000 + 8000) // 4, 1000),
        (over(4, 2, offloads_optimizer=True), 4000 + 600, 0),
        (over(4, 3, offloads_optimizer=True), 2000 + 1000 + 600, 0),
        (over(4, 3, offloads_optimizer=True, offloads_weights=True), 2000 + 600, 0),
    ],
    ids=lambda x: x.name if isinstance(x, Strategy) else "",
)
def test_resident_by_hand(strategy, always, of_gradients):
    assert sum(num_bytes for _, num_bytes in resident(SPLIT, strategy)) == always
    assert gradients(SPLIT, strategy) == of_gradients


def test_weights_of_four_bits_by_hand():
    """Of 2**14 weights: half a byte each, 256 scales of a byte, and a float32 number for these."""
    split = replace(SPLIT, frozen=3 * 2**14, quantized=2**15)
    assert dict(resident(split, ALONE))["weights"] == 4 * (1000 + 2**14) + 2 * (2**13 + 256 + 4)


def test_transient_by_hand():
    assert dict(transient(SPLIT, ALONE)) == {}
    assert sum(dict(transient(SPLIT, over(4, 2))).values()) == 4 * 500
    assert sum(dict(transient(SPLIT, over(4, 3))).values()) == 4 * 1000 + 2 * 4 * 500
    assert sum(dict(transient(SPLIT, over(4))).values()) == 4 * (200 + 300) + 4 * (200 + 200)


def test_the_host_keeps_what_is_offloaded():
    assert host(SPLIT, over(4, 2)) == 0
    assert host(SPLIT, over(4, 2, offloads_optimizer=True)) == (16 + 8) * 250 + 600
    both = over(4, 3, offloads_optimizer=True, offloads_weights=True)
    assert host(SPLIT, both) == (16 + 8) * 250 + 600 + 1000


@pytest.mark.parametrize("zero_stage", [0, 1, 2, 3])
def test_more_devices_never_hold_more_each(zero_stage):
    sizes = [sum(x for _, x in resident(SPLIT, over(n, zero_stage))) for n in (1, 2, 4, 8)]
    assert sizes == sorted(sizes, reverse=True)


def test_weights_that_are_frozen_have_no_optimizer():
    frozen = Split(trained=10, frozen=1000, layer=100, root=200, largest=150)
    assert dict(resident(frozen, ALONE)) == {"weights": 4040, "AdamW's states": 80}


def test_a_launch_is_read(monkeypatch, tmp_path):
    assert launched_strategy(Launch(world_size=1, sharding="none")) == ALONE
    assert launched_strategy(Launch(world_size=2, sharding="fsdp")) == Strategy(sharding="fsdp", num_devices=2)
    pytest.importorskip("deepspeed")
    zero = {"stage": 3, "reduce_bucket_size": 500, "offload_param": {"device": "cpu"}}
    (tmp_path / "zero.json").write_text(json.dumps({"zero_optimization": zero}))
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_CONFIG_FILE", str(tmp_path / "zero.json"))
    strategy = launched_strategy(Launch(world_size=4, sharding="deepspeed", zero_stage=3))
    assert strategy == over(4, 3, offloads_weights=True)


def test_names_say_how():
    assert ALONE.name == "every weight on 1 device"
    assert Strategy(num_devices=2).name == "every weight on each of 2 devices"
    assert over(8).name == "FSDP2 over 8 devices"
    assert over(8, 2, offloads_optimizer=True).name == "ZeRO 2 over 8 devices, optimizer on the CPU"
