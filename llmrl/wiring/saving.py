"""Writing what was trained."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from llmrl.distributed.launch import read_launch
from llmrl.models.companions import Companions
from llmrl.models.saving import Blueprint, save_policy
from llmrl.roles import Collectives, Trainable

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class Saver:
    """Writes a model that is trained: all ranks bring its weights together, the first one writes.

    To be made before the weights are split over ranks. What stands beside the weights is tried out at once.
    """

    def __init__(
        self,
        model: "PreTrainedModel",
        adapted: "PeftModel | None",
        tokenizer: "PreTrainedTokenizerBase",
        *,
        dtype: torch.dtype,
        collectives: Collectives,
    ) -> None:
        self.model = model
        self.adapted = adapted
        self.tokenizer = tokenizer
        self.dtype = dtype
        self.is_first = collectives.is_first
        self.companions = Companions(model, tokenizer)
        if self.is_first:
            self.companions.try_out(model, adapted, tokenizer)
        self.blueprint = None if read_launch().sharding == "none" else Blueprint(model, adapted)

    def save(self, folder: Path, trained: Trainable, records: Mapping[str, Any] | None = None) -> None:
        """See `save_policy`. All ranks must call it together."""
        model, adapted = self.model, self.adapted
        if self.blueprint is not None:
            whole = {}
            for name, weight in trained.whole(self.model):
                if self.is_first:
                    whole[name] = weight.to("cpu", copy=True)
            if self.is_first:
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
