"""From settings to a wired run: the only module that knows every class.

Everything that can be wrong is found by `check_*` before any weights load; `build_*` then wires what was checked.
"""

import copy
import json
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from operator import attrgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from llmrl.algorithms.grpo import GRPO
from llmrl.config import GRPORun, RewardModelRun, SFTRun
from llmrl.data.chat import as_sequences
from llmrl.data.preferences import PairSource, load_preference_rows
from llmrl.data.prompts import PromptDataConfig, PromptSource, encode_prompts, load_prompt_rows
from llmrl.data.rerender import Rerenderer, same_tokens
from llmrl.data.rows import DataConfig, check_rows, column_names, is_local
from llmrl.data.supervised import SupervisedDataConfig, SupervisedSource, encode_examples, load_supervised_rows
from llmrl.distributed.collectives import OneProcess
from llmrl.distributed.device import pick_device
from llmrl.distributed.trainable import LocalTrainable
from llmrl.experience import PreferencePairs, Prompts, Rollout, Row, Sequences
from llmrl.functional.streams import Purpose
from llmrl.models.heads import choose_head
from llmrl.models.loading import (
    DTYPES,
    ModelConfig,
    ModelError,
    as_loaded,
    check_model,
    end_ids,
    load_adapted,
    load_model,
    load_tokenizer,
    num_token_ids,
    shrink_linear_layers,
)
from llmrl.models.policy import PolicyModule, TransformersPolicy
from llmrl.models.reward_checks import sanity_checks
from llmrl.models.reward_model import (
    Normalization,
    RewardModule,
    TransformersRewardModel,
    adapt,
    check_reward_model,
    choose_pad,
    load_reward_model,
    normalization_on,
    saved_normalization,
    score_layer,
    shares_prompts_exactly,
)
from llmrl.models.saving import save_policy
from llmrl.reports.progress import Silent
from llmrl.reports.report_card import Card, PairResults, make_report_card
from llmrl.reports.samples import SampleWriter
from llmrl.reports.trackers import Trackers
from llmrl.rewards.combine import CombinedReward
from llmrl.rewards.config import LearnedRewardConfig
from llmrl.rewards.functions import FunctionReward, decode_responses
from llmrl.rewards.learned import LearnedReward, check_finite
from llmrl.rewards.loading import Function, load_functions, required_columns, row_problem
from llmrl.roles import Policy, Progress, RewardFunction, RolloutEngine, Sampling
from llmrl.rollout.config import RolloutConfig
from llmrl.rollout.generate import TransformersEngine
from llmrl.rollout.native import NativeEngine
from llmrl.rollout.support import check_length, position_limit
from llmrl.settings import to_dict
from llmrl.trainers.evaluate import Evaluator
from llmrl.trainers.reward_model import RewardModelConfig, RewardModelTrainer
from llmrl.trainers.rl import RLTrainer
from llmrl.trainers.run import Run, RunConfig, check_output
from llmrl.trainers.sft import SFTTrainer

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


C = TypeVar("C", bound=DataConfig)

EVALUATION = "evaluation_data"


@dataclass(frozen=True, kw_only=True)
class Checked:
    """What checking read, so that building need not read it again. None stands for what could not be read yet."""

    rows: list[Row] | None
    evaluation_rows: list[Row] | None
    functions: tuple[Function, ...]
    unchecked: list[str]
    """Sentences on what could not be checked."""


def check_sft(config: SFTRun, *, dry: bool) -> Checked:
    """Checks a supervised run. A dry one may name what does not exist yet; see `_rows`."""
    check_output(config.run)
    unchecked = _model(config.model, dry=dry)
    rows = _rows(config.data, load_supervised_rows, unchecked, dry=dry)
    evaluation_rows = None
    if config.evaluation_data is not None:
        evaluation_rows = _rows(config.evaluation_data, load_supervised_rows, unchecked, dry=dry, section=EVALUATION)
    Trackers(config.trackers, output_dir=Path(config.run.output_dir))
    return Checked(rows=rows, evaluation_rows=evaluation_rows, functions=(), unchecked=unchecked)


def check_reward_run(config: RewardModelRun, *, dry: bool) -> Checked:
    """Checks the training of a reward model."""
    check_output(config.run)
    unchecked = _model(config.model, dry=dry, needs_head=False)
    rows = _rows(config.data, load_preference_rows, unchecked, dry=dry)
    evaluation_rows = _rows(config.evaluation_data, load_preference_rows, unchecked, dry=dry, section=EVALUATION)
    Trackers(config.trackers, output_dir=Path(config.run.output_dir))
    return Checked(rows=rows, evaluation_rows=evaluation_rows, functions=(), unchecked=unchecked)


def check_grpo(config: GRPORun, *, dry: bool, trains: bool = True) -> Checked:
    """Checks a run of GRPO, or, where it trains nothing, an evaluation of its model."""
    unchecked = _model(config.model, dry=dry)
    if config.reward.model is not None:
        unchecked += check_scorer(config.reward.model, dry=dry)
    if trains:
        check_output(config.run)
        Trackers(config.trackers, output_dir=Path(config.run.output_dir))
    rows = _rows(config.data, load_prompt_rows, unchecked, dry=dry) if trains else None
    evaluation_rows = None
    if config.evaluation_data is not None and (config.evaluation.every or not trains):
        evaluation_rows = _rows(config.evaluation_data, load_prompt_rows, unchecked, dry=dry, section=EVALUATION)
    elif config.evaluation_data is not None:
        unchecked.append(f"{EVALUATION}.path ({config.evaluation_data.path}), which only llmrl evaluate will read")
    functions: tuple[Function, ...] = ()
    for data, some_rows in ((config.data, rows), (config.evaluation_data, evaluation_rows)):
        if data is not None and some_rows is not None:
            functions = load_functions(config.reward, column_names(some_rows))
            required = required_columns(config.reward, functions)
            check_rows(data.path, some_rows, partial(row_problem, required=required))
    if config.reward.functions and rows is None and evaluation_rows is None:
        unchecked.append("the columns that the reward functions ask for, since there are no rows to look at")
    return Checked(rows=rows, evaluation_rows=evaluation_rows, functions=functions, unchecked=unchecked)


def _model(config: ModelConfig, *, dry: bool, section: str = "model", needs_head: bool | None = None) -> list[str]:
    """Checks a model; `needs_head` is for reward models: whether their head must be there already."""
    if dry and config.made_by and not Path(config.path).exists():
        return [f"{section}.path ({config.path}) does not exist yet; `{config.made_by}` makes it"]
    with _naming(section):
        sentence = check_model(config)
        if needs_head is not None:
            check_reward_model(config, needs_head=needs_head)
    return [_in_section(sentence, section)] if sentence else []


@contextmanager
def _naming(section: str) -> Iterator[None]:
    """Around what checks or loads a model: its errors name the section of the recipe that the model stands in."""
    try:
        yield
    except ModelError as error:
        raise ModelError(_in_section(str(error), section)) from error


def _in_section(sentence: str, section: str) -> str:
    return re.sub(r"\bmodel\.(?=path\b|trust_remote_code\b)", f"{section}.", sentence)


def _rows(
    config: C, load: Callable[[C], list[Row]], unchecked: list[str], *, dry: bool, section: str = "data"
) -> list[Row] | None:
    """The rows that a config names. A dry run passes over a file that a command is still to make, and over the hub."""
    if dry and not is_local(config.path):
        unchecked.append(f"{section}.path ({config.path}) is a data set on the hub, which a dry run does not fetch")
    elif dry and config.made_by and not Path(config.path).exists():
        unchecked.append(f"{section}.path ({config.path}) does not exist yet; `{config.made_by}` makes it")
    else:
        return load(config)
    return None


@dataclass(frozen=True, kw_only=True)
class Actor:
    """A loaded policy with everything that belongs to it."""

    model: "PreTrainedModel"
    adapted: "PeftModel | None"
    tokenizer: "PreTrainedTokenizerBase"
    module: PolicyModule
    policy: Policy
    dtype: torch.dtype

    @property
    def save(self) -> Callable[[Path], None]:
        """Writes the policy to a folder."""
        return partial(save_policy, model=self.model, adapted=self.adapted, tokenizer=self.tokenizer, dtype=self.dtype)


def load_actor(config: ModelConfig, *, temperature: float, microbatch_tokens: int, seed: int) -> Actor:
    """The model to be trained, on the device, ready for log-probabilities."""
    tokenizer = load_tokenizer(config)
    torch.manual_seed(seed)  # random weights and fresh adapters: everything later draws from streams of its own
    model, adapted = load_adapted(config)
    model.to(pick_device()).train()  # type: ignore[arg-type]
    if config.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    dtype = DTYPES[config.dtype]
    head = choose_head(model, num_token_ids(tokenizer, model))
    module = PolicyModule(model, head, temperature=temperature, dtype=dtype)
    policy = TransformersPolicy(module, microbatch_tokens=microbatch_tokens)
    return Actor(model=model, adapted=adapted, tokenizer=tokenizer, module=module, policy=policy, dtype=dtype)


def reference_of(actor: Actor, *, microbatch_tokens: int) -> Policy:
    """The actor as it is now, frozen: its adapter switched off where it has one, else a copy."""
    if actor.adapted is not None:
        context = partial(as_loaded, actor.adapted)
        return TransformersPolicy(actor.module, microbatch_tokens=microbatch_tokens, context=context)
    frozen = copy.deepcopy(actor.model).requires_grad_(False)
    shrink_linear_layers(frozen, actor.dtype, head=frozen.get_output_embeddings())
    module = PolicyModule(frozen, actor.module.head, temperature=actor.module.temperature, dtype=actor.dtype)
    return TransformersPolicy(module, microbatch_tokens=microbatch_tokens)


def build_engine(
    config: RolloutConfig,
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    *,
    dtype: torch.dtype,
    progress: Progress,
) -> RolloutEngine:
    """The engine that the config names, over a loaded model."""
    common: dict[str, Any] = {
        "eos_ids": end_ids(tokenizer, model),
        "vocab_size": num_token_ids(tokenizer, model),
        "dtype": dtype,
        "progress": progress,
    }
    if config.engine == "transformers":
        return TransformersEngine(model, **common)
    return NativeEngine(model, max_rows=config.max_rows, **common)


def build_sft(config: SFTRun, checked: Checked, *, progress: Progress, trackers: Trackers) -> Run:
    """A supervised run, ready to train."""
    assert checked.rows is not None, "only a dry run may leave rows unread"
    collectives = OneProcess()
    actor = load_actor(
        config.model, temperature=1.0, microbatch_tokens=config.sft.microbatch_tokens, seed=config.run.seed
    )
    examples = SupervisedSource(checked.rows, actor.tokenizer, config.data, seed=config.run.seed)
    _tell_dropped(examples.num_dropped, "data", "max_tokens", progress)
    trainer = SFTTrainer(
        config.sft,
        actor=actor.policy,
        trained={"actor": LocalTrainable(actor.module, config.optimizer, num_steps=config.run.num_iterations)},
        examples=examples,
        held_out=_held_out(config.evaluation_data, checked.evaluation_rows, actor, progress),
        collectives=collectives,
        progress=progress,
    )
    return Run(
        config.run,
        settings=to_dict(config),
        trainer=trainer,
        save_model=actor.save,
        evaluate=trainer.evaluate if config.evaluation_data is not None else None,
        evaluate_every=config.sft.evaluate_every,
        progress=progress,
        sink=trackers,
    )


def _held_out(config: SupervisedDataConfig | None, rows: list[Row] | None, actor: Actor, progress: Progress):
    if config is None or rows is None:
        return None
    examples = SupervisedSource(rows, actor.tokenizer, config, seed=0)
    _tell_dropped(examples.num_dropped, "evaluation_data", "max_tokens", progress)
    return examples.next(examples.num_rows).to(actor.model.device)


@dataclass(frozen=True, kw_only=True)
class LoadedRewardModel:
    """A reward model with everything that belongs to it."""

    model: "PreTrainedModel"
    adapted: "PeftModel | None"
    tokenizer: "PreTrainedTokenizerBase"
    module: RewardModule
    scorer: TransformersRewardModel
    has_own_pad: bool
    """Pad and EOS differ, so that plain transformers reads the score where llmrl does."""

    def normalize(self, pairs: PreferencePairs) -> Normalization:
        """Stores with the model what makes its scores of both sides of these pairs mean 0 and spread 1."""
        with torch.no_grad():
            normalization = normalization_on(torch.cat(self.scorer.pair_scores(pairs)))
        normalization.write(self.model.config)
        return normalization


def load_trained_reward_model(config: ModelConfig, settings: RewardModelConfig, *, seed: int) -> LoadedRewardModel:
    """The reward model to be trained, on the device."""
    tokenizer = load_tokenizer(config)
    torch.manual_seed(seed)  # a new head and fresh adapters: everything later draws from streams of its own
    model = load_reward_model(config, head_init=settings.head_init)
    if max(tokenizer.get_vocab().values()) >= model.get_input_embeddings().num_embeddings:  # type: ignore[union-attr]
        raise ModelError(
            f"model.path ({config.path}): its tokenizer has ids up to {max(tokenizer.get_vocab().values())}, but the "
            f"model has {model.get_input_embeddings().num_embeddings} embeddings; they do not belong together"  # type: ignore[union-attr]
        )
    has_own_pad = choose_pad(tokenizer, model)
    adapted = adapt(model, config)
    model.to(pick_device()).train()  # type: ignore[arg-type]
    if config.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    module = RewardModule(model, dtype=DTYPES[config.dtype])
    scorer = TransformersRewardModel(
        module,
        microbatch_tokens=settings.microbatch_tokens,
        shares_prompts=shares_prompts_exactly(module, len(tokenizer)),
    )
    return LoadedRewardModel(
        model=model, adapted=adapted, tokenizer=tokenizer, module=module, scorer=scorer, has_own_pad=has_own_pad
    )


def build_reward_model(config: RewardModelRun, checked: Checked, *, progress: Progress, trackers: Trackers) -> Run:
    """The training of a reward model. Each model that it saves has its report card beside it."""
    assert checked.rows is not None, "only a dry run may leave rows unread"
    assert checked.evaluation_rows is not None, "only a dry run may leave rows unread"
    settings = config.reward_model
    loaded = load_trained_reward_model(config.model, settings, seed=config.run.seed)
    pairs = PairSource(checked.rows, loaded.tokenizer, config.data, seed=config.run.seed)
    held_out = PairSource(checked.evaluation_rows, loaded.tokenizer, config.evaluation_data, seed=config.run.seed)
    for section, source in (("data", pairs), ("evaluation_data", held_out)):
        for line in source.counts.lines():
            progress.message(f"{section}: {line}")
    device = loaded.model.device
    reference = pairs.all().select(torch.arange(min(settings.num_reference_pairs, pairs.num_rows))).to(device)
    num_iterations = max(settings.num_epochs * pairs.num_rows // settings.batch_size, 1)
    trainer = RewardModelTrainer(
        settings,
        scorer=loaded.scorer,
        trained={"reward_model": LocalTrainable(loaded.module, config.optimizer, num_steps=num_iterations)},
        pairs=pairs,
        held_out=held_out.all().to(device),
        collectives=OneProcess(),
        progress=progress,
    )

    def save(folder: Path) -> None:
        normalization = loaded.normalize(reference)
        save_policy(
            folder,
            model=loaded.model,
            adapted=loaded.adapted,
            tokenizer=loaded.tokenizer,
            dtype=torch.float32,  # so that the folder scores as the model that was trained
        )
        card = _report_card(loaded, trainer, held_out, normalization)
        (folder / "report_card.json").write_text(json.dumps(card, indent=1) + "\n")

    return Run(
        RunConfig(num_iterations=num_iterations, **vars(config.run)),
        settings=to_dict(config),
        trainer=trainer,
        save_model=save,
        evaluate=trainer.evaluate,
        evaluate_every=settings.evaluate_every,
        progress=progress,
        sink=trackers,
    )


def _report_card(
    loaded: LoadedRewardModel, trainer: RewardModelTrainer, held_out: PairSource, normalization: Normalization
) -> Card:
    pairs = trainer.held_out
    with torch.no_grad():
        chosen, rejected = loaded.scorer.pair_scores(pairs)
    notes = []
    if not loaded.has_own_pad:
        notes.append(
            "pad equals EOS and the vocabulary has no token to spare: plain transformers reads the score one token "
            "before the end, llmrl at the end"
        )
    return make_report_card(
        PairResults(
            chosen_scores=chosen,
            rejected_scores=rejected,
            chosen_lengths=pairs.chosen.response_lengths,
            rejected_lengths=pairs.rejected.response_lengths,
            sources=held_out.sources,
        ),
        loss=trainer.evaluate()["eval/loss"],
        counts=vars(held_out.counts),
        checks=sanity_checks(loaded.scorer, pairs.chosen, loaded.tokenizer, dtype=loaded.module.dtype),
        normalization=(normalization.mean, normalization.std),
        notes=notes,
    )


def build_grpo(config: GRPORun, checked: Checked, *, progress: Progress, trackers: Trackers) -> Run:
    """A run of GRPO, ready to train."""
    assert checked.rows is not None, "only a dry run may leave rows unread"
    for warning in config.algorithm.warnings():
        progress.message(f"warning: {warning}")
    collectives = OneProcess()
    actor = load_actor(
        config.model,
        temperature=config.rollout.temperature,
        microbatch_tokens=config.update.microbatch_tokens,
        seed=config.run.seed,
    )
    prompts = PromptSource(checked.rows, actor.tokenizer, config.data, seed=config.run.seed)
    _tell_dropped(prompts.num_dropped, "data", "max_prompt_tokens", progress)
    if position_limit(actor.model) is not None:
        _check_room(actor.model, _one_epoch(prompts), config.rollout)
    engine = build_engine(config.rollout, actor.model, actor.tokenizer, dtype=actor.dtype, progress=progress)
    reference = None
    if config.algorithm.kl_coef > 0:
        reference = reference_of(actor, microbatch_tokens=config.update.microbatch_tokens)
    scorer = None if config.reward.model is None else load_scorer(config.reward.model)
    num_steps = config.run.num_iterations * config.optimizer_steps_per_iteration
    output_dir = Path(config.run.output_dir)
    trainer = RLTrainer(
        algorithm=GRPO(
            config.algorithm,
            actor=actor.policy,
            reference=reference,
            max_response_tokens=config.rollout.max_response_tokens,
        ),
        engine=engine,
        reward=_reward(config, checked.functions, actor.tokenizer, config.data, checked.rows, scorer),
        prompts=prompts,
        trained={"actor": LocalTrainable(actor.module, config.optimizer, num_steps=num_steps)},
        update=config.update,
        prompts_per_iteration=config.rollout.prompts_per_iteration,
        group_size=config.algorithm.group_size,
        temperature=config.rollout.temperature,
        seed=config.run.seed,
        collectives=collectives,
        progress=progress,
        observe=SampleWriter(
            output_dir / "samples.jsonl",
            num_samples=config.run.samples_per_iteration,
            decode=lambda ids: str(actor.tokenizer.decode(ids)),
        ),
    )
    evaluator = None
    if config.evaluation.every:
        evaluator = _evaluator(config, checked, actor.tokenizer, engine, scorer, progress)
        _check_room(actor.model, evaluator.prompts, config.rollout)
    return Run(
        config.run,
        settings=to_dict(config),
        trainer=trainer,
        save_model=actor.save,
        evaluate=evaluator.evaluate if evaluator is not None else None,
        evaluate_every=config.evaluation.every,
        progress=progress,
        sink=trackers,
    )


def build_evaluator(config: GRPORun, checked: Checked, *, progress: Progress) -> Evaluator:
    """An evaluation of the model that a recipe of GRPO names, without anything that trains."""
    tokenizer, model = load_for_sampling(config.model)
    engine = build_engine(config.rollout, model, tokenizer, dtype=model.dtype, progress=progress)
    scorer = None if config.reward.model is None else load_scorer(config.reward.model)
    evaluator = _evaluator(config, checked, tokenizer, engine, scorer, progress)
    _check_room(model, evaluator.prompts, config.rollout)
    return evaluator


def _one_epoch(source: PromptSource) -> Prompts:
    """Every prompt of the source, which then stands where it stood."""
    place = source.state_dict()
    prompts = source.next(source.num_rows)
    source.load_state_dict(place)
    return prompts


def _check_room(model: "PreTrainedModel", prompts: Prompts, config: RolloutConfig) -> None:
    """Refuses before the first rollout what the engine would refuse when the longest prompt comes up."""
    check_length(model, int(prompts.mask.sum(dim=1).max()), config.max_response_tokens)


def load_for_sampling(config: ModelConfig) -> "tuple[PreTrainedTokenizerBase, PreTrainedModel]":
    """Tokenizer and model in the precision that it computes in, on the device."""
    tokenizer = load_tokenizer(config)
    model = load_model(config, dtype=DTYPES[config.dtype])
    return tokenizer, model.to(pick_device())  # type: ignore[arg-type,return-value]


def _evaluator(
    config: GRPORun,
    checked: Checked,
    tokenizer: "PreTrainedTokenizerBase",
    engine: RolloutEngine,
    scorer: "RewardScorer | None",
    progress: Progress,
) -> Evaluator:
    assert config.evaluation_data is not None, "an evaluation needs prompts"
    assert checked.evaluation_rows is not None, "an evaluation needs prompts"
    prompts, num_dropped = encode_prompts(checked.evaluation_rows, tokenizer, config.evaluation_data)
    _tell_dropped(num_dropped, "evaluation_data", "max_prompt_tokens", progress)
    return Evaluator(
        config.evaluation,
        engine=engine,
        reward=_reward(config, checked.functions, tokenizer, config.evaluation_data, checked.evaluation_rows, scorer),
        prompts=prompts,
        criterion=config.reward.labels[0],
        max_response_tokens=config.rollout.max_response_tokens,
        seed=config.run.seed,
        progress=progress,
    )


def _reward(
    config: GRPORun,
    functions: Sequence[Function],
    tokenizer: "PreTrainedTokenizerBase",
    data: PromptDataConfig,
    rows: Sequence[Row],
    scorer: "RewardScorer | None",
) -> RewardFunction:
    rewards: list[RewardFunction] = []
    if functions:
        rewards.append(
            FunctionReward(
                config.reward,
                functions=functions,
                tokenizer=tokenizer,
                prompt_column=data.prompt_column,
                columns=column_names(rows),
            )
        )
    if scorer is not None:
        rewards.append(scorer.reward_for(tokenizer, data, rows))
    return rewards[0] if len(rewards) == 1 else CombinedReward(rewards)


@dataclass(frozen=True, kw_only=True)
class RewardScorer:
    """A reward model that is only asked: frozen, on the device."""

    scorer: TransformersRewardModel
    tokenizer: "PreTrainedTokenizerBase"
    normalize: Callable[[Tensor], Tensor]
    weight: float

    def reward_for(
        self, policy_tokenizer: "PreTrainedTokenizerBase", data: PromptDataConfig, rows: Sequence[Row]
    ) -> LearnedReward:
        """The reward of responses to these prompts: on the policy's own ids where both have the same tokens."""
        encode: Callable[[Rollout], Sequences] = attrgetter("sequences")
        if not same_tokens(policy_tokenizer, self.tokenizer):
            encode = Rerenderer(data, policy_tokenizer=policy_tokenizer, tokenizer=self.tokenizer)
            encode.check(rows)
        return LearnedReward(self.scorer, encode=encode, normalize=self.normalize, weight=self.weight)


def load_scorer(config: LearnedRewardConfig) -> RewardScorer:
    """The reward model that a recipe or a command names, in eval mode and without gradient."""
    model_config = reward_model_config(config)
    with _naming("reward.model"):
        tokenizer = load_tokenizer(model_config)
        model = load_reward_model(model_config, head_init=None).to(pick_device())  # type: ignore[arg-type]
    model.eval().requires_grad_(False)
    shrink_linear_layers(model, DTYPES[config.dtype], head=score_layer(model))
    normalization = saved_normalization(model.config) if config.normalize else None
    return RewardScorer(
        scorer=TransformersRewardModel(
            RewardModule(model, dtype=DTYPES[config.dtype]),
            microbatch_tokens=config.microbatch_tokens,
            shares_prompts=False,
        ),
        tokenizer=tokenizer,
        normalize=normalization or Normalization(mean=0.0, std=1.0),
        weight=config.weight,
    )


def check_scorer(config: LearnedRewardConfig, *, dry: bool = False) -> list[str]:
    """Checks a reward model that is to score responses. Returns sentences on what could not be checked."""
    return _model(reward_model_config(config), dry=dry, section="reward.model", needs_head=True)


def reward_model_config(config: LearnedRewardConfig) -> ModelConfig:
    """The same model as the settings of one that is loaded."""
    return ModelConfig(
        path=config.path, dtype=config.dtype, trust_remote_code=config.trust_remote_code, made_by=config.made_by
    )


def score_rows(config: LearnedRewardConfig, rows: Sequence[Row], data: SupervisedDataConfig) -> list[float]:
    """The score of each row's response by a reward model, through the model's own chat template."""
    scorer = load_scorer(config)
    examples = encode_examples(rows, scorer.tokenizer, data)
    sequences = as_sequences(*zip(*examples, strict=True)).to(scorer.scorer.device)
    scores = scorer.normalize(scorer.scorer.scores(sequences))
    check_finite(scores)
    return scores.tolist()


def _tell_dropped(num_dropped: int, section: str, limit: str, progress: Progress) -> None:
    if num_dropped:
        progress.message(f"{section}: {num_dropped} rows are longer than {section}.{limit} and were dropped")


def respond(
    config: ModelConfig,
    texts: Sequence[str],
    *,
    system_prompt: str | None,
    temperature: float,
    num_responses: int,
    max_response_tokens: int,
    seed: int,
) -> list[list[str]]:
    """Responses to texts, as text; greedy at temperature 0."""
    tokenizer, model = load_for_sampling(config)
    data = PromptDataConfig(path="the command line", system_prompt=system_prompt, max_prompt_tokens=sys.maxsize)
    prompts, _ = encode_prompts([{"prompt": text} for text in texts], tokenizer, data)
    engine = build_engine(
        RolloutConfig(max_rows=max(num_responses, RolloutConfig.max_rows)),
        model,
        tokenizer,
        dtype=model.dtype,
        progress=Silent(),
    )
    sampling = Sampling(
        temperature=temperature or 1.0,
        num_responses=num_responses,
        max_response_tokens=max_response_tokens,
        greedy=temperature == 0,
        seed=seed,
        purpose=Purpose.GENERATION,
        first_response=0,
    )
    decoded = decode_responses(engine.generate(prompts, sampling).sequences, tokenizer)
    return [decoded[first : first + num_responses] for first in range(0, len(decoded), num_responses)]
