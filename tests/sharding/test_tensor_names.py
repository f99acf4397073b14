"""Every tensor of a checkpoint is loaded as transformers loads it, and exported as it was named."""

import json
from math import prod
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.core_model_loading import Transpose, WeightConverter

from shardes.engines import open_model
from shardes.errors import ConfigError
from shardes.sharding.regions import Region
from shardes.sharding.weight_files import WeightFiles
from shardes.storage.export import ExportSource, write_export

SIZES = dict(
    vocab_size=96,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
)
EXPERTS = dict(num_local_experts=4, num_experts_per_tok=2)
DEEPSEEK = dict(
    n_routed_experts=4,
    num_experts_per_tok=2,
    n_group=1,
    topk_group=1,
    first_k_dense_replace=1,
    moe_intermediate_size=16,
    q_lora_rank=16,
    kv_lora_rank=16,
    qk_rope_head_dim=8,
    qk_nope_head_dim=8,
    v_head_dim=8,
    num_key_value_heads=4,
)
GEMMA4 = dict(
    head_dim=8,
    global_head_dim=8,
    sliding_window=8,
    layer_types=["sliding_attention", "full_attention"],
    hidden_size_per_layer_input=0,
    num_kv_shared_layers=0,
)
HYBRID = dict(layer_types=["linear_attention", "full_attention"], pad_token_id=0, eos_token_id=1)


def gemma3() -> PreTrainedModel:
    text = transformers.Gemma3TextConfig(**SIZES, head_dim=8)
    vision = dict(
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=28,
        patch_size=14,
    )
    config = transformers.Gemma3Config(
        text_config=text.to_dict(), vision_config=vision, mm_tokens_per_image=4
    )
    return AutoModelForCausalLM.from_config(config)


def build(name: str, **sizes) -> PreTrainedModel:
    config = getattr(transformers, f"{name}Config")(**SIZES | sizes)
    return AutoModelForCausalLM.from_config(config)


MODELS = {
    "buffers of dense layers": lambda: build("Gemma4Text", **GEMMA4),
    "buffers of routers": lambda: build("DeepseekV3", **DEEPSEEK),
    "embed_out": lambda: build("GPTNeoX"),
    "block_sparse_moe": lambda: build("Mixtral", **EXPERTS),
    "multimodal": gemma3,
    "concatenated convolutions": lambda: build("OlmoHybrid", **HYBRID),
    "no prefix": lambda: build("GPT2", n_embd=32, n_layer=2, n_head=4),
}
# The names in published files that save_pretrained does not write, and names of tensors in them.
RENAMED = {
    "multimodal": {
        "model.language_model.": "language_model.model.",
        "model.vision_tower.": "vision_tower.",
        "model.multi_modal_projector.": "multi_modal_projector.",
    },
    "no prefix": {"transformer.": ""},
}
EXPECTED = {
    "buffers of dense layers": "model.layers.1.layer_scalar",
    "buffers of routers": "model.layers.1.mlp.gate.e_score_correction_bias",
    "embed_out": "embed_out.weight",
    "block_sparse_moe": "model.layers.0.block_sparse_moe.experts.3.w2.weight",
    "multimodal": "language_model.model.norm.weight",
    "concatenated convolutions": "model.layers.0.linear_attn.q_conv1d.weight",
    "no prefix": "wte.weight",
}


def save(directory: Path, module: PreTrainedModel, renamed: dict[str, str] | None = None) -> Path:
    """A checkpoint of random values, buffers included, with prefixes of its names replaced."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        persistent = module.state_dict()
        for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
            if name in persistent:
                tensor.copy_(torch.randn(tensor.shape, generator=generator))
    module.save_pretrained(directory)
    file = directory / "model.safetensors"
    for old, new in (renamed or {}).items():
        tensors = {
            new + name.removeprefix(old) if name.startswith(old) else name: tensor
            for name, tensor in load_file(file).items()
        }
        save_file(tensors, file, metadata={"format": "pt"})
    return directory


def read(files: WeightFiles, name: str, shape: torch.Size) -> torch.Tensor:
    out = torch.empty(prod(shape))
    files.read(name, [Region.contiguous(0, prod(shape))], out)
    return out.view(shape)


def export(directory: Path, out: Path, change: float) -> Path:
    """An export of a model with `change` added to every parameter."""
    files, module = open_model(directory, torch.float32)
    shapes = {name: tuple(param.shape) for name, param in module.named_parameters()}
    source = ExportSource(
        files,
        shapes,
        lambda name, numel: read(files, name, shapes[name]).flatten() + change,
        torch.float32,
    )
    write_export(source, out, torch.float32, "60KB")
    return out


def tensors_of(directory: Path) -> dict[str, torch.Tensor]:
    return {k: v for file in directory.glob("*.safetensors") for k, v in load_file(file).items()}


def check_loaded_as_transformers_does(directory: Path) -> PreTrainedModel:
    files, module = open_model(directory, torch.float32)
    expected = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    assert [n for n, _ in module.named_parameters()] == [n for n, _ in expected.named_parameters()]
    for name, param in expected.named_parameters():
        assert torch.equal(read(files, name, param.shape), param), name
    for name, buffer in expected.named_buffers():
        assert torch.equal(module.get_buffer(name), buffer), name
    return expected


@pytest.mark.parametrize("kind", MODELS)
def test_a_model_is_loaded_and_exported(kind, tmp_path):
    base = save(tmp_path / "base", MODELS[kind](), RENAMED.get(kind))
    before = tensors_of(base)
    assert EXPECTED[kind] in before
    model = check_loaded_as_transformers_does(base)
    out = export(base, tmp_path / "out", 0.5)
    after = tensors_of(out)
    assert {n: t.shape for n, t in after.items()} == {n: t.shape for n, t in before.items()}
    exported = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    params = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    for name, value in model.state_dict().items():
        change = 0.5 if name in params else 0.0
        assert torch.equal(exported.state_dict()[name], value + change), name


def qwen2(directory: Path, tied: bool, **tensors) -> Path:
    """A Qwen2 whose file has more tensors, or lacks those that are None."""
    save(directory, build("Qwen2", tie_word_embeddings=tied))
    file = directory / "model.safetensors"
    changed = load_file(file) | {name.replace("__", "."): t for name, t in tensors.items()}
    kept = {name: tensor for name, tensor in changed.items() if tensor is not None}
    save_file(kept, file, metadata={"format": "pt"})
    return directory


def head(seed: int) -> torch.Tensor:
    return torch.randn(96, 32, generator=torch.Generator().manual_seed(seed))


def test_tied_embeddings_and_another_head_are_kept_apart(tmp_path):
    base = qwen2(tmp_path / "base", True, lm_head__weight=head(7))
    files, module = open_model(base, torch.bfloat16)
    assert "lm_head.weight" in dict(module.named_parameters())
    assert any("ties lm_head.weight" in warning for warning in files.warnings)
    check_loaded_as_transformers_does(base)
    exported = tensors_of(export(base, tmp_path / "out", 0.5))
    assert torch.equal(exported["lm_head.weight"], head(7) + 0.5)
    check_loaded_as_transformers_does(tmp_path / "out")


@pytest.mark.parametrize("embedding", [head(3), None])
def test_a_tied_head_is_written_where_the_base_has_one(embedding, tmp_path):
    tensors = {"lm_head__weight": head(3), "model__embed_tokens__weight": embedding}
    base = qwen2(tmp_path / "base", True, **tensors)
    files, module = open_model(base, torch.float32)
    assert "lm_head.weight" not in dict(module.named_parameters()) and not files.warnings
    check_loaded_as_transformers_does(base)
    exported = tensors_of(export(base, tmp_path / "out", 0.5))
    assert exported.keys() == tensors_of(base).keys()
    assert torch.equal(exported["lm_head.weight"], head(3) + 0.5)
    check_loaded_as_transformers_does(tmp_path / "out")


def test_a_router_bias_stays_in_float32(tmp_path):
    base = save(tmp_path / "base", build("DeepseekV3", **DEEPSEEK))
    _, module = open_model(base, torch.bfloat16)
    expected = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    for name, buffer in expected.named_buffers():
        if name in expected.state_dict():
            assert module.get_buffer(name).dtype == buffer.dtype
            assert torch.equal(module.get_buffer(name), buffer), name


def test_tensors_that_nothing_uses(tmp_path):
    """Parts that the model lacks are named and exported; what a layer would need is refused."""
    base = qwen2(tmp_path / "heads", False, value_head__weight=torch.ones(3).long())
    files, _ = open_model(base, torch.float32)
    assert "value_head.weight" in files.warnings[0]
    exported = tensors_of(export(base, tmp_path / "out", 0.5))
    assert torch.equal(exported["value_head.weight"], torch.ones(3).long())
    layer = "model__layers__1__self_attn__"
    for name in ("q_norm__weight", "o_proj__bias", "o_proj__lora_A__weight"):
        adapted = qwen2(tmp_path / name, False, **{layer + name: torch.ones(32)})
        with pytest.raises(ConfigError, match=rf"{name.replace('__', '.')}, which .* not use"):
            open_model(adapted, torch.float32)
    ignored = {layer + "rotary_emb__inv_freq": torch.ones(4)}
    assert not open_model(qwen2(tmp_path / "rope", False, **ignored), torch.float32)[0].warnings


def test_a_missing_buffer_is_named(tmp_path):
    base = save(tmp_path / "base", build("Gemma4Text", **GEMMA4))
    file = base / "model.safetensors"
    tensors = {n: t for n, t in load_file(file).items() if n != "model.layers.0.layer_scalar"}
    save_file(tensors, file, metadata={"format": "pt"})
    files, _ = open_model(base, torch.float32)
    assert "no file has the buffer model.layers.0.layer_scalar" in files.warnings[0]
    check_loaded_as_transformers_does(base)


def test_float8_tensors_without_a_config_are_refused(tmp_path):
    name = "model.layers.0.mlp.up_proj.weight"
    base = qwen2(tmp_path, False)
    weight = load_file(base / "model.safetensors")[name].to(torch.float8_e4m3fn)
    with pytest.raises(ConfigError, match=f"{name} is F8_E4M3"):
        open_model(qwen2(tmp_path, False, **{name.replace(".", "__"): weight}), torch.float32)


def test_conversions_that_change_tensors_are_refused(tmp_path, monkeypatch):
    def mapping(module):
        return [WeightConverter(["o_proj.weight"], ["o_proj.weight"], [Transpose(0, 1)])]

    monkeypatch.setattr("shardes.sharding.tensor_names.get_model_conversion_mapping", mapping)
    with pytest.raises(ConfigError, match=r"\(Transpose\).*save_original_format=False"):
        open_model(qwen2(tmp_path, False), torch.float32)


def test_config_json_names_the_file(tmp_path):
    base = qwen2(tmp_path / "base", False)
    (base / "model.safetensors").rename(base / "other.safetensors")
    config = json.loads((base / "config.json").read_text())
    config["transformers_weights"] = "other.safetensors"
    (base / "config.json").write_text(json.dumps(config))
    check_loaded_as_transformers_does(base)
    check_loaded_as_transformers_does(export(base, tmp_path / "out", 0.0))
