"""Standard output and standard error that outlive what they lead to: a pipe that is closed, a disk that is full;
and the warnings that come there."""

import os
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any


def ignore_warnings_to_authors() -> None:
    """Leaves out what libraries warn one another of, where a user could do nothing."""
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"(accelerate|peft|torch|transformers)(\.|$)")


class LastingStream:
    """A text stream that raises nothing when it is written to. What its encoding lacks is written as an escape; what
    cannot be written is lost, and `report` receives why, once, unless a reader has closed its pipe, as `head` does.
    Everything else is that of the stream.
    """

    def __init__(self, stream: Any, report: Callable[[str], None]) -> None:
        self.stream = stream
        self.report = report
        self.has_lost = False

    def write(self, text: str) -> int:
        """See `TextIO`."""
        self._try(lambda: self._write(text))
        return len(text)

    def writelines(self, lines: Any) -> None:
        """See `TextIO`."""
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        """See `TextIO`."""
        self._try(self.stream.flush)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def _write(self, text: str) -> None:
        try:
            self.stream.write(text)
        except UnicodeEncodeError:
            encoding = self.stream.encoding
            self.stream.write(text.encode(encoding, "backslashreplace").decode(encoding))

    def _try(self, call: Callable[[], object]) -> None:
        try:
            call()
        except (OSError, ValueError) as error:  # a file that was closed is a ValueError
            if not self.has_lost:
                self.has_lost = True
                if not isinstance(error, BrokenPipeError):
                    self.report(str(error))


@contextmanager
def lasting_output(*, warns: bool = True) -> Iterator[None]:
    """Context in which nothing that is printed ends the process, whoever prints it, nor changes its status.

    `warns`: whether it warns once that standard output cannot be written.
    """

    def report(problem: str) -> None:
        if warns:
            print(f"warning: standard output cannot be written ({problem}); the run goes on", file=errors)

    before = sys.stdout, sys.stderr
    errors = LastingStream(_or_nowhere(sys.stderr), lambda _: None)
    output = LastingStream(_or_nowhere(sys.stdout), report)
    sys.stdout, sys.stderr = output, errors  # type: ignore[assignment]
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before
        for lasting in (output, errors):
            lasting.flush()
            if lasting.has_lost:
                _lead_nowhere(lasting.stream)


def _or_nowhere(stream: Any) -> Any:
    """The stream; one that drops everything where the process was started without."""
    return stream or open(os.devnull, "w")


def _lead_nowhere(stream: Any) -> None:
    """Drops what a stream still holds: else Python tries to write it as it ends, and makes the status 120."""
    with suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)
