"""Rewards of a run: functions, and frozen reward models."""

import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from llmrl.batches import Rollout, Row, Sequences
from llmrl.data.chat import as_sequences, uses_chat
from llmrl.data.config import ExamplesConfig, PromptsConfig
from llmrl.data.preferences import split_open_transcript
from llmrl.data.rerender import Rerenderer, ended_by, same_tokens
from llmrl.data.rows import check_rows, column_names, places_of
from llmrl.data.supervised import EncodedExample, encode_examples
from llmrl.distributed.collectives import OneProcess
from llmrl.distributed.context import Context, Launch
from llmrl.distributed.roles import DistributedReward, DistributedScorer
from llmrl.environments.reward import EpisodeReward
from llmrl.models.adapters import base_of
from llmrl.models.config import ModelConfig
from llmrl.models.loaded import RewardScorer
from llmrl.models.loading import load_tokenizer
from llmrl.models.reward_loading import load_reward_model, load_reward_on_base
from llmrl.models.reward_model import RewardModule, TransformersRewardModel, score_layer
from llmrl.models.reward_record import Normalization, saved_normalization, saved_text_form
from llmrl.models.training import shrink_linear_layers
from llmrl.models.vocabulary import check_ids, check_vocabulary
from llmrl.reports.progress import OfRank, Silent
from llmrl.rewards.combine import CombinedReward
from llmrl.rewards.config import LearnedRewardConfig, RewardConfig
from llmrl.rewards.functions import FunctionReward
from llmrl.rewards.learned import LearnedReward, check_finite
from llmrl.rewards.loading import Function, takes_rollout
from llmrl.rewards.named import NamedReward
from llmrl.roles import RewardFunction
from llmrl.rollout.rope import pin_rope
from llmrl.rollout.support import position_limit
from llmrl.wiring.checks import naming
from llmrl.wiring.precision import dtype_of
from llmrl.wiring.trunks import budget_of, settle_passes

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedTokenizerBase


def reward_on(
    data: PromptsConfig,
    rows: Sequence[Row],
    config: RewardConfig,
    functions: Sequence[Function],
    scorer: RewardScorer | None,
    tokenizer: "PreTrainedTokenizerBase",
    context: Context,
    *,
    of_episodes: EpisodeReward | None = None,
) -> RewardFunction:
    """The reward of responses to these prompts, its work split over ranks.

    Args:
        data: How the rows are read.
        rows: Prompts with their columns.
        config: Names and weights.
        functions: The functions that the config names.
        scorer: The reward model that it names, which serves any data.
        tokenizer: The policy's.
        context: Context of the run.
        of_episodes: Reward of the environment; None: a response is one turn.
    """
    rewards: list[RewardFunction] = [] if of_episodes is None else [of_episodes]
    is_first = context.collectives.is_first
    if len(functions) == 1 and takes_rollout(functions[0]):
        (setting,), (label,) = config.functions, config.function_labels
        named = NamedReward(functions[0], label=label, weight=setting.weight)
        rewards.append(DistributedReward(named, context.collectives))
    elif functions:
        reward = FunctionReward(
            config,
            functions=functions,
            tokenizer=tokenizer,
            prompt_column=data.prompt_column,
            columns=column_names(rows),
            progress=context.progress if is_first else OfRank(context.progress, context.collectives.rank),
        )
        rewards.append(DistributedReward(reward, context.collectives))
    if scorer is not None:
        assert config.model is not None, "it was loaded from there"
        rewards.append(
            LearnedReward(
                _in_microbatches(scorer, config.model.microbatch_tokens, context),
                encode=_encoder(scorer, tokenizer, data, rows),
                normalize=scorer.normalize,
                weight=config.model.weight,
            )
        )
    return rewards[0] if len(rewards) == 1 else CombinedReward(rewards)


def _encoder(
    scorer: RewardScorer, tokenizer: "PreTrainedTokenizerBase", data: PromptsConfig, rows: Sequence[Row]
) -> Callable[[Rollout], Sequences]:
    """Encoder of a rollout in the reward model's tokens: the policy's own ids where both have the same."""
    eos_id: Any = scorer.tokenizer.eos_token_id
    if same_tokens(tokenizer, scorer.tokenizer):
        return partial(ended_by, eos_id=eos_id)
    rerenderer = Rerenderer(data, policy_tokenizer=tokenizer, tokenizer=scorer.tokenizer)
    rerenderer.check(rows)
    return rerenderer


def load_scorer(
    config: ModelConfig,
    adapted: "PeftModel | None" = None,
    *,
    normalize: bool,
    longest: int = 0,
    place: Callable[[nn.Module], object],
) -> RewardScorer:
    """The reward model that a recipe or a command names, in eval mode and without gradient.

    Args:
        config: Settings by which it is loaded.
        adapted: The actor, on whose base it stands; None: it is loaded whole.
        normalize: Whether scores are standardized by the mean and standard deviation stored with the model, if present.
        longest: Tokens of the longest sequence, if known.
        place: Puts a module where it computes; not one on the actor's base, which is there.
    """
    with naming("reward.model"):
        tokenizer = load_tokenizer(config)
        if adapted is not None:
            model = load_reward_on_base(config, base_of(adapted))
        else:
            model = load_reward_model(config, head_init=None)
        settle_passes(model, longest, packing=config.packing)
        if adapted is None:
            shrink_linear_layers(model, dtype_of(config), head=score_layer(model))
        check_vocabulary(config, model, tokenizer)
    model.eval().requires_grad_(False)
    normalization = saved_normalization(model.config) if normalize else None
    module = RewardModule(model, dtype=dtype_of(config))
    if adapted is None:
        place(module)
    return RewardScorer(
        scorer=TransformersRewardModel(module),
        tokenizer=tokenizer,
        normalize=normalization or Normalization(mean=0.0, std=1.0),
        text_form=saved_text_form(model.config),
        position_limit=position_limit(model),
    )


def _in_microbatches(scorer: RewardScorer, max_tokens: int, context: Context) -> DistributedScorer:
    module: Any = scorer.scorer.module
    budget = budget_of([module.model], max_tokens, module.dtype, context.device, section="reward.model")
    return DistributedScorer(scorer.scorer, context, budget=budget)


def score_rows(
    config: ModelConfig, rows: Sequence[Row], data: ExamplesConfig, device: torch.device, *, normalize: bool
) -> list[float]:
    """Score of each row's response by a reward model, which reads prompts as it did in training.

    Only path and columns of `data` are used: template, its arguments and system prompt are those stored with the model.
    """
    scorer = load_scorer(config, normalize=normalize, place=lambda module: module.to(device))
    data = replace(data, **vars(scorer.text_form))
    as_messages = uses_chat(scorer.tokenizer, data)
    examples = encode_examples([_as_in_training(row, data, as_messages) for row in rows], scorer.tokenizer, data)
    ids = [ids for example in examples for ids in example]
    check_ids(data.path, ids, scorer.scorer.module.model, scorer.tokenizer)  # type: ignore[arg-type]
    check_rows(data.path, examples, partial(_length_problem, limit=scorer.position_limit), places=places_of(rows))
    sequences = as_sequences(*zip(*examples, strict=True)).to(device)
    if warning := pin_rope(scorer.scorer.module.model, int(sequences.num_tokens.max())):  # type: ignore[arg-type]
        print(warning, file=sys.stderr)
    max_tokens = LearnedRewardConfig.microbatch_tokens
    alone = Launch(world_size=1, sharding="none")
    context = Context(launch=alone, device=device, collectives=OneProcess(), progress=Silent())
    in_microbatches = _in_microbatches(scorer, max_tokens, context)
    scores = scorer.normalize(in_microbatches.scores(sequences))
    check_finite(scores, way_out="train it again")
    return scores.tolist()


def _as_in_training(row: Row, data: ExamplesConfig, as_messages: bool) -> Row:
    """The row; a prompt that is an open transcript is split as in training."""
    prompt = row[data.prompt_column]
    if not isinstance(prompt, str):
        return row
    prompt, response = split_open_transcript(prompt, row[data.response_column], as_messages=as_messages)
    return {**row, data.prompt_column: prompt, data.response_column: response}


def _length_problem(example: EncodedExample, limit: int | None) -> str | None:
    num_tokens = sum(map(len, example))
    if limit is None or num_tokens <= limit:
        return None
    return f"it has {num_tokens} tokens, and the model has {limit} positions; take it out or make it shorter"
