"""Checks before a start."""

from transformers import AutoModelForCausalLM

from architectures import tiny_config
from shardes.config.schema import ESConfig
from shardes.launch import unused_by_text


def test_parts_that_text_does_not_use_are_named():
    model = AutoModelForCausalLM.from_config(tiny_config("gemma3"))
    unused = unused_by_text(model, ESConfig())
    assert unused and all("vision" in name or "multi_modal" in name for name in unused)
    assert unused_by_text(model, ESConfig(evolve="language_model")) == []
    assert unused_by_text(AutoModelForCausalLM.from_config(tiny_config("llama")), ESConfig()) == []
