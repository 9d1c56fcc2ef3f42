"""The model that an engine runs: the one being trained, or a copy of it in another precision."""

import copy
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from llmrl.roles import Trainable
from llmrl.rollout.merged import merge_adapters, refresh, unread

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class SamplingWeights:
    """Weights in the precision of sampling.

    Without a `copy_device`, parameters that have the precision already are the trained ones themselves and always live.
    The others are copied, adapters merged into them, and `load` refreshes the copy in place. A stale copy is detected
    by the number of optimizer steps since.

    Args:
        trained: The trained model.
        dtype: Precision of sampling.
        copy_device: Device for a full copy of the weights, needed when the trained ones will be sharded; None: share
            them.
    """

    def __init__(self, trained: "PreTrainedModel", dtype: torch.dtype, copy_device: torch.device | None) -> None:
        self.trained = trained
        skipped = unread(trained)
        self._copies = {
            name: _copied(p, dtype, copy_device or p.device)
            for name, p in trained.named_parameters()
            if name not in skipped and (copy_device is not None or (p.is_floating_point() and p.dtype != dtype))
        }
        self._model = rebuilt(trained, self._copies, copy_device) if self._copies else trained
        self._merged = merge_adapters(trained, self._model, self._copies) if self._copies else []
        self._refresh(trained.named_parameters())
        self._trainable: Trainable | None = None
        self._num_steps = 0

    @torch.no_grad()
    def load(self, trainable: Trainable) -> None:
        """Copies the trained weights, which must be those of the model that the copy was made of. Collective: sharded
        weights are gathered once per rollout."""
        if trainable.module.model is not self.trained:
            raise ValueError("load_weights got another model than the one that the engine was built over")
        if self._copies:
            self._refresh(trainable.whole(self.trained))
        self._trainable, self._num_steps = trainable, trainable.num_steps_done

    @torch.no_grad()
    def _refresh(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        for name, weight in refresh(self._merged, weights):
            if name in self._copies:
                self._copies[name].copy_(weight)

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
    """A copy of the model's modules with these parameters; the other tensors are shared, and buffers are copied to
    `device`, if there is one."""
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
