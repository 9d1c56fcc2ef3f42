import datetime
import decimal
import gzip
import json
import os
import random
import time
from pathlib import Path

import pytest

from llmrl.data import files
from llmrl.data.config import DataConfig, PromptDataConfig
from llmrl.data.files import DataError, FileRow, read_file
from llmrl.data.prompts import keep_usable_prompts
from llmrl.data.rows import read_rows

pyarrow = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def refusal(path: Path) -> str:
    with pytest.raises(DataError) as error:
        read_file(path)
    return str(error.value)


def placed(path: Path) -> list[tuple[str, dict]]:
    return [(row.place, dict(row)) for row in read_file(path)]


def test_blank_lines_are_passed_over_and_count_as_lines(tmp_path: Path):
    path = write(tmp_path / "a.jsonl", '\ufeff\r\n{"a": 1}\r\n\r\n  \n{"a": 2}\r\n\r\n\n')
    assert placed(path) == [("line 2", {"a": 1}), ("line 5", {"a": 2})]
    path = write(tmp_path / "a.csv", "a,b\r\n\r\n1,2\r\n   \r\n3,4\r\n\r\n")
    assert placed(path) == [("line 3", {"a": "1", "b": "2"}), ("line 5", {"a": "3", "b": "4"})]


def test_only_a_newline_ends_a_line(tmp_path: Path):
    text = "x\u2028y\u0085z\x0cw\x1cv"
    path = write(tmp_path / "a.jsonl", json.dumps({"a": text}, ensure_ascii=False) + "\n" + '{"a": "\\u0000"}')
    assert placed(path) == [("line 1", {"a": text}), ("line 2", {"a": "\0"})]


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv"])
def test_gzip_of_each_kind_of_text(tmp_path: Path, kind: str):
    text = {"jsonl": '{"a": "1"}', "json": '[{"a": "1"}]', "csv": "a\n1"}[kind]
    assert read_file(write(tmp_path / f"a.{kind}.gz", gzip.compress(text.encode()))) == [{"a": "1"}]
    assert read_file(write(tmp_path / f"A.{kind.upper()}", text)) == [{"a": "1"}]


def test_a_long_cell(tmp_path: Path):
    cell = "x" * 400_000
    assert read_file(write(tmp_path / "a.csv", f"a,b\n{cell},1\n")) == [{"a": cell, "b": "1"}]


def test_half_of_a_surrogate_pair_is_replaced_and_said(tmp_path: Path):
    lines = ['{"a": "fine"}', r'{"a": "cut \ud83d", "b": [{"c\udc00": "\uD83D!"}]}', r'{"a": "\ud83d\ude00"}']
    for path in (
        write(tmp_path / "a.jsonl", "\n".join(lines)),
        write(tmp_path / "a.json", f"[{','.join(lines)}]"),
    ):
        rows = read_file(path)
        assert rows == [{"a": "fine"}, {"a": "cut \ufffd", "b": [{"c\ufffd": "\ufffd!"}]}, {"a": "\U0001f600"}]
        place = "line 2" if path.suffix == ".jsonl" else "row 2"
        assert rows.notes == [f"replaced halves of surrogate pairs (cut-off emoji, say) by U+FFFD: {place}"]
    assert read_file(write(tmp_path / "b.jsonl", lines[2])).notes == []


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ('{"a": 1, "a": 2}', "not valid JSON: an object has 'a' twice"),
        ('{"a": [{"b": 1, "b": 1}]}', "not valid JSON: an object has 'b' twice"),
        ("[" * 100_000, "not valid JSON: it is nested too deeply"),
        (f'{{"a": {"1" * 5000}}}', "not valid JSON: Exceeds the limit"),
        ("null", "must be a JSON object, not null"),
    ],
)
def test_lines_that_are_no_row(tmp_path: Path, line: str, problem: str):
    good, bad = read_file(write(tmp_path / "a.jsonl", f'{{"n": NaN}}\n{line}\n'))
    assert good.problem is None
    assert (bad.place, bad.problem[: len(problem)]) == ("line 2", problem)


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("a.jsonl", "version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "is a pointer of Git LFS and not "),
        ("a.parquet", "version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "is a pointer of Git LFS and not "),
        (
            "a.csv",
            "a\nb\né\n".encode("latin-1"),
            "is not UTF-8 text: line 3 has the byte 0xe9; convert it, as by `iconv",
        ),
        ("a.csv", "\ufeffa\né\n".encode() + b"\xff", "is not UTF-8 text: line 3 has the byte 0xff"),
        ("a.jsonl", "{}".encode("utf-16"), "is not UTF-8 text: it is UTF-16; write it as UTF-8"),
        (
            "a.jsonl",
            gzip.compress(b"{}", mtime=0),
            "is not UTF-8 text: it is compressed by gzip; let its name end with .gz",
        ),
        ("a.json", b"PAR1\xff", "is not UTF-8 text: it is Parquet; let its name end with .parquet"),
        (
            "a.jsonl",
            '[{"a": 1},\n{"a": 2}]',
            "holds one JSON list, not an object on each line; let its name end with .j",
        ),
        (
            "a.json",
            '{"a": {"0": 1}, "b": {}}',
            "must hold a list of objects, one for each row, not an object with a, b",
        ),
        ("a.json", '[{"a": 1, "a": 2}]', "is not valid JSON: an object has 'a' twice"),
        ("a.json", "[" * 100_000, "is not valid JSON: it is nested too deeply"),
        ("a.csv", "a,b,a\n1,2,3\n", "has the column 'a' twice; give each column a name of its own"),
        ("a.csv", "prompt;answer\nx;1\n", "has one column, 'prompt;answer'; separate the columns by commas"),
        ("a.txt", "x", "is not a file of a known kind: .jsonl, .json, .csv, .jsonl.gz, .json.gz, .csv.gz, .parquet"),
        ("gone.jsonl", None, "does not exist"),
        ("\0.jsonl", None, "cannot be read: embedded null"),
        ("x" * 300 + ".jsonl", None, "cannot be read: "),
    ],
)
def test_files_that_cannot_be_used(tmp_path: Path, name: str, content: str | bytes | None, told: str):
    if content is not None:
        write(tmp_path / name, content)
    assert refusal(tmp_path / name).removeprefix(f"{tmp_path / name} ").startswith(told)


def test_a_list_in_json_that_is_empty_text_has_no_rows(tmp_path: Path):
    assert read_file(write(tmp_path / "a.json", " \n")) == []


def test_a_pipe_is_not_waited_for(tmp_path: Path):
    os.mkfifo(tmp_path / "a.jsonl")
    assert "is no regular file but a pipe or a device" in refusal(tmp_path / "a.jsonl")


def test_a_folder_is_told_which_file_to_name(tmp_path: Path):
    assert refusal(tmp_path) == (
        f"{tmp_path} is a folder; name a file: .jsonl, .json, .csv, .jsonl.gz, .json.gz, .csv.gz, .parquet"
    )
    (tmp_path / "data").mkdir()
    write(tmp_path / "data" / "b.jsonl", "{}")
    assert refusal(tmp_path) == f"{tmp_path} is a folder; name a file in it, such as {tmp_path}/data/b.jsonl"
    write(tmp_path / "dataset_info.json", "{}")
    assert "it looks saved by `save_to_disk` of datasets: write a split by its `to_parquet`" in refusal(tmp_path)


def test_parquet_keeps_what_python_has_for_it(tmp_path: Path):
    rows = [
        {
            "messages": [{"role": "user", "content": "a", "name": None}],
            "deep": {"x": [1, None], "y": {"z": 0.5}},
            "raw": b"\xff",
            "when": datetime.datetime(2024, 5, 1, tzinfo=datetime.UTC),
            "price": decimal.Decimal("1.50"),
        }
    ]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    assert placed(tmp_path / "a.parquet") == [("row 1", rows[0])]


def test_a_folder_of_parquet_parts_is_one_file(tmp_path: Path):
    (tmp_path / "n=1.parquet").mkdir()
    for n in range(2):
        parquet.write_table(pyarrow.table({"a": [n]}), tmp_path / "n=1.parquet" / f"part-{n}.parquet")
    assert read_file(tmp_path / "n=1.parquet") == [{"a": 0}, {"a": 1}]


def test_parquet_with_a_column_twice(tmp_path: Path):
    table = pyarrow.Table.from_arrays([pyarrow.array([1]), pyarrow.array([2])], names=["a", "a"])
    parquet.write_table(table, tmp_path / "a.parquet")
    assert "has the column 'a' twice" in refusal(tmp_path / "a.parquet")


def test_parquet_with_text_that_is_none(tmp_path: Path):
    offsets, text = pyarrow.array([0, 2], pyarrow.int32()).buffers()[1], pyarrow.py_buffer(b"\xff\xfe")
    column = pyarrow.Array.from_buffers(pyarrow.string(), 1, [None, offsets, text])
    parquet.write_table(pyarrow.table({"a": column}), tmp_path / "a.parquet")
    assert "cannot be read as Parquet" in refusal(tmp_path / "a.parquet")


def test_rows_keep_their_place_through_a_pickle():
    import pickle

    row = pickle.loads(pickle.dumps(FileRow({"a": 1}, "line 3")))  # noqa: S301
    assert (row, row.place, row.problem) == ({"a": 1}, "line 3", None)


ROWS = [{"prompt": f'wörd {n}, "x"\n{{', "answer": [n, None], "deep": {"a": "b" * n}} for n in range(8)]


def contents(folder: Path) -> dict[str, bytes]:
    """The same rows as each kind of file."""
    parquet.write_table(pyarrow.Table.from_pylist(ROWS), folder / "rows.parquet")
    lines = "\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS).encode()
    return {
        "jsonl": lines,
        "json": json.dumps(ROWS).encode(),
        "csv": b"prompt,answer\n" + b"".join(b'"a ""b""\nc",%d\n' % n for n in range(8)),
        "jsonl.gz": gzip.compress(lines),
        "parquet": (folder / "rows.parquet").read_bytes(),
    }


def corrupted(content: bytes, draw: random.Random) -> bytes:
    """The bytes with a few cut out, put in, replaced, or all after one left out."""
    damaged = bytearray(content)
    for _ in range(draw.randint(1, 3)):
        place = draw.randrange(len(damaged) + 1)
        noise = bytes(draw.choice([*b'{}[]",:;\\\r\n\0', draw.randrange(256)]) for _ in range(draw.randint(1, 4)))
        end = place + draw.choice([0, len(noise), len(noise), draw.randint(1, 40)])
        damaged[place:end] = noise
        if draw.random() < 0.1:
            del damaged[draw.randrange(len(damaged) + 1) :]
    return bytes(damaged)


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "jsonl.gz", "parquet"])
@pytest.mark.parametrize("skip", [False, True])
def test_any_damage_ends_in_rows_or_in_a_message(tmp_path: Path, kind: str, skip: bool):
    content, path, draw = contents(tmp_path)[kind], tmp_path / f"damaged.{kind}", random.Random(0)
    outcomes = set()
    for _ in range(150):
        path.write_bytes(corrupted(content, draw))
        try:
            rows = read_rows(DataConfig(path=str(path), skip_bad_rows=skip))
            outcomes.add(all(isinstance(row, dict) and row.problem is None for row in rows))
        except DataError as error:
            assert str(error).startswith(str(path))  # noqa: PT017
            outcomes.add("refused")
    assert outcomes in ({True, "refused"}, {"refused"}) if kind.endswith("gz") else {True, "refused"}


# --- files that are made to harm --------------------------------------------------------------------------------------


def test_a_file_that_unpacks_to_far_more_than_it_is_is_refused(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(files, "FREE_BYTES", 100_000)
    small = write(tmp_path / "a.jsonl.gz", gzip.compress(b'{"a": 1}' + b" " * 90_000))
    assert read_file(small) == [{"a": 1}]
    bomb = write(tmp_path / "b.jsonl.gz", gzip.compress(b" " * 10_000_000))
    assert "holds more than" in refusal(bomb)


@pytest.mark.parametrize("depth", [101, 900])
def test_a_row_that_is_nested_too_deep_is_a_bad_row(tmp_path: Path, depth: int):
    nested = "[" * depth + "]" * depth
    path = write(tmp_path / "a.jsonl", f'{{"a": {nested}}}\n{{"a": {"[" * 100 + "]" * 100}}}')
    assert [row.problem for row in read_file(path)] == ["is nested more than 100 deep", None]
    assert "line 1: is nested more than 100 deep" in refusal_of_rows(path)


def refusal_of_rows(path: Path) -> str:
    with pytest.raises(DataError) as error:
        read_rows(DataConfig(path=str(path)))
    return str(error.value)


def test_columns_by_the_hundred_thousand(tmp_path: Path):
    names = [f"c{n}" for n in range(100_000)]
    path = write(tmp_path / "a.csv", ",".join(names) + "\n" + ",".join(names))
    started = time.process_time()
    assert len(read_file(path)[0]) == 100_000
    assert "twice" in refusal(write(tmp_path / "b.csv", ",".join([*names, "c7"]) + "\n"))
    assert (
        "'c7' twice"
        in read_file(write(tmp_path / "c.jsonl", json.dumps(dict.fromkeys(names, 1))[:-1] + ', "c7": 1}'))[0].problem
    )
    assert time.process_time() - started < 20


def test_a_reason_quotes_no_megabytes(tmp_path: Path):
    path = write(tmp_path / "a.jsonl", json.dumps({"prompt": [{"role": "x" * 1_000_000, "content": "a"}]}))
    with pytest.raises(DataError) as error:
        keep_usable_prompts(read_file(path), PromptDataConfig(path=str(path)))
    assert len(str(error.value)) < 1000


def test_a_parquet_file_of_more_rows_than_it_can_hold_is_refused(tmp_path: Path):
    path = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.table({"a": pyarrow.nulls(3_000_000)}), path, compression="zstd")
    assert path.stat().st_size < 300_000
    assert "stands for 3,000,000 rows" in refusal(path)
