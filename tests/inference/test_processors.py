"""Greedy decoding with the logits processors of a checkpoint gives the tokens of `generate`."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from shardes.config.schema import LogitsProcessors
from shardes.errors import ConfigError
from shardes.inference import processors
from shardes.inference.generation import decoder
from shardes.inference.processors import active_keys, checkpoint_generation_config

PROMPTS = [
    [97],
    list(b"a longer prompt, of many letters"),
    list(b"b" * 17),
    list(b"xyzxyzxyz"),
    [63, 63],
]
NEW = 10
HONOURED = [
    dict(repetition_penalty=1.3),
    dict(repetition_penalty=0.7, suppress_tokens=[3, 200]),
    dict(no_repeat_ngram_size=2),
    dict(suppress_tokens=list(range(100))),
    dict(begin_suppress_tokens=list(range(0, 263, 2))),
    dict(forced_bos_token_id=7),
    dict(forced_eos_token_id=256),
    dict(min_length=6),
    dict(min_new_tokens=6),
    dict(exponential_decay_length_penalty=(3, 1.8)),
    dict(renormalize_logits=True, repetition_penalty=1.1),
    dict(prompt_lookup_num_tokens=3),  # speculative: the same tokens
    dict(do_sample=True, temperature=0.7, top_k=20, top_p=0.8, repetition_penalty=1.05),  # Qwen2.5
]

NEUTRAL = {
    "max_length", "max_new_tokens", "early_stopping", "do_sample", "use_mtp", "use_cache",
    "cache_implementation", "cache_config", "max_cache_len", "temperature", "top_k", "top_p",
    "min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff", "length_penalty",
    "renormalize_logits", "remove_invalid_values", "output_attentions", "output_hidden_states",
    "output_scores", "output_logits", "return_dict_in_generate", "pad_token_id", "bos_token_id",
    "eos_token_id", "decoder_start_token_id", "is_assistant", "num_assistant_tokens",
    "num_assistant_tokens_schedule", "assistant_confidence_threshold", "prompt_lookup_num_tokens",
    "max_matching_ngram_size", "assistant_early_exit", "assistant_lookbehind", "target_lookbehind",
    "assistant_ensemble_weight", "speculation_type", "compile_config", "disable_compile",
    "continuous_batching_config", "low_memory", "diversity_penalty", "num_beam_groups",
    "prefill_chunk_size", "transformers_version",
}  # fmt: skip


@pytest.fixture(scope="module")
def model(biased_qwen):
    return AutoModelForCausalLM.from_pretrained(biased_qwen, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def tokenizer(biased_qwen):
    return AutoTokenizer.from_pretrained(biased_qwen)


def alone(model, prompt: list[int], generation: GenerationConfig) -> list[int]:
    """The tokens of transformers' `generate` for one prompt."""
    ids = torch.tensor([prompt])
    mask = torch.ones_like(ids)
    out = model.generate(
        ids, attention_mask=mask, generation_config=generation, do_sample=False, max_new_tokens=NEW
    )
    return out[0, len(prompt) :].tolist()


def plain(model, **keys) -> GenerationConfig:
    """A generation config in which two common tokens end a response."""
    return GenerationConfig(eos_token_id=[256, 50, 120], pad_token_id=257, **keys)


@pytest.mark.parametrize("keys", HONOURED, ids=lambda keys: " ".join(keys))
def test_a_processor_gives_each_row_the_tokens_of_generate_alone(model, tokenizer, keys):
    generation = plain(model, **keys)
    decode = decoder(tokenizer, generation, max_new_tokens=NEW)
    assert decode(model, PROMPTS) == [alone(model, prompt, generation) for prompt in PROMPTS]


@pytest.mark.parametrize("key", ["bad_words_ids", "sequence_bias"])
def test_words_that_the_model_would_say_are_banned_or_favoured(model, tokenizer, key):
    free = alone(model, PROMPTS[1], plain(model))
    pair = free[1:3]
    value = [free[:1], pair] if key == "bad_words_ids" else [[pair, -20.0], [[free[0]], -3.0]]
    generation = plain(model, **{key: value})
    decode = decoder(tokenizer, generation, max_new_tokens=NEW)
    expected = [alone(model, prompt, generation) for prompt in PROMPTS]
    assert decode(model, PROMPTS) == expected
    assert expected[1] != free


def test_processors_can_be_turned_off_and_do_not_touch_samples(model, tokenizer):
    bare = plain(model)
    penalized = plain(model, repetition_penalty=1.8, stop_strings=["a"])
    off = LogitsProcessors.none
    decode = decoder(tokenizer, penalized, max_new_tokens=NEW, logits_processors=off)
    assert decode(model, PROMPTS) == [alone(model, prompt, bare) for prompt in PROMPTS]
    assert decode(model, PROMPTS) != decoder(tokenizer, penalized, max_new_tokens=NEW)(
        model, PROMPTS
    )
    penalized.stop_strings = None
    samples = [
        decoder(tokenizer, generation, max_new_tokens=NEW)(model, PROMPTS, seeds=[1, 2, 3, 4, 5])
        for generation in (bare, penalized)
    ]
    assert samples[0] == samples[1]


def test_stop_strings_of_the_checkpoint_end_a_response(model, tokenizer):
    stop = tokenizer.decode([100, 101][:1])
    generation = plain(model, stop_strings=stop)
    assert decoder(tokenizer, generation, max_new_tokens=NEW).stop == (stop,)
    assert active_keys(generation) == f"stop_strings={stop!r}"


@pytest.mark.parametrize(
    "keys, message",
    [
        (dict(num_beams=4), "num_beams=4, which greedy decoding does not support"),
        (dict(guidance_scale=1.5), "guidance_scale=1.5"),
        (dict(encoder_repetition_penalty=1.5), "encoder_repetition_penalty=1.5"),
        (dict(encoder_no_repeat_ngram_size=3), "encoder_no_repeat_ngram_size=3"),
        (dict(penalty_alpha=0.6, top_k=4), "penalty_alpha=0.6"),
        (dict(token_healing=True), "token_healing=True"),
        (dict(max_time=3.0), "max_time=3.0"),
        (dict(bad_words_ids=[[900]]), "bad_words_ids.*900"),
        (dict(bad_words_ids=[]), "bad_words_ids"),
        (dict(no_repeat_ngram_size="x"), "no_repeat_ngram_size='x'"),
        (dict(repetition_penalty=-1.0), "repetition_penalty=-1.0"),
    ],
)
def test_a_key_that_cannot_be_honoured_is_named(model, tmp_path, keys, message):
    GenerationConfig(eos_token_id=256).save_pretrained(tmp_path)
    file = tmp_path / "generation_config.json"
    values = GenerationConfig(eos_token_id=256).to_dict() | keys
    file.write_text(json.dumps(values))
    with pytest.raises(ConfigError, match=message) as caught:
        checkpoint_generation_config(tmp_path, model, NEW)
    assert "\n" not in str(caught.value)
    assert "generation.logits_processors=none" in str(caught.value)
    checkpoint_generation_config(tmp_path, model, NEW, LogitsProcessors.none)


def test_a_generation_config_that_cannot_be_read(model, tmp_path):
    (tmp_path / "generation_config.json").write_text("{")
    with pytest.raises(ConfigError, match=r"generation_config\.json"):
        checkpoint_generation_config(tmp_path, model, NEW)
    (tmp_path / "generation_config.json").unlink()
    assert not active_keys(checkpoint_generation_config(tmp_path, model, NEW))


def test_without_a_generation_config_the_models_config_is_read(model, tmp_path):
    model.config.save_pretrained(tmp_path)
    values = json.loads((tmp_path / "config.json").read_text()) | {"repetition_penalty": 1.3}
    (tmp_path / "config.json").write_text(json.dumps(values))
    generation = checkpoint_generation_config(tmp_path, model, NEW)
    assert active_keys(generation) == "repetition_penalty=1.3"


def test_every_key_of_a_generation_config_is_known():
    """A key that a new version adds must be honoured, refused, or listed here as one that does not
    change greedy tokens.
    """
    keys = {key for key in GenerationConfig().__dict__ if not key.startswith("_")}
    assert keys <= {*NEUTRAL, *processors._HONOURED, *processors._UNSUPPORTED}
