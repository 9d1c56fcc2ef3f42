import re
import weakref

import pytest
import torch

from llmrl import memory
from llmrl.memory import MemoryFull, describe_full_memory, making_room, usage

OF_THE_CPU = RuntimeError(
    "[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate "
    "3221225472 bytes. Error code 12 (Cannot allocate memory)"
)
OF_THE_GPU = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")
WORDINGS = [
    OF_THE_CPU,
    OF_THE_GPU,
    MemoryError(),
    RuntimeError("std::bad_alloc"),
    RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
]


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
    told = describe_full_memory(OF_THE_GPU, phase)
    assert told.startswith(f"out of memory in {phase} (GPU): ")
    assert setting in told
    assert "\n" not in told


class Card:
    total_memory = 80 * 2**30


def test_the_peak_of_a_gpu_is_told(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 77 * 2**30)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Card)
    told = describe_full_memory(OF_THE_GPU, "update")
    assert told.startswith("out of memory in update (GPU, peak 77 GiB of 80 GiB): ")


def test_so_is_the_memory_of_the_cpu():
    told = describe_full_memory(OF_THE_CPU, "rollout")
    assert re.match(r"out of memory in rollout \(CPU, 3 GiB more asked for, peak \S+ [MG]iB\): lower rollout.max", told)
    told = describe_full_memory(MemoryError(), "rollout")
    assert re.match(r"out of memory in rollout \(CPU, peak \S+ [MG]iB\): ", told)


def test_several_ranks_are_told_apart(monkeypatch):
    for name, value in {"is_initialized": True, "get_world_size": 2, "get_rank": 1}.items():
        monkeypatch.setattr(f"torch.distributed.{name}", lambda value=value: value)
    assert describe_full_memory(OF_THE_GPU, "update").startswith("out of memory in update on rank 1 (GPU): ")


def test_the_message_is_the_one_that_torch_gives():
    with pytest.raises(RuntimeError) as raised:
        torch.empty(2**55)
    assert "(CPU, 1.34e+08 GiB more asked for, " in describe_full_memory(raised.value, "start")


@pytest.mark.parametrize("error", [RuntimeError("shapes cannot be multiplied"), ValueError("std::bad_alloc")])
def test_other_errors_are_not_explained_away(error):
    assert describe_full_memory(error, "update") is None


def test_an_error_on_the_way_out_of_a_recording_counts_too():
    def record():
        try:
            raise OF_THE_GPU
        finally:
            raise RuntimeError("operation failed due to a previous error during capture")

    with pytest.raises(RuntimeError, match="capture") as raised:
        record()
    assert usage(raised.value) == "GPU"


class Work:
    """Takes memory that it does not have, by these errors one after another."""

    def __init__(self, errors):
        self.errors = list(errors)
        self.held = None

    def __call__(self):
        tensor = torch.ones(3)
        self.held = weakref.ref(tensor)
        if self.errors:
            error = self.errors.pop(0)
            raise type(error)(*error.args)  # a new one, as the constants would keep their tracebacks
        return tensor


def test_work_is_done_again_after_room_was_made_until_there_is_enough():
    work, asked = Work(WORDINGS), []

    def make_room(found):
        assert work.held() is None  # the traceback of what failed would still hold it
        asked.append(found.split(",")[0])

    assert making_room(work, make_room).tolist() == [1, 1, 1]
    assert asked == ["CPU", "GPU", "CPU", "CPU", "GPU", "GPU"]


def test_another_error_is_not_caught():
    def refuse(found):
        raise AssertionError("there is room")

    with pytest.raises(RuntimeError, match="a bug"):
        making_room(Work([RuntimeError("a bug")]), refuse)


def test_where_no_room_can_be_made_that_is_the_error():
    def refuse(found):
        raise MemoryFull(f"no room: {found}")

    with pytest.raises(MemoryFull, match=r"^no room: GPU$") as raised:
        making_room(Work([OF_THE_GPU]), refuse)
    assert raised.value.__context__ is None  # its traceback would hold the memory that a checkpoint needs
    assert describe_full_memory(raised.value, "update") is None


def test_the_cache_of_a_gpu_is_given_back_first(monkeypatch):
    emptied = []
    monkeypatch.setattr(memory, "usage", lambda error: "GPU")
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: emptied.append("cache"))
    making_room(Work([OF_THE_GPU]), emptied.append)
    assert emptied == ["cache", "GPU"]
