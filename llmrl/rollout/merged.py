"""Layers of a copy in which an adapter is merged, of the trained float32 weights, rounded once: W + scale B A, and with
DoRA that with each of its rows at its learned length."""

from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class MergedLayer:
    """The weight of a linear layer of the copy, merged from those that make it as they come, in any order.

    Args:
        name: Name of the adapted layer in the trained model.
        layer: That layer, of peft.
        weight: Weight in the copy.
    """

    def __init__(self, name: str, layer: Any, weight: nn.Parameter) -> None:
        adapter = layer.active_adapters[0]
        self.name = name
        parts = ["base_layer", f"lora_A.{adapter}", f"lora_B.{adapter}"]
        if adapter in layer.lora_magnitude_vector:
            parts.append(f"lora_magnitude_vector.{adapter}")
        self.names = tuple(f"{name}.{part}.weight" for part in parts)
        self.scale = layer.scaling[adapter]
        self.transposed = layer.fan_in_fan_out
        self.weight = weight
        self.parts: dict[str, Tensor] = {}

    def take(self, name: str, part: Tensor) -> None:
        """Keeps a part, one of `names`, until all are there."""
        self.parts[name] = part.detach().to(self.weight.device, copy=True)
        if len(self.parts) < len(self.names):
            return
        base, a, b, *lengths = (self.parts[name] for name in self.names)
        merged = (base.T if self.transposed else base) + self.scale * (b @ a)
        for length in lengths:
            merged = (length / merged.norm(dim=1))[:, None] * merged
        self.weight.copy_(merged.T if self.transposed else merged)
        self.parts.clear()


def merge_adapters(
    trained: "PreTrainedModel", copied: "PreTrainedModel", copies: Mapping[str, nn.Parameter]
) -> list[MergedLayer]:
    """Puts a plain layer in the place of every adapted one in the copy whose weight is the copy's own.

    Returns the layers, with weights that are not merged yet: see `refresh`.
    """
    layers = [
        MergedLayer(name, layer, copies[f"{name}.base_layer.weight"])
        for name, layer in _adapted(trained)
        if f"{name}.base_layer.weight" in copies
    ]
    for layer in layers:
        parent, _, child = layer.name.rpartition(".")
        setattr(copied.get_submodule(parent), child, copied.get_submodule(f"{layer.name}.base_layer"))
    return layers


def refresh(layers: Iterable[MergedLayer], weights: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """Takes from named weights what layers are merged from, and yields the others."""
    takers = {name: layer for layer in layers for name in layer.names}
    for name, weight in weights:
        if name in takers:
            takers[name].take(name, weight)
        else:
            yield name, weight


def _adapted(model: "PreTrainedModel") -> Iterator[tuple[str, Any]]:
    """Yields linear layers with one adapter of low rank, plain or of DoRA."""
    candidates = [(name, module) for name, module in model.named_modules() if hasattr(module, "lora_A")]
    if not candidates:
        return
    from peft.tuners.lora.layer import Linear

    for name, layer in candidates:
        active = getattr(layer, "active_adapters", ())
        if type(layer) is not Linear or layer.disable_adapters or len(active) != 1 or active[0] not in layer.lora_A:
            continue
        is_other = active[0] in layer.lora_variant and active[0] not in layer.lora_magnitude_vector
        if not is_other and not layer.lora_bias.get(active[0]):
            yield name, layer
