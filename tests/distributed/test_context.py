"""What a process reads of its environment, once."""

import pytest
import torch

from tests.contexts import context_of

DEEPSPEED = {"ACCELERATE_USE_DEEPSPEED": "true", "LOCAL_RANK": "0"}
ZERO3 = DEEPSPEED | {"ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"}
FSDP = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}


@pytest.mark.parametrize(("environment", "is_whole"), [({}, True), (DEEPSPEED, True), (ZERO3, False), (FSDP, False)])
def test_what_will_be_split_is_loaded_on_the_cpu(environment, is_whole, monkeypatch):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("llmrl.distributed.collectives.pick_device", lambda: torch.device("cuda", 3))
    assert context_of().loading_device == (torch.device("cuda", 3) if is_whole else torch.device("cpu"))
    assert context_of().copy_device == (None if is_whole else torch.device("cuda", 3))
