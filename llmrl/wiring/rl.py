"""Runs of reinforcement learning: one function an algorithm, and what all of them share."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from llmrl.algorithms.grpo import GRPO
from llmrl.algorithms.ppo import PPO
from llmrl.algorithms.user_functions import make_user_algorithm
from llmrl.batches import Prompts
from llmrl.config import GRPORun, PPORun, RLRun
from llmrl.data.prompts import PromptSource, encode_prompts
from llmrl.data.rerender import same_tokens
from llmrl.distributed.collectives import join_ranks
from llmrl.distributed.sharing import DistributedEngine, DistributedNetworks, DistributedPolicy
from llmrl.models.vocabulary import check_ids
from llmrl.optim.factory import make_trainable
from llmrl.reports.samples import SampleWriter
from llmrl.reports.trackers import Trackers
from llmrl.roles import Algorithm, Collectives, Policy, Progress, RolloutEngine, Trainable
from llmrl.rollout.rope import pin_rope
from llmrl.rollout.support import position_limit
from llmrl.settings import to_dict
from llmrl.trainers.alarms import Alarms
from llmrl.trainers.evaluate import Evaluator
from llmrl.trainers.rl import RLTrainer
from llmrl.trainers.run import Run
from llmrl.wiring.actors import Actor, load_actor, reference_of
from llmrl.wiring.checks import Checked
from llmrl.wiring.critics import load_networks
from llmrl.wiring.engines import build_engine, check_room, load_for_sampling
from llmrl.wiring.passes import check_sampling
from llmrl.wiring.precision import precision_warnings, with_dtypes
from llmrl.wiring.rewards import Rewards
from llmrl.wiring.rows import EVALUATION, tell_dropped
from llmrl.wiring.saving import Saver

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def build_grpo(config: GRPORun, checked: Checked, *, progress: Progress, trackers: Trackers) -> Run:
    """A run of GRPO, ready to train."""
    actor, collectives = _load_actor(config), join_ranks()
    reference = _reference_of(actor, config, collectives)
    whole = _around(actor, config, checked, collectives, progress)
    trained = {
        "actor": make_trainable(
            actor.policy, config.optimizer, num_steps=config.num_optimizer_steps, collectives=collectives
        )
    }
    name = config.algorithm.name
    make = GRPO if name == "grpo" else partial(make_user_algorithm, name)
    algorithm = make(
        config.algorithm,
        actor=DistributedPolicy(actor.policy, collectives, microbatch_tokens=config.update.microbatch_tokens),
        reference=reference,
        max_response_tokens=config.rollout.max_response_tokens,
    )
    readers = {"the model": actor.model}
    return _build_run(config, checked, whole, algorithm, trained, readers, progress=progress, trackers=trackers)


def build_ppo(config: PPORun, checked: Checked, *, progress: Progress, trackers: Trackers) -> Run:
    """A run of PPO, ready to train."""
    actor, collectives = _load_actor(config), join_ranks()
    networks = load_networks(config, actor)
    reference = _reference_of(actor, config, collectives)
    whole = _around(actor, config, checked, collectives, progress)
    trained = networks.train(config, collectives)
    algorithm = PPO(
        config.algorithm,
        networks=DistributedNetworks(networks.both, collectives, microbatch_tokens=config.update.microbatch_tokens),
        reference=reference,
        max_response_tokens=config.rollout.max_response_tokens,
        warmup_iterations=config.critic.warmup_iterations,
        value_coef=config.critic.value_coef,
    )
    readers = {"the model": actor.model, "the critic": networks.critic}
    return _build_run(config, checked, whole, algorithm, trained, readers, progress=progress, trackers=trackers)


def build_evaluator(config: RLRun, checked: Checked, *, progress: Progress) -> Evaluator:
    """An evaluation of the model that a recipe names, without anything that trains."""
    checked.tell(progress)
    tokenizer, model = load_for_sampling(config.model)
    if warning := pin_rope(model, config.longest_sequence):
        progress.message(warning)
    collectives = join_ranks()
    engine = build_engine(config.rollout, model, tokenizer, dtype=model.dtype, progress=progress)
    engine = DistributedEngine(engine, collectives)
    rewards = Rewards(
        config.reward, checked.functions, tokenizer, config.distributed, collectives, longest=config.longest_sequence
    )
    return _evaluator(config, checked, tokenizer, model, engine, rewards, progress)


@dataclass(frozen=True, kw_only=True)
class Whole:
    """What is made of whole weights, before they are split over ranks."""

    collectives: Collectives
    actor: Actor
    engine: RolloutEngine
    rewards: Rewards
    saver: Saver


def _load_actor(config: RLRun) -> Actor:
    return load_actor(
        config.model,
        temperature=config.rollout.temperature,
        microbatch_tokens=config.update.microbatch_tokens,
        longest=config.longest_sequence,
        seed=config.run.seed,
    )


def _around(actor: Actor, config: RLRun, checked: Checked, collectives: Collectives, progress: Progress) -> Whole:
    progress.phase("start", 1)  # which takes a while where the model is large
    check_sampling(actor, config.rollout)
    engine = build_engine(
        config.rollout, actor.model, actor.tokenizer, dtype=actor.dtype, progress=progress, trains=True
    )
    return Whole(
        collectives=collectives,
        actor=actor,
        engine=DistributedEngine(engine, collectives),
        rewards=Rewards(
            config.reward,
            checked.functions,
            actor.tokenizer,
            config.distributed,
            collectives,
            actor.adapted,
            longest=config.longest_sequence,
        ),
        saver=Saver(actor.model, actor.adapted, actor.tokenizer, dtype=actor.dtype, collectives=collectives),
    )


def _reference_of(actor: Actor, config: GRPORun | PPORun, collectives: Collectives) -> Policy | None:
    """Where a nat has its price, and where a reference takes no memory: then the KL is measured all the same."""
    if config.algorithm.kl_coef == 0 and actor.adapted is None:
        return None
    reference = reference_of(actor, config.distributed, collectives)
    return DistributedPolicy(reference, collectives, microbatch_tokens=config.update.microbatch_tokens)


def _build_run(
    config: RLRun,
    checked: Checked,
    whole: Whole,
    algorithm: Algorithm,
    trained: Mapping[str, Trainable],
    readers: Mapping[str, "PreTrainedModel"],
    *,
    progress: Progress,
    trackers: Trackers,
) -> Run:
    """A run of any algorithm: all that is left is the same for each. `readers` are the models that train."""
    actor, engine, rewards, collectives = whole.actor, whole.engine, whole.rewards, whole.collectives
    checked.tell(progress)
    for warning in (*config.warnings(), *actor.warnings, *precision_warnings(actor.model, actor.dtype)):
        progress.message(f"warning: {warning}")
    assert checked.rows is not None, "only a dry run may leave rows unread"
    prompts = PromptSource(checked.rows, actor.tokenizer, config.data, seed=config.run.seed)
    tell_dropped(prompts.num_dropped, "data", "max_prompt_tokens", progress)
    check_ids(config.data.path, (ids for _, ids in prompts.examples), actor.model, actor.tokenizer)
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
        collectives=collectives,
        progress=progress,
        observe=SampleWriter(
            config.run.folder / "samples.jsonl",
            num_samples=config.run.samples_per_iteration if collectives.is_first else 0,
            decode=lambda ids: str(actor.tokenizer.decode(ids)),
        ),
    )
    evaluator = None
    if config.evaluates:
        evaluator = _evaluator(config, checked, actor.tokenizer, actor.model, engine, rewards, progress)
    return Run(
        config.run,
        settings=to_dict(with_dtypes(config)),
        trainer=trainer,
        save_model=lambda folder: whole.saver.save(folder, trained["actor"]),
        evaluate=evaluator.evaluate if evaluator is not None else None,
        evaluate_every=config.evaluation.every,
        collectives=collectives,
        progress=progress,
        sink=trackers,
        alarms=Alarms(str(actor.dtype).removeprefix("torch.")),
        warmup_iterations=config.warmup_iterations,
    )


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
    check_ids(config.evaluation_data.path, prompts.ids.tolist(), model, tokenizer)
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
