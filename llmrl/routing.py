"""Routes: which experts the routers of a mixture choose for a token, a number for each layer.

The number is a code of the set: the sum of 15 mixed bits of each expert, modulo 2^15. So it takes two bytes, however
many experts are chosen, and the order in which a router names them does not show. Sets of one size that differ in one
expert have two codes; those that differ in more have one code by chance, once in 2^15.
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float, Int, Int16
from torch import Tensor, nn

BITS = 0x7FFF
FACTORS = (0x2C1B, 0x3C6D, 0x1E35)
"""Odd numbers: to multiply by them, modulo 2^15, and to add the high bits to the low ones merges no two numbers."""

Note = Callable[[Float[Tensor, "tokens E"], Int[Tensor, "tokens k"]], None]
"""Takes the logits and the chosen experts of each token that a router read."""


def route_of(chosen: Int[Tensor, "*tokens k"]) -> Int16[Tensor, "*tokens"]:
    """Code of the set of experts chosen for each token, from 0 to 2^15 - 1."""
    mixed = chosen
    for factor in FACTORS:
        mixed = (mixed ^ (mixed >> 7)) * factor & BITS
    return (mixed.sum(dim=-1) & BITS).short()


@contextmanager
def watching(routers: Sequence[nn.Module], note: Note) -> Iterator[None]:
    """Inside, `note` is called in every forward of the routers."""

    def read(_module: nn.Module, _inputs: Any, output: Any) -> None:
        logits, _, chosen = output
        note(logits, chosen)

    hooks = [router.register_forward_hook(read) for router in routers]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


class RouteRecorder:
    """Routes of the tokens that an engine draws. `routers`, one for each layer in order, may be none."""

    def __init__(self, routers: Sequence[nn.Module]) -> None:
        self.routers = routers
        self._chosen = deque[Tensor](maxlen=len(routers))
        """Experts that each router chose in the last pass."""

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Inside, the choices of the last pass are noted until they are taken."""
        with watching(self.routers, lambda _, chosen: self._chosen.append(chosen)):
            yield

    def take(self, num_rows: int) -> Int16[Tensor, "R L"]:
        """Routes at the last column of the last pass, which read this many rows: those of the tokens that are drawn
        from its logits."""
        last = [chosen.unflatten(0, (num_rows, -1))[:, -1] for chosen in self._chosen]
        self._chosen.clear()
        return route_of(torch.stack(last, dim=1))
