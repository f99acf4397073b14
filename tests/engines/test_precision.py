"""Parameters and buffers have the precision that transformers gives them, in every dtype."""

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from architectures import few_or_all, make_model
from shardes.engines import open_model
from shardes.sharding.regions import Region
from shardes.storage.export import ExportSource, write_export

pytestmark = pytest.mark.architectures
# Sinusoids as buffers; norms and routers that stay in float32, some of them in float16 only
FEW = ["gptj", "codegen", "gpt_oss", "deepseek_v3", "llama"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@few_or_all(FEW)
def test_it_is_that_of_from_pretrained(tmp_path, names, dtype):
    for name in names:
        directory = make_model(name, tmp_path / name)
        expected = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype)
        _, module = open_model(directory, dtype)
        buffers = dict(module.named_buffers())
        for key, buffer in expected.named_buffers():
            assert buffers[key].dtype == buffer.dtype, (name, key)
            assert torch.equal(buffers[key], buffer), (name, key)
        assert {key: param.dtype for key, param in module.named_parameters()} == {
            key: param.dtype for key, param in expected.named_parameters()
        }, name


def test_an_export_keeps_what_the_model_keeps_in_float32(tmp_path):
    base = make_model("deepseek_v3", tmp_path / "base")
    files, module = open_model(base, torch.float32)

    def read(name: str, numel: int) -> torch.Tensor:
        values = torch.empty(numel)
        files.read(name, [Region.contiguous(0, numel)], values)
        return values

    shapes = {name: tuple(param.shape) for name, param in module.named_parameters()}
    write_export(
        ExportSource(files, shapes, read, torch.bfloat16), tmp_path / "out", torch.bfloat16, "5GB"
    )
    before, after = (load_file(path / "model.safetensors") for path in (base, tmp_path / "out"))
    gate = "model.layers.1.mlp.gate.weight"
    assert torch.equal(before[gate], after[gate]) and after[gate].dtype == torch.float32
    assert after["model.embed_tokens.weight"].dtype == torch.bfloat16
