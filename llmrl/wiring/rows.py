"""Reading of a recipe's rows, and a report of those that were dropped."""

from collections.abc import Callable, Sequence
from typing import TypeVar

from llmrl.data.config import DataConfig
from llmrl.data.files import DataError, listed
from llmrl.data.rows import expanded, is_file
from llmrl.messages import counted
from llmrl.roles import Progress

C = TypeVar("C", bound=DataConfig)
R = TypeVar("R", bound=list)

EVALUATION = "evaluation_data"


def read_section(
    config: C,
    read: Callable[[C], R],
    unchecked: list[str],
    *,
    dry: bool,
    section: str = "data",
    made_by: str | None = None,
) -> R | None:
    """The rows that a config names. A dry run passes over a file that a command is still to make, and over the hub.

    Raises:
        DataError: There is no such file, and `made_by` is the command that makes it; or what `read` raises.
    """
    to_make = made_by is not None and is_file(config.path) and not expanded(config.path).exists()
    if dry and not is_file(config.path):
        unchecked.append(f"{section}.path ({config.path}) is a data set on the hub, which a dry run does not fetch")
    elif dry and to_make:
        unchecked.append(f"{section}.path ({config.path}) does not exist yet; `{made_by}` makes it")
    elif to_make:
        raise DataError(f"{expanded(config.path)} does not exist; make it with `{made_by}`")
    else:
        return read(config)
    return None


def report_dropped(places: Sequence[str], section: str, limit: str, progress: Progress) -> None:
    """Reports how many rows a length limit dropped, and the places of the first ones."""
    if places:
        rows = counted(len(places), "row")
        progress.message(f"{section}: dropped {rows} longer than {section}.{limit}: {listed(places)}")
