"""Checks of a run before any weights load: reads the launch, the rows, the configs and tokenizers of the models, and
the code of users, and refuses what would fail later."""

import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import chdir, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from llmrl.algorithms.user_algorithm import check_user_algorithm
from llmrl.algorithms.user_functions import check_user_functions
from llmrl.config import AnyRun, CriticRun, PPORun, RewardModelRun, RLRun, SFTRun, command_for
from llmrl.data.config import DataConfig
from llmrl.data.files import Rows
from llmrl.data.mixture import keep_in_each, mix, sets_of
from llmrl.data.preferences import keep_pairs_in_template, read_preference_rows
from llmrl.data.prompts import keep_prompts_in_template, read_prompt_rows
from llmrl.data.rerender import same_ids
from llmrl.data.rows import column_names, keep_usable, read_rows
from llmrl.data.scored import read_scored_rows
from llmrl.data.supervised import keep_examples_in_template, read_supervised_rows
from llmrl.distributed.launch import Launch, LaunchError, check_mixed_precision, read_launch
from llmrl.models.checking import causal_class, check_critic, check_model, check_reward_model
from llmrl.models.config import ModelConfig
from llmrl.models.experts import check_balance
from llmrl.models.folders import ModelError, is_adapter
from llmrl.models.loading import load_tokenizer
from llmrl.models.reward_loading import check_shared_base
from llmrl.reports.trackers import Trackers
from llmrl.rewards.config import RewardConfig
from llmrl.rewards.loading import Function, required_columns, row_problem
from llmrl.rewards.worker import Worker
from llmrl.roles import Progress, RolloutEngine
from llmrl.rollout.support import check_cache
from llmrl.trainers.changes import check_same_run
from llmrl.trainers.run import check_output
from llmrl.wiring.contents import contents_of, recorded_settings
from llmrl.wiring.environments import CheckedEnvironment, check_environment, try_start
from llmrl.wiring.precision import default_dtype
from llmrl.wiring.rows import EVALUATION, read_section

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

C = TypeVar("C", bound=DataConfig)


@dataclass(frozen=True, kw_only=True)
class Checked:
    """Results of the checks that building uses again: rows, reward functions. None: could not be read yet."""

    rows: Rows | None
    evaluation_rows: Rows | None
    functions: tuple[Function, ...]
    unchecked: list[str]
    """Sentences on what could not be checked."""
    knows_models: bool
    """Whether every model of the run was there to be checked."""
    contents: Mapping[str, str]
    """Digests of what the run reads, by the setting that names it; empty where nothing trains."""
    environment: CheckedEnvironment | None = None
    """What answers the actor; None: nothing does."""
    engine: RolloutEngine | None = None
    """The engine that a program hands over; None: the one that the settings name."""

    @property
    def notes(self) -> list[str]:
        """Sentences on rows that were dropped, and on what training reads differently from the data."""
        sections = {"data": self.rows, EVALUATION: self.evaluation_rows}
        return [f"{section}: {note}" for section, rows in sections.items() if rows is not None for note in rows.notes]

    def report_notes(self, progress: Progress) -> None:
        """Reports the notes."""
        for note in self.notes:
            progress.message(note)


def check_sft(config: SFTRun, *, dry: bool) -> Checked:
    """Checks a supervised run. A dry one may name what does not exist yet; see `read_section`."""
    return _check_batches(config, read_supervised_rows, keep_examples_in_template, dry=dry)


def check_reward_run(config: RewardModelRun, *, dry: bool) -> Checked:
    """Checks the training of a reward model."""
    return _check_batches(config, read_preference_rows, keep_pairs_in_template, dry=dry, needs_head=False)


def check_critic_run(config: CriticRun, *, dry: bool) -> Checked:
    """Checks the training of a critic on scored responses."""
    _check_whole_base(config, read_launch())
    return _check_batches(config, read_scored_rows, keep_examples_in_template, dry=dry)


def _check_batches(
    config: SFTRun | RewardModelRun | CriticRun,
    read: Callable[[C], Rows],
    keep: "Callable[[Rows, PreTrainedTokenizerBase, C], Rows]",
    *,
    dry: bool,
    needs_head: bool | None = None,
) -> Checked:
    """Checks a run that learns from batches of data; `read` reads the rows, `keep` keeps those that
    the model's chat template takes."""
    _check_quantized(config, read_launch())
    _check_precision(config)
    check_output(config.run, _inputs(config))
    made_by = command_for(config.model.path, config)
    unchecked = _check_model(config.model, dry=dry, made_by=made_by, needs_head=needs_head)
    knows_models = not unchecked
    rows_of: Callable[..., Rows | None] = _reader(read, keep, config, unchecked, dry=dry)
    rows = rows_of(config.data, "data")
    evaluation_rows = None if config.evaluation_data is None else rows_of(config.evaluation_data, EVALUATION)
    Trackers(config.trackers, output_dir=Path(config.run.output_dir))
    return Checked(
        rows=rows,
        evaluation_rows=evaluation_rows,
        functions=(),
        unchecked=unchecked,
        knows_models=knows_models,
        contents=_compared(config, rows, evaluation_rows, ()) if knows_models else {},
    )


def check_rl(config: RLRun, *, dry: bool, trains: bool = True, engine: RolloutEngine | None = None) -> Checked:
    """Checks a run of any algorithm, or, where it trains nothing, an evaluation of its model.

    `engine`: in place of the one that the settings name.
    """
    _check_precision(config)
    if trains:
        launch = read_launch()
        _check_one_base(config, launch)
        _check_quantized(config, launch)
        _check_heads(config, launch)
        _check_averages(config)
        _check_bias(config, launch)
        _check_auxiliary(config, launch)
        with chdir(os.curdir):  # a file of a user that changes the working directory does so for itself
            check_user_functions(config.algorithm)
            check_user_algorithm(config.algorithm)
    unchecked = _check_model(config.model, dry=dry, made_by=command_for(config.model.path, config))
    knows_actor = not (dry and unchecked)
    if engine is None and not unchecked:
        _check_engine(config)
    if trains and not unchecked:
        _check_balance(config)
    rows_of = _prompt_reader(config, unchecked, dry=dry)
    environment = None
    if config.environment is not None:
        tokenizer = load_tokenizer(config.model) if knows_actor else None
        environment = check_environment(config.environment, tokenizer, config.data)
    if config.reward.model is not None:
        made_by = command_for(config.reward.model.path, config)
        missing = check_scorer(reward_model_config(config), dry=dry, made_by=made_by)
        if trains and config.reward.model.on_actor_base and not (dry and missing):
            with naming("reward.model"):
                check_shared_base(reward_model_config(config), config.model)
        unchecked += missing
    if trains and isinstance(config, PPORun) and config.critic.path is not None:
        unchecked += _check_kept_critic(config, config.critic.path, dry=dry, knows_actor=knows_actor)
    knows_models = not unchecked
    if trains:
        inputs = _inputs(config)
        if config.reward.model is not None:
            inputs["reward.model.path"] = config.reward.model.path
        check_output(config.run, inputs)
        Trackers(config.trackers, output_dir=Path(config.run.output_dir))
    rows = rows_of(config.data, "data") if trains else None
    evaluation_rows = None
    if config.evaluation_data is not None and (config.evaluates or not trains):
        evaluation_rows = rows_of(config.evaluation_data, EVALUATION)
    elif config.evaluation_data is not None:
        unchecked.append(f"{EVALUATION}.path ({config.evaluation_data.path}), which only llmrl evaluate will read")
    if environment is not None and (known := rows or evaluation_rows):
        try_start(environment, known, config.data.prompt_column)
    functions: tuple[Function, ...] = ()
    if config.reward.functions and (rows is not None or evaluation_rows is not None):
        worker = Worker(config.reward)
        functions = worker.load()
        if rows is not None:
            rows = _scorable(config.reward, worker, functions, rows, config.data)
        if config.evaluation_data is not None and evaluation_rows is not None:
            evaluation_rows = _scorable(config.reward, worker, functions, evaluation_rows, config.evaluation_data)
    if config.reward.functions and rows is None and evaluation_rows is None:
        unchecked.append("the columns that the reward functions ask for, since there are no rows to look at")
    return Checked(
        rows=rows,
        evaluation_rows=evaluation_rows,
        functions=functions,
        unchecked=unchecked,
        knows_models=knows_models,
        contents=_compared(config, rows, evaluation_rows, functions, environment) if trains and knows_models else {},
        environment=environment,
        engine=engine,
    )


def _prompt_reader(config: RLRun, unchecked: list[str], *, dry: bool) -> Callable[..., Rows | None]:
    """Function that reads the rows of prompts; of an environment, which opens with what it likes, any rows."""
    if config.environment is not None and config.environment.name is not None:
        return _reader(read_rows, lambda rows, *_: rows, config, unchecked, dry=dry)
    return _reader(read_prompt_rows, keep_prompts_in_template, config, unchecked, dry=dry)


def _compared(
    config: AnyRun,
    rows: Rows | None,
    evaluation_rows: Rows | None,
    functions: tuple[Function, ...],
    environment: CheckedEnvironment | None = None,
) -> Mapping[str, str]:
    """Digests of what the run reads, which were compared with those of the run in its folder."""
    host = None if environment is None else environment.host
    contents = contents_of(config, rows=rows, evaluation_rows=evaluation_rows, functions=functions, host=host)
    check_same_run(config.run, recorded_settings(config), contents)
    return contents


def _inputs(config: AnyRun) -> dict[str, str]:
    """Paths that a run reads, by setting."""
    sets = zip(places_of(config.data, "data"), sets_of(config.data), strict=True)
    inputs = {"model.path": config.model.path, **{f"{place}.path": str(each.path) for place, each in sets}}
    if config.evaluation_data is not None:
        inputs["evaluation_data.path"] = str(config.evaluation_data.path)
    if isinstance(config, PPORun) and config.critic.path is not None:
        inputs["critic.path"] = config.critic.path
    return inputs


def _reader(
    read: Callable[[C], Rows],
    keep: "Callable[[Rows, PreTrainedTokenizerBase, C], Rows]",
    run: AnyRun,
    unchecked: list[str],
    *,
    dry: bool,
) -> Callable[[C, str], Rows | None]:
    """Function that reads the rows of a section and keeps those that the model's chat template takes.

    Args:
        unchecked: Sentences on what could not be checked of the model: if there are any in a dry run, every row is
            kept. Gets a sentence for each section that cannot be read yet.
    """
    tokenizer = None if dry and unchecked else load_tokenizer(run.model)

    def set_of(config: C, place: str) -> Rows | None:
        rows = read_section(config, read, unchecked, dry=dry, section=place, made_by=command_for(config.path, run))
        return rows if rows is None or tokenizer is None else keep(rows, tokenizer, config)

    def rows_of(config: C, section: str) -> Rows | None:
        sets = [set_of(each, place) for each, place in zip(sets_of(config), places_of(config, section), strict=True)]
        known = [rows for rows in sets if rows is not None]
        return mix(known, config) if len(known) == len(sets) else None

    return rows_of


def places_of(config: DataConfig, section: str) -> list[str]:
    """Place in the recipe of each set of rows of a section."""
    return [section, *(f"{section}.mixed_with.{number}" for number in range(len(sets_of(config)) - 1))]


def _scorable(
    config: RewardConfig, worker: Worker, functions: tuple[Function, ...], rows: Rows, data: DataConfig
) -> Rows:
    """The rows that have the columns which the reward functions read."""
    worker.check_columns(tuple(column_names(rows)))
    required = required_columns(config, functions)
    problem = partial(row_problem, required=required)
    return keep_in_each(rows, data, lambda part, each: keep_usable(part, each, problem))


def _check_precision(config: AnyRun) -> None:
    check_mixed_precision(config.model.dtype or default_dtype())


def _check_engine(config: RLRun) -> None:
    """Refuses a model whose class or settings say that the native engine cannot decode it."""
    if config.rollout.engine == "native" and (found := causal_class(config.model)) is not None:
        check_cache(*found)


def _check_one_base(config: RLRun, launch: Launch) -> None:
    """Refuses roles that read the actor's own base where no process holds it whole."""
    shared = {
        "reward.model.on_actor_base": config.reward.model is not None and config.reward.model.on_actor_base,
        "critic.network adapter": isinstance(config, PPORun) and config.critic.network == "adapter",
    }
    if launch.splits_weights and any(shared.values()):
        names = " and ".join(name for name, asked in shared.items() if asked)
        raise LaunchError(
            f"{names}: roles on one base need it whole in every process, and the launch splits weights over processes "
            "(ZeRO-3 or FSDP); launch with plain data parallel or ZeRO-2, or set reward.model.on_actor_base to false "
            "and critic.network to own or shared"
        )


def _check_heads(config: RLRun, launch: Launch) -> None:
    """Refuses target heads where no process holds the heads whole that they average."""
    if launch.splits_weights and isinstance(config, PPORun) and config.critic.network == "mtp":
        raise LaunchError(
            "critic.network mtp: its target heads average heads that are whole in every process, and the launch splits "
            "weights over processes (ZeRO-3 or FSDP); launch with plain data parallel or ZeRO-2, or set critic.network "
            "to own or shared"
        )


def _check_whole_base(config: CriticRun, launch: Launch) -> None:
    """Refuses a critic that is an adapter where no process holds its base whole."""
    if launch.splits_weights and config.model.lora is not None:
        raise LaunchError(
            "model.lora: a critic that is an adapter needs its base whole in every process, and the launch splits "
            "weights over processes (ZeRO-3 or FSDP); launch with plain data parallel or ZeRO-2, or set model.lora to "
            "null"
        )


def _check_quantized(config: AnyRun, launch: Launch) -> None:
    """Refuses a quantized base under DeepSpeed or FSDP, which would split, cast or copy 4-bit weights as numbers."""
    if launch.sharding != "none" and config.model.quantization is not None:
        raise LaunchError(
            f"model.quantization ({config.model.quantization}): the launch is by {launch.sharding}, which takes "
            "weights of 4 bits for numbers; launch with plain data parallel, where each process holds the small base, "
            "or leave model.quantization out"
        )


def _check_auxiliary(config: RLRun, launch: Launch) -> None:
    """Refuses auxiliary phases where every optimizer step moves weights without a gradient too: those of the head that
    only these phases train."""
    if isinstance(config, PPORun) and config.algorithm.auxiliary_every is not None and launch.sharding == "deepspeed":
        raise LaunchError(
            f"algorithm.auxiliary_every ({config.algorithm.auxiliary_every}): the optimizers of DeepSpeed step weights "
            "without a gradient too, as the auxiliary head is in iterations of PPO; launch with plain data parallel or "
            "FSDP, or set it to null"
        )


def _check_averages(config: RLRun) -> None:
    """Refuses a reference that averages adapters: the mean of two products is not the product of the means."""
    mixing, is_adapted = (
        config.algorithm.reference_mixing,
        config.model.lora is not None or is_adapter(config.model.path),
    )
    if mixing < 1 and is_adapted:
        raise ModelError(
            f"algorithm.reference_mixing ({mixing}) averages weights, and those of an adapter are products of two "
            "matrices, whose average is none of its rank; set it to 1, which copies the adapter, or train all weights"
        )


def _check_balance(config: RLRun) -> None:
    """Refuses to balance experts that the model does not have."""
    coef, rate = config.algorithm.balance_coef, config.algorithm.balance_bias_rate
    if (coef or rate) and (found := causal_class(config.model)) is not None:
        check_balance(*found, path=config.model.path, bias=rate > 0)


def _check_bias(config: RLRun, launch: Launch) -> None:
    """Refuses to move the bias of routers where others read the same one, or have a copy of it."""
    if not config.algorithm.balance_bias_rate:
        return
    if config.model.lora is not None or is_adapter(config.model.path):
        raise ModelError(
            f"algorithm.balance_bias_rate ({config.algorithm.balance_bias_rate}) moves a bias of the base, which the "
            "reference shares with an adapter, so the reference would move too; set it to 0, or train all weights"
        )
    if launch.splits_weights:
        raise LaunchError(
            f"algorithm.balance_bias_rate ({config.algorithm.balance_bias_rate}) needs the model whole in every "
            "process, and the launch splits weights over processes (ZeRO-3 or FSDP); launch with plain data parallel "
            "or ZeRO-2, or set algorithm.balance_coef in its place"
        )


def check_ppo(config: PPORun, *, dry: bool, engine: RolloutEngine | None = None) -> Checked:
    """Checks a run of PPO: that of any algorithm, and that the critic's body reads the policy's tokens."""
    checked = check_rl(config, dry=dry, engine=engine)
    if config.critic.network == "reward_model":
        if dry and not checked.knows_models:
            checked.unchecked.append("whether the critic's body reads the policy's tokens")
        else:
            cause = f"critic.network {config.critic.network}: "
            _check_tokens(config.model, reward_model_config(config), "reward.model", cause=cause)
    return checked


def _check_kept_critic(config: PPORun, path: str, *, dry: bool, knows_actor: bool) -> list[str]:
    """Checks the critic that `critic.path` names. Returns sentences on what could not be checked."""
    made_by = command_for(path, config)
    if made_by is not None and not Path(path).expanduser().exists():
        if not dry:
            raise ModelError(f"critic.path ({path}) is no folder; make it with `{made_by}`")
        return [f"critic.path ({path}) does not exist yet; `{made_by}` makes it"]
    if not knows_actor:
        return [f"whether critic.path ({path}) goes with the policy"]
    critic = critic_model_config(config)
    with naming("critic"):
        check_critic(critic, config.critic.network, config.model)
    _check_tokens(config.model, critic, "critic")
    return []


def critic_model_config(run: PPORun) -> ModelConfig:
    """Settings by which the critic that `critic.path` names is loaded."""
    assert run.critic.path is not None, "asked for where there is one"
    return ModelConfig(path=run.critic.path, dtype=run.model.dtype, trust_remote_code=run.model.trust_remote_code)


def _check_tokens(model: ModelConfig, critic: ModelConfig, section: str, *, cause: str = "") -> None:
    """Refuses a critic's body that reads other tokens than the policy writes."""
    with naming(section):
        theirs = load_tokenizer(critic)
    if not same_ids(load_tokenizer(model), theirs):
        raise ModelError(
            f"{cause}{section}.path ({critic.path}) reads other tokens than model.path ({model.path}), and the critic "
            f"reads the policy's; {'set critic.network to own' if cause else 'leave it out'}"
        )


def check_scorer(config: ModelConfig, *, dry: bool = False, made_by: str | None = None) -> list[str]:
    """Checks a reward model that will score responses; the command `made_by` makes it if it is missing. Returns
    sentences on what could not be checked."""
    return _check_model(config, dry=dry, section="reward.model", needs_head=True, made_by=made_by)


def reward_model_config(run: RLRun) -> ModelConfig:
    """Settings by which the reward model of a run, which must have one, is loaded."""
    assert run.reward.model is not None, "asked for where there is one"
    shared = {name: getattr(run.model, name) for name in ("dtype", "packing", "trust_remote_code")}
    return ModelConfig(path=run.reward.model.path, **shared)


@contextmanager
def naming(section: str) -> Iterator[None]:
    """Context in which errors about a model name the section of the recipe that the model stands in."""
    try:
        yield
    except ModelError as error:
        raise ModelError(_in_section(str(error), section)) from error


def _check_model(
    config: ModelConfig,
    *,
    dry: bool,
    made_by: str | None,
    section: str = "model",
    needs_head: bool | None = None,
) -> list[str]:
    """Checks a model; `needs_head` is for reward models: whether their head must be there already."""
    if made_by is not None and not Path(config.path).exists():
        if dry:
            return [f"{section}.path ({config.path}) does not exist yet; `{made_by}` makes it"]
        raise ModelError(f"{section}.path ({config.path}) is no folder; make it with `{made_by}`")
    with naming(section):
        unchecked = check_model(config) if needs_head is None else check_reward_model(config, needs_head=needs_head)
    return [_in_section(sentence, section) for sentence in unchecked]


def _in_section(sentence: str, section: str) -> str:
    return re.sub(r"\bmodel\.(?=path\b)", f"{section}.", sentence)
