import pytest
import torch

from llmrl.sizing.full import describe_full_memory

OF_THE_CPU = RuntimeError(
    "[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate "
    "3221225472 bytes. Error code 12 (Cannot allocate memory)"
)


@pytest.mark.parametrize(
    ("phase", "setting"),
    [
        ("start", "model.lora.rank where all weights are trained"),
        ("rollout", "rollout.max_rows"),
        ("reward", "reward.model.microbatch_tokens"),
        ("logprobs", "update.microbatch_tokens"),
        ("update", "model.gradient_checkpointing=true"),
        ("report card", "microbatch_tokens"),
    ],
)
def test_the_setting_of_the_phase_is_named(phase, setting):
    told = describe_full_memory(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate"), phase)
    assert told.startswith(f"the GPU is out of memory, in the phase {phase}: ")
    assert setting in told
    assert "\n" not in told


def test_the_peak_of_a_gpu_is_told(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 77 * 2**30)
    told = describe_full_memory(torch.OutOfMemoryError("CUDA out of memory"), "update")
    assert told.startswith("the GPU is out of memory, 77 GiB in tensors at its peak, in the phase update: ")


def test_so_is_the_memory_of_the_cpu():
    told = describe_full_memory(OF_THE_CPU, "rollout")
    assert told.startswith("the machine has no 3 GiB of memory left, in the phase rollout: lower rollout.max_rows")


def test_the_message_is_the_one_that_torch_gives():
    with pytest.raises(RuntimeError) as raised:
        torch.empty(2**55)
    assert describe_full_memory(raised.value, "start").startswith("the machine has no 1.34e+08 GiB of memory left")


def test_other_errors_are_not_explained_away():
    assert describe_full_memory(RuntimeError("shapes cannot be multiplied"), "update") is None
