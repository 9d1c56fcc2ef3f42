from types import SimpleNamespace

import pytest
import torch

from llmrl.distributed import device
from llmrl.distributed.device import pick_device


def test_a_gpu_if_there_is_one():
    assert pick_device().type == ("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.parametrize(
    ("found", "picked"), [("cuda:1", "cuda:1"), ("cpu", "cpu"), ("mps", "cpu"), ("xpu:0", "cpu"), ("hpu", "cpu")]
)
def test_no_accelerator_but_cuda_is_picked(found, picked, monkeypatch):
    monkeypatch.setattr(device, "PartialState", lambda: SimpleNamespace(device=torch.device(found)))
    assert pick_device() == torch.device(picked)
