"""What tests of several packages share."""

import os
import signal
from collections.abc import Iterator

import jaxtyping
import pytest

os.environ["CUDA_VISIBLE_DEVICES"] = ""  # what is expected is exact on a CPU; docs/gpu.md has the checks of a GPU


@pytest.fixture
def default_signals() -> Iterator[None]:
    """The handlers of a program that was started in the foreground, whatever started the tests."""
    from llmrl.distributed.stop import SIGNALS, restore  # at the top it would come before its checks of shapes

    before = {int(number): signal.signal(number, signal.SIG_DFL) for number in SIGNALS}
    yield
    restore(before)


@pytest.fixture
def production() -> Iterator[None]:
    """Switches the runtime shape checks of the test run off, so that ours are what is tested."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)
