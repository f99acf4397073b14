"""The extension that sums through shared memory, where it cannot be built."""

import pytest

from shardes.engines.cpu import load_shared_memory_op
from shardes.errors import ConfigError


def test_a_directory_that_cannot_be_written_is_named(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "file" / "extensions"))
    with pytest.raises(ConfigError, match=r"TORCH_EXTENSIONS_DIR: .* cannot be written"):
        load_shared_memory_op()
