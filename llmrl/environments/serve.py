"""The processes in which the environments of a recipe run: a template, which loads the code once, and a fork of it for
each episode.

The template gets the code to load over its connection, replies in a line of JSON, and then forks for each socket that
comes over the connection. It keeps the socket until the fork has ended, and kills it, with every process of its group,
as soon as the parent has closed the other end. When a fork has ended, whatever has ended it, what is left of its group
is killed, and the socket gets its exit status as the last line.

All of these end with the parent: the kernel kills each group, see `end_with`. What is printed goes where the parent
prints, and is lost where that is closed; standard input is empty.
"""

import gc
import json
import os
import random
import select
import signal
import socket
import sys
import traceback
from contextlib import suppress
from multiprocessing.reduction import ForkingPickler
from struct import Struct
from typing import Any, BinaryIO

from llmrl.child_process import end_with, flush_output
from llmrl.environments.episode import Episode, Open
from llmrl.environments.hosting import PROCESS
from llmrl.environments.loading import Loaded, load_code
from llmrl.output_streams import lasting_output
from llmrl.user_code import UserCodeError

SIZE = Struct("!Q")
"""The number of bytes that stands before each pickled object."""
FORK = b"f"
"""The byte that a socket for an episode comes with."""


def packed(value: Any) -> bytes:
    """An object as it is sent to these processes; none of them sends one back, since code of users runs there."""
    pickled = bytes(ForkingPickler.dumps(value))
    return SIZE.pack(len(pickled)) + pickled


def serve(connection: int, lifeline: int) -> None:
    """Serves the parent until it closes the connection.

    Args:
        connection: File descriptor of a socket to the parent.
        lifeline: File descriptor of the pipe that ends with the parent.
    """
    lifeline = end_with(lifeline)
    with lasting_output(warns=False):  # the run prints to the same, and warns
        _serve(socket.socket(fileno=connection), lifeline)


def _serve(connection: socket.socket, lifeline: int) -> None:
    folder = os.getcwd()
    with connection.makefile("rb") as stream:
        code = _read(stream)
    if code is None:  # the parent is gone
        return
    try:
        loaded = load_code(code)
    except UserCodeError as error:
        connection.sendall(_line("refused", str(error)))
        return
    os.chdir(folder)
    flush_output()
    digests = {name: {str(file): digest for file, digest in files.items()} for name, files in loaded.digests.items()}
    connection.sendall(_line("loaded", digests))
    gc.collect()
    gc.freeze()  # what is there stays in memory that all forks share
    _Template(connection, lifeline, loaded).run()


class _Template:
    def __init__(self, connection: socket.socket, lifeline: int, loaded: Loaded) -> None:
        self.connection = connection
        self.lifeline = lifeline
        self.loaded = loaded
        self.sockets: dict[int, socket.socket] = {}
        """Sockets by the processes that live on them."""
        self.processes: dict[int, int] = {}
        """Processes by the file descriptors of their sockets."""
        self.poll = select.poll()
        self.awake, self.waker = socket.socketpair()

    def run(self) -> None:
        """Forks until the parent closes the connection; then ends all forks."""
        for end in (self.awake, self.waker):
            end.setblocking(False)
        signal.set_wakeup_fd(self.waker.fileno(), warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda *_: None)  # it wakes the poll
        self.poll.register(self.connection, select.POLLIN)
        self.poll.register(self.awake, select.POLLIN)
        is_open = True
        while is_open:
            events = dict(self.poll.poll())
            has_request = events.pop(self.connection.fileno(), 0)
            has_ended = events.pop(self.awake.fileno(), 0)
            for descriptor in events:
                self.poll.unregister(descriptor)
                _kill(self.processes[descriptor])
            if has_ended:
                self._reap()
            if has_request:
                is_open = self._receive()
        signal.set_wakeup_fd(-1)  # or forks that end later are reported to a socket that is closed
        for process in self.sockets:
            _kill(process)

    def _receive(self) -> bool:
        """Forks for the next socket. Whether there is one: else the parent has closed the connection."""
        received, descriptors, _, _ = socket.recv_fds(self.connection, len(FORK), 1)
        if not received:
            return False
        os.set_inheritable(descriptors[0], False)
        episode = socket.socket(fileno=descriptors[0])
        try:
            process = os.fork()
        except OSError as error:
            _send_last(episode, _line("failure", PROCESS, f"could not be started: {error}"))
            return True
        if process == 0:
            self._become_episode(episode)
        with suppress(ProcessLookupError):
            os.setpgid(process, process)  # it does that too, and whoever is the first
        self.sockets[process] = episode
        self.processes[episode.fileno()] = process
        self.poll.register(episode, 0)  # reports only that the other end is closed
        return True

    def _reap(self) -> None:
        with suppress(BlockingIOError):
            while self.awake.recv(4096):
                pass
        with suppress(ChildProcessError):
            while ended := os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT):
                process = ended.si_pid
                episode = self.sockets.pop(process, None)
                if episode is not None:
                    _kill(process)  # what it has started; until it is waited for, no other group can have its number
                _, status = os.waitpid(process, 0)
                if episode is not None:
                    del self.processes[episode.fileno()]
                    with suppress(KeyError):
                        self.poll.unregister(episode)
                    _send_last(episode, _line("ended", os.waitstatus_to_exitcode(status)))

    def _become_episode(self, episode: socket.socket) -> None:
        """The life of a fork, which never returns."""
        try:
            os.setpgid(0, 0)
            end_with(self.lifeline)
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            for other in (self.connection, self.awake, self.waker, *self.sockets.values()):
                other.close()
            live(episode, self.loaded)
        except OSError:  # the parent has closed the other end
            pass
        except BaseException:
            traceback.print_exc()
        finally:
            flush_output()
            os._exit(0)


def live(connection: socket.socket, loaded: Loaded) -> None:
    """Answers the requests of one episode until the other end is closed."""
    process, episode = os.getpid(), Episode(loaded.make, loaded.tools)
    stream = connection.makefile("rb")
    while (request := _read(stream)) is not None:
        if isinstance(request, Open):
            _seed(request.opening_seed)
        for line in episode.lines(request):
            if os.getpid() != process:
                return  # a child that code of users has forked, and that came back
            flush_output()
            connection.sendall(line.encode() + b"\n")
        if isinstance(request, Open):
            _seed(request.seed)


def _seed(seed: int) -> None:
    """Seeds the random numbers of the whole process, which would be the same in all forks."""
    random.seed(seed)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(seed % 2**32)


def _read(stream: BinaryIO) -> Any:
    """The next object; None where the other end is closed."""
    size = stream.read(SIZE.size)
    if len(size) < SIZE.size:
        return None
    return ForkingPickler.loads(stream.read(*SIZE.unpack(size)))  # type: ignore[attr-defined]


def _line(*values: Any) -> bytes:
    return json.dumps(values).encode() + b"\n"


def _send_last(episode: socket.socket, line: bytes) -> None:
    """Sends a line, unless there is no room for it because nothing is read any more, and closes the socket."""
    with suppress(OSError):
        episode.send(b"\n" + line, socket.MSG_DONTWAIT)  # on a line of its own, if the process ended within one
    with suppress(OSError):
        episode.shutdown(socket.SHUT_RDWR)
    episode.close()


def _kill(process: int) -> None:
    """Ends a process and its group at once."""
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(process, signal.SIGKILL)
