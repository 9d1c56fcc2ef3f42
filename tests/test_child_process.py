"""A process that code of users runs in ends with its parent; that it does so in use is tested where it is used."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from llmrl.child_process import end_in_words, flush_output, start_child

SERVES = """
import os, signal, subprocess, sys, time
from llmrl.child_process import end_with

def serve(connection, lifeline):
    os.set_inheritable(end_with(lifeline), False)
    signal.signal(signal.SIGIO, signal.SIG_IGN)
    children = [subprocess.Popen(["sleep", "3600"]).pid]
    if not (child := os.fork()):
        time.sleep(3600)
    os.write(connection, " ".join(map(str, [os.getpid(), child, *children])).encode())
    print(os.getcwd(), flush=True)
    time.sleep(3600)
"""


def is_alive(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.parametrize(
    ("status", "words"),
    [
        (0, "ended the process that it runs in with exit status 0"),
        (3, "ended the process that it runs in with exit status 3"),
        (-11, "ended the process that it runs in by SIGSEGV"),
        (
            -9,
            "ended the process that it runs in by SIGKILL (which the system sends where memory runs out)",
        ),
    ],
)
def test_the_end_of_a_process_in_words(status, words):
    assert end_in_words(status) == words


def test_output_that_is_closed_is_flushed_without_an_error(monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)
    flush_output()


@pytest.mark.slow
def test_the_kernel_kills_the_whole_group_with_the_other_end_of_the_lifeline(tmp_path, monkeypatch):
    (tmp_path / "serves_forever.py").write_text(SERVES)
    monkeypatch.syspath_prepend(tmp_path)
    mine, theirs = os.pipe()
    popen, lifeline = start_child("serves_forever", theirs, str(tmp_path))
    processes = [int(number) for number in os.read(mine, 1000).split()]
    assert len(processes) == 3
    assert processes[0] == popen.pid
    assert all(map(is_alive, processes))
    os.close(lifeline)
    assert popen.wait(30) == -signal.SIGKILL
    deadline = time.monotonic() + 30
    while any(map(is_alive, processes)):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    os.close(mine)
    os.close(theirs)


@pytest.mark.slow
def test_a_process_whose_parent_is_gone_already_ends_before_it_does_anything():
    program = (
        "import os; from llmrl.child_process import end_with; a, b = os.pipe(); os.close(b); end_with(a); print(1)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "")
