"""Rollout engines over a loaded model, responses to texts, and episodes."""

import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from llmrl.batches import Prompts, Rollout, Row
from llmrl.data.chat import check_template_arguments
from llmrl.data.config import PromptDataConfig
from llmrl.data.prompts import encode_prompts, unopened
from llmrl.distributed.collectives import OneProcess
from llmrl.distributed.context import Context, Launch
from llmrl.functional.streams import Purpose
from llmrl.models.adapters import load_adapted
from llmrl.models.config import ModelConfig
from llmrl.models.experts import watched
from llmrl.models.folders import is_adapter
from llmrl.models.loading import load_model, load_tokenizer
from llmrl.models.vocabulary import check_ids, end_ids, num_token_ids
from llmrl.reports.progress import PlainProgress, Silent
from llmrl.rewards.functions import decode_responses
from llmrl.roles import Progress, RolloutEngine, Sampling
from llmrl.rollout.config import RolloutConfig
from llmrl.rollout.graphs import GraphDecoder, check_graphs
from llmrl.rollout.native import NativeEngine
from llmrl.rollout.support import RolloutError, check_length
from llmrl.rollout.transformers import TransformersEngine
from llmrl.rollout.weights import evaluating
from llmrl.wiring.environments import CheckedEnvironment, with_turns
from llmrl.wiring.precision import dtype_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def build_engine(
    config: RolloutConfig,
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    *,
    dtype: torch.dtype,
    progress: Progress,
    copy_device: torch.device | None = None,
) -> RolloutEngine:
    """The engine that the config names, over a loaded model. See `Context.copy_device`."""
    common: dict[str, Any] = {
        "eos_ids": end_ids(tokenizer, model),
        "vocab_size": num_token_ids(tokenizer, model),
        "dtype": dtype,
        "progress": progress,
        "copy_device": copy_device,
    }
    if config.engine == "transformers":
        generating = TransformersEngine(model, **common)
        generating.routers = recorded_routers(generating.weights.fresh())
        return generating
    native = NativeEngine(model, max_rows=config.max_rows, **common)
    native.routers = recorded_routers(native.weights.fresh())
    if config.graphs == "auto":
        native.graphs = _graph_decoder(native)
    return native


def _graph_decoder(engine: NativeEngine) -> GraphDecoder | None:
    """What decodes by CUDA graphs, on a GPU; None, with a line that says why, for a model that it cannot record."""
    model = engine.weights.fresh()
    if model.device.type != "cuda":
        return None
    try:
        check_graphs(model, engine.vocab_size, engine.routers)
    except RolloutError as error:
        engine.progress.message(f"Responses are decoded without CUDA graphs, which is slower: {error}.")
        return None
    return GraphDecoder(eos_ids=engine.eos_ids, vocab_size=engine.vocab_size, routers=engine.routers)


def recorded_routers(model: "PreTrainedModel") -> Sequence[nn.Module]:
    """Routers whose choices an engine records: those that training watches, see `watched`."""
    with evaluating(model.base_model):
        experts = watched(model.base_model)
    return () if experts is None else experts.routers


def check_room(readers: Mapping[str, "PreTrainedModel"], prompts: Prompts, config: RolloutConfig) -> None:
    """Refuses, before the first rollout, prompts that exceed a model's positions together with their responses.

    `readers` are all models that read prompts with their responses, by the names that an error gives them.
    """
    for whose, model in readers.items():
        check_length(model, int(prompts.mask.sum(dim=1).max()), config.max_response_tokens, whose=whose)


def load_for_sampling(config: ModelConfig, device: torch.device) -> "tuple[PreTrainedTokenizerBase, PreTrainedModel]":
    """Tokenizer and model in the precision that it computes in, on the device. An adapter is merged into its base in
    float32; into 4 bits it is not, as in a run."""
    tokenizer = load_tokenizer(config)
    dtype, is_plain = dtype_of(config), config.quantization is None
    if is_adapter(config.path):
        model, adapted = load_adapted(config)
        model = adapted.merge_and_unload() if is_plain else model  # type: ignore[union-attr,operator]
    else:  # in float32, so that the 4 bits are those of training
        model = load_model(config, dtype=dtype if is_plain else torch.float32)
    return tokenizer, model.to(device, dtype)  # type: ignore[arg-type,return-value]


def respond(
    config: ModelConfig,
    texts: Sequence[str],
    device: torch.device,
    *,
    system_prompt: str | None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    temperature: float,
    num_responses: int,
    max_response_tokens: int,
    seed: int,
) -> list[list[str]]:
    """Responses to texts, as text; greedy at temperature 0."""
    data = typed_prompts(system_prompt, chat_template_kwargs)
    if data.chat_template_kwargs:
        check_template_arguments(load_tokenizer(config), data)
    tokenizer, model = load_for_sampling(config, device)
    prompts, _ = encode_prompts([{"prompt": text} for text in texts], tokenizer, data)
    check_ids(data.path, prompts.ids.tolist(), model, tokenizer)
    sampling = sampling_at(temperature, num_responses=num_responses, max_response_tokens=max_response_tokens, seed=seed)
    engine = _engine_for(sampling, model, tokenizer, Silent())
    decoded = decode_responses(engine.generate(prompts, sampling).sequences, tokenizer)
    return [decoded[first : first + num_responses] for first in range(0, len(decoded), num_responses)]


def play(
    config: ModelConfig,
    rows: Sequence[Row],
    device: torch.device,
    *,
    environment: CheckedEnvironment,
    data: PromptDataConfig,
    sampling: Sampling,
) -> Rollout:
    """Episodes of a model in an environment, G that open with each row. Failures are printed on stderr."""
    tokenizer, model = load_for_sampling(config, device)
    alone = Launch(world_size=1, sharding="none")
    progress = PlainProgress(sys.stderr)
    context = Context(launch=alone, device=device, collectives=OneProcess(), progress=progress)
    progress.phase("episodes", len(rows) * sampling.num_responses)
    engine = with_turns(_engine_for(sampling, model, tokenizer, progress), environment, data, tokenizer, context)
    return engine.generate(unopened(rows), sampling)


def typed_prompts(system_prompt: str | None, chat_template_kwargs: Mapping[str, Any] | None) -> PromptDataConfig:
    """Settings by which prompts that are typed become tokens."""
    return PromptDataConfig(
        path="the command line",
        system_prompt=system_prompt,
        chat_template_kwargs=dict(chat_template_kwargs or {}),
        max_prompt_tokens=sys.maxsize,
    )


def sampling_at(temperature: float, *, num_responses: int, max_response_tokens: int, seed: int) -> Sampling:
    """Sampling of single responses, greedy at temperature 0."""
    return Sampling(
        temperature=temperature or 1.0,
        num_responses=num_responses,
        max_response_tokens=max_response_tokens,
        greedy=temperature == 0,
        seed=seed,
        purpose=Purpose.GENERATION,
        first_response=0,
    )


def _engine_for(
    sampling: Sampling, model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", progress: Progress
) -> RolloutEngine:
    config = RolloutConfig(max_rows=max(sampling.num_responses, RolloutConfig.max_rows))
    return build_engine(config, model, tokenizer, dtype=model.dtype, progress=progress)
