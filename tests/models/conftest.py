"""Fixtures of the model tests: see `tiny` for the models."""

import pytest
from torch.testing import assert_close

from .tiny import FAMILIES


@pytest.fixture(params=FAMILIES)
def family(request) -> str:
    return request.param


@pytest.fixture
def assert_same_gradients():
    def same(ours, theirs):
        assert ours.keys() == theirs.keys()
        for name in ours:
            scale = theirs[name].abs().max().item()
            assert_close(
                ours[name], theirs[name], rtol=1e-3, atol=1e-5 + 1e-4 * scale, msg=lambda m, n=name: f"{n}: {m}"
            )

    return same
