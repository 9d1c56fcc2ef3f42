"""Data files: every kind that is read, each row with its place in the file or why it is unusable.

Blank lines are passed over, and a byte order mark. Half of a surrogate pair, which JSON can hold and UTF-8 cannot,
becomes U+FFFD.
"""

import codecs
import csv
import gzip
import json
import re
import zlib
from collections.abc import Iterable, Iterator, Sequence
from difflib import get_close_matches
from io import BytesIO, StringIO
from pathlib import Path
from typing import Any

from llmrl.errors import Error
from llmrl.files import LFS_POINTER
from llmrl.messages import in_one_line

TEXT_KINDS = (".jsonl", ".json", ".csv")
SUFFIXES = (*TEXT_KINDS, *(f"{kind}.gz" for kind in TEXT_KINDS), ".parquet")
FOREIGN = {
    codecs.BOM_UTF16_LE: "it is UTF-16; write it as UTF-8",
    codecs.BOM_UTF16_BE: "it is UTF-16; write it as UTF-8",
    b"\x1f\x8b": "it is compressed by gzip; let its name end with .gz",
    b"PAR1": "it is Parquet; let its name end with .parquet",
    b"PK": "it is a ZIP archive; unpack it",
}
"""Kind of a file that is no UTF-8 text, by its first bytes, and the way out."""
MAX_PLACES = 5
"""Number of places that a message lists where the same holds for many."""
SURROGATE = re.compile(r"[\ud800-\udfff]")
MAX_DEPTH = 100
"""Lists and objects in one another that a value of a row may have."""
MAX_INFLATION = 200
"""Bytes that each byte of a .gz file may stand for, from `FREE_BYTES` on; texts have 3 to 20."""
FREE_BYTES = 100_000_000
MAX_PARQUET_ROWS_PER_BYTE = 10
"""Rows that each byte of a Parquet file may stand for, from a million rows on."""
MAX_CELL = 2**31 - 1
"""Limit on the characters of a CSV cell; Python's own is 131,072."""


class DataError(Error, ValueError):
    """Data that cannot be used as it is. The message says where, why, and the way out."""


class FileRow(dict[str, Any]):
    """A row with its place for messages, such as "line 3" of its file."""

    __slots__ = ("place", "problem", "set_number")

    def __init__(self, values: Any, place: str, problem: str | None = None) -> None:
        """`problem` is why the file holds no row in this place, if it does not."""
        super().__init__(values)
        self.place = place
        self.problem = problem
        self.set_number = 0
        """Number of its set in a mixture."""


class Rows(list[FileRow]):
    """The rows of a file, and sentences on what was dropped or replaced among them."""

    def __init__(self, rows: Iterable[FileRow], notes: Iterable[str] = ()) -> None:
        super().__init__(rows)
        self.notes = list(notes)


def read_file(path: Path) -> Rows:
    """Every row of a file, including those with a `problem`."""
    _check_file(path)
    kind = path.name.lower().removesuffix(".gz")
    if kind.endswith(".parquet"):
        return _read_parquet(path)
    text = _read_text(path)
    if kind.endswith(".csv"):
        return _parse_csv(path, text)
    return _parse_jsonl(path, text) if kind.endswith(".jsonl") else _parse_json(path, text)


def _check_file(path: Path) -> None:
    """Refuses a path that is no file of a known kind."""
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        raise DataError(f"{path} does not exist{_way_out(path)}") from None
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read: {error}") from error
    is_parquet_folder = path.is_dir() and path.name.lower().endswith(".parquet")
    if path.is_dir() and not is_parquet_folder:
        raise DataError(f"{path} is a folder; {_file_of_folder(path)}")
    if not path.name.lower().endswith(SUFFIXES):
        raise DataError(f"{path} is not a file of a known kind: {', '.join(SUFFIXES)}")
    if not path.is_file() and not is_parquet_folder:
        raise DataError(f"{path} is no regular file but a pipe or a device; write the rows to a file")


def _way_out(path: Path) -> str:
    siblings = [sibling.name for sibling in path.parent.glob("*") if sibling.is_file()]
    nearest = [f"; did you mean {path.with_name(name)}?" for name in get_close_matches(path.name, siblings, n=1)]
    return "".join(nearest) if path.is_absolute() or nearest else f" in {Path.cwd()}"


def _file_of_folder(path: Path) -> str:
    if any((path / name).is_file() for name in ("dataset_info.json", "dataset_dict.json")):
        return "it looks saved by `save_to_disk` of datasets: write a split by its `to_parquet`, and name that file"
    files = sorted(file for glob in ("*", "*/*") for file in path.glob(glob) if file.name.lower().endswith(SUFFIXES))
    return f"name a file in it, such as {files[0]}" if files else f"name a file: {', '.join(SUFFIXES)}"


def _refuse_pointer(path: Path, content: bytes) -> None:
    if content.startswith(LFS_POINTER):
        raise DataError(f"{path} is a pointer of Git LFS and not the data; get the data by `git lfs pull`")


def _read_parquet(path: Path) -> Rows:
    from pyarrow import parquet

    try:
        if path.is_file():
            with path.open("rb") as file:
                _refuse_pointer(path, file.read(len(LFS_POINTER)))
            _refuse_repeated(path, parquet.read_schema(path).names)
            num_rows = parquet.read_metadata(path).num_rows
            if num_rows > max(1_000_000, path.stat().st_size * MAX_PARQUET_ROWS_PER_BYTE):
                raise DataError(
                    f"{path} stands for {num_rows:,} rows, which its {path.stat().st_size:,} bytes cannot hold"
                )
        rows = parquet.read_table(path, partitioning=None).to_pylist()  # type: ignore[arg-type]
    except DataError:
        raise
    except Exception as error:  # damage shows in whichever class Arrow, or what it makes values by, has for it
        raise DataError(f"{path} cannot be read as Parquet; it may be truncated: {in_one_line(error)}") from error
    return Rows(_object_row(row, f"row {number}") for number, row in enumerate(rows, start=1))


def _read_text(path: Path) -> str:
    try:
        content = path.read_bytes()
        if path.name.lower().endswith(".gz"):
            content = _inflated(path, content)
    except (OSError, EOFError, zlib.error) as error:  # from gzip: no gzip file, or a truncated or damaged one
        raise DataError(f"{path} cannot be read: {error}") from error
    _refuse_pointer(path, content)
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text: {_foreign(content, error)}") from error


def _inflated(path: Path, content: bytes) -> bytes:
    """What a file that gzip compressed holds."""
    most = max(FREE_BYTES, len(content) * MAX_INFLATION)
    with gzip.open(BytesIO(content)) as file:
        inflated = file.read(most + 1)
    if len(inflated) > most:
        raise DataError(f"{path} of {len(content):,} bytes holds more than {most:,}; unpack it, and name that file")
    return inflated


def _foreign(content: bytes, error: UnicodeDecodeError) -> str:
    for beginning, description in FOREIGN.items():
        if content.startswith(beginning):
            return description
    body = content.removeprefix(codecs.BOM_UTF8)
    line = body.count(b"\n", 0, error.start) + 1
    return f"line {line} has the byte 0x{body[error.start]:02x}; convert it, as by `iconv -f latin1 -t utf-8`"


def _parse_jsonl(path: Path, text: str) -> Rows:
    lines = [(f"line {number}", line) for number, line in enumerate(text.split("\n"), start=1)]
    rows = [_parse_line(line, place) for place, line in lines if line.strip()]
    if rows and rows[0].problem and text.lstrip().startswith("[") and _is_json(text):
        raise DataError(f"{path} holds one JSON list, not an object on each line; let its name end with .json")
    halves = [place for place, line in lines if _may_hold_surrogate(line)]
    return _with_whole_characters(rows, set(halves))


def _parse_line(line: str, place: str) -> FileRow:
    try:
        return _object_row(_loads(line), place)
    except ValueError as error:
        return FileRow({}, place, f"not valid JSON: {error}")


def _parse_json(path: Path, text: str) -> Rows:
    try:
        values = _loads(text) if text.strip() else []
    except ValueError as error:
        raise DataError(f"{path} is not valid JSON: {error}; name it .jsonl if each line is an object") from error
    if isinstance(values, dict):
        raise DataError(
            f"{path} must hold a list of objects, one for each row, not an object with {listed(list(values))}; "
            'pandas writes rows by to_json(..., orient="records")'
        )
    if not isinstance(values, list):
        raise DataError(f"{path} must hold a list of objects, not {kind(values)}")
    rows = [_object_row(value, f"row {number}") for number, value in enumerate(values, start=1)]
    return _with_whole_characters(rows, {row.place for row in rows} if _may_hold_surrogate(text) else set())


def _object_row(value: Any, place: str) -> FileRow:
    if isinstance(value, dict):
        too_deep = any(_is_deeper(item, MAX_DEPTH) for item in value.values())
        return FileRow({}, place, f"is nested more than {MAX_DEPTH} deep") if too_deep else FileRow(value, place)
    return FileRow({}, place, f"must be a JSON object, not {kind(value)}")


def _is_deeper(value: Any, depth: int) -> bool:
    """Whether a value has more lists and objects in one another than this."""
    match value:
        case dict() | list():
            return depth == 0 or any(
                _is_deeper(item, depth - 1) for item in (value.values() if isinstance(value, dict) else value)
            )
    return False


def kind(value: Any) -> str:
    """Type of a value, for a message about it."""
    name = type(value).__name__
    return "null" if value is None else f"{'an' if name[0] in 'aeiou' else 'a'} {name}"


def _is_json(text: str) -> bool:
    try:
        _loads(text)
    except ValueError:
        return False
    return True


def _loads(text: str) -> Any:
    """Value of a JSON text. Raises ValueError where it is no JSON, or an object has a key twice."""
    try:
        return json.loads(text, object_pairs_hook=_object)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        raise ValueError(f"an object has {_repeated(name for name, _ in pairs)!r} twice")
    return value


def _may_hold_surrogate(text: str) -> bool:
    return "\\ud" in text or "\\uD" in text


def _with_whole_characters(rows: Iterable[FileRow], places: set[str]) -> Rows:
    """The rows with halves of surrogate pairs replaced, which may be in some places, and a note on it."""
    whole = [FileRow(_mended(row), row.place, row.problem) if row.place in places else row for row in rows]
    mended = [new.place for new, old in zip(whole, rows, strict=True) if new is not old and new != old]
    note = f"replaced halves of surrogate pairs (cut-off emoji, say) by U+FFFD: {listed(mended)}"
    return Rows(whole, [note] if mended else [])


def listed(places: Sequence[str]) -> str:
    """Places for a message: the first few, and how many more there are."""
    more = f" and {len(places) - MAX_PLACES} more" if len(places) > MAX_PLACES else ""
    return ", ".join(places[:MAX_PLACES]) + more


def _mended(value: Any) -> Any:
    match value:
        case str():
            return SURROGATE.sub("\ufffd", value)
        case list():
            return [_mended(item) for item in value]
        case dict():
            return {_mended(key): _mended(item) for key, item in value.items()}
    return value


def _parse_csv(path: Path, text: str) -> Rows:
    records = _csv_records(path, text)
    _, header = next(records, (1, []))
    _refuse_repeated(path, header)
    if len(header) == 1 and re.search(r"[;\t]", header[0]):
        raise DataError(f"{path} has one column, {header[0]!r}; separate the columns by commas")
    return Rows(_record_row(record, header, f"line {line}") for line, record in records)


def _csv_records(path: Path, text: str) -> Iterator[tuple[int, list[str]]]:
    """``(line, values)`` of the header and of each record: the line where it begins."""
    csv.field_size_limit(MAX_CELL)
    reader = csv.reader(StringIO(text, newline=""), strict=True)
    line = 1
    try:
        for values in reader:
            if values and not (len(values) == 1 and values[0].isspace()):
                yield line, values
            line = reader.line_num + 1
    except csv.Error as error:
        raise DataError(f"{path} is not valid CSV: line {line}: {error}") from error


def _record_row(record: list[str], header: list[str], place: str) -> FileRow:
    if len(record) != len(header):
        return FileRow({}, place, f"has {len(record)} values for {len(header)} columns")
    return FileRow(zip(header, record, strict=True), place)


def _refuse_repeated(path: Path, names: list[str]) -> None:
    if (name := _repeated(names)) is not None:
        raise DataError(f"{path} has the column {name!r} twice; give each column a name of its own")


def _repeated(names: Iterable[str]) -> str | None:
    """The first name that has stood before; None where there is none."""
    seen: set[str] = set()
    return next((name for name in names if name in seen or seen.add(name)), None)
