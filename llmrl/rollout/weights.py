"""The model that an engine runs: the one being trained, or a copy of it in another precision."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class SamplingWeights:
    """Weights in the precision of sampling.

    Parameters that have it already are the trained ones themselves and always live. The others are copied, and the copy
    is refreshed in place by `load`. A copy that has fallen behind is noticed by the version that torch counts on every
    in-place change of a parameter.
    """

    def __init__(self, trained: "PreTrainedModel", dtype: torch.dtype) -> None:
        self.trained = trained
        self._sources = [p for p in trained.parameters() if p.is_floating_point() and p.dtype != dtype]
        self._copies = [p.detach().to(dtype) for p in self._sources]
        self._model = self._in_sampling_dtype() if self._sources else trained
        self._loaded_version = self._version()

    def load(self, trained: "PreTrainedModel") -> None:
        """Brings the copy up to date with the trained model, which must be the one that it was made of."""
        if trained is not self.trained:
            raise ValueError("load_weights got another model than the one that the engine was built over")
        with torch.no_grad():
            if self._copies:
                torch._foreach_copy_(self._copies, [source.detach() for source in self._sources])
        self._loaded_version = self._version()

    def fresh(self) -> "PreTrainedModel":
        """The model to sample with; refuses to hand out one that has fallen behind."""
        if self._version() != self._loaded_version:
            raise RuntimeError(
                "the trained weights have changed since load_weights: the engine would sample from old ones"
            )
        return self._model

    def _version(self) -> int:
        return sum(source._version for source in self._sources)

    def _in_sampling_dtype(self) -> "PreTrainedModel":
        """The trained model's modules anew, around the copies, and around the same tensors where there is none."""
        memo: dict[int, Tensor] = {id(t): t for t in (*self.trained.parameters(), *self.trained.buffers())}
        copies = (nn.Parameter(c, requires_grad=False) for c in self._copies)
        memo.update({id(source): parameter for source, parameter in zip(self._sources, copies, strict=True)})
        return copy.deepcopy(self.trained, memo)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode and no gradient inside; afterwards every submodule is in the mode it was in.

    Train mode with gradient checkpointing would switch the cache of transformers off.
    """
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True
