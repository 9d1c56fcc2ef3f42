"""Environments and tools that a program hands over as Python objects: a thread of this process for each episode.

Nothing can end a thread: a call that exceeds its limit is left to itself, and its episode has failed.
"""

from collections import deque
from collections.abc import Collection
from copy import deepcopy
from queue import SimpleQueue
from threading import Event, Thread

from llmrl.environments.episode import Episode, Request
from llmrl.environments.exchange import LOOK_S, Exchange, Exchanges
from llmrl.environments.loading import Code, Loaded, load_code


class Threads(Exchanges):
    """`Host` in this process.

    Args:
        code: What to run; objects that are handed over are named ``given:name``.
        timeout_s: Time limit of one call, in seconds.
    """

    def __init__(self, code: Code, *, timeout_s: float) -> None:
        super().__init__(timeout_s)
        self.names = code
        self.has_lines = Event()
        self.loaded: Loaded | None = None

    def load(self) -> None:
        """See `Host`."""
        self.loaded = load_code(self.names)
        self.code = self.loaded.digests

    def make_link(self) -> "_Thread":
        """See `Exchanges`."""
        assert self.loaded is not None, "the code is loaded first"
        return _Thread(self.loaded, self.has_lines)

    def ready(self, waiting: Collection[Exchange]) -> Collection[Exchange]:
        """See `Exchanges`."""
        self.has_lines.wait(LOOK_S)
        self.has_lines.clear()
        return waiting


class _Thread:
    """`Link` to an episode in a thread, which ends after its last request."""

    def __init__(self, loaded: Loaded, has_lines: Event) -> None:
        self.episode = Episode(loaded.make, loaded.tools)
        self.has_lines = has_lines
        self.requests: SimpleQueue[Request | None] = SimpleQueue()
        self.arrived: deque[str] = deque()
        self.is_dropped = False
        Thread(target=self._run, name="episode", daemon=True).start()

    def send(self, request: Request) -> None:
        """See `Link`."""
        self.requests.put(deepcopy(request))  # whatever the environment does to it stays there

    def lines(self) -> list[str]:
        """See `Link`."""
        return [self.arrived.popleft() for _ in range(len(self.arrived))]

    def drop(self) -> None:
        """See `Link`."""
        self.is_dropped = True
        self.requests.put(None)

    def _run(self) -> None:
        with self.episode.loop:
            while not self.is_dropped and (request := self.requests.get()) is not None:
                for line in self.episode.lines(request):
                    self.arrived.append(line)
                    self.has_lines.set()
