"""A fresh interpreter in which code of users runs: it can be ended whatever that does, and it ends with its parent."""

import fcntl
import os
import select
import signal
import subprocess
import sys


def start_child(module: str, connection: int, folder: str) -> tuple[subprocess.Popen[bytes], int]:
    """Starts an interpreter that calls ``serve(connection, lifeline)`` of a module.

    It has a process group of its own, so that a Ctrl-C goes to the run, which decides, and all of it can be ended at
    once; the modules that can be imported here; standard output and error of this process, and no input.

    Args:
        module: Name of the module.
        connection: File descriptor that the child gets too.
        folder: Working folder.

    Returns:
        The process, and the other end of its lifeline: once no process holds that, `end_with` ends the child.
    """
    lifeline, mine = os.pipe()
    program = f"import sys; sys.path[:] = {sys.path!r}; from {module} import serve; serve({connection}, {lifeline})"
    popen = subprocess.Popen(
        [sys.executable, "-c", program],
        stdin=subprocess.DEVNULL,
        pass_fds=(connection, lifeline),
        cwd=folder,
        process_group=0,
    )
    os.close(lifeline)
    return popen, mine


def end_with(lifeline: int) -> int:
    """Lets the kernel kill this process and all others of its group as soon as nothing holds the other end of a pipe.

    Returns:
        The end of the pipe by another file descriptor, in place of the one that was given: of a file that this process
        shares with none that it was forked from, since the owner of a signal belongs to the file.
    """
    own = os.open(f"/proc/self/fd/{lifeline}", os.O_RDONLY | os.O_NONBLOCK)
    os.close(lifeline)
    fcntl.fcntl(own, fcntl.F_SETOWN, -os.getpgrp())
    fcntl.fcntl(own, fcntl.F_SETSIG, signal.SIGKILL)
    fcntl.fcntl(own, fcntl.F_SETFL, fcntl.fcntl(own, fcntl.F_GETFL) | os.O_ASYNC)
    if select.select([own], [], [], 0)[0]:  # the other end was gone before
        os._exit(0)
    return own


def end_in_words(status: int) -> str:
    """How a process ended, said of the code that ran in it; `status` as `subprocess.Popen.returncode`."""
    if status >= 0:
        return f"ended the process that it runs in with exit status {status}"
    killer = signal.Signals(-status).name
    memory = " (which the system sends where memory runs out)" if killer == "SIGKILL" else ""
    return f"ended the process that it runs in by {killer}{memory}"


def flush_output() -> None:
    """Writes out what has been printed."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (AttributeError, OSError, ValueError):  # closed or replaced by a function
            continue
