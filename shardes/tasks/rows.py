"""Rows of data: objects with fields, from a file, or from a data set of the `datasets` library.

JSON and CSV files need nothing but Python. The package's extra `data` brings what reads the rest.
"""

import csv
import gzip
import io
import json
import re
import zlib
from collections.abc import Iterable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

from shardes.errors import ConfigError, nearby

LINES = (".jsonl", ".ndjson")
DELIMITERS = {".csv": ",", ".tsv": "\t"}
COMPRESSED = (".gz", ".zst")
# NAME:SPLIT; SPLIT may be a slice or a sum of them, as in train[:10]+test[5%:].
SPLIT = r"[\w.]+(?:\[[^\[\]]*\])?(?:\(\w+\))?"
NAME_AND_SPLIT = re.compile(rf"(.+):({SPLIT}(?:\s*\+\s*{SPLIT})*)")


def load_rows(source: str) -> list[tuple[str, dict]]:
    """The rows of a source, each with its position for error messages ("line 3 (id x)").

    Args:
        source: a file of JSON lines, a .json array, .csv, .tsv or .parquet; text files may be
            compressed (.gz, .zst). Or a directory that `datasets` wrote with save_to_disk. Or a
            data set, written datasets:NAME[,CONFIG]:SPLIT, whose split may be a slice.

    Raises:
        ConfigError: the source cannot be read, has no rows, or has one that is not an object.
    """
    kind, _, name = source.partition(":")
    path = Path(source)
    if kind == "datasets":
        rows = list(_data_set(source, name))
    elif path.is_dir():
        rows = list(_saved_data_set(path))
    elif path.suffix == ".parquet":
        rows = list(_parquet(path))
    else:
        rows = list(_text_rows(path))
    if not rows:
        raise ConfigError(f"{source}: holds no rows")
    return rows


def _text_rows(path: Path) -> Iterator[tuple[str, dict]]:
    text = _text(path)
    suffix = Path(path.stem).suffix if path.suffix in COMPRESSED else path.suffix
    if suffix in DELIMITERS:
        return _delimited(path, text, DELIMITERS[suffix])
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    if suffix in LINES or _starts_with_an_object(text):
        return _json_lines(path, text)
    return _json_array(path, text)


def _text(path: Path) -> str:
    try:
        data = path.read_bytes()
        if path.suffix == ".gz":
            data = gzip.decompress(data)
        elif path.suffix == ".zst":
            zstandard = _library("zstandard", path)
            try:
                with zstandard.open(io.BytesIO(data)) as file:
                    data = file.read()
            except zstandard.ZstdError as error:
                raise ValueError(error) from error
        return data.decode("utf-8-sig")  # with or without a byte-order mark
    except FileNotFoundError:
        raise ConfigError(f"{path}: there is no such data file{nearby(path)}") from None
    except (OSError, EOFError, ValueError, zlib.error) as error:
        raise ConfigError(f"{path}: not a readable file of UTF-8 text: {error}") from error


def _starts_with_an_object(text: str) -> bool:
    """Whether the first line is a whole JSON object, so that the text is JSON lines."""
    try:
        return isinstance(json.loads(text.lstrip().partition("\n")[0]), dict)
    except (ValueError, RecursionError):
        return False


def _json_lines(path: Path, text: str) -> Iterator[tuple[str, dict]]:
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise ConfigError(f"{path}: line {number} is not JSON: {error}") from error
            yield _row(path, f"line {number}", row)


def _json_array(path: Path, text: str) -> Iterator[tuple[str, dict]]:
    try:
        rows = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: not a readable JSON array, nor JSON lines: {error}") from error
    if not isinstance(rows, list) or not rows:
        raise ConfigError(f"{path}: must hold a list of objects with fields, or one in each line")
    for number, row in enumerate(rows):
        yield _row(path, f"entry {number}", row)


def _delimited(path: Path, text: str, delimiter: str) -> Iterator[tuple[str, dict]]:
    """The rows of a table with a header; every value is a text."""
    reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    try:
        for row in reader:
            position = f"line {reader.line_num}"
            if None in row or None in row.values():
                raise ConfigError(f"{path}: {position} has not as many fields as the header")
            yield _row(path, position, row)
    except csv.Error as error:
        raise ConfigError(f"{path}: after line {reader.line_num}: {error}") from error


def _parquet(path: Path) -> Iterator[tuple[str, dict]]:
    parquet = _library("pyarrow.parquet", path)
    try:
        # Not read_table, which takes the directories a=b of the path for columns.
        rows = parquet.ParquetFile(path).read().to_pylist()
    except Exception as error:  # of many types
        raise ConfigError(f"{path}: not a readable Parquet file: {_line(error)}") from error
    return _numbered(path, rows)


def _saved_data_set(path: Path) -> Iterator[tuple[str, dict]]:
    if not _is_saved(path):
        raise ConfigError(
            f"{path}: is a directory that the datasets library's save_to_disk did not write; name "
            f"a file in it, or write datasets:{path}:SPLIT"
        )
    datasets = _library("datasets", path)
    try:
        data = datasets.load_from_disk(str(path))
    except Exception as error:  # of many types
        raise ConfigError(f"{path}: {type(error).__name__}: {_line(error)}") from error
    if isinstance(data, datasets.DatasetDict):
        if len(data) != 1:
            splits = " or ".join(f"{path / split}" for split in data)
            raise ConfigError(f"{path}: holds {len(data)} splits; name one of them: {splits}")
        (data,) = data.values()
    return _numbered(path, data)


def _data_set(source: str, name_and_split: str) -> Iterator[tuple[str, dict]]:
    parts = NAME_AND_SPLIT.fullmatch(name_and_split)
    if parts is None:
        raise ConfigError(
            f"{source}: must be written datasets:NAME:SPLIT or datasets:NAME,CONFIG:SPLIT, where "
            "SPLIT may be a slice as in train[:100]"
        )
    name, split = parts.groups()
    if _is_saved(Path(name)):
        raise ConfigError(f"{source}: save_to_disk wrote {name}; write its path without datasets:")
    datasets = _library("datasets", source)
    try:
        rows = datasets.load_dataset(*name.split(","), split=split)
    except Exception as error:  # of many types: unknown name or split, no network
        raise ConfigError(f"{source}: {type(error).__name__}: {_line(error)}") from error
    return _numbered(source, rows)


def _is_saved(path: Path) -> bool:
    return any((path / name).is_file() for name in ("dataset_dict.json", "state.json"))


def _numbered(source: str | Path, rows: Iterable[Any]) -> Iterator[tuple[str, dict]]:
    try:
        for number, row in enumerate(rows):
            yield _row(source, f"row {number}", row)
    except ImportError as error:  # what decodes a column, as of images
        raise ConfigError(f"{source}: {_line(error)}") from error


def _row(source: str | Path, position: str, row: Any) -> tuple[str, dict]:
    if not isinstance(row, dict):
        raise ConfigError(f"{source}: {position} is not an object with fields")
    return f"{position} (id {row.get('id', 'none')})", row


def _library(name: str, source: str | Path) -> Any:
    try:
        return import_module(name)
    except ImportError:
        package = name.partition(".")[0]
        raise ConfigError(
            f"{source}: needs the {package} package: pip install 'shardes[data]'"
        ) from None


def _line(error: Exception) -> str:
    return (str(error).splitlines() or [""])[0]
