"""The safetensors files of a model directory. Each rank reads only the bytes of its own shards."""

import json
import re
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from math import prod
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from transformers import PreTrainedModel
from transformers.core_model_loading import build_glob_alternation

from shardes.errors import ConfigError
from shardes.sharding.model_directory import (
    check_unquantised,
    companions,
    missing_weights,
    quantised_tensor,
    read_config,
    read_index,
    tokenizer_files,
    weights_name,
)
from shardes.sharding.regions import BLOCK, ParameterShard, Region
from shardes.sharding.tensor_names import TensorNames, tensor_names

FLOATS = ("F64", "F32", "F16", "BF16")


@dataclass(frozen=True)
class TensorInfo:
    """A tensor of the files; `dtype` is safetensors' name, `offset` is from the file's start."""

    file: str
    shape: tuple[int, ...]
    dtype: str
    offset: int
    nbytes: int

    @property
    def numel(self) -> int:
        return prod(self.shape)


class WeightFiles:
    """The tensors of a model directory: of `model.safetensors`, or of several files with an index.

    Opening reads only the headers, and checks that every file exists and has the length that its
    header implies. Until `map_names` is called, names are those of the files.

    Attributes:
        tensors: the tensors of the files, by name.
        warnings: what the user should know about the files.

    Raises:
        ConfigError: a file is missing or damaged, or the model is quantised.
    """

    def __init__(self, directory: Path):
        self.directory = directory
        self.tensors: dict[str, TensorInfo] = {}
        self.warnings: list[str] = []
        self._names = TensorNames()
        check_unquantised(directory)
        name = weights_name(directory, read_config(directory))
        if not (directory / name).exists() or any(directory.glob("shard-*.safetensors")):
            raise ConfigError(missing_weights(directory, name))
        if name.endswith(".index.json"):
            self._read_index(name)
        else:
            self._read_header(name)

    def _read_index(self, index: str) -> None:
        file_of = read_index(self.directory, index)
        for file in sorted(set(file_of.values())):
            self._read_header(file)
        for name, file in file_of.items():
            if name not in self.tensors:
                raise ConfigError(
                    f"model.path={self.directory}: {index} lists {name} in {file}, "
                    "which does not contain it"
                )

    def _read_header(self, file: str) -> None:
        try:
            with safe_open(self.directory / file, framework="pt"):
                pass  # checks the header and the length
            with open(self.directory / file, "rb") as opened:
                size = int.from_bytes(opened.read(8), "little")
                header = json.loads(opened.read(size))
            header.pop("__metadata__", None)
            for name, tensor in header.items():
                begin, end = tensor["data_offsets"]
                self.tensors[name] = TensorInfo(
                    file, tuple(tensor["shape"]), tensor["dtype"], 8 + size + begin, end - begin
                )
        except FileNotFoundError:
            raise ConfigError(
                f"model.path={self.directory}: {file} is missing; download it again"
            ) from None
        except (SafetensorError, OSError) as error:
            raise ConfigError(
                f"model.path={self.directory}: {file} is truncated or not a safetensors file "
                f"({error}); download it again"
            ) from None

    def map_names(self, module: PreTrainedModel) -> None:
        """Find the tensors of the files that each parameter and persistent buffer is loaded from.

        Tied parameters whose tensors differ are untied in the module: see `tensor_names`.

        Raises:
            ConfigError: a tensor is quantised, or belongs to a layer that does not use it.
        """
        try:
            self._names = tensor_names(module, self.tensors, self._equal)
        except ConfigError as error:
            raise ConfigError(f"model.path={self.directory}: {error}") from None
        warnings = list(self._names.warnings)
        if missing := self._names.missing:
            others = f" and {len(missing) - 1} others" if len(missing) > 1 else ""
            warnings.append(f"no file has the buffer {missing[0]}{others}: initial values are used")
        if (self.directory / "adapter_config.json").exists():
            warnings.append("the adapter of adapter_config.json is not applied to the weights")
        self.warnings = [f"model.path={self.directory}: {text}" for text in warnings]

    def _equal(self, one: str, other: str) -> bool:
        """Whether two tensors of the files have the same values."""
        if self.tensors[one].shape != self.tensors[other].shape:
            return False
        numel = self.tensors[one].numel
        for first in range(0, numel, BLOCK):
            regions = [Region.contiguous(first, min(BLOCK, numel - first))]
            values = torch.empty(2, regions[0].numel, dtype=torch.float64)
            self._read(one, regions, values[0])
            self._read(other, regions, values[1])
            if not torch.equal(values[0], values[1]):
                return False
        return True

    def parts(self, name: str) -> list[str]:
        """The tensors of the files that form a parameter, in order."""
        return self._names.parts.get(name, [name])

    def copies(self, name: str) -> list[str]:
        """The tensors of the files that hold a tied parameter once more."""
        return self._names.copies.get(name, [])

    @property
    def used(self) -> dict[str, TensorInfo]:
        """The tensors that the model has a place for, by name."""
        return {n: info for n, info in self.tensors.items() if n not in self._names.unused}

    @property
    def file_names(self) -> list[str]:
        """The files that define the model, sorted: weights, config, tokenizer, licence, code."""
        weights = {tensor.file for tensor in self.tensors.values()}
        return sorted({*weights, *companions(self.directory)})

    @cached_property
    def copied_files(self) -> list[str]:
        """The files beside the weights that a checkpoint of the same model has too, sorted."""
        return sorted({*companions(self.directory), *tokenizer_files(self.directory)})

    def check(self, shapes: dict[str, Sequence[int]]) -> None:
        """Raise ConfigError if a parameter is missing, quantised, or not of the shape in `shapes`.

        Args:
            shapes: the shape of every parameter.
        """
        for name, shape in shapes.items():
            parts = self.parts(name)
            for part in parts:
                if part not in self.tensors:
                    raise ConfigError(
                        f"model.path={self.directory}: the files have no tensor {part}"
                    )
                if self.tensors[part].dtype not in FLOATS:
                    raise ConfigError(
                        quantised_tensor(self.directory, part, self.tensors[part].dtype)
                    )
            tensors = [self.tensors[part] for part in parts]
            rows = {tensor.shape[1:] for tensor in tensors}
            stacked = len(tensors) > 1
            fits = sum(tensor.numel for tensor in tensors) == prod(shape) and (
                all(row == tuple(shape)[len(shape) - len(row) :] for row in rows)
                if stacked
                else tensors[0].shape == tuple(shape)
            )
            if not fits:
                raise ConfigError(
                    f"model.path={self.directory}: {parts[0]} has shape {tensors[0].shape}"
                    f"{f' ({len(tensors)} such tensors)' if stacked else ''}, "
                    f"but config.json requires {tuple(shape)} of {name}"
                )

    def load_buffers(self, module: PreTrainedModel) -> None:
        """Copy the persistent buffers from the files to the module's, wherever those are.

        A buffer that transformers keeps in float32 in models of other dtypes is float32 here too.

        Raises:
            ConfigError: a buffer has another shape than the files'.
        """
        kept = float32_names(module, module.dtype)
        for name, tensor in self._names.buffers.items():
            buffer = module.get_buffer(name)
            info = self.tensors[tensor]
            if info.shape != tuple(buffer.shape):
                raise ConfigError(
                    f"model.path={self.directory}: {tensor} has shape {info.shape}, "
                    f"but the buffer {name} has {tuple(buffer.shape)}"
                )
            if kept.search(name):
                buffer.data = buffer.data.float()
            buffer.data.copy_(self.tensor(tensor))

    def raw(self, name: str) -> Iterator[bytes]:
        """The bytes of a tensor as they are in its file, in blocks."""
        tensor = self.tensors[name]
        with open(self.directory / tensor.file, "rb") as file:
            file.seek(tensor.offset)
            for first in range(0, tensor.nbytes, BLOCK):
                yield file.read(min(BLOCK, tensor.nbytes - first))

    def tensor(self, name: str) -> torch.Tensor:
        """A whole tensor of the files."""
        with safe_open(self.directory / self.tensors[name].file, framework="pt") as opened:
            return opened.get_tensor(name)

    @property
    def buffers(self) -> dict[str, str]:
        """The tensors of the files that hold the persistent buffers, by the buffers' names."""
        return self._names.buffers

    def read(self, name: str, regions: Sequence[Region], out: torch.Tensor) -> None:
        """Copy the elements of `regions` to the start of the flat tensor `out`, in its dtype."""
        parts = self.parts(name)
        sizes = [self.tensors[part].numel for part in parts]
        offset = 0
        for region in regions:
            for part, pieces in by_part(region, sizes):
                count = sum(piece.numel for piece in pieces)
                self._read(parts[part], pieces, out[offset : offset + count])
                offset += count

    def _read(self, name: str, regions: Sequence[Region], out: torch.Tensor) -> None:
        """Copy the elements of `regions` of one tensor of the files to `out`."""
        offset = 0
        # Opened for each tensor: pages read from a mapped file stay resident until it is closed.
        with safe_open(self.directory / self.tensors[name].file, framework="pt") as opened:
            source = opened.get_slice(name)
            for region in regions:
                # Whole rows at a time: a strided block must not be split within a row.
                step = max(BLOCK // region.cols, 1) * region.cols if region.rows > 1 else BLOCK
                for first in range(0, region.numel, step):
                    for piece in region.cut(first, min(first + step, region.numel)):
                        target = out[offset : offset + piece.numel].view(piece.rows, piece.cols)
                        target.copy_(_piece(source, self.tensors[name].shape, piece))
                        offset += piece.numel


def float32_names(module: PreTrainedModel, dtype: torch.dtype) -> re.Pattern[str]:
    """A pattern of the parameters and buffers that transformers keeps in float32 in this dtype."""
    plan = module._get_dtype_plan(dtype)
    return build_glob_alternation(list(plan))[0] if plan else re.compile(r"(?!)")


def by_part(region: Region, sizes: Sequence[int]) -> Iterator[tuple[int, list[Region]]]:
    """Split a region of a tensor that consists of parts of so many elements: (part, regions)."""
    ends = list(accumulate(sizes))
    begin = 0
    while begin < region.numel:
        part = bisect_right(ends, region.index(begin))
        start = ends[part] - sizes[part]
        end = bisect_left(range(region.numel), ends[part], lo=begin, key=region.index)
        regions = [
            Region(piece.start - start, piece.rows, piece.cols, piece.stride)
            for piece in region.cut(begin, end)
        ]
        yield part, regions
        begin = end


def _piece(source, shape: tuple[int, ...], region: Region) -> torch.Tensor:
    """The elements of a region of an opened safetensors slice, shape (rows, cols)."""
    if not shape:
        return source[...].view(1, 1)
    row_size = prod(shape[1:])
    first, column = divmod(region.start, row_size)
    end = region.start + (region.rows - 1) * region.stride + region.cols
    if len(shape) == 2 and region.stride == row_size and region.rows > 1:
        return source[first : first + region.rows, column : column + region.cols]
    rows = source[first : -(-end // row_size)].reshape(-1)
    return rows.as_strided(
        (region.rows, region.cols), (region.stride, 1), rows.storage_offset() + column
    )


def load(files: WeightFiles, shards: Sequence[ParameterShard]) -> None:
    """Fill the shards with the weights of the files."""
    for shard in shards:
        files.read(shard.name, shard.regions, shard.tensor)
