"""Tiny reward models, their scorers, and rows of a few tokens."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForSequenceClassification,
)

from llmrl.batches import PreferencePairs, Sequences
from llmrl.models.reward_model import (
    RewardModule,
    TransformersRewardModel,
)
from llmrl.models.training import turn_dropout_off

from .tiny import EOS, FAMILIES, make_sequences, packing

PAD = 36  # in none of the rows
PACKING = ("llama", "qwen3", "gpt2")
SLIDING = ("mistral", "gemma2", "gemma3")
"""Families that pack, and those with a window that slides over columns."""


PROMPTS = [[7, 8, 9], [EOS, 14, EOS], [3, 4, 5, 6, 30, 31, 32, 33], [34], [35, 18]]


CHOSEN = [[10, 11, 20, 12, EOS], [15, EOS], [EOS], [16, EOS, 17], [19, EOS, 22, EOS]]


REJECTED = [[21, EOS], [EOS, 15, EOS], [13, 12, 11, 10, EOS], [EOS], [19, EOS]]


Ids = Sequence[list[int]]


def reward_model(family: str) -> Any:
    """The same weights each time, in eval mode."""
    torch.manual_seed(0)
    config = FAMILIES[family]().config
    config.num_labels = 1
    return AutoModelForSequenceClassification.from_config(config).eval()


def scorer_of(model: Any, *, packed=False, dtype=torch.float32):
    """In train mode without dropout, as a run has it."""
    turn_dropout_off(model)
    module = RewardModule(packing(model.train()) if packed else model.train(), dtype=dtype)
    return TransformersRewardModel(module)


def sequences(prompts: Ids = PROMPTS, responses: Ids = CHOSEN, **padding: Any) -> Sequences:
    return make_sequences([(p, r, [1] * len(r)) for p, r in zip(prompts, responses, strict=True)], **padding)


def pairs(prompts: Ids = PROMPTS, chosen: Ids = CHOSEN, rejected: Ids = REJECTED, **padding: Any) -> PreferencePairs:
    sides = [sequences(prompts, side, **padding) for side in (chosen, rejected)]
    return PreferencePairs(chosen=sides[0], rejected=sides[1], margin=torch.zeros(len(prompts)))


def alone(model: Any, prompts: Ids = PROMPTS, responses: Ids = CHOSEN) -> Tensor:
    """The last hidden state of each row times the head."""
    scores = []
    for prompt, response in zip(prompts, responses, strict=True):
        hidden = model.base_model(input_ids=torch.tensor([prompt + response]), use_cache=False).last_hidden_state
        scores.append(hidden[0, -1] @ model.score.weight[0])
    return torch.stack(scores)


def move(module: nn.Module) -> None:
    """What training does: other weights wherever they may learn."""
    with torch.no_grad():
        for p in module.parameters():
            if p.requires_grad:
                p.add_(0.1 * torch.randn_like(p))
