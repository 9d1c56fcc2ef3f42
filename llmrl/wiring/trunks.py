"""Preparation of every model before its first pass, whatever its role: rope and probe."""

from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch

from llmrl.microbatches import TokenBudget
from llmrl.models.config import ModelConfig
from llmrl.models.packing import packs
from llmrl.models.probe import pack_where_exact, probe_trunk
from llmrl.roles import Progress
from llmrl.rollout.rope import pin_rope

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def settle_passes(model: "PreTrainedModel", longest: int, *, packing: bool) -> tuple[int, tuple[str, ...]]:
    """Fixes a rope that depends on the batch, by the longest sequence of the run, and only then probes the trunk.

    Args:
        model: The model, in the mode in which it is used.
        longest: Tokens of the longest sequence of the run; 0: not known.
        packing: Whether its passes may be packed, where that is exact.

    Returns:
        ``(width, warnings)``: the size of the hidden states, and what the user must know of the rope.

    Raises:
        ModelError: The passes of the model disagree, see `probe_trunk`.
    """
    warning = pin_rope(model, longest)
    width = probe_trunk(model, longest=longest)
    if packing:
        pack_where_exact(model, longest=longest)
    return width, (warning,) if warning else ()


def budget_of(
    models: Iterable["PreTrainedModel"], max_tokens: int, dtype: torch.dtype, device: torch.device, *, section: str
) -> TokenBudget:
    """Token budget of passes over all of these models, which `section` sets: packed if each of them packs."""
    packed = all(packs(model.base_model, dtype, device) for model in models)
    return TokenBudget(max_tokens=max_tokens, packed=packed, setting=f"{section}.microbatch_tokens")


def report_padding(budget: TokenBudget, model: ModelConfig, progress: Progress) -> None:
    """Prints that passes are padded, where the settings ask for packed ones."""
    if model.packing and not budget.packed:
        progress.message(
            "Forward passes are padded, a row for each response, which takes more time and memory: "
            f"{model.path} cannot be packed here; docs/models.md has the reasons"
        )
