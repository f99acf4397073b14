"""Decode steps of fixed shapes give the tokens of eager ones."""

from typing import ClassVar

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from architectures import few_or_all, fill, tiny_config
from models import byte_tokenizer
from shardes.config.schema import (
    Config,
    Decode,
    EngineName,
    Gather,
    ModelConfig,
    Offload,
    ShardingConfig,
)
from shardes.config.schema import (
    GenerationConfig as GenerationSettings,
)
from shardes.errors import ConfigError
from shardes.inference import buckets
from shardes.inference.decode_graph import DecodeGraphs, check_static_decoding
from shardes.inference.generation import Decoder, decoder

PROMPTS = [list(range(40, 40 + n)) for n in (3, 11, 5, 1, 7, 2, 2)]
NEW_TOKENS = 24
ENDS = [*range(24), 256]  # many end-of-sequence tokens, so that responses differ in length
FEW = ["llama", "gemma3_text", "qwen3_moe", "bloom"]  # windows, experts, ALiBi
REFUSED = {
    "bamba", "ctrl", "doge", "falcon_h1", "falcon_mamba", "gpt_neo", "granitemoehybrid", "jamba",
    "jetmoe", "lfm2", "mamba", "mamba2", "mpt", "nemotron_h", "olmo_hybrid", "qwen3_next",
}  # fmt: skip


@pytest.fixture(autouse=True)
def short_unit(monkeypatch):
    """Tiny responses pass several lengths."""
    monkeypatch.setattr(buckets, "LENGTH_UNIT", 8)


@pytest.fixture(scope="module")
def model(tied_llama):
    return AutoModelForCausalLM.from_pretrained(tied_llama, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def tokenizer(tied_llama):
    return AutoTokenizer.from_pretrained(tied_llama)


def pair(tokenizer, generation=None, **options) -> list[Decoder]:
    """An eager decoder and one of fixed shapes."""
    generation = generation or GenerationConfig(eos_token_id=ENDS)
    return [
        decoder(tokenizer, generation, max_new_tokens=NEW_TOKENS, decode=decode, **options)
        for decode in Decode
    ]


def config(path="m", **sharding) -> Config:
    return Config(
        engine=sharding.pop("engine", EngineName.deepspeed),
        model=ModelConfig(path=str(path)),
        sharding=ShardingConfig(**sharding),
        generation=GenerationSettings(decode=Decode.graph),
    )


@pytest.mark.architectures
@few_or_all(FEW)
def test_the_same_tokens_in_many_architectures_or_a_refusal(names):
    wrong = []
    for name in names:
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(tiny_config(name)).eval()
        fill(model)
        try:
            check_static_decoding(config(), model)
        except ConfigError as error:
            assert name in REFUSED and "use generation.decode=eager" in str(error), name
            continue
        whole = pair(byte_tokenizer(), GenerationConfig())[0](model, PROMPTS)
        ends = GenerationConfig(eos_token_id=[whole[0][5], whole[3][20]])
        eager, static = pair(byte_tokenizer(), ends)
        expected = eager(model, PROMPTS)
        assert len(set(map(len, expected))) > 1, name
        if static(model, PROMPTS) != expected or name in REFUSED:
            wrong.append(name)
    assert wrong == []


class HostReads(TorchDispatchMode):
    """Finds operations that a GPU cannot do while it captures: the host reads or makes a value."""

    found: ClassVar[set[str]] = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        if name in {"_local_scalar_dense", "equal", "lift_fresh", "masked_select", "nonzero"}:
            self.found.add(name)
        return function(*args, **kwargs or {})


@pytest.mark.parametrize("name", ["llama", "qwen2", "gemma3_text", "mistral", "gpt2"])
def test_the_host_reads_no_value_in_a_step(name, monkeypatch):
    def forward(graphs):
        steps.append(1)
        with HostReads():
            return whole(graphs)

    steps, whole = [], DecodeGraphs._forward
    monkeypatch.setattr(DecodeGraphs, "_forward", forward)
    monkeypatch.setattr(HostReads, "found", set())
    model = AutoModelForCausalLM.from_config(tiny_config(name)).eval()
    pair(byte_tokenizer())[1](model, PROMPTS)
    assert steps and not HostReads.found


@pytest.mark.parametrize("seeds", [None, [1, 2, 3, 4, 5, 6, 7]], ids=["greedy", "sampled"])
@pytest.mark.parametrize("keys", [{}, dict(repetition_penalty=1.3)], ids=["plain", "penalty"])
@pytest.mark.parametrize("batch_tokens", [150, 65536])
def test_the_same_tokens_with_every_choice_of_a_token(model, tokenizer, keys, seeds, batch_tokens):
    generation = GenerationConfig(eos_token_id=ENDS, **keys)
    eager, static = pair(tokenizer, generation, batch_tokens=batch_tokens)
    assert static(model, PROMPTS, seeds=seeds) == eager(model, PROMPTS, seeds=seeds)


def test_stop_strings(model, tokenizer):
    whole = pair(tokenizer)[0](model, PROMPTS)
    stop = tokenizer.decode(max(whole, key=len)[4:6])
    eager, static = pair(tokenizer, stop=[stop])
    assert static(model, PROMPTS) == eager(model, PROMPTS) != whole


def test_batches_of_any_shape_use_the_same_memory(model, tokenizer):
    eager, static = pair(tokenizer)
    addresses = set()
    for prompts in (PROMPTS, PROMPTS[:1], PROMPTS[2:5], PROMPTS):
        assert static(model, prompts) == eager(model, prompts)
        addresses.add(tuple(buffer.data_ptr() for buffer in static._graphs.cache.buffers()))
    assert len(addresses) == 1


def test_rows_that_fill_a_shape_have_positions_of_the_model(tokenizer):
    """They must not keep the padding of a longer batch: GPT-2 has a table of positions."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(tiny_config("gpt2")).eval()
    fill(model)
    eager, static = pair(tokenizer)
    for prompts in ([*[[n] for n in range(7)], [40] * 200], [[50 + n] for n in range(5)]):
        assert static(model, prompts) == eager(model, prompts)


def test_weights_that_are_written_in_place_count(model, tokenizer):
    eager, static = pair(tokenizer)
    before = static(model, PROMPTS)
    with torch.no_grad():
        model.lm_head.weight += 0.1 * torch.randn_like(model.lm_head.weight)
    assert static(model, PROMPTS) == eager(model, PROMPTS) != before


def test_an_invalid_member_leaves_nothing_behind(tied_llama, tokenizer):
    model = AutoModelForCausalLM.from_pretrained(tied_llama, dtype=torch.float32).eval()
    eager, static = pair(tokenizer)
    expected = eager(model, PROMPTS)
    values = model.model.layers[0].self_attn.v_proj.weight.detach()
    right = values.clone()
    values.fill_(torch.nan)
    assert static(model, PROMPTS) == [[]] * len(PROMPTS)
    values.copy_(right)
    assert static(model, PROMPTS) == expected


@pytest.mark.parametrize(
    "settings, message",
    [
        (dict(shard=2, gather=Gather.layer), r"gather=layer, weights have no fixed addresses"),
        (dict(offload=Offload.cpu, gather=Gather.layer), r"gather=layer"),
        (dict(shard=2, engine=EngineName.fsdp), r"FSDP gathers .* engine=deepspeed"),
    ],
)
def test_layouts_without_fixed_addresses_are_refused(model, settings, message):
    with pytest.raises(ConfigError, match=message) as raised:
        check_static_decoding(config(**settings), model)
    assert "generation.decode=graph" in str(raised.value) and "\n" not in str(raised.value)
    check_static_decoding(config(shard=2, tensor=2), model)
    check_static_decoding(config(tensor=2, engine=EngineName.fsdp), model)


def test_attention_without_masks_is_refused(model, monkeypatch):
    monkeypatch.setattr(model.config, "_attn_implementation_internal", "flash_attention_2")
    with pytest.raises(ConfigError, match="flash_attention_2 takes no mask of fixed shape"):
        check_static_decoding(config(), model)
