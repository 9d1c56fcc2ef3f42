import torch

from llmrl.distributed.device import pick_device


def test_a_gpu_if_there_is_one():
    assert pick_device().type == (torch.accelerator.current_accelerator() or torch.device("cpu")).type
