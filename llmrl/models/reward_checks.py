"""Sanity checks that any trained reward model must pass, run on pairs of the data."""

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from llmrl.batches import Sequences, pad_columns
from llmrl.roles import Scorer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

END_CHECK = "end token scored"
NUM_PROBED = 8
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2}
"""Largest difference between scores of the same sequence, relative to the largest score: rounding."""


def sanity_checks(
    scorer: Scorer, responses: Sequences, tokenizer: "PreTrainedTokenizerBase", *, dtype: torch.dtype
) -> dict[str, bool]:
    """Whether each check passed, by its name.

    Args:
        scorer: The trained reward model.
        responses: Responses of the data, with their prompts.
        tokenizer: The tokenizer that encoded them.
        dtype: Arithmetic of the scorer.
    """
    few = responses.select(torch.arange(min(NUM_PROBED, len(responses.response_lengths))))
    return {
        END_CHECK: _ends_with(responses, tokenizer.eos_token_id),
        "padding inert": _padding_is_inert(scorer, few, TOLERANCE[dtype]),
        "template free of today's date": "strftime_now" not in str(tokenizer.chat_template),
    }


def _ends_with(responses: Sequences, eos_id: Any) -> bool:
    """Whether every response ends with the EOS, where its score is read. Truncated responses do not."""
    last = responses.response_ids.gather(1, responses.response_lengths[:, None] - 1)
    return bool((last == eos_id).all())


def _padding_is_inert(scorer: Scorer, few: Sequences, tolerance: float) -> bool:
    """Whether scores are the same alone as in a batch with more padding, whatever ids stand in it."""
    together = scorer.scores(_widened(few, by=7, filled_with=1))
    alone = torch.cat([scorer.scores(few.select(torch.tensor([row]))) for row in range(len(together))])
    return bool((together - alone).abs().max() <= tolerance * alone.abs().max())  # never, where a score is NaN


def _widened(sequences: Sequences, *, by: int, filled_with: int) -> Sequences:
    def widen(ids: torch.Tensor, mask: torch.Tensor, left: bool) -> tuple[torch.Tensor, torch.Tensor]:
        width = ids.shape[1] + by
        wide = pad_columns(mask, width, left=left)
        return pad_columns(ids, width, left=left).masked_fill(~wide, filled_with), wide

    prompt_ids, prompt_mask = widen(sequences.unique_prompt_ids, sequences.unique_prompt_mask, True)
    response_ids, response_mask = widen(sequences.response_ids, sequences.response_mask, False)
    return replace(
        sequences,
        unique_prompt_ids=prompt_ids,
        unique_prompt_mask=prompt_mask,
        response_ids=response_ids,
        response_mask=response_mask,
    )
