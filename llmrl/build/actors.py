"""The policy that is trained, and the reference that it started from."""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from llmrl.distributed.device import pick_device
from llmrl.models.heads import choose_head
from llmrl.models.loading import (
    DTYPES,
    ModelConfig,
    as_loaded,
    load_adapted,
    load_tokenizer,
    num_token_ids,
    ready_to_train,
    shrink_linear_layers,
)
from llmrl.models.policy import PolicyModule, TransformersPolicy
from llmrl.models.saving import save_policy
from llmrl.roles import Policy

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
    policy: Policy
    dtype: torch.dtype

    @property
    def save(self) -> Callable[[Path], None]:
        """Writes the policy to a folder."""
        return partial(save_policy, model=self.model, adapted=self.adapted, tokenizer=self.tokenizer, dtype=self.dtype)


def load_actor(config: ModelConfig, *, temperature: float, microbatch_tokens: int, seed: int) -> Actor:
    """The model to be trained, on the device, ready for log-probabilities."""
    tokenizer = load_tokenizer(config)
    torch.manual_seed(seed)  # random weights and fresh adapters: everything later draws from streams of its own
    model, adapted = load_adapted(config)
    ready_to_train(model, pick_device(), gradient_checkpointing=config.gradient_checkpointing)
    dtype = DTYPES[config.dtype]
    head = choose_head(model, num_token_ids(tokenizer, model))
    module = PolicyModule(model, head, temperature=temperature, dtype=dtype)
    policy = TransformersPolicy(module, microbatch_tokens=microbatch_tokens)
    return Actor(model=model, adapted=adapted, tokenizer=tokenizer, module=module, policy=policy, dtype=dtype)


def reference_of(actor: Actor, *, microbatch_tokens: int) -> Policy:
    """The actor as it is now, frozen: its adapter switched off where it has one, else a copy."""
    if actor.adapted is not None:
        context = partial(as_loaded, actor.adapted)
        return TransformersPolicy(actor.module, microbatch_tokens=microbatch_tokens, context=context)
    frozen = copy.deepcopy(actor.model).requires_grad_(False)
    shrink_linear_layers(frozen, actor.dtype, head=frozen.get_output_embeddings())
    module = PolicyModule(frozen, actor.module.head, temperature=actor.module.temperature, dtype=actor.dtype)
    return TransformersPolicy(module, microbatch_tokens=microbatch_tokens)
