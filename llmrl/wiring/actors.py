"""The policy that is trained, and the reference that it started from."""

import copy

import torch

from llmrl.distributed.config import DistributedConfig
from llmrl.distributed.context import Context
from llmrl.models.adapters import AdapterReference, load_adapted, reference_names
from llmrl.models.config import ModelConfig
from llmrl.models.heads import choose_head
from llmrl.models.loaded import Actor
from llmrl.models.loading import load_tokenizer
from llmrl.models.policy import PolicyModule, TransformersPolicy
from llmrl.models.training import ready_to_train, shrink_linear_layers
from llmrl.models.vocabulary import num_token_ids
from llmrl.optim.factory import place_frozen
from llmrl.optim.reference import AdapterCopy, WeightsReference
from llmrl.roles import MovingReference, Trainable
from llmrl.wiring.precision import dtype_of
from llmrl.wiring.trunks import settle_passes


def load_actor(
    config: ModelConfig,
    device: torch.device,
    *,
    temperature: float,
    seed: int,
    longest: int = 0,
    moving_reference: bool = False,
) -> Actor:
    """The model to be trained, ready for log-probabilities; on the CPU where its weights are to be split over ranks.

    Args:
        config: Settings of the model.
        device: Where it is loaded, see `Context.loading_device`.
        temperature: Divides the logits.
        seed: Seed of random weights and fresh adapters.
        longest: Tokens of the longest sequence of the run, if known.
        moving_reference: Whether its reference will follow it: then an adapted model has a second, frozen adapter.
    """
    tokenizer = load_tokenizer(config)
    torch.manual_seed(seed)  # random weights and fresh adapters: everything later draws from streams of its own
    model, adapted = load_adapted(config, moving_reference=moving_reference)
    ready_to_train(model, device, gradient_checkpointing=config.gradient_checkpointing)
    width, warnings = settle_passes(model, longest, packing=config.packing)
    dtype = dtype_of(config)
    head = choose_head(model, num_token_ids(tokenizer, model))
    module = PolicyModule(model, head, temperature=temperature, dtype=dtype)
    policy = TransformersPolicy(module)
    return Actor(
        model=model,
        adapted=adapted,
        tokenizer=tokenizer,
        module=module,
        policy=policy,
        dtype=dtype,
        width=width,
        warnings=warnings,
    )


def reference_of(
    actor: Actor, config: DistributedConfig, context: Context, *, averages: bool = False
) -> TransformersPolicy | AdapterReference:
    """The actor as it is now, frozen: its adapter switched off where it has one, else a copy, placed as config says.

    Call it before training splits the actor's weights over ranks. Where the reference `averages` weights of the actor,
    it keeps them all in float32: in bfloat16 small steps would be rounded away.
    """
    if actor.adapted is not None:
        return AdapterReference(actor.policy, actor.adapted)
    frozen = copy.deepcopy(actor.model).requires_grad_(False)
    if not averages:
        shrink_linear_layers(frozen, actor.dtype, head=frozen.get_output_embeddings())
    module = PolicyModule(frozen, actor.module.head, temperature=actor.module.temperature, dtype=actor.dtype)
    place_frozen(module, config, context)
    return TransformersPolicy(module)


def following(
    reference: TransformersPolicy | AdapterReference,
    actor: Actor,
    trained: Trainable,
    context: Context,
    *,
    every: int,
    mixing: float,
) -> MovingReference:
    """Mover of a reference that `reference_of` made, once the actor is `trained`."""
    if isinstance(reference, AdapterReference):
        return AdapterCopy(trained, reference_names(trained.module), every=every)
    return WeightsReference(
        reference.module,
        actor.module,
        trained,
        every=every,
        mixing=mixing,
        keeps_state=context.collectives.is_first,
    )
