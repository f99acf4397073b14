"""Small certainties about files: what is on disk stays there, and what was changed is found."""

import hashlib
import os
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path


def sync(path: Path) -> None:
    """On return a file's bytes, or a directory's names, are on disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def checksum(text: str) -> str:
    """A checksum against accidents: 16 hexadecimal digits."""
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def sha256s(directory: Path, names: Iterable[str]) -> dict[str, str]:
    """The SHA-256 of each of a directory's files, several at a time."""

    def sha256(name: str) -> str:
        sha = hashlib.sha256()
        with open(directory / name, "rb", buffering=0) as opened:
            while block := opened.read(1 << 22):
                sha.update(block)
        return sha.hexdigest()

    names = list(names)
    with ThreadPoolExecutor(max_workers=len(os.sched_getaffinity(0))) as pool:
        return dict(zip(names, pool.map(sha256, names), strict=True))


def differing(one: Mapping, other: Mapping) -> list[str]:
    """The keys whose values are not the same in both, those that one of them lacks included, in order."""
    return sorted(key for key in one.keys() | other.keys() if one.get(key) != other.get(key))
