"""Transformers models and tokenizers from a folder or a hub name."""

import copy
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import MethodType
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn

from llmrl.models.folders import (
    ModelError,
    has_vocabulary_file,
    is_adapter,
    is_local_model,
    json_object,
    neighbour,
    resolved,
)
from llmrl.paths import UserPath

if TYPE_CHECKING:
    from peft import LoraConfig, PeftModel
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
HeadInit = Literal["zero", "normal"]
NOISES = ("jitter_noise", "input_jitter_noise", "moe_jitter_eps")
"""What mixtures of experts call the spread of the random factors that they put on hidden states in train mode."""
SAMPLING_ROUTER = "router_jitter_noise"
"""What marks the router of Phi-MoE, which draws its experts in train mode. Eval mode reads the number too: it stays."""
HUB_TIMEOUT_S = 5.0
"""For the hub to say whether it has a model that is not in the local cache."""
PLAIN_FORWARD = {"output_router_logits": False, "output_attentions": False, "output_hidden_states": False}
"""Outputs that nothing here reads. A config that asks for them keeps that in the folder that is saved."""
OLD_BUFFERS = (".masked_bias", ".attention.bias", ".attn.bias", ".attn.causal_mask", ".embed_positions.weights")
"""Ends of names of causal masks and sinusoids, which folders of GPT-2, GPT-Neo, CodeGen and XGLM once held beside the
weights."""
RESIZE = "give them embeddings with model.resize_token_embeddings(len(tokenizer)) and save the model, or leave them out"
MAX_REASON = 300
"""Characters of a library's own words in an error."""


@dataclass(frozen=True, kw_only=True)
class LoraSettings:
    """Low-rank adapters in place of full fine-tuning. Hu et al. 2021, arXiv:2106.09685."""

    rank: int = 16
    """Rank of each update."""
    alpha: int = 32
    """The update is scaled by alpha / rank."""
    targets: tuple[str, ...] | Literal["all-linear"] = ()
    """Names of the layers that get an adapter; none named, or all-linear: every linear layer but the LM head."""

    def __post_init__(self) -> None:
        if "all-linear" in self.targets:
            object.__setattr__(self, "targets", ())
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
    dtype: Literal["float32", "bfloat16"] | None = None
    """Arithmetic of forward passes and sampling; null: bfloat16 on a GPU, float32 on a CPU. Trained weights are always
    kept in float32."""
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


def base_of_adapter(config: ModelConfig) -> ModelConfig:
    """The model that an adapter stands on: where its folder says, read from here, else from the adapter's folder.

    Raises:
        ModelError: The folder does not say.
    """
    folder = Path(config.path).expanduser()
    base = json_object(folder / "adapter_config.json", config.path).get("base_model_name_or_path")
    if not base or not isinstance(base, str):
        raise ModelError(f"model.path ({config.path}) is an adapter that does not name its base model")
    if not Path(base).expanduser().exists() and (folder / base).is_dir():
        base = str(folder / base)
    return ModelConfig(path=base, trust_remote_code=config.trust_remote_code)


@contextmanager
def naming_adapter(config: ModelConfig) -> Iterator[None]:
    """Around what checks or loads the base of an adapter."""
    try:
        yield
    except ModelError as error:
        raise ModelError(
            f"model.path ({config.path}) is an adapter whose base cannot be used: {error}; the base is "
            "base_model_name_or_path in adapter_config.json"
        ) from error


def load_tokenizer(config: ModelConfig) -> "PreTrainedTokenizerBase":
    """The tokenizer of the model folder, with its chat template; of the base where an adapter brings none."""
    from transformers import AutoTokenizer

    if is_adapter(config.path) and not has_vocabulary_file(config.path):
        return load_tokenizer(base_of_adapter(config))
    with reading(config):
        tokenizer = AutoTokenizer.from_pretrained(resolved(config.path), trust_remote_code=config.trust_remote_code)
        tokenizer("a")  # some settings that it cannot work with show only here
    return tokenizer


def load_model(config: ModelConfig, *, dtype: torch.dtype = torch.float32) -> "PreTrainedModel":
    """The causal language model, its weights in `dtype`, its dropout off; adapters are for `load_adapted`."""
    from transformers import AutoModelForCausalLM

    model, report = read_model(config, AutoModelForCausalLM, read_config(config), dtype=dtype)
    refuse_weights(config, model, report)
    turn_dropout_off(model)
    return model


def read_config(config: ModelConfig) -> "PretrainedConfig":
    """The settings of the model, less the outputs that it would give beyond what is read here."""
    from transformers import AutoConfig

    with reading(config):
        settings = AutoConfig.from_pretrained(resolved(config.path), trust_remote_code=config.trust_remote_code)
    for part in (settings, settings.get_text_config()):
        for name, value in PLAIN_FORWARD.items():
            if getattr(part, name, value) != value:
                setattr(part, name, value)
    return settings


def read_model(
    config: ModelConfig, kind: Any, settings: "PretrainedConfig", *, dtype: torch.dtype, on_meta: bool = False
) -> "tuple[PreTrainedModel, Mapping[str, Any]]":
    """``(model, report)``: what transformers reports of weights that are missing, unexpected or of another shape.

    Args:
        config: Which model.
        kind: The class of transformers that picks the model's own, such as `AutoModelForCausalLM`.
        settings: By which the model is built.
        dtype: Of the weights.
        on_meta: Takes shapes alone: no weight is read.
    """
    device, trust = torch.device("meta" if on_meta else "cpu"), config.trust_remote_code
    with reading(config), _no_table():
        if config.from_scratch:
            with device:
                return kind.from_config(settings, dtype=dtype, trust_remote_code=trust), {}
        return kind.from_pretrained(
            resolved(config.path),
            config=settings,
            dtype=dtype,
            use_safetensors=True,
            trust_remote_code=trust,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are in the report
            **({"device_map": device} if on_meta else {}),
        )


def refuse_weights(
    config: ModelConfig, model: "PreTrainedModel", report: Mapping[str, Any], *, has_score: bool = False
) -> None:
    """Refuses weights that do not fit, by what transformers reports of them.

    Args:
        config: Which model.
        model: As it was built.
        report: Empty for random weights.
        has_score: Whether the score head of a sequence classification model must be among them. Weights that the
            model does not know are refused too, save heads of other kinds.
    """
    if not report:
        return
    scores = hasattr(model, "score")
    new = {"score.weight"} if scores and not has_score else set()
    body = [name for name, _ in model.base_model.named_children()]  # how a body that was saved alone names its weights
    ours = tuple(f"{name}." for name in (model.base_model_prefix, *body, *(["score"] if scores else [])))
    unexpected = {name for name in report["unexpected_keys"] if not name.endswith(OLD_BUFFERS)}
    foreign = {name for name in unexpected if name.startswith(ours)}
    kind = type(model).__name__
    for names, problem in (
        ({name for name, *_ in report["mismatched_keys"]}, "are of another shape than its config.json says"),
        (set(report["missing_keys"]) - new, f"are missing for a {kind} and would be random"),
        (foreign, f"are not those of a {kind}"),
    ):
        if names:
            raise ModelError(
                f"model.path ({config.path}): {len(names)} weights, such as {min(names)}, {problem}; choose a model "
                "that is complete"
            )


@contextmanager
def _no_table() -> Iterator[None]:
    """Keeps off the screen the table that transformers prints of weights that do not fit; `refuse_weights` reads it."""
    from transformers.utils import logging

    before, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(before)
        if bar:
            logging.enable_progress_bar()


@contextmanager
def reading(config: ModelConfig) -> Iterator[None]:
    """Around one call of a library that reads the folder or asks the hub for it: whatever it raises is about the input.

    Transformers asks a hub that does not answer again and again, for most of a minute; so it is asked once before.
    """
    local = is_local_model(config.path)
    what = "cannot be loaded" if local else "is neither a folder here nor a model on the hub that can be reached"
    try:
        if not local:
            _ask_hub(config.path)
        yield
    except ModelError:
        raise
    except Exception as error:  # each library and file format has classes of its own
        near = None if local else neighbour(config.path)
        hint = f"; did you mean the folder {near}?" if near else ""
        raise ModelError(f"model.path ({config.path}) {what}: {reason_of(error)}{hint}") from error


def reason_of(error: Exception) -> str:
    """A library's error in one line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [""]
    first = lines[0] if len(lines[0]) <= MAX_REASON else f"{lines[0][:MAX_REASON]} ..."
    return first if isinstance(error, OSError) else f"{type(error).__name__}: {first}"


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
        base = base_of_adapter(config)
        with naming_adapter(config):
            model = load_model(base)
        path, device = resolved(config.path), str(model.device)  # peft would read by way of any accelerator it finds
        with reading(config):
            adapted = PeftModel.from_pretrained(model, path, is_trainable=True, torch_device=device)
            adapted.load_adapter(path, adapter_name="reference", is_trainable=False, torch_device=device)
        adapted.peft_config["default"].base_model_name_or_path = resolved(base.path)
    elif config.lora is not None:
        model = load_model(config)
        check_targets(config.lora, model)
        with reading(config):
            adapted = get_peft_model(model, lora_config(config.lora, task_type="CAUSAL_LM"))
    else:
        return load_model(config), None
    refuse_tied(model)
    turn_dropout_off(model)
    return model, adapted  # type: ignore[return-value]


def check_targets(lora: LoraSettings, model: "PreTrainedModel") -> None:
    """Refuses names of layers that a model lacks, or that an adapter cannot stand on."""
    from transformers.pytorch_utils import Conv1D

    layers = {name for name, layer in model.named_modules() if isinstance(layer, nn.Linear | nn.Embedding | Conv1D)}
    unknown = [x for x in lora.targets if not any(f".{name}".endswith(f".{x}") for name in layers)]
    if unknown:
        there = sorted({name.rpartition(".")[2] for name in layers})
        raise ModelError(
            f"model.lora.targets ({', '.join(unknown)}) names no layer of a {type(model).__name__} that can have an "
            f"adapter; there are {', '.join(there)}; name some of them, or leave it out for every linear layer"
        )


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


def refuse_tied(model: "PreTrainedModel") -> None:
    """Refuses what cannot be saved: merged into one of two tied layers, an adapter would change the other.

    Raises:
        ModelError: An adapter, or a whole copy that is trained beside it, is on one of them.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils import ModulesToSaveWrapper

    layers = (model.get_input_embeddings(), model.get_output_embeddings())
    if model.config.tie_word_embeddings and any(isinstance(x, BaseTunerLayer | ModulesToSaveWrapper) for x in layers):
        raise ModelError(
            f"{type(model).__name__} has one matrix for its input and its output embedding, which an adapter on either "
            "would pull apart; leave both out of model.lora.targets, or out of target_modules and modules_to_save of "
            "an adapter that is continued"
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
    """Sets every dropout probability and every noise to 0, so that train mode, which gradient checkpointing needs, is
    deterministic."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name, value in vars(module).items():
            if isinstance(value, float) and ("drop" in name or name in NOISES):
                setattr(module, name, 0.0)
        if hasattr(module, SAMPLING_ROUTER):
            module.train = MethodType(_stay_in_eval_mode, module)
            module.eval()


def _stay_in_eval_mode(module: nn.Module, mode: bool = True) -> nn.Module:
    """In the place of `train` of a router that draws experts at random in train mode."""
    return nn.Module.train(module, False)


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


def check_vocabulary(config: ModelConfig, model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase") -> None:
    """Refuses a tokenizer with tokens that have no embedding, but for special ones: those of Gemma 3 1B name an image.

    Raises:
        ModelError: An ordinary text could have such a token, or it is the EOS, which ends every response.
    """
    num_rows, added, eos = _num_embeddings(model), tokenizer.added_tokens_decoder, tokenizer.eos_token_id
    beyond = {
        id: token
        for token, id in tokenizer.get_vocab().items()
        if id >= num_rows and (id == eos or not (id in added and added[id].special))
    }
    if beyond:
        raise ModelError(
            f"model.path ({config.path}): its tokenizer has {len(beyond)} tokens, such as {beyond[min(beyond)]!r} "
            f"(id {min(beyond)}), beyond the {num_rows} embeddings of the model; {RESIZE}"
        )


def check_ids(
    path: str, texts: Iterable[Sequence[int]], model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase"
) -> None:
    """Refuses data with a token that has no embedding.

    Raises:
        ModelError: `path` has one; the tokenizer has more tokens than the model.
    """
    num_rows = _num_embeddings(model)
    if max(tokenizer.get_vocab().values()) < num_rows:
        return
    beyond = sorted({id for ids in texts for id in ids if id >= num_rows})
    if beyond:
        names = ", ".join(f"{tokenizer.convert_ids_to_tokens(id)!r} (id {id})" for id in beyond[:5])
        raise ModelError(f"{path} has tokens beyond the {num_rows} embeddings of the model: {names}; {RESIZE}")


def _num_embeddings(model: "PreTrainedModel") -> int:
    embedding = model.get_input_embeddings()
    embedding = getattr(embedding, "base_layer", embedding)  # below an adapter
    assert isinstance(embedding, nn.Embedding)
    return embedding.num_embeddings  # its weight may be split over ranks


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
