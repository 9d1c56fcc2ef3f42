import os
import platform
import subprocess
import sys

import pytest
import torch

from llmrl.distributed.device import pick_device, prepare_device, torch_as_it_was
from llmrl.distributed.launch import LaunchError


def test_a_gpu_if_there_is_one():
    assert pick_device().type == ("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.parametrize(("rank", "picked"), [(None, "cuda:0"), ("0", "cuda:0"), ("3", "cuda:3")])
def test_each_process_of_a_machine_takes_a_gpu_of_its_own(rank, picked, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    if rank is not None:
        monkeypatch.setenv("LOCAL_RANK", rank)
    assert pick_device() == torch.device(picked)


def test_a_launch_on_the_cpu_leaves_gpus_alone(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    assert pick_device() == torch.device("cpu")


def test_more_processes_than_gpus_are_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(LaunchError, match="process 1 of this machine needs a GPU of its own, and there are 1"):
        pick_device()


@pytest.fixture
def as_before(monkeypatch):
    """What the whole process computes by is put back after the test."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")
    del os.environ["CUBLAS_WORKSPACE_CONFIG"]
    with torch_as_it_was():
        yield


@pytest.mark.usefixtures("as_before")
def test_attention_never_goes_through_cudnn():
    torch.backends.cuda.enable_cudnn_sdp(True)
    prepare_device()
    assert not torch.backends.cuda.cudnn_sdp_enabled()
    assert torch.backends.cuda.flash_sdp_enabled()
    assert torch.backends.cuda.mem_efficient_sdp_enabled()
    assert not torch.are_deterministic_algorithms_enabled()
    assert "CUBLAS_WORKSPACE_CONFIG" not in os.environ


@pytest.mark.usefixtures("as_before")
def test_the_same_bits_each_time_where_that_is_asked_for():
    prepare_device(deterministic=True)
    assert not torch.backends.cuda.cudnn_sdp_enabled()
    assert torch.are_deterministic_algorithms_enabled()
    assert not torch.is_deterministic_algorithms_warn_only_enabled()  # attention then keeps adding by atomics
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    assert not torch.utils.deterministic.fill_uninitialized_memory


# --- freed memory -----------------------------------------------------------------------------------------------------

FAULTS = """
import resource, torch
from llmrl.distributed.device import keep_freed_memory
kept = keep_freed_memory()
def faults(): return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
torch.ones(2**22)
before = faults()
for _ in range(20):
    torch.ones(2**22)
print(kept, faults() - before)
"""


def faults_of_tensors(**environment: str) -> tuple[str, int]:
    own = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_"))}
    command = [sys.executable, "-c", FAULTS]
    run = subprocess.run(command, env=own | environment, capture_output=True, text=True, check=True)
    kept, faults = run.stdout.split()
    return kept, int(faults)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU has an allocator of its own")
def test_a_tensor_takes_the_memory_of_one_that_was_freed():
    """Far fewer new pages; variables of the C library have the last word."""
    kept, faults = faults_of_tensors()
    given_back, fresh_faults = faults_of_tensors(MALLOC_MMAP_MAX_="65536")
    assert (kept, given_back) == ("True", "False")
    assert faults < fresh_faults / 4
