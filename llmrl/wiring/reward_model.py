"""Runs that train a reward model."""

from collections.abc import Mapping
from pathlib import Path

import torch

from llmrl.batches import Sequences
from llmrl.config import RewardModelRun
from llmrl.data.config import PairsConfig
from llmrl.data.files import DataError
from llmrl.data.preferences import OF_TOKENS, PairSource
from llmrl.distributed.context import Context
from llmrl.distributed.roles import DistributedScorer
from llmrl.models.config import ModelConfig
from llmrl.models.loaded import LoadedRewardModel
from llmrl.models.loading import load_tokenizer
from llmrl.models.reward_checks import END_CHECK, sanity_checks
from llmrl.models.reward_loading import adapt, choose_pad, load_reward_model
from llmrl.models.reward_model import RewardModule, TransformersRewardModel
from llmrl.models.reward_record import Normalization, TextForm
from llmrl.models.saving import Saver
from llmrl.models.training import ready_to_train
from llmrl.models.vocabulary import check_ids, check_vocabulary
from llmrl.optim.factory import make_trainable
from llmrl.reports.report_card import Card, PairResults, make_report_card
from llmrl.reports.trackers import Trackers
from llmrl.roles import Scorer
from llmrl.rollout.support import position_limit
from llmrl.trainers.alarms import Alarms
from llmrl.trainers.batch import BatchTrainer
from llmrl.trainers.config import RewardModelConfig, RunConfig
from llmrl.trainers.reward_model import RewardModelObjective
from llmrl.trainers.run import Run
from llmrl.wiring.cards import card_of
from llmrl.wiring.checks import Checked
from llmrl.wiring.contents import recorded_settings
from llmrl.wiring.precision import dtype_of, precision_warnings
from llmrl.wiring.trunks import budget_of, report_padding, settle_passes

PAD_NOTE = (
    "pad equals EOS and the vocabulary has no known spare token: plain transformers reads the score one token before "
    "the end, llmrl at the end"
)


def load_trained_reward_model(
    config: ModelConfig, settings: RewardModelConfig, device: torch.device, *, seed: int, longest: int = 0
) -> LoadedRewardModel:
    """The reward model to be trained, on this device. `longest`: tokens of a prompt with one response, if known."""
    tokenizer = load_tokenizer(config)
    torch.manual_seed(seed)  # a new head and fresh adapters: everything later draws from streams of its own
    model = load_reward_model(config, head_init=settings.head_init)
    check_vocabulary(config, model, tokenizer)
    has_own_pad = choose_pad(tokenizer, model)
    adapted = adapt(model, config)
    ready_to_train(model, device, gradient_checkpointing=config.gradient_checkpointing)
    _, warnings = settle_passes(model, longest, packing=config.packing)
    module = RewardModule(model, dtype=dtype_of(config))
    scorer = TransformersRewardModel(module)
    return LoadedRewardModel(
        model=model,
        adapted=adapted,
        tokenizer=tokenizer,
        module=module,
        scorer=scorer,
        has_own_pad=has_own_pad,
        warnings=warnings,
    )


def build_reward_model(config: RewardModelRun, checked: Checked, context: Context, trackers: Trackers) -> Run:
    """A run that trains a reward model. Each saved model has its report card beside it."""
    assert checked.rows is not None, "only a dry run may leave rows unread"
    assert checked.evaluation_rows is not None, "only a dry run may leave rows unread"
    progress = context.progress
    checked.report_notes(progress)
    settings, longest = config.reward_model, config.longest_sequence
    loaded = load_trained_reward_model(
        config.model, settings, context.loading_device, seed=config.run.seed, longest=longest
    )
    for warning in (*loaded.warnings, *precision_warnings(loaded.model, loaded.module.dtype)):
        progress.message(f"warning: {warning}")
    pairs = PairSource(checked.rows, loaded.tokenizer, config.data, seed=config.run.seed)
    held_out = PairSource(checked.evaluation_rows, loaded.tokenizer, config.evaluation_data, seed=config.run.seed)
    for section, source, data in (
        ("data", pairs, config.data),
        ("evaluation_data", held_out, config.evaluation_data),
    ):
        for line in source.counts.lines(OF_TOKENS):  # the others are in the notes
            progress.message(f"{section}: {line}")
        _check_positions(source, data, section, limit=position_limit(loaded.model))
        ids = (ids for pair in source.examples for ids in (pair.prompt_ids, pair.chosen_ids, pair.rejected_ids))
        check_ids(data.path, ids, loaded.model, loaded.tokenizer)
    if not loaded.has_own_pad:
        progress.message(PAD_NOTE)
    data = config.data
    text_form = TextForm(
        template=data.template, system_prompt=data.system_prompt, chat_template_kwargs=data.chat_template_kwargs
    )
    text_form.write(loaded.model.config)
    reference = pairs.evenly_spaced(settings.num_reference_pairs).to(context.device)
    num_iterations = max(settings.num_epochs * pairs.num_rows // settings.batch_size, 1)
    saver = Saver(
        loaded.model,
        loaded.adapted,
        loaded.tokenizer,
        dtype=torch.float32,  # so that the folder scores as the model that was trained
        context=context,
    )
    trained = make_trainable(loaded.scorer, config.optimizer, num_steps=num_iterations, context=context)
    budget = budget_of(
        [loaded.model], settings.microbatch_tokens, loaded.module.dtype, context.device, section="reward_model"
    )
    report_padding(budget, config.model, progress)
    scorer = DistributedScorer(loaded.scorer, context, budget=budget)
    trainer = BatchTrainer(
        objective=RewardModelObjective(settings, scorer=scorer),
        trained={"reward_model": trained},
        source=pairs,
        held_out=held_out.all().to(context.device),
        batch_size=settings.batch_size,
        budget=budget,
        context=context,
    )

    def save(folder: Path) -> None:
        progress.phase("report card", 1)
        normalization = loaded.normalize(reference, scorer)
        card = _report_card(
            loaded,
            trainer,
            scorer,
            sources=held_out.sources,
            counts={"data": pairs.counts.numbers(), "evaluation_data": held_out.counts.numbers()},
            may_be_truncated=config.evaluation_data.truncate,
            normalization=normalization,
        )
        saver.save(folder, trained, {"report_card.json": card})

    return Run(
        RunConfig(num_iterations=num_iterations, **vars(config.run)),
        samples=None,
        settings=recorded_settings(config),
        contents=checked.contents,
        card=card_of(config, checked),
        trainer=trainer,
        save_model=save,
        evaluate=trainer.evaluate,
        evaluate_every=settings.evaluate_every,
        context=context,
        sink=trackers,
        alarms=Alarms(),
        warmup_iterations=0,
    )


def _check_positions(source: PairSource, data: PairsConfig, section: str, *, limit: int | None) -> None:
    """Refuses sequences longer than a table of absolute positions."""
    if limit is not None and source.longest > limit:
        raise DataError(
            f"{data.path}: a sequence of {source.longest} tokens exceeds the {limit} positions of the model; "
            f"set {section}.max_tokens ({data.max_tokens}) to at most {limit}"
        )


def _report_card(
    loaded: LoadedRewardModel,
    trainer: BatchTrainer,
    scorer: Scorer,
    *,
    sources: tuple[str | None, ...],
    counts: Mapping[str, Mapping[str, int]],
    may_be_truncated: bool,
    normalization: Normalization,
) -> Card:
    (chosen, rejected), pairs = trainer.held_out_outputs()
    notes = [] if loaded.has_own_pad else [PAD_NOTE]
    both = Sequences.cat([pairs.chosen, pairs.rejected])
    checks = sanity_checks(scorer, both, loaded.tokenizer, dtype=loaded.module.dtype)
    if may_be_truncated and not checks[END_CHECK]:
        del checks[END_CHECK]
        notes.append(
            "evaluation_data.truncate truncated some responses, which are scored at their last token, not at an EOS"
        )
    return make_report_card(
        PairResults(
            chosen_scores=chosen,
            rejected_scores=rejected,
            chosen_lengths=pairs.chosen.response_lengths,
            rejected_lengths=pairs.rejected.response_lengths,
            sources=sources,
        ),
        loss=trainer.evaluate()["eval/loss"],
        counts=counts,
        checks=checks,
        normalization=(normalization.mean, normalization.std),
        notes=notes,
    )
