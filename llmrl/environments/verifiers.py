"""Environments of verifiers, the library of Prime Intellect, from version 0.4 on."""

import asyncio
import inspect
import json
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from functools import cache
from itertools import islice
from types import SimpleNamespace
from typing import Any

try:
    import verifiers.v1 as vf
    from verifiers.v1.agent import Segment
    from verifiers.v1.configs.agent import agent_config_fields
    from verifiers.v1.dialects import parse_message
    from verifiers.v1.graph import prepare_turn
    from verifiers.v1.session import call_hook
    from verifiers.v1.state import state_cls
    from verifiers.v1.trace import AgentInfo, TraceTask
    from verifiers.v1.types import Message as Said
    from verifiers.v1.types import content_text
    from verifiers.v1.utils.loaders import load_environment, resolve_env_config
except ImportError as error:
    raise ImportError('verifiers 0.4 is not installed: pip install "llmrl[verifiers]"') from error

from llmrl.environments.environment import Environment, Message, Turn


class Verifiers(Environment):
    """An environment of verifiers in which one agent talks with what the environment's ``run`` says, and which its task
    scores once that ends: the actor is that agent. No model endpoint, sandbox or harness is used.

    A row's column ``task`` is the number of a task in the taskset. A turn that a limit truncates is not shown to the
    environment, which hears that the agent has stopped.

    Args:
        taskset: Id of the taskset, an installed package that exports it, such as ``textarena``.
        config: Settings of the taskset.
        env: Id of the environment. null: that of the taskset.

    Raises:
        TypeError: The environment needs more than one agent, tools, or a sandbox.
    """

    def __init__(self, taskset: str, config: Mapping[str, Any] = {}, env: str = "") -> None:
        self.environment, self.name = _environment(json.dumps({"id": env, "taskset": {**config, "id": taskset}}))

    async def start(self, row: Mapping[str, Any]) -> list[dict[str, Any]]:
        """The task's prompt, or what the environment says first."""
        if not isinstance(row.get("task"), int):
            raise ValueError("the row has no number in its column 'task'; give it that of a task in the taskset")
        task = _task(self.environment.taskset, row["task"])
        self.seat = _Seat()
        self.run = asyncio.create_task(self._run(task))
        opening = await self.seat.heard.get()
        if opening is None:
            await self.run
            raise ValueError(f"task {row['task']} ended before the actor could speak")
        return opening

    async def respond(self, message: Message) -> Turn:
        """What the environment says next; the episode ends where it has nothing more to say."""
        self.seat.said.put_nowait(message.text)
        heard = await self.seat.heard.get()
        if heard is None:
            await self.run  # raises what has ended it
        return Turn(heard, done=heard is None)

    async def close(self) -> float:
        """The weighted sum of the task's rewards."""
        self.seat.said.put_nowait(None)
        await self.run
        return float(sum(trace.reward for trace in self.seat.traces))

    async def _run(self, task: vf.Task) -> None:
        """The environment's whole episode."""
        agents: Any = SimpleNamespace(**{self.name: self.seat})
        try:
            await self.environment.setup(agents)
            await self.environment.run(task, agents)
        finally:
            self.seat.heard.put_nowait(None)


class _Seat:
    """The agent of an environment, which speaks as the actor does."""

    trainable = True

    def __init__(self) -> None:
        self.heard: asyncio.Queue[list[dict[str, Any]] | None] = asyncio.Queue()
        """What the actor reads next; None once the environment has ended."""
        self.said: asyncio.Queue[str | None] = asyncio.Queue()
        """What it has written; None once it writes no more."""
        self.traces: list[vf.Trace] = []

    async def run(self, task: vf.Task) -> vf.Trace:
        """One reply to the prompt of a task."""
        async with self.interaction(task) as interaction:
            await interaction.turn()
        return interaction.trace

    @asynccontextmanager
    async def interaction(self, task: vf.Task) -> AsyncIterator["_Interaction"]:
        """A conversation about a task, which is scored after it."""
        if self.traces:
            raise TypeError("the environment begins a second conversation of its agent, and an episode is only one")
        interaction = _Interaction(self, task)
        self.traces.append(interaction.trace)
        await _invoked(task.setup, interaction.trace)
        yield interaction
        await _invoked(task.finalize, interaction.trace)
        await task.score(interaction.trace)


class _Interaction:
    """A conversation as an environment sees it; see `verifiers.v1.agent.Interaction`."""

    def __init__(self, seat: _Seat, task: vf.Task) -> None:
        self.seat = seat
        self.task = task
        self.trace: vf.Trace = vf.Trace(
            task=TraceTask(type=type(task).__name__, data=task.data, key=task.key, hash=task.hash),
            agent=AgentInfo(config=vf.AgentConfig()),
            state=state_cls(type(task))(),
        )
        self.messages: list[Said] = _opening(task.data)

    async def turn(self, message: str | list[Any] | None = None) -> Segment:
        """The actor's reply; terminated where there is none."""
        added = [vf.UserMessage(content=message)] if isinstance(message, str) else list(message or ())
        self.messages += [parse_message(each) if isinstance(each, dict) else each for each in added]
        new = self.messages if not self.trace.nodes else self.messages[-len(added) :]
        text = None if await self._stops() else await self._reply(new)
        if text is None:
            return Segment(messages=[], terminated=True)
        reply = vf.AssistantMessage(content=text)
        response = vf.Response(id="", created=0, model="", message=reply, finish_reason="stop")
        prepare_turn(self.trace, list(self.messages)).commit(response)
        self.messages.append(reply)
        return Segment(messages=[reply])

    async def _reply(self, new: list[Said]) -> str | None:
        self.seat.heard.put_nowait([_plain(each) for each in new])
        return await self.seat.said.get()

    async def _stops(self) -> bool:
        """Whether a condition of the task ends the conversation."""
        for stop in self.task.hooks("stop"):
            if await call_hook(stop, {vf.Trace: self.trace}):
                self.trace.stop(stop.__name__)
                return True
        return False


@cache
def _environment(config: str) -> tuple[vf.Env[Any], str]:
    """An environment and the name of its agent, from its settings in JSON."""
    environment = load_environment(resolve_env_config(json.loads(config)))
    names = list(agent_config_fields(environment.config))
    task, settings = type(environment.taskset).task_type(), environment.taskset.config
    problems = {
        f"the agents {', '.join(names)}, and the actor is one": len(names) != 1,
        "tools": task.toolsets(settings.task) or environment.taskset.toolsets(settings),
        "a container": task.NEEDS_CONTAINER,
        "resources that it starts": type(environment).start is not vf.Env.start,
    }
    for problem, is_there in problems.items():
        if is_there:
            raise TypeError(f"{environment.config.env_id} needs {problem}; that is not supported")
    return environment, names[0]


def _task(taskset: vf.Taskset[Any, Any], number: int) -> vf.Task:
    task = next(islice(taskset, number, None), None)
    if task is None:
        raise ValueError(f"the taskset has no task {number}")
    return task


async def _invoked(hook: Any, trace: vf.Trace) -> None:
    """Calls a hook of a task, unless it is the one of the base class, which does nothing."""
    if hook.__func__ in (vf.Task.setup, vf.Task.finalize):
        return
    if "runtime" in inspect.signature(hook).parameters:
        raise TypeError(f"{hook.__qualname__} of the task needs a sandbox; that is not supported")
    await hook(trace)


def _opening(data: vf.TaskData) -> list[Said]:
    system = [] if data.system_prompt is None else [vf.SystemMessage(content=data.system_prompt)]
    prompt = [vf.UserMessage(content=data.prompt)] if isinstance(data.prompt, str) else list(data.prompt or ())
    return [*system, *prompt]


def _plain(message: Said) -> dict[str, Any]:
    """A message as the actor reads it."""
    if not isinstance(message.content, str) and any(part.type != "text" for part in message.content or ()):
        raise TypeError("the environment shows more than texts; that is not supported")
    return {"role": message.role, "content": content_text(message.content)}
