"""Environments and tools of a run: loaded, checked against the tokenizer, and joined with an engine."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from llmrl.batches import Row
from llmrl.data.config import PromptsConfig
from llmrl.data.rendering import Rendering, history_problem
from llmrl.data.rows import places_of
from llmrl.distributed.context import Context
from llmrl.environments.calls import ToolCall
from llmrl.environments.config import EnvironmentConfig
from llmrl.environments.conversations import Conversations
from llmrl.environments.engine import EnvironmentEngine
from llmrl.environments.hosting import START, Failure, Host
from llmrl.environments.loading import Code
from llmrl.environments.processes import Processes
from llmrl.environments.threads import Threads
from llmrl.environments.tools import call_format, parse_calls, schema_of
from llmrl.models.folders import ModelError
from llmrl.roles import RolloutEngine
from llmrl.rollout.native import NativeEngine
from llmrl.user_code import UserCodeError, is_given, load_object

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, kw_only=True)
class CheckedEnvironment:
    """An environment and tools that have been loaded."""

    config: EnvironmentConfig
    host: Host
    schemas: Sequence[dict[str, Any]]
    """JSON schemas of the tools."""
    format: str | None
    """How the model writes calls; None where there are no tools."""

    def shown(self, data: PromptsConfig) -> PromptsConfig:
        """The settings of prompts by which the chat template lists the tools."""
        if not self.schemas:
            return data
        return replace(data, chat_template_kwargs={**data.chat_template_kwargs, "tools": list(self.schemas)})


def check_environment(
    config: EnvironmentConfig, tokenizer: "PreTrainedTokenizerBase | None", data: PromptsConfig
) -> CheckedEnvironment:
    """Loads the environment and the tools, and checks that the chat template can go on with a conversation.

    Args:
        config: Names of both.
        tokenizer: None: it does not exist yet.
        data: How prompts become tokens.

    Raises:
        UserCodeError: One of them is missing, does not load, or cannot be used.
        ModelError: The chat template does not fit.
    """
    code = Code(config.name, config.arguments, config.tools)
    names = [name for name in (config.name, *config.tools) if name is not None]
    if any(map(is_given, names)):
        host: Host = Threads(code, timeout_s=config.timeout_s)
    else:
        host = Processes(code, timeout_s=config.timeout_s, tell=print)
    host.load()
    try:
        schemas = [_schema(name) for name in config.tools]
        format = _format_of(config, tokenizer)
    except ValueError as error:
        raise UserCodeError(str(error)) from error
    if tokenizer is not None:
        _check_template(config, tokenizer, data, schemas)
    return CheckedEnvironment(config=config, host=host, schemas=schemas, format=format)


def _schema(name: str) -> dict[str, Any]:
    schema, called = schema_of(load_object(name, role="tool")), name.rpartition(":")[2]
    shown = schema["function"]["name"]
    if shown != called:
        raise ValueError(
            f"environment.tools: the chat template shows {name} to the actor as {shown!r}, but its calls are looked up "
            f"by {called!r}; let the function's own name be {called!r}"
        )
    return schema


def _format_of(config: EnvironmentConfig, tokenizer: "PreTrainedTokenizerBase | None") -> str | None:
    if not config.tools or tokenizer is None:
        return None
    return call_format(tokenizer) if config.tool_format == "auto" else config.tool_format


def _check_template(
    config: EnvironmentConfig,
    tokenizer: "PreTrainedTokenizerBase",
    data: PromptsConfig,
    schemas: Sequence[dict[str, Any]],
) -> None:
    roles = (*(["user"] if config.name is not None else []), *(["tool"] if config.tools else []))
    problem = history_problem(tokenizer, data, schemas, roles=roles)
    if problem is not None and config.history == "refuse":
        raise ModelError(problem)


def try_start(environment: CheckedEnvironment, rows: Sequence[Row], prompt_column: str) -> None:
    """Opens and closes an episode with the first row, as a run does: what fails there shows before a model loads.

    Raises:
        UserCodeError: It fails.
    """
    host, name = environment.host, environment.config.name
    if name is None:
        return
    try:
        host.open(0, rows[0], opening_seed=0, seed=0)
        answer = host.wait([0], lambda: None)[0]
        opens_with_nothing = answer is None and rows[0].get(prompt_column) is None
        if not isinstance(answer, Failure):
            host.close(0)
            answer = host.wait([0], lambda: None)[0]
    finally:
        host.end()
    if opens_with_nothing:
        answer = Failure(START, f"returned no opening, and the row has no {prompt_column!r}; return a text or messages")
    if isinstance(answer, Failure):
        raise UserCodeError(
            f"environment {name}: {answer.name} {answer.what}; it was tried with {places_of(rows[:1])[0]} of the data, "
            f"which has the columns {', '.join(rows[0])}"
        )


def with_turns(
    engine: RolloutEngine,
    environment: CheckedEnvironment,
    data: PromptsConfig,
    tokenizer: "PreTrainedTokenizerBase",
    context: Context,
) -> RolloutEngine:
    """An engine whose responses are episodes of the environment.

    Raises:
        ModelError: It is no `NativeEngine`.
    """
    if not isinstance(engine, NativeEngine):
        raise ModelError(
            f"environment needs the engine of llmrl, and {type(engine).__name__} was handed over; leave engine out"
        )
    config = environment.config
    rendering = Rendering(tokenizer, data, environment.schemas, history=config.history)
    if environment.schemas and rendering.opening("x") == Rendering(tokenizer, data).opening("x"):
        context.progress.message(
            "warning: the chat template does not list the tools (environment.tools); describe them, and how they are "
            "called, in data.system_prompt or in the prompts"
        )

    def read(ids: Sequence[int]) -> tuple[str, str, list[ToolCall]]:
        decode = partial(tokenizer.decode, clean_up_tokenization_spaces=False)
        text = str(decode(list(ids), skip_special_tokens=True))
        if environment.format is None:
            return text, text, []
        without_end = list(ids[:-1]) if ids[-1] in engine.eos_ids else list(ids)
        written = str(decode(without_end, skip_special_tokens=False))
        calls, rest = parse_calls(written, environment.format, tools=environment.schemas, tokenizer=tokenizer)
        return text, rest if calls else text, calls

    return EnvironmentEngine(
        engine,
        host=environment.host,
        begin=partial(
            Conversations,
            rendering=rendering,
            read=read,
            config=config,
            prompt_column=data.prompt_column,
            max_prompt_tokens=data.max_prompt_tokens,
        ),
        max_turn_tokens=config.max_turn_tokens,
        progress=context.progress,
    )
