"""The policy that is trained, and the reference that it started from."""

import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from llmrl.build.precision import dtype_of
from llmrl.build.trunks import settle_passes
from llmrl.distributed.config import DistributedConfig
from llmrl.distributed.wrapping import loading_device, place_frozen
from llmrl.experience import Sequences
from llmrl.models.heads import choose_head
from llmrl.models.loading import (
    ModelConfig,
    as_loaded,
    load_adapted,
    load_tokenizer,
    num_token_ids,
    ready_to_train,
    shrink_linear_layers,
)
from llmrl.models.policy import PolicyModule, TransformersPolicy
from llmrl.roles import Collectives, Policy

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True, kw_only=True)
class Actor:
    """A loaded policy with everything that belongs to it."""

    model: "PreTrainedModel"
    adapted: "PeftModel | None"
    tokenizer: "PreTrainedTokenizerBase"
    module: PolicyModule
    policy: TransformersPolicy
    dtype: torch.dtype
    warnings: tuple[str, ...]
    """What the user must know of how this model is read."""


def load_actor(
    config: ModelConfig, *, temperature: float, microbatch_tokens: int, seed: int, longest: int = 0
) -> Actor:
    """The model to be trained, ready for log-probabilities; on the CPU where its weights are to be split over ranks.

    Args:
        config: Which model.
        temperature: Divides the logits.
        microbatch_tokens: Tokens of a pass without gradient.
        seed: Of random weights and fresh adapters.
        longest: Tokens of the longest sequence of the run, if known.
    """
    tokenizer = load_tokenizer(config)
    torch.manual_seed(seed)  # random weights and fresh adapters: everything later draws from streams of its own
    model, adapted = load_adapted(config)
    ready_to_train(model, loading_device(), gradient_checkpointing=config.gradient_checkpointing)
    _, warnings = settle_passes(model, longest)
    dtype = dtype_of(config)
    head = choose_head(model, num_token_ids(tokenizer, model))
    module = PolicyModule(model, head, temperature=temperature, dtype=dtype)
    policy = TransformersPolicy(module, microbatch_tokens=microbatch_tokens)
    return Actor(
        model=model,
        adapted=adapted,
        tokenizer=tokenizer,
        module=module,
        policy=policy,
        dtype=dtype,
        warnings=warnings,
    )


class AsLoaded:
    """`Policy`: the actor as it was loaded, its adapter switched off for the while."""

    def __init__(self, actor: Policy, adapted: "PeftModel") -> None:
        self.actor = actor
        self.adapted = adapted

    def logprobs(self, sequences: Sequences) -> tuple[Float[Tensor, "B T"], Float[Tensor, "B T"]]:
        """See `Policy`."""
        with as_loaded(self.adapted):
            return self.actor.logprobs(sequences)


def reference_of(actor: Actor, config: DistributedConfig, collectives: Collectives) -> Policy:
    """The actor as it is now, frozen: its adapter switched off where it has one, else a copy, placed as config says.

    To be taken before the actor's weights are split over ranks.
    """
    if actor.adapted is not None:
        return AsLoaded(actor.policy, actor.adapted)
    frozen = copy.deepcopy(actor.model).requires_grad_(False)
    shrink_linear_layers(frozen, actor.dtype, head=frozen.get_output_embeddings())
    module = PolicyModule(frozen, actor.module.head, temperature=actor.module.temperature, dtype=actor.dtype)
    place_frozen(module, config, collectives)
    return TransformersPolicy(module, microbatch_tokens=actor.policy.microbatch_tokens)
