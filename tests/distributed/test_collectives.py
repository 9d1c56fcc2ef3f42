import pytest
import torch

from llmrl.distributed.collectives import OneProcess


@pytest.mark.parametrize("world_size", [None, "1"])
def test_one_process_talks_to_itself(monkeypatch, world_size):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    if world_size is not None:
        monkeypatch.setenv("WORLD_SIZE", world_size)
    collectives = OneProcess()
    x = torch.tensor([1.0, -2.0])
    assert (collectives.rank, collectives.world_size) == (0, 1)
    assert torch.equal(collectives.sum(x), torch.tensor([1.0, -2.0]))
    assert torch.equal(collectives.max(x), torch.tensor([1.0, -2.0]))


def test_several_processes_are_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match=r"launched as 2 processes.*start it with `llmrl` alone"):
        OneProcess()
