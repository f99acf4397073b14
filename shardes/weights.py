"""A model directory's safetensors files, of which each rank reads only its own bytes."""

import json
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from math import prod
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from safetensors import SafetensorError, safe_open
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping

from shardes.config import ConfigError
from shardes.files import sha256s
from shardes.shards import BLOCK, Region, Shard

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
# What a model directory has beside its weights. Code is run only with model.trust_remote_code, but always kept.
COMPANIONS = ["*.json", "*.jinja", "*.py", "tokenizer.model", "LICENSE*"]


def model_directory(path: str) -> Path:
    """The local directory of a model: `path` itself, or the hub's files of that id (downloaded if need be)."""
    if Path(path).is_dir():
        return Path(path)
    if path.startswith((".", "/", "~")) or path.count("/") != 1:
        raise ConfigError(f"model.path={path}: no such directory, and not a hub id (owner/name) either")
    try:
        return Path(snapshot_download(path, allow_patterns=["*.safetensors", *COMPANIONS]))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ConfigError(f"model.path={path}: not a directory here, and the hub says: {reason}") from error


def companions(directory: Path) -> list[str]:
    """The names of a model directory's small files: config, generation config, tokenizer, licence, code."""
    found = {path.name for pattern in COMPANIONS for path in directory.glob(pattern) if path.is_file()}
    return sorted(name for name in found if not name.endswith(".index.json") and name != "manifest.json")


class WeightFiles:
    """The tensors of a model directory: `model.safetensors`, or several files with an index.

    Opening reads the headers only and checks that every file named is there and as long as its header says.
    """

    def __init__(self, directory: Path):
        self.directory = directory
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._file_of: dict[str, str] = {}
        self._parts: dict[str, list[str]] = {}  # parameters that are several tensors of the files, in order
        index, single = directory / INDEX, directory / SINGLE
        if index.exists():
            try:
                self._file_of = json.loads(index.read_text())["weight_map"]
            except (ValueError, KeyError) as error:
                raise ConfigError(
                    f"model.path={directory}: {INDEX} is unreadable ({error!r}); fetch it again"
                ) from None
            for file in sorted(set(self._file_of.values())):
                self._read_header(file)
            for name, file in self._file_of.items():
                if name not in self._shapes:
                    raise ConfigError(f"model.path={directory}: {INDEX} places {name} in {file}, which lacks it")
        elif single.exists():
            self._read_header(SINGLE)
            self._file_of = dict.fromkeys(self._shapes, SINGLE)
        else:
            raise ConfigError(f"model.path={directory}: neither {SINGLE} nor {INDEX} is there")

    def _read_header(self, file: str) -> None:
        try:
            with safe_open(self.directory / file, framework="pt") as opened:
                for name in opened.keys():  # noqa: SIM118 (safe_open is no mapping)
                    self._shapes[name] = tuple(opened.get_slice(name).get_shape())
        except FileNotFoundError:
            raise ConfigError(f"model.path={self.directory}: {file} is missing; fetch it again") from None
        except (SafetensorError, OSError) as error:
            raise ConfigError(
                f"model.path={self.directory}: {file} is truncated or not a safetensors file ({error}); fetch it again"
            ) from None

    def stack(self, module: PreTrainedModel) -> None:
        """Find out which parameters of a model are stacked from several tensors of the files: those of experts.

        transformers says which in its conversions for loading. Those that merely stack and concatenate leave
        every tensor of the files in one stretch of the parameter, and are the ones understood here.
        """
        stacking = [["MergeModulelist"], ["MergeModulelist", "Concatenate"]]
        for converter in get_model_conversion_mapping(module):
            operations = [type(operation).__name__ for operation in getattr(converter, "operations", None) or []]
            if operations in stacking:
                for name, param in module.named_parameters():
                    target = converter.target_patterns[0]
                    if name.endswith(target) and name not in self._shapes:
                        patterns = [name.removesuffix(target) + pattern for pattern in converter.source_patterns]
                        parts = [p.replace("*", str(expert)) for expert in range(len(param)) for p in patterns]
                        if all(part in self._shapes for part in parts):
                            self._parts[name] = parts
                            self._shapes[name] = tuple(param.shape)

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a parameter, or of a tensor of the files."""
        return self._shapes[name]

    def parts(self, name: str) -> list[str]:
        """The tensors of the files that make up a parameter, of equal sizes, in order."""
        return self._parts.get(name, [name])

    def fingerprint(self) -> dict[str, str]:
        """The SHA-256 of every file that says what the model is: weights, config, tokenizer, code."""
        return sha256s(self.directory, sorted({*self._file_of.values(), *companions(self.directory)}))

    def check(self, shapes: dict[str, Sequence[int]]) -> None:
        """Raise ConfigError where a parameter is absent or has another shape than the model's config says."""
        for name, shape in shapes.items():
            if name not in self._shapes:
                raise ConfigError(f"model.path={self.directory}: the files have no tensor {name}")
            parts = self.parts(name)
            if self.shape(name) != tuple(shape) or sum(prod(self.shape(part)) for part in parts) != prod(shape):
                raise ConfigError(
                    f"model.path={self.directory}: {name} has shape {self.shape(name)}, "
                    f"where config.json asks for {tuple(shape)}"
                )

    def read(self, name: str, regions: Sequence[Region], out: torch.Tensor) -> None:
        """Copy the elements of `regions`, in order, to the front of the flat tensor `out`, cast to its dtype."""
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
        # Opened for each tensor, and closed again: what was read of a mapped file stays resident until then.
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
    """A region of a tensor that is stacked from parts of `size` elements: (part, its regions), in order."""
    begin = 0
    while begin < region.numel:
        part = region.index(begin) // size
        end = bisect_left(range(region.numel), (part + 1) * size, lo=begin, key=region.index)
        pieces = region.cut(begin, end)
        yield part, [Region(piece.start - part * size, piece.rows, piece.cols, piece.stride) for piece in pieces]
        begin = end


def _piece(source, shape: tuple[int, ...], region: Region) -> torch.Tensor:
    """One region's elements of a slice that safetensors has opened: shape (rows, cols)."""
    if not shape:
        return source[...].view(1, 1)
    row_size = prod(shape[1:])
    first, column = divmod(region.start, row_size)
    end = region.start + (region.rows - 1) * region.stride + region.cols
    if len(shape) == 2 and region.stride == row_size and region.rows > 1:
        return source[first : first + region.rows, column : column + region.cols]
    rows = source[first : -(-end // row_size)].reshape(-1)
    return rows.as_strided((region.rows, region.cols), (region.stride, 1), rows.storage_offset() + column)


def load(files: WeightFiles, shards: Sequence[Shard]) -> None:
    """Fill the shards' live weights."""
    for shard in shards:
        files.read(shard.name, shard.regions, shard.tensor)
