"""Rows of data from every kind of file, and from data sets."""

import gzip
import json
import sys

import pytest

from shardes.errors import ConfigError
from shardes.tasks import load_task
from shardes.tasks.rows import NAME_AND_SPLIT, load_rows

ROWS = [
    {"id": 1, "prompt": "Wo ist Köln?\nSag es, kurz.", "answer": '"NA"'},
    {"id": 2, "prompt": "1 + 1?", "answer": "007"},
]
LINES = "\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS).encode()
ARRAY = json.dumps(ROWS, indent=1).encode()
TABLE = 'id,prompt,answer\n1,"Wo ist Köln?\nSag es, kurz.","""NA"""\n2,1 + 1?,007\n'.encode()
BOM = "\ufeff".encode()
TEXT_FILES = {
    "rows.jsonl": LINES,
    "rows.ndjson": BOM + LINES + b"\n",
    "rows.json": ARRAY,
    "lines.json": LINES,
    "rows": ARRAY,
    "dos.jsonl": LINES.replace(b"\n", b"\r\n"),
    "marked.json": BOM + ARRAY,
    "rows.jsonl.gz": gzip.compress(LINES),
    "rows.json.gz": gzip.compress(BOM + ARRAY),
}


def rows_of(source) -> list[dict]:
    return [row for _, row in load_rows(str(source))]


@pytest.mark.parametrize("name", TEXT_FILES)
def test_json_files_need_no_other_library(tmp_path, monkeypatch, name):
    for library in ("datasets", "pyarrow", "zstandard"):
        monkeypatch.setitem(sys.modules, library, None)
    (tmp_path / name).write_bytes(TEXT_FILES[name])
    assert rows_of(tmp_path / name) == ROWS


@pytest.mark.parametrize(
    "name, table", [("a.csv", BOM + TABLE), ("a.csv.gz", gzip.compress(TABLE))]
)
def test_values_of_a_table_are_texts(tmp_path, name, table):
    (tmp_path / name).write_bytes(table)
    assert rows_of(tmp_path / name) == [row | {"id": str(row["id"])} for row in ROWS]
    (tmp_path / "a.tsv").write_text("prompt\tanswer\na, b\t1\n")
    assert rows_of(tmp_path / "a.tsv") == [{"prompt": "a, b", "answer": "1"}]


def test_zstandard(tmp_path):
    zstandard = pytest.importorskip("zstandard")
    frames = [zstandard.compress(part) for part in (LINES[:40], LINES[40:])]
    (tmp_path / "rows.jsonl.zst").write_bytes(b"".join(frames))
    assert rows_of(tmp_path / "rows.jsonl.zst") == ROWS


def test_parquet_and_saved_data_sets(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    rows = [row | {"numbers": [1, 2], "null": None} for row in ROWS]
    data = datasets.Dataset.from_list(rows)
    folder = tmp_path / "split=train"  # not a column
    folder.mkdir()
    data.to_parquet(folder / "rows.parquet")
    data.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"all": data}).save_to_disk(tmp_path / "dictionary")
    splits = {"train": data, "test": data.select([1])}
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "two")
    # Nothing is fetched, and nothing is written to a cache.
    monkeypatch.setattr(datasets, "load_dataset", None)
    for source in (folder / "rows.parquet", tmp_path / "one", tmp_path / "dictionary"):
        assert rows_of(source) == rows
    assert load_rows(str(tmp_path / "two/test")) == [("row 0 (id 2)", rows[1])]
    with pytest.raises(ConfigError, match=r"two: holds 2 splits; name one of them: .*two/train or"):
        load_rows(str(tmp_path / "two"))
    with pytest.raises(
        ConfigError, match=r"save_to_disk wrote .*; write its path without datasets:"
    ):
        load_rows(f"datasets:{tmp_path / 'two'}:train")
    task = load_task("countdown", None, *[str(write_countdown(datasets, tmp_path))] * 2)
    assert task.score("train", ["</think>\n<answer>1 + 2</answer>"]) == [1.1]


def write_countdown(datasets, tmp_path):
    rows = [{"id": 0, "context": "Go. <think>", "numbers": [1, 2], "target": "3", "solution": None}]
    datasets.Dataset.from_list(rows).save_to_disk(tmp_path / "countdown")
    return tmp_path / "countdown"


def test_data_sets_are_read_by_split_and_slice(tmp_path):
    pytest.importorskip("datasets")
    (tmp_path / "train.jsonl").write_bytes(LINES)
    assert rows_of(f"datasets:{tmp_path}:train") == ROWS
    assert load_rows(f"datasets:{tmp_path}:train[1:]") == [("row 0 (id 2)", ROWS[1])]
    with pytest.raises(ConfigError, match="ValueError: Unknown split"):
        load_rows(f"datasets:{tmp_path}:dev")


@pytest.mark.parametrize(
    "text, expected",
    [
        ("a/b:train", ("a/b", "train")),
        ("a/b,main:test", ("a/b,main", "test")),
        ("a/b:train[:10]", ("a/b", "train[:10]")),
        ("a/b:train[10:20]", ("a/b", "train[10:20]")),
        ("a/b:train[:10%]+test[-5:]", ("a/b", "train[:10%]+test[-5:]")),
        ("a/b:train[:10%](pct1_dropremainder)", ("a/b", "train[:10%](pct1_dropremainder)")),
        ("C:/data:validation", ("C:/data", "validation")),
        ("train[:10]", None),
        ("a/b:", None),
        ("train", None),
    ],
)
def test_where_the_split_begins(text, expected):
    parts = NAME_AND_SPLIT.fullmatch(text)
    assert (parts and parts.groups()) == expected


@pytest.mark.parametrize(
    "name, data, message",
    [
        ("a.jsonl", b"", "holds no rows"),
        ("a.csv", b"", "holds no rows"),
        ("a.csv", b"prompt\n", "holds no rows"),
        ("a.csv", b"a,b\n1,2\n3\n", "line 3 has not as many fields as the header"),
        ("a.csv", b"a,b\n1,2,3\n", "line 2 has not as many fields as the header"),
        ("a.csv", b'a\n"b" c\n', "after line 1: .*expected after"),
        ("a.json", b"[1]", "entry 0 is not an object with fields"),
        ("a.json", b"[]", "must hold a list of objects"),
        ("a.json", b'{\n"a": 1\n}', "must hold a list of objects"),
        ("a.json", b'[{"a": 1}', "not a readable JSON array, nor JSON lines"),
        ("a.json", b"[" * 100_000, "not a readable JSON array"),
        ("a.jsonl", b'{"a": 1}\n[2]', "line 2 is not an object with fields"),
        ("a.jsonl", '{"a": 1}'.encode("utf-16"), "not a readable file of UTF-8 text"),
        ("a.jsonl.gz", LINES, "not a readable file of UTF-8 text: Not a gzipped file"),
        ("a.jsonl.gz", gzip.compress(LINES)[:30], "not a readable file of UTF-8 text"),
        ("a.jsonl.zst", LINES, "not a readable file of UTF-8 text"),
        ("a.parquet", LINES, "not a readable Parquet file"),
        ("missing/a.parquet", None, "not a readable Parquet file"),
        ("missing/a.csv", None, "there is no such data file"),
        (".", None, "save_to_disk did not write; name a file in it, or write datasets:"),
    ],
)
def test_files_that_cannot_be_read_are_named_in_one_line(tmp_path, name, data, message):
    pytest.importorskip("datasets")
    pytest.importorskip("zstandard")
    if data is not None:
        (tmp_path / name).write_bytes(data)
    with pytest.raises(ConfigError, match=message) as caught:
        load_rows(str(tmp_path / name))
    assert str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "name, package",
    [
        ("a.parquet", "pyarrow"),
        ("a.jsonl.zst", "zstandard"),
        (".", "datasets"),
        ("datasets:a/b:test", "datasets"),
    ],
)
def test_a_missing_library_is_named(tmp_path, monkeypatch, name, package):
    for library in ("datasets", "pyarrow", "pyarrow.parquet", "zstandard"):
        monkeypatch.setitem(sys.modules, library, None)
    (tmp_path / "state.json").write_text("{}")
    (tmp_path / "a.jsonl.zst").write_bytes(b"")
    source = name if ":" in name else str(tmp_path / name)
    with pytest.raises(
        ConfigError, match=rf"needs the {package} package: pip install 'shardes\[data\]'"
    ):
        load_rows(source)
