"""Bytes of trained modules on each device, by the launch: replicated, or split by ZeRO or FSDP2."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from llmrl.distributed.launch import BUCKET_ELEMENTS, Launch, deepspeed_settings
from llmrl.models.quantization import BLOCK
from llmrl.sizing.activations import FLOAT32

ADAM = 8
"""Bytes of AdamW's two running means of a weight."""
HOST_COPIES = 4
"""Copies of an offloaded weight: the optimizer's, one on its way back, its gradient, and the sum of gradients."""
LIVE_ELEMENTS = 1_000_000_000
"""DeepSpeed's default for `stage3_max_live_parameters`: weights that stay whole at once."""


@dataclass(frozen=True, kw_only=True)
class Strategy:
    """Launch of a run, as far as memory is concerned."""

    sharding: Literal["none", "deepspeed", "fsdp"] = "none"
    zero_stage: int = 0
    num_devices: int = 1
    offloads_optimizer: bool = False
    """ZeRO: optimizer states, gradients and the optimizer's weights are in the memory of the CPU."""
    offloads_weights: bool = False
    """ZeRO 3: the weights too."""
    bucket_elements: int = BUCKET_ELEMENTS

    @property
    def splits_weights(self) -> bool:
        """See `Launch`."""
        return self.sharding == "fsdp" or self.zero_stage == 3

    @property
    def name(self) -> str:
        """Name of the launch, in the words of docs/sizing.md."""
        where = f"{self.num_devices} device" + "s" * (self.num_devices > 1)
        if self.sharding == "none":
            return f"every weight on {'each of ' * (self.num_devices > 1)}{where}"
        kind = "FSDP2" if self.sharding == "fsdp" else f"ZeRO {self.zero_stage}"
        offload = ", optimizer and weights" if self.offloads_weights else ", optimizer"
        return f"{kind} over {where}" + (f"{offload} on the CPU" if self.offloads_optimizer else "")


@dataclass(frozen=True, kw_only=True)
class Split:
    """Sizes of the modules that learn under one optimizer, in parameters."""

    trained: int
    """Parameters that learn."""
    frozen: int
    """Parameters of the same modules that do not."""
    layer: int
    """Parameters of one layer."""
    root: int
    """Parameters outside of the layers."""
    largest: int
    """Elements of the largest parameter."""
    quantized: int = 0
    """Frozen parameters that are stored in 4 bits."""

    @property
    def weight_bytes(self) -> int:
        """Bytes of all weights where they are whole."""
        return FLOAT32 * (self.trained + self.frozen - self.quantized) + nf4_bytes(self.quantized)


def nf4_bytes(num: int) -> int:
    """Bytes of this many weights in NF4: 4 bits each, for 64 of them a scale of 8 bits, and for 256 scales a float32
    number. Dettmers et al. 2023, arXiv:2305.14314, section 3."""
    return num // 2 + num // BLOCK + FLOAT32 * num // (256 * BLOCK)


def launched_strategy(launch: Launch) -> Strategy:
    """Strategy of the launch of this process."""
    if launch.sharding != "deepspeed":
        return Strategy(sharding=launch.sharding, num_devices=launch.world_size)
    zero = deepspeed_settings()["zero_optimization"]
    on_cpu = {name: (zero.get(name) or {}).get("device") == "cpu" for name in ("offload_optimizer", "offload_param")}
    return Strategy(
        sharding="deepspeed",
        zero_stage=launch.zero_stage,
        num_devices=launch.world_size,
        offloads_optimizer=on_cpu["offload_optimizer"],
        offloads_weights=on_cpu["offload_param"],
        bucket_elements=int(zero["reduce_bucket_size"]),
    )


def resident(split: Split, strategy: Strategy) -> Iterator[tuple[str, int]]:
    """Yields `(name, bytes)` of what each device holds during the whole run."""
    parts = strategy.num_devices if strategy.splits_weights else 1
    weights = split.weight_bytes // parts
    if strategy.zero_stage == 3:
        yield "DeepSpeed's bucket", FLOAT32 * strategy.bucket_elements
    yield "weights", 0 if strategy.offloads_weights else weights
    if strategy.offloads_optimizer:
        yield "a gradient on its way to the CPU", FLOAT32 * split.largest
        return
    parts = 1 if strategy.sharding == "none" else strategy.num_devices
    if strategy.sharding == "deepspeed":
        yield "the optimizer's own copy of weights", FLOAT32 * split.trained // parts
    yield "AdamW's states", ADAM * split.trained // parts


def gradients(split: Split, strategy: Strategy) -> int:
    """Bytes of gradients on each device between two microbatches; twice that where they are reduced."""
    if strategy.offloads_optimizer:
        return 0
    whole = FLOAT32 * split.trained
    if strategy.zero_stage in (1, 2):
        return 2 * whole // strategy.num_devices
    return whole // (strategy.num_devices if strategy.splits_weights else 1)


def transient(split: Split, strategy: Strategy) -> Iterator[tuple[str, int]]:
    """Yields `(name, bytes)` of what a device holds only while it computes or communicates with it."""
    num_all = split.trained + split.frozen
    if strategy.sharding == "fsdp":
        yield "whole weights of the moment", FLOAT32 * (split.root + 3 * split.layer)
        yield "whole gradients of the moment", FLOAT32 * min(split.root + 2 * split.layer, 2 * split.trained)
    if strategy.zero_stage in (1, 2):
        yield "DeepSpeed's bucket", FLOAT32 * strategy.bucket_elements
    if strategy.zero_stage == 3:
        yield "whole weights of the moment", FLOAT32 * min(num_all, LIVE_ELEMENTS)
        yield "whole gradients of the moment", 2 * FLOAT32 * min(split.trained, strategy.bucket_elements)


def host(split: Split, strategy: Strategy) -> int:
    """Bytes that each process keeps in the memory of the CPU while it trains."""
    weights = FLOAT32 * (split.trained + split.frozen) // strategy.num_devices if strategy.offloads_weights else 0
    if not strategy.offloads_optimizer:
        return weights
    return weights + (HOST_COPIES * FLOAT32 + ADAM) * split.trained // strategy.num_devices + FLOAT32 * split.largest
