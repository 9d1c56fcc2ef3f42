"""Fixtures of the model tests: see `tiny` for the models."""

import pytest
import torch

from .tiny import FAMILIES, llama, save_folder


@pytest.fixture(params=FAMILIES)
def family(request) -> str:
    return request.param


@pytest.fixture
def folder(tmp_path) -> str:
    """That of a model, ``model`` in the test's own."""
    torch.manual_seed(0)
    return save_folder(tmp_path / "model", llama())
