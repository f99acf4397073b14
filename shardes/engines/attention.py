"""How attention is computed, `model.attention`: what a setting needs, checked by name."""

from importlib.util import find_spec
from typing import Any

import torch
from transformers import PreTrainedModel

from shardes.config.schema import Attention, DType, ModelConfig
from shardes.errors import ConfigError

# Packages beside torch and transformers: without them, transformers may fetch code from the hub.
PACKAGES = {
    Attention.flash_attention_2: ("flash_attn", "flash-attn"),
    Attention.flash_attention_3: ("flash_attn_interface", "flash-attn-3"),
}


def check_attention(model: ModelConfig) -> None:
    """Raise ConfigError if this installation, machine or dtype has no such attention."""
    key = f"model.attention={model.attention.value}"
    if model.attention is Attention.flex_attention and not torch.accelerator.is_available():
        raise ConfigError(
            f"{key}: there is no GPU, and torch's C++ for CPUs does not compile with the mask of a "
            "batch; use sdpa"
        )
    if model.attention not in PACKAGES:
        return
    module, package = PACKAGES[model.attention]
    if find_spec(module) is None:
        raise ConfigError(f"{key}: the package {package} is not installed; install it, or use sdpa")
    if not torch.cuda.is_available():
        raise ConfigError(f"{key}: there is no GPU; use sdpa")
    if model.dtype is DType.float32:
        raise ConfigError(f"{key}: computes in 16 bits; use model.dtype=bfloat16, or sdpa")


def attention_argument(attention: Attention) -> dict[str, Any]:
    """The keyword argument of transformers; none: it chooses for each architecture."""
    return {} if attention is Attention.auto else {"attn_implementation": attention.value}


def check_used(attention: Attention, module: PreTrainedModel) -> None:
    """Raise ConfigError if transformers has chosen another attention for a model."""
    used = getattr(module.config.get_text_config(), "_attn_implementation", None)
    if attention is not Attention.auto and used != attention.value:
        raise ConfigError(
            f"model.attention={attention.value}: transformers gives {type(module).__name__} "
            f"{used}; use that, or auto"
        )
