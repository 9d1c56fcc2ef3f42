"""Data rows: plain mappings, read from a local file or from the hub and checked before any model loads."""

from collections.abc import Callable, Iterable, Sequence
from difflib import get_close_matches
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

from llmrl.batches import Row
from llmrl.data.config import DataConfig
from llmrl.data.files import SUFFIXES, DataError, FileRow, Rows, listed, read_file
from llmrl.hub import ask_for_dataset, is_local
from llmrl.messages import counted, in_one_line

MAX_LISTED = 20
"""Number of reasons that the refusal of bad rows lists."""
MAX_REASONS = 3
"""Number of reasons that the note on dropped rows lists."""
MAX_REASON = 500
"""Characters of a reason that a message has; a reason may quote a value."""
MAX_COLUMNS = 100
"""Number of columns that are looked through for the one that may be meant."""
SKIP = "set data.skip_bad_rows=true to drop and count them"

Value = TypeVar("Value")


def is_file(path: str) -> bool:
    """Whether a path means a file of this machine; anything else is the name of a data set on the hub."""
    return is_local(path, suffixes=SUFFIXES)


def expanded(path: str) -> Path:
    """A path whose `~` stands for the folder of a user."""
    try:
        return Path(path).expanduser()
    except RuntimeError as error:  # a user who is not known
        raise DataError(
            f"data.path ({path}): the folder that its ~ stands for is not known; write the path from the root"
        ) from error


def read_rows(config: DataConfig) -> Rows:
    """The rows that a config names, their columns renamed.

    JSON values keep their types and a key that a row lacks stays absent. CSV values are texts.
    """
    path = config.path
    rows = read_file(expanded(path)) if is_file(path) else _read_hub(path, config.subset, config.split)
    if not rows:
        raise DataError(f"{path} has no rows")
    rows = keep_usable(Rows(rows[: config.num_rows], rows.notes), config, lambda row: row.problem)
    return _renamed(rows, config)


def keep_usable(rows: Sequence[Row], config: DataConfig, problem: Callable[[Any], str | None]) -> Rows:
    """The rows for which `problem` returns None. The others are refused, or dropped and noted (`skip_bad_rows`)."""
    placed = [row if isinstance(row, FileRow) else FileRow(row, f"row {n}") for n, row in enumerate(rows, start=1)]
    judged = [(row, problem(row)) for row in placed]
    bad = [(row.place, reason) for row, reason in judged if reason]
    kept = [row for row, reason in judged if not reason]
    notes = list(rows.notes) if isinstance(rows, Rows) else []
    if bad and not (kept and config.skip_bad_rows):
        raise _bad_rows(config.path, bad, len(rows), SKIP if kept else None)
    if bad:
        notes.append(f"dropped {len(bad)} of {len(rows)} rows: " + "; ".join(_by_reason(bad, len(rows))[:MAX_REASONS]))
    return Rows(kept, notes)


def column_names(rows: Iterable[Row]) -> list[str]:
    """Every column that some row has, in the order in which they turn up."""
    return list(dict.fromkeys(name for row in rows for name in row))


def check_rows(
    path: str, rows: Sequence[Value], problem: Callable[[Value], str | None], *, places: Sequence[str] | None = None
) -> None:
    """Raises one `DataError` that lists the rows for which `problem` returns a reason, if there are any.

    Args:
        path: Where the rows came from.
        rows: Rows, or what was made of them.
        problem: Why one is bad, or None.
        places: Place of each, for messages; not needed for rows of a file.
    """
    judged = zip(places or places_of(rows), map(problem, rows), strict=True)
    if bad := [(place, reason) for place, reason in judged if reason]:
        raise _bad_rows(path, bad, len(rows))


def places_of(rows: Sequence[Any]) -> list[str]:
    """Place of each row, for messages: its line in a file of lines, else its number."""
    return [row.place if isinstance(row, FileRow) else f"row {number}" for number, row in enumerate(rows, start=1)]


def missing_column(row: Row, column: str, setting: str | None = None) -> str:
    """Message about a missing column, with the one that may be meant; `setting` names the column."""
    names = list(islice(row, MAX_COLUMNS))
    nearest = get_close_matches(column, names, n=1)
    more = ", ..." if len(row) > len(names) else ""
    way_out = f"did you mean {nearest[0]!r}?" if nearest else f"there are {', '.join(names) or 'none'}{more}"
    return f"no column {column!r}; {way_out}" + (f" (data.{setting} names it)" if setting else "")


def missing_columns(row: Row, config: DataConfig, *settings: str) -> str | None:
    """Message about every column that settings name and a row lacks; None where it has all of them."""
    columns = {setting: getattr(config, setting) for setting in settings}
    missing = [missing_column(row, column, setting) for setting, column in columns.items() if column not in row]
    return "; ".join(missing) or None


def _bad_rows(path: str, bad: Sequence[tuple[str, str]], num_rows: int, way_out: str | None = None) -> DataError:
    """Error about bad rows, each a place and a reason."""
    reasons = _by_reason(bad, num_rows)
    lines = [f"{path}: {counted(len(bad), 'bad row')}", *(f"  {reason}" for reason in reasons[:MAX_LISTED])]
    if len(reasons) > MAX_LISTED:
        lines.append(f"  and {len(reasons) - MAX_LISTED} more")
    return DataError("\n".join([*lines, way_out] if way_out else lines))


def _by_reason(bad: Sequence[tuple[str, str]], num_rows: int) -> list[str]:
    """Each reason once, with the places where it holds."""
    places: dict[str, list[str]] = {}
    for place, reason in bad:
        brief = reason if len(reason) <= MAX_REASON else f"{reason[:MAX_REASON]}..."
        places.setdefault(brief, []).append(place)
    return [
        f"{f'all {num_rows} rows' if 1 < num_rows == len(where) else listed(where)}: {reason}"
        for reason, where in places.items()
    ]


def _renamed(rows: Rows, config: DataConfig) -> Rows:
    """The rows with other names for their columns, those left out whose new name is null."""
    if not config.rename_columns:
        return rows
    present = column_names(rows)
    for name in config.rename_columns:
        if name not in present:
            raise DataError(f"{config.path}: data.rename_columns: {missing_column(dict.fromkeys(present), name)}")
    names = {name: config.rename_columns.get(name, name) for name in present}
    new = [name for name in names.values() if name is not None]
    for name in new:
        if new.count(name) > 1:
            raise DataError(
                f"{config.path}: data.rename_columns ({config.rename_columns}) makes two columns {name!r}; "
                f"leave the other out by {{{name}: null}}, or rename it too"
            )
    renamed = [
        FileRow({new: value for old, value in row.items() if (new := names[old]) is not None}, row.place)
        for row in rows
    ]
    return Rows(renamed, rows.notes)


def _read_hub(name: str, subset: str | None, split: str) -> Rows:
    from datasets import Dataset, load_dataset  # takes a second to import, and files do without it
    from datasets.exceptions import DatasetsError

    try:
        ask_for_dataset(name)
        dataset = load_dataset(name, subset, split=split)
    except (OSError, ValueError, DatasetsError) as error:
        raise DataError(
            f"{name} is neither a file here nor a data set on the hub that can be reached, with subset ({subset}) "
            f"and split ({split}): {in_one_line(error)}"
        ) from error
    assert isinstance(dataset, Dataset), "one split was asked for"
    return Rows(FileRow(row, f"row {number}") for number, row in enumerate(dataset.to_list(), start=1))
