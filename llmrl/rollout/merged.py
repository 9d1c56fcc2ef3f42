"""Layers of a copy in which an adapter is merged, of the trained float32 weights, rounded once: W + scale B A, and with
DoRA that with each of its rows at its learned length. A layer that is trained whole beside them stands there alone."""

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
    """Puts a plain layer in the place of every adapted one in the copy whose weight is the copy's own, and of every one
    that is trained whole.

    Returns the layers, with weights that are not merged yet: see `refresh`.
    """
    layers = [
        MergedLayer(name, layer, copies[f"{name}.base_layer.weight"])
        for name, layer in _adapted(trained)
        if f"{name}.base_layer.weight" in copies
    ]
    for layer in layers:
        copied.set_submodule(layer.name, copied.get_submodule(f"{layer.name}.base_layer"))
    for name, whole in trained_whole(copied).items():
        copied.set_submodule(name, copied.get_submodule(whole))
    return layers


def trained_whole(model: nn.Module) -> dict[str, str]:
    """Names of the layers that are trained whole beside adapters, each with that of the copy that is trained: peft
    keeps the original in the same place, and maybe that of a reference."""
    return {name: f"{name}.modules_to_save.{layer.active_adapters[0]}" for name, layer in _wrapped(model)}


def _wrapped(model: nn.Module) -> Iterator[tuple[str, Any]]:
    for name, module in model.named_modules():
        if isinstance(getattr(module, "modules_to_save", None), nn.ModuleDict):
            yield name, module


def unread(model: nn.Module) -> set[str]:
    """Names of the weights that stand in the place of a layer which is trained whole, and are not read there."""
    return {
        f"{layer}.{name}"
        for layer, copied in trained_whole(model).items()
        for name, _ in model.get_submodule(layer).named_parameters()
        if not f"{layer}.{name}".startswith(f"{copied}.")
    }


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
