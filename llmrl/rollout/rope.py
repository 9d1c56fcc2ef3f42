"""Rotary positions whose frequencies depend on the longest row of a batch: longrope (Phi-3) and dynamic NTK.

Left alone, a row's log-probabilities change with its neighbours, and keys in a cache keep the frequencies of the step
that wrote them. So the frequencies are pinned to those of the longest sequence that a run can have, in every pass.

The code of transformers looks at the highest position that it is handed. Pinning hands it one column more, at the end
of that longest sequence, and takes the column off what comes back.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from llmrl.rollout.support import RolloutError

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel


def pin_rope(model: "PreTrainedModel", longest: int) -> str | None:
    """Makes every pass use the frequencies of sequences of `longest` tokens, or of a longer one pinned before.

    Beyond the limit of the model that is the length to which it was extended, so that the frequencies are those of
    servers, which fix them by the length that they allow.

    Returns:
        A sentence where these are not the frequencies that transformers uses for a short row; else None.
    """
    config = model.config.get_text_config(decoder=True)
    limit = switching_limit(config)
    if limit is None:
        return None
    length = longest if longest <= limit else max(longest, _extended_length(config))
    for module in model.modules():
        if any(_switches(kind) for kind in _kinds(getattr(module, "rope_type", None))):
            _pin(module, length, limit)
    if longest <= limit:
        return None
    return (
        f"the rope of {config.model_type} changes its frequencies where the longest row of a batch exceeds {limit} "
        f"tokens, and sequences here may have {longest}: every row, short ones too, is read with the frequencies for "
        f"long sequences, as by servers that allow more than {limit} tokens; for the others keep sequences to {limit}"
    )


def switching_limit(config: "PretrainedConfig") -> int | None:
    """Tokens of a row from which on the frequencies of its batch change; None where they never do."""
    limits = [
        parameters.get("original_max_position_embeddings") or config.max_position_embeddings
        if parameters["rope_type"] == "longrope"
        else config.max_position_embeddings
        for parameters in _rope_parameters(config)
    ]
    return min(limits, default=None)


def _extended_length(config: "PretrainedConfig") -> int:
    factors = [parameters.get("factor") or 1.0 for parameters in _rope_parameters(config)]
    return int(config.max_position_embeddings * max(factors))


def _rope_parameters(config: "PretrainedConfig") -> Iterator[dict[str, Any]]:
    """Yields rope parameters that depend on the batch, of all layers alike or of each kind of layer."""
    parameters = getattr(config, "rope_parameters", None) or {}
    for one in (parameters, *parameters.values()):
        if isinstance(one, dict) and _switches(one.get("rope_type")):
            yield one


def _kinds(rope_type: Any) -> list[Any]:
    return list(rope_type.values()) if isinstance(rope_type, dict) else [rope_type]


def _switches(rope_type: Any) -> bool:
    return isinstance(rope_type, str) and (rope_type == "longrope" or "dynamic" in rope_type)


def _pin(module: Any, length: int, limit: int) -> None:
    if not hasattr(module, "pinned_length"):
        module.register_forward_pre_hook(_with_last_position, with_kwargs=True)
        module.register_forward_hook(_without_last_position)
        module.pinned_length = 0
    module.pinned_length = max(module.pinned_length, length)
    module.switching_limit = limit


def _with_last_position(
    module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    x, positions, *rest = args if len(args) > 1 else (*args, kwargs.pop("position_ids"))
    if module.pinned_length <= module.switching_limit < positions.shape[-1]:
        raise RolloutError(
            f"a row of {positions.shape[-1]} tokens is longer than the {module.switching_limit} up to which the rope "
            "of this model has the frequencies of this run; make such texts shorter"
        )
    last = positions.new_full((*positions.shape[:-1], 1), module.pinned_length - 1)
    return (x, torch.cat([positions, last], dim=-1), *rest), kwargs


def _without_last_position(_: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
    return output[..., :-1, :] if isinstance(output, Tensor) else tuple(part[..., :-1, :] for part in output)
