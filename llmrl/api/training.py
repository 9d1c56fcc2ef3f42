"""Functions that make a run: one for each kind of run that the command line has."""

from __future__ import annotations  # so that help() shows Rows and Reward by these names

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llmrl.api.given import Given, Model, Rows, Tokenizer
from llmrl.api.guest import checking
from llmrl.api.rewards import Reward, reward_section
from llmrl.api.run import Run
from llmrl.distributed.collectives import join_ranks
from llmrl.roles import RolloutEngine
from llmrl.secrets import remember_environment
from llmrl.settings import compose
from llmrl.wiring.runs import RUNS


def sft(
    model: Model,
    *,
    data: Rows,
    output_dir: str | Path,
    num_iterations: int,
    evaluation: Rows | None = None,
    tokenizer: Tokenizer | None = None,
    settings: Mapping[str, Any] | None = None,
) -> Run:
    """Supervised fine-tuning on prompts with given responses: `llmrl sft`.

    Args:
        model: The model that is trained, which itself stays as it is: a model of transformers, a folder, a name on the
            hub, or what an earlier run has left.
        data: Rows with a ``prompt`` and a ``response``, or with messages as the prompt.
        output_dir: Folder that the run writes everything to. Where it holds a part of the run, that goes on.
        num_iterations: Iterations in all, each one optimizer step.
        evaluation: Held-out rows, whose loss is measured before the first iteration and after the last.
        tokenizer: That of a model which is an object, or a folder without one; left out, it is looked for where the
            model was loaded from.
        settings: All other settings, by the dotted names of recipes, as in ``{"optimizer.learning_rate": 1e-5}``.

    Raises:
        Error: Something cannot be used; no model was loaded yet.
    """
    run = {"output_dir": output_dir, "num_iterations": num_iterations}
    return _made("sft", model, tokenizer, data, evaluation, run, settings)


def reward_model(
    model: Model,
    *,
    pairs: Rows,
    evaluation: Rows,
    output_dir: str | Path,
    tokenizer: Tokenizer | None = None,
    settings: Mapping[str, Any] | None = None,
) -> Run:
    """A Bradley-Terry reward model, learned from preferences: `llmrl reward-model`. It is as long as
    ``reward_model.num_epochs`` says.

    Args:
        model: A causal language model, which gets a new head, or a reward model; see `sft`.
        pairs: Rows with a ``prompt``, a ``chosen`` and a ``rejected`` response.
        evaluation: Held-out pairs: what the report card is about.
        output_dir: See `sft`.
        tokenizer: See `sft`.
        settings: See `sft`.

    Raises:
        Error: Something cannot be used; no model was loaded yet.
    """
    return _made("reward-model", model, tokenizer, pairs, evaluation, {"output_dir": output_dir}, settings)


def grpo(
    model: Model,
    *,
    prompts: Rows,
    reward: Reward,
    output_dir: str | Path,
    num_iterations: int,
    evaluation: Rows | None = None,
    tokenizer: Tokenizer | None = None,
    engine: RolloutEngine | None = None,
    settings: Mapping[str, Any] | None = None,
) -> Run:
    """GRPO and its kin, which need no critic: `llmrl grpo`.

    Args:
        model: See `sft`.
        prompts: Rows with a ``prompt``, a text or messages; functions of the reward get the other columns by name.
        reward: A function such as ``def correct(responses, answer)``, which returns a number for each response; its
            name as ``file.py:function``; a reward model; a `RewardFunction` of `llmrl.roles`; or several of these, as a
            list, or as a mapping by their names in the metrics, each as it is or as ``(reward, weight)``. A reward
            model is ``score/model`` there.
        output_dir: See `sft`.
        num_iterations: Iterations in all, each one rollout and the updates from it.
        evaluation: Held-out prompts, which are evaluated before the first iteration and after the last.
        tokenizer: See `sft`.
        engine: A rollout engine of one's own in place of ``rollout.engine``.
        settings: See `sft`. The value of ``algorithm.name``, ``algorithm.loss`` or ``algorithm.baseline`` may be the
            class or function itself.

    Raises:
        Error: Something cannot be used; no model was loaded yet.
    """
    run = {"output_dir": output_dir, "num_iterations": num_iterations}
    return _made("grpo", model, tokenizer, prompts, evaluation, run, settings, reward=reward, engine=engine)


def ppo(
    model: Model,
    *,
    prompts: Rows,
    reward: Reward,
    output_dir: str | Path,
    num_iterations: int,
    evaluation: Rows | None = None,
    tokenizer: Tokenizer | None = None,
    engine: RolloutEngine | None = None,
    settings: Mapping[str, Any] | None = None,
) -> Run:
    """PPO with an actor, a critic, a frozen reference and any reward: `llmrl ppo`.

    Args:
        model: See `sft`.
        prompts: See `grpo`.
        reward: See `grpo`.
        output_dir: See `sft`.
        num_iterations: See `grpo`.
        evaluation: See `grpo`.
        tokenizer: See `sft`.
        engine: See `grpo`.
        settings: See `sft`. The value of ``algorithm.loss`` may be the function itself.

    Raises:
        Error: Something cannot be used; no model was loaded yet.
    """
    run = {"output_dir": output_dir, "num_iterations": num_iterations}
    return _made("ppo", model, tokenizer, prompts, evaluation, run, settings, reward=reward, engine=engine)


def _made(
    verb: str,
    model: Model,
    tokenizer: Tokenizer | None,
    data: Rows,
    evaluation: Rows | None,
    run: Mapping[str, Any],
    settings: Mapping[str, Any] | None,
    *,
    reward: Reward | None = None,
    engine: RolloutEngine | None = None,
) -> Run:
    """A run of the kind that a verb of the command line names."""
    remember_environment()
    with checking():
        given = Given(Path(run["output_dir"]).expanduser().absolute() / "given", join_ranks())
        sections: dict[str, Any] = {
            "model": {"path": given.model(model, tokenizer)},
            "data": {"path": given.rows(data, argument="data")},
            "run": run,
        }
        if evaluation is not None:
            sections["evaluation_data"] = {"path": given.rows(evaluation, argument="evaluation")}
        if reward is not None:
            sections["reward"] = reward_section(reward, given)
        config = compose(RUNS[verb].settings, sections, given.settings(settings or {}))
        return Run(RUNS[verb], config, given, engine=engine)
