"""Rollouts of one model as another reads them: through text where their tokenizers differ."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from transformers import PreTrainedTokenizerBase

from llmrl.batches import Rollout, Row, Sequences
from llmrl.data.chat import as_sequences, prompt_ids, response_ids
from llmrl.data.config import DataConfig
from llmrl.data.files import DataError
from llmrl.data.rows import places_of

PROBE = "Is  1+2 = 3?\n Él said: 'naïve', don't."
"""A text that tokenizers of one vocabulary still split differently if their rules differ."""


def same_tokens(left: PreTrainedTokenizerBase, right: PreTrainedTokenizerBase) -> bool:
    """Whether two tokenizers write a conversation with the same ids."""
    return left.chat_template == right.chat_template and same_ids(left, right)


def same_ids(left: PreTrainedTokenizerBase, right: PreTrainedTokenizerBase) -> bool:
    """Whether an id means the same to two tokenizers, however they write a conversation."""
    return (
        left.get_vocab() == right.get_vocab()
        and left.eos_token_id == right.eos_token_id
        and left(PROBE)["input_ids"] == right(PROBE)["input_ids"]
    )


def ended_by(rollout: Rollout, eos_id: int | None) -> Sequences:
    """The sequences of a rollout, those that ended by themselves with this EOS as their last token.

    A policy may end a response with any end id of its generation config, ``<|endoftext|>`` in place of ``<|im_end|>``
    say; a reward model reads its score at the last token, where it has seen its tokenizer's EOS only. Where the
    tokenizer has none, nothing is replaced.
    """
    sequences = rollout.sequences
    if eos_id is None:
        return sequences
    ids, last = sequences.response_ids, sequences.response_lengths[:, None] - 1
    ends = torch.where(rollout.finished[:, None], eos_id, ids.gather(1, last))
    return replace(sequences, response_ids=ids.scatter(1, last, ends))


class Rerenderer:
    """Encodes a rollout for another tokenizer: prompts by its chat template, responses as text, EOS where they ended.

    Args:
        data: Where the prompts came from.
        policy_tokenizer: Reads the responses.
        tokenizer: Writes prompts and responses.
    """

    def __init__(
        self, data: DataConfig, *, policy_tokenizer: PreTrainedTokenizerBase, tokenizer: PreTrainedTokenizerBase
    ) -> None:
        self.data = data
        self.policy_tokenizer = policy_tokenizer
        self.tokenizer = tokenizer

    def check(self, rows: Sequence[Row]) -> None:
        """Refuses rows whose prompts the other tokenizer cannot write, before there are any responses to them."""
        try:
            prompts = [row[self.data.prompt_column] for row in rows]
            prompt_ids(prompts, self.tokenizer, self.data, places=places_of(rows))
            response_ids([""], self.tokenizer, self.data)
        except DataError as error:
            raise DataError(f"the reward model cannot read these prompts: {error}") from error

    def __call__(self, rollout: Rollout) -> Sequences:
        """The same prompts and responses in the other tokens."""
        sequences = rollout.sequences
        ids = [
            row[:length]
            for row, length in zip(sequences.response_ids.tolist(), sequences.response_lengths.tolist(), strict=True)
        ]
        texts = self.policy_tokenizer.batch_decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        prompts = prompt_ids([row[self.data.prompt_column] for row in rollout.rows], self.tokenizer, self.data)
        responses = response_ids(texts, self.tokenizer, self.data)
        ended = rollout.finished.tolist()
        without_end = [
            response if end else response[:-1] or response for response, end in zip(responses, ended, strict=True)
        ]
        return as_sequences(prompts, without_end).to(sequences.response_ids.device)
