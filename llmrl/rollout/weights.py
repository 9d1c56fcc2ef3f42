"""The model that an engine runs: the one being trained, or a copy of it in another precision."""

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from llmrl.roles import Trainable

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class SamplingWeights:
    """Weights in the precision of sampling.

    Parameters that have it already are the trained ones themselves and always live, unless they are to be split over
    ranks. The others are copied, and the copy is refreshed in place by `load`. A stale copy is detected by
    the number of optimizer steps since.
    """

    def __init__(self, trained: "PreTrainedModel", dtype: torch.dtype, apart: torch.device | None) -> None:
        """`apart` is where every parameter is copied to, if those that are trained are about to be split over ranks."""
        self.trained = trained
        self._copies = {
            name: _copied(p, dtype, apart or p.device)
            for name, p in trained.named_parameters()
            if apart is not None or (p.is_floating_point() and p.dtype != dtype)
        }
        self._model = rebuilt(trained, self._copies, apart) if self._copies else trained
        self._trainable: Trainable | None = None
        self._num_steps = 0

    @torch.no_grad()
    def load(self, trainable: Trainable) -> None:
        """Brings the copy up to date with the trained model, which must be the one that it was made of. A collective of
        all ranks: weights that are split over them come together once for a whole rollout."""
        if trainable.module.model is not self.trained:
            raise ValueError("load_weights got another model than the one that the engine was built over")
        if self._copies:
            for name, weight in trainable.whole(self.trained):
                if name in self._copies:
                    self._copies[name].copy_(weight)
        self._trainable, self._num_steps = trainable, trainable.num_steps_done

    def fresh(self) -> "PreTrainedModel":
        """The model to sample with; raises RuntimeError if the copy is stale."""
        if self._copies and self._trainable is not None and self._trainable.num_steps_done != self._num_steps:
            raise RuntimeError(
                "the trained weights have changed since load_weights: the engine would sample from old ones"
            )
        return self._model


def _copied(p: Tensor, dtype: torch.dtype, device: torch.device) -> nn.Parameter:
    dtype = dtype if p.is_floating_point() else p.dtype
    return nn.Parameter(p.detach().to(device, dtype, copy=True), requires_grad=False)


def rebuilt(model: nn.Module, parameters: Mapping[str, nn.Parameter], device: torch.device | None) -> "PreTrainedModel":
    """The modules of a model anew, around these parameters, and around its own tensors where there is none. What is no
    parameter may be copied to a device."""
    memo: dict[int, Tensor] = {id(t): t for t in model.parameters()}
    memo |= {id(b): b.to(device or b.device) for b in model.buffers()}
    memo |= {id(p): parameters[name] for name, p in model.named_parameters() if name in parameters}
    return copy.deepcopy(model, memo)  # type: ignore[return-value]


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
