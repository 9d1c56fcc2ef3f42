"""Preparation of every model before its first pass, whatever its role: rope and probe."""

from typing import TYPE_CHECKING

from llmrl.models.probe import probe_trunk
from llmrl.rollout.rope import pin_rope

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def settle_passes(model: "PreTrainedModel", longest: int) -> tuple[int, tuple[str, ...]]:
    """Fixes a rope that depends on the batch, by the longest sequence of the run, and only then probes the trunk.

    Returns:
        ``(width, warnings)``: the size of the hidden states, and what the user must know of the rope.

    Raises:
        ModelError: The passes of the model disagree, see `probe_trunk`.
    """
    warning = pin_rope(model, longest)
    return probe_trunk(model, longest=longest), (warning,) if warning else ()
