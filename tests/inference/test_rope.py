"""Rotary scaling by length: a prompt's tokens do not depend on the other rows of its batch."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Phi3Config, Phi3ForCausalLM

from models import SIZES, byte_tokenizer
from shardes.inference import rope
from shardes.inference.generation import batches, decoder
from shardes.inference.log_probs import log_probs
from shardes.inference.rope import LengthScaling

NEW = 12
# The boundary is 32: within, on it, across it while responding, and beyond it; some twice
LENGTHS = [5, 30, 45, 21, 20, 32, 33, 9, 45, 25, 31]
PROMPTS = [[(7 * i + 3 * n) % 256 for i in range(length)] for n, length in enumerate(LENGTHS)]
FACTORS = dict(
    rope_type="longrope",
    rope_theta=100.0,
    short_factor=[1.0, 1.1],
    long_factor=[2.0, 9.0],
    original_max_position_embeddings=32,
    factor=8.0,
)


def make(kind: str):
    torch.manual_seed(4)
    sizes = SIZES | dict(initializer_range=0.5, eos_token_id=256, pad_token_id=257)
    if kind == "dynamic":
        scaling = dict(rope_type="dynamic", rope_theta=100.0, factor=8.0)
        config = sizes | dict(max_position_embeddings=32, rope_parameters=scaling)
        return LlamaForCausalLM(LlamaConfig(**config)).eval()
    long = sizes | dict(max_position_embeddings=256, rope_parameters=FACTORS)
    if kind == "longrope":  # earlier keys stay rotated by the short factors
        return LlamaForCausalLM(LlamaConfig(**long)).eval()
    # Phi-3 computes all keys again when it crosses the boundary.
    return Phi3ForCausalLM(
        Phi3Config(**long, original_max_position_embeddings=32, bos_token_id=0)
    ).eval()


@pytest.fixture(scope="module", params=["dynamic", "longrope", "phi3"])
def model(request):
    return make(request.param)


def alone(model, prompt: list[int]) -> list[int]:
    rope.reset(model, model.device)  # as if no longer prompt had come before
    ids = torch.tensor([prompt])
    mask = torch.ones_like(ids)
    out = model.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=NEW)
    return out[0, len(prompt) :].tolist()


def test_each_row_gets_the_tokens_of_generate_alone(model):
    decode = decoder(byte_tokenizer(), model.generation_config, max_new_tokens=NEW)
    expected = [alone(model, prompt) for prompt in PROMPTS]
    assert decode(model, PROMPTS) == expected
    reverse = decode(model, PROMPTS[::-1])  # after longer prompts
    assert reverse[::-1] == expected
    shares = [decode(model, PROMPTS[rank::2]) for rank in range(2)]  # two ranks of the shard axis
    assert shares == [expected[rank::2] for rank in range(2)]


def test_log_probs_do_not_depend_on_the_other_rows(model):
    prompts, responses = PROMPTS[:6], [[1, 2, 3], [4], [5, 6], [7] * 12, [8] * 13, [9] * 2]
    together = log_probs(model, prompts, responses)
    for prompt, response, values in zip(prompts, responses, together, strict=True):
        assert values == pytest.approx(log_probs(model, [prompt], [response])[0], abs=1e-4)


def test_only_rows_that_must_be_apart_are():
    scaling = LengthScaling(frozenset([32]), dynamic=False)
    assert batches(LENGTHS, NEW, 10000, scaling) == [[0, 7, 4, 3], [9], [1], [10], [5], [6, 2, 8]]
    dynamic = LengthScaling(frozenset([32]), dynamic=True)
    assert batches(LENGTHS, NEW, 10000, dynamic)[-2:] == [[6], [2, 8]]
    assert len(batches(LENGTHS, NEW, 10000)) == 1


def test_a_model_without_such_scaling_has_none():
    assert rope.length_scaling(LlamaForCausalLM(LlamaConfig(**SIZES))) is None
