"""The loop of an episode's process, in this one; that all of them end is tested in test_processes.py."""

import json
import os
import random
import socket
import subprocess
import sys
from contextlib import suppress
from threading import Thread

import numpy as np
import pytest

from llmrl.environments.environment import Environment, Message
from llmrl.environments.episode import Close, Open, Respond
from llmrl.environments.loading import Loaded
from llmrl.environments.serve import FORK, _send_last, _Template, live, packed


class Echo(Environment):
    def start(self, row):
        return [{"role": "user", "content": f"{row['n']} {random.random()} {np.random.random()}"}]

    def respond(self, message):
        return f"{message.text} {random.random()} {np.random.random()}"


@pytest.fixture
def process():
    """The other end of the socket that an episode lives on."""
    state, numpy_state = random.getstate(), np.random.get_state()
    ours, theirs = socket.socketpair()
    thread = Thread(target=live, args=(theirs, Loaded(Echo, {}, {})))
    thread.start()
    yield ours
    ours.shutdown(socket.SHUT_RDWR)
    thread.join(10)
    assert not thread.is_alive(), "it ends with its connection"
    ours.close()
    theirs.close()
    random.setstate(state)
    np.random.set_state(numpy_state)


def test_each_request_has_its_lines_and_all_random_numbers_are_seeded(process):
    for request in (Open({"n": 1}, 7, 8), Respond(Message("é\n", 1, [])), Close()):
        process.sendall(packed(request))
    with process.makefile() as lines:
        opening, turn, reward = (json.loads(lines.readline()) for _ in range(3))
    drawn = [(random.Random(seed).random(), np.random.RandomState(seed).random_sample()) for seed in (7, 8)]
    assert opening == ["answer", [{"role": "user", "content": f"1 {drawn[0][0]} {drawn[0][1]}"}]]
    assert turn == ["answer", [f"é\n {drawn[1][0]} {drawn[1][1]}", False, 0.0]]
    assert reward == ["answer", None]


def test_a_request_may_come_in_pieces(process):
    for byte in packed(Open({"n": 1}, 7, 8)):
        process.sendall(bytes([byte]))
    with process.makefile() as lines:
        assert json.loads(lines.readline())[0] == "answer"


def test_the_last_line_is_on_a_line_of_its_own_and_waits_for_no_reader():
    ours, theirs = socket.socketpair()
    theirs.sendall(b'["answer", ["lo')
    _send_last(theirs, b'["ended", 3]\n')
    assert ours.recv(1000) == b'["answer", ["lo\n["ended", 3]\n'
    assert ours.recv(1000) == b""
    ours.close()

    ours, theirs = socket.socketpair()
    theirs.setblocking(False)
    with suppress(BlockingIOError):
        while theirs.send(bytes(4096)):
            pass
    _send_last(theirs, b'["ended", 3]\n')
    ours.close()


def test_a_process_that_cannot_be_started_is_a_failure_of_its_own(monkeypatch):
    def fork() -> int:
        raise BlockingIOError(11, "no more")

    monkeypatch.setattr(os, "fork", fork)
    parent, control = socket.socketpair()
    ours, theirs = socket.socketpair()
    template = _Template(control, -1, Loaded(Echo, {}, {}))
    socket.send_fds(parent, [FORK], [theirs.fileno()])
    assert template._receive()
    assert ours.recv(1000) == b'\n["failure", "process", "could not be started: [Errno 11] no more"]\n'
    assert ours.recv(1000) == b""
    for each in (parent, control, ours, theirs, template.awake, template.waker):
        each.close()


@pytest.mark.slow
def test_the_processes_import_no_heavy_library():
    program = "import sys, llmrl.environments.serve; print(*{'torch', 'transformers', 'numpy'} & sys.modules.keys())"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, env=os.environ)
    assert done.stdout.strip() == ""
