"""What this machine can do at best, and the time that a workload takes at least on such a machine.

    python benchmarks/roofline.py --dtype bfloat16

Achievable FLOP/s are those of a large product of matrices, achievable bytes/s those of fused AdamW, which reads four
numbers a weight and writes three. The floors count useful work alone: each prompt once for its group, no padding, no
recomputation, rows only while they grow. So padding, duplicated prompts and dead rows show as a lower fraction.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

REPEATS = 10


@dataclass(frozen=True, kw_only=True)
class Limits:
    """The best that was measured on this machine, by the same script."""

    flops_per_s: float
    bytes_per_s: float


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Sizes of a language model that its cost follows from."""

    layer_weights: int
    head_weights: int
    attention_width: int
    """Query heads times their size, over all layers."""
    cache_bytes: int
    """Keys and values of one token."""
    weight_bytes: int
    """Bytes per weight in the arithmetic of the passes."""

    def forward_flops(self, trunk_tokens: int, head_tokens: int, context: int) -> float:
        """FLOPs of a forward pass; `context` is the sum over its tokens of how many each attends to."""
        linear = 2.0 * (self.layer_weights * trunk_tokens + self.head_weights * head_tokens)
        return linear + 4.0 * self.attention_width * context


def read_shape(model: Path, dtype: str) -> Shape:
    """The shape of the model in this folder."""
    config = AutoConfig.from_pretrained(model)
    with torch.device("meta"):
        meta = AutoModelForCausalLM.from_config(config)
    head = meta.get_output_embeddings().weight.numel()
    embeddings = {id(meta.get_output_embeddings().weight), id(meta.get_input_embeddings().weight)}
    layers = sum(p.numel() for p in meta.parameters() if p.dim() > 1 and id(p) not in embeddings)
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    weight_bytes = torch.finfo(getattr(torch, dtype)).bits // 8
    return Shape(
        layer_weights=layers,
        head_weights=head,
        attention_width=config.num_hidden_layers * config.num_attention_heads * size,
        cache_bytes=2 * config.num_hidden_layers * config.num_key_value_heads * size * weight_bytes,
        weight_bytes=weight_bytes,
    )


def rollout_floor(shape: Shape, limits: Limits, *, prompts: Sequence[int], lengths: Sequence[int]) -> float:
    """Seconds that a rollout takes at least: each prompt read once, then each token for the rows that still grow.

    Args:
        shape: Of the model.
        limits: Of the machine.
        prompts: Tokens of each prompt.
        lengths: Tokens of each response, those of a prompt one after another.
    """
    group = len(lengths) // len(prompts)
    prefill = shape.forward_flops(sum(prompts), len(prompts), sum(p * (p + 1) // 2 for p in prompts))
    seconds = prefill / limits.flops_per_s
    for step in range(1, max(lengths)):
        live = [length > step for length in lengths]
        groups = [sum(live[n * group : (n + 1) * group]) for n in range(len(prompts))]
        rows = sum(groups)
        context = sum(count * (p + step) for count, p in zip(groups, prompts, strict=True))
        read = rows * step + sum(p for count, p in zip(groups, prompts, strict=True) if count)
        weights = shape.weight_bytes * (shape.layer_weights + shape.head_weights)
        num_bytes = weights + shape.cache_bytes * (read + rows)
        flops = shape.forward_flops(rows, rows, context)
        seconds += max(num_bytes / limits.bytes_per_s, flops / limits.flops_per_s)
    return seconds


def forward_floor(
    shape: Shape, limits: Limits, *, prompts: Sequence[int], lengths: Sequence[int], head: bool = True
) -> float:
    """Seconds that a forward pass over prompts and responses takes at least; with the backward pass three times that.

    Args:
        shape: Of the model.
        limits: Of the machine.
        prompts: Tokens of each prompt.
        lengths: Tokens of each response, those of a prompt one after another.
        head: Whether every response token goes through the LM head; else none does.
    """
    group = len(lengths) // len(prompts)
    context = sum(p * (p + 1) // 2 for p in prompts)
    context += sum(c * prompts[n // group] + c * (c + 1) // 2 for n, c in enumerate(lengths))
    flops = shape.forward_flops(sum(prompts) + sum(lengths), sum(lengths) if head else 0, context)
    return flops / limits.flops_per_s


def pairs_floor(shape: Shape, limits: Limits, pairs: Sequence[tuple[int, int, int]]) -> float:
    """Seconds that the forward and backward passes of a reward model over pairs take at least.

    Args:
        shape: Of the model, whose LM head is not read.
        limits: Of the machine.
        pairs: Tokens of prompt, chosen and rejected response.
    """
    prompts = [prompt for prompt, _, _ in pairs]
    lengths = [length for _, *responses in pairs for length in responses]
    return 3 * forward_floor(shape, limits, prompts=prompts, lengths=lengths, head=False)


def measure_limits(dtype: str, device: str) -> Limits:
    """The limits of this machine, in a process of its own."""
    command = [sys.executable, __file__, "--dtype", dtype, "--device", device]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return Limits(**json.loads(done.stdout))


def best(*limits: Limits) -> Limits:
    """The most of several measurements."""
    return Limits(
        flops_per_s=max(each.flops_per_s for each in limits), bytes_per_s=max(each.bytes_per_s for each in limits)
    )


def describe(limits: Limits, floors: Mapping[str, float], summary: Mapping[str, Mapping[str, float]]) -> dict[str, Any]:
    """Prints and returns the least seconds of phases, and which fraction of its median time each side needs at least;
    ``step_cpu`` is that of the step's CPU time, spread over the threads.

    Args:
        limits: Of the machine.
        floors: Seconds by the name of the phase, among them ``step``.
        summary: By side, with ``PHASE_s_median`` for each phase.
    """
    threads = torch.get_num_threads()
    reached = {
        side: {phase: seconds / numbers[f"{phase}_s_median"] for phase, seconds in floors.items()}
        | {"step_cpu": threads * floors["step"] / numbers["step_cpu_s_median"]}
        for side, numbers in summary.items()
    }
    print(f"achievable {limits.flops_per_s / 1e9:.0f} GFLOP/s and {limits.bytes_per_s / 1e9:.1f} GB/s")
    for side, of_side in reached.items():
        numbers = "  ".join(f"{phase} {100 * fraction:.0f} %" for phase, fraction in of_side.items())
        print(f"{side:9s}  of the roofline: {numbers}")
    return {**asdict(limits), "floors_s": dict(floors), "fractions": reached}


def main() -> None:
    parser = argparse.ArgumentParser(description="Achievable FLOP/s and bytes/s of this machine, as JSON.")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    on_gpu = args.device.startswith("cuda")
    size, weights = (8192, 2**28) if on_gpu else (2048, 2**26)
    left, right = (torch.randn(size, size, device=args.device, dtype=getattr(torch, args.dtype)) for _ in range(2))
    multiply = fastest(lambda: left @ right, args.device)
    parameter = nn.Parameter(torch.zeros(weights, device=args.device))
    parameter.grad = torch.zeros_like(parameter)
    optimizer = torch.optim.AdamW([parameter], fused=True)
    step = fastest(optimizer.step, args.device)
    print(json.dumps(asdict(Limits(flops_per_s=2.0 * size**3 / multiply, bytes_per_s=28.0 * weights / step))))


def fastest(function: Callable[[], object], device: str) -> float:
    """Seconds of the fastest of several calls, the first left out; on a CPU those of its threads, for which other
    programs do not count."""
    seconds = []
    for _ in range(REPEATS + 1):
        started, cpu_started = time.perf_counter(), time.process_time()
        function()
        if device.startswith("cuda"):
            torch.cuda.synchronize(device)
            seconds.append(time.perf_counter() - started)
        else:
            seconds.append((time.process_time() - cpu_started) / torch.get_num_threads())
    return min(seconds[1:])


if __name__ == "__main__":
    main()
