"""Supervised runs."""

from collections.abc import Iterator, Sequence

from llmrl.batches import Row, Sequences
from llmrl.config import SFTRun
from llmrl.data.config import ConversationsConfig
from llmrl.data.supervised import SupervisedSource
from llmrl.distributed.context import Context
from llmrl.distributed.roles import DistributedPolicy
from llmrl.models.loaded import Actor
from llmrl.models.saving import Saver
from llmrl.models.vocabulary import check_ids
from llmrl.optim.factory import make_trainable
from llmrl.reports.trackers import Trackers
from llmrl.trainers.alarms import Alarms
from llmrl.trainers.batch import BatchTrainer
from llmrl.trainers.run import Run
from llmrl.trainers.sft import SFTObjective
from llmrl.wiring.actors import load_actor
from llmrl.wiring.cards import card_of
from llmrl.wiring.checks import Checked
from llmrl.wiring.contents import recorded_settings
from llmrl.wiring.precision import precision_warnings
from llmrl.wiring.rows import EVALUATION, report_dropped
from llmrl.wiring.trunks import budget_of, report_padding


def build_sft(config: SFTRun, checked: Checked, context: Context, trackers: Trackers) -> Run:
    """A supervised run, ready to train."""
    assert checked.rows is not None, "only a dry run may leave rows unread"
    progress = context.progress
    checked.report_notes(progress)
    actor = load_actor(
        config.model,
        context.loading_device,
        temperature=1.0,
        longest=config.longest_sequence,
        seed=config.run.seed,
    )
    for warning in (*actor.warnings, *precision_warnings(actor.model, actor.dtype)):
        progress.message(f"warning: {warning}")
    examples = SupervisedSource(checked.rows, actor.tokenizer, config.data, seed=config.run.seed)
    report_dropped(examples.num_dropped, "data", "max_tokens", progress)
    check_ids(config.data.path, _ids(examples), actor.model, actor.tokenizer)
    saver = Saver(actor.model, actor.adapted, actor.tokenizer, dtype=actor.dtype, context=context)
    trained = make_trainable(actor.policy, config.optimizer, num_steps=config.run.num_iterations, context=context)
    budget = budget_of([actor.model], config.sft.microbatch_tokens, actor.dtype, context.device, section="sft")
    report_padding(budget, config.model, progress)
    policy = DistributedPolicy(actor.policy, context, budget=budget)
    trainer = BatchTrainer(
        objective=SFTObjective(policy),
        trained={"actor": trained},
        source=examples,
        held_out=_held_out(config.evaluation_data, checked.evaluation_rows, actor, context),
        batch_size=config.sft.batch_size,
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
        evaluate=trainer.evaluate if config.evaluation_data is not None else None,
        evaluate_every=config.sft.evaluate_every,
        context=context,
        sink=trackers,
        alarms=Alarms(),
        warmup_iterations=0,
    )


def _held_out(
    config: ConversationsConfig | None, rows: Sequence[Row] | None, actor: Actor, context: Context
) -> Sequences | None:
    if config is None or rows is None:
        return None
    examples = SupervisedSource(rows, actor.tokenizer, config, seed=0)
    report_dropped(examples.num_dropped, EVALUATION, "max_tokens", context.progress)
    check_ids(config.path, _ids(examples), actor.model, actor.tokenizer)
    return examples.next(examples.num_rows).to(context.device)


def _ids(source: SupervisedSource) -> Iterator[list[int]]:
    return (ids for prompt, response, _ in source.examples for ids in (prompt, response))
