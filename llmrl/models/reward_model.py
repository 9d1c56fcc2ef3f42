"""Reward models: the trunk of a causal language model with one linear score, read at the last real token.

The same text gets the same score alone, in a batch, beside the other response of its pair, in training and from the
saved folder: padding stands behind the last token, where causal attention never looks, and the last token is found by
position, whatever its id. The head computes in float32.

A new head is zero or normal with variance 1 / (hidden size + 1), as in Stiennon et al. 2020, arXiv:2009.01325, app. B.
"""

from typing import TYPE_CHECKING

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from llmrl.batches import PreferencePairs, Sequences, TokenOutputs
from llmrl.microbatches import in_microbatches
from llmrl.models.folders import ModelError
from llmrl.models.policy import attended, computing_in, last_hidden_states, to_left_margin

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PROBE_TOLERANCE = 1e-4


class RewardModule(nn.Module):
    """The module that is wrapped and trained: every parameter is touched inside its forward. Scores are raw."""

    def __init__(self, model: "PreTrainedModel", *, dtype: torch.dtype) -> None:
        super().__init__()
        self.model = model
        self.dtype = dtype

    def forward(self, batch: Sequences | PreferencePairs) -> Tensor:
        """Scores (B,) of sequences; (B, 2) of pairs, chosen and rejected, their prompt encoded once."""
        last = self.last_hidden(batch)
        with torch.autocast(last.device.type, enabled=False):
            return torch.squeeze_copy(score_layer(self.model)(last.float()), -1)

    def last_hidden(self, batch: Sequences | PreferencePairs) -> Tensor:
        """Hidden states (B, H) behind the last token of sequences; (B, 2, H) of pairs."""
        if isinstance(batch, Sequences):
            ids, _ = to_left_margin(batch)
            return self._hidden(ids, {}, batch.num_tokens[:, None] - 1).squeeze(1)
        row = PairRow(batch)
        return self._hidden(row.ids, {"attention_mask": row.attends, "position_ids": row.positions}, row.last)

    def _hidden(self, ids: Int[Tensor, "B S"], context: dict[str, Tensor], at: Int[Tensor, "B K"]) -> Tensor:
        """Last hidden states (B, K, H) at these columns; `context` is what attention is told beyond the ids."""
        with computing_in(self.dtype, ids.device):
            hidden = last_hidden_states(self.model.base_model, ids, **context)
        return hidden.gather(1, at[:, :, None].expand(-1, -1, hidden.shape[-1]))


class PairRow:
    """Pairs as rows of prompt, chosen and rejected without a gap.

    Positions of both responses count on from the prompt. For "ab" with "x" and "yz", what each token attends to:

            a b x y z
        a   1
        b   1 1
        x   1 1 1
        y   1 1   1
        z   1 1   1 1
    """

    def __init__(self, pairs: PreferencePairs) -> None:
        chosen, rejected = pairs.chosen, pairs.rejected
        prompts = chosen.prompt_mask.sum(dim=1)
        ends = torch.stack([prompts, prompts + chosen.response_lengths], dim=1)
        lengths = ends[:, 1] + rejected.response_lengths
        columns = torch.arange(int(lengths.max()) if len(lengths) else 1, device=prompts.device)
        filled = columns < lengths[:, None]
        parts = [
            (chosen.prompt_ids, chosen.prompt_mask),
            (chosen.response_ids, attended(chosen)),
            (rejected.response_ids, attended(rejected)),
        ]
        ids, mask = (torch.cat(tensors, dim=1) for tensors in zip(*parts, strict=True))
        self.ids: Int[Tensor, "B S"] = torch.zeros_like(filled, dtype=ids.dtype).masked_scatter(filled, ids[mask])
        in_rejected = columns >= ends[:, 1:]
        in_chosen = (columns >= ends[:, :1]) & ~in_rejected
        positions = columns - in_rejected * chosen.response_lengths[:, None]
        self.positions: Int[Tensor, "B S"] = positions * filled  # padding may lie beyond the last that a model has
        causal = columns[:, None] >= columns
        apart = in_rejected[:, :, None] & in_chosen[:, None, :]
        self.attends: Bool[Tensor, "B 1 S S"] = (causal & ~apart)[:, None]
        self.last: Int[Tensor, "B 2"] = torch.stack([ends[:, 1], lengths], dim=1) - 1


class TransformersRewardModel:
    """Scores of sequences and of pairs, by a `RewardModule`, wrapped or not.

    Without gradient it forms its own microbatches, as `TransformersPolicy` does.
    """

    def __init__(self, module: nn.Module, *, microbatch_tokens: int, shares_prompts: bool) -> None:
        self.module = module
        self.microbatch_tokens = microbatch_tokens
        self.shares_prompts = shares_prompts

    @torch.no_grad()
    def scores(self, sequences: Sequences) -> Float[Tensor, " B"]:
        """Raw scores, without gradient."""
        outputs = in_microbatches(self._ask, sequences, sequences.num_tokens, self.microbatch_tokens)
        return outputs.named["scores"]

    def pair_scores(self, pairs: PreferencePairs) -> tuple[Float[Tensor, " B"], Float[Tensor, " B"]]:
        """Raw scores of ``(chosen, rejected)``."""
        if torch.is_grad_enabled():
            outputs = self._ask_pairs(pairs)
        else:
            outputs = in_microbatches(self._ask_pairs, pairs, self.pair_tokens(pairs), self.microbatch_tokens)
        return outputs.named["chosen"], outputs.named["rejected"]

    def _ask(self, sequences: Sequences) -> TokenOutputs:
        return TokenOutputs(named={"scores": self.module(sequences)})

    def _ask_pairs(self, pairs: PreferencePairs) -> TokenOutputs:
        if self.shares_prompts:
            chosen, rejected = self.module(pairs).unbind(1)
        else:
            chosen, rejected = self.module(Sequences.cat([pairs.chosen, pairs.rejected])).chunk(2)
        return TokenOutputs(named={"chosen": chosen, "rejected": rejected})

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


@torch.no_grad()
def shares_prompts_exactly(module: RewardModule, vocab_size: int) -> bool:
    """Whether pairs in a row with their prompt score as each response does on its own: asked of the model, on a probe.

    A window that slides over columns sees other tokens in a shared row once that is longer than the window, so models
    that have one are not asked; nor those whose bias counts columns (ALiBi), nor kernels of attention that take no mask
    of their own. The probe runs in float32: the kernels of a mask and of none may round differently.
    """
    config = module.model.config.get_text_config()
    windows = set(getattr(config, "layer_types", None) or ()) - {"full_attention"}
    by_column = windows or getattr(config, "sliding_window", None) or getattr(config, "alibi", False)
    if config._attn_implementation != "sdpa" or by_column:
        return False
    exact = RewardModule(module.model, dtype=torch.float32)
    pairs = _probe(vocab_size).to(module.model.device)
    shared = exact.last_hidden(pairs)
    apart = torch.stack([exact.last_hidden(pairs.chosen), exact.last_hidden(pairs.rejected)], dim=1)
    return bool((shared - apart).abs().max() <= PROBE_TOLERANCE * apart.abs().max())  # never, where one is NaN


def _probe(vocab_size: int) -> PreferencePairs:
    """Two ragged pairs of ids that all differ, as far as the vocabulary goes."""

    def side(first: int, lengths: list[int]) -> Sequences:
        response_lengths = torch.tensor(lengths)
        mask = torch.arange(max(lengths)) < response_lengths[:, None]
        return Sequences(
            prompt_ids=torch.arange(8).view(2, 4) % vocab_size,
            prompt_mask=torch.tensor([[False, True, True, True], [True, True, True, True]]),
            response_ids=(first + torch.arange(mask.numel()).view(mask.shape)) % vocab_size,
            response_mask=mask,
            response_lengths=response_lengths,
        )

    return PreferencePairs(chosen=side(11, [3, 1]), rejected=side(23, [2, 4]), margin=torch.zeros(2))
