"""Message for a run that is out of memory: in which phase, and which setting lowers it."""

import re

import torch

from llmrl.sizing.report import in_units

WAYS_OUT = {
    "start": "set model.lora.rank where all weights are trained, spread the run over devices, or take a smaller model",
    "rollout": "lower rollout.max_rows",
    "reward": "lower reward.model.microbatch_tokens",
    "logprobs": "lower update.microbatch_tokens",
    "update": "set model.gradient_checkpointing=true, or lower microbatch_tokens of update, sft or reward_model",
}
OTHER_WAYS_OUT = "lower rollout.max_rows where responses are sampled, else microbatch_tokens"
OF_THE_CPU = re.compile(r"DefaultCPUAllocator: can't allocate memory: you tried to allocate (\d+) bytes")


def describe_full_memory(error: RuntimeError, phase: str) -> str | None:
    """One line on memory that ran out in a phase of a run, with the setting to change; None for any other error."""
    if isinstance(error, torch.OutOfMemoryError):
        peak = (
            f", {in_units(torch.cuda.max_memory_allocated())} in tensors at its peak"
            if torch.cuda.is_initialized()
            else ""
        )
        what = f"the GPU is out of memory{peak}"
    elif asked := OF_THE_CPU.search(str(error)):
        what = f"the machine has no {in_units(int(asked[1]))} of memory left"
    else:
        return None
    way_out = WAYS_OUT.get(phase, OTHER_WAYS_OUT)
    return f"{what}, in the phase {phase}: {way_out}; --dry-run estimates what takes how much"
