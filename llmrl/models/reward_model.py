"""Reward models: the trunk of a causal language model with one linear score, read at the last real token.

The same text gets the same score alone, in a batch, beside the other response of its pair, in training and from the
saved folder: padding is never read, and the last token is found by position, whatever its id. The head computes in
float32.

A new head is zero or normal with variance 1 / (hidden size + 1), as in Stiennon et al. 2020, arXiv:2009.01325, app. B.
"""

from typing import TYPE_CHECKING

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from llmrl.batches import PreferencePairs, Sequences
from llmrl.models.folders import ModelError
from llmrl.models.trunk import encode

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class RewardModule(nn.Module):
    """Reward model as the module that is wrapped and trained: its forward uses every parameter. Scores are raw."""

    def __init__(self, model: "PreTrainedModel", *, dtype: torch.dtype) -> None:
        super().__init__()
        self.model = model
        self.dtype = dtype

    def forward(self, batch: Sequences | PreferencePairs) -> Tensor:
        """Scores (B,) of sequences; (B, 2) of pairs, chosen and rejected, their prompt encoded once."""
        last = encode(self.model.base_model, batch, dtype=self.dtype).last()
        if isinstance(batch, PreferencePairs):
            last = last.unflatten(0, (-1, 2))
        with torch.autocast(last.device.type, enabled=False):
            return torch.squeeze_copy(score_layer(self.model)(last.float()), -1)


class TransformersRewardModel:
    """`Scorer` over a `RewardModule`, wrapped or not: one forward pass over all sequences, or pairs.
    `DistributedScorer` forms microbatches.

    Args:
        module: Is called; a `RewardModule` or its wrapper.
        shares_prompts: Whether both sides of a pair are in one row, with their prompt once.
    """

    def __init__(self, module: nn.Module, *, shares_prompts: bool) -> None:
        self.module = module
        self.shares_prompts = shares_prompts

    @torch.no_grad()
    def scores(self, sequences: Sequences) -> Float[Tensor, " B"]:
        """Raw scores, without gradient."""
        return self.module(sequences)

    def pair_scores(self, pairs: PreferencePairs) -> tuple[Float[Tensor, " B"], Float[Tensor, " B"]]:
        """Raw scores of ``(chosen, rejected)``."""
        if self.shares_prompts:
            return self.module(pairs).unbind(1)
        return self.module(Sequences.cat([pairs.chosen, pairs.rejected])).chunk(2)

    def pair_tokens(self, pairs: PreferencePairs) -> Int[Tensor, " B"]:
        """Tokens of each pair in a forward pass: one row with its prompt once, or two rows as long as the longer."""
        if self.shares_prompts:
            return pairs.chosen.num_tokens + pairs.rejected.response_lengths
        return 2 * torch.maximum(pairs.chosen.num_tokens, pairs.rejected.num_tokens)


def score_layer(model: "PreTrainedModel") -> nn.Module:
    """The linear layer from the last hidden state to the score.

    Raises:
        ModelError: The model reads its score in another way.
    """
    layer = getattr(model, "score", None)
    inner = getattr(layer, "original_module", layer)  # peft wraps a layer that is trained beside adapters
    if not isinstance(inner, nn.Linear) or inner.out_features != 1:
        raise ModelError(
            f"{type(model).__name__} ({model.config.model_type}) has no linear layer `score` to one number, read at "
            "the last token; choose a decoder with a sequence classification model of that form"
        )
    assert isinstance(layer, nn.Module)
    return layer
