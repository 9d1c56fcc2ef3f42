"""The process in which the reward functions of a recipe run, seen from the run: it can be stopped whatever they do.

One worker serves a run (each rank has its own). It is started to load the functions, keeps their modules and what these
hold, and is killed, with every process of its group, where a call exceeds its limit or the run ends in the middle of
one; the next call starts another one, which loads each function again as it is called. It is a fresh interpreter, not a
fork: threads of torch and CUDA would not survive that; and not a daemon of `multiprocessing`: functions may have pools
of processes of their own.
"""

import os
import signal
import subprocess
import time
import weakref
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import contextmanager, suppress
from inspect import Parameter, Signature
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from threading import Thread
from typing import Any

from llmrl.child_process import end_in_words, start_child
from llmrl.rewards.calls import Answer, Calls, Columns, Failure, Pending, RewardError, Waiting
from llmrl.rewards.config import RewardConfig, RewardFunctionConfig
from llmrl.rewards.loading import Function, bind_arguments, check_columns, load_function, takes, takes_rollout
from llmrl.rewards.patience import Loading
from llmrl.rewards.serve import Answered, Ask, Check, Gather, Load, Loaded, Refused, Request
from llmrl.user_code import UserCodeError, changed_file, code_digests, is_given

LOOK_S = 0.2
"""Seconds between two looks at the clock and at the process, while an answer is waited for."""
SHUTDOWN_S = 5.0
"""Seconds that the worker gets to end by itself at the end of a run."""


class RemoteFunction:
    """A function of a worker: its parameters are known here, a call runs there."""

    def __init__(self, worker: "Worker", name: str, loaded: Loaded) -> None:
        self.worker = worker
        self.name = name
        """As the recipe names it."""
        self.__module__, _, self.__qualname__ = loaded.name.rpartition(":")
        self.__source_file__ = loaded.source_file
        kinds = [Parameter.POSITIONAL_ONLY, Parameter.POSITIONAL_OR_KEYWORD, Parameter.VAR_POSITIONAL]
        kinds += [Parameter.KEYWORD_ONLY, Parameter.VAR_KEYWORD]
        self.__signature__ = Signature(
            [
                Parameter(name, kinds[kind], default=None if has_default else Parameter.empty)
                for name, kind, has_default in loaded.parameters
            ]
        )

    def __call__(self, waiting: Waiting, **columns: list[Any]) -> Answer | Pending:
        """See `Worker.ask`."""
        return self.worker.ask(self.name, columns, waiting)


class Worker:
    """`Caller` of the functions that a configuration names, in a process of their own; of those that a program hands
    over in Python, in this process."""

    def __init__(self, config: RewardConfig) -> None:
        self.config = config
        self.folder = os.getcwd()
        self.process: _Process | None = None
        self.functions: dict[str, RemoteFunction] = {}
        self.calls = Calls({})
        """Functions of this process."""
        self.pending: set[str] = set()
        """Functions whose results are still to be awaited."""
        self.has_moved: set[str] = set()
        """Functions that are known to change the working folder."""
        self.loading_s = 0.0
        """Seconds that it took to load all functions."""
        self.code: dict[str, dict[Path, str | None]] = {}
        """Digests of each function's files, as they were loaded."""

    def load(self) -> tuple[Function, ...]:
        """Every function of the configuration, in its order.

        Raises:
            UserCodeError: A function is missing or does not load.
        """
        self._kill()
        started = time.monotonic()
        for setting in self.config.functions:
            if is_given(setting.name):
                self.calls.functions[setting.name] = bind_arguments(load_function(setting.name), setting.arguments)
                continue
            loaded = self._load(setting, Loading(setting.name))
            if isinstance(loaded, str):
                raise UserCodeError(loaded)
            self.functions[setting.name] = function = RemoteFunction(self, setting.name, loaded)
            if takes_rollout(function):
                raise UserCodeError(
                    f"reward function {setting.name} takes a rollout, which stays in the process of the run; take "
                    "responses, or hand the function itself over in Python, as in llmrl.grpo(..., reward=function)"
                )
            self.code[setting.name] = code_digests(function)
        self.loading_s = time.monotonic() - started
        loaded_functions = self.functions | self.calls.functions
        return tuple(loaded_functions[setting.name] for setting in self.config.functions)

    def check_columns(self, columns: tuple[str, ...]) -> None:
        """See `llmrl.rewards.loading.check_columns`."""
        for function in self.calls.functions.values():
            check_columns(function, columns)
        names = tuple(self.functions)
        if not names:
            return
        with self._asked(Check(names, columns)) as process:
            reply = process.reply({names[0]: Loading(names[0]).look})
        if isinstance(reply, Refused):
            raise UserCodeError(reply.text)
        if process.is_lost:
            raise UserCodeError(f"reward function {names[0]}: before it was called, its code {process.end}")

    def ask(self, name: str, columns: Columns, waiting: Waiting) -> Answer | Pending:
        """See `Caller`. A call that exceeds its limit, or ends the process, is a `Failure`.

        Raises:
            RewardError: The function would be loaded again, and its code is another one by now.
        """
        if name in self.calls.functions:
            return self.calls.ask(name, columns, waiting)
        taken = {column: values for column, values in columns.items() if takes(self.functions[name], column)}
        if failure := self._load_again(name, waiting):
            return failure
        with self._asked(Ask(name, taken)) as process:
            answered = process.reply({name: waiting.look})
        if answered is None:
            return _ended(process, {name: waiting})[name]
        self._remark(answered, waiting)
        if answered.answer is Pending.PENDING:
            self.pending.add(name)
        return answered.answer

    def gather(self, waiting: Mapping[str, Waiting]) -> Generator[tuple[str, Answer], None, None]:
        """See `Caller`."""
        yield from self.calls.gather({name: each for name, each in waiting.items() if name in self.calls.awaitables})
        left = {name: each for name, each in waiting.items() if name in self.pending}
        if not left:
            return
        last: dict[str, Answer] = {}
        with self._asked(Gather(tuple(left))) as process:
            while left:
                yield from last.items()
                answered = process.reply({name: each.look for name, each in left.items()})
                if answered is None:
                    last, left = _ended(process, left), {}
                else:
                    self._remark(answered, left.pop(answered.name))
                    last = {answered.name: answered.answer}
        self.pending.clear()
        yield from last.items()  # here nothing is asked any more, and the worker may stay

    def drop(self) -> None:
        """See `Caller`."""
        self.calls.drop()
        if self.pending:
            self._kill()

    @contextmanager
    def _asked(self, request: Request) -> "Iterator[_Process]":
        """Context of a request to the worker; where it is left before all has come back, the worker is killed."""
        if self.process is None:
            self.process = _Process(self.folder)
        process = self.process
        try:
            process.send(request)
            yield process
        except BaseException:
            self._kill()
            raise
        if process.is_lost:
            self._kill()

    def _load(self, setting: RewardFunctionConfig, waiting: Waiting, free_s: float = 0.0) -> Loaded | str:
        """A function that the process has loaded, or why it has not. The first `free_s` seconds count for no limit."""

        def look(seconds: float) -> bool:
            nonlocal free_s
            counted, free_s = max(seconds - free_s, 0.0), max(free_s - seconds, 0.0)
            return waiting.look(counted)

        with self._asked(Load(setting.name, setting.arguments)) as process:
            reply = process.reply({setting.name: look})
        match reply:
            case Loaded():
                process.loaded.add(setting.name)
                return reply
            case Refused(text):
                return text
        if process.late:
            return f"reward function {setting.name}: it did not load within {waiting.limit()}"
        return f"reward function {setting.name}: while it was loaded, its code {process.end}"

    def _load_again(self, name: str, waiting: Waiting) -> Failure | None:
        """Loads a function where a fresh process has not yet; why it cannot be, which is no fault of a response.

        Twice the time that all took at first is free: a short limit of calls must not keep a slow import from its end.
        """
        if self.process is not None and name in self.process.loaded:
            return None
        if changed := changed_file(self.code[name]):
            raise RewardError(
                f"reward function {name}: {changed} has changed during the run, and would be loaded anew, since the "
                "process that had loaded it has ended; start the command again"
            )
        setting = next(each for each in self.config.functions if each.name == name)
        loaded = self._load(setting, waiting, free_s=2 * self.loading_s)
        if isinstance(loaded, Loaded):
            return None
        why = loaded.removeprefix(f"reward function {name}: ")
        return Failure(what=f"could not be loaded again: {why}", kind="", seconds=0.0, is_unloaded=True)

    def _remark(self, answered: Answered, waiting: Waiting) -> None:
        if answered.moved_to is not None and answered.name not in self.has_moved:
            self.has_moved.add(answered.name)
            waiting.tell(f"changed the working folder to {answered.moved_to}; it is set back after each call")

    def _kill(self) -> None:
        self.pending.clear()
        if self.process is not None:
            self.process.kill()
            self.process = None


class _Process:
    """A worker process, and the connection to it. It is closed when this is garbage, or at exit."""

    def __init__(self, folder: str) -> None:
        self.connection, theirs = Pipe()
        self.loaded: set[str] = set()
        """Functions that it has loaded."""
        self.late: list[str] = []
        """Functions that exceeded their limit."""
        self.is_lost = False
        """Whether nothing more can be received."""
        self.popen, lifeline = start_child("llmrl.rewards.serve", theirs.fileno(), folder)
        theirs.close()
        self.close = weakref.finalize(self, _close, self.popen, self.connection, lifeline)

    def send(self, request: Request) -> None:
        """Sends a request, in a thread: a worker that hangs may not read it, and this process must not hang too."""
        message = ForkingPickler.dumps(request)

        def send() -> None:
            with suppress(OSError):  # it has ended, which the wait for its answer finds out
                self.connection.send_bytes(message)

        Thread(target=send, daemon=True).start()

    def reply(self, looks: Mapping[str, Callable[[float], bool]]) -> Any:
        """The next reply; None where the process has ended, or a function exceeded its limit.

        Args:
            looks: For each function that is waited for, `Waiting.look`.
        """
        last = time.monotonic()
        while not self.has_reply():
            now = time.monotonic()
            elapsed, last = min(now - last, 2 * LOOK_S), now  # not the time in which this process was suspended
            late = [name for name, look in looks.items() if look(elapsed)]
            if late:
                self.late, self.is_lost = late, True
                return None
        return self.receive()

    def has_reply(self) -> bool:
        """Whether there is something to receive, if only that the process has ended; waits a moment for it.

        The process is asked too: its own children may hold the connection open.
        """
        return self.connection.poll(LOOK_S) or self.popen.poll() is not None

    def receive(self) -> Any:
        """The next reply; None where the process has ended."""
        try:
            if self.connection.poll() or self.popen.poll() is None:
                return self.connection.recv()
        except (EOFError, OSError):
            with suppress(subprocess.TimeoutExpired):
                self.popen.wait(SHUTDOWN_S)
        self.is_lost = True
        return None

    @property
    def end(self) -> str:
        """How the process ended, in words."""
        status = self.popen.poll()
        if status is None:
            return "closed the connection of the process that it runs in"
        return end_in_words(status)

    def kill(self) -> None:
        """Ends the process, and those that it has started, at once."""
        with suppress(ProcessLookupError):
            os.killpg(self.popen.pid, signal.SIGKILL)
        self.popen.wait()
        self.close()


def _close(popen: subprocess.Popen[bytes], connection: Connection, lifeline: int) -> None:
    """Ends the process in order: it runs what its code has registered for its exit."""
    connection.close()
    try:
        popen.wait(SHUTDOWN_S)
    except subprocess.TimeoutExpired:
        with suppress(ProcessLookupError):
            os.killpg(popen.pid, signal.SIGKILL)
        popen.wait()
    os.close(lifeline)


def _ended(process: _Process, waiting: Mapping[str, Waiting]) -> dict[str, Failure]:
    """Failures of the functions with which the process ended: those that exceeded their limit, or else all."""
    if process.late:
        return {
            name: Failure(what=f"did not return within {waiting[name].limit()}", kind="", seconds=0.0, is_stuck=True)
            for name in process.late
        }
    return {name: Failure(what=process.end, kind=process.end, seconds=0.0) for name in waiting}
