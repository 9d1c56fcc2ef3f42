"""Linear layers over the few rows of a decode step on a CPU.

Matrix products of a CPU are made for many rows. For 4 to 64 tokens, W X^T, in which the many rows are the weight's,
takes half to nine tenths of the time of X W^T. It reads the weight where it is: there is no copy to keep fresh.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

Forward = Callable[[Tensor], Tensor]
FEW_ROWS = range(4, 65)
"""Numbers of rows for which the product is turned round: it is slower for fewer, and no faster for more."""
LEAST_WEIGHTS = 2**18
"""Weights of a layer from which on turning pays; below, a call costs more than the product."""


def few_row_forwards(model: nn.Module) -> dict[nn.Module, Forward]:
    """What stands for the forwards of linear layers that MKL multiplies, and slowly for few rows: large ones in float32
    on a CPU, for decoding, where no autocast is on. The others keep their own."""
    return {
        module: partial(apply_linear, module)
        for module in model.modules()
        if torch.backends.mkl.is_available()
        and type(module) is nn.Linear
        and "forward" not in vars(module)
        and (module.weight.device.type, module.weight.dtype) == ("cpu", torch.float32)
        and module.weight.numel() >= LEAST_WEIGHTS
    }


def apply_linear(layer: nn.Linear, x: Tensor) -> Tensor:
    """x W^T + b, (..., in) -> (..., out): as (W X^T)^T where x has few rows. The order of sums is all that
    differs."""
    rows = x.numel() // layer.in_features
    if rows not in FEW_ROWS:
        return linear(x, layer.weight, layer.bias)
    product = layer.weight @ x.reshape(rows, -1).T.contiguous()
    y = product.T.contiguous().view(*x.shape[:-1], -1)  # in one piece: attention is slow over anything else
    return y if layer.bias is None else y + layer.bias


@contextmanager
def replacing(forwards: Mapping[nn.Module, Forward]) -> Iterator[None]:
    """Has modules go through what stands for their forwards, temporarily."""
    for module, forward in forwards.items():
        module.forward = forward
    try:
        yield
    finally:
        for module in forwards:
            del module.forward
