"""Actor and critic together: two networks, two adapters on one base, or two heads on one trunk."""

import copy
from collections.abc import Sequence
from typing import TYPE_CHECKING

from llmrl.config import PPORun
from llmrl.distributed.context import Context
from llmrl.models.adapters import base_of, lora_config
from llmrl.models.critic import (
    SeparateNetworks,
    SharedModule,
    SharedTrunk,
    TransformersValueFunction,
    ValueHead,
    ValueModule,
)
from llmrl.models.folders import ModelError
from llmrl.models.loaded import Actor, Networks
from llmrl.models.reward_loading import load_reward_model
from llmrl.models.training import ready_to_train, turn_dropout_off
from llmrl.optim.factory import make_trainable
from llmrl.roles import Trainable
from llmrl.wiring.checks import naming, reward_model_config
from llmrl.wiring.trunks import settle_passes

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def train_networks(networks: Networks, config: PPORun, context: Context) -> dict[str, Trainable]:
    """Actor and critic with their optimizers, as the launch shards them; both roles then call the wrapped modules."""
    if networks.value is None:
        peaks = {"head.weight": config.critic_optimizer.learning_rate}
        steps = {"num_steps": config.num_optimizer_steps, "context": context, "peaks": peaks}
        return {"actor": make_trainable(networks.actor, config.optimizer, **steps)}
    actor = make_trainable(networks.actor, config.optimizer, num_steps=config.num_actor_steps, context=context)
    num_steps = config.num_optimizer_steps
    critic = make_trainable(networks.value, config.critic_optimizer, num_steps=num_steps, context=context)
    return {"actor": actor, "critic": critic}


def load_networks(config: PPORun, actor: Actor) -> Networks:
    """The critic that the config names, beside a loaded actor."""
    if config.critic.network == "shared":
        return _share_trunk(config, actor)
    trunk = _adapter_trunk(config, actor) if config.critic.network == "adapter" else _own_trunk(config, actor)
    ready_to_train(trunk, actor.model.device, gradient_checkpointing=config.model.gradient_checkpointing)
    module = ValueModule(trunk, _head_on(trunk, config), dtype=actor.dtype)
    value = TransformersValueFunction(module)
    return Networks(both=SeparateNetworks(actor.policy, value), actor=actor.policy, value=value, critic=trunk)


def _head_on(trunk: "PreTrainedModel", config: PPORun) -> ValueHead:
    """Value head as wide as the hidden states of the trunk."""
    width, _ = settle_passes(trunk, config.longest_sequence, packing=config.model.packing)
    return ValueHead(width).to(trunk.device)


def _share_trunk(config: PPORun, actor: Actor) -> Networks:
    module = SharedModule(actor.module, _head_on(actor.model, config))
    both = SharedTrunk(module)
    return Networks(both=both, actor=both, value=None, critic=actor.model)


def _own_trunk(config: PPORun, actor: Actor) -> "PreTrainedModel":
    """Trunk with weights of its own, equal to the actor's or the reward model's bit for bit."""
    if config.critic.network == "reward_model":
        with naming("reward.model"):
            model = load_reward_model(reward_model_config(config), head_init=None)
            return model.base_model  # type: ignore[return-value]
    if actor.adapted is not None:
        return copy.deepcopy(actor.adapted).merge_and_unload().base_model.requires_grad_(True)  # type: ignore[operator]
    return copy.deepcopy(actor.model.base_model).requires_grad_(True)  # type: ignore[return-value]


def _adapter_trunk(config: PPORun, actor: Actor) -> "PreTrainedModel":
    """Trunk on the actor's frozen base, with an adapter of its own."""
    from peft import get_peft_model

    assert actor.adapted is not None, "checked with the settings"
    assert config.model.lora is not None, "checked with the settings"
    trunk: PreTrainedModel = base_of(actor.adapted).base_model  # type: ignore[assignment]
    _check_targets(config.model.lora.targets, trunk)
    get_peft_model(trunk, lora_config(config.model.lora, trunk, task_type="FEATURE_EXTRACTION"))
    turn_dropout_off(trunk)
    return trunk


def _check_targets(targets: Sequence[str], trunk: "PreTrainedModel") -> None:
    """Refuses names of layers that the actor has and its trunk lacks: the LM head."""
    layers = [f".{name}" for name, _ in trunk.named_modules()]
    if targets and not any(layer.endswith(f".{target}") for layer in layers for target in targets):
        raise ModelError(
            f"model.lora.targets ({', '.join(targets)}) names no layer of the critic, which has no LM head; name one "
            "that it has, or set critic.network to own"
        )
