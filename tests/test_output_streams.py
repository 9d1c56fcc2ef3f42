"""Output that ends nobody: closed pipes, full disks, encodings that lack a letter."""

import errno
import io
import os
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest

from llmrl.output_streams import LastingStream, lasting_output

BUFFERED = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
"""With what Python holds back and writes as it ends."""


class Broken(io.StringIO):
    """A stream that refuses what it is asked to do `num_refused` times."""

    def __init__(self, error: Exception, num_refused: int = 10**9) -> None:
        super().__init__()
        self.error = error
        self.num_refused = num_refused

    def write(self, text: str) -> int:
        self.num_refused -= 1
        if self.num_refused >= 0:
            raise self.error
        return super().write(text)


def lasting(stream: Any) -> tuple[LastingStream, list[str]]:
    said: list[str] = []
    return LastingStream(stream, said.append), said


@pytest.mark.parametrize(
    "error",
    [BrokenPipeError(errno.EPIPE, "Broken pipe"), OSError(errno.ENOSPC, "full"), ValueError("I/O on closed file")],
)
def test_what_cannot_be_written_is_lost_and_told_once(error: Exception):
    stream, said = lasting(Broken(error, 2))
    for text in ("a", "b", "c", "d"):
        assert stream.write(text) == 1
        stream.flush()
    assert stream.stream.getvalue() == "cd"  # type: ignore[attr-defined]
    assert said == ([] if isinstance(error, BrokenPipeError) else [str(error)])


@pytest.mark.parametrize(
    ("encoding", "text", "shown"),
    [
        ("ascii", "ü 🙂", b"\\xfc \\U0001f642"),
        ("latin-1", "ü 🙂", b"\xfc \\U0001f642"),
        ("utf-8", "a\udc80", b"a\\udc80"),
    ],
)
def test_what_an_encoding_lacks_is_an_escape(encoding: str, text: str, shown: bytes):
    raw = io.BytesIO()
    stream, said = lasting(io.TextIOWrapper(raw, encoding=encoding))
    print(text, file=stream, flush=True)  # type: ignore[call-overload]
    assert raw.getvalue() == shown + b"\n"
    assert said == []


def test_all_else_is_that_of_the_stream():
    stream, _ = lasting(io.TextIOWrapper(io.BytesIO(), encoding="latin-1"))
    assert stream.encoding == "latin-1"
    assert not stream.isatty()


def test_the_streams_are_given_back(monkeypatch: pytest.MonkeyPatch):
    before = sys.stdout, sys.stderr
    with lasting_output():
        assert isinstance(sys.stdout, LastingStream)
    assert (sys.stdout, sys.stderr) == before
    with pytest.raises(ZeroDivisionError), lasting_output():
        raise ZeroDivisionError
    assert (sys.stdout, sys.stderr) == before
    monkeypatch.setattr(sys, "stdout", None)
    monkeypatch.setattr(sys, "stderr", None)
    with lasting_output():
        print("to nobody")
        assert not sys.stdout.isatty()
    assert sys.stdout is None


@pytest.fixture
def closed_pipe() -> Iterator[int]:
    """A pipe to write to, which nobody reads."""
    reader, writer = os.pipe()
    os.close(reader)
    yield writer
    os.close(writer)


def test_the_status_is_that_of_the_run_whoever_has_gone_away(closed_pipe: int):
    """Standard output is a pipe that nobody reads, and standard error a full disk."""
    program = (
        "import sys\nfrom llmrl.output_streams import lasting_output\n"
        "with lasting_output():\n  for _ in range(9999): print('x' * 80); print('y', file=sys.stderr)\nsys.exit(7)"
    )
    with open("/dev/full", "w") as full:
        run = subprocess.run(
            [sys.executable, "-c", program], stdout=closed_pipe, stderr=full, env=BUFFERED, check=False
        )
    assert run.returncode == 7


@pytest.mark.parametrize("num_lines", [3, 9999])
def test_what_is_held_back_does_not_change_the_status(num_lines: int):
    program = (
        "import sys\nfrom llmrl.output_streams import lasting_output\n"
        f"with lasting_output():\n  for _ in range({num_lines}): print('x' * 80)\n"
    )
    with open("/dev/full", "w") as full:
        run = subprocess.run(
            [sys.executable, "-c", program], stdout=full, stderr=subprocess.PIPE, text=True, env=BUFFERED, check=False
        )
    assert run.returncode == 0
    assert run.stderr == (
        "warning: standard output cannot be written ([Errno 28] No space left on device); the run goes on\n"
    )


def test_a_closed_pipe_is_no_error_and_is_not_told(closed_pipe: int):
    program = (
        "from llmrl.output_streams import lasting_output\n"
        "with lasting_output():\n  for _ in range(9999): print('x' * 80, flush=True)"
    )
    run = subprocess.run(
        [sys.executable, "-c", program], stdout=closed_pipe, stderr=subprocess.PIPE, text=True, check=False
    )
    assert run.returncode == 0
    assert run.stderr == ""
