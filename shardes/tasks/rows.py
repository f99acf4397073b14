"""Rows of data: objects with fields, from JSON lines or a data set of the `datasets` library."""

import json
from collections.abc import Iterator
from pathlib import Path

from shardes.errors import ConfigError


def load_rows(source: str) -> list[tuple[str, dict]]:
    """The rows of a source, each with its position for error messages ("line 3 (id x)").

    Args:
        source: a file of JSON lines, or a data set, written datasets:NAME[,CONFIG]:SPLIT.

    Raises:
        ConfigError: the source cannot be read, has no rows, or has a line that is not an object.
    """
    kind, _, name = source.partition(":")
    rows = list(_data_set(source, name) if kind == "datasets" else _json_lines(Path(source)))
    if not rows:
        raise ConfigError(f"{source}: holds no rows")
    return rows


def _json_lines(path: Path) -> Iterator[tuple[str, dict]]:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: not a readable file of JSON lines: {error}") from error
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                row = json.loads(line)
            except ValueError as error:
                raise ConfigError(f"{path}: line {number} is not JSON: {error}") from error
            if not isinstance(row, dict):
                raise ConfigError(f"{path}: line {number} is not an object with fields")
            yield f"line {number} (id {row.get('id', 'none')})", row


def _data_set(source: str, name_and_split: str) -> Iterator[tuple[str, dict]]:
    name, _, split = name_and_split.rpartition(":")
    if not name:
        raise ConfigError(
            f"{source}: must be written datasets:NAME:SPLIT or datasets:NAME,CONFIG:SPLIT"
        )
    try:
        from datasets import load_dataset
    except ImportError:
        raise ConfigError(
            f"{source}: needs the datasets package: pip install 'shardes[math]'"
        ) from None
    try:
        rows = load_dataset(*name.split(","), split=split)
    except Exception as error:  # of many types: unknown name or split, no network
        raise ConfigError(
            f"{source}: {type(error).__name__}: {str(error).splitlines()[0]}"
        ) from error
    for number, row in enumerate(rows):
        yield f"row {number} (id {row.get('id', 'none')})", row
