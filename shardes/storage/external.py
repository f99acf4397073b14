"""Checkpoints that other programs wrote as safetensors files, read one tensor at a time."""

from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from shardes.errors import ConfigError
from shardes.sharding.model_directory import INDEX, SINGLE
from shardes.sharding.weight_files import WeightFiles


class ExternalCheckpoint:
    """A directory of safetensors files that hold whole tensors or chunks of them.

    transformers' distributed save writes a file of chunks per rank; DeepSpeed's zero_to_fp32.py
    writes whole tensors from a ZeRO-3 checkpoint.

    Raises:
        ConfigError: there are no such files, or they cannot be read; says how to convert other
            formats.
    """

    def __init__(self, directory: Path):
        if not any(directory.glob("*.safetensors")):
            raise ConfigError(f"{directory}: {_hint(directory)}")
        self._directory = directory
        whole = (directory / SINGLE).exists() or (directory / INDEX).exists()
        if whole and not any(directory.glob("shard-*.safetensors")):
            # Of several files, those that transformers would load.
            tensors = WeightFiles(directory).tensors
            self.shapes = {name: tensor.shape for name, tensor in tensors.items()}
            self._chunks: dict[str, list[tuple[str, Any]]] = {
                name: [(tensor.file, None)] for name, tensor in tensors.items()
            }
            return
        try:
            metadata = HuggingFaceStorageReader(str(directory)).read_metadata()
        except (SafetensorError, OSError, ValueError) as error:
            raise ConfigError(f"{directory}: not readable: {error}") from error
        self.shapes = {
            name: tuple(entry.size)
            for name, entry in metadata.state_dict_metadata.items()
            if isinstance(entry, TensorStorageMetadata)
        }
        self._chunks = {name: [] for name in self.shapes}
        for index, info in metadata.storage_data.items():
            self._chunks[index.fqn].append((info.relative_path, index.offset))

    def read(self, name: str) -> torch.Tensor:
        """A whole tensor, flat.

        Raises:
            ConfigError: the files do not hold all of it.
        """
        tensor, num_read = None, 0
        for file, offset in self._chunks[name]:
            with safe_open(self._directory / file, framework="pt") as weights:
                chunk = weights.get_tensor(name)
            if tensor is None:
                tensor = chunk.new_empty(self.shapes[name])
            place = tuple(
                slice(start, start + size)
                for start, size in zip(offset or [0] * chunk.dim(), chunk.shape, strict=True)
            )
            tensor[place] = chunk
            num_read += chunk.numel()
        if tensor is None or num_read != tensor.numel():
            raise ConfigError(
                f"{self._directory}: holds {num_read} elements of {name}, "
                f"not {prod(self.shapes[name])}"
            )
        return tensor.flatten()

    def equal(self, one: str, other: str) -> bool:
        """Whether two tensors have the same values."""
        return torch.equal(self.read(one), self.read(other))


def _hint(directory: Path) -> str:
    """How to use a directory without safetensors files."""
    if (directory / "zero_to_fp32.py").exists():
        return (
            "a DeepSpeed checkpoint; its files can hold code and are not opened here. If you trust "
            f"it, convert it with DeepSpeed first: python {directory}/zero_to_fp32.py {directory} "
            "CONVERTED --safe_serialization; then pass CONVERTED"
        )
    if (directory / ".metadata").exists():
        return (
            "a DCP checkpoint without safetensors files; "
            "save with save_pretrained(..., distributed_checkpoint=True)"
        )
    return "neither a run directory with a journal nor a checkpoint of safetensors files"
