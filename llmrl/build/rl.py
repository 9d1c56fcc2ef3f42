"""Runs of reinforcement learning: one function an algorithm, and what all of them share."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from llmrl.algorithms.grpo import GRPO
from llmrl.algorithms.ppo import PPO
from llmrl.build.actors import Actor, load_actor, reference_of
from llmrl.build.checks import Checked
from llmrl.build.critics import load_networks
from llmrl.build.engines import build_engine, check_room, load_for_sampling
from llmrl.build.rewards import Rewards
from llmrl.build.rows import EVALUATION, tell_dropped
from llmrl.config import GRPORun, PPORun, RLRun
from llmrl.data.prompts import PromptSource, encode_prompts
from llmrl.data.rerender import same_tokens
from llmrl.distributed.collectives import OneProcess
from llmrl.distributed.trainable import LocalTrainable
from llmrl.experience import Prompts
from llmrl.reports.samples import SampleWriter
from llmrl.reports.trackers import Trackers
from llmrl.roles import Algorithm, Policy, Progress, RolloutEngine, Trainable
from llmrl.rollout.support import position_limit
from llmrl.settings import to_dict
from llmrl.trainers.evaluate import Evaluator
from llmrl.trainers.rl import RLTrainer
from llmrl.trainers.run import Run

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def build_grpo(config: GRPORun, checked: Checked, *, progress: Progress, trackers: Trackers) -> Run:
    """A run of GRPO, ready to train."""
    actor = _load_actor(config)
    algorithm = GRPO(
        config.algorithm,
        actor=actor.policy,
        reference=_reference_of(actor, config, kl_coef=config.algorithm.kl_coef),
        max_response_tokens=config.rollout.max_response_tokens,
    )
    trained = {"actor": LocalTrainable(actor.module, config.optimizer, num_steps=config.num_optimizer_steps)}
    readers = {"the model": actor.model}
    return _build_run(config, checked, actor, algorithm, trained, readers, progress=progress, trackers=trackers)


def build_ppo(config: PPORun, checked: Checked, *, progress: Progress, trackers: Trackers) -> Run:
    """A run of PPO, ready to train."""
    actor = _load_actor(config)
    reference = _reference_of(actor, config, kl_coef=config.algorithm.kl_coef)
    networks = load_networks(config, actor)
    algorithm = PPO(
        config.algorithm,
        networks=networks.both,
        reference=reference,
        max_response_tokens=config.rollout.max_response_tokens,
        warmup_iterations=config.critic.warmup_iterations,
        value_coef=config.critic.value_coef,
        collectives=OneProcess(),
    )
    trained, readers = networks.trained, {"the model": actor.model, "the critic": networks.critic}
    return _build_run(config, checked, actor, algorithm, trained, readers, progress=progress, trackers=trackers)


def build_evaluator(config: RLRun, checked: Checked, *, progress: Progress) -> Evaluator:
    """An evaluation of the model that a recipe names, without anything that trains."""
    tokenizer, model = load_for_sampling(config.model)
    engine = build_engine(config.rollout, model, tokenizer, dtype=model.dtype, progress=progress)
    rewards = Rewards(config.reward, checked.functions, tokenizer)
    return _evaluator(config, checked, tokenizer, model, engine, rewards, progress)


def _load_actor(config: RLRun) -> Actor:
    return load_actor(
        config.model,
        temperature=config.rollout.temperature,
        microbatch_tokens=config.update.microbatch_tokens,
        seed=config.run.seed,
    )


def _reference_of(actor: Actor, config: RLRun, *, kl_coef: float) -> Policy | None:
    """Where a nat has its price, and where a reference takes no memory: then the KL is measured all the same."""
    if kl_coef == 0 and actor.adapted is None:
        return None
    return reference_of(actor, microbatch_tokens=config.update.microbatch_tokens)


def _build_run(
    config: RLRun,
    checked: Checked,
    actor: Actor,
    algorithm: Algorithm,
    trained: Mapping[str, Trainable],
    readers: Mapping[str, "PreTrainedModel"],
    *,
    progress: Progress,
    trackers: Trackers,
) -> Run:
    """A run of any algorithm: all that is left is the same for each. `readers` are the models that train."""
    for warning in config.warnings():
        progress.message(f"warning: {warning}")
    assert checked.rows is not None, "only a dry run may leave rows unread"
    prompts = PromptSource(checked.rows, actor.tokenizer, config.data, seed=config.run.seed)
    tell_dropped(prompts.num_dropped, "data", "max_prompt_tokens", progress)
    engine = build_engine(config.rollout, actor.model, actor.tokenizer, dtype=actor.dtype, progress=progress)
    rewards = Rewards(config.reward, checked.functions, actor.tokenizer, actor.adapted)
    readers = {**readers, **_scorer_of(rewards)}
    if any(position_limit(model) is not None for model in readers.values()):
        check_room(readers, _one_epoch(prompts), config.rollout)
    trainer = RLTrainer(
        algorithm=algorithm,
        engine=engine,
        reward=rewards.on(config.data, checked.rows),
        prompts=prompts,
        trained=trained,
        update=config.update,
        prompts_per_iteration=config.rollout.prompts_per_iteration,
        group_size=config.algorithm.group_size,
        temperature=config.rollout.temperature,
        seed=config.run.seed,
        collectives=OneProcess(),
        progress=progress,
        observe=SampleWriter(
            Path(config.run.output_dir) / "samples.jsonl",
            num_samples=config.run.samples_per_iteration,
            decode=lambda ids: str(actor.tokenizer.decode(ids)),
        ),
    )
    evaluator = None
    if config.evaluation.every:
        evaluator = _evaluator(config, checked, actor.tokenizer, actor.model, engine, rewards, progress)
    run = Run(
        config.run,
        settings=to_dict(config),
        trainer=trainer,
        save_model=actor.save,
        evaluate=evaluator.evaluate if evaluator is not None else None,
        evaluate_every=config.evaluation.every,
        progress=progress,
        sink=trackers,
    )
    run.warmup_iterations = config.warmup_iterations
    return run


def _scorer_of(rewards: Rewards) -> dict[str, "PreTrainedModel"]:
    """The reward model where it reads the policy's own tokens; of others the length is not known before."""
    if rewards.scorer is None or not same_tokens(rewards.tokenizer, rewards.scorer.tokenizer):
        return {}
    return {"the reward model": rewards.scorer.scorer.module.model}  # type: ignore[dict-item]


def _one_epoch(source: PromptSource) -> Prompts:
    """Every prompt of the source, which then stands where it stood."""
    place = source.state_dict()
    prompts = source.next(source.num_rows)
    source.load_state_dict(place)
    return prompts


def _evaluator(
    config: RLRun,
    checked: Checked,
    tokenizer: "PreTrainedTokenizerBase",
    model: "PreTrainedModel",
    engine: RolloutEngine,
    rewards: Rewards,
    progress: Progress,
) -> Evaluator:
    assert config.evaluation_data is not None, "an evaluation needs prompts"
    assert checked.evaluation_rows is not None, "an evaluation needs prompts"
    prompts, num_dropped = encode_prompts(checked.evaluation_rows, tokenizer, config.evaluation_data)
    tell_dropped(num_dropped, EVALUATION, "max_prompt_tokens", progress)
    check_room({"the model": model, **_scorer_of(rewards)}, prompts, config.rollout)
    return Evaluator(
        config.evaluation,
        engine=engine,
        reward=rewards.on(config.evaluation_data, checked.evaluation_rows),
        prompts=prompts,
        criterion=config.reward.labels[0],
        max_response_tokens=config.rollout.max_response_tokens,
        seed=config.run.seed,
        progress=progress,
    )
