"""Small random models."""

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from shardes.config.schema import ESConfig
from shardes.es.fitness import coefficients, standardize

CHAT = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}<a>{% endif %}"
)


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level tokenizer with <eos> and <pad>."""
    vocabulary = {letter: i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<pad>", chat_template=CHAT
    )


def save_model(directory: Path, model, tokenizer=None, shard_size: str = "5GB") -> Path:
    model.generation_config.eos_token_id = 256
    model.generation_config.pad_token_id = 257
    model.save_pretrained(directory, max_shard_size=shard_size)
    (tokenizer or byte_tokenizer()).save_pretrained(directory)
    return directory


SIZES = dict(
    vocab_size=263,  # no degree divides it
    hidden_size=32,
    intermediate_size=50,
    num_hidden_layers=2,
    num_attention_heads=8,
    num_key_value_heads=4,
    max_position_embeddings=512,
    initializer_range=0.3,
)


def uneven_llama(directory: Path) -> Path:
    """A Llama with tied embeddings, 9 heads and 3 key-value heads, in one safetensors file."""
    torch.manual_seed(1)
    sizes = SIZES | dict(hidden_size=36, num_attention_heads=9, num_key_value_heads=3, head_dim=4)
    model = LlamaForCausalLM(LlamaConfig(**sizes, tie_word_embeddings=True))
    return save_model(directory, model)


def tied_llama(directory: Path) -> Path:
    """A Llama with tied embeddings, 8 heads and 4 key-value heads."""
    torch.manual_seed(3)
    model = LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=True))
    return save_model(directory, model)


def judging_llama(directory: Path) -> Path:
    """A Llama that classifies sequences, with one output."""
    torch.manual_seed(5)
    config = LlamaConfig(**SIZES, num_labels=1, pad_token_id=257)
    LlamaForSequenceClassification(config).save_pretrained(directory)
    byte_tokenizer().save_pretrained(directory)
    return directory


def biased_qwen(directory: Path) -> Path:
    """A Qwen2 with biases and untied embeddings, in several safetensors files with an index."""
    torch.manual_seed(2)
    model = Qwen2ForCausalLM(Qwen2Config(**SIZES, tie_word_embeddings=False))
    for name, param in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(param, std=0.3)
    return save_model(directory, model, shard_size="60KB")


def moe_qwen(directory: Path) -> Path:
    """A mixture of experts; transformers stacks each layer's experts, its files hold each apart."""
    torch.manual_seed(4)
    sizes = SIZES | dict(head_dim=4, moe_intermediate_size=32, num_experts=6, num_experts_per_tok=2)
    model = Qwen3MoeForCausalLM(Qwen3MoeConfig(**sizes, tie_word_embeddings=False))
    return save_model(directory, model, shard_size="200KB")


def paper_coefficients(rewards: list[float], alpha: float) -> list[float]:
    """c_n = (α/N)·z_n, float32."""
    return coefficients(ESConfig(population_size=len(rewards)), alpha, standardize(rewards))
