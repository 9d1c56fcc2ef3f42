"""A single process that hangs in a phase ends by itself."""

import signal
import time

import pytest

from llmrl.distributed.activity import Activity
from llmrl.distributed.collectives import OneProcess
from llmrl.distributed.config import DistributedConfig
from llmrl.distributed.heartbeat import watched
from llmrl.distributed.watchdog import PhaseTimeout, phases_limited


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    monkeypatch.setattr("llmrl.distributed.watchdog.LOOK_S", 0.01)


def test_a_phase_that_does_not_end_is_told_and_no_exception_is_swallowed():
    activity = Activity()
    activity.enter("reward", 3)
    said = r"^the phase reward of iteration 3 has lasted longer than distributed\.phase_timeout_s \(0\.05 s\)$"
    started = time.monotonic()
    with pytest.raises(PhaseTimeout, match=said), phases_limited(0.05, activity):
        tries_again()
    assert time.monotonic() - started < 5


def tries_again():
    while True:
        try:
            time.sleep(60)
        except Exception:
            continue


def test_phases_that_end_may_last_longer_together():
    activity = Activity()
    with phases_limited(0.2, activity):
        for iteration in range(10):
            activity.enter("reward", iteration)
            time.sleep(0.05)


def test_nothing_is_left_behind():
    before = signal.getsignal(signal.SIGUSR2)
    with phases_limited(0.03, Activity()):
        pass
    assert signal.getsignal(signal.SIGUSR2) is before
    time.sleep(0.06)


def test_one_process_is_limited_where_the_setting_is_set():
    with pytest.raises(PhaseTimeout), watched(OneProcess(), DistributedConfig(phase_timeout_s=0.05)):
        time.sleep(60)
    with watched(OneProcess(), DistributedConfig()):
        assert signal.getsignal(signal.SIGUSR2) == signal.SIG_DFL


def test_several_processes_are_limited_always():
    assert DistributedConfig().phase_limit_s == 3600
    assert DistributedConfig(phase_timeout_s=5.0).phase_limit_s == 5
