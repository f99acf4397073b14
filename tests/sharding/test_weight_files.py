"""Each rank reads the elements of its regions, and errors name the damaged file."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from shardes.engines import empty_model
from shardes.errors import ConfigError
from shardes.sharding import weight_files
from shardes.sharding.model_directory import model_directory
from shardes.sharding.regions import Region, cut
from shardes.sharding.weight_files import WeightFiles
from shardes.storage.external import ExternalCheckpoint


@pytest.fixture
def files(tmp_path) -> tuple[WeightFiles, dict[str, torch.Tensor]]:
    tensors = {
        "matrix": torch.randn(31, 17),
        "vector": torch.randn(100),
        "experts": torch.randn(4, 6, 5).bfloat16(),
        "scalar": torch.tensor(3.0),
    }
    save_file(tensors, tmp_path / "model.safetensors")
    return WeightFiles(tmp_path), tensors


@pytest.mark.parametrize(
    "name, regions",
    [
        ("matrix", [Region.contiguous(0, 31 * 17)]),
        ("matrix", [Region.contiguous(20, 100)]),
        ("matrix", [Region(3 * 17 + 4, 9, 6, 17)]),
        ("matrix", cut([Region(3 * 17 + 4, 9, 6, 17)], 5, 40)),
        ("matrix", [Region(2, 5, 1, 17), Region.contiguous(526, 1)]),
        ("vector", [Region.contiguous(7, 50), Region(60, 4, 2, 10)]),
        ("experts", [Region(31, 3, 10, 30), Region.contiguous(0, 7)]),
        ("scalar", [Region.contiguous(0, 1)]),
    ],
)
@pytest.mark.parametrize("block", [7, 1 << 20])
def test_reading_regions(files, name, regions, block, monkeypatch):
    monkeypatch.setattr(weight_files, "BLOCK", block)
    reader, tensors = files
    index = [
        r.start + (j // r.cols) * r.stride + j % r.cols for r in regions for j in range(r.numel)
    ]
    out = torch.full((len(index) + 2,), -7.0)
    reader.read(name, regions, out)
    assert torch.equal(out[:-2], tensors[name].reshape(-1)[index].float())
    assert out[-2:].tolist() == [-7, -7]


def test_several_files_with_an_index(biased_qwen):
    assert len(list(biased_qwen.glob("*.safetensors"))) > 1
    reader = WeightFiles(biased_qwen)
    for file in biased_qwen.glob("*.safetensors"):
        for name, tensor in load_file(file).items():
            out = torch.empty(tensor.numel())
            reader.read(name, [Region.contiguous(0, tensor.numel())], out)
            assert torch.equal(out.view(tensor.shape), tensor)


def truncate(directory):
    file = sorted(directory.glob("*.safetensors"))[0]
    file.write_bytes(file.read_bytes()[:-10])
    return file.name


def remove(directory):
    file = sorted(directory.glob("*.safetensors"))[0]
    file.unlink()
    return file.name


def misplace(directory):
    index = directory / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"]["no.such.weight"] = sorted(content["weight_map"].values())[0]
    index.write_text(json.dumps(content))
    return "no.such.weight"


def garbage(directory):
    (directory / "model.safetensors.index.json").write_text("{")
    return "model.safetensors.index.json"


@pytest.mark.parametrize("spoil", [truncate, remove, misplace, garbage])
def test_an_error_names_the_damaged_file(biased_qwen, tmp_path, spoil):
    directory = shutil.copytree(biased_qwen, tmp_path / "broken")
    name = spoil(directory)
    with pytest.raises(ConfigError, match=r"model\.path") as error:
        WeightFiles(directory)
    assert name in str(error.value)


def test_missing_parameters_and_other_shapes(tied_llama):
    reader = WeightFiles(tied_llama)
    with pytest.raises(ConfigError, match=r"no tensor lm_head\.weight"):
        reader.check({"lm_head.weight": (263, 32)})
    with pytest.raises(ConfigError, match=r"\(263, 32\).*\(263, 40\)"):
        reader.check({"model.embed_tokens.weight": (263, 40)})


def test_model_safetensors_comes_before_an_index_that_was_left(biased_qwen, tied_llama, tmp_path):
    directory = shutil.copytree(biased_qwen, tmp_path / "both")
    shutil.copy(tied_llama / "model.safetensors", directory)
    assert WeightFiles(directory).tensors == WeightFiles(tied_llama).tensors
    assert ExternalCheckpoint(directory).shapes.keys() == WeightFiles(tied_llama).tensors.keys()


FP8 = '{"quantization_config": {"quant_method": "fp8"}}'
OTHER_DIRECTORIES = {
    "fp8": ({"config.json": FP8}, r"quantised.*\(fp8\).*FineGrainedFP8Config\(dequantize=True\)"),
    "nested": ({"config.json": f'{{"text_config": {FP8}}}'}, r"quantised.*\(fp8\)"),
    "gptq": (
        {"quantize_config.json": "{}", "gptq_model-4bit-128g.bin": ""},
        "quantize_config.json",
    ),
    "bin": ({"pytorch_model.bin": ""}, r"pytorch_model\.bin: files of PyTorch.*pass COPY"),
    "adapter": (
        {"adapter_config.json": '{"base_model_name_or_path": "own/er"}'},
        "for own/er.*peft",
    ),
    "gguf": ({"model.Q4_0.gguf": ""}, r"gguf_file"),
    "mistral": ({"consolidated.safetensors": ""}, "Mistral's own format"),
    "distributed": ({"shard-00001-model-00001.safetensors": ""}, "shardes export"),
    "variant": ({"model.fp16.safetensors": ""}, "rename"),
    "consolidated too": (
        {"model.safetensors": "", "shard-00001-model-00001.safetensors": ""},
        "distributed checkpoint",
    ),
}


@pytest.mark.parametrize("kind", OTHER_DIRECTORIES)
def test_other_directories_are_named(kind, tmp_path):
    files, message = OTHER_DIRECTORIES[kind]
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(ConfigError, match=message) as error:
        WeightFiles(tmp_path)
    assert str(error.value).startswith(f"model.path={tmp_path}: ") and "\n" not in str(error.value)


def test_a_plan_of_a_quantised_model_is_refused(tied_llama, tmp_path):
    config = json.loads((tied_llama / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | json.loads(FP8)))
    with pytest.raises(ConfigError, match="quantised"):
        empty_model(tmp_path, torch.float32)


def test_a_path_without_a_model(tmp_path):
    with pytest.raises(ConfigError, match="no such directory"):
        model_directory(str(tmp_path / "absent"))
    with pytest.raises(ConfigError, match="neither"):
        WeightFiles(tmp_path)
