"""Checkpoints that other programs wrote in parts, read a whole tensor at a time.

A DeepSpeed ZeRO-3 checkpoint is a pickle; it is opened by torch's restricted unpickler, which builds tensors
and plain containers and runs nothing else.
"""

import re
from collections import OrderedDict
from math import prod
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import safe_open
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader

from shardes.config import ConfigError

DISTRIBUTED = "shard-*-model-*.safetensors"  # what transformers' distributed save writes


class Tensors(Protocol):
    """Tensors by name."""

    shapes: dict[str, tuple[int, ...]]

    def read(self, name: str) -> torch.Tensor:
        """A whole tensor, flat."""
        ...


def open_foreign(directory: Path) -> Tensors:
    """The tensors of a checkpoint directory of DeepSpeed's ZeRO-3 or of transformers' distributed save.

    Raises:
        ConfigError: it is neither, or not whole.
    """
    if any(directory.glob(DISTRIBUTED)):
        return DistributedFiles(directory)
    if (directory / ".metadata").exists():
        raise ConfigError(
            f"{directory}: a DCP checkpoint with pickled metadata, which is not read here; save it with transformers' "
            "save_pretrained(distributed_checkpoint=True)"
        )
    latest = directory / "latest"
    tagged = directory / latest.read_text().strip() if latest.is_file() else directory
    if any(tagged.glob("zero_pp_rank_*_model_states.pt")):
        return Zero3Files(tagged)
    raise ConfigError(
        f"{directory}: neither a run directory with a journal, nor a ZeRO-3 checkpoint, nor one of transformers' "
        "distributed save"
    )


class DistributedFiles:
    """A DCP directory of safetensors files, each with a rank's part of the tensors."""

    def __init__(self, directory: Path):
        metadata = HuggingFaceStorageReader(str(directory)).read_metadata()
        self._directory = directory
        self.shapes = {name: tuple(entry.size) for name, entry in metadata.state_dict_metadata.items()}
        self._chunks: dict[str, list[tuple[str, Any]]] = {name: [] for name in self.shapes}
        for index, info in metadata.storage_data.items():
            self._chunks[index.fqn].append((info.relative_path, index.offset))

    def read(self, name: str) -> torch.Tensor:
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


class Zero3Files:
    """A DeepSpeed ZeRO-3 checkpoint: float32 master weights of trained parameters, the rest as they were."""

    def __init__(self, directory: Path):
        self._directory = directory
        models = _by_rank(directory, "model_states.pt")
        self._ranks = len(models)
        model = _load(models[0])
        self._frozen = [(_load(file).get("frozen_param_fragments") or {}) for file in models]
        frozen = model.get("frozen_param_shapes") or {}
        trained = {name: shape for group in model["param_shapes"] for name, shape in group.items()}
        self.shapes = {name: tuple(shape) for name, shape in (frozen | trained).items()}
        self._starts: dict[str, int] = {}
        end = 0
        for name, shape in trained.items():
            self._starts[name], end = end, end + self._share(prod(shape))
        self._flat: list[list[torch.Tensor]] = []
        if trained:
            optimizers = _by_rank(directory, "optim_states.pt")
            if len(optimizers) != self._ranks:
                raise ConfigError(f"{directory}: {len(optimizers)} files of optimizer states for {self._ranks} ranks")
            for file in optimizers:
                flat = _load(file)["optimizer_state_dict"]["fp32_flat_groups"]
                if sum(part.numel() for part in flat) != end:
                    raise ConfigError(f"{file}: its master weights are not those of the parameters it names")
                self._flat.append(flat)

    def _share(self, numel: int) -> int:
        return -(-numel // self._ranks)

    def read(self, name: str) -> torch.Tensor:
        numel = prod(self.shapes[name])
        if name in self._starts:
            parts = [_narrow(flat, self._starts[name], self._share(numel)) for flat in self._flat]
        else:
            parts = [fragments[name].flatten() for fragments in self._frozen]
        return torch.cat(parts)[:numel]


def _by_rank(directory: Path, ending: str) -> list[Path]:
    """The ranks' files, in order."""
    found = {}
    for path in directory.glob(f"*{ending}"):
        match = re.fullmatch(rf"(?:bf16_|fp16_)?zero_pp_rank_(\d+)_mp_rank_(\d+)_{re.escape(ending)}", path.name)
        if match and int(match[2]):
            raise ConfigError(f"{path}: saved under tensor parallel, which is not read here")
        if match:
            found[int(match[1])] = path
    if sorted(found) != list(range(len(found))) or not found:
        raise ConfigError(f"{directory}: the files *{ending} of some ranks are missing")
    return [found[rank] for rank in sorted(found)]


def _narrow(flat: list[torch.Tensor], start: int, count: int) -> torch.Tensor:
    """Elements of several flat tensors, one after the other."""
    pieces = []
    for part in flat:
        low, high = max(start, 0), min(start + count, part.numel())
        if low < high:
            pieces.append(part[low:high])
        start -= part.numel()
    return torch.cat(pieces)


def _load(file: Path) -> dict:
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum

    try:
        with torch.serialization.safe_globals([OrderedDict, LossScaler, DynamicLossScaler, ZeroStageEnum]):
            return torch.load(file, map_location="cpu", mmap=True, weights_only=True)
    except Exception as error:  # truncated files raise a variety
        raise ConfigError(f"{file}: not readable: {str(error).splitlines()[0]}") from error
