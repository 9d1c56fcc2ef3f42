"""Signals to this very process, whose handlers only note them."""

import io
import os
import signal
import subprocess
import sys

import pytest

from llmrl.distributed import stop as module
from llmrl.distributed.stop import SAME_S, SIGNALS, Interrupted, Stop

pytestmark = pytest.mark.usefixtures("default_signals")


def handlers():
    return [signal.getsignal(number) for number in SIGNALS]


@pytest.fixture
def clock(monkeypatch):
    """Seconds that a test sets, and the statuses by which the process would have ended."""

    class Clock:
        now = 100.0
        exits = []  # noqa: RUF012

    monkeypatch.setattr(module.time, "monotonic", lambda: Clock.now)
    monkeypatch.setattr(module, "exit_at_once", lambda number: Clock.exits.append(128 + number))
    return Clock


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_is_noted_and_nothing_else_happens(number):
    stop = Stop()
    with stop.listening(raises=False):
        signal.raise_signal(number)
        assert stop.number == number
    assert handlers() == [signal.SIG_DFL] * 4


@pytest.mark.parametrize("number", SIGNALS)
def test_where_nothing_is_lost_it_raises_at_once(number):
    stop = Stop()
    with pytest.raises(Interrupted, match=f"^stopped by {number.name}$") as raised, stop.listening(raises=True):
        signal.raise_signal(number)
    assert raised.value.number == number
    assert not isinstance(raised.value, Exception)
    assert handlers() == [signal.SIG_DFL] * 4


def test_within_a_run_it_does_not(clock):
    """And it does again afterwards."""
    stop = Stop()
    with stop.listening(raises=True):
        with stop.listening(raises=False):
            signal.raise_signal(signal.SIGINT)
        assert stop.number == signal.SIGINT
        signal.raise_signal(signal.SIGINT)  # counts as the first
    with stop.listening(raises=True), pytest.raises(Interrupted):
        signal.raise_signal(signal.SIGINT)


def test_the_next_run_of_a_process_begins_without_a_signal():
    stop = Stop()
    for _ in range(2):
        with stop.listening(raises=False):
            assert (stop.number, stop.notice()) == (0, None)
            signal.raise_signal(signal.SIGTERM)
            assert stop.notice()


def test_only_a_second_signal_ends_the_process(clock):
    stop = Stop()
    with stop.listening(raises=False):
        for number, later in ((signal.SIGINT, 0), (signal.SIGINT, 0.5), (signal.SIGTERM, SAME_S - 0.6)):
            clock.now += later
            signal.raise_signal(number)
        assert (stop.number, clock.exits) == (signal.SIGINT, [])
        clock.now += 0.2
        signal.raise_signal(signal.SIGTERM)
    assert clock.exits == [128 + signal.SIGTERM]


def test_a_second_signal_ends_what_swallowed_the_first(clock):
    stop = Stop()
    with stop.listening(raises=True):
        with pytest.raises(Interrupted):
            signal.raise_signal(signal.SIGTERM)
        clock.now += SAME_S
        signal.raise_signal(signal.SIGTERM)
    assert clock.exits == [128 + signal.SIGTERM]


def test_a_closed_terminal_does_not_stop_what_nohup_started():
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    stop = Stop()
    with stop.listening(raises=False):
        signal.raise_signal(signal.SIGHUP)
        assert stop.number == 0
    assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN


@pytest.mark.parametrize("raises", [False, True])
def test_a_forked_child_can_be_terminated(raises):
    """As a pool of worker processes terminates them."""
    with module.STOP.listening(raises=raises):
        child = os.fork()
        if child == 0:
            signal.raise_signal(signal.SIGTERM)
            os._exit(3)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGTERM


def test_it_leaves_where_that_is_allowed_and_nowhere_else():
    stop, allowed = Stop(), [False]
    stop.look()
    stop.note(signal.SIGTERM)
    stop.look()  # in no iteration
    with stop.leaving(lambda: allowed[0], alone=True):
        stop.look()
        allowed[0] = True
        with pytest.raises(Interrupted):
            stop.look()
    stop.look()


def test_one_of_several_leaves_only_together_with_the_others():
    stop = Stop()
    stop.note(signal.SIGTERM)
    with stop.leaving(lambda: True, alone=False):
        stop.look()
        stop.look_together([0, 0])
        with pytest.raises(Interrupted) as raised:
            stop.look_together([0, signal.SIGUSR1])
    assert raised.value.number == signal.SIGUSR1
    stop.look_together([0, signal.SIGUSR1])


def test_it_is_told_once():
    stop = Stop()
    stop.note(signal.SIGUSR1)
    assert stop.notice() == "SIGUSR1: stops as soon as everything is saved; a second signal stops at once"
    assert stop.notice() is None


class Signalling(io.RawIOBase):
    """A file to which a signal comes in the middle of its first write."""

    def __init__(self):
        self.num_writes = 0

    def writable(self):
        return True

    def write(self, data):
        self.num_writes += 1
        if self.num_writes == 1:
            signal.raise_signal(signal.SIGTERM)
        return len(data)


def test_a_signal_in_the_middle_of_a_print_does_no_harm(monkeypatch):
    """A handler that prints would raise "reentrant call"."""
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BufferedWriter(Signalling())))
    stop = Stop()
    with stop.listening(raises=False):
        print("score", flush=True)
    assert stop.number == signal.SIGTERM


ENDS = """
import os, signal
from llmrl.distributed.stop import STOP
if {terminal}:
    os.isatty = lambda descriptor: True
with STOP.listening(raises=False):
    STOP.note({number})
    STOP.came_at -= 60
    signal.raise_signal({number})
    print("still here", flush=True)
"""


@pytest.mark.parametrize("number", SIGNALS)
@pytest.mark.parametrize(("terminal", "printed"), [(False, b""), (True, b"\x1b[?25h\n")])
def test_a_process_ends_with_the_status_of_its_signal_and_the_cursor_is_back(number, terminal, printed):
    code = ENDS.format(number=int(number), terminal=terminal)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, env=os.environ, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (128 + number, printed, b"")
