"""Loaded models, each with everything that belongs to it."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from llmrl.batches import PreferencePairs
from llmrl.models.critic import SharedTrunk, TransformersValueFunction, ValueHead
from llmrl.models.mtp import TargetHeads
from llmrl.models.policy import PolicyModule, TransformersPolicy
from llmrl.models.reward_model import RewardModule, TransformersRewardModel
from llmrl.models.reward_record import Normalization, TextForm, normalization_on
from llmrl.roles import ActorCritic, Scorer

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True, kw_only=True)
class Actor:
    """The policy that is trained, with its tokenizer."""

    model: "PreTrainedModel"
    adapted: "PeftModel | None"
    tokenizer: "PreTrainedTokenizerBase"
    module: PolicyModule
    policy: TransformersPolicy
    dtype: torch.dtype
    width: int
    """Size of its hidden states."""
    warnings: tuple[str, ...]
    """Sentences for the user on how this model is read."""


@dataclass(frozen=True, kw_only=True)
class LoadedCritic:
    """What the critic is made of."""

    trunk: "PreTrainedModel"
    """The model whose hidden states the head reads."""
    head: ValueHead
    adapted: "PeftModel | None"
    """peft's view of the trunk, where the critic is an adapter on the actor's base."""
    owns_trunk: bool
    """Whether every weight of the trunk is the critic's own."""


@dataclass(frozen=True, kw_only=True)
class Networks:
    """Actor and critic of PPO."""

    both: ActorCritic
    actor: TransformersPolicy | SharedTrunk
    value: TransformersValueFunction | None
    """None where both are heads on one trunk."""
    critic: LoadedCritic | None
    """What is saved of the critic; None of heads that nothing keeps."""
    targets: TargetHeads | None = None
    """Target heads of an implicit critic."""


@dataclass(frozen=True, kw_only=True)
class LoadedRewardModel:
    """The reward model that is trained, with its tokenizer."""

    model: "PreTrainedModel"
    adapted: "PeftModel | None"
    tokenizer: "PreTrainedTokenizerBase"
    module: RewardModule
    scorer: TransformersRewardModel
    has_own_pad: bool
    """Pad and EOS differ, so that plain transformers reads the score where llmrl does."""
    warnings: tuple[str, ...]
    """Sentences for the user on how this model is read."""

    def normalize(self, pairs: PreferencePairs, scorer: Scorer) -> Normalization:
        """Normalization to mean 0 and standard deviation 1 over both sides of these pairs, stored in the model's
        config. `scorer` is the model's own, or that of all ranks."""
        with torch.no_grad():
            normalization = normalization_on(torch.cat(scorer.pair_scores(pairs)))
        normalization.write(self.model.config)
        return normalization


@dataclass(frozen=True, kw_only=True)
class RewardScorer:
    """A frozen reward model on the device, with its tokenizer."""

    scorer: TransformersRewardModel
    tokenizer: "PreTrainedTokenizerBase"
    normalize: Callable[[Tensor], Tensor]
    text_form: TextForm
    """Template and system prompt for prompts that bring none of their own."""
    position_limit: int | None
    """Tokens of the longest sequence that it can read; None: no limit."""
