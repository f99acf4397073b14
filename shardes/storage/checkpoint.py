"""Writes a Hugging Face checkpoint of safetensors files from regions of its parameters.

The place of every tensor in the files is fixed before anything is written, so several ranks can
write their regions at the same time. A manifest of SHA-256s marks the checkpoint as complete.
"""

import hashlib
import json
import os
import shutil
import struct
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_state_dict_into_shards_factory

from shardes.errors import ConfigError
from shardes.sharding.digest import digest
from shardes.sharding.model_directory import INDEX
from shardes.sharding.regions import BLOCK, Region
from shardes.sharding.weight_files import WeightFiles, by_part
from shardes.storage.files import checksum, sha256s, sync

MANIFEST = "manifest.json"
PARTIAL = ".partial"  # suffix of directories that are being written or removed
UNFINISHED = ".unfinished"  # a file that marks them, until all others are there
DTYPES = {
    torch.float32: ("F32", "float32"),
    torch.bfloat16: ("BF16", "bfloat16"),
    torch.float16: ("F16", "float16"),
}


@dataclass
class TensorPlace:
    """The place of one tensor in a file: elements `first` to `first + numel - 1` of a parameter.

    `param` is empty for tensors that no parameter is loaded from.
    """

    param: str
    first: int
    numel: int
    file: str
    offset: int  # bytes from the start of the file
    nbytes: int


class Checkpoint:
    """A checkpoint that is written to `directory` + ".partial" and renamed once it is complete.

    Args:
        base: the checkpoint has the tensors of these files (experts one by one), their config and
            tokenizer. Tensors that belong to no parameter are copied.
        params: the parameters to write.
        shard_size: maximum size of the weights in one file, such as "5GB"; a single tensor may be
            larger.
        replaced: values of tensors that would be copied.
        kept_float32: parameters to write in float32, whatever `dtype` is.
    """

    def __init__(
        self,
        directory: Path,
        base: WeightFiles,
        params: Iterable[str],
        dtype: torch.dtype,
        shard_size: str,
        replaced: Mapping[str, torch.Tensor] | None = None,
        kept_float32: Collection[str] = (),
    ):
        self._final, self._directory = directory, directory.with_name(directory.name + PARTIAL)
        self._base, self._dtype, self._replaced = base, dtype, replaced or {}
        self._places: dict[str, list[TensorPlace]] = {param: [] for param in params}
        self._copies: dict[str, list[TensorPlace]] = {param: [] for param in self._places}
        self._kept: dict[str, TensorPlace] = {}
        self._headers: dict[str, bytes] = {}
        self._sizes: dict[str, int] = {}
        self._handles: dict[str, int] = {}
        self._created = False
        param_of = {
            tensor: param
            for param in self._places
            for tensor in [*base.parts(param), *base.copies(param)]
        }
        self._dtypes = {
            param: torch.float32 if param in kept_float32 else dtype for param in self._places
        }
        sizes = {
            tensor: base.tensors[tensor].numel * self._dtypes[param].itemsize
            for tensor, param in param_of.items()
        }
        kept = {name: info.nbytes for name, info in base.tensors.items() if name not in param_of}
        split = split_state_dict_into_shards_factory(
            sizes | kept,
            get_storage_size=lambda size: size,
            filename_pattern="model{suffix}.safetensors",
            max_shard_size=shard_size,
        )
        self._index: dict[str, Any] | None = None
        if split.is_sharded:
            self._index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        for file, tensors in split.filename_to_tensors.items():
            self._place(file, tensors, param_of, sizes | kept)

    def _place(
        self,
        file: str,
        tensors: Sequence[str],
        param_of: Mapping[str, str],
        sizes: Mapping[str, int],
    ) -> None:
        """Settle a file's header, and the places of its tensors in it."""
        header: dict[str, dict[str, Any]] = {"__metadata__": {"format": "pt"}}
        end = 0
        for name in tensors:
            info = self._base.tensors[name]
            start, end = end, end + sizes[name]
            dtype = DTYPES[self._dtypes[param_of[name]]][0] if name in param_of else info.dtype
            shape = list(info.shape)
            header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        self._headers[file] = struct.pack("<Q", len(text)) + text
        self._sizes[file] = len(self._headers[file]) + end
        for name in tensors:
            param, numel = param_of.get(name, ""), self._base.tensors[name].numel
            offset = len(self._headers[file]) + header[name]["data_offsets"][0]
            place = TensorPlace(param, 0, numel, file, offset, sizes[name])
            if not param:
                self._kept[name] = place
            elif name in self._base.copies(param):
                self._copies[param].append(place)
            else:
                place.first = sum(part.numel for part in self._places[param])
                self._places[param].append(place)

    @property
    def files(self) -> list[str]:
        """The names of the safetensors files."""
        return list(self._headers)

    def create(self) -> None:
        """Create the directory: weight files of full size without parameters, config, tokenizer.

        Raises:
            FileExistsError: something else has its name.
        """
        if not is_free(self._directory):
            raise FileExistsError(f"{self._directory} exists and is no unfinished checkpoint")
        if self._directory.exists():
            shutil.rmtree(self._directory)
        self._directory.mkdir(parents=True)
        self._created = True
        (self._directory / UNFINISHED).touch()
        for name in self._base.copied_files:
            (self._directory / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(self._base.directory / name, self._directory / name)
        config = json.loads((self._base.directory / "config.json").read_bytes())
        config.pop("torch_dtype", None)
        config.pop("transformers_weights", None)  # names the base's file
        config["dtype"] = DTYPES[self._dtype][1]
        (self._directory / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        if self._index:
            (self._directory / INDEX).write_text(json.dumps(self._index, indent=2) + "\n")
        for name, header in self._headers.items():
            with open(self._directory / name, "wb") as file:
                file.write(header)
                file.truncate(self._sizes[name])
        for name, place in self._kept.items():
            with open(self._directory / place.file, "r+b") as file:
                file.seek(place.offset)
                file.writelines(self._kept_bytes(name))
                file.flush()
                os.fsync(file.fileno())

    def _kept_bytes(self, name: str) -> Iterable[bytes]:
        """The bytes of a tensor that belongs to no parameter, in blocks."""
        if name not in self._replaced:
            return self._base.raw(name)
        return [self._replaced[name].contiguous().view(-1).view(torch.uint8).numpy().tobytes()]

    def write(self, param: str, regions: Sequence[Region], values: torch.Tensor) -> None:
        """Write elements of a parameter.

        Args:
            values: flat, in the order of `regions`, on any device.
        """
        places = self._places[param]
        offset = 0
        for region in regions:
            for part, pieces in by_part(region, [place.numel for place in places]):
                for piece in pieces:
                    self._write(places[part], piece, values[offset : offset + piece.numel])
                    offset += piece.numel
        for place in self._copies[param]:
            offset = 0
            for region in regions:
                self._write(place, region, values[offset : offset + region.numel])
                offset += region.numel

    def _write(self, place: TensorPlace, region: Region, values: torch.Tensor) -> None:
        if place.file not in self._handles:
            self._handles[place.file] = os.open(self._directory / place.file, os.O_WRONLY)
        handle, dtype = self._handles[place.file], self._dtypes[place.param]
        size = dtype.itemsize
        for first in range(0, region.numel, BLOCK):
            last = min(first + BLOCK, region.numel)
            block = values[first:last].to("cpu", dtype).contiguous()
            data = block.view(torch.uint8).numpy().data
            for piece in region.cut(first, last):
                for row in range(piece.rows):
                    offset = place.offset + (piece.start + row * piece.stride) * size
                    _write_at(handle, data[: piece.cols * size], offset)
                    data = data[piece.cols * size :]

    def flush(self) -> None:
        """Flush this process's writes to disk."""
        while self._handles:
            _, handle = self._handles.popitem()
            try:
                os.fsync(handle)
            finally:
                os.close(handle)

    def read_back(self, name: str) -> tuple[str, int]:
        """The SHA-256 of a file on disk, and the digest of the parameters' elements in it."""
        sha, total = hashlib.sha256(), 0
        counted = [place for places in self._places.values() for place in places]
        copied = [place for places in self._copies.values() for place in places]
        places = [
            place for place in [*counted, *copied, *self._kept.values()] if place.file == name
        ]
        digested = {place.offset for place in counted if place.file == name}
        with open(self._directory / name, "rb", buffering=0) as file:
            sha.update(file.read(len(self._headers[name])))
            for place in sorted(places, key=lambda place: place.offset):
                dtype = self._dtypes.get(place.param, torch.uint8)
                step = BLOCK * dtype.itemsize
                for first in range(0, place.nbytes, step):
                    data = bytearray(file.read(min(step, place.nbytes - first)))
                    sha.update(data)
                    if place.offset in digested:
                        values = torch.frombuffer(data, dtype=dtype)
                        start, count = place.first + first // dtype.itemsize, len(values)
                        regions = [Region.contiguous(start, count)]
                        total += digest(place.param, regions, values, threads=False)
        return sha.hexdigest(), total % 2**64

    def publish(self, manifest: "Manifest", card: str = "") -> None:
        """Write the manifest and rename the complete directory to its final name.

        Args:
            manifest: with the SHA-256s of the safetensors files; the other files are added.
            card: text of a README.md; "": none.
        """
        shas = manifest.files
        if card:
            (self._directory / "README.md").write_text(card, encoding="utf-8")
        (self._directory / UNFINISHED).unlink()
        names = (
            path.relative_to(self._directory).as_posix()
            for path in self._directory.rglob("*")
            if path.is_file()
        )
        others = sorted(name for name in names if name not in shas)
        shas = shas | sha256s(self._directory, others)
        for name in others:
            sync(self._directory / name)
        body = asdict(replace(manifest, files=dict(sorted(shas.items()))))
        text = json.dumps(body | {"checksum": _checksum(body)}, indent=2) + "\n"
        (self._directory / MANIFEST).write_text(text)
        sync(self._directory / MANIFEST)
        sync(self._directory)
        self._directory.rename(self._final)
        sync(self._final.parent)

    def close(self) -> None:
        """Close the files, complete or not."""
        for handle in self._handles.values():
            os.close(handle)
        self._handles = {}

    def discard(self) -> None:
        """Remove the incomplete directory, if this process made it."""
        self.close()
        if self._created:
            shutil.rmtree(self._directory, ignore_errors=True)


def is_free(directory: Path) -> bool:
    """Whether a checkpoint may be written to a directory: there is none, or an empty one, or one
    that a killed writer left unfinished.
    """
    if not directory.is_dir() or directory.is_symlink():
        return not os.path.lexists(directory)
    return (directory / UNFINISHED).exists() or not any(directory.iterdir())


@dataclass
class Manifest:
    """The content of a checkpoint: the center before `iteration`, and each file's SHA-256.

    `run` is the checksum of the journal's header, which tells runs apart; "" if unknown.
    """

    iteration: int
    digest: str
    files: dict[str, str]
    run: str = ""


def read_manifest(directory: Path) -> Manifest:
    """The manifest of a checkpoint.

    Raises:
        ConfigError: it is missing or damaged.
    """
    try:
        body = json.loads((directory / MANIFEST).read_bytes())
        if body.pop("checksum") != _checksum(body):
            raise ValueError("its checksum does not match")
        return Manifest(**body)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{directory / MANIFEST}: unusable ({error})") from None


def verify(directory: Path) -> Manifest:
    """The manifest of a checkpoint, whose files are compared with it.

    Raises:
        ConfigError: the manifest or a file is missing or damaged; names it.
    """
    manifest = read_manifest(directory)
    missing = [name for name in manifest.files if not (directory / name).is_file()]
    if missing:
        raise ConfigError(f"{directory / missing[0]}: missing")
    for name, sha in sha256s(directory, manifest.files).items():
        if sha != manifest.files[name]:
            raise ConfigError(f"{directory / name}: damaged, its SHA-256 is not the manifest's")
    return manifest


def _checksum(body: dict) -> str:
    return checksum(json.dumps(body, sort_keys=True))


def _write_at(handle: int, data: memoryview, offset: int) -> None:
    while data:
        count = os.pwrite(handle, data, offset)
        data, offset = data[count:], offset + count
