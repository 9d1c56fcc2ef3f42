"""Failure detection between ranks: each learns within seconds that another failed, fell silent or is stuck, and ends.

    main thread of a rank       start, rollout, reward, ...                  its error, if it ends by one
                                       |                                               |
    its heartbeat, a thread     beat: send where this rank is, read where the others are; record a failure
                                       |                        |
    the launcher's store        beat/0, beat/1, ...         failure: the first one, written once and never over

What happens once there is a failure: each rank prints it in one line, except the one whose traceback shows it; its
main thread has `WORKING_S` to end by itself, so that a run whose weights have not moved can still be saved; then the
thread ends the process, whatever its main thread hangs in.

Ranks compare counters with their own clock, never the clocks of two hosts; time in which this process did not run,
because a terminal or a host suspended it, is not counted. A rank that is frozen and one that was killed look the same:
both are silent.

Tested between CPUs, with gloo. Between GPUs it is untested: a collective of NCCL that waits for a rank
that is gone waits on, so the main thread does not end by itself, and is ended while it waits.
"""

import json
import os
import re
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from datetime import timedelta
from threading import Event, Thread, main_thread
from typing import Any

import torch.distributed as dist

from llmrl.distributed.activity import HERE, Activity
from llmrl.distributed.config import DistributedConfig
from llmrl.distributed.stop import STOP, install, restore
from llmrl.distributed.watchdog import phases_limited
from llmrl.errors import Error
from llmrl.roles import Collectives

BEAT_S = 1.0
"""Seconds between two signs of life."""
SUSPECT_S = 4.0
"""Seconds of silence after which a rank counts as gone, once an error here may come from a lost connection."""
LOOK_S = 6.0
"""Seconds that such an error waits for the failure of another rank that would explain it."""
WORKING_S = 20.0
"""Seconds that a main thread may go on after another rank failed: its next collective fails, and it may save."""
WAITING_S = 5.0
"""Seconds of these that it may wait in one collective."""
HEARD_S = 3.0
"""Seconds that a rank that ends stays connected, so that the others read why before its connections close."""

CONNECTION_ERROR = re.compile("gloo|nccl|c10d|connection (closed|reset)|broken pipe", re.IGNORECASE)


class AnotherRankFailed(Error):
    """This rank ends because of another; the reason is printed already."""


@dataclass(frozen=True)
class Beat:
    """A sign of life: where a rank is."""

    count: int = 0
    iteration: int = 0
    phase: str = "start"
    seconds: float = 0.0
    """Time in the phase so far."""
    is_waiting: bool = False

    @property
    def place(self) -> str:
        return f"the phase {self.phase}" + (f" of iteration {self.iteration}" if self.iteration else "")

    def __str__(self) -> str:
        return f"{'waits for others' if self.is_waiting else 'works'}, {self.seconds:.0f} s in {self.place}"


@dataclass(frozen=True)
class Failure:
    """Failure of a rank, for which all ranks end."""

    by: int
    """The rank that recorded it."""
    text: str
    error: str = ""
    """The exception by which the recording rank ends."""
    is_stuck: bool = False
    """A phase lasts too long, so no rank is waited for."""
    status: int = 1


class Heartbeat:
    """Sends the signs of life of this rank, and detects failures from those of the others."""

    def __init__(
        self,
        store: dist.Store,
        *,
        rank: int,
        world_size: int,
        config: DistributedConfig,
        activity: Activity,
        clock: Callable[[], float] = time.monotonic,
        exit_now: Callable[[int], object] = os._exit,
    ) -> None:
        self.store = store
        self.rank = rank
        self.ranks = range(world_size)
        self.config = config
        self.activity = activity
        self.clock = clock
        self.exit_now = exit_now
        self.last_tick = clock()
        self.beats = [Beat() for _ in self.ranks]
        """The newest sign of life of each rank."""
        self.silent_s = [0.0 for _ in self.ranks]
        """Seconds since the counter of each rank last moved."""
        self.num_phases = activity.num_phases
        self.error: BaseException | None = None
        """The exception by which the main thread ends."""
        self.error_s = 0.0
        """Seconds since that exception."""
        self.terminated_s: float | None = None
        """Seconds since a signal came outside of iterations; None: none has."""
        self.signal: signal.Signals | None = None
        """That signal."""
        self.failure: Failure | None = None
        self.is_leaving = False
        """This rank is done and waits for the others. The first one to exit may close the store."""
        self.is_stopped = False
        self.wake = Event()
        for key in ("failure", *(f"beat/{rank}" for rank in self.ranks)):
            store.compare_set(key, "", "{}")  # reading a missing key would block until it is set
        self.threads = [Thread(target=work, daemon=True) for work in (self._live, self._guard)]

    # --- the main thread ---

    def start(self) -> None:
        for thread in self.threads:
            thread.start()

    def stop(self) -> None:
        """Stops the threads: every rank is done."""
        self.is_stopped = True
        self.wake.set()

    def failed_first(self, error: BaseException) -> bool:
        """Whether this rank, which ends by the error, is the first to fail. All ranks that can be reached know it then.

        An error of its own that is not the first is printed in a line too.
        """
        self.error = error
        self.wake.set()
        self.threads[0].join(LOOK_S + HEARD_S + self.config.silent_after_s)
        if self.failure is None or self._is_mine(self.failure):
            return True
        own = self._own(error)
        if own.error != self.failure.error and not _is_lost_connection(error):
            _print_line(f"rank {self.rank} failed too, in {self.beats[self.rank].place}: {own.error}")
        return False

    def terminate(self, number: int, _: object = None) -> None:
        """Handler of signals: a launcher sends SIGTERM when a rank has failed; this one first finds out which."""
        if self.signal is None:
            self.signal, self.terminated_s = signal.Signals(number), 0.0

    # --- one beat ---

    def beat(self) -> None:
        """Sends where this rank is, reads where the others are, and records a failure that it detects."""
        elapsed = self._tick()
        failure, *received = (json.loads(text) for text in self.store.multi_get(self._keys))
        self._receive([Beat(**beat) for beat in received], elapsed)
        self.store.set(f"beat/{self.rank}", json.dumps(asdict(self.beats[self.rank])))
        if failure:
            self.failure = Failure(**failure)
        elif detected := self._detect():
            self.failure = self._record(detected)

    @property
    def _keys(self) -> list[str]:
        return ["failure", *(f"beat/{rank}" for rank in self.ranks)]

    def _tick(self) -> float:
        """Seconds since the last beat, at most two beats: anything longer means that this process was suspended."""
        now = self.clock()
        elapsed, self.last_tick = min(now - self.last_tick, 2 * BEAT_S), now
        self.error_s += elapsed if self.error else 0.0
        if self.terminated_s is not None:
            self.terminated_s += elapsed
        return elapsed

    def _receive(self, received: list[Beat], elapsed: float) -> None:
        for rank in self.ranks:
            has_moved = received[rank].count != self.beats[rank].count
            self.silent_s[rank] = 0.0 if has_moved else self.silent_s[rank] + elapsed
        own, activity = self.beats[self.rank], self.activity
        is_new = activity.num_phases != self.num_phases
        self.num_phases = activity.num_phases
        self.beats = received
        self.beats[self.rank] = Beat(
            count=own.count + 1,
            iteration=activity.iteration,
            phase=activity.phase,
            seconds=0.0 if is_new else own.seconds + elapsed,
            is_waiting=activity.is_waiting,
        )
        self.silent_s[self.rank] = 0.0

    def _detect(self) -> Failure | None:
        """A failure that no rank has recorded yet, or None."""
        if self.error is not None and not _is_lost_connection(self.error):
            return self._own(self.error)
        is_looking = self.error is not None or self.terminated_s is not None
        limit = min(SUSPECT_S, self.config.silent_after_s) if is_looking else self.config.silent_after_s
        if silent := [rank for rank in self.ranks if self.silent_s[rank] >= limit]:
            return Failure(self.rank, "; ".join(self._silence(rank) for rank in silent))
        if self.error is not None and self.error_s > LOOK_S:
            return self._own(self.error)
        if self.signal is not None and self.terminated_s is not None and self.terminated_s > LOOK_S:
            return Failure(self.rank, f"{self.signal.name} came, and no rank has failed", status=128 + self.signal)
        if any(beat.seconds > self.config.phase_limit_s for beat in self.beats):
            return Failure(self.rank, self._stuck(), is_stuck=True)
        return None

    def _own(self, error: BaseException) -> Failure:
        line = traceback.format_exception_only(error)[0].splitlines()[0]
        return Failure(self.rank, f"rank {self.rank} failed in {self.beats[self.rank].place}: {line}", line)

    def _silence(self, rank: int) -> str:
        said = f"rank {rank} gave no sign of life for {self.silent_s[rank]:.0f} s"
        return f"{said}; it was last seen in {self.beats[rank].place}" if self.beats[rank].count else said

    def _stuck(self) -> str:
        """Message of a phase timeout, with the place of every rank: which one keeps the others waiting."""
        places = "; ".join(f"rank {rank} {self.beats[rank]}" for rank in self.ranks)
        return f"a phase has lasted longer than distributed.phase_timeout_s ({self.config.phase_limit_s:g} s): {places}"

    def _record(self, detected: Failure) -> Failure:
        """The first failure recorded by any rank: this one, unless another was quicker."""
        return Failure(**json.loads(self.store.compare_set("failure", "{}", json.dumps(asdict(detected)))))

    # --- the threads ---

    def _live(self) -> None:
        """Main loop of the heartbeat: beats until every rank is done or one fails, then ends this process."""
        try:
            while self.failure is None and not self.is_stopped:
                self.beat()
                self.wake.wait(BEAT_S if self.error is None else BEAT_S / 4)
            if self.failure is not None:
                self.report(self.failure)
                self._wait_until_heard()
        except RuntimeError:
            if self.is_leaving and self.error is None:
                return
            if self.failure is None:
                self.failure = self._without_store("is gone")
                self.report(self.failure)
                STOP.note(signal.SIGTERM)  # where only the launcher is gone, a run can still stop in order
        if self.failure is not None:
            self.end(self.failure)

    def _guard(self) -> None:
        """Ends this rank when the store is frozen: a request to it then never returns, whatever its timeout."""
        silent_s, count = 0.0, -1
        while self.failure is None and not self.is_leaving:
            time.sleep(BEAT_S)
            own = self.beats[self.rank].count
            silent_s, count = (silent_s + BEAT_S if own == count else 0.0), own
            if silent_s >= self.config.silent_after_s and not self.is_leaving:
                self.failure = self._without_store(f"has not answered for {silent_s:.0f} s")
                self.report(self.failure)
                self.exit_now(1)

    def _without_store(self, what: str) -> Failure:
        host = f"rank 0, last seen in {self.beats[0].place}"
        return Failure(self.rank, f"the store that connects the ranks {what}: it is part of the launcher, or of {host}")

    def end(self, failure: Failure) -> None:
        """Ends this process, unless its main thread does so within `WORKING_S`."""
        left_s = 0.0 if failure.is_stuck else WORKING_S
        waiting_s = 0.0
        while self.error is None and left_s > 0 and waiting_s < WAITING_S:
            time.sleep(BEAT_S / 4)
            left_s -= BEAT_S / 4
            waiting_s = waiting_s + BEAT_S / 4 if self.activity.is_waiting else 0.0
        if self.error is None:
            self.exit_now(failure.status)

    def report(self, failure: Failure) -> None:
        """Prints the failure in one line, unless this rank's own traceback shows it."""
        if self.error is not None and self._own(self.error).error == failure.error:
            return
        _print_line(f"rank {self.rank} ends: {failure.text}")
        if failure.is_stuck and not self.beats[self.rank].is_waiting:
            stack = traceback.format_stack(sys._current_frames()[main_thread().ident or 0])
            _print_line(f"rank {self.rank} is at:\n{''.join(stack)}")

    def _is_mine(self, failure: Failure) -> bool:
        """Whether this failure is the error by which this rank ends."""
        return failure.by == self.rank and failure.error != ""

    def _wait_until_heard(self) -> None:
        num_alive = sum(silent_s < SUSPECT_S for silent_s in self.silent_s)
        num_heard, waited_s = self.store.add("heard", 1), 0.0
        while num_heard < num_alive and waited_s < HEARD_S:
            time.sleep(BEAT_S / 10)
            num_heard, waited_s = self.store.add("heard", 0), waited_s + BEAT_S / 10


def _print_line(text: str) -> None:
    """Prints to stderr in one write, so that lines of several ranks do not mix."""
    sys.stderr.write(f"{text}\n")
    sys.stderr.flush()


def _is_lost_connection(error: BaseException) -> bool:
    """Whether an error may come from the lost connection to a rank that is gone."""
    return isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError) and CONNECTION_ERROR.search(str(error)) is not None
    )


@contextmanager
def watched(collectives: Collectives, config: DistributedConfig) -> Iterator[None]:
    """Context of all that ranks do together: each ends soon after another failed, or when a phase lasts too long.

    Raises:
        AnotherRankFailed: Another rank failed first; in place of this rank's own error.
        PhaseTimeout: In a single process, a phase lasts too long.
    """
    if collectives.world_size == 1:
        with nullcontext() if config.phase_timeout_s is None else phases_limited(config.phase_timeout_s):
            yield
        return
    heartbeat = Heartbeat(
        _own_connection(config.silent_after_s),
        rank=collectives.rank,
        world_size=collectives.world_size,
        config=config,
        activity=HERE,
    )
    before = install(heartbeat.terminate)
    heartbeat.start()
    try:
        yield
        heartbeat.is_leaving = True
        collectives.barrier()  # no rank leaves while others still communicate
    except BaseException as error:
        if heartbeat.failed_first(error):
            raise
        raise AnotherRankFailed from None
    heartbeat.stop()
    restore(before)


def _own_connection(timeout_s: float) -> dist.Store:
    """New connection to the rendezvous store: on the shared one a thread would queue after the main thread."""
    shared: Any = dist.distributed_c10d._get_default_store()
    store = dist.PrefixStore("heartbeat", shared.clone())
    store.set_timeout(timedelta(seconds=timeout_s))
    return store
