"""Fixtures of the model tests: see `tiny` for the models."""

import pytest

from .tiny import FAMILIES


@pytest.fixture(params=FAMILIES)
def family(request) -> str:
    return request.param
