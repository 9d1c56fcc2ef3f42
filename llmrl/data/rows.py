"""Data rows: plain mappings, read from a local file or from the hub and checked before any model loads."""

import csv
import gzip
import json
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from io import StringIO
from pathlib import Path
from typing import Any, Literal, TypeVar

from llmrl.experience import Row
from llmrl.paths import UserPath

SUFFIXES = (".jsonl", ".jsonl.gz", ".json", ".csv", ".parquet")
MAX_LISTED = 20
HUB_TIMEOUT_S = 5.0
"""For the hub to say whether it has a data set."""

Value = TypeVar("Value")


class DataError(ValueError):
    """The data cannot be used as it is. The message says where, why, and the way out."""


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Which rows to read, and how they become prompts."""

    path: UserPath
    """A .jsonl, .jsonl.gz, .json, .csv or .parquet file, or a data set on the hub such as openai/gsm8k."""
    subset: str | None = None
    """Configuration of a data set on the hub."""
    split: str = "train"
    """Split of a data set on the hub; a file has no splits."""
    prompt_column: str = "prompt"
    """Column of the prompt: a text, or a list of messages with "role" and "content"."""
    system_prompt: str | None = None
    """System message put before the prompts that do not bring one. Needs a chat template."""
    template: Literal["auto", "chat", "none"] = "auto"
    """How a text becomes tokens: "chat" makes it the user's message in the tokenizer's chat template, "none" takes it
    as it is, "auto" is "chat" for a tokenizer that has a chat template and "none" for any other."""
    num_rows: int | None = None
    """Uses the first so many rows only."""
    made_by: str | None = None
    """Command that makes the file; named when the file is missing."""

    def __post_init__(self) -> None:
        if not self.path:
            raise ValueError('data.path ("") must name a file or a data set on the hub')
        if self.num_rows is not None and self.num_rows < 1:
            raise ValueError(f"data.num_rows ({self.num_rows}) must be at least 1; leave it out to use every row")
        if self.template == "none" and self.system_prompt is not None:
            raise ValueError(
                'data.system_prompt needs a chat template, but data.template is "none"; '
                'set data.template to "chat" or put the system prompt into the prompts'
            )


def is_local(path: str) -> bool:
    """Whether a path means a file of this machine; anything else is the name of a data set on the hub.

    Such a name has at most one slash, and what stands before that is no folder here.
    """
    owner, slash, _ = path.partition("/")
    in_a_folder_here = slash != "" and Path(owner).is_dir()
    explicit = path.startswith(("/", "./", "../", "~")) or path.endswith(SUFFIXES) or path.count("/") > 1
    return explicit or in_a_folder_here or Path(path).exists()


def load_rows(path: str, *, subset: str | None, split: str, made_by: str | None = None) -> list[Row]:
    """Every row of a local file, or of one split of a data set on the hub.

    JSON values keep their types and a key that a row lacks stays absent. CSV values are texts.

    Args:
        path: See `DataConfig.path`.
        subset: Configuration of a data set on the hub; a file has none.
        split: Split of a data set on the hub; a file has none.
        made_by: Command that makes the file; named when the file is missing.
    """
    rows = _load_file(Path(path).expanduser(), made_by) if is_local(path) else _load_hub(path, subset, split)
    if not rows:
        raise DataError(f"{path} has no rows")
    return rows


def load_config_rows(config: DataConfig) -> list[Row]:
    """The rows that a config names, as they are in the file."""
    rows = load_rows(config.path, subset=config.subset, split=config.split, made_by=config.made_by)
    return rows[: config.num_rows]


def column_names(rows: Iterable[Row]) -> list[str]:
    """Every column that some row has, in the order in which they turn up."""
    return list(dict.fromkeys(name for row in rows for name in row))


def check_rows(path: str, rows: Sequence[Value], problem: Callable[[Value], str | None]) -> None:
    """Raises one `DataError` that lists the rows of which `problem` gives a reason, unless there are none."""
    reasons = [(number, problem(row)) for number, row in enumerate(rows, start=1)]
    refuse_bad_rows(path, [(number, reason) for number, reason in reasons if reason])


def refuse_bad_rows(path: str, bad: Sequence[tuple[int, str]]) -> None:
    """Raises one `DataError` that lists the first twenty bad rows, unless there are none.

    Args:
        path: Where the rows came from.
        bad: ``(number, reason)`` of each bad row, numbers starting at 1.
    """
    if not bad:
        return
    places = _places(path, [number for number, _ in bad[:MAX_LISTED]])
    listed = [f"  {place}: {reason}" for place, (_, reason) in zip(places, bad, strict=False)]
    if len(bad) > MAX_LISTED:
        listed.append(f"  and {len(bad) - MAX_LISTED} more")
    raise DataError("\n".join([f"{path}: {len(bad)} bad rows", *listed]))


def missing_column(row: Row, column: str) -> str:
    """Says that a column is missing, and which one may be meant."""
    nearest = get_close_matches(column, row, n=1)
    way_out = f"did you mean {nearest[0]!r}?" if nearest else f"there are {', '.join(row) or 'none'}"
    return f"no column {column!r}; {way_out}"


def _places(path: str, numbers: Sequence[int]) -> list[str]:
    """Where a person finds rows: the lines where they begin in a file of lines, else their numbers."""
    if path.endswith(".csv"):
        lines = [line for line, _ in _csv_records(Path(path).expanduser())]  # the header's is number 0
        return [f"line {lines[number]}" for number in numbers]
    word = "line" if path.endswith((".jsonl", ".jsonl.gz")) else "row"
    return [f"{word} {number}" for number in numbers]


def _load_file(path: Path, made_by: str | None) -> list[Row]:
    if not path.exists():
        raise DataError(f"{path} does not exist{_way_out(path, made_by)}")
    if not path.name.endswith(SUFFIXES):
        raise DataError(f"{path} is not a file of a known kind: {', '.join(SUFFIXES)}")
    match path.suffix:
        case ".json":
            return _parse_json(path)
        case ".csv":
            return _parse_csv(path)
        case ".parquet":
            return _read_parquet(path)
        case _:
            return _parse_jsonl(path)


def _way_out(path: Path, made_by: str | None) -> str:
    if made_by:
        return f"; make it with `{made_by}`"
    siblings = [sibling.name for sibling in path.parent.glob("*") if sibling.is_file()]
    nearest = [f"; did you mean {path.with_name(name)}?" for name in get_close_matches(path.name, siblings, n=1)]
    return "".join(nearest) if path.is_absolute() or nearest else f" in {Path.cwd()}"


def _load_hub(name: str, subset: str | None, split: str) -> list[Row]:
    from datasets import Dataset, load_dataset  # takes a second to import, and files do without it
    from datasets.exceptions import DatasetsError

    try:
        _ask_hub(name)
        dataset = load_dataset(name, subset, split=split)
    except (OSError, ValueError, DatasetsError) as error:
        reason = " ".join(str(error).split())
        raise DataError(
            f"{name} is neither a file here nor a data set on the hub that can be reached, with subset ({subset}) "
            f"and split ({split}): {reason}"
        ) from error
    assert isinstance(dataset, Dataset), "one split was asked for"
    return dataset.to_list()


def _ask_hub(name: str) -> None:
    """Raises OSError where the hub does not have a data set or cannot be reached, and the local cache has none either.

    `load_dataset` asks a hub that does not answer again and again, for half a minute.
    """
    from datasets.load import CachedDatasetModuleFactory
    from huggingface_hub import HfApi

    try:
        HfApi().dataset_info(name, timeout=HUB_TIMEOUT_S)
    except Exception as error:  # errors of the network come in the classes of whichever client the hub's library uses
        try:
            CachedDatasetModuleFactory(name).get_module()
        except FileNotFoundError:
            raise OSError(str(error)) from error


def _read_parquet(path: Path) -> list[Row]:
    from pyarrow import ArrowException, parquet

    try:
        return parquet.read_table(path).to_pylist()
    except (ArrowException, OSError) as error:
        raise DataError(f"{path} cannot be read as Parquet; it may be cut off: {error}") from error


def _read_text(path: Path) -> str:
    try:
        content = path.read_bytes()
        return (gzip.decompress(content) if path.suffix == ".gz" else content).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text: {error}") from error
    except (OSError, EOFError, zlib.error) as error:  # what gzip says of a file that is none, is cut off or is damaged
        raise DataError(f"{path} cannot be read: {error}") from error


def _parse_jsonl(path: Path) -> list[Row]:
    text = _read_text(path).rstrip()
    parsed = [_parse_line(line) for line in text.split("\n")] if text else []
    refuse_bad_rows(str(path), [(number, reason) for number, (_, reason) in enumerate(parsed, start=1) if reason])
    return [row for row, _ in parsed]


def _parse_line(line: str) -> tuple[Any, str | None]:
    """``(row, None)``, or ``(whatever, the reason why it is none)``."""
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        return None, f"not valid JSON: {error}" if line.strip() else "an empty line"
    return row, _object_problem(row)


def _parse_json(path: Path) -> list[Row]:
    try:
        rows = json.loads(_read_text(path))
    except json.JSONDecodeError as error:
        raise DataError(f"{path} is not valid JSON: {error}; name it .jsonl if each line is an object") from error
    if not isinstance(rows, list):
        raise DataError(f"{path} must hold a list of objects, not a {type(rows).__name__}")
    check_rows(str(path), rows, _object_problem)
    return rows


def _object_problem(value: Any) -> str | None:
    return None if isinstance(value, dict) else f"must be a JSON object, not a {type(value).__name__}"


def _parse_csv(path: Path) -> list[Row]:
    records = [values for _, values in _csv_records(path)]
    header, records = records[:1], records[1:]
    check_rows(str(path), records, lambda record: _record_problem(record, *header))
    return [dict(zip(*header, record, strict=True)) for record in records]


def _csv_records(path: Path) -> Iterator[tuple[int, list[str]]]:
    """``(line, values)`` of each record and the header before them: the line where it begins."""
    reader = csv.reader(StringIO(_read_text(path), newline=""), strict=True)
    line = 1
    try:
        for values in reader:
            if values:
                yield line, values
            line = reader.line_num + 1
    except csv.Error as error:
        raise DataError(f"{path} is not valid CSV: line {line}: {error}") from error


def _record_problem(record: list[str], header: list[str]) -> str | None:
    return None if len(record) == len(header) else f"has {len(record)} values for {len(header)} columns"
