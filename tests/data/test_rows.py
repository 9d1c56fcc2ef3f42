import csv
import gzip
import json
from pathlib import Path
from unittest.mock import Mock

import pytest

from llmrl.data.config import DataConfig
from llmrl.data.files import DataError
from llmrl.data.rows import SKIP, check_rows, column_names, is_file, keep_usable, places_of, read_rows

LINES = [f"line {n}" for n in range(1, 100)]
ROWS = [
    {"prompt": 'a, "b"\nc\u2028d', "answer": "1"},
    {"prompt": "é", "answer": "2"},
]


def read(path: Path | str) -> list:
    return read_rows(DataConfig(path=str(path)))


def write(path: Path, text: str) -> Path:
    path.write_bytes(text.encode())
    return path


def write_kind(folder: Path, kind: str) -> Path:
    path = folder / f"rows.{kind}"
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS)
    match kind:
        case "jsonl":
            return write(path, lines)
        case "jsonl.gz":
            path.write_bytes(gzip.compress(lines.encode()))
        case "json":
            return write(path, json.dumps(ROWS))
        case "csv":
            with path.open("w", newline="", encoding="utf-8") as file:
                writer = csv.DictWriter(file, ["prompt", "answer"])
                writer.writeheader()
                writer.writerows(ROWS)
        case "parquet":
            pyarrow = pytest.importorskip("pyarrow")
            pytest.importorskip("pyarrow.parquet").write_table(pyarrow.Table.from_pylist(ROWS), path)
    return path


@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz", "json", "csv", "parquet"])
def test_every_kind_of_file_gives_the_same_rows(tmp_path: Path, kind: str):
    assert read(write_kind(tmp_path, kind)) == ROWS


def test_json_types_stay_and_missing_keys_stay_missing(tmp_path: Path):
    rows = [{"n": 1, "x": 1.0, "y": None}, {"n": "1", "flag": True}, {"deep": {"list": [1, "a"]}}]
    for path in (
        write(tmp_path / "a.json", json.dumps(rows)),
        write(tmp_path / "a.jsonl", "\n".join(json.dumps(row) for row in rows)),
    ):
        read_back = read(path)
        assert read_back == rows
        assert [type(read_back[0][key]) for key in "nxy"] == [int, float, type(None)]


def test_csv_values_stay_texts(tmp_path: Path):
    assert read(write(tmp_path / "a.csv", 'a,b\r\n007,"x\r\ny"\r\n,\r\n')) == [
        {"a": "007", "b": "x\r\ny"},
        {"a": "", "b": ""},
    ]


def test_byte_order_mark_and_line_ends_of_windows(tmp_path: Path):
    assert read(write(tmp_path / "a.csv", "\ufeffa,b\r\n1,2\r\n")) == [{"a": "1", "b": "2"}]
    assert read(write(tmp_path / "a.jsonl", '\ufeff{"a": 1}\r\n{"a": 2}\r\n\r\n')) == [{"a": 1}, {"a": 2}]


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv", "a.json"])
@pytest.mark.parametrize("text", ["", "\n \n"])
def test_empty_file(tmp_path: Path, name: str, text: str):
    path = write(tmp_path / name, text if name != "a.json" else "[]")
    with pytest.raises(DataError, match=r"a\.\w+ has no rows$"):
        read(path)


def test_csv_with_a_header_only(tmp_path: Path):
    with pytest.raises(DataError, match="has no rows"):
        read(write(tmp_path / "a.csv", "a,b\n"))


def test_bad_lines_are_listed_with_number_and_reason(tmp_path: Path):
    path = write(tmp_path / "a.jsonl", '{"a": 1}\n{"a": \n\n[1]\n"x"\n{"a": 2}\n')
    with pytest.raises(DataError) as error:
        read(path)
    title, *lines = str(error.value).split("\n")
    assert title == f"{path}: 3 bad rows"
    assert lines[0].startswith("  line 2: not valid JSON: ")
    assert lines[1:] == [
        "  line 4: must be a JSON object, not a list",
        "  line 5: must be a JSON object, not a str",
        SKIP,
    ]


@pytest.mark.parametrize(("num_bad", "tail"), [(20, "  line 21: x20"), (23, "  and 3 more")])
def test_twenty_reasons_are_listed(num_bad: int, tail: str):
    rows = [{}, *({"n": n} for n in range(1, num_bad + 1))]
    with pytest.raises(DataError) as error:
        check_rows("a.jsonl", rows, lambda row: f"x{row['n']}" if row else None, places=LINES[: len(rows)])
    lines = str(error.value).split("\n")
    assert lines[0] == f"a.jsonl: {num_bad} bad rows"
    assert lines[20] == "  line 21: x20"
    assert lines[-1] == tail
    assert len(lines) == 1 + 20 + (num_bad > 20)


@pytest.mark.parametrize(
    ("bad", "told"),
    [
        ([2], "line 2"),
        ([2, 4, 5], "line 2, line 4, line 5"),
        (range(2, 9), "line 2, line 3, line 4, line 5, line 6 and 2 more"),
        (range(1, 11), "all 10 rows"),
    ],
)
def test_the_same_reason_is_told_once(bad, told: str):
    with pytest.raises(DataError) as error:
        check_rows("a.jsonl", range(1, 11), lambda n: "is bad" if n in bad else None, places=LINES[:10])
    assert str(error.value).split("\n")[1:] == [f"  {told}: is bad"]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.json", '{"a": 1}\n{"a": 2}', r"not valid JSON: .*; name it \.jsonl if each line is an object"),
        ("a.json", '{"a": 1}', "must hold a list of objects, one for each row, not an object with a; pandas writes"),
        ("a.json", "7", "must hold a list of objects, not an int"),
        ("a.json", "[{}, 3]", "row 2: must be a JSON object, not an int"),
        ("a.csv", "a,b\n1,2\n3\n", "line 3: has 1 values for 2 columns"),
        ("a.csv", 'a,b\n1,"2', "is not valid CSV: line 2: "),
    ],
)
def test_unreadable_file(tmp_path: Path, name: str, text: str, message: str):
    with pytest.raises(DataError, match=message):
        read(write(tmp_path / name, text))


def test_a_row_of_csv_is_named_by_the_line_where_it_begins(tmp_path: Path):
    path = write(tmp_path / "a.csv", 'a,b\n\n"x\ny",1\n2\n"z\n')
    with pytest.raises(DataError, match=r"is not valid CSV: line 6: "):
        read(path)
    write(path, 'a,b\n\n"x\ny",1\n2\n')
    with pytest.raises(DataError, match=r": 1 bad row\n  line 5: has 1 values for 2 columns\nset"):
        read(path)


def test_checks_of_rows_name_the_lines_too(tmp_path: Path):
    path = write(tmp_path / "a.csv", 'a\n\n"x\ny"\n2\n')
    with pytest.raises(DataError) as error:
        check_rows(str(path), read(path), lambda row: f"is {row['a']!r}")
    assert str(error.value).split("\n")[1:] == ["  line 3: is 'x\\ny'", "  line 5: is '2'"]


@pytest.mark.parametrize(
    "damage", [lambda content: content[:30], lambda _: b"no gzip", lambda content: content[:10] + b"\xff" * 9]
)
def test_a_damaged_gzip_file_is_named(tmp_path: Path, damage):
    path = write_kind(tmp_path, "jsonl.gz")
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(DataError, match=r"rows\.jsonl\.gz cannot be read: "):
        read(path)


@pytest.mark.parametrize("damage", [lambda content: content[:-9], lambda _: b"no Parquet", lambda _: b""])
def test_a_damaged_parquet_file_is_named(tmp_path: Path, damage):
    path = write_kind(tmp_path, "parquet")
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(DataError, match=r"rows\.parquet cannot be read as Parquet; it may be truncated: "):
        read(path)


def test_columns_of_every_row_count():
    assert column_names([{"a": 1, "b": 2}, {"c": 3, "a": 4}]) == ["a", "b", "c"]


def test_text_in_another_encoding(tmp_path: Path):
    path = tmp_path / "a.csv"
    path.write_bytes("a\né\n".encode("latin-1"))
    with pytest.raises(DataError, match="is not UTF-8 text"):
        read(path)


@pytest.mark.parametrize("path", ["/x", "./x", "../x", "~/x", "x.jsonl", "folder/x.csv", "x.jsonl.gz", "a/b/c"])
def test_paths_are_local(path: str):
    assert is_file(path)


def test_names_are_not_local_unless_they_exist(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    assert not is_file("openai/gsm8k")
    (tmp_path / "openai" / "gsm8k").mkdir(parents=True)
    assert is_file("openai/gsm8k")
    assert is_file("openai/gsm9k")
    with pytest.raises(DataError, match="openai/gsm9k does not exist"):
        read("openai/gsm9k")


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """Makes the hub answer a question for a data set with an exception, or with None for yes; its cache is empty."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")

    def answer(error: Exception | None):
        def dataset_info(*_, **__):
            if error is not None:
                raise error

        monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", dataset_info)

    return answer


class NoConnection(Exception):
    """What the client of the hub's library raises is no OSError."""


def test_a_hub_that_cannot_be_reached_is_not_asked_again(hub, monkeypatch: pytest.MonkeyPatch):
    hub(NoConnection("Name or service\nnot known"))
    monkeypatch.setattr("datasets.load_dataset", lambda *_, **__: pytest.fail("it was asked again"))
    with pytest.raises(DataError) as error:
        read("no/such")
    assert str(error.value) == (
        "no/such is neither a file here nor a data set on the hub that can be reached, with subset (None) and split "
        "(train): Name or service not known"
    )


def test_a_data_set_in_the_cache_needs_no_hub(hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    datasets = pytest.importorskip("datasets")
    hub(NoConnection())
    (tmp_path / "cache" / "no___such" / "default" / "0.0.0" / "hash").mkdir(parents=True)
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: datasets.Dataset.from_list(ROWS))
    assert read("no/such") == ROWS


def test_what_the_hub_does_not_give_is_said(hub, monkeypatch: pytest.MonkeyPatch):
    datasets = pytest.importorskip("datasets")
    hub(None)
    not_found = datasets.exceptions.DatasetNotFoundError
    no_split = datasets.exceptions.ExpectedMoreSplitsError
    for kind in (ConnectionError, ValueError, not_found, no_split):
        monkeypatch.setattr(datasets, "load_dataset", Mock(side_effect=kind("why")))
        with pytest.raises(DataError, match=r"^no/such is neither .* subset \(None\) and split \(train\): why$"):
            read("no/such")


def test_hub_name(hub, monkeypatch: pytest.MonkeyPatch):
    datasets = pytest.importorskip("datasets")
    calls = []
    hub(None)

    def load_dataset(*args, **kwargs):
        calls.append((args, kwargs))
        return datasets.Dataset.from_list([{"question": "a", "n": 1}, {"question": "b", "n": 2}])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    rows = read_rows(DataConfig(path="openai/gsm8k", subset="main", split="test"))
    assert rows == [{"question": "a", "n": 1}, {"question": "b", "n": 2}]
    assert calls == [(("openai/gsm8k", "main"), {"split": "test"})]


def test_first_rows_only(tmp_path: Path):
    path = str(write_kind(tmp_path, "jsonl"))
    assert read_rows(DataConfig(path=path, num_rows=1)) == ROWS[:1]
    assert read_rows(DataConfig(path=path)) == ROWS


def test_a_missing_file_names_its_nearest_sibling_and_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "problems.jsonl").write_text("{}\n")
    for path, way_out in (("problem.jsonl", "; did you mean problems.jsonl?"), ("x.jsonl", f" in {tmp_path}")):
        with pytest.raises(DataError) as error:
            read(path)
        assert str(error.value) == f"{path} does not exist{way_out}"


# --- rows that are dropped, columns of other names --------------------------------------------------------------------

BAD = '{"a": 1}\n\n{"a"\n{"a": -2}\n[]\n{"a": 3}\n{"a": -4}\n'


def not_negative(row: dict) -> str | None:
    return f"{row['a']} is negative" if row["a"] < 0 else None


def test_bad_rows_are_dropped_and_counted(tmp_path: Path):
    config = DataConfig(path=str(write(tmp_path / "a.jsonl", BAD)), skip_bad_rows=True)
    rows = keep_usable(read_rows(config), config, not_negative)
    assert rows == [{"a": 1}, {"a": 3}]
    assert places_of(rows) == ["line 1", "line 6"]
    unreadable, negative = rows.notes
    assert unreadable.startswith("dropped 2 of 6 rows: line 3: not valid JSON: ")
    assert unreadable.endswith("; line 5: must be a JSON object, not a list")
    assert negative == "dropped 2 of 4 rows: line 4: -2 is negative; line 7: -4 is negative"


def test_one_bad_row_refuses_all_by_default(tmp_path: Path):
    config = DataConfig(path=str(write(tmp_path / "a.jsonl", '{"a": 1}\n{"a": -2}\n')))
    with pytest.raises(DataError) as error:
        keep_usable(read_rows(config), config, not_negative)
    assert str(error.value) == f"{config.path}: 1 bad row\n  line 2: -2 is negative\n{SKIP}"


@pytest.mark.parametrize("skip", [False, True])
def test_where_no_row_is_good_none_can_be_skipped(tmp_path: Path, skip: bool):
    config = DataConfig(path=str(write(tmp_path / "a.jsonl", '{"a": -1}\n{"a": -1}\n')), skip_bad_rows=skip)
    with pytest.raises(DataError) as error:
        keep_usable(read_rows(config), config, not_negative)
    assert str(error.value) == f"{config.path}: 2 bad rows\n  all 2 rows: -1 is negative"


def test_columns_get_other_names_or_are_left_out(tmp_path: Path):
    path = str(write(tmp_path / "a.csv", "q,prompt,tokens\n1,2,3\n\n4,5,6\n"))
    rows = read_rows(DataConfig(path=path, rename_columns={"q": "prompt", "prompt": "old", "tokens": None}))
    assert rows == [{"prompt": "1", "old": "2"}, {"prompt": "4", "old": "5"}]
    assert places_of(rows) == ["line 2", "line 4"]


@pytest.mark.parametrize(
    ("names", "told"),
    [
        ({"b": "x"}, r"data\.rename_columns: no column 'b'; there are a, c$"),
        ({"a": "c"}, r"data\.rename_columns \(.*\) makes two columns 'c'; leave the other out by \{c: null\}, or ren"),
    ],
)
def test_names_that_cannot_be(tmp_path: Path, names: dict, told: str):
    path = str(write(tmp_path / "a.csv", "a,c\n1,2\n"))
    with pytest.raises(DataError, match=told):
        read_rows(DataConfig(path=path, rename_columns=names))


def test_a_user_who_is_not_known():
    with pytest.raises(
        DataError, match=r"data\.path \(~nobody-here/a\.jsonl\): .* ~ .*; write the path from the root$"
    ):
        read("~nobody-here/a.jsonl")
