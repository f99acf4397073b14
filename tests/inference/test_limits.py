"""What a model cannot take is refused before it decodes."""

import pytest
import torch
from accelerate import init_empty_weights
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from models import SIZES, byte_tokenizer
from shardes.engines import open_model
from shardes.errors import ConfigError
from shardes.inference.generation import Decoder
from shardes.inference.limits import (
    beyond_context,
    check_decoding,
    check_prompts,
    learned_positions,
)

HEADS = dict(num_attention_heads=4, num_key_value_heads=4)
KEYS = {  # of models that name them otherwise
    "gpt2": dict(n_positions=24),
    "gpt_bigcode": dict(n_positions=24),
    "gptj": dict(n_positions=24, rotary_dim=4),
    "codegen": dict(n_positions=24, rotary_dim=4),
    "ctrl": dict(n_positions=24, dff=48),
    "gpt_neo": dict(num_layers=2, attention_types=[[["global", "local"], 1]], num_heads=4),
    "opt": dict(ffn_dim=48, word_embed_proj_dim=32),
    "mpt": dict(max_seq_len=24, d_model=32, n_heads=4, n_layers=2, expansion_ratio=2),
    "xglm": dict(d_model=32, attention_heads=4, ffn_dim=48, num_layers=2),
    "bloom": dict(n_head=4, n_layer=2),
    "bert": dict(is_decoder=True),
}
POSITIONS = {  # None: any number
    "gpt2": 24,
    "gpt_bigcode": 24,
    "gptj": 24,
    "codegen": 24,
    "ctrl": 24,
    "gpt_neo": 24,
    "opt": 24,
    "biogpt": 24,
    "mpt": 24,
    "bert": 24,
    "xglm": None,
    "bloom": None,
    "falcon": None,
    "llama": None,
    "gpt_neox": None,
}


def make(name: str, **keys):
    sizes = SIZES | HEADS | dict(max_position_embeddings=24) | KEYS.get(name, {}) | keys
    return AutoModelForCausalLM.from_config(CONFIG_MAPPING[name](**sizes)).eval()


@pytest.mark.parametrize("name", POSITIONS)
def test_positions_end_where_the_model_says(name):
    model, positions = make(name), POSITIONS[name]
    assert learned_positions(model) == positions
    with init_empty_weights(include_buffers=False):
        assert learned_positions(make(name)) == positions  # as before a run
    check_decoding("m", model)
    length = 24 if positions else 40
    with torch.no_grad():
        model(torch.zeros(1, length, dtype=torch.long))
        if positions:
            with pytest.raises((IndexError, RuntimeError)):
                model(torch.zeros(1, length + 1, dtype=torch.long))


def test_prompts_and_new_tokens_beyond_the_positions_are_refused():
    model = make("gpt2")
    check_prompts("m", model, "train", [[1] * 20], 5)  # the last new token is not read again
    message = "generation.max_new_tokens=6: prompt 1 of test has 20 tokens, and m has 24 positions"
    with pytest.raises(ConfigError, match=message) as caught:
        check_prompts("m", model, "test", [[1], [1] * 20], 6)
    assert "use at most 5 new tokens" in str(caught.value)
    check_prompts("m", make("llama"), "train", [[1] * 200], 500)


@pytest.mark.parametrize("token", [263, 900, -1])
def test_token_ids_without_a_row_in_the_embedding_are_refused(token):
    message = f"prompt 1 of train has token id {token}, and the model's embedding has 263 rows"
    with pytest.raises(ConfigError, match=message):
        check_prompts("m", make("llama"), "train", [[1], [2, token, 262]], 5)


@pytest.mark.parametrize(
    "name, message",
    [("rwkv", "no key-value"), ("openai-gpt", "no key-value"), ("bart", "position_ids")],
)
def test_models_that_do_not_decode_in_batches_are_refused(name, message):
    with init_empty_weights(include_buffers=False):
        model = make(name, attention_hidden_size=32, n_layer=1, decoder_layers=1)
    with pytest.raises(ConfigError, match=message):
        check_decoding("m", model)


def test_prompts_beyond_the_context_are_warned_of(tied_llama):
    _, module = open_model(tied_llama, torch.float32)
    assert beyond_context("m", module, "train", [[1] * 12, [1] * 500], 12) is None
    warning = beyond_context("m", module, "train", [[1] * 12, [1] * 501], 12)
    assert "1 of 2 prompts of train pass the 512 tokens that m was made for" in warning
    assert "generation.max_new_tokens=12" in warning


def test_a_model_that_does_not_decode_is_named():
    decode = Decoder(byte_tokenizer(), 4, frozenset([256]), (), 4096)
    model = make("llama")
    forward = model.forward

    def broken(*arguments, **named):
        raise TypeError("got an unexpected cache")

    model.forward = broken
    with pytest.raises(ConfigError, match=r"LlamaForCausalLM does not decode .*unexpected cache"):
        decode(model, [[1, 2]])
    model.forward = forward
    decode(model, [[1, 2]])
    model.forward = broken
    with pytest.raises(TypeError):  # what worked before is no mistake of the user's
        decode(model, [[1, 2]])
