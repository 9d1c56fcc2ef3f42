"""What is done with a model without training it: evaluation, generation, scores."""

from __future__ import annotations  # so that help() shows Rows and Reward by these names

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from llmrl.api.given import Given, Model, Rows, Tokenizer
from llmrl.api.guest import checking, computing, own_random_numbers
from llmrl.api.rewards import Reward, reward_section
from llmrl.config import GRPORun, RLRun
from llmrl.data.config import SupervisedDataConfig
from llmrl.data.supervised import read_supervised_rows
from llmrl.distributed.collectives import OneProcess
from llmrl.distributed.context import Context
from llmrl.distributed.device import pick_device
from llmrl.models.checking import check_model
from llmrl.models.config import ModelConfig
from llmrl.roles import RolloutEngine
from llmrl.secrets import remember_environment
from llmrl.settings import SettingError, compose, is_unicode
from llmrl.trainers.comparison import Evaluation
from llmrl.user_code import handed_over
from llmrl.wiring.checks import check_rl, check_scorer
from llmrl.wiring.engines import respond
from llmrl.wiring.process import joined, warn_without_gpu
from llmrl.wiring.rewards import score_rows
from llmrl.wiring.rl import build_evaluator


def evaluate(
    model: Model,
    *,
    prompts: Rows,
    reward: Reward,
    tokenizer: Tokenizer | None = None,
    settings: Mapping[str, Any] | None = None,
) -> dict[str, float]:
    """Accuracy and pass@k of a model on held-out prompts, with 95 % confidence intervals: `llmrl evaluate`.

    Args:
        model: See `sft`.
        prompts: See `grpo`.
        reward: See `grpo`. A response is correct where its first function, or else its model, gives it more than
            ``evaluation.correct_above``.
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
            sections = {
                "model": {"path": given.model(model, tokenizer)},
                "data": rows,
                "evaluation_data": dict(rows),
                "reward": reward_section(reward, given),
                "run": {"output_dir": place, "num_iterations": 1},
            }
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


def generate(
    model: Model,
    prompts: str | Sequence[str],
    *,
    tokenizer: Tokenizer | None = None,
    temperature: float = 0.0,
    num_responses: int = 1,
    max_response_tokens: int = 256,
    system_prompt: str | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    seed: int = 0,
    trust_remote_code: bool = False,
) -> list[list[str]]:
    """Responses to texts: `llmrl generate`.

    Args:
        model: See `sft`.
        prompts: Texts, N of them; one text is a list of one.
        tokenizer: See `sft`.
        temperature: Divides the logits; 0 takes the likeliest token.
        num_responses: Responses per prompt, G.
        max_response_tokens: Length limit of a response.
        system_prompt: System message before each prompt.
        chat_template_kwargs: Arguments of the chat template, as in ``{"enable_thinking": False}``.
        seed: Seed of the random stream.
        trust_remote_code: Allows the model's folder to bring and run its own Python code.

    Returns:
        N lists of G texts.

    Raises:
        Error: The model cannot be used, or an argument is out of its bounds.
    """
    texts = [prompts] if isinstance(prompts, str) else list(prompts)
    with TemporaryDirectory() as place:
        with checking():
            _check_sampling(
                temperature=temperature,
                num_responses=num_responses,
                max_response_tokens=max_response_tokens,
                seed=seed,
            )
            for text in (*texts, system_prompt or ""):
                if not is_unicode(text):
                    raise SettingError(f"the prompt {text!r} is no Unicode text; write it as UTF-8")
            path = Given(Path(place), OneProcess()).model(model, tokenizer)
            config = ModelConfig(path=path, trust_remote_code=trust_remote_code)
            check_model(config, may_be_random=False)
        with computing(), own_random_numbers():
            return respond(
                config,
                texts,
                pick_device(),
                system_prompt=system_prompt,
                chat_template_kwargs=chat_template_kwargs,
                temperature=temperature,
                num_responses=num_responses,
                max_response_tokens=max_response_tokens,
                seed=seed,
            )


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
