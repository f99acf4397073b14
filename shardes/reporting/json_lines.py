"""Files of JSON objects, one per line."""

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TextIO

from shardes.errors import RunError


def read(file: Path) -> list[dict[str, Any]]:
    """The objects of a file's complete lines; none if the file does not exist."""
    if not file.is_file():
        return []
    *lines, _ = file.read_text(encoding="utf-8").split("\n")
    return list(map(json.loads, lines))


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
    """Write a file anew; it is replaced only once the new one is complete."""
    partial = file.with_name(file.name + ".partial")
    partial.write_text(_lines(rows), encoding="utf-8")
    partial.replace(file)


def _lines(rows: Iterable[dict[str, Any]]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
