"""A process group of one, so that engines that need a group can be tested inside one process."""

from collections.abc import Iterator

import pytest
import torch.distributed as dist

from llmrl.distributed.collectives import ProcessGroup


@pytest.fixture(scope="module")
def group() -> Iterator[ProcessGroup]:
    """Of this process alone, over gloo."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield ProcessGroup()
    dist.destroy_process_group()
