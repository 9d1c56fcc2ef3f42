"""Shape of a model: its numbers of parameters and sizes, counted on modules without weights."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from llmrl.hub import is_local
from llmrl.models.config import ModelConfig
from llmrl.models.experts import routers
from llmrl.models.folders import base_of_adapter, is_adapter, json_object, resolved
from llmrl.models.quantization import BLOCK
from llmrl.models.routers import routers_of
from llmrl.rollout.support import carries_states

if TYPE_CHECKING:
    from transformers import PretrainedConfig


@dataclass(frozen=True, kw_only=True)
class Linear:
    """A linear layer below the LM head."""

    name: str
    inputs: int
    outputs: int
    routes: bool
    """Whether it is a router of a mixture of experts, which gets an adapter only by its name."""


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """Shape of a causal language model."""

    num_parameters: int
    """Parameters of the model; a matrix that serves as input and as output embedding counts once."""
    num_embedding: int
    """Parameters of the input embedding."""
    num_head: int
    """Parameters of an LM head of its own; 0 where the input embedding serves."""
    largest: int
    """Elements of the largest parameter."""
    linears: tuple[Linear, ...]
    num_layers: int
    hidden_size: int
    query_size: int
    """Numbers of all heads' queries of one token."""
    key_size: int
    """Numbers of all heads' keys of one token."""
    num_heads: int
    feed_forward_size: int
    num_routers: int
    """Layers of a mixture of experts that choose them; 0 of other models."""
    vocab_size: int
    """Rows of the LM head, padding included."""
    layers: tuple[tuple[str, int], ...]
    """Name of each layer with weights of its own, and how many parameters they have."""
    adapter_rank: int | None = None
    """LoRA rank of the adapter that comes with the folder."""
    adapter_targets: tuple[str, ...] = ()
    adapter_has_lengths: bool = False
    """Whether that adapter is one of DoRA."""
    adapter_layers: tuple[str, ...] = ()
    """Layers that are trained whole beside that adapter."""

    @property
    def num_linear(self) -> int:
        """Parameters in the matrices of linear layers below the head."""
        return sum(linear.inputs * linear.outputs for linear in self.linears)

    @property
    def num_quantized(self) -> int:
        """Those of them that a quantized base stores in 4 bits, see `quantized_layers`."""
        return sum(x.inputs * x.outputs for x in self.linears if not x.routes and x.inputs % BLOCK == 0)

    @property
    def largest_linear(self) -> int:
        """Elements of the largest matrix of a linear layer below the head."""
        return max((linear.inputs * linear.outputs for linear in self.linears), default=0)

    @property
    def num_layer(self) -> int:
        """Parameters in the linear layers of one layer."""
        return self.num_linear // self.num_layers

    @property
    def num_trunk(self) -> int:
        """Parameters without an LM head of its own."""
        return self.num_parameters - self.num_head

    def num_adapter(self, rank: int, targets: Sequence[str], *, has_lengths: bool = False) -> int:
        """Parameters of LoRA matrices of this rank on the linear layers of these names; none named: on all except
        routers. `has_lengths`: with the length of each row, of DoRA."""
        chosen = [x for x in self.linears if (x.name.rpartition(".")[2] in targets if targets else not x.routes)]
        return sum(rank * (linear.inputs + linear.outputs) + has_lengths * linear.outputs for linear in chosen)

    def num_whole(self, names: Sequence[str]) -> int:
        """Parameters of the layers of these names."""
        return sum(num for layer, num in self.layers if any(f".{layer}".endswith(f".{name}") for name in names))


def read_shape(config: ModelConfig) -> ModelShape | None:
    """The shape of a model in a folder or in the local cache of the hub; None where its config.json is in neither, or
    means no causal language model that transformers knows, or one whose layers carry states along the row."""
    if is_local(config.path) and is_adapter(config.path):
        return _read_adapted(config)
    file = _config_file(config.path)
    if file is None or "auto_map" in json_object(file, config.path):
        return None
    from transformers import AutoConfig

    try:
        found = AutoConfig.from_pretrained(file.parent)
        has_attention = hasattr(found.get_text_config(decoder=True), "num_attention_heads")
        return shape_of(found) if has_attention and not carries_states(found) else None
    except ValueError:  # an architecture that transformers does not know, or no causal language model
        return None


def _read_adapted(config: ModelConfig) -> ModelShape | None:
    adapter = json_object(Path(resolved(config.path)) / "adapter_config.json", config.path)
    base = read_shape(base_of_adapter(config))
    targets = adapter["target_modules"]
    named = tuple(targets) if isinstance(targets, list) else ()
    has_lengths = bool(adapter.get("use_dora"))
    return base and replace(
        base,
        adapter_rank=adapter["r"],
        adapter_targets=named,
        adapter_has_lengths=has_lengths,
        adapter_layers=tuple(adapter.get("modules_to_save") or ()),
    )


def _config_file(path: str) -> Path | None:
    from huggingface_hub import try_to_load_from_cache

    if is_local(path):
        file = Path(resolved(path)) / "config.json"
        return file if file.is_file() else None
    cached = try_to_load_from_cache(path, "config.json")
    return Path(cached) if isinstance(cached, str) else None


def shape_of(config: "PretrainedConfig") -> ModelShape:
    """The shape of the model that transformers builds from these settings."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    text = config.get_text_config()
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    num_key_heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    sizes = [p.numel() for p in model.parameters()]
    return ModelShape(
        num_parameters=sum(sizes),
        num_embedding=embedding.numel(),
        num_head=0 if head is embedding else head.numel(),
        largest=max(sizes),
        linears=tuple(_linears(model.base_model)),
        num_layers=text.num_hidden_layers,
        hidden_size=text.hidden_size,
        query_size=text.num_attention_heads * head_dim,
        key_size=num_key_heads * head_dim,
        num_heads=text.num_attention_heads,
        feed_forward_size=getattr(text, "intermediate_size", None) or 4 * text.hidden_size,
        num_routers=len(routers(model.base_model)),
        vocab_size=len(head),
        layers=tuple(_layers(model)),
    )


def _layers(model: nn.Module) -> Iterator[tuple[str, int]]:
    for name, module in model.named_modules():
        if num_own := sum(p.numel() for p in module.parameters(recurse=False)):
            yield name, num_own


def _linears(trunk: nn.Module) -> Iterator[Linear]:
    from transformers.pytorch_utils import Conv1D

    routing = routers_of(trunk)
    for name, module in trunk.named_modules():
        if isinstance(module, nn.Linear):
            inputs, outputs = module.in_features, module.out_features
        elif isinstance(module, Conv1D):
            inputs, outputs = module.nx, module.nf
        else:
            continue
        yield Linear(name=name, inputs=inputs, outputs=outputs, routes=name in routing)
