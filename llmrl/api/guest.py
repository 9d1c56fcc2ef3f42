"""Parts of a run in a process that belongs to a program: prepared as the command prepares its own, and put back."""

from collections.abc import Iterator
from contextlib import contextmanager
from warnings import catch_warnings

import torch
from transformers.utils.logging import enable_progress_bar, is_progress_bar_enabled

from llmrl.distributed.activity import HERE
from llmrl.distributed.device import prepare_device, torch_as_it_was
from llmrl.distributed.stop import STOP, handlers, restore
from llmrl.distributed.watchdog import PhaseTimeout
from llmrl.errors import Error
from llmrl.files import REFUSALS
from llmrl.memory import MemoryFull, describe_full_memory
from llmrl.output_streams import ignore_warnings_to_authors
from llmrl.settings import SettingError
from llmrl.wiring.process import quieten


@contextmanager
def computing(*, deterministic: bool = False, raises: bool = True) -> Iterator[None]:
    """Context of a part of a run. Its errors are those of a user, and the process is put back after it: handlers of
    signals, settings of torch, bars of transformers.

    Args:
        deterministic: See `prepare_device`.
        raises: Whether a signal ends it at once; else whoever computes looks for it.
    """
    with errors_of_users(), quiet(), torch_as_it_was(), torch.enable_grad(), STOP.listening(raises=raises):
        prepare_device(deterministic=deterministic)
        yield


@contextmanager
def quiet() -> Iterator[None]:
    """Context in which libraries print no bars, no lines and no warnings to one another."""
    with_bars = is_progress_bar_enabled()
    quieten()
    with catch_warnings():
        ignore_warnings_to_authors()
        try:
            yield
        finally:
            if with_bars:
                enable_progress_bar()


@contextmanager
def checking() -> Iterator[None]:
    """Context of everything before a model loads: what is wrong there is the input."""
    with errors_of_users(), quiet():
        try:
            yield
        except Error:
            raise
        except ValueError as error:
            raise SettingError(str(error)) from error


@contextmanager
def errors_of_users() -> Iterator[None]:
    """Context in which whatever has a cause outside of llmrl is an `Error`; anything else propagates."""
    try:
        yield
    except (FloatingPointError, PhaseTimeout) as error:
        raise Error(str(error)) from error
    except OSError as error:
        if error.errno not in REFUSALS or error.filename is None:
            raise
        raise Error(f"{error.filename}: {error.strerror}") from error
    except (RuntimeError, MemoryError) as error:
        message = None if isinstance(error, Error) else describe_full_memory(error, HERE.phase)
        if message is None:
            raise
        raise MemoryFull(message) from error


@contextmanager
def handlers_kept() -> Iterator[None]:
    """Context after which the signals have the handlers that they had before it."""
    before = handlers()
    try:
        yield
    finally:
        restore(before)


@contextmanager
def own_random_numbers() -> Iterator[None]:
    """Context after which torch draws the random numbers that it would have drawn without it."""
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    with torch.random.fork_rng(devices=devices):
        yield
