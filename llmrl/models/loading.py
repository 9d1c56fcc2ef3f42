"""Transformers models and tokenizers from a folder or a hub name: checked first, then loaded."""

import copy
import json
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn

from llmrl.paths import UserPath

if TYPE_CHECKING:
    from peft import LoraConfig, PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
HeadInit = Literal["zero", "normal"]
WEIGHT_FILES = ("model.safetensors", "model.safetensors.index.json")
CODE_FILES = ("config.json", "tokenizer_config.json")
"""What may name Python code that comes with a model."""
HUB_TIMEOUT_S = 5.0
"""For the hub to say whether it has a model that is not in the local cache."""


class ModelError(ValueError):
    """A model that cannot be used, and what to do about it."""


@dataclass(frozen=True, kw_only=True)
class LoraSettings:
    """Low-rank adapters in place of full fine-tuning. Hu et al. 2021, arXiv:2106.09685."""

    rank: int = 16
    """Rank of each update."""
    alpha: int = 32
    """The update is scaled by alpha / rank."""
    targets: tuple[str, ...] = ()
    """Names of the layers that get an adapter; none named: every linear layer but the LM head."""

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"model.lora.rank ({self.rank}) must be at least 1")
        if self.alpha <= 0:
            raise ValueError(f"model.lora.alpha ({self.alpha}) must be greater than 0")


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Which model is trained, and in which arithmetic."""

    path: UserPath
    """A folder in the form of transformers, or a name on the Hugging Face hub. A folder with a peft adapter continues
    that adapter."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Arithmetic of forward passes and sampling. Trained weights are always kept in float32."""
    lora: LoraSettings | None = None
    """Trains low-rank adapters and freezes the model; null trains every weight."""
    gradient_checkpointing: bool = False
    """Recomputes activations in the backward pass: less memory, about a third more time."""
    from_scratch: bool = False
    """Random weights in the shape of the folder's config.json, instead of the folder's weights."""
    trust_remote_code: bool = False
    """Allows a model folder to bring and run its own Python code."""
    made_by: str | None = None
    """The command that makes the folder, told to whoever misses it."""


def is_local_model(path: str) -> bool:
    """Whether a path means a folder.

    A hub name has no dot, slash or tilde in front and at most one slash, and what stands before that is no folder here.
    """
    owner, slash, _ = path.partition("/")
    in_a_folder_here = slash and Path(owner).is_dir()
    return bool(Path(path).exists() or path.startswith(("/", ".", "~")) or path.count("/") > 1 or in_a_folder_here)


def check_model(config: ModelConfig, *, may_be_random: bool = True) -> str | None:
    """Checks everything that can be known before any weights load.

    Args:
        config: Which model.
        may_be_random: Whether `from_scratch` would be a way out where there are no weights.

    Returns:
        None, or a sentence on what could not be checked: a hub name that is not in the local cache.

    Raises:
        ModelError: The folder is missing or incomplete, or it brings code that was not allowed.
    """
    if config.made_by is None and not is_local_model(config.path):
        return _check_cached(config)
    folder = Path(config.path).expanduser()
    if not folder.is_dir():
        hint = f"; make it with `{config.made_by}`" if config.made_by else "; give a folder or a hub name"
        raise ModelError(f"model.path ({config.path}) is no folder{hint}")
    if is_adapter(config.path):
        return _check_adapter(config)
    if not (folder / "config.json").is_file():
        raise ModelError(f"model.path ({config.path}) holds no config.json: is it a transformers model folder?")
    if not config.from_scratch and not any((folder / name).is_file() for name in WEIGHT_FILES):
        or_random = ", or set model.from_scratch=true to start from random ones" if may_be_random else ""
        raise ModelError(
            f"model.path ({config.path}) holds no weights ({' or '.join(WEIGHT_FILES)}); "
            f"save them as safetensors{or_random}"
        )
    _check_remote_code([folder / name for name in CODE_FILES], config)
    return None


def is_adapter(path: str) -> bool:
    """Whether a folder holds a peft adapter rather than a whole model."""
    return (Path(path).expanduser() / "adapter_config.json").is_file()


def _check_adapter(config: ModelConfig) -> str | None:
    for name, unset in (("lora", None), ("from_scratch", False)):
        if getattr(config, name) != unset:
            raise ModelError(
                f"model.{name} is set, but model.path ({config.path}) already brings a peft adapter, which is then "
                f"continued; leave model.{name} out, or merge the adapter into its base first"
            )
    if not (Path(config.path).expanduser() / "adapter_model.safetensors").is_file():
        raise ModelError(
            f"model.path ({config.path}) holds no adapter_model.safetensors; save the adapter as safetensors"
        )
    _check_remote_code([Path(config.path).expanduser() / name for name in CODE_FILES], config)
    base = _base_of_adapter(config)
    try:
        return check_model(base, may_be_random=False)
    except ModelError as error:
        raise ModelError(f"model.path ({config.path}) is an adapter whose base cannot be used: {error}") from error


def _base_of_adapter(config: ModelConfig) -> ModelConfig:
    adapter = json.loads((Path(config.path).expanduser() / "adapter_config.json").read_text())
    base = adapter.get("base_model_name_or_path")
    if not base:
        raise ModelError(f"model.path ({config.path}) is an adapter that does not name its base model")
    return ModelConfig(path=base, trust_remote_code=config.trust_remote_code)


def resolved(path: str) -> str:
    return str(Path(path).expanduser()) if is_local_model(path) else path


def _check_cached(config: ModelConfig) -> str | None:
    from huggingface_hub import try_to_load_from_cache

    cached = [try_to_load_from_cache(config.path, name) for name in CODE_FILES]
    if not isinstance(cached[0], str):
        return f"model.path ({config.path}) is a hub name that is not in the local cache"
    _check_remote_code([Path(file) for file in cached if isinstance(file, str)], config)
    return None


def _check_remote_code(files: Sequence[Path], config: ModelConfig) -> None:
    brings_code = any("auto_map" in json_object(file, config) for file in files if file.is_file())
    if brings_code and not config.trust_remote_code:
        raise ModelError(
            f"model.path ({config.path}) brings its own Python code, which would run here; "
            "read it, then set model.trust_remote_code=true, or choose another model"
        )


def json_object(file: Path, config: ModelConfig) -> dict[str, Any]:
    """What a file of the model folder says.

    Raises:
        ModelError: It is no JSON object.
    """
    try:
        settings = json.loads(file.read_text())
    except ValueError:
        settings = None
    if not isinstance(settings, dict):
        raise ModelError(f"model.path ({config.path}) has a {file.name} that is no JSON object; save the model again")
    return settings


def load_tokenizer(config: ModelConfig) -> "PreTrainedTokenizerBase":
    """The tokenizer of the model folder, with its chat template."""
    from transformers import AutoTokenizer

    with reading(config):
        return AutoTokenizer.from_pretrained(resolved(config.path), trust_remote_code=config.trust_remote_code)


def load_model(config: ModelConfig, *, dtype: torch.dtype = torch.float32) -> "PreTrainedModel":
    """The causal language model, its weights in `dtype`, its dropout off; adapters are for `load_adapted`."""
    with reading(config):
        model = _read_model(config, dtype)
    turn_dropout_off(model)
    return model


def _read_model(config: ModelConfig, dtype: torch.dtype) -> "PreTrainedModel":
    from transformers import AutoConfig, AutoModelForCausalLM

    path = resolved(config.path)
    if config.from_scratch:
        shape = AutoConfig.from_pretrained(path, trust_remote_code=config.trust_remote_code)
        return AutoModelForCausalLM.from_config(shape, dtype=dtype, trust_remote_code=config.trust_remote_code)
    model, report = AutoModelForCausalLM.from_pretrained(
        path,
        dtype=dtype,
        use_safetensors=True,
        trust_remote_code=config.trust_remote_code,
        output_loading_info=True,
    )  # type: ignore[misc]
    if missing := sorted(report["missing_keys"]):
        raise ModelError(
            f"model.path ({config.path}) lacks {len(missing)} weights of a {type(model).__name__}, such as "
            f"{missing[0]}, which would be random; choose a causal language model that is complete"
        )
    return model


@contextmanager
def reading(config: ModelConfig) -> Iterator[None]:
    """Around whatever reads the folder or asks the hub for it: that it is not there is an error of the input.

    Transformers asks a hub that does not answer again and again, for most of a minute; so it is asked once before.
    """
    local = is_local_model(config.path)
    what = "cannot be loaded" if local else "is neither a folder here nor a model on the hub that can be reached"
    try:
        if not local:
            _ask_hub(config.path)
        yield
    except OSError as error:
        reason = str(error).split("\n", maxsplit=1)[0]
        raise ModelError(f"model.path ({config.path}) {what}: {reason}") from error


def _ask_hub(name: str) -> None:
    """Raises OSError where a model is not in the local cache, and the hub does not have it or cannot be reached."""
    from huggingface_hub import HfApi, hf_hub_url, try_to_load_from_cache

    if isinstance(try_to_load_from_cache(name, "config.json"), str):
        return
    try:
        HfApi().get_hf_file_metadata(url=hf_hub_url(name, "config.json"), timeout=HUB_TIMEOUT_S)
    except Exception as error:  # errors of the network come in the classes of whichever client the hub's library uses
        raise OSError(str(error)) from error


def load_adapted(config: ModelConfig) -> "tuple[PreTrainedModel, PeftModel | None]":
    """The model to be trained, in float32, and peft's view of it if adapters are trained.

    The reference of an adapted model is the model as loaded. A new adapter changes nothing yet, so that is the adapter
    off; for an adapter that came with the folder it is a frozen snapshot of it, under the name ``reference``.
    """
    from peft import PeftModel, get_peft_model

    if is_adapter(config.path):
        model = load_model(_base_of_adapter(config))
        path, device = resolved(config.path), str(model.device)  # peft would read by way of any accelerator it finds
        adapted = PeftModel.from_pretrained(model, path, is_trainable=True, torch_device=device)
        adapted.load_adapter(path, adapter_name="reference", is_trainable=False, torch_device=device)
    elif config.lora is not None:
        model = load_model(config)
        adapted = get_peft_model(model, lora_config(config.lora, task_type="CAUSAL_LM"))
    else:
        return load_model(config), None
    _check_tied(model)
    turn_dropout_off(model)
    return model, adapted  # type: ignore[return-value]


def lora_config(settings: LoraSettings, *, task_type: str, modules_to_save: list[str] | None = None) -> "LoraConfig":
    """The settings in peft's words."""
    from peft import LoraConfig

    return LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,
        target_modules=list(settings.targets) or "all-linear",
        modules_to_save=modules_to_save,
        task_type=task_type,
    )  # type: ignore[arg-type]


def base_of(adapted: "PeftModel") -> "PreTrainedModel":
    """The modules of an adapted model anew and without its adapters, around the very same frozen weights.

    Another adapter injected there leaves this one alone, and the weights stand in memory once. So several roles on one
    base need not switch adapters, which each backward pass would have to find switched back.
    """
    view = copy.deepcopy(adapted, {id(x): x for x in (*adapted.parameters(), *adapted.buffers())})
    return view.unload()  # type: ignore[operator]


def _check_tied(model: "PreTrainedModel") -> None:
    """Refuses what cannot be saved: merged into one of two tied layers, an adapter would change the other."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils import ModulesToSaveWrapper

    layers = (model.get_input_embeddings(), model.get_output_embeddings())
    if model.config.tie_word_embeddings and any(isinstance(x, BaseTunerLayer | ModulesToSaveWrapper) for x in layers):
        raise ModelError(
            f"{type(model).__name__} has one matrix for its input and its output embedding, which an adapter on either "
            "would pull apart; leave both out of model.lora.targets"
        )


@contextmanager
def as_loaded(adapted: "PeftModel") -> Iterator[None]:
    """For the while, the adapted model is the one that was loaded: the reference.

    Switching back restores what may learn: peft takes `requires_grad` from adapters that are not active.
    """
    if "reference" not in adapted.peft_config:
        with adapted.disable_adapter():
            yield
        return
    adapted.set_adapter("reference")
    try:
        yield
    finally:
        adapted.set_adapter("default")


def initialize_head(head: nn.Linear, init: HeadInit) -> None:
    """A new head of one number: zeros, or normal with variance 1 / (hidden size + 1)."""
    with torch.no_grad():
        head.weight.zero_() if init == "zero" else head.weight.normal_(std=1 / math.sqrt(head.in_features + 1))


def ready_to_train(model: "PreTrainedModel", device: torch.device, *, gradient_checkpointing: bool) -> None:
    """On the device and in train mode, which gradient checkpointing needs."""
    model.to(device).train()  # type: ignore[arg-type]
    if gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})


def turn_dropout_off(model: nn.Module) -> None:
    """Sets every dropout probability to 0, so that train mode, which gradient checkpointing needs, is deterministic."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name, value in vars(module).items():
            if "drop" in name and isinstance(value, float):
                setattr(module, name, 0.0)


def shrink_linear_layers(model: "PreTrainedModel", dtype: torch.dtype, *, head: nn.Module | None) -> None:
    """Keeps the linear layers in the dtype to which autocast would cast them in every forward: the same numbers in less
    memory. All else stays in float32, as it does under autocast, and so does the head."""
    from transformers.pytorch_utils import Conv1D

    for module in model.modules():
        if isinstance(module, nn.Linear | Conv1D) and module is not head:
            module.to(dtype)


def num_token_ids(tokenizer: "PreTrainedTokenizerBase", model: "PreTrainedModel") -> int:
    """Ids that the tokenizer can decode and the model has logits for: what lies beyond is padding of the embedding."""
    return min(max(tokenizer.get_vocab().values()) + 1, model.get_output_embeddings().weight.shape[0])  # type: ignore[union-attr]


def end_ids(tokenizer: "PreTrainedTokenizerBase", model: "PreTrainedModel") -> tuple[int, ...]:
    """The ids that end a response: those of the tokenizer and of the model's generation config together."""
    ids = set(_as_ids(tokenizer.eos_token_id))
    if model.generation_config is not None:
        ids |= set(_as_ids(model.generation_config.eos_token_id))
    if not ids:
        raise ModelError(
            "neither the tokenizer nor the generation config names an end-of-sequence token; set one in the folder"
        )
    return tuple(sorted(ids))


def _as_ids(value: Any) -> Iterator[int]:
    """Of an id, a list of ids or nothing."""
    match value:
        case int():
            yield value
        case list():
            yield from value
