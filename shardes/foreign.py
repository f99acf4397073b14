"""Checkpoints of safetensors files that other programs wrote, whole or in parts, read a tensor at a time."""

from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from shardes.config import ConfigError


class ForeignFiles:
    """A directory of safetensors files: transformers' distributed save, with a rank's part of the tensors in each,
    or what DeepSpeed's converter makes of a ZeRO-3 checkpoint.

    Raises:
        ConfigError: there are none, or they cannot be read; says what to do with a checkpoint of another form.
    """

    def __init__(self, directory: Path):
        if not any(directory.glob("*.safetensors")):
            raise ConfigError(f"{directory}: {_hint(directory)}")
        try:
            metadata = HuggingFaceStorageReader(str(directory)).read_metadata()
        except (SafetensorError, OSError, ValueError) as error:
            raise ConfigError(f"{directory}: not readable: {error}") from error
        self._directory = directory
        entries = metadata.state_dict_metadata.items()
        self.shapes = {name: tuple(entry.size) for name, entry in entries if isinstance(entry, TensorStorageMetadata)}
        self._chunks: dict[str, list[tuple[str, Any]]] = {name: [] for name in self.shapes}
        for index, info in metadata.storage_data.items():
            self._chunks[index.fqn].append((info.relative_path, index.offset))

    def read(self, name: str) -> torch.Tensor:
        """A whole tensor, flat.

        Raises:
            ConfigError: the files do not hold all of it.
        """
        out, filled = None, 0
        for file, offset in self._chunks[name]:
            with safe_open(self._directory / file, framework="pt") as opened:
                chunk = opened.get_tensor(name)
            out = chunk.new_empty(self.shapes[name]) if out is None else out
            where = tuple(slice(low, low + size) for low, size in zip(offset or (), chunk.shape, strict=True))
            out[where] = chunk
            filled += chunk.numel()
        if out is None or filled != out.numel():
            raise ConfigError(f"{self._directory}: holds {filled} elements of {name}, not {prod(self.shapes[name])}")
        return out.flatten()


def _hint(directory: Path) -> str:
    """What to do with a directory without safetensors files."""
    if (directory / "zero_to_fp32.py").exists():
        return (
            "a DeepSpeed checkpoint, in files that can hold code and are not opened here. If you trust it, let "
            f"DeepSpeed convert it first: python {directory}/zero_to_fp32.py {directory} CONVERTED "
            "--safe_serialization; then give CONVERTED"
        )
    if (directory / ".metadata").exists():
        return "a DCP checkpoint without safetensors files; save with save_pretrained(..., distributed_checkpoint=True)"
    return "neither a run directory with a journal nor a checkpoint of safetensors files"
