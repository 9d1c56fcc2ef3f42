"""What tests of several packages share."""

import os
from collections.abc import Iterator

import jaxtyping
import pytest

os.environ["CUDA_VISIBLE_DEVICES"] = ""  # what is expected is exact on a CPU; docs/gpu.md has the checks of a GPU


@pytest.fixture
def production() -> Iterator[None]:
    """Switches the runtime shape checks of the test run off, so that ours are what is tested."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)
