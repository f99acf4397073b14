"""Small models that many tests share."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from shardes import environment

environment.prepare()

import torch  # noqa: E402
from transformers import (  # noqa: E402
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from models import SIZES, save_model  # noqa: E402
from zygote import Zygote  # noqa: E402


def pytest_terminal_summary(terminalreporter) -> None:
    """Show what tests have measured (`record_property`), as docs/scaling.md has it."""
    for report in terminalreporter.getreports("passed"):
        for what, figure in report.user_properties:
            terminalreporter.write_line(f"{what}: {figure:.1f} ({report.nodeid})")


@pytest.fixture(scope="session")
def zygote() -> Iterator[Zygote]:
    """Starts runs without the launcher's and the imports' seconds."""
    with Zygote() as zygote:
        yield zygote


@pytest.fixture(scope="session")
def uneven_llama(tmp_path_factory) -> Path:
    """A Llama with tied embeddings and 9 heads, 3 key-value heads, in one safetensors file."""
    torch.manual_seed(1)
    sizes = SIZES | dict(hidden_size=36, num_attention_heads=9, num_key_value_heads=3, head_dim=4)
    model = LlamaForCausalLM(LlamaConfig(**sizes, tie_word_embeddings=True))
    return save_model(tmp_path_factory.mktemp("uneven_llama"), model)


@pytest.fixture(scope="session")
def tied_llama(tmp_path_factory) -> Path:
    """A Llama with tied embeddings and 8 heads, 4 key-value heads."""
    torch.manual_seed(3)
    model = LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=True))
    return save_model(tmp_path_factory.mktemp("tied_llama"), model)


@pytest.fixture(scope="session")
def biased_qwen(tmp_path_factory) -> Path:
    """A Qwen2 with biases and untied embeddings, in several safetensors files with an index."""
    torch.manual_seed(2)
    model = Qwen2ForCausalLM(Qwen2Config(**SIZES, tie_word_embeddings=False))
    for name, param in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(param, std=0.3)
    return save_model(tmp_path_factory.mktemp("biased_qwen"), model, shard_size="60KB")


@pytest.fixture(scope="session")
def moe_qwen(tmp_path_factory) -> Path:
    """A mixture of experts: transformers stacks each layer's experts, its files hold them one by one."""
    torch.manual_seed(4)
    sizes = SIZES | dict(head_dim=4, moe_intermediate_size=32, num_experts=6, num_experts_per_tok=2)
    model = Qwen3MoeForCausalLM(Qwen3MoeConfig(**sizes, tie_word_embeddings=False))
    return save_model(tmp_path_factory.mktemp("moe_qwen"), model, shard_size="200KB")
