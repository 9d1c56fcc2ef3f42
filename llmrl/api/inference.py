"""What is done with a model without training it: evaluation, generation, scores."""

from __future__ import annotations  # so that help() shows Rows and Reward by these names

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from llmrl.api.environments import Playing, Tools, environment_section
from llmrl.api.given import Given, Model, Rows, Tokenizer
from llmrl.api.guest import checking, computing, own_random_numbers
from llmrl.api.rewards import Reward, reward_section
from llmrl.config import GRPORun, RLRun
from llmrl.data.config import PromptDataConfig, SupervisedDataConfig
from llmrl.data.rows import read_rows
from llmrl.data.supervised import read_supervised_rows
from llmrl.distributed.collectives import OneProcess
from llmrl.distributed.context import Context
from llmrl.distributed.device import pick_device
from llmrl.environments.config import EnvironmentConfig
from llmrl.models.checking import check_model
from llmrl.models.config import ModelConfig
from llmrl.models.loading import load_tokenizer
from llmrl.reports.episodes import episode_text
from llmrl.roles import RolloutEngine, Sampling
from llmrl.secrets import remember_environment
from llmrl.section import Section
from llmrl.settings import SettingError, compose, is_unicode
from llmrl.trainers.comparison import Evaluation
from llmrl.user_code import UserCodeFailure, handed_over
from llmrl.wiring.checks import check_rl, check_scorer
from llmrl.wiring.engines import play, respond, sampling_at, typed_prompts
from llmrl.wiring.environments import check_environment
from llmrl.wiring.process import joined, warn_without_gpu
from llmrl.wiring.rewards import score_rows
from llmrl.wiring.rl import build_evaluator


def evaluate(
    model: Model,
    *,
    prompts: Rows,
    reward: Reward | None = None,
    environment: Playing | None = None,
    tools: Tools = (),
    tokenizer: Tokenizer | None = None,
    settings: Mapping[str, Any] | None = None,
) -> dict[str, float]:
    """Accuracy and pass@k of a model on held-out prompts, with 95 % confidence intervals: `llmrl evaluate`.

    Args:
        model: See `sft`.
        prompts: See `grpo`.
        reward: See `grpo`. A response is correct where its first function, or else its model, gives it more than
            ``evaluation.correct_above``; with an environment, where the episode's rewards are more in all.
        environment: See `grpo`.
        tools: See `grpo`.
        tokenizer: See `sft`.
        settings: Settings of `grpo`, as in ``{"evaluation.num_responses": 4, "evaluation.pass_at": [1, 4]}``.

    Returns:
        ``eval/accuracy`` with ``_low`` and ``_high``, ``eval/pass_at_k`` likewise, ``eval/score``, and what else
        docs/metrics.md lists.

    Raises:
        Error: Something cannot be used, or a reward failed.
    """
    remember_environment()
    with TemporaryDirectory() as place:
        with checking():
            given = Given(Path(place), OneProcess())
            rows = {"path": given.rows(prompts, argument="prompts")}
            sections: dict[str, Any] = {
                "model": {"path": given.model(model, tokenizer)},
                "data": rows,
                "evaluation_data": dict(rows),
                "run": {"output_dir": place, "num_iterations": 1},
                **environment_section(environment, tools, given),
            }
            if reward is not None:
                sections["reward"] = reward_section(reward, given)
            config = compose(GRPORun, sections, given.settings(settings or {}))
        return measure(config, given.objects).values


def measure(
    config: RLRun, objects: Mapping[str, Any], engine: RolloutEngine | None = None, context: Context | None = None
) -> Evaluation:
    """Evaluates the model of a run's settings on its held-out prompts.

    Args:
        config: The settings.
        objects: What was handed over, see `Given.objects`.
        engine: In place of the engine of the settings, with the weights that it has; None: that of the settings.
        context: Context of the run that is under way; None: there is none.
    """
    with handed_over(objects):
        with checking():
            checked = check_rl(config, dry=False, trains=False, engine=engine)
        with computing(deterministic=config.run.deterministic), ExitStack() as stack:
            context = context or stack.enter_context(joined(config.distributed))
            warn_without_gpu(context)
            return build_evaluator(config, checked, context).measure()


@dataclass(frozen=True, kw_only=True)
class _Generation(Section):
    """Settings of `generate`."""

    environment: EnvironmentConfig | None = None


def generate(
    model: Model,
    prompts: str | Sequence[str | Mapping[str, Any]],
    *,
    environment: Playing | None = None,
    tools: Tools = (),
    tokenizer: Tokenizer | None = None,
    temperature: float = 0.0,
    num_responses: int = 1,
    max_response_tokens: int = 256,
    system_prompt: str | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    seed: int = 0,
    settings: Mapping[str, Any] | None = None,
    trust_remote_code: bool = False,
) -> list[list[str]]:
    """Responses to texts, or episodes: `llmrl generate`.

    Args:
        model: See `sft`.
        prompts: Texts, N of them; one text is a list of one. With an environment or tools also rows, which `start`
            gets; a text is then a row whose ``prompt`` it is.
        environment: See `grpo`.
        tools: See `grpo`.
        tokenizer: See `sft`.
        temperature: Divides the logits; 0 takes the likeliest token.
        num_responses: Responses per prompt, G.
        max_response_tokens: Length limit of a response.
        system_prompt: System message before each prompt.
        chat_template_kwargs: Arguments of the chat template, as in ``{"enable_thinking": False}``.
        seed: Seed of the random stream.
        settings: Settings of the environment, as in ``{"environment.max_turns": 8}``.
        trust_remote_code: Allows the model's folder to bring and run its own Python code.

    Returns:
        N lists of G texts. That of an episode has what the model read after ``> ``, and in its last line how it ended.

    Raises:
        Error: The model cannot be used, an argument is out of its bounds, or every episode failed.
    """
    listed = [prompts] if isinstance(prompts, str) else list(prompts)
    limits = {"num_responses": num_responses, "max_response_tokens": max_response_tokens, "seed": seed}
    with TemporaryDirectory() as place:
        with checking():
            given = Given(Path(place), OneProcess())
            sections = environment_section(environment, tools, given)
            played = compose(_Generation, sections, given.settings(settings or {})).environment
            _check_sampling(temperature=temperature, **limits)
            if not listed:
                raise SettingError("prompts is empty; hand over at least one")
            _check_texts([*listed, system_prompt or ""], may_be_rows=played is not None)
            config = ModelConfig(path=given.model(model, tokenizer), trust_remote_code=trust_remote_code)
            check_model(config, may_be_random=False)
        if played is not None:
            data = typed_prompts(system_prompt, chat_template_kwargs)
            return _episodes(config, listed, played, given, data, sampling_at(temperature, **limits))
        with computing(), own_random_numbers():
            return respond(
                config,
                [str(text) for text in listed],
                pick_device(),
                system_prompt=system_prompt,
                chat_template_kwargs=chat_template_kwargs,
                temperature=temperature,
                **limits,
            )


def _episodes(
    config: ModelConfig,
    prompts: Sequence[str | Mapping[str, Any]],
    environment: EnvironmentConfig,
    given: Given,
    data: PromptDataConfig,
    sampling: Sampling,
) -> list[list[str]]:
    """Episodes to be read, G of each prompt."""
    with checking(), handed_over(given.objects):
        rows = [{"prompt": prompt} if isinstance(prompt, str) else prompt for prompt in prompts]
        read = read_rows(replace(data, path=given.rows(rows, argument="prompts")))
        checked = check_environment(environment, load_tokenizer(config), data)
    with computing(), own_random_numbers():
        rollout = play(config, read, pick_device(), environment=checked, data=data, sampling=sampling)
    assert rollout.episodes is not None, "an environment answered"
    if failure := rollout.episodes.total_failure():
        raise UserCodeFailure(failure)
    texts = [episode_text(rollout, row) for row in range(len(rollout.rows))]
    return [texts[first : first + sampling.num_responses] for first in range(0, len(texts), sampling.num_responses)]


def score(
    reward_model: Model,
    rows: Rows,
    *,
    tokenizer: Tokenizer | None = None,
    prompt_column: str = "prompt",
    response_column: str = "response",
    normalize: bool = True,
    trust_remote_code: bool = False,
) -> list[float]:
    """Scores of responses by a reward model: `llmrl score`.

    Args:
        reward_model: A reward model: an object, a folder, a name on the hub, or what a run has left.
        rows: Rows of prompts and responses, as `sft` reads them.
        tokenizer: See `sft`.
        prompt_column: Column of the prompt: a text or messages.
        response_column: Column of the response.
        normalize: Standardizes by the mean and the standard deviation that are stored with the model.
        trust_remote_code: Allows the model's folder to bring and run its own Python code.

    Returns:
        A score for each row.

    Raises:
        Error: The model or the rows cannot be used.
    """
    with TemporaryDirectory() as place:
        with checking():
            given = Given(Path(place), OneProcess())
            path = given.model(reward_model, tokenizer, argument="reward_model")
            config = ModelConfig(path=path, trust_remote_code=trust_remote_code)
            check_scorer(config)
            file = given.rows(rows, argument="rows")
            data = SupervisedDataConfig(path=file, prompt_column=prompt_column, response_column=response_column)
            read = read_supervised_rows(data)
        with computing(), own_random_numbers():
            return score_rows(config, read, data, pick_device(), normalize=normalize)


def _check_sampling(*, temperature: float, num_responses: int, max_response_tokens: int, seed: int) -> None:
    if not 0 <= temperature < float("inf"):
        raise SettingError(f"temperature ({temperature}) must be a number of at least 0; 0 takes the likeliest token")
    for name, value in (("num_responses", num_responses), ("max_response_tokens", max_response_tokens)):
        if value < 1:
            raise SettingError(f"{name} ({value}) must be at least 1")
    if not 0 <= seed < 2**32:
        raise SettingError(f"seed ({seed}) must be at least 0 and less than {2**32}")


def _check_texts(prompts: Sequence[str | Mapping[str, Any]], *, may_be_rows: bool) -> None:
    for prompt in prompts:
        if isinstance(prompt, str) and not is_unicode(prompt):
            raise SettingError(f"the prompt {prompt!r} is no Unicode text; write it as UTF-8")
        if not isinstance(prompt, str) and not may_be_rows:
            raise SettingError(
                f"prompts has a {type(prompt).__name__}; hand over texts, or environment or tools, which take rows"
            )
