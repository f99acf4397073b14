"""Files of JSON objects, one per line."""

import json
import math
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TextIO

from shardes.errors import RunError
from shardes.storage.files import write_whole


def no_warning(message: str) -> None:
    """What `read` calls by default."""


def read(file: Path, warn: Callable[[str], None] = no_warning) -> list[dict[str, Any]]:
    """The objects of a file's complete lines; none if the file does not exist.

    Each must have an integer "iteration". Damaged lines are left out: these files report what the
    journal records.

    Args:
        warn: is called once with a message that names the damaged lines, if there are any.
    """
    if not file.is_file():
        return []
    *lines, _ = file.read_bytes().split(b"\n")
    rows = list(map(_row, lines))
    damaged = [str(number) for number, row in enumerate(rows, 1) if row is None]
    if damaged:
        more = f" and {len(damaged) - 3} more" if len(damaged) > 3 else ""
        warn(f"WARNING: {file}: damaged and left out: line {', '.join(damaged[:3])}{more}")
    return [row for row in rows if row is not None]


def _row(line: bytes) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    whole = isinstance(row, dict) and type(row.get("iteration")) is int
    return row if whole else None


def append(file: TextIO, rows: Iterable[dict[str, Any]], durable: bool = False) -> None:
    """Append objects to an open file, and flush it.

    Args:
        durable: on return they are on disk.

    Raises:
        RunError: the file cannot be written.
    """
    try:
        file.write(_lines(rows))
        file.flush()
        if durable:
            os.fsync(file.fileno())
    except OSError as error:
        raise RunError(
            f"{file.name}: cannot be written ({error}). The journal is complete: once there is "
            "room, start the same command again to continue"
        ) from error


def replace(file: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Write a file anew; it is replaced only once the new one is complete.

    Raises:
        RunError: it cannot be written.
    """
    try:
        write_whole(file, _lines(rows))
    except OSError as error:
        raise RunError(
            f"{file}: cannot be written ({error}). The journal is complete: once there is room, "
            "start the same command again to continue"
        ) from error


def _lines(rows: Iterable[dict[str, Any]]) -> str:
    return "".join(to_json(row) + "\n" for row in rows)


def to_json(value: Any, indent: int | None = None) -> str:
    """Valid JSON: numbers that are NaN or infinite, which it lacks, become null.

    In a row, where they are metrics that could not be measured, they are left out. What is no value
    of JSON becomes text.
    """
    if isinstance(value, dict):
        value = {key: entry for key, entry in value.items() if not _is_no_number(entry)}
    finite = _finite(value)
    return json.dumps(finite, ensure_ascii=False, allow_nan=False, default=str, indent=indent)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(entry) for entry in value]
    return None if _is_no_number(value) else value


def _is_no_number(value: Any) -> bool:
    return isinstance(value, float) and not math.isfinite(value)
