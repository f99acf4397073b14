"""Durable writes, checksums, and the fingerprint of a model directory."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # it imports torch
    from shardes.sharding.weight_files import WeightFiles


def sync(path: Path) -> None:
    """Flush a file's bytes, or a directory's entries, to disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def make_directory(path: Path) -> list[Path]:
    """Create a directory and its parents where missing; their names are on disk on return.

    Returns those that were missing, innermost first.
    """
    missing = [folder for folder in (path, *path.parents) if not folder.exists()]
    path.mkdir(parents=True, exist_ok=True)
    for folder in missing:
        sync(folder.parent)
    return missing


def write_whole(path: Path, text: str, mode: int = 0o644) -> None:
    """Write a file, in UTF-8, such that a crash or a full disk leaves all of it or none."""
    temporary = path.with_name(f"{path.name}.tmp")
    temporary.unlink(missing_ok=True)
    try:
        handle = os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, mode)
        with open(handle, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    sync(path.parent)


def checksum(text: str) -> str:
    """A checksum that detects accidental changes, not forgeries: 16 hexadecimal digits."""
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def sha256s(directory: Path, names: Iterable[str]) -> dict[str, str]:
    """The SHA-256 of each named file of a directory; several files are read at a time."""

    def sha256(name: str) -> str:
        sha = hashlib.sha256()
        with open(directory / name, "rb", buffering=0) as file:
            while block := file.read(1 << 22):
                sha.update(block)
        return sha.hexdigest()

    names = list(names)
    with ThreadPoolExecutor(max_workers=len(os.sched_getaffinity(0))) as pool:
        return dict(zip(names, pool.map(sha256, names), strict=True))


def fingerprint(files: WeightFiles) -> dict[str, str]:
    """The SHA-256 of every file that defines a model: weights, config, tokenizer, licence, code."""
    return sha256s(files.directory, files.file_names)


def differing(one: Mapping, other: Mapping) -> list[str]:
    """The keys, sorted, whose values differ between two mappings or that only one of them has."""
    return sorted(key for key in one.keys() | other.keys() if one.get(key) != other.get(key))
