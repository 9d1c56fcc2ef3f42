"""Runs of reinforcement learning: one builder for each algorithm, and what all of them share."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmrl.algorithms.auxiliary import DistillValues
from llmrl.algorithms.config import ACROSS_GROUPS
from llmrl.algorithms.grpo import GRPO
from llmrl.algorithms.implicit import ImplicitPPO
from llmrl.algorithms.ppo import PPO
from llmrl.algorithms.user_algorithm import make_user_algorithm
from llmrl.config import GRPORun, PPORun, RLRun
from llmrl.data.prompts import ShuffledPrompts, ShuffledRows, encode_prompts, unopened
from llmrl.data.rerender import same_tokens
from llmrl.distributed.context import Context
from llmrl.distributed.roles import DistributedEngine, DistributedNetworks, DistributedPolicy
from llmrl.environments.reward import EpisodeReward
from llmrl.functional.streams import Purpose
from llmrl.lines import LineFile
from llmrl.microbatches import TokenBudget
from llmrl.models.critic_folder import CriticSaver
from llmrl.models.experts import watched
from llmrl.models.folders import ModelError
from llmrl.models.loaded import Actor, RewardScorer
from llmrl.models.saving import Saver
from llmrl.models.vocabulary import check_ids
from llmrl.optim.factory import make_trainable, place_frozen
from llmrl.reports.samples import SampleWriter
from llmrl.reports.trackers import Trackers
from llmrl.rewards.config import ENVIRONMENT
from llmrl.roles import (
    ActorCritic,
    Algorithm,
    AuxiliaryPhase,
    MovingReference,
    PromptSource,
    RolloutEngine,
    Sampling,
    Trainable,
)
from llmrl.rollout.rope import pin_rope
from llmrl.rollout.support import check_length, position_limit
from llmrl.trainers.alarms import Alarms
from llmrl.trainers.evaluate import Evaluator
from llmrl.trainers.rl import RLTrainer
from llmrl.trainers.run import Run
from llmrl.wiring.actors import following, load_actor, reference_of
from llmrl.wiring.cards import card_of
from llmrl.wiring.checks import Checked, reward_model_config
from llmrl.wiring.contents import recorded_settings
from llmrl.wiring.critics import load_networks, train_networks
from llmrl.wiring.engines import build_engine, check_room, load_for_sampling
from llmrl.wiring.environments import with_turns
from llmrl.wiring.passes import check_sampling
from llmrl.wiring.precision import precision_warnings
from llmrl.wiring.rewards import load_scorer, reward_on
from llmrl.wiring.rows import EVALUATION, report_dropped
from llmrl.wiring.trunks import budget_of, report_padding

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def build_grpo(config: GRPORun, checked: Checked, context: Context, trackers: Trackers) -> Run:
    """A run of GRPO, ready to train."""
    actor = _load_actor(config, context)
    parts = _parts_of(actor, {"the model": actor.model}, config, checked, context)
    trained = make_trainable(actor.policy, config.optimizer, num_steps=config.num_optimizer_steps, context=context)
    name = config.algorithm.name
    if name == "grpo":
        make = partial(
            GRPO,
            one_step=config.optimizer_steps_per_iteration == 1,
            reward_weights=config.reward_weights if config.reward.combine == "standardized" else None,
        )
    else:
        make = partial(make_user_algorithm, name, progress=context.progress)
    algorithm = make(
        config.algorithm,
        actor=DistributedPolicy(actor.policy, context, budget=parts.budget),
        reference=parts.reference,
        max_response_tokens=config.rollout.max_response_tokens,
    )

    def save(folder: Path) -> None:
        parts.saver.save(folder, trained)

    return _build_run(config, checked, context, trackers, parts, algorithm, {"actor": trained}, save)


def build_ppo(config: PPORun, checked: Checked, context: Context, trackers: Trackers) -> Run:
    """A run of PPO, ready to train."""
    actor = _load_actor(config, context)
    networks = load_networks(config, actor)
    critic, readers = networks.critic, {"the model": actor.model}
    if critic is not None:
        readers["the critic"] = critic.trunk
    parts = _parts_of(actor, readers, config, checked, context)
    critic_saver = None if critic is None else CriticSaver(critic, actor.tokenizer, context=context)
    trained = train_networks(networks, config, context)
    both = DistributedNetworks(networks.both, context, budget=parts.budget)
    make: Callable[..., PPO] = PPO
    if networks.targets is not None:
        make = partial(ImplicitPPO, targets=networks.targets, **vars(config.critic.mtp))
    algorithm = make(
        config.algorithm,
        networks=both,
        reference=parts.reference,
        max_response_tokens=config.rollout.max_response_tokens,
        warmup_iterations=config.critic.warmup_iterations,
        value_coef=config.critic.value_coef,
        one_step=config.optimizer_steps_per_iteration == 1,
    )

    def save(folder: Path) -> None:
        parts.saver.save(folder, trained["actor"])
        if critic_saver is not None:
            critic_saver.save(folder / "critic", trained.get("critic", trained["actor"]))

    auxiliary = _auxiliary_phase(config, both)
    return _build_run(config, checked, context, trackers, parts, algorithm, trained, save, auxiliary=auxiliary)


def build_evaluator(config: RLRun, checked: Checked, context: Context) -> Evaluator:
    """Evaluator of the model that a recipe names, without training."""
    checked.report_notes(context.progress)
    tokenizer, model = load_for_sampling(config.model, context.device)
    if warning := pin_rope(model, config.longest_sequence):
        context.progress.message(warning)
    engine = checked.engine or build_engine(
        config.rollout, model, tokenizer, dtype=model.dtype, progress=context.progress
    )
    scorer = _load_scorer(config, context)
    engine = _over_ranks(engine, checked, config, tokenizer, context)
    return _evaluator(config, checked, context, tokenizer, model, engine, scorer)


def _auxiliary_phase(config: PPORun, networks: ActorCritic) -> DistillValues | None:
    settings = config.algorithm
    if settings.auxiliary_every is None:
        return None
    return DistillValues(
        networks=networks,
        every=settings.auxiliary_every,
        num_epochs=settings.auxiliary_epochs,
        kl_coef=settings.auxiliary_kl_coef,
        warmup_iterations=config.critic.warmup_iterations,
    )


def _load_actor(config: RLRun, context: Context) -> Actor:
    actor = load_actor(
        config.model,
        context.loading_device,
        temperature=config.rollout.temperature,
        longest=config.longest_sequence,
        seed=config.run.seed,
        moving_reference=config.algorithm.reference_refresh_every is not None,
    )
    algorithm = config.algorithm
    actor.module.experts = watched(actor.model.base_model, bias_rate=algorithm.balance_bias_rate)
    if actor.module.experts is None and (algorithm.balance_coef or algorithm.balance_bias_rate):
        raise ModelError(
            f"model.path ({config.model.path}) has no routers that say which experts they choose, so nothing can be "
            "balanced; set algorithm.balance_coef and algorithm.balance_bias_rate to 0"
        )
    return actor


def _load_scorer(config: RLRun, context: Context, actor: Actor | None = None) -> RewardScorer | None:
    settings = config.reward.model
    if settings is None:
        return None
    return load_scorer(
        reward_model_config(config),
        actor.adapted if actor is not None and settings.on_actor_base else None,
        normalize=settings.normalize,
        longest=config.longest_sequence,
        place=partial(place_frozen, config=config.distributed, context=context),
    )


@dataclass(frozen=True, kw_only=True)
class _Parts:
    """Roles made from full weights, before training splits them over ranks."""

    actor: Actor
    readers: Mapping[str, "PreTrainedModel"]
    """The models that train, by their names in errors: the longest prompt with its response has to fit in each."""
    budget: TokenBudget
    """Token budget of their passes."""
    reference: DistributedPolicy | None
    engine: RolloutEngine
    scorer: RewardScorer | None
    saver: Saver


def _parts_of(
    actor: Actor, readers: Mapping[str, "PreTrainedModel"], config: RLRun, checked: Checked, context: Context
) -> _Parts:
    budget = budget_of(readers.values(), config.update.microbatch_tokens, actor.dtype, context.device, section="update")
    reference = _reference_of(actor, budget, config, context)
    context.progress.phase("start", 1)  # which takes a while where the model is large
    check_sampling(actor, config.rollout)
    engine = checked.engine or build_engine(
        config.rollout,
        actor.model,
        actor.tokenizer,
        dtype=actor.dtype,
        progress=context.progress,
        copy_device=context.copy_device,
    )
    return _Parts(
        actor=actor,
        readers=readers,
        budget=budget,
        reference=reference,
        engine=_over_ranks(engine, checked, config, actor.tokenizer, context),
        scorer=_load_scorer(config, context, actor),
        saver=Saver(actor.model, actor.adapted, actor.tokenizer, dtype=actor.dtype, context=context),
    )


def _over_ranks(
    engine: RolloutEngine, checked: Checked, config: RLRun, tokenizer: "PreTrainedTokenizerBase", context: Context
) -> RolloutEngine:
    """The engine with what answers the actor, its work split over ranks."""
    if checked.environment is not None:
        engine = with_turns(engine, checked.environment, config.data, tokenizer, context)
    return DistributedEngine(engine, context)


def _reference_of(actor: Actor, budget: TokenBudget, config: RLRun, context: Context) -> DistributedPolicy | None:
    """A reference where `kl_coef` > 0, or where LoRA makes one free (then the KL is only logged); else None."""
    if config.algorithm.kl_coef == 0 and actor.adapted is None:
        return None
    reference = reference_of(actor, config.distributed, context, averages=config.algorithm.reference_mixing < 1)
    return DistributedPolicy(reference, context, budget=budget)


def _moving_reference(parts: _Parts, trained: Trainable, config: RLRun, context: Context) -> MovingReference | None:
    """What moves the reference; None where it stays."""
    every = config.algorithm.reference_refresh_every
    if every is None:
        return None
    assert parts.reference is not None, "checked with the settings"
    reference: Any = parts.reference.policy
    return following(reference, parts.actor, trained, context, every=every, mixing=config.algorithm.reference_mixing)


def _build_run(
    config: RLRun,
    checked: Checked,
    context: Context,
    trackers: Trackers,
    parts: _Parts,
    algorithm: Algorithm,
    trained: Mapping[str, Trainable],
    save: Callable[[Path], None],
    auxiliary: AuxiliaryPhase | None = None,
) -> Run:
    """A run of any algorithm: the steps that all builders share."""
    actor = parts.actor
    checked.report_notes(context.progress)
    for warning in (*config.warnings(), *actor.warnings, *precision_warnings(actor.model, actor.dtype)):
        context.progress.message(f"warning: {warning}")
    report_padding(parts.budget, config.model, context.progress)
    assert checked.rows is not None, "only a dry run may leave rows unread"
    prompts = _prompts(config, checked, parts, context)
    samples = LineFile(config.run.folder / "samples.jsonl", context.progress.message)
    trainer = RLTrainer(
        algorithm=algorithm,
        engine=parts.engine,
        reward=reward_on(
            config.data,
            checked.rows,
            config.reward,
            checked.functions,
            parts.scorer,
            actor.tokenizer,
            context,
            of_episodes=_reward_of_episodes(config),
        ),
        prompts=prompts,
        trained=trained,
        update=config.update,
        budget=parts.budget,
        prompts_per_iteration=config.rollout.prompts_per_iteration,
        sampling=Sampling(
            temperature=config.rollout.temperature,
            num_responses=config.algorithm.group_size,
            max_response_tokens=config.rollout.max_response_tokens,
            greedy=False,
            seed=config.run.seed,
            purpose=Purpose.TRAINING,
            first_response=0,
        ),
        context=context,
        observe=SampleWriter(
            samples,
            num_samples=config.run.samples_per_iteration if context.collectives.is_first else 0,
            decode=lambda ids: str(actor.tokenizer.decode(ids)),
        ),
        reference=_moving_reference(parts, trained["actor"], config, context),
        auxiliary=auxiliary,
        balance=actor.module.experts,
    )
    evaluator = None
    if config.evaluates:
        evaluator = _evaluator(config, checked, context, actor.tokenizer, actor.model, parts.engine, parts.scorer)
    return Run(
        config.run,
        samples=samples,
        settings=recorded_settings(config),
        contents=checked.contents,
        card=card_of(config, checked),
        trainer=trainer,
        save_model=save,
        evaluate=evaluator.evaluate if evaluator is not None else None,
        evaluate_every=config.evaluation.every,
        context=context,
        sink=trackers,
        alarms=Alarms(
            str(actor.dtype).removeprefix("torch."),
            steps_per_iteration=config.optimizer_steps_per_iteration,
            compares_sums=getattr(config.algorithm, "baseline", None) not in ACROSS_GROUPS,
        ),
        warmup_iterations=config.warmup_iterations,
    )


def _prompts(config: RLRun, checked: Checked, parts: _Parts, context: Context) -> PromptSource:
    """The source of prompts, which have room in every model that reads them."""
    actor, rows = parts.actor, checked.rows
    assert rows is not None, "only a dry run may leave rows unread"
    readers = {**parts.readers, **_reader_of(parts.scorer, actor.tokenizer)}
    if config.opens_prompts:
        for whose, model in readers.items():
            check_length(model, config.data.max_prompt_tokens, config.rollout.max_response_tokens, whose=whose)
        return ShuffledRows(rows, config.data, seed=config.run.seed)
    data = config.data if checked.environment is None else checked.environment.shown(config.data)
    prompts = ShuffledPrompts(rows, actor.tokenizer, data, seed=config.run.seed)
    report_dropped(prompts.dropped, "data", "max_prompt_tokens", context.progress)
    check_ids(config.data.path, (ids for _, ids in prompts.examples), actor.model, actor.tokenizer)
    if any(position_limit(model) is not None for model in readers.values()):
        check_room(readers, prompts.all(), config.rollout)
    return prompts


def _reward_of_episodes(config: RLRun) -> EpisodeReward | None:
    if config.environment is None:
        return None
    return EpisodeReward(ENVIRONMENT if config.opens_prompts else None)


def _reader_of(scorer: RewardScorer | None, tokenizer: "PreTrainedTokenizerBase") -> "dict[str, PreTrainedModel]":
    """The reward model where it reads the policy's own tokens; for others the length is not known beforehand."""
    if scorer is None or not same_tokens(tokenizer, scorer.tokenizer):
        return {}
    return {"the reward model": scorer.scorer.module.model}  # type: ignore[dict-item]


def _evaluator(
    config: RLRun,
    checked: Checked,
    context: Context,
    tokenizer: "PreTrainedTokenizerBase",
    model: "PreTrainedModel",
    engine: RolloutEngine,
    scorer: RewardScorer | None,
) -> Evaluator:
    assert config.evaluation_data is not None, "an evaluation needs prompts"
    assert checked.evaluation_rows is not None, "an evaluation needs prompts"
    data, rows = config.evaluation_data, checked.evaluation_rows
    if config.opens_prompts:
        prompts = unopened(rows)
    else:
        shown = data if checked.environment is None else checked.environment.shown(data)
        prompts, dropped = encode_prompts(rows, tokenizer, shown)
        report_dropped(dropped, EVALUATION, "max_prompt_tokens", context.progress)
        check_ids(data.path, prompts.ids.tolist(), model, tokenizer)
        check_room({"the model": model, **_reader_of(scorer, tokenizer)}, prompts, config.rollout)
    return Evaluator(
        config.evaluation,
        engine=engine,
        reward=reward_on(
            data,
            rows,
            config.reward,
            checked.functions,
            scorer,
            tokenizer,
            context,
            of_episodes=_reward_of_episodes(config),
        ),
        prompts=prompts,
        criterion=config.criterion,
        max_response_tokens=config.rollout.max_response_tokens,
        seed=config.run.seed,
        progress=context.progress,
    )
