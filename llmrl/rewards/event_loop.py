"""The event loop in which coroutines of rewards run: one for the whole process, in a thread of its own.

So what a function keeps open between calls stays usable, and a loop that runs in the caller's thread, as in a notebook,
is no obstacle.
"""

import asyncio
import atexit
import os
from collections.abc import Coroutine
from concurrent.futures import Future
from functools import cache
from threading import Thread
from typing import Any

SHUTDOWN_S = 5.0
"""Seconds that cancelled tasks get to end at exit."""


def start_in_loop(coroutine: Coroutine[Any, Any, Any]) -> Future[Any]:
    """A coroutine begins to run; its result or exception comes in the future, which can be cancelled."""
    return asyncio.run_coroutine_threadsafe(coroutine, _loop())


@cache
def _loop() -> asyncio.AbstractEventLoop:
    """The event loop of this process: started at the first call, closed at exit."""
    started: Future[tuple[asyncio.AbstractEventLoop, asyncio.Event]] = Future()

    async def live() -> None:
        is_over = asyncio.Event()
        started.set_result((asyncio.get_running_loop(), is_over))
        await is_over.wait()

    thread = Thread(target=lambda: asyncio.run(live()), name="event loop of rewards", daemon=True)
    thread.start()
    loop, is_over = started.result()

    def close() -> None:
        loop.call_soon_threadsafe(is_over.set)
        thread.join(SHUTDOWN_S)

    atexit.register(close)
    return loop


os.register_at_fork(after_in_child=_loop.cache_clear)
"""The thread of the loop stays with the parent: a child that is forked starts its own."""
