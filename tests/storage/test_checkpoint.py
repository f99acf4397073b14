"""A checkpoint written in parts is the model; a damaged file is named."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from shardes.engines import open_model
from shardes.errors import ConfigError
from shardes.sharding.digest import digest, format_digest
from shardes.sharding.regions import Region, cut
from shardes.storage.checkpoint import Checkpoint, Manifest, read_manifest, verify


def open_files(directory):
    files, module = open_model(directory, torch.float32)
    return files, {name: tuple(param.shape) for name, param in module.named_parameters()}


def columns(shape, low, high):
    """The regions of columns `low` to `high - 1` of a matrix."""
    return (Region(low, shape[0], high - low, shape[1]),) if high > low else ()


def write(out, directory, dtype=torch.float32, shard_size="5GB", change=0.0):
    """A checkpoint of a model with `change` added, written in rows, columns and stretches."""
    files, shapes = open_files(directory)
    checkpoint = Checkpoint(out, files, shapes, dtype, shard_size)
    checkpoint.create()
    total = 0
    for number, (name, shape) in enumerate(shapes.items()):
        whole = (Region.contiguous(0, torch.Size(shape).numel()),)
        if len(shape) == 2 and number % 2:
            parts = [columns(shape, 0, 5), columns(shape, 5, shape[1])]
        else:
            parts = [cut(whole, 0, 7), cut(whole, 7, whole[0].cols)]
        for regions in parts:
            values = torch.empty(sum(region.numel for region in regions))
            files.read(name, regions, values)
            values += change
            total += digest(name, regions, values.to(dtype))
            checkpoint.write(name, regions, values)
    checkpoint.flush()
    hashes = {file: checkpoint.read_back(file) for file in checkpoint.files}
    assert format_digest(sum(part for _, part in hashes.values())) == format_digest(total)
    shas = {file: sha for file, (sha, _) in hashes.items()}
    checkpoint.publish(Manifest(12, format_digest(total), shas))
    return out


@pytest.mark.parametrize("model", ["uneven_llama", "biased_qwen", "moe_qwen"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_transformers_loads_what_was_written(model, dtype, request, tmp_path):
    directory = request.getfixturevalue(model)
    out = write(tmp_path / "out", directory, dtype, shard_size="40KB", change=0.5)
    assert len(list(out.glob("*.safetensors"))) > 1 and not list(tmp_path.glob("*.partial"))
    loaded = AutoModelForCausalLM.from_pretrained(out)
    reference = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    assert loaded.dtype == dtype
    for (name, param), (_, expected) in zip(
        loaded.named_parameters(), reference.named_parameters(), strict=True
    ):
        assert torch.equal(param, (expected + 0.5).to(dtype)), name
    assert (out / "tokenizer.json").read_bytes() == (directory / "tokenizer.json").read_bytes()
    assert verify(out).iteration == 12


def test_one_file_has_no_index(tied_llama, tmp_path):
    out = write(tmp_path / "out", tied_llama)
    assert [path.name for path in out.glob("*.safetensors*")] == ["model.safetensors"]
    assert set(load_file(out / "model.safetensors")) == set(open_files(tied_llama)[1])


def test_files_keep_to_their_size(biased_qwen, tmp_path):
    out = write(tmp_path / "out", biased_qwen, shard_size="30KB")
    largest = max(torch.Size(shape).numel() * 4 for shape in open_files(biased_qwen)[1].values())
    weights = json.loads((out / "model.safetensors.index.json").read_text())["weight_map"]
    for path in out.glob("*.safetensors"):
        assert path.stat().st_size < max(30_000, largest) + 4096
        assert any(file == path.name for file in weights.values())


@pytest.mark.faults
def test_one_flipped_byte_anywhere_is_found_and_its_file_named(tied_llama, tmp_path):
    out = write(tmp_path / "out", tied_llama)
    generator = torch.Generator().manual_seed(0)
    for path in sorted(out.iterdir()):
        whole = path.read_bytes()
        random = torch.randint(len(whole), (12,), generator=generator).tolist()
        for at in {0, len(whole) - 1, *random}:
            path.write_bytes(whole[:at] + bytes([whole[at] ^ 16]) + whole[at + 1 :])
            with pytest.raises(ConfigError, match=path.name):
                verify(out)
        path.write_bytes(whole)
    assert verify(out).iteration == 12


def test_a_missing_file_is_named(tied_llama, tmp_path):
    out = write(tmp_path / "out", tied_llama)
    (out / "config.json").unlink()
    with pytest.raises(ConfigError, match=r"config\.json: missing"):
        verify(out)
    shutil.rmtree(out)
    with pytest.raises(ConfigError, match=r"manifest\.json"):
        read_manifest(out)


def test_a_discarded_checkpoint_leaves_nothing(tied_llama, tmp_path):
    files, shapes = open_files(tied_llama)
    checkpoint = Checkpoint(tmp_path / "out", files, shapes, torch.float32, "5GB")
    checkpoint.create()
    checkpoint.write("model.norm.weight", (Region.contiguous(0, 32),), torch.ones(32))
    checkpoint.discard()
    assert not list(tmp_path.iterdir())


def test_only_what_a_killed_writer_left_is_removed(tied_llama, tmp_path):
    files, shapes = open_files(tied_llama)

    def create() -> Checkpoint:
        checkpoint = Checkpoint(tmp_path / "out", files, shapes, torch.float32, "5GB")
        try:
            checkpoint.create()
        finally:
            checkpoint.close()
        return checkpoint

    create()  # and is killed
    create().discard()
    assert not list(tmp_path.iterdir())
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="no unfinished checkpoint"):
        create()
    Checkpoint(tmp_path / "out", files, shapes, torch.float32, "5GB").discard()
    assert (tmp_path / "out.partial" / "notes.txt").exists()
