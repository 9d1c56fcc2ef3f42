"""Probes that forward passes over a model agree, run on a few short rows before it is trained or used.

The tokens of a rollout are sampled, scored and trained on beside different rows, in eval mode and in train mode. Their
log-probabilities, values and scores mean the same in each of these passes only if a row's hidden states depend on
nothing but the row, and no token's on a later one. The probe computes in float32, where rounding is far below its
tolerance.
"""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from llmrl.batches import Sequences
from llmrl.messages import class_and_message
from llmrl.models.folders import ModelError
from llmrl.models.packing import PACKED
from llmrl.models.trunk import encode, last_hidden_states

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PROBE_TOKENS = 12
NUM_REPEATS = 8
"""Repeated passes, which distinguish randomness, even a rare one, from dependence on other tokens."""
RANDOM = "two passes over the same rows differ"
TOLERANCE = 1e-4
"""Largest difference allowed between two hidden states of one token, relative to the largest number in them."""
BFLOAT16_TOLERANCE = 0.05
"""The same, where a GPU computes in bfloat16: rows that attend to other tokens differ by more."""


@torch.no_grad()
def probe_trunk(model: "PreTrainedModel", *, longest: int = 0) -> int:
    """Checks that the trunk's hidden states of a row depend on that row alone; in the mode that the model is in.

    Args:
        model: The model, in train mode if it is to be trained.
        longest: Tokens of the longest sequence that it will read, if known. A neighbour of the probe's row stands at
            the end of that, so that what depends on the longest row of a batch shows without a long pass.

    Returns:
        The width of the last hidden states.

    Raises:
        ModelError: A row's hidden states change from pass to pass, with its neighbours or with later tokens.
    """
    rows = probe_rows(model, model.config.get_text_config(decoder=True).vocab_size)
    alone, part = rows[:1], rows[:1, : rows.shape[1] // 2]
    with exact_float32():
        with torch.enable_grad():
            expected = _hidden(model, rows)
        for what, states in (
            (RANDOM, _hidden(model, rows)),
            ("a row changes with how long its neighbours are", _hidden(model, rows, longest=longest)),
            ("a row changes with its neighbours", _hidden(model, alone)),
            ("a later token changes what stands before it, as in models that attend both ways", _hidden(model, part)),
        ):
            difference = _difference(states, expected)
            if not difference <= TOLERANCE:
                again = [_difference(_hidden(model, rows), expected) for _ in range(NUM_REPEATS)]
                raise _refusal(model, RANDOM if max(again) > TOLERANCE else what, difference)
    return expected.shape[-1]


@torch.no_grad()
def pack_where_exact(model: "PreTrainedModel", *, longest: int = 0) -> None:
    """Lets passes over the trunk be packed, if the hidden states of a packed row are those of rows of their own, and
    passes that are not packed, as of a rollout, stay what they are.

    A window over columns sees other tokens in a packed row, so a model that has one is left as it is unless the window
    holds the longest sequence of the run; likewise one whose bias counts columns (ALiBi), one whose layers are not all
    attention, and kernels of attention other than torch's. The probe runs in float32, except on a GPU, whose kernel for
    packed rows takes none.

    Args:
        model: The model, in the mode in which it is used.
        longest: Tokens of the longest sequence that it will read; 0: not known.
    """
    trunk: Any = model.base_model  # on a shared base, its settings are another object than the model's
    config = trunk.config.get_text_config(decoder=True)
    if config._attn_implementation != "sdpa" or not _attends_by_position(config, longest):
        return
    sequences, rows = _probe_sequences(config.vocab_size).to(model.device), probe_rows(model, config.vocab_size)
    dtype, tolerance = torch.float32, TOLERANCE
    if model.device.type == "cuda":
        dtype, tolerance = torch.bfloat16, BFLOAT16_TOLERANCE

    def states() -> list[Tensor]:
        hidden = encode(trunk, sequences, dtype=dtype)
        return [hidden.before(sequences.response_mask), hidden.last(), _hidden(model, rows)]

    try:
        expected = states()
        trunk.set_attn_implementation(PACKED)
        exact = all(_is_close(*each, tolerance) for each in zip(states(), expected, strict=True))
    except Exception:  # whatever a layer makes of arguments that it does not know
        exact = False
    if not exact:
        trunk.set_attn_implementation("sdpa")


def _attends_by_position(config: Any, longest: int) -> bool:
    """Whether attention sees every earlier token of a sequence, and where it stands by its position alone."""
    kinds = set(getattr(config, "layer_types", None) or ())
    window = getattr(config, "sliding_window", None)
    has_window = "sliding_attention" in kinds if kinds else window is not None
    if kinds - {"full_attention", "sliding_attention"} or getattr(config, "alibi", False):
        return False
    return not has_window or (window is not None and 0 < longest <= window)


def probe_rows(model: "PreTrainedModel", vocab_size: int) -> Int[Tensor, "2 S"]:
    """Two rows of ids that all differ, as far as the vocabulary goes, no longer than the model's positions."""
    config = model.config.get_text_config(decoder=True)
    length = min(PROBE_TOKENS, getattr(config, "max_position_embeddings", None) or PROBE_TOKENS)
    ids = torch.arange(2 * length, device=model.device).mul(7919).remainder(vocab_size)
    return ids.view(2, length)


@contextmanager
def exact_float32() -> Iterator[None]:
    """Temporarily computes float32 matrix products in full float32, even where faster ones are allowed."""
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    matmul.fp32_precision = "ieee"
    try:
        yield
    finally:
        matmul.fp32_precision = before


def _probe_sequences(vocab_size: int) -> Sequences:
    """Ragged responses to two prompts, of ids that all differ as far as the vocabulary goes."""
    lengths = torch.tensor([3, 1, 2, 4])
    mask = torch.arange(4) < lengths[:, None]
    return Sequences(
        unique_prompt_ids=torch.arange(8).view(2, 4) % vocab_size,
        unique_prompt_mask=torch.tensor([[False, True, True, True], [True, True, True, True]]),
        prompt_of_row=torch.tensor([0, 1, 0, 1]),
        response_ids=(11 + torch.arange(16).view(4, 4)) % vocab_size,
        response_mask=mask,
        response_lengths=lengths,
    )


def _hidden(model: "PreTrainedModel", ids: Int[Tensor, "B S"], *, longest: int = 0) -> Float[Tensor, "B S H"]:
    """Last hidden states; with `longest`, the rows after the first of a rotary model stand at the end of a sequence of
    that length."""
    trunk, positions = model.base_model, {}
    is_rotary = getattr(model.config.get_text_config(decoder=True), "rope_parameters", None) is not None
    if longest > ids.shape[1] and is_rotary and "position_ids" in inspect.signature(trunk.forward).parameters:
        columns = torch.arange(ids.shape[1], device=ids.device).expand(ids.shape)
        positions = {"position_ids": torch.cat([columns[:1], columns[1:] + longest - ids.shape[1]])}
    try:
        return last_hidden_states(trunk, ids, **positions).detach()
    except Exception as error:
        raise ModelError(
            f"{type(model).__name__} ({model.config.model_type}) cannot be used here: a plain pass over a few tokens "
            f"fails ({class_and_message(error)}); choose another model"
        ) from error


def _difference(states: Float[Tensor, "A L H"], expected: Float[Tensor, "B S H"]) -> float:
    """Largest difference of the first rows over the columns of both, relative to the largest number in them."""
    expected = expected[0, : states.shape[1]]
    return float((states[0] - expected).abs().max() / expected.abs().max())


def _is_close(states: Tensor, expected: Tensor, tolerance: float) -> bool:
    """Whether no difference is larger, relative to the largest number; False where one is NaN."""
    return bool((states - expected).abs().max() <= tolerance * expected.abs().max())


def _refusal(model: "PreTrainedModel", what: str, difference: float) -> ModelError:
    noises = [
        f"{name} ({value})"
        for name, value in model.config.to_dict().items()
        if isinstance(value, float) and value > 0 and any(word in name for word in ("drop", "jitter", "noise"))
    ]
    way_out = "choose another model, a decoder that attends to earlier tokens only"
    if what == RANDOM and noises:
        way_out = f"set to 0 in its config.json what is random in training, such as {', '.join(noises)}"
    return ModelError(
        f"{type(model).__name__} ({model.config.model_type}) cannot be used here: {what}, by {difference:.2g} of its "
        f"hidden states, so that what is sampled, scored and trained would disagree; {way_out}"
    )
