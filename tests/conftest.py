"""What tests of several packages share."""

from collections.abc import Iterator

import jaxtyping
import pytest


@pytest.fixture
def production() -> Iterator[None]:
    """Switches the runtime shape checks of the test run off, so that ours are what is tested."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)
