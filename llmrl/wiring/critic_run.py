"""Runs that train a critic on scored responses."""

from collections.abc import Sequence

from llmrl.batches import Row
from llmrl.config import CriticRun
from llmrl.data.config import ScoredDataConfig
from llmrl.data.scored import ScoredSource
from llmrl.distributed.context import Context
from llmrl.distributed.roles import DistributedValues
from llmrl.models.critic import TransformersValueFunction, ValueModule
from llmrl.models.critic_folder import CriticSaver
from llmrl.models.loaded import Actor
from llmrl.models.vocabulary import check_ids
from llmrl.optim.factory import make_trainable
from llmrl.reports.trackers import Trackers
from llmrl.trainers.alarms import Alarms
from llmrl.trainers.batch import BatchTrainer
from llmrl.trainers.critic import CriticObjective
from llmrl.trainers.run import Run
from llmrl.wiring.actors import load_actor
from llmrl.wiring.cards import card_of
from llmrl.wiring.checks import Checked
from llmrl.wiring.contents import recorded_settings
from llmrl.wiring.critics import load_critic
from llmrl.wiring.precision import precision_warnings
from llmrl.wiring.rows import EVALUATION, report_dropped
from llmrl.wiring.trunks import budget_of, report_padding


def build_critic(config: CriticRun, checked: Checked, context: Context, trackers: Trackers) -> Run:
    """A run that trains a critic. The policy that it is for is loaded to begin from, and does not learn."""
    assert checked.rows is not None, "only a dry run may leave rows unread"
    progress = context.progress
    checked.report_notes(progress)
    actor = load_actor(
        config.model, context.loading_device, temperature=1.0, longest=config.longest_sequence, seed=config.run.seed
    )
    for warning in (*actor.warnings, *precision_warnings(actor.model, actor.dtype)):
        progress.message(f"warning: {warning}")
    critic = load_critic(config, actor, network="own" if config.model.lora is None else "adapter")
    responses = _source(config.data, checked.rows, actor, context, seed=config.run.seed, section="data")
    held_out = None
    if config.evaluation_data is not None and checked.evaluation_rows is not None:
        source = _source(config.evaluation_data, checked.evaluation_rows, actor, context, seed=0, section=EVALUATION)
        held_out = source.next(source.num_rows).to(context.device)
    saver = CriticSaver(critic, actor.tokenizer, context=context)
    value = TransformersValueFunction(ValueModule(critic.trunk, critic.head, dtype=actor.dtype))
    trained = make_trainable(value, config.optimizer, num_steps=config.run.num_iterations, context=context)
    budget = budget_of([critic.trunk], config.critic.microbatch_tokens, actor.dtype, context.device, section="critic")
    report_padding(budget, config.model, progress)
    trainer = BatchTrainer(
        objective=CriticObjective(DistributedValues(value, context, budget=budget), gamma=config.critic.gamma),
        trained={"critic": trained},
        source=responses,
        held_out=held_out,
        batch_size=config.critic.batch_size,
        budget=budget,
        context=context,
    )
    return Run(
        config.run,
        samples=None,
        settings=recorded_settings(config),
        contents=checked.contents,
        card=card_of(config, checked),
        trainer=trainer,
        save_model=lambda folder: saver.save(folder, trained),
        evaluate=trainer.evaluate if held_out is not None else None,
        evaluate_every=config.critic.evaluate_every,
        context=context,
        sink=trackers,
        alarms=Alarms(critic_optimizer="optimizer"),
        warmup_iterations=0,
    )


def _source(
    config: ScoredDataConfig, rows: Sequence[Row], actor: Actor, context: Context, *, seed: int, section: str
) -> ScoredSource:
    source = ScoredSource(rows, actor.tokenizer, config, seed=seed)
    report_dropped(source.dropped, section, "max_tokens", context.progress)
    check_ids(config.path, (ids for example, _ in source.examples for ids in example), actor.model, actor.tokenizer)
    return source
