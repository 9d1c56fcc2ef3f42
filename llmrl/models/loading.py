"""Transformers models and tokenizers from a folder or a hub name."""

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from llmrl.hub import ask_for_model, is_local
from llmrl.models.config import ModelConfig
from llmrl.models.folders import (
    WEIGHT_FILES,
    ModelError,
    base_of_adapter,
    has_vocabulary_file,
    indexed_files,
    is_adapter,
    neighbour,
    resolved,
)
from llmrl.models.quantization import unquantized_layers
from llmrl.models.training import turn_dropout_off

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
PLAIN_FORWARD = {"output_router_logits": False, "output_attentions": False, "output_hidden_states": False}
"""Outputs that nothing here reads, so they are off. The saved folder keeps the original setting."""
OLD_BUFFERS = (".masked_bias", ".attention.bias", ".attn.bias", ".attn.causal_mask", ".embed_positions.weights")
"""Suffixes of causal masks and sinusoids, which old folders of GPT-2, GPT-Neo, CodeGen and XGLM hold beside the
weights."""
MAX_REASON = 300
"""Characters of a library's message that an error quotes."""


def load_tokenizer(config: ModelConfig) -> "PreTrainedTokenizerBase":
    """The tokenizer of the model folder, with its chat template; of the base where an adapter brings none."""
    from transformers import AutoTokenizer

    if is_adapter(config.path) and not has_vocabulary_file(config.path):
        return load_tokenizer(base_of_adapter(config))
    with reading(config):
        tokenizer = AutoTokenizer.from_pretrained(resolved(config.path), trust_remote_code=config.trust_remote_code)
        tokenizer("a")  # some invalid settings show only here
    return tokenizer


def load_model(config: ModelConfig, *, dtype: torch.dtype = torch.float32) -> "PreTrainedModel":
    """The causal language model, its weights in `dtype`, its dropout off; adapters are for `load_adapted`."""
    from transformers import AutoModelForCausalLM

    model, report = load_pretrained(config, AutoModelForCausalLM, read_config(config), dtype=dtype)
    refuse_weights(config, model, report)
    turn_dropout_off(model)
    return model


def read_config(config: ModelConfig) -> "PretrainedConfig":
    """transformers' settings of the model, with `PLAIN_FORWARD` outputs off."""
    from transformers import AutoConfig

    with reading(config):
        settings = AutoConfig.from_pretrained(resolved(config.path), trust_remote_code=config.trust_remote_code)
    for part in (settings, settings.get_text_config()):
        for name, value in PLAIN_FORWARD.items():
            if getattr(part, name, value) != value:
                setattr(part, name, value)
    return settings


def load_pretrained(
    config: ModelConfig, kind: Any, settings: "PretrainedConfig", *, dtype: torch.dtype, on_meta: bool = False
) -> "tuple[PreTrainedModel, Mapping[str, Any]]":
    """``(model, report)``: what transformers reports of weights that are missing, unexpected or of another shape.

    Args:
        config: The model to read.
        kind: Auto class of transformers, such as `AutoModelForCausalLM`.
        settings: Settings that the model is built from.
        dtype: Dtype of the weights.
        on_meta: Shapes only: no weight is read.
    """
    device, trust = torch.device("meta" if on_meta else "cpu"), config.trust_remote_code
    placement: dict[str, Any] = {"device_map": device} if on_meta else {}
    quantizes = config.quantization is not None and not on_meta
    if not config.from_scratch:
        _check_index(config)
    with reading(config), _no_table():
        if config.from_scratch:
            with device:
                return kind.from_config(settings, dtype=dtype, trust_remote_code=trust), {}
        if quantizes:
            from llmrl.models import nf4

            with torch.device("meta"):
                shape = kind.from_config(copy.deepcopy(settings), trust_remote_code=trust)
            placement = nf4.loading_arguments(unquantized_layers(shape))
        model, report = kind.from_pretrained(
            resolved(config.path),
            config=settings,
            dtype=dtype,
            use_safetensors=True,
            trust_remote_code=trust,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are in the report
            **placement,
        )
        if quantizes:
            from llmrl.models import nf4

            nf4.settle(model)
    return model, report


def _check_index(config: ModelConfig) -> None:
    """Refuses an index of the weights that names other than safetensors files beside it; see `indexed_files`."""
    with reading(config):
        whole, index = _weight_files(config.path)
        if whole is None and index is not None:
            indexed_files(Path(index), config.path)


def _weight_files(path: str) -> list[str | None]:
    """Where the `WEIGHT_FILES` of a folder, or of a hub name, lie; None for each that it has not. The hub is asked only
    where the local cache has neither."""
    from huggingface_hub import try_to_load_from_cache
    from transformers.utils import cached_file

    if is_local(path):
        files = [Path(resolved(path), name) for name in WEIGHT_FILES]
        return [str(file) if file.is_file() else None for file in files]
    cached = [try_to_load_from_cache(path, name) for name in WEIGHT_FILES]
    if any(isinstance(file, str) for file in cached):
        return [file if isinstance(file, str) else None for file in cached]
    return [cached_file(path, name, _raise_exceptions_for_missing_entries=False) for name in WEIGHT_FILES]


def refuse_weights(
    config: ModelConfig, model: "PreTrainedModel", report: Mapping[str, Any], *, has_score: bool = False
) -> None:
    """Refuses weights that do not fit, by what transformers reports of them.

    Args:
        config: The model that was read.
        model: The built model.
        report: From `load_pretrained`; empty for random weights.
        has_score: Whether the score head of a sequence classification model must be among them. Weights that the
            model does not know are refused too, except heads of other kinds.

    Raises:
        ModelError: A weight has another shape, is missing or is not one of this model.
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
    """Context without the table that transformers prints of weights that do not fit; `refuse_weights` reports them."""
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
    """Context of one library call that reads a model folder or the hub: any exception is raised as a `ModelError`.

    Transformers retries a hub that does not respond for most of a minute; so the hub is asked once before.
    """
    local = is_local(config.path)
    what = "cannot be loaded" if local else "is neither a folder here nor a model on the hub that can be reached"
    try:
        if not local:
            ask_for_model(config.path)
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
