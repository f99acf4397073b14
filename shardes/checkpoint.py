"""A model directory that is written: tensors from parts, and a manifest that says when it is complete.

The places of all tensors in the safetensors files are settled before a byte is written, so that every rank can
write the regions it holds straight to where they belong.
"""

import hashlib
import json
import os
import shutil
import struct
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_state_dict_into_shards_factory

from shardes.config import ConfigError
from shardes.files import checksum, sha256s, sync
from shardes.shards import BLOCK, Region, digest, run
from shardes.weights import INDEX, WeightFiles, by_part, companions

MANIFEST = "manifest.json"
PARTIAL = ".partial"  # ends the names of directories that are being written or removed
DTYPES = {torch.float32: ("F32", "float32"), torch.bfloat16: ("BF16", "bfloat16"), torch.float16: ("F16", "float16")}


@dataclass
class Place:
    """Where a tensor lies in a file, and which elements of which parameter it holds: `numel` from `first` on."""

    param: str
    first: int
    numel: int
    file: str
    offset: int  # bytes from the file's start


class Checkpoint:
    """A checkpoint that is written at `directory` + ".partial", and renamed when it is complete.

    It holds the parameters `params` as the files of `base` hold them (names, experts one by one), in `dtype`.
    A file has at most `shard_size` ("5GB") bytes of weights, unless a single tensor is larger.
    """

    def __init__(self, directory: Path, base: WeightFiles, params: Iterable[str], dtype: torch.dtype, shard_size: str):
        self._home, self._directory = directory, directory.with_name(directory.name + PARTIAL)
        self._base = base
        self._dtype = dtype
        self._places: dict[str, list[Place]] = {param: [] for param in params}
        self._headers: dict[str, bytes] = {}
        self._sizes: dict[str, int] = {}
        self._open: dict[str, int] = {}
        parts = {part: param for param in self._places for part in base.parts(param)}
        split = split_state_dict_into_shards_factory(
            {part: prod(base.shape(part)) * dtype.itemsize for part in parts},
            get_storage_size=lambda size: size,
            filename_pattern="model{suffix}.safetensors",
            max_shard_size=shard_size,
        )
        self._index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename} if split.is_sharded else None
        for file, names in split.filename_to_tensors.items():
            header: dict[str, dict[str, Any]] = {"__metadata__": {"format": "pt"}}
            end = 0
            for name in names:
                begin, end = end, end + prod(base.shape(name)) * dtype.itemsize
                shape = list(base.shape(name))
                header[name] = {"dtype": DTYPES[dtype][0], "shape": shape, "data_offsets": [begin, end]}
            text = json.dumps(header).encode()
            text += b" " * (-len(text) % 8)
            self._headers[file] = struct.pack("<Q", len(text)) + text
            self._sizes[file] = len(self._headers[file]) + end
            for name in names:
                before = self._places[parts[name]]
                first, numel = sum(place.numel for place in before), prod(base.shape(name))
                offset = len(self._headers[file]) + header[name]["data_offsets"][0]
                before.append(Place(parts[name], first, numel, file, offset))

    @property
    def files(self) -> list[str]:
        """The names of the safetensors files."""
        return list(self._headers)

    def create(self) -> None:
        """Make the directory anew: files of their full sizes without weights, and the base's config and tokenizer."""
        shutil.rmtree(self._directory, ignore_errors=True)
        self._directory.mkdir(parents=True)
        for name in companions(self._base.directory):
            shutil.copyfile(self._base.directory / name, self._directory / name)
        config = json.loads((self._base.directory / "config.json").read_text())
        config.pop("torch_dtype", None)
        config["dtype"] = DTYPES[self._dtype][1]
        (self._directory / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        if self._index:
            (self._directory / INDEX).write_text(json.dumps(self._index, indent=2) + "\n")
        for file, header in self._headers.items():
            with open(self._directory / file, "wb") as opened:
                opened.write(header)
                opened.truncate(self._sizes[file])

    def write(self, param: str, regions: Sequence[Region], values: torch.Tensor) -> None:
        """Write elements of a parameter: `values` is flat, on any device, in the order of `regions`."""
        places = self._places[param]
        offset = 0
        for region in regions:
            for part, pieces in by_part(region, places[0].numel):
                for piece in pieces:
                    self._write(places[part], piece, values[offset : offset + piece.numel])
                    offset += piece.numel

    def _write(self, place: Place, region: Region, values: torch.Tensor) -> None:
        if place.file not in self._open:
            self._open[place.file] = os.open(self._directory / place.file, os.O_WRONLY)
        handle, size = self._open[place.file], self._dtype.itemsize
        for first in range(0, region.numel, BLOCK):
            last = min(first + BLOCK, region.numel)
            data = values[first:last].to("cpu", self._dtype).contiguous().view(torch.uint8).numpy().data
            for piece in region.cut(first, last):
                for row in range(piece.rows):
                    _write_at(
                        handle, data[: piece.cols * size], place.offset + (piece.start + row * piece.stride) * size
                    )
                    data = data[piece.cols * size :]

    def flush(self) -> None:
        """On return what this process wrote is on disk."""
        while self._open:
            _, handle = self._open.popitem()
            try:
                os.fsync(handle)
            finally:
                os.close(handle)

    def read_back(self, file: str) -> tuple[str, int]:
        """The SHA-256 of a file as it is on disk, and the digest of the elements in it."""
        sha, total = hashlib.sha256(), 0
        places = (place for placed in self._places.values() for place in placed if place.file == file)
        with open(self._directory / file, "rb", buffering=0) as opened:
            sha.update(opened.read(len(self._headers[file])))
            for place in sorted(places, key=lambda place: place.offset):
                for first in range(0, place.numel, BLOCK):
                    count = min(BLOCK, place.numel - first)
                    data = bytearray(opened.read(count * self._dtype.itemsize))
                    sha.update(data)
                    values = torch.frombuffer(data, dtype=self._dtype)
                    total += digest(place.param, [run(place.first + first, count)], values, threads=False)
        return sha.hexdigest(), total % 2**64

    def publish(self, iteration: int, digest: str, shas: dict[str, str], card: str = "") -> None:
        """Write the manifest and give the complete directory its name.

        `shas` are the safetensors files'; `card` is a README.md, if any.
        """
        if card:
            (self._directory / "README.md").write_text(card)
        others = sorted(path.name for path in self._directory.iterdir() if path.name not in shas)
        shas = shas | sha256s(self._directory, others)
        for name in others:
            sync(self._directory / name)
        body = asdict(Manifest(iteration, digest, dict(sorted(shas.items()))))
        text = json.dumps(body | {"checksum": _checksum(body)}, indent=2) + "\n"
        (self._directory / MANIFEST).write_text(text)
        sync(self._directory / MANIFEST)
        sync(self._directory)
        self._directory.rename(self._home)
        sync(self._home.parent)

    def close(self) -> None:
        """Write no more, complete or not."""
        for handle in self._open.values():
            os.close(handle)
        self._open = {}

    def discard(self) -> None:
        """Remove what was written."""
        self.close()
        shutil.rmtree(self._directory, ignore_errors=True)


@dataclass
class Manifest:
    """What a complete checkpoint holds: the center before `iteration`, its digest, and every file's SHA-256."""

    iteration: int
    digest: str
    files: dict[str, str]


def read_manifest(directory: Path) -> Manifest:
    """The manifest of a checkpoint.

    Raises:
        ConfigError: it is missing or damaged.
    """
    try:
        body = json.loads((directory / MANIFEST).read_text())
        if body.pop("checksum") != _checksum(body):
            raise ValueError("its checksum does not fit")
        return Manifest(**body)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{directory / MANIFEST}: unusable ({error})") from None


def verify(directory: Path) -> Manifest:
    """The manifest of a checkpoint all of whose files are as it says.

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
