"""Environments and tools that a recipe names: a process for each episode, which can be ended whatever runs in it.

A fresh interpreter, the template, loads the code once and forks for each episode; see `llmrl.environments.serve`. So
code of users is in no process that has a model or a GPU, and what one episode does to its process, whether it hangs,
crashes or changes a module, changes no other.
"""

import json
import os
import resource
import select
import signal
import socket
import subprocess
import weakref
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from pathlib import Path

from llmrl.child_process import end_in_words, start_child
from llmrl.environments.episode import MAX_CHARACTERS, Request
from llmrl.environments.exchange import LOOK_S, Exchange, Exchanges
from llmrl.environments.hosting import PROCESS, Failure
from llmrl.environments.loading import ENVIRONMENT, Code
from llmrl.environments.serve import FORK, packed
from llmrl.user_code import UserCodeError, UserCodeFailure, changed_file

LOADING_S = 600.0
"""Time limit of loading the code."""
FIRST_S = 30.0
"""Seconds of loading after which it is mentioned."""
SHUTDOWN_S = 5.0
"""Seconds that the template gets to end by itself."""
MAX_FILES = 2**16
"""Open files that this process asks for, since each episode has one."""
CHUNK = 2**16


class Processes(Exchanges):
    """`Host` with a process for each episode.

    Args:
        code: What to run.
        timeout_s: Time limit of one call, in seconds.
        tell: Prints a message.
    """

    def __init__(self, code: Code, *, timeout_s: float, tell: Callable[[str], None]) -> None:
        super().__init__(timeout_s)
        self.names = code
        self.tell = tell
        self.folder = os.getcwd()
        self.template: _Template | None = None

    def load(self) -> None:
        """See `Host`."""
        _allow_files()
        self.end()
        self._drop_template()
        self._start_template()
        assert self.template is not None, "it was started"
        self.code = self.template.digests

    def make_link(self) -> "_Link":
        """See `Exchanges`.

        Raises:
            UserCodeFailure: The template has ended, and its code is another one by now or does not load again.
        """
        if self.template is None or self.template.status is not None:
            self._start_again()
        assert self.template is not None, "it was started"
        return _Link(self.template)

    def ready(self, waiting: Collection[Exchange]) -> Collection[Exchange]:
        """See `Exchanges`."""
        poll, links = select.poll(), {}
        for exchange in waiting:
            assert isinstance(exchange.link, _Link), "it was made here"
            descriptor = exchange.link.connection.fileno()
            poll.register(descriptor, select.POLLIN | (select.POLLOUT if exchange.link.outgoing else 0))
            links[descriptor] = exchange
        found = [links[descriptor] for descriptor, _ in poll.poll(LOOK_S * 1000)]
        if self.template is None or self.template.status is not None:
            self._lose()
            return ()
        return found

    def _start_template(self) -> None:
        self.template = _Template(self.folder)
        try:
            self.template.load(self.names, self.tell)
        except BaseException:
            self._drop_template()
            raise

    def _start_again(self) -> None:
        self._lose()
        for name, digests in self.code.items():
            if changed := changed_file(digests):
                raise UserCodeFailure(
                    f"{name}: {changed} has changed during the run, and would be loaded anew, since the process that "
                    "had loaded it has ended; start the command again"
                )
        try:
            self._start_template()
        except UserCodeError as error:
            raise UserCodeFailure(f"could not be loaded again: {error}") from error

    def _lose(self) -> None:
        """Fails all open episodes, whose template has ended."""
        status = None if self.template is None else self.template.status
        self._drop_template()
        how = "is gone" if status is None else end_in_words(status)
        for exchange in self.exchanges.values():
            exchange.fail(Failure(PROCESS, f"the process that starts all episodes {how}"))

    def _drop_template(self) -> None:
        if self.template is not None:
            self.template.close()
            self.template = None


class _Template:
    """The process that forks for each episode. It is closed when this is garbage, or at exit."""

    def __init__(self, folder: str) -> None:
        self.connection, theirs = socket.socketpair()
        with theirs:
            self.popen, lifeline = start_child("llmrl.environments.serve", theirs.fileno(), folder)
        self.digests: Mapping[str, Mapping[Path, str | None]] = {}
        self.close = weakref.finalize(self, _close, self.popen, self.connection, lifeline)

    def load(self, code: Code, tell: Callable[[str], None]) -> None:
        """Lets it load the code of users.

        Raises:
            UserCodeError: It does not load.
        """
        name = f"{ENVIRONMENT} {code.name}" if code.name else f"tools {', '.join(code.tools)}"
        self.connection.sendall(packed(code))
        seconds, has_told, received = 0.0, False, b""
        while not received.endswith(b"\n"):
            if select.select([self.connection], [], [], LOOK_S)[0]:
                received += (chunk := self.connection.recv(CHUNK))
                if not chunk:
                    self.close()
                    raise UserCodeError(f"{name}: while it was loaded, its code {end_in_words(self.popen.returncode)}")
            elif (seconds := seconds + LOOK_S) > LOADING_S:
                raise UserCodeError(f"{name}: it did not load within {LOADING_S:g} s")
            elif seconds > FIRST_S and not has_told:
                has_told = True
                tell(f"{name} is still loading after {FIRST_S:g} s; its limit is {LOADING_S:g} s")
        kind, value = json.loads(received)
        if kind == "refused":
            raise UserCodeError(value)
        self.digests = {name: {Path(file): digest for file, digest in files.items()} for name, files in value.items()}

    def fork(self, theirs: socket.socket) -> None:
        """Lets it start a process that lives on a socket."""
        with suppress(OSError):  # it has ended, which the wait for an answer finds out
            socket.send_fds(self.connection, [FORK], [theirs.fileno()])

    @property
    def status(self) -> int | None:
        """Exit status; None while it runs."""
        return self.popen.poll()


class _Link:
    """`Link` to an episode in a process."""

    def __init__(self, template: _Template) -> None:
        self.connection, theirs = socket.socketpair()
        self.connection.setblocking(False)
        self.outgoing = bytearray()
        """What the process has not taken yet."""
        self.incoming = bytearray()
        """The beginning of a line."""
        with theirs:
            template.fork(theirs)

    def send(self, request: Request) -> None:
        """See `Link`."""
        self.outgoing += packed(request)
        self._push()

    def lines(self) -> list[bytes]:
        """See `Link`."""
        self._push()
        is_over = False
        with suppress(BlockingIOError):
            while len(self.incoming) <= 2 * MAX_CHARACTERS and not is_over:
                chunk = self._receive()
                self.incoming += chunk
                is_over = not chunk
        *lines, self.incoming = self.incoming.split(b"\n")
        found = [bytes(line) for line in lines if line]
        if is_over:
            found.append(b'["closed"]')
        elif len(self.incoming) > 2 * MAX_CHARACTERS:
            found.append(b"no line that `Episode` writes")
        return found

    def drop(self) -> None:
        """See `Link`. The template kills the process, and those that it has started."""
        with suppress(OSError):
            self.connection.shutdown(socket.SHUT_RDWR)
        self.connection.close()

    def _push(self) -> None:
        with suppress(BlockingIOError):
            while self.outgoing:
                try:
                    del self.outgoing[: self.connection.send(self.outgoing)]
                except (BrokenPipeError, ConnectionResetError):  # it has ended
                    self.outgoing.clear()

    def _receive(self) -> bytes:
        try:
            return self.connection.recv(CHUNK)
        except ConnectionResetError:  # it has ended, and has not read all
            return b""


def _close(popen: subprocess.Popen[bytes], connection: socket.socket, lifeline: int) -> None:
    """Ends the template in order, and then whatever is left of it and of its forks."""
    connection.close()
    try:
        popen.wait(SHUTDOWN_S)
    except subprocess.TimeoutExpired:
        with suppress(ProcessLookupError):
            os.killpg(popen.pid, signal.SIGKILL)
        popen.wait()
    os.close(lifeline)


def _allow_files() -> None:
    """Raises the limit on open files, as far as the system allows."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MAX_FILES if hard == resource.RLIM_INFINITY else min(MAX_FILES, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
