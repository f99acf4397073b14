"""Tiny models of the architectures that vLLM is tested with, and settings for them."""

from transformers import (
    ArceeConfig,
    ArceeForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from models import SIZES
from shardes.config.loading import load

HEADS_OF_32 = SIZES | dict(hidden_size=128, num_attention_heads=4, num_key_value_heads=2)
EXPERTS = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=64)
GPT2 = dict(vocab_size=263, n_embd=128, n_head=4, n_layer=2, n_inner=50, n_positions=512)
MODELS = {  # vLLM makes groups for experts with the first model of a process, or never
    "qwen3_moe": lambda: Qwen3MoeForCausalLM(Qwen3MoeConfig(**HEADS_OF_32, **EXPERTS, head_dim=32)),
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**HEADS_OF_32, tie_word_embeddings=True)),
    "one_head": lambda: LlamaForCausalLM(  # that tensor ranks have copies of
        LlamaConfig(**HEADS_OF_32 | dict(num_key_value_heads=1))
    ),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**HEADS_OF_32, tie_word_embeddings=False)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**HEADS_OF_32, head_dim=32)),
    "gemma2": lambda: Gemma2ForCausalLM(
        Gemma2Config(**HEADS_OF_32, head_dim=32, query_pre_attn_scalar=32)
    ),
    "mistral": lambda: MistralForCausalLM(
        MistralConfig(**HEADS_OF_32, head_dim=32, sliding_window=None)
    ),
    "phi3": lambda: Phi3ForCausalLM(Phi3Config(**HEADS_OF_32, pad_token_id=0)),  # fused
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(**GPT2, initializer_range=0.3)),  # transposed
}
OF_TRANSFORMERS = {  # that vLLM computes with the modules of transformers
    "arcee": lambda: ArceeForCausalLM(ArceeConfig(**HEADS_OF_32, head_dim=32)),
}


def config(*overrides):
    return load(None, ["engine=vllm", "model.path=m", "run.dir=r", *overrides])
