"""What scores responses: programs, and models that are only asked."""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from llmrl.batches import Rollout, Row, Sequences
from llmrl.data.chat import as_sequences, uses_chat
from llmrl.data.config import PromptDataConfig, SupervisedDataConfig
from llmrl.data.preferences import split_open_transcript
from llmrl.data.rerender import Rerenderer, ended_by, same_tokens
from llmrl.data.rows import check_rows, column_names, places_of
from llmrl.data.supervised import EncodedExample, encode_examples
from llmrl.distributed.config import DistributedConfig
from llmrl.distributed.device import pick_device
from llmrl.distributed.sharing import DistributedReward, DistributedScorer
from llmrl.models.adapters import base_of
from llmrl.models.loading import load_tokenizer
from llmrl.models.reward_loading import load_reward_model, load_reward_on_base
from llmrl.models.reward_model import RewardModule, TransformersRewardModel, score_layer
from llmrl.models.reward_record import Normalization, TextForm, saved_normalization, saved_text_form
from llmrl.models.training import shrink_linear_layers
from llmrl.models.vocabulary import check_ids, check_vocabulary
from llmrl.optim.factory import place_frozen
from llmrl.rewards.combine import CombinedReward
from llmrl.rewards.config import LearnedRewardConfig, RewardConfig
from llmrl.rewards.functions import FunctionReward
from llmrl.rewards.learned import LearnedReward, check_finite
from llmrl.rewards.loading import Function
from llmrl.roles import Collectives, RewardFunction
from llmrl.rollout.rope import pin_rope
from llmrl.rollout.support import position_limit
from llmrl.wiring.checks import naming, reward_model_config
from llmrl.wiring.precision import dtype_of
from llmrl.wiring.trunks import settle_passes

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedTokenizerBase


class Rewards:
    """Everything that scores the responses of one policy. A reward model is loaded once, for whatever data there is."""

    def __init__(
        self,
        config: RewardConfig,
        functions: Sequence[Function],
        tokenizer: "PreTrainedTokenizerBase",
        distributed: DistributedConfig,
        collectives: Collectives,
        adapted: "PeftModel | None" = None,
        *,
        longest: int = 0,
    ) -> None:
        """`adapted` is the actor, where its frozen base may serve the reward model too; `longest` is of a prompt with
        its response, in tokens, if known."""
        self.config = config
        self.functions = functions
        self.tokenizer = tokenizer
        self.collectives = collectives
        self.scorer = None
        if config.model is not None:
            self.scorer = load_scorer(
                config.model,
                adapted,
                longest=longest,
                place=lambda module: place_frozen(module, distributed, collectives),
            )

    def on(self, data: PromptDataConfig, rows: Sequence[Row]) -> RewardFunction:
        """The reward of responses to these prompts."""
        rewards: list[RewardFunction] = []
        if self.functions:
            reward = FunctionReward(
                self.config,
                functions=self.functions,
                tokenizer=self.tokenizer,
                prompt_column=data.prompt_column,
                columns=column_names(rows),
            )
            rewards.append(DistributedReward(reward, self.collectives))
        if self.scorer is not None:
            rewards.append(self.scorer.reward_for(self.tokenizer, data, rows, self.collectives))
        return rewards[0] if len(rewards) == 1 else CombinedReward(rewards)


@dataclass(frozen=True, kw_only=True)
class RewardScorer:
    """A reward model that is only asked: frozen, on the device."""

    scorer: TransformersRewardModel
    tokenizer: "PreTrainedTokenizerBase"
    normalize: Callable[[Tensor], Tensor]
    weight: float
    text_form: TextForm
    """For prompts that bring no settings of their own."""
    position_limit: int | None
    """Tokens of the longest sequence that it can read."""

    def reward_for(
        self,
        policy_tokenizer: "PreTrainedTokenizerBase",
        data: PromptDataConfig,
        rows: Sequence[Row],
        collectives: Collectives,
    ) -> LearnedReward:
        """The reward of responses to these prompts: on the policy's own ids where both have the same tokens. The ranks
        share the work."""
        eos_id: Any = self.tokenizer.eos_token_id
        encode: Callable[[Rollout], Sequences] = partial(ended_by, eos_id=eos_id)
        if not same_tokens(policy_tokenizer, self.tokenizer):
            encode = Rerenderer(data, policy_tokenizer=policy_tokenizer, tokenizer=self.tokenizer)
            encode.check(rows)
        scorer = DistributedScorer(self.scorer, collectives, microbatch_tokens=self.scorer.microbatch_tokens)
        return LearnedReward(scorer, encode=encode, normalize=self.normalize, weight=self.weight)


def load_scorer(
    config: LearnedRewardConfig,
    adapted: "PeftModel | None" = None,
    *,
    longest: int = 0,
    place: Callable[[nn.Module], object] = lambda module: module.to(pick_device()),
) -> RewardScorer:
    """The reward model that a recipe or a command names, in eval mode and without gradient.

    Args:
        config: Which one, and how.
        adapted: The actor, on whose base it stands if the config says so.
        longest: Tokens of the longest sequence, if known.
        place: Puts a module where it computes; not one on the actor's base, which is there.
    """
    model_config = reward_model_config(config)
    base = adapted if config.on_actor_base else None
    with naming("reward.model"):
        tokenizer = load_tokenizer(model_config)
        if base is not None:
            model = load_reward_on_base(model_config, base_of(base))
        else:
            model = load_reward_model(model_config, head_init=None)
        settle_passes(model, longest)
        if base is None:
            shrink_linear_layers(model, dtype_of(config), head=score_layer(model))
        check_vocabulary(model_config, model, tokenizer)
    model.eval().requires_grad_(False)
    normalization = saved_normalization(model.config) if config.normalize else None
    module = RewardModule(model, dtype=dtype_of(config))
    if base is None:
        place(module)
    return RewardScorer(
        scorer=TransformersRewardModel(module, microbatch_tokens=config.microbatch_tokens, shares_prompts=False),
        tokenizer=tokenizer,
        normalize=normalization or Normalization(mean=0.0, std=1.0),
        weight=config.weight,
        text_form=saved_text_form(model.config),
        position_limit=position_limit(model),
    )


def score_rows(config: LearnedRewardConfig, rows: Sequence[Row], data: SupervisedDataConfig) -> list[float]:
    """The score of each row's response by a reward model, which reads prompts as it did in training.

    Of `data` the path and the columns count: template and system prompt are those that are stored with the model.
    """
    scorer = load_scorer(config)
    data = replace(data, template=scorer.text_form.template, system_prompt=scorer.text_form.system_prompt)
    as_messages = uses_chat(scorer.tokenizer, data)
    examples = encode_examples([_as_in_training(row, data, as_messages) for row in rows], scorer.tokenizer, data)
    ids = [ids for example in examples for ids in example]
    check_ids(data.path, ids, scorer.scorer.module.model, scorer.tokenizer)  # type: ignore[arg-type]
    check_rows(data.path, examples, partial(_length_problem, limit=scorer.position_limit), places=places_of(rows))
    sequences = as_sequences(*zip(*examples, strict=True)).to(pick_device())
    if warning := pin_rope(scorer.scorer.module.model, int(sequences.num_tokens.max())):  # type: ignore[arg-type]
        print(warning, file=sys.stderr)
    scores = scorer.normalize(scorer.scorer.scores(sequences))
    check_finite(scores, way_out="train it again")
    return scores.tolist()


def _as_in_training(row: Row, data: SupervisedDataConfig, as_messages: bool) -> Row:
    """A row whose prompt is an open transcript, as pairs of such are read."""
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
