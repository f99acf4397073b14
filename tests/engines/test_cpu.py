"""The extension that sums through shared memory, where it cannot be built."""

import mmap
import os
from pathlib import Path

import pytest

from shardes.engines.cpu import SEGMENT, load_shared_memory_op, remove_abandoned_segments
from shardes.errors import ConfigError


def test_a_directory_that_cannot_be_written_is_named(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "file" / "extensions"))
    with pytest.raises(ConfigError, match=r"TORCH_EXTENSIONS_DIR: .* cannot be written"):
        load_shared_memory_op()


def test_shared_memory_of_killed_runs_is_removed():
    names = ("abandoned", "mapped", "new")
    files = {name: Path(f"/dev/shm/{SEGMENT}_{os.getuid()}_test_{name}") for name in names}
    for file in files.values():
        file.write_bytes(b"x" * mmap.PAGESIZE)
    try:
        with open(files["mapped"], "r+b") as opened, mmap.mmap(opened.fileno(), mmap.PAGESIZE):
            for name in ("abandoned", "mapped"):
                os.utime(files[name], (0, 0))
            remove_abandoned_segments()
        left = [name for name, file in files.items() if file.exists()]
    finally:
        for file in files.values():
            file.unlink(missing_ok=True)
    assert left == ["mapped", "new"]
