"""Greedy decoding gives the tokens of transformers' `generate`; samples follow the model."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    MistralConfig,
    MistralForCausalLM,
    Qwen3NextConfig,
    Qwen3NextForCausalLM,
)

from models import SIZES, byte_tokenizer
from shardes.errors import ConfigError
from shardes.inference.batch import _compact
from shardes.inference.choosing import gumbel
from shardes.inference.generation import Decoder, decoder
from shardes.inference.prompts import encode

TEXTS = ["a", "a longer prompt, of many letters", "b" * 17, "xyz", "?"]


@pytest.fixture(scope="module", params=["tied_llama", "biased_qwen"])
def model(request):
    return AutoModelForCausalLM.from_pretrained(
        request.getfixturevalue(request.param), dtype=torch.float32
    ).eval()


@pytest.fixture(scope="module")
def tokenizer(tied_llama):
    return AutoTokenizer.from_pretrained(tied_llama, padding_side="left")


def generate_with_transformers(model, tokenizer, texts, **options) -> list[list[int]]:
    batch = tokenizer(texts, return_tensors="pt", padding=True)
    out = model.generate(**batch, do_sample=False, **options)
    rows = []
    for row in out[:, batch["input_ids"].shape[1] :].tolist():
        end = next((i + 1 for i, token in enumerate(row) if token in stops(model)), len(row))
        rows.append(row[:end])
    return rows


def stops(model) -> list[int]:
    eos = model.generation_config.eos_token_id
    return eos if isinstance(eos, list) else [eos]


def common_tokens(model, tokenizer) -> list[int]:
    """Tokens that end some responses early when they are used as end-of-sequence tokens."""
    rows = generate_with_transformers(model, tokenizer, TEXTS, max_new_tokens=40)
    return [rows[0][5], rows[3][20]]


def test_the_same_tokens_as_transformers_and_rows_that_end_early(model, tokenizer, monkeypatch):
    monkeypatch.setattr(model.generation_config, "eos_token_id", common_tokens(model, tokenizer))
    expected = generate_with_transformers(model, tokenizer, TEXTS, max_new_tokens=40)
    assert len({len(row) for row in expected}) > 1
    decode = decoder(tokenizer, model.generation_config, max_new_tokens=40)
    assert decode(model, encode(tokenizer, TEXTS)) == expected


def test_batches_and_calls_of_any_shape_use_one_cache(model, tokenizer):
    decode = decoder(tokenizer, model.generation_config, max_new_tokens=12)
    for texts in (TEXTS, TEXTS[:1], TEXTS[1:4], TEXTS * 2, TEXTS):
        expected = generate_with_transformers(model, tokenizer, texts, max_new_tokens=12)
        assert decode(model, encode(tokenizer, texts)) == expected


def test_a_repeated_call_allocates_no_memory(model, tokenizer):
    decode = decoder(tokenizer, model.generation_config, max_new_tokens=12)
    decode(model, encode(tokenizer, TEXTS))
    before = addresses(decode)
    decode(model, encode(tokenizer, TEXTS))
    assert addresses(decode) == before


def addresses(decode: Decoder) -> list[int]:
    return [tensor.data_ptr() for layer in decode._cache.layers for tensor in layer._memory]


@pytest.mark.parametrize("kind", ["sliding", "hybrid"])
def test_layers_without_full_attention(tokenizer, kind, monkeypatch):
    torch.manual_seed(5)
    if kind == "sliding":
        model = MistralForCausalLM(MistralConfig(**SIZES, sliding_window=6)).eval()
    else:
        kinds = ["linear_attention", "full_attention"]
        state = dict(
            linear_num_value_heads=2,
            linear_num_key_heads=2,
            linear_key_head_dim=8,
            linear_value_head_dim=8,
        )
        sizes = SIZES | dict(head_dim=4, num_experts=0, layer_types=kinds)
        model = Qwen3NextForCausalLM(Qwen3NextConfig(**sizes, **state)).eval()
    monkeypatch.setattr(model.generation_config, "pad_token_id", 257)
    monkeypatch.setattr(model.generation_config, "eos_token_id", 256)
    monkeypatch.setattr(model.generation_config, "eos_token_id", common_tokens(model, tokenizer))
    expected = generate_with_transformers(model, tokenizer, TEXTS, max_new_tokens=30)
    decode = decoder(tokenizer, model.generation_config, max_new_tokens=30)
    assert decode(model, encode(tokenizer, TEXTS)) == expected
    assert (decode._cache is None) == (kind == "hybrid")


@given(st.lists(st.booleans(), min_size=1, max_size=12))
def test_compaction_keeps_the_active_rows(active):
    kept = _compact(active)
    assert sorted(kept) == [row for row, is_active in enumerate(active) if is_active]
    assert all(row == place or row >= len(kept) for place, row in enumerate(kept))


@pytest.mark.parametrize("batch_tokens", [1, 60, 150])
def test_smaller_batches_give_the_same_tokens(model, tokenizer, batch_tokens):
    decode = decoder(
        tokenizer, model.generation_config, max_new_tokens=12, batch_tokens=batch_tokens
    )
    assert decode(model, encode(tokenizer, TEXTS)) == generate_with_transformers(
        model, tokenizer, TEXTS, max_new_tokens=12
    )


def test_batches_keep_to_the_token_budget():
    decode = Decoder(byte_tokenizer(), 10, frozenset(), (), batch_tokens=60)
    prompts = [[0] * n for n in (3, 20, 9, 5, 100, 8)]
    batches = decode._batches(prompts)
    assert sorted(sum(batches, [])) == list(range(6))
    for batch in batches:
        assert len(batch) == 1 or len(batch) * (max(len(prompts[r]) for r in batch) + 10) <= 60


def test_stop_strings_end_a_response_and_stay_in_it(model, tokenizer):
    full = generate_with_transformers(model, tokenizer, TEXTS, max_new_tokens=40)
    stop = tokenizer.decode(full[0][8:11])
    decode = decoder(tokenizer, model.generation_config, max_new_tokens=40, stop=[stop])
    for tokens, whole in zip(decode(model, encode(tokenizer, TEXTS)), full, strict=True):
        assert tokens == whole[: len(tokens)]
        text = tokenizer.decode(tokens)
        assert stop in text or len(tokens) == len(whole)
        assert stop not in tokenizer.decode(tokens[:-1])


def test_polling_stops_the_decoding(model, tokenizer):
    steps = []

    def poll():
        steps.append(1)
        if len(steps) == 3:
            raise KeyboardInterrupt

    decode = decoder(tokenizer, model.generation_config, max_new_tokens=40)
    with pytest.raises(KeyboardInterrupt):
        decode(model, encode(tokenizer, TEXTS), poll=poll)
    assert len(steps) == 3


def test_chat_goes_through_the_template_and_text_does_not(tokenizer):
    chat, raw = encode(tokenizer, [[{"role": "user", "content": "hi"}], "hi"])
    assert tokenizer.decode(chat) == "<user>hi<a>"
    assert tokenizer.decode(raw) == "hi"


@pytest.mark.parametrize(
    "prompts, template, message",
    [
        ([], "x", "empty"),
        (["ok", ""], "x", "prompt 1 is empty"),
        ([[{"role": "user", "content": "hi"}]], None, "no chat template"),
        ([3], "x", "prompt 0"),
    ],
)
def test_invalid_prompts(prompts, template, message):
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    with pytest.raises(ConfigError, match=message):
        encode(tokenizer, prompts)


def test_end_of_sequence_ids_come_from_the_generation_config():
    assert decoder(None, GenerationConfig(eos_token_id=[1, 5]), max_new_tokens=1).eos == {1, 5}
    assert decoder(None, GenerationConfig(eos_token_id=3), max_new_tokens=1).eos == {3}
    assert decoder(None, GenerationConfig(eos_token_id=None), max_new_tokens=1).eos == frozenset()


def test_samples_follow_the_models_distribution():
    logits = torch.tensor([1.0, 0.0, -1.0, 2.0])
    seeds = range(2**63, 2**63 + 20000)
    noise = torch.cat(
        [gumbel(list(seeds)[i : i + 5000], 3, 4, logits.device) for i in range(0, 20000, 5000)]
    )
    counts = torch.bincount((logits + noise).argmax(-1), minlength=4)
    expected = 20000 * logits.softmax(-1)
    # 16.3 is the 0.1 % point of chi-squared with 3 degrees of freedom.
    assert torch.sum((counts - expected) ** 2 / expected) < 16.3
    assert not torch.equal(gumbel([1], 0, 9, logits.device), gumbel([1], 1, 9, logits.device))


def test_a_sample_depends_on_its_seed_alone(model, tokenizer):
    decode = decoder(tokenizer, model.generation_config, max_new_tokens=12)
    prompts = encode(tokenizer, TEXTS)
    together = decode(model, prompts, seeds=[1, 2, 3, 4, 5])
    assert decode(model, prompts[3:], seeds=[4, 5]) == together[3:]
    assert decode(model, prompts, seeds=[6, 7, 8, 9, 10]) != together
