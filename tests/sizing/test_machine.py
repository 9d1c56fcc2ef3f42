"""What this machine has, the limit of a container included."""

import os

import pytest
import torch

from llmrl.sizing import machine
from llmrl.sizing.machine import this_machine

PHYSICAL = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


@pytest.mark.parametrize(
    ("limit", "expected"), [(None, PHYSICAL), ("max", PHYSICAL), ("1048576\n", 2**20), (str(2**63), PHYSICAL)]
)
def test_a_container_may_have_less_than_its_machine(monkeypatch, tmp_path, limit, expected):
    file = tmp_path / "memory.max"
    if limit is not None:
        file.write_text(limit)
    monkeypatch.setattr(machine, "CONTAINER_LIMITS", (tmp_path / "gone", file))
    assert this_machine().cpu == expected


def test_the_memory_of_a_gpu_is_that_of_this_process_s_own(monkeypatch):
    class Properties:
        total_memory = 80 * 2**30

    asked = []
    monkeypatch.setattr(machine, "pick_device", lambda: torch.device("cuda", 3))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: asked.append(device) or Properties)
    assert this_machine().gpu == 80 * 2**30
    assert asked == [torch.device("cuda", 3)]


def test_without_a_gpu_there_is_no_memory_of_one(monkeypatch):
    monkeypatch.setattr(machine, "pick_device", lambda: torch.device("cpu"))
    assert this_machine().gpu is None
