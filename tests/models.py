"""Small models made on the spot."""

from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from shardes.config import ESConfig
from shardes.population import standardize
from shardes.variants import coefficients

CHAT = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}{% if add_generation_prompt %}<a>{% endif %}"
)


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer of bytes, and of <eos>, <pad>."""
    vocabulary = {letter: i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<pad>", chat_template=CHAT)


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


def paper_coefficients(rewards: list[float], alpha: float) -> list[float]:
    """c_n = (α/N)·z_n, float32."""
    return coefficients(ESConfig(population_size=len(rewards)), alpha, standardize(rewards))
