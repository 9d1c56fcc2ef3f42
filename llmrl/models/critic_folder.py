"""The critic as a folder: its value head, and beside it what of the trunk is the critic's own.

    value_head.safetensors   the weights of the head, in every folder
    model.safetensors        of a critic that is a network of its own: the trunk, which AutoModel of transformers reads
    adapter/                 of a critic on the actor's frozen base: its peft adapter
    config.json, tokenizer   what the trunk is, and which tokens it reads

All in float32. A head on the actor's own trunk stands alone: its trunk is the actor that was saved with it.
"""

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from llmrl.distributed.context import Context
from llmrl.files import replaced_folder
from llmrl.models.companions import Companions
from llmrl.models.config import CriticNetwork, ModelConfig
from llmrl.models.folders import (
    WEIGHT_FILES,
    ModelError,
    check_safetensors,
    json_object,
    neighbour,
    reading_files,
    resolved,
    same_model,
)
from llmrl.models.loaded import LoadedCritic
from llmrl.models.loading import load_pretrained, read_config, reading, refuse_weights
from llmrl.models.saving import Saver, check_finite, save_adapter
from llmrl.models.training import turn_dropout_off
from llmrl.roles import Trainable

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

VALUE_HEAD = "value_head.safetensors"
ADAPTER = "adapter"


class CriticSaver:
    """Writes the critic that is trained: full weights are gathered from all ranks, and the first rank writes.

    Construct it before training splits the weights over ranks. The constructor tries to write all other files.
    """

    def __init__(self, critic: LoadedCritic, tokenizer: "PreTrainedTokenizerBase", *, context: Context) -> None:
        self.critic = critic
        self.tokenizer = tokenizer
        self.is_first = context.collectives.is_first
        self.trunk_saver = None
        if critic.owns_trunk:
            self.trunk_saver = Saver(critic.trunk, None, tokenizer, dtype=torch.float32, context=context)
            return
        self.companions = Companions(critic.trunk, tokenizer)
        if self.is_first:
            self.companions.try_out(critic.trunk, critic.adapted, tokenizer)

    def save(self, folder: Path, trained: Trainable) -> None:
        """Writes the folder; what was there is lost. Collective: every rank must call it.

        Raises:
            FloatingPointError: A weight is not finite.
        """
        if self.trunk_saver is not None:
            self.trunk_saver.save(folder, trained)
        else:
            self._save_beside_trunk(folder, trained)
        for name, weight in trained.whole(self.critic.head):
            check_finite(f"head.{name}", weight)
            if self.is_first:
                save_file({name: weight.to("cpu", copy=True).contiguous()}, folder / VALUE_HEAD)

    def _save_beside_trunk(self, folder: Path, trained: Trainable) -> None:
        """Writes everything except the head of a critic whose trunk is the actor's, or stands on the actor's base."""
        trunk, adapted = self.critic.trunk, self.critic.adapted
        if adapted is not None:
            for name, weight in trained.whole(trunk):
                check_finite(name, weight)
        if not self.is_first:
            return
        with replaced_folder(folder) as new:
            trunk.config.save_pretrained(new)
            self.companions.write(new, trunk)
            self.companions.write_tokenizer(new, self.tokenizer)
            if adapted is not None:
                save_adapter(new / ADAPTER, adapted)


def load_trunk(config: ModelConfig) -> "PreTrainedModel":
    """The trunk of a critic that is a network of its own, in float32, its dropout off."""
    from transformers import AutoModel

    model, report = load_pretrained(config, AutoModel, read_config(config), dtype=torch.float32)
    refuse_weights(config, model, report)
    turn_dropout_off(model)
    return model


def load_adapter(path: str, trunk: "PreTrainedModel") -> "PeftModel":
    """peft's view of a trunk without adapters, on which the critic's adapter now stands, trainable."""
    from peft import PeftModel

    folder = Path(resolved(path)) / ADAPTER
    with reading(ModelConfig(path=path)):
        return PeftModel.from_pretrained(trunk, str(folder), is_trainable=True, torch_device=str(trunk.device))


def load_value_head(path: str) -> Tensor:
    """Weight (1, H) of the value head."""
    return load_file(Path(resolved(path)) / VALUE_HEAD)["weight"]


def check_critic_files(path: str, network: CriticNetwork) -> None:
    """Refuses, before weights load, a folder that holds no critic, or that of another `critic.network`.

    Raises:
        ModelError: With the reason.
    """
    folder = Path(path).expanduser()
    if not folder.is_dir():
        near = neighbour(path)
        raise ModelError(f"model.path ({path}) is no folder; {f'did you mean {near}?' if near else 'name one'}")
    with reading_files(path):
        if not (folder / VALUE_HEAD).is_file():
            inner = folder / "critic" if (folder / "critic" / VALUE_HEAD).is_file() else None
            hint = f"did you mean {inner}?" if inner else "name what PPO saves in final/critic, or `llmrl critic` makes"
            raise ModelError(f"model.path ({path}) holds no {VALUE_HEAD}, so it is no critic; {hint}")
        check_safetensors(folder / VALUE_HEAD, path)
        if not (folder / "config.json").is_file():
            raise ModelError(f"model.path ({path}) holds no config.json; copy the whole folder")
        json_object(folder / "config.json", path)
    if network != (saved := _network_of(folder)):
        raise ModelError(
            f"model.path ({path}) holds {_HELD[saved]}; set critic.network to {saved}, or name another critic"
        )


def check_width(path: str, width: int) -> None:
    """Refuses a value head that reads hidden states of another width than those of its trunk.

    Raises:
        ModelError: With both widths.
    """
    with safe_open(Path(resolved(path)) / VALUE_HEAD, framework="pt") as file:
        names = list(file.keys())
        shape = list(file.get_slice(names[0]).get_shape()) if names == ["weight"] else names
    if shape != [1, width]:
        raise ModelError(
            f"model.path ({path}): its {VALUE_HEAD} has {shape} where the trunk needs a weight of [1, {width}]; name a "
            "critic that was trained on a trunk of this width"
        )


def check_same_base(path: str, actor: str) -> None:
    """Refuses an adapter that was trained on another model than the actor's base.

    Raises:
        ModelError: With both names.
    """
    settings = json_object(Path(resolved(path)) / ADAPTER / "adapter_config.json", path)
    trained_on = settings.get("base_model_name_or_path") or "a model without a name"
    if not same_model(trained_on, actor):
        raise ModelError(
            f"model.path ({path}) is an adapter on {trained_on}, and the actor's base is {actor}; name the critic of a "
            "run with that base, or leave critic.path out"
        )


_HELD = {
    "own": "a critic with a trunk of its own",
    "adapter": "a critic that is an adapter on the actor's base",
    "shared": "a value head alone, which reads the trunk of the actor that was saved with it",
}


def _network_of(folder: Path) -> str:
    """The `critic.network` whose critic a folder holds."""
    if any((folder / name).is_file() for name in WEIGHT_FILES):
        return "own"
    return "adapter" if (folder / ADAPTER).is_dir() else "shared"
