"""Llama models of real sizes with random weights, for machines that can fetch none."""

import importlib.util
import shutil
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel, PreTrainedTokenizerFast

ROOT = Path(__file__).parent.parent
LLAMA3 = dict(vocab_size=128256, num_attention_heads=32, num_key_value_heads=8)
SIZES = {
    "135M": dict(  # SmolLM2-135M's shapes
        vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30,
        num_attention_heads=9, num_key_value_heads=3, tie_word_embeddings=True,
    ),
    "1B": LLAMA3 | dict(  # Llama 3.2's
        hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, head_dim=64,
        tie_word_embeddings=True,
    ),
    "8B": LLAMA3 | dict(  # Llama 3.1's
        hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, tie_word_embeddings=False,
    ),
}  # fmt: skip
TOY = dict(
    vocab_size=263, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=True,
)  # fmt: skip


def config(size: str, toy: bool) -> LlamaConfig:
    """The config of a size; of a tiny model, if toy."""
    shapes = TOY if toy else SIZES[size]
    tokens = dict(eos_token_id=256, pad_token_id=257, bos_token_id=None)
    return LlamaConfig(**shapes, **tokens, max_position_embeddings=4096)


def model(size: str, device: str, toy: bool, dtype: torch.dtype) -> PreTrainedModel:
    """A model of this size on the device, with the same random weights at every call."""
    torch.manual_seed(0)
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config(size, toy), dtype=dtype).eval()


def directory(folder: Path, size: str, device: str, toy: bool) -> Path:
    """A model directory of this size in bfloat16; made if the folder has none.

    Raises:
        RuntimeError: the disk has too little room.
    """
    made = folder / size
    if made.exists():
        return made
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(config(size, toy), dtype=torch.bfloat16)
    needed = 2.1 * sum(param.numel() for param in empty.parameters())
    if shutil.disk_usage(folder).free < needed:
        raise RuntimeError(f"{folder}: {size} needs {needed / 1e9:.0f} GB of disk; see --work")
    half = folder / f"{size}.part"
    shutil.rmtree(half, ignore_errors=True)
    model(size, device, toy, torch.bfloat16).save_pretrained(half, max_shard_size="4GB")
    tokenizer().save_pretrained(half)
    half.rename(made)
    return made


def tokenizer() -> PreTrainedTokenizerFast:
    """The byte-level tokenizer of the tests."""
    spec = importlib.util.spec_from_file_location("tests_models", ROOT / "tests/models.py")
    assert spec is not None and spec.loader is not None
    helpers = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(helpers)
    return helpers.byte_tokenizer()
