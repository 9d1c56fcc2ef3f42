"""Checks of a model before any weights load: from the names and shapes in its files, its settings, its tokenizer."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from llmrl.hub import is_local
from llmrl.models.adapters import check_layers, layers_to_save, lora_config, naming_adapter, refuse_tied
from llmrl.models.config import CriticNetwork, ModelConfig
from llmrl.models.critic_folder import check_critic_files, check_same_base, check_width
from llmrl.models.folders import (
    CODE_FILES,
    JSON_FILES,
    WEIGHT_FILES,
    ModelError,
    base_of_adapter,
    check_safetensors,
    check_vocabulary_file,
    find_folder,
    has_vocabulary_file,
    is_adapter,
    json_object,
    neighbour,
    reading_files,
    weight_files,
)
from llmrl.models.loading import load_pretrained, load_tokenizer, read_config, reading, refuse_weights
from llmrl.models.quantization import check_quantization, check_quantized_layers
from llmrl.models.reward_loading import label_settings
from llmrl.models.reward_model import score_layer
from llmrl.models.vocabulary import check_vocabulary

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PretrainedConfig, PreTrainedModel

ADAPTER_WEIGHTS = "adapter_model.safetensors"


def check_model(config: ModelConfig, *, may_be_random: bool = True) -> list[str]:
    """Checks a causal language model.

    Args:
        config: The model to check.
        may_be_random: Whether an error about missing weights suggests `from_scratch`.

    Returns:
        Warnings about what could not be checked: a hub name that is not in the local cache.

    Raises:
        ModelError: The folder is missing or incomplete, holds another kind of model, or brings code that was not
            allowed.
    """
    check_quantization(config)
    if not is_local(config.path):
        return _check_cached(config, _causal())
    with reading_files(config.path):
        folder = find_folder(config.path)
        if is_adapter(config.path):
            return _check_adapter(config, folder)
        model = _check_folder(config, folder, _causal(), may_be_random=may_be_random)
        if model is not None:
            if config.lora is not None:
                _try_lora(config, model)
            _check_tokenizer(config, folder, model)
    return []


def check_reward_model(config: ModelConfig, *, needs_head: bool) -> list[str]:
    """Checks a reward model as `check_model` does a causal language model.

    Args:
        config: The model to check.
        needs_head: Whether it must have a score head; a causal language model is enough to train one.
    """
    check_quantization(config)
    if not is_local(config.path):
        return _check_cached(config, _classifying())
    with reading_files(config.path):
        folder = find_folder(config.path)
        if is_adapter(config.path):
            raise ModelError(
                f"model.path ({config.path}) is a peft adapter, which no reward model is read from; name the folder of "
                "a whole model, such as the merged one that llmrl saves around its adapter"
            )
        model = _check_folder(config, folder, _classifying(), may_be_random=not needs_head, needs_head=needs_head)
        if model is not None:
            score_layer(model)
            if config.lora is not None:
                _try_lora(config, model)
            _check_tokenizer(config, folder, model)
    return []


def causal_class(config: ModelConfig) -> "tuple[type[PreTrainedModel], PretrainedConfig] | None":
    """Class and settings of a causal language model that `check_model` lets pass, of an adapter's base; None where they
    are in code of its folder."""
    if config.trust_remote_code:
        return None
    shape = read_config(base_of_adapter(config) if is_local(config.path) and is_adapter(config.path) else config)
    return _causal()._model_mapping[type(shape)], shape


def check_critic(config: ModelConfig, network: CriticNetwork, actor: ModelConfig) -> None:
    """Checks the folder of a critic, and that it goes with the actor.

    Args:
        config: The folder.
        network: `critic.network` of the run, which must be that of the run which saved the critic.
        actor: The model whose trunk or base the critic reads, unless it has a trunk of its own.

    Raises:
        ModelError: It holds no critic, another kind of critic, or one that does not fit.
    """
    check_critic_files(config.path, network)
    with reading_files(config.path):
        if network == "own":
            _check_folder(config, find_folder(config.path), _trunks(), may_be_random=False)
    if network == "adapter":
        check_same_base(config.path, actor.path)
    width = _width(config)
    if network == "shared" and is_local(actor.path) and not is_adapter(actor.path) and width != _width(actor):
        raise ModelError(
            f"model.path ({config.path}) is a value head on hidden states of {width} numbers, and those of the actor "
            f"({actor.path}) have {_width(actor)}; name the model that was saved with it"
        )
    check_width(config.path, width)


def _width(config: ModelConfig) -> int:
    """Size of the last hidden states, by the settings of a model."""
    text: Any = read_config(config).get_text_config()
    return getattr(text, "word_embed_proj_dim", text.hidden_size)


def _trunks() -> Any:
    from transformers import AutoModel

    return AutoModel


def _causal() -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM


def _classifying() -> Any:
    from transformers import AutoModelForSequenceClassification

    return AutoModelForSequenceClassification


def _check_cached(config: ModelConfig, kind: Any) -> list[str]:
    """Checks the settings of a hub model, if they are in the local cache."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    near = neighbour(config.path)
    hint = f"; did you mean the folder {near}?" if near else ""
    try:
        cached = [try_to_load_from_cache(config.path, name) for name in CODE_FILES]
    except HFValidationError as error:
        raise ModelError(f"model.path ({config.path}) is neither a folder nor a name of the hub{hint}") from error
    if not isinstance(cached[0], str):
        return [f"model.path ({config.path}) is a hub name that is not in the local cache{hint}"]
    files = [Path(file) for file in cached if isinstance(file, str)]
    with reading_files(config.path):
        if not _brings_code(files, config):
            _check_family(config, json_object(files[0], config.path), kind)
    return []


def _check_folder(
    config: ModelConfig, folder: Path, kind: Any, *, may_be_random: bool, needs_head: bool = False
) -> "PreTrainedModel | None":
    """The model of a folder on the meta device, its weights checked to fit; None where it needs the folder's code."""
    if not (folder / "config.json").is_file():
        raise ModelError(f"model.path ({config.path}) holds no config.json: is it a transformers model folder?")
    settings = {name: json_object(folder / name, config.path) for name in JSON_FILES if (folder / name).is_file()}
    brings_code = _brings_code([folder / name for name in CODE_FILES], config)
    if not config.from_scratch and not weight_files(folder, config.path):
        or_random = ", or set model.from_scratch=true to start from random ones" if may_be_random else ""
        raise ModelError(
            f"model.path ({config.path}) holds no weights ({' or '.join(WEIGHT_FILES)}); "
            f"save them as safetensors{or_random}"
        )
    if brings_code:
        return None
    shape = _check_family(config, settings["config.json"], kind)
    has_score = kind is _classifying() and label_settings(config, shape)
    if needs_head and not has_score:
        raise ModelError(
            f"model.path ({config.path}) has no score head; train one with `llmrl reward-model`, or name a folder of "
            "a sequence classification model with one label"
        )
    model, report = load_pretrained(config, kind, shape, dtype=torch.float32, on_meta=True)
    refuse_weights(config, model, report, has_score=has_score)
    whole = () if config.lora is None else layers_to_save(config.lora, model)
    check_quantized_layers(config, model, whole)
    return model


def _check_family(config: ModelConfig, settings: dict[str, Any], kind: Any) -> "PretrainedConfig":
    """Settings of the model. Refuses, by config.json alone, models without a causal pass over plain weights."""
    import transformers
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    family = settings.get("model_type")
    if not isinstance(family, str):
        raise ModelError(
            f"model.path ({config.path}) has a config.json without a model_type: is it a transformers model folder?"
        )
    if family not in CONFIG_MAPPING:
        raise ModelError(
            f"model.path ({config.path}) is of type {family}, which transformers {transformers.__version__} does not "
            "know; install a newer transformers, or choose another model"
        )
    quantized = settings.get("quantization_config") or settings.get("compression_config")
    if quantized:
        method = quantized.get("quant_method", "unknown") if isinstance(quantized, dict) else quantized
        raise ModelError(
            f"model.path ({config.path}) is quantized ({method}), and quantized weights cannot be trained; choose the "
            "model that it was made from, with model.lora and model.quantization=nf4 for 4 bits, or save a dequantized "
            "copy without quantization_config"
        )
    shape = read_config(config)
    text = shape.get_text_config()
    if getattr(shape, "is_encoder_decoder", False):
        raise ModelError(
            f"model.path ({config.path}) is an encoder-decoder ({family}); choose a decoder, which reads prompt and "
            "response as one sequence"
        )
    masks = type(shape) in transformers.MODEL_FOR_MASKED_LM_MAPPING and not getattr(shape, "is_decoder", False)
    if masks or getattr(text, "use_bidirectional_attention", False) is True:
        raise ModelError(
            f"model.path ({config.path}) reads in both directions ({family}), so no token could be predicted from "
            "those before it; choose a decoder"
        )
    if type(shape) not in kind._model_mapping:
        raise ModelError(
            f"model.path ({config.path}) is of type {family}, of which transformers has no "
            f"{kind.__name__.removeprefix('AutoModelFor')} model; choose a decoder of text"
        )
    return shape


def _brings_code(files: Sequence[Path], config: ModelConfig) -> bool:
    """Whether these settings name Python code of the folder; refused where that is not allowed."""
    brings_code = any("auto_map" in json_object(file, config.path) for file in files if file.is_file())
    if brings_code and not config.trust_remote_code:
        raise ModelError(
            f"model.path ({config.path}) brings its own Python code, which would run here; "
            "read it, then set model.trust_remote_code=true, or choose another model"
        )
    return brings_code


def _check_tokenizer(config: ModelConfig, folder: Path, model: "PreTrainedModel") -> None:
    """Refuses a tokenizer that cannot be read, has tokens without embeddings or never ends a response."""
    check_vocabulary_file(folder, config.path)
    tokenizer = load_tokenizer(config)
    if not tokenizer.get_vocab():
        raise ModelError(f"model.path ({config.path}) has a tokenizer without tokens; copy its files again")
    check_vocabulary(config, model, tokenizer)
    ends = [tokenizer.eos_token_id]
    for name in ("generation_config.json", "config.json"):
        if (folder / name).is_file():
            ends.append(json_object(folder / name, config.path).get("eos_token_id"))
    if all(end in (None, []) for end in ends):
        raise ModelError(
            f"model.path ({config.path}) names no end-of-sequence token, so no response could ever end; set eos_token "
            "in its tokenizer_config.json"
        )


def _try_lora(config: ModelConfig, model: "PreTrainedModel") -> None:
    """Injects adapters into a model on the meta device, to see whether it can be done."""
    from peft import get_peft_model

    assert config.lora is not None
    check_layers(config.lora, model)
    is_causal = model.get_output_embeddings() is not None
    task_type, whole = "CAUSAL_LM" if is_causal else "SEQ_CLS", layers_to_save(config.lora, model)
    with reading(config):
        get_peft_model(model, lora_config(config.lora, model, task_type=task_type, modules_to_save=whole))
    if is_causal:
        refuse_tied(model)


# --- adapters ---------------------------------------------------------------------------------------------------------


def _check_adapter(config: ModelConfig, folder: Path) -> list[str]:
    for name, unset in (("lora", None), ("from_scratch", False)):
        if getattr(config, name) != unset:
            raise ModelError(
                f"model.{name} is set, but model.path ({config.path}) already brings a peft adapter, which is then "
                f"continued; leave model.{name} out, or merge the adapter into its base first"
            )
    settings = json_object(folder / "adapter_config.json", config.path)
    if settings.get("peft_type") != "LORA" or settings.get("task_type", "CAUSAL_LM") not in ("CAUSAL_LM", None):
        raise ModelError(
            f"model.path ({config.path}) is an adapter of type {settings.get('peft_type')} for "
            f"{settings.get('task_type')}; only LORA for CAUSAL_LM is continued; merge it into its base first"
        )
    if settings.get("megatron_config"):
        raise ModelError(
            f"model.path ({config.path}) is an adapter with a megatron_config, by which peft would import a module "
            "that the adapter names; save it without, or merge it into its base first"
        )
    if not (folder / ADAPTER_WEIGHTS).is_file():
        raise ModelError(f"model.path ({config.path}) holds no {ADAPTER_WEIGHTS}; save the adapter as safetensors")
    check_safetensors(folder / ADAPTER_WEIGHTS, config.path)
    brings_code = _brings_code([folder / name for name in CODE_FILES], config)
    base = base_of_adapter(config)
    with naming_adapter(config):
        if not is_local(base.path):
            return _check_cached(base, _causal())
        base_folder = find_folder(base.path)
        if is_adapter(base.path):
            raise ModelError(f"model.path ({base.path}) is an adapter itself; merge it into its base first")
        model = _check_folder(base, base_folder, _causal(), may_be_random=False)
        own_tokenizer = has_vocabulary_file(config.path)
        if not own_tokenizer and model is not None:
            _check_tokenizer(base, base_folder, model)
    if model is not None and not brings_code:
        _try_adapter(config, folder, model)
        if own_tokenizer:
            _check_tokenizer(config, folder, model)
    return []


def _try_adapter(config: ModelConfig, folder: Path, model: "PreTrainedModel") -> None:
    """Refuses an adapter whose weights have other names or shapes than its settings give on this base."""
    from peft import PeftConfig, get_peft_model, get_peft_model_state_dict
    from safetensors import safe_open

    with reading(config):
        settings = PeftConfig.from_pretrained(str(folder))
        ends = tuple(settings.modules_to_save or ())  # type: ignore[attr-defined]
        whole = [layer for layer, _ in model.named_modules() if layer.endswith(ends)]  # as peft compares them
        check_quantized_layers(config, model, [name for name, _ in model.named_modules() if _is_in(name, whole)])
        adapted: PeftModel = get_peft_model(model, settings)  # type: ignore[assignment]
        wanted = {name: tuple(x.shape) for name, x in get_peft_model_state_dict(adapted).items()}
        with safe_open(folder / ADAPTER_WEIGHTS, framework="pt") as file:
            saved = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    refuse_tied(model)
    other = sorted(name for name in saved if wanted.get(name) != saved[name])
    other += sorted(wanted.keys() - saved.keys())
    if other:
        name = other[0]
        raise ModelError(
            f"model.path ({config.path}): {len(other)} weights of the adapter do not fit its base "
            f"{model.config.name_or_path}, such as {name}: {saved.get(name, 'none')} where the base has "
            f"{wanted.get(name, 'none')}; it was made for another model"
        )


def _is_in(name: str, layers: Sequence[str]) -> bool:
    return any(f"{name}.".startswith(f"{layer}.") for layer in layers)
