import pytest
import torch

from llmrl.distributed.device import pick_device
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
