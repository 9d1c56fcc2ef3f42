import pytest
import torch

from llmrl.distributed.device import pick_device


def test_a_gpu_if_there_is_one():
    assert pick_device().type == ("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.parametrize(("rank", "picked"), [(None, "cuda:0"), ("0", "cuda:0"), ("3", "cuda:3")])
def test_each_process_of_a_machine_takes_a_gpu_of_its_own(rank, picked, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    if rank is not None:
        monkeypatch.setenv("LOCAL_RANK", rank)
    assert pick_device() == torch.device(picked)
