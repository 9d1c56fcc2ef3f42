"""Actor and critic together: two networks, two adapters on one base, or two heads on one trunk."""

import copy
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from llmrl.config import CriticRun, PPORun
from llmrl.distributed.context import Context
from llmrl.models.adapters import base_of, lora_config
from llmrl.models.config import CriticNetwork
from llmrl.models.critic import (
    DistilledModule,
    SharedModule,
    SharedTrunk,
    TransformersValueFunction,
    ValueHead,
    ValueModule,
)
from llmrl.models.critic_folder import check_width, load_adapter, load_trunk, load_value_head
from llmrl.models.folders import ModelError
from llmrl.models.loaded import Actor, LoadedCritic, Networks
from llmrl.models.mtp import MTPHeads, MTPModule, TargetHeads
from llmrl.models.networks import SeparateNetworks
from llmrl.models.policy import TransformersPolicy
from llmrl.models.reward_loading import load_reward_model
from llmrl.models.training import ready_to_train, turn_dropout_off
from llmrl.optim.factory import make_trainable
from llmrl.optim.local import learning_parameters
from llmrl.roles import Trainable
from llmrl.wiring.checks import critic_model_config, naming, reward_model_config
from llmrl.wiring.trunks import settle_passes

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel


def train_networks(networks: Networks, config: PPORun, context: Context) -> dict[str, Trainable]:
    """Actor and critic with their optimizers, as the launch shards them; both roles then call the wrapped modules."""
    if networks.value is None:
        rate, parameters = config.critic_optimizer.learning_rate, learning_parameters(networks.actor.module)
        peaks = {name: rate for name in parameters if name.startswith(("head.", "heads."))}
        steps = {"num_steps": config.num_optimizer_steps, "context": context, "peaks": peaks}
        return {"actor": make_trainable(networks.actor, config.optimizer, **steps)}
    peaks = {} if config.algorithm.auxiliary_every is None else {"head.weight": config.critic_optimizer.learning_rate}
    num_steps = config.num_actor_steps
    actor = make_trainable(networks.actor, config.optimizer, num_steps=num_steps, context=context, peaks=peaks)
    num_steps = config.num_optimizer_steps
    critic = make_trainable(networks.value, config.critic_optimizer, num_steps=num_steps, context=context)
    return {"actor": actor, "critic": critic}


def load_networks(config: PPORun, actor: Actor) -> Networks:
    """The critic that the config names, beside a loaded actor."""
    if config.critic.network == "mtp":
        return _load_heads(config, actor)
    critic = load_critic(config, actor, network=config.critic.network, path=config.critic.path)
    if config.critic.network == "shared":
        both = SharedTrunk(SharedModule(actor.module, critic.head))
        return Networks(both=both, actor=both, value=None, critic=critic)
    value = TransformersValueFunction(ValueModule(critic.trunk, critic.head, dtype=actor.dtype))
    policy = actor.policy
    if config.algorithm.auxiliary_every is not None:
        head = ValueHead(actor.width).to(actor.model.device)
        policy = TransformersPolicy(DistilledModule(actor.module, head))
    return Networks(both=SeparateNetworks(policy, value), actor=policy, value=value, critic=critic)


def _load_heads(config: PPORun, actor: Actor) -> Networks:
    """Fresh heads of multi-token prediction on the actor's trunk."""
    heads = MTPHeads(actor.width, config.critic.mtp.num_heads).to(actor.model.device)
    module = MTPModule(actor.module, heads)
    both = SharedTrunk(module)
    return Networks(both=both, actor=both, value=None, critic=None, targets=TargetHeads(module.heads, module.targets))


def load_critic(
    config: PPORun | CriticRun, actor: Actor, *, network: CriticNetwork, path: str | None = None
) -> LoadedCritic:
    """Trunk and value head, ready to train: those of a folder, or as they begin."""
    adapted = None
    if network == "shared":
        trunk = actor.model
    else:
        trunk, adapted = (
            _adapter_trunk(config, actor, path) if network == "adapter" else (_own_trunk(config, actor), None)
        )
        ready_to_train(trunk, actor.model.device, gradient_checkpointing=config.model.gradient_checkpointing)
    width, _ = settle_passes(trunk, config.longest_sequence, packing=config.model.packing)
    head = ValueHead(width)
    if path is not None:
        with naming("critic"), torch.no_grad():
            check_width(path, width)
            head.weight.copy_(load_value_head(path))
    return LoadedCritic(
        trunk=trunk,
        head=head.to(trunk.device),
        adapted=adapted,
        owns_trunk=network in ("own", "reward_model"),
    )


def _own_trunk(config: PPORun | CriticRun, actor: Actor) -> "PreTrainedModel":
    """Trunk with weights of its own: those of `critic.path`, or the reward model's or the actor's, bit for bit."""
    if isinstance(config, PPORun) and config.critic.path is not None:
        with naming("critic"):
            return load_trunk(critic_model_config(config))
    if isinstance(config, PPORun) and config.critic.network == "reward_model":
        with naming("reward.model"):
            model = load_reward_model(reward_model_config(config), head_init=None)
            return model.base_model  # type: ignore[return-value]
    if actor.adapted is not None:
        return copy.deepcopy(actor.adapted).merge_and_unload().base_model.requires_grad_(True)  # type: ignore[operator]
    return copy.deepcopy(actor.model.base_model).requires_grad_(True)  # type: ignore[return-value]


def _adapter_trunk(config: PPORun | CriticRun, actor: Actor, path: str | None) -> "tuple[PreTrainedModel, PeftModel]":
    """Trunk on the actor's frozen base, with an adapter of its own, new or of a folder; and peft's view of it."""
    from peft import get_peft_model

    assert actor.adapted is not None, "checked with the settings"
    assert config.model.lora is not None, "checked with the settings"
    trunk: PreTrainedModel = base_of(actor.adapted).base_model  # type: ignore[assignment]
    if path is None:
        _check_targets(config.model.lora.targets, trunk)
        adapted = get_peft_model(trunk, lora_config(config.model.lora, trunk, task_type="FEATURE_EXTRACTION"))
    else:
        with naming("critic"):
            adapted = load_adapter(path, trunk)
    adapted.peft_config["default"].base_model_name_or_path = actor.model.config.name_or_path
    turn_dropout_off(trunk)
    return trunk, adapted  # type: ignore[return-value]


def _check_targets(targets: Sequence[str], trunk: "PreTrainedModel") -> None:
    """Refuses names of layers that the actor has and its trunk lacks: the LM head."""
    layers = [f".{name}" for name, _ in trunk.named_modules()]
    if targets and not any(layer.endswith(f".{target}") for layer in layers for target in targets):
        raise ModelError(
            f"model.lora.targets ({', '.join(targets)}) names no layer of the critic, which has no LM head; name one "
            "that it has, or set critic.network to own"
        )
