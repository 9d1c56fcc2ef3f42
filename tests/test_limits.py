"""Limits of time and memory within a process."""

import resource
import signal
import sys
import threading
from contextlib import suppress

import pytest

from llmrl.limits import TooLong, can_limit_time, memory_limit, time_limit


def test_what_does_not_end_is_stopped():
    def spin():
        while True:
            with suppress(Exception):  # which must not hold it
                while True:
                    pass

    with pytest.raises(TooLong), time_limit(0.05):
        spin()


def test_an_alarm_of_the_caller_keeps_its_handler():
    before = signal.signal(signal.SIGALRM, print)
    try:
        with time_limit(10.0):
            pass
        assert signal.getsignal(signal.SIGALRM) is print
        assert signal.getitimer(signal.ITIMER_REAL) == (0, 0)
    finally:
        signal.signal(signal.SIGALRM, before)


@pytest.mark.skipif(sys.platform != "linux", reason="the limit is one of Linux")
def test_what_takes_too_much_memory_is_stopped_and_the_limit_goes():
    before = resource.getrlimit(resource.RLIMIT_AS)
    with pytest.raises(MemoryError), memory_limit(2**28):
        bytearray(2**29)
    assert resource.getrlimit(resource.RLIMIT_AS) == before
    with memory_limit(2**30):
        assert len(bytearray(2**28)) == 2**28


def test_only_the_main_thread_can_be_stopped():
    found = []
    thread = threading.Thread(target=lambda: found.append(can_limit_time()))
    thread.start()
    thread.join()
    assert (found, can_limit_time()) == ([False], True)
