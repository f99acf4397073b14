"""Tiny random models of many architectures, and how each may be sharded: the table of
docs/models.md.
"""

from dataclasses import dataclass, field
from inspect import signature
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from models import save_model

# Why a layout is refused: a part of the error message, and what docs/models.md says.
EXPERTS = "'moe_tp_experts'"
LATENT = "'mla_kv_a_proj'"
REPLICATED = "'rowwise_split_input'"
NO_PLAN = "has no plan to"
ONE_HEAD = "has 1 key-value heads"
NO_HEADS = "has no attention heads"
WRONG = "AutoTP splits CodeGenForCausalLM wrongly"
MASK = "not their attention mask"
NO_CACHE = "has no key-value cache"
PADDING = "changes with the padding"
REASONS = {
    EXPERTS: "no: experts",
    LATENT: "no: latent attention",
    REPLICATED: "no: replicated layers",
    NO_PLAN: "no: no plan",
    ONE_HEAD: "no: one key-value head",
    NO_HEADS: "no: no attention heads",
    WRONG: "no: fused projection",
    MASK: "no: attention mask",
    NO_CACHE: "no: no key-value cache",
    PADDING: "no: padding",
}
SIZES: dict[str, Any] = dict(
    vocab_size=263,  # no degree divides it
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=512,
    bos_token_id=258,
    eos_token_id=256,
    pad_token_id=257,
)
HEAD = dict(head_dim=8)
WINDOW = dict(sliding_window=8, layer_types=["sliding_attention", "full_attention"])
EXPERT = dict(moe_intermediate_size=16, num_experts_per_tok=2)
ROUTED = EXPERT | dict(n_routed_experts=4, n_group=1, topk_group=1, first_k_dense_replace=1)
LOCAL = dict(num_local_experts=4, num_experts_per_tok=2)
MLA = dict(kv_lora_rank=8, q_lora_rank=8, qk_rope_head_dim=4, qk_nope_head_dim=4, v_head_dim=8)
MLA |= dict(num_key_value_heads=4)
MAMBA = dict(mamba_n_heads=8, mamba_d_head=8, mamba_d_state=8, mamba_n_groups=1)
LINEAR = dict(linear_num_value_heads=4, linear_num_key_heads=2, linear_key_head_dim=8)
LINEAR |= dict(linear_value_head_dim=8, layer_types=["linear_attention", "full_attention"])
GEMMA = HEAD | dict(query_pre_attn_scalar=8)


@dataclass(frozen=True)
class Architecture:
    """How to make a tiny model, and which of its layouts are refused.

    Attributes:
        sizes: arguments of its config, beside `SIZES`.
        deepspeed, fsdp: why the engine refuses `sharding.tensor` = 2; "": it does not.
        refused: why every layout is refused; "": it is not.
        head_only: `sharding.tensor` splits the embedding and the head, and no layer.
    """

    sizes: dict[str, Any] = field(default_factory=dict)
    deepspeed: str = ""
    fsdp: str = ""
    refused: str = ""
    head_only: bool = False

    def refusal(self, engine: str, tensor: int) -> str:
        """Why a layout is refused; "": it is not."""
        return (getattr(self, engine) if tensor > 1 else "") or self.refused


def _unplanned(
    sizes: dict[str, Any] | None = None, deepspeed: str = NO_PLAN, fsdp: str = NO_PLAN
) -> Architecture:
    return Architecture(sizes or {}, deepspeed, fsdp)


# The key is config.json's model_type; what follows a space tells variants apart.
ARCHITECTURES = {
    "apertus": Architecture(),
    "arcee": Architecture(HEAD),
    "bamba": Architecture(MAMBA | dict(attn_layer_indices=[1]), head_only=True),
    "biogpt": _unplanned(deepspeed=""),
    "bitnet": _unplanned(),
    "bloom": _unplanned(),
    "codegen": Architecture(dict(rotary_dim=4), deepspeed=WRONG),
    "cohere": Architecture(),
    "cohere2": Architecture(WINDOW),
    "ctrl": _unplanned(dict(dff=64)),
    "cwm": Architecture(HEAD),
    "deepseek_v2": Architecture(ROUTED | MLA | dict(n_shared_experts=1), deepspeed=EXPERTS),
    "deepseek_v3": Architecture(ROUTED | MLA | dict(n_shared_experts=1), deepspeed=EXPERTS),
    "diffllama": Architecture(head_only=True),
    "doge": Architecture(deepspeed=MASK, fsdp=MASK),
    "dots1": Architecture(ROUTED | dict(n_shared_experts=1), deepspeed=EXPERTS),
    "ernie4_5": Architecture(HEAD),
    "ernie4_5_moe": Architecture(
        dict(moe_intermediate_size=16, moe_num_experts=4, moe_k=2), deepspeed=EXPERTS
    ),
    "exaone": Architecture(),
    "exaone4": Architecture(WINDOW),
    "falcon": _unplanned(deepspeed=ONE_HEAD, fsdp=ONE_HEAD),
    "falcon new_decoder_architecture": _unplanned(
        dict(new_decoder_architecture=True, num_kv_heads=2), deepspeed=""
    ),
    "falcon alibi": _unplanned(dict(multi_query=False, alibi=True, bias=True, parallel_attn=False)),
    "falcon_h1": Architecture(HEAD | MAMBA | dict(mamba_d_ssm=64), head_only=True),
    "falcon_mamba": _unplanned(deepspeed=NO_HEADS, fsdp=NO_HEADS),
    "flex_olmo": Architecture(dict(num_experts=4, num_experts_per_tok=2), deepspeed=EXPERTS),
    "gemma": Architecture(HEAD),
    "gemma2": Architecture(GEMMA),
    "gemma3": Architecture(
        dict(
            text_config=GEMMA | WINDOW,
            vision_config=dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1)
            | dict(num_attention_heads=2, image_size=28, patch_size=14),
            mm_tokens_per_image=4,
        ),
    ),
    "gemma3_text": Architecture(GEMMA | WINDOW),
    "gemma3n_text": Architecture(
        HEAD
        | WINDOW
        | dict(hidden_size_per_layer_input=8, num_kv_shared_layers=0, laurel_rank=4)
        | dict(vocab_size_per_layer_input=263, activation_sparsity_pattern=[0.0, 0.0])
    ),
    "gemma4_text": Architecture(
        HEAD
        | WINDOW
        | dict(global_head_dim=8, hidden_size_per_layer_input=0, num_kv_shared_layers=0),
        deepspeed=EXPERTS,
    ),
    "glm": Architecture(HEAD, deepspeed=REPLICATED),
    "glm4": Architecture(HEAD, deepspeed=REPLICATED),
    "glm4_moe": Architecture(HEAD | ROUTED | dict(n_shared_experts=1), deepspeed=EXPERTS),
    "gpt2": _unplanned(),
    "gpt_bigcode": _unplanned(deepspeed=ONE_HEAD, fsdp=ONE_HEAD),
    "gpt_neo": _unplanned(
        dict(attention_types=[[["global", "local"], 1]], window_size=8), deepspeed=""
    ),
    "gpt_neox": Architecture(),
    "gpt_oss": Architecture(HEAD | WINDOW | LOCAL, head_only=True),
    "gptj": Architecture(dict(rotary_dim=4)),
    "granite": Architecture(),
    "granitemoe": Architecture(LOCAL, deepspeed=EXPERTS),
    "granitemoehybrid": Architecture(
        LOCAL | MAMBA | dict(shared_intermediate_size=16, layer_types=["mamba", "attention"]),
        deepspeed=EXPERTS,
    ),
    "granitemoeshared": Architecture(LOCAL | dict(shared_intermediate_size=16), deepspeed=EXPERTS),
    "helium": Architecture(HEAD),
    "hunyuan_v1_dense": Architecture(HEAD, head_only=True),
    "hunyuan_v1_moe": Architecture(HEAD | dict(num_experts=4, moe_topk=2), deepspeed=EXPERTS),
    "internlm3": Architecture(HEAD),
    "jais2": Architecture(HEAD),
    "jamba": Architecture(
        dict(num_experts=1, num_experts_per_tok=1, attn_layer_period=2, attn_layer_offset=1)
        | dict(mamba_d_state=4, mamba_dt_rank=4),
        deepspeed=EXPERTS,
    ),
    "jetmoe": _unplanned(LOCAL | dict(kv_channels=8)),
    "lfm2": Architecture(dict(layer_types=["conv", "full_attention"]), head_only=True),
    "llama": Architecture(),
    "llama4_text": Architecture(
        HEAD
        | dict(num_local_experts=2, intermediate_size_mlp=64, interleave_moe_layer_step=2)
        | dict(attention_chunk_size=16),
        deepspeed=EXPERTS,
    ),
    "mamba": _unplanned(deepspeed=NO_HEADS, fsdp=NO_HEADS),
    "mamba2": _unplanned(
        dict(num_heads=8, head_dim=8, state_size=8, n_groups=2), deepspeed=NO_HEADS, fsdp=NO_HEADS
    ),
    "minicpm3": Architecture(MLA, deepspeed=LATENT),
    "minimax_m2": Architecture(HEAD | LOCAL, deepspeed=EXPERTS),
    "ministral3": Architecture(HEAD),
    "mistral": Architecture(HEAD),
    "mixtral": Architecture(LOCAL, deepspeed=EXPERTS),
    "modernbert-decoder": _unplanned(),
    "mpt": _unplanned(),
    "nanochat": Architecture(),
    "nemotron": Architecture(HEAD),
    "nemotron_h": Architecture(
        HEAD
        | dict(hybrid_override_pattern="M*", mamba_num_heads=8, mamba_head_dim=8)
        | dict(ssm_state_size=8, n_groups=2),
        deepspeed=EXPERTS,
    ),
    "olmo": Architecture(),
    "olmo2": Architecture(deepspeed=REPLICATED),
    "olmo3": Architecture(WINDOW, deepspeed=REPLICATED),
    "olmo_hybrid": Architecture(LINEAR, deepspeed=REPLICATED),
    "olmoe": Architecture(dict(num_experts=4, num_experts_per_tok=2), deepspeed=EXPERTS),
    "openai-gpt": Architecture(deepspeed=NO_PLAN, fsdp=NO_PLAN, refused=NO_CACHE),
    "opt": _unplanned(dict(ffn_dim=64, word_embed_proj_dim=32), deepspeed=""),
    "persimmon": _unplanned(),
    "phi": Architecture(),
    "phi3": Architecture(deepspeed=REPLICATED),
    "phimoe": Architecture(LOCAL, deepspeed=EXPERTS),
    "qwen2": Architecture(),
    "qwen2_moe": Architecture(
        EXPERT | dict(shared_expert_intermediate_size=16, num_experts=4), deepspeed=EXPERTS
    ),
    "qwen3": Architecture(HEAD),
    "qwen3_moe": Architecture(HEAD | EXPERT | dict(num_experts=4), deepspeed=EXPERTS),
    "qwen3_next": Architecture(
        HEAD | EXPERT | LINEAR | dict(num_experts=4, shared_expert_intermediate_size=16),
        deepspeed=EXPERTS,
    ),
    "recurrent_gemma": Architecture(
        HEAD | dict(lru_width=32, attention_window_size=16, block_types=["recurrent", "attention"]),
        refused=PADDING,
    ),
    "rwkv": Architecture(deepspeed=NO_HEADS, fsdp=NO_HEADS, refused=NO_CACHE),
    "seed_oss": Architecture(HEAD),
    "smollm3": Architecture(),
    "stablelm": _unplanned(deepspeed=""),
    "starcoder2": Architecture(),
    "vaultgemma": Architecture(GEMMA),
    "xglm": _unplanned(dict(ffn_dim=64), deepspeed=""),
}


def few_or_all(few: list[str]) -> pytest.MarkDecorator:
    """Parametrizes a test with `names`: these few by default, and all architectures that run."""
    running = [name for name, kind in ARCHITECTURES.items() if not kind.refused]
    cases = [pytest.param(few, id="few"), pytest.param(running, id="all", marks=pytest.mark.slow)]
    return pytest.mark.parametrize("names", cases)


def make_model(name: str, directory: Path) -> Path:
    """Save a tiny model of `ARCHITECTURES`, with values in every parameter and buffer."""
    model = AutoModelForCausalLM.from_config(tiny_config(name))
    fill(model)
    return save_model(directory, model)


def tiny_config(name: str) -> PreTrainedConfig:
    sizes = ARCHITECTURES[name].sizes
    kind = CONFIG_MAPPING[name.partition(" ")[0]]
    if "text_config" in sizes:
        return kind(**sizes | {"text_config": SIZES | sizes["text_config"]})
    return kind(**{key: size for key, size in SIZES.items() if takes(kind, key)} | sizes)


def takes(kind: type[PreTrainedConfig], key: str) -> bool:
    """Whether a config class has this setting."""
    return key in kind.attribute_map or key in signature(kind).parameters


def fill(model: PreTrainedModel) -> None:
    """Give parameters and persistent buffers values that make answers depend on each of them."""
    generator = torch.Generator().manual_seed(7)
    persistent = model.state_dict().keys()
    with torch.no_grad():
        for param in model.parameters():
            noise = torch.randn(param.shape, generator=generator)
            if param.dim() > 1:
                param.copy_(noise * 0.3)
            else:
                param += noise * 0.1
        for name, buffer in model.named_buffers():
            if name in persistent and buffer.is_floating_point():
                buffer += torch.rand(buffer.shape, generator=generator) * 0.3 - 0.5


def table() -> str:
    """The table of docs/models.md."""
    rows = [
        "| model_type | one rank, shard | tensor, deepspeed | tensor, fsdp |",
        "| --- | --- | --- | --- |",
    ]
    for name, architecture in ARCHITECTURES.items():
        model_type, _, variant = name.partition(" ")
        cells = [f"`{model_type}`" + (f" with `{variant}`" if variant else "")]
        for engine, tensor in (("deepspeed", 1), ("deepspeed", 2), ("fsdp", 2)):
            refusal = architecture.refusal(engine, tensor)
            accepted = "head only" if tensor > 1 and architecture.head_only else "yes"
            cells.append(REASONS[refusal] if refusal else accepted)
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)
