"""Inputs that the tests of the mathematics share: ragged rows, and what must not matter."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

Tensors = dict[str, Tensor]

# A whole row, tool output inside, padding, a single token, and a row without any.
RAGGED_MASK = torch.tensor(
    [
        [1, 1, 1, 1, 1, 1, 1],
        [1, 1, 0, 0, 0, 1, 0],
        [0, 1, 1, 0, 0, 0, 0],
        [1, 0, 0, 0, 0, 0, 0],
        [0, 0, 0, 0, 0, 0, 0],
    ],
    dtype=torch.bool,
)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def mask() -> Tensor:
    return RAGGED_MASK.clone()


@pytest.fixture
def poison(mask: Tensor) -> Callable[[Tensors], Tensors]:
    """Puts NaN outside the mask into every per-token tensor of floats."""

    def poisoned(tensors: Tensors) -> Tensors:
        return {
            name: torch.where(mask, x, torch.nan) if x.shape == mask.shape and x.is_floating_point() else x
            for name, x in tensors.items()
        }

    return poisoned
