"""A trained model as an ordinary Hugging Face folder."""

import copy
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def save_policy(
    folder: Path,
    *,
    model: "PreTrainedModel",
    adapted: "PeftModel | None",
    tokenizer: "PreTrainedTokenizerBase",
    dtype: torch.dtype,
    records: Mapping[str, Any] | None = None,
) -> None:
    """Model, tokenizer and chat template, loadable with plain transformers; the folder is there whole or not at all.

    Adapters are merged into the model that is saved; by themselves they lie in ``adapter/``, to be continued.
    `records` are written beside the model as JSON, by the name of their file.
    """
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    if adapted is not None:
        adapted.save_pretrained(str(partial / "adapter"), selected_adapters=["default"])
        tokenizer.save_pretrained(partial / "adapter")
        model = copy.deepcopy(adapted).merge_and_unload()  # type: ignore[operator]
    elif dtype != model.dtype:
        model = copy.deepcopy(model)
    model.to(dtype).save_pretrained(partial)  # type: ignore[arg-type]
    tokenizer.save_pretrained(partial)
    for name, record in (records or {}).items():
        (partial / name).write_text(json.dumps(record, indent=1) + "\n")
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)
