"""One event loop for the whole process."""

import asyncio
import subprocess
import sys

import pytest

from llmrl.rewards.event_loop import start_in_loop


async def here():
    return asyncio.get_running_loop()


def test_it_is_the_same_in_every_call_even_inside_another_one():
    async def notebook():
        return start_in_loop(here()).result(), asyncio.get_running_loop()

    inside, outside = asyncio.run(notebook())
    assert start_in_loop(here()).result() is inside is not outside


def test_what_a_coroutine_raises_comes_back():
    async def fails():
        raise KeyError("gold")

    with pytest.raises(KeyError, match="gold"):
        start_in_loop(fails()).result()


AT_EXIT = """
import asyncio
from llmrl.rewards.event_loop import start_in_loop
tasks = []

async def keep_alive():
    try:
        await asyncio.sleep(60)
    finally:
        print("hangs up", flush=True)

async def judge():
    tasks.append(asyncio.ensure_future(keep_alive()))
    await asyncio.sleep(0)

start_in_loop(judge()).result()
"""


def test_it_is_closed_at_exit_without_a_word():
    command = [sys.executable, "-X", "dev", "-c", AT_EXIT]
    process = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert (process.stdout, process.stderr) == ("hangs up\n", "")


FORKED = """
import os, signal
from llmrl.rewards.event_loop import start_in_loop

async def answer():
    return 7

start_in_loop(answer()).result()
child = os.fork()
if not child:
    signal.alarm(10)
    os._exit(start_in_loop(answer()).result())
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), start_in_loop(answer()).result())
"""


def test_a_child_that_is_forked_has_its_own():
    command = [sys.executable, "-W", "ignore::DeprecationWarning", "-c", FORKED]
    process = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert process.stdout == "7 7\n"
