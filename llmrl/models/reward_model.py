"""Reward models: the trunk of a causal language model with one linear score, read at the last real token.

The same text gets the same score alone, in a batch, beside the other response of its pair, in training and from the
saved folder: padding is never read, and the last token is found by position, whatever its id. The head computes in
float32.

A new head is zero or normal with variance 1 / (hidden size + 1), as in Stiennon et al. 2020, arXiv:2009.01325, app. B.
"""

from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
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

    def forward(self, sequences: Sequences) -> Float[Tensor, " B"]:
        """Raw scores."""
        last = encode(self.model.base_model, sequences, dtype=self.dtype).last()
        with torch.autocast(last.device.type, enabled=False):
            return torch.squeeze_copy(score_layer(self.model)(last.float()), -1)


class TransformersRewardModel:
    """`Scorer` over a `RewardModule`, wrapped or not: one forward pass over all sequences, or pairs.
    `DistributedScorer` forms microbatches."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    @torch.no_grad()
    def scores(self, sequences: Sequences) -> Float[Tensor, " B"]:
        """Raw scores, without gradient."""
        return self.module(sequences)

    def pair_scores(self, pairs: PreferencePairs) -> tuple[Float[Tensor, " B"], Float[Tensor, " B"]]:
        """Raw scores of ``(chosen, rejected)``."""
        return self.module(pairs.sequences).unflatten(0, (-1, 2)).unbind(1)


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
