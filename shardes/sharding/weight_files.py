"""The safetensors files of a model directory. Each rank reads only the bytes of its own shards."""

import json
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from math import prod
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from safetensors import SafetensorError, safe_open
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping

from shardes.errors import ConfigError
from shardes.sharding.regions import BLOCK, ParameterShard, Region

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
# The files of a model directory other than weights. Code is copied with the model, but runs only
# with model.trust_remote_code.
COMPANIONS = ["*.json", "*.jinja", "*.py", "tokenizer.model", "LICENSE*"]


def model_directory(path: str) -> Path:
    """The local directory of a model: `path` itself, or a download of the hub's model with that id.

    Raises:
        ConfigError: there is no such directory, or the download fails.
    """
    if Path(path).is_dir():
        return Path(path)
    if path.startswith((".", "/", "~")) or path.count("/") != 1:
        raise ConfigError(
            f"model.path={path}: no such directory, and not a hub id (owner/name) either"
        )
    patterns = ["*.safetensors", *COMPANIONS]
    return download(path, lambda: snapshot_download(path, allow_patterns=patterns))


def download(path: str, fetch: Callable[[], str]) -> Path:
    """The local path that `fetch` returns after it has downloaded files of the model `path`.

    Raises:
        ConfigError: the download fails.
    """
    try:
        return Path(fetch())
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ConfigError(
            f"model.path={path}: no such directory, and the download from the hub failed: {reason}"
        ) from error


def companions(directory: Path) -> list[str]:
    """The names of the files beside the weights: configs, tokenizer, licence, code."""
    names = {
        path.name for pattern in COMPANIONS for path in directory.glob(pattern) if path.is_file()
    }
    return sorted(
        name for name in names if not name.endswith(".index.json") and name != "manifest.json"
    )


class WeightFiles:
    """The tensors of a model directory: of `model.safetensors`, or of several files with an index.

    Opening reads only the headers, and checks that every file exists and has the length that its
    header implies.

    Raises:
        ConfigError: a file is missing or damaged.
    """

    def __init__(self, directory: Path):
        self.directory = directory
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._file_of: dict[str, str] = {}
        self._parts: dict[str, list[str]] = {}  # of parameters stacked from several tensors
        if (directory / INDEX).exists():
            self._read_index()
        elif (directory / SINGLE).exists():
            self._read_header(SINGLE)
            self._file_of = dict.fromkeys(self._shapes, SINGLE)
        else:
            raise ConfigError(f"model.path={directory}: it has neither {SINGLE} nor {INDEX}")

    def _read_index(self) -> None:
        try:
            self._file_of = json.loads((self.directory / INDEX).read_text())["weight_map"]
        except (ValueError, KeyError) as error:
            raise ConfigError(
                f"model.path={self.directory}: {INDEX} is unreadable ({error!r}); download it again"
            ) from None
        for file in sorted(set(self._file_of.values())):
            self._read_header(file)
        for name, file in self._file_of.items():
            if name not in self._shapes:
                raise ConfigError(
                    f"model.path={self.directory}: {INDEX} lists {name} in {file}, "
                    "which does not contain it"
                )

    def _read_header(self, file: str) -> None:
        try:
            with safe_open(self.directory / file, framework="pt") as opened:
                for name in opened.keys():  # noqa: SIM118 (safe_open is not a mapping)
                    self._shapes[name] = tuple(opened.get_slice(name).get_shape())
        except FileNotFoundError:
            raise ConfigError(
                f"model.path={self.directory}: {file} is missing; download it again"
            ) from None
        except (SafetensorError, OSError) as error:
            raise ConfigError(
                f"model.path={self.directory}: {file} is truncated or not a safetensors file "
                f"({error}); download it again"
            ) from None

    def stack(self, module: PreTrainedModel) -> None:
        """Find the parameters that transformers stacks from several tensors of the files: experts.

        Of transformers' conversions, those that only stack and concatenate are supported: they keep
        every tensor of the files contiguous in the parameter.
        """
        supported = [["MergeModulelist"], ["MergeModulelist", "Concatenate"]]
        for converter in get_model_conversion_mapping(module):
            operations = getattr(converter, "operations", None) or []
            if [type(operation).__name__ for operation in operations] not in supported:
                continue
            target = converter.target_patterns[0]
            for name, param in module.named_parameters():
                if not name.endswith(target) or name in self._shapes:
                    continue
                prefix = name.removesuffix(target)
                parts = [
                    prefix + pattern.replace("*", str(expert))
                    for expert in range(len(param))
                    for pattern in converter.source_patterns
                ]
                if all(part in self._shapes for part in parts):
                    self._parts[name] = parts
                    self._shapes[name] = tuple(param.shape)

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a parameter, or of a tensor of the files."""
        return self._shapes[name]

    def parts(self, name: str) -> list[str]:
        """The tensors of the files that form a parameter: in order, of equal sizes."""
        return self._parts.get(name, [name])

    @property
    def file_names(self) -> list[str]:
        """The files that define the model, sorted: weights, config, tokenizer, licence, code."""
        return sorted({*self._file_of.values(), *companions(self.directory)})

    def check(self, shapes: dict[str, Sequence[int]]) -> None:
        """Raise ConfigError if a parameter is missing or has another shape than in `shapes`."""
        for name, shape in shapes.items():
            if name not in self._shapes:
                raise ConfigError(f"model.path={self.directory}: the files have no tensor {name}")
            parts = self.parts(name)
            if self.shape(name) != tuple(shape) or sum(
                prod(self.shape(part)) for part in parts
            ) != prod(shape):
                raise ConfigError(
                    f"model.path={self.directory}: {name} has shape {self.shape(name)}, "
                    f"but config.json requires {tuple(shape)}"
                )

    def read(self, name: str, regions: Sequence[Region], out: torch.Tensor) -> None:
        """Copy the elements of `regions` to the start of the flat tensor `out`, in its dtype."""
        parts = self.parts(name)
        size = prod(self.shape(name)) // len(parts)
        offset = 0
        for region in regions:
            for part, pieces in by_part(region, size):
                count = sum(piece.numel for piece in pieces)
                self._read(parts[part], pieces, out[offset : offset + count])
                offset += count

    def _read(self, name: str, regions: Sequence[Region], out: torch.Tensor) -> None:
        """Copy the elements of `regions` of one tensor of the files to `out`."""
        offset = 0
        # Opened for each tensor: pages read from a mapped file stay resident until it is closed.
        with safe_open(self.directory / self._file_of[name], framework="pt") as opened:
            source = opened.get_slice(name)
            for region in regions:
                # Whole rows at a time: a strided block must not be split within a row.
                step = max(BLOCK // region.cols, 1) * region.cols if region.rows > 1 else BLOCK
                for first in range(0, region.numel, step):
                    for piece in region.cut(first, min(first + step, region.numel)):
                        target = out[offset : offset + piece.numel].view(piece.rows, piece.cols)
                        target.copy_(_piece(source, self.shape(name), piece))
                        offset += piece.numel


def by_part(region: Region, size: int) -> Iterator[tuple[int, list[Region]]]:
    """Split a region of a tensor that is stacked from parts of `size` elements: (part, regions)."""
    begin = 0
    while begin < region.numel:
        part = region.index(begin) // size
        end = bisect_left(range(region.numel), (part + 1) * size, lo=begin, key=region.index)
        regions = [
            Region(piece.start - part * size, piece.rows, piece.cols, piece.stride)
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
