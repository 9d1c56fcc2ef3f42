"""Saving of a trained model as an ordinary Hugging Face folder."""

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from llmrl.distributed.context import Context
from llmrl.files import replaced_folder
from llmrl.models.companions import Companions
from llmrl.roles import Trainable

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class Blueprint:
    """Modules of a model with weights on the meta device, copied before training splits its own over ranks."""

    def __init__(self, model: "PreTrainedModel", adapted: "PeftModel | None") -> None:
        """`adapted` is peft's view of the same model, if there is one. Both keep the model's own config."""
        memo: dict[int, Any] = {id(p): nn.Parameter(p.to("meta"), p.requires_grad) for p in model.parameters()}
        self.config = memo[id(model.config)] = model.config
        self.modules: tuple[PreTrainedModel, PeftModel | None] = copy.deepcopy((model, adapted), memo)

    def filled(self, weights: Mapping[str, Tensor]) -> "tuple[PreTrainedModel, PeftModel | None]":
        """Model and peft's view of it with these full weights, given by their names in the model."""
        memo: dict[int, Any] = {
            id(p): nn.Parameter(weights[name], p.requires_grad) for name, p in self.modules[0].named_parameters()
        }
        memo[id(self.config)] = self.config
        return copy.deepcopy(self.modules, memo)


class Saver:
    """Writes the model that is trained: full weights are gathered from all ranks, and the first rank writes.

    Construct it before training splits the weights over ranks. The constructor tries to write all other files.
    """

    def __init__(
        self,
        model: "PreTrainedModel",
        adapted: "PeftModel | None",
        tokenizer: "PreTrainedTokenizerBase",
        *,
        dtype: torch.dtype,
        context: Context,
    ) -> None:
        self.model = model
        self.adapted = adapted
        self.tokenizer = tokenizer
        self.dtype = dtype
        self.is_first = context.collectives.is_first
        self.companions = Companions(model, tokenizer)
        if self.is_first:
            self.companions.try_out(model, adapted, tokenizer)
        self.blueprint = None if context.launch.sharding == "none" else Blueprint(model, adapted)

    def save(self, folder: Path, trained: Trainable, records: Mapping[str, Any] | None = None) -> None:
        """See `save_policy`. Collective: every rank must call it.

        Raises:
            FloatingPointError: A weight is not finite; on every rank, and before anything is written.
        """
        model, adapted = self.model, self.adapted
        whole = {}
        for name, weight in trained.whole(self.model):
            check_finite(name, weight)
            if self.blueprint is not None and self.is_first:
                whole[name] = weight.to("cpu", copy=True)
        if self.blueprint is not None and self.is_first:
            model, adapted = self.blueprint.filled(whole)
        if self.is_first:
            save_policy(
                folder,
                model=model,
                adapted=adapted,
                tokenizer=self.tokenizer,
                dtype=self.dtype,
                companions=self.companions,
                records=records,
            )


def save_policy(
    folder: Path,
    *,
    model: "PreTrainedModel",
    adapted: "PeftModel | None",
    tokenizer: "PreTrainedTokenizerBase",
    dtype: torch.dtype,
    companions: Companions | None = None,
    records: Mapping[str, Any] | None = None,
) -> None:
    """Writes model, tokenizer and chat template, loadable with plain transformers: a complete folder or none, see
    `replaced_folder`.

    Adapters are merged into the saved model, and also written to ``adapter/``, from which they can be continued.
    `records` become JSON files beside the model, by file name. `companions` are the model's companion files; by
    default they are read now.
    """
    companions = companions or Companions(model, tokenizer)
    num_bytes = model.num_parameters() * dtype.itemsize
    with replaced_folder(folder, num_bytes) as new:
        if adapted is not None:
            save_adapter(new / "adapter", adapted)
            companions.write_tokenizer(new / "adapter", tokenizer)
            model = _merged(adapted, dtype)
        elif dtype != model.dtype:
            model = copy.deepcopy(model)
        save_weights(new, model.to(dtype))  # type: ignore[arg-type]
        companions.write(new, model)
        companions.write_tokenizer(new, tokenizer)
        for name, record in (records or {}).items():
            (new / name).write_text(json.dumps(record, indent=1) + "\n")


def save_adapter(folder: Path, adapted: "PeftModel") -> None:
    """Writes the adapter that is trained, without the model card of peft, which is empty and names folders."""
    adapted.save_pretrained(str(folder), selected_adapters=["default"])
    (folder / "README.md").unlink(missing_ok=True)


def _merged(adapted: "PeftModel", dtype: torch.dtype) -> "PreTrainedModel":
    """A copy with the adapters merged."""
    if getattr(adapted, "is_loaded_in_4bit", False):
        from llmrl.models.nf4 import merged

        return merged(adapted, dtype)
    return copy.deepcopy(adapted).merge_and_unload()  # type: ignore[operator]


def check_finite(name: str, weight: Tensor) -> None:
    if not weight.isfinite().all():
        raise FloatingPointError(
            f"the weight {name} is not finite, so the model is not saved, and one that was saved earlier stays; lower "
            "optimizer.learning_rate, or look in metrics.jsonl for where it began"
        )


def save_weights(folder: Path, model: "PreTrainedModel") -> None:
    """Writes weights and settings. Generation settings are written separately: transformers refuses to save some that
    it loads."""
    if not model.can_generate():
        model.save_pretrained(folder)
        return
    own = model.generation_config
    model.generation_config = type(own)()
    try:
        model.save_pretrained(folder)
    finally:
        model.generation_config = own
    own.to_json_file(folder / "generation_config.json", use_diff=True)
