"""`model.attention` reaches the model, or the run is refused by name."""

import pytest
import torch
from transformers import MptConfig

from shardes.config.schema import Attention, ModelConfig
from shardes.engines import empty_model
from shardes.engines.attention import check_attention, check_used
from shardes.errors import ConfigError


@pytest.mark.parametrize("attention", [Attention.sdpa, Attention.eager, Attention.flex_attention])
def test_the_model_has_the_attention_that_was_chosen(uneven_llama, attention):
    module = empty_model(uneven_llama, torch.float32, attention=attention)
    assert {layer.self_attn.config._attn_implementation for layer in module.model.layers} == {
        attention.value
    }
    check_used(attention, module)
    with pytest.raises(ConfigError, match="flash_attention_3: transformers gives"):
        check_used(Attention.flash_attention_3, module)


def test_what_a_model_cannot_do_is_refused_by_name(tmp_path):
    MptConfig(d_model=32, n_heads=4, n_layers=1, vocab_size=99).save_pretrained(tmp_path)
    assert empty_model(tmp_path, torch.float32)
    for attention in (Attention.sdpa, Attention.flex_attention):
        with pytest.raises(ConfigError, match=f"model.attention={attention.value}: .* support"):
            empty_model(tmp_path, torch.float32, attention=attention)


def test_flex_attention_is_for_gpus(monkeypatch):
    model = ModelConfig("m", attention=Attention.flex_attention)
    for has_gpu in (True, False):
        monkeypatch.setattr(torch.accelerator, "is_available", lambda has=has_gpu: has)
        if has_gpu:
            check_attention(model)
        else:
            with pytest.raises(ConfigError, match=r"model\.attention=flex_attention: there is no"):
                check_attention(model)
