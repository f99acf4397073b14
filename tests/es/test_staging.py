"""Where the center lies, told of a device that this machine does not have."""

from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
from transformers import LlamaConfig

from shardes.config.schema import (
    CenterConfig,
    CenterDevice,
    Config,
    EngineName,
    GenerationConfig,
    ModelConfig,
    Offload,
    ShardingConfig,
)
from shardes.es.staging import MARGIN, center_device
from shardes.inference.memory import LOGITS, generation_bytes
from shardes.sharding.regions import ParameterShard, Region

CUDA, HOST = torch.device("cuda", 3), torch.device("cpu")
MODEL = LlamaConfig(
    vocab_size=100,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=3,
    num_attention_heads=8,
    num_key_value_heads=2,
)
CACHED = 2 * 3 * 2 * 8 * 2  # bytes per token: keys and values, layers, heads, head size, bfloat16
SLICES = [6000 * 2]  # bytes
STATES = (4 * 64 + 3 * 128 + 5 * 8 * 8) * 2


@dataclass
class Rank:
    """A rank of a replica of `others` more, as a decision about the center sees it."""

    others: tuple[float, ...] = ()  # what they report: 1 if a center fits there
    device: torch.device = CUDA
    ranks_on_device: int = 1

    def sum(self, fits: float, one: float) -> list[float]:
        return [fits + sum(self.others), one + len(self.others)]


def configured(device: CenterDevice, **sharding) -> Config:
    return Config(
        model=ModelConfig(path="m"),
        center=CenterConfig(device=device),
        sharding=ShardingConfig(**sharding),
        generation=GenerationConfig(batch_tokens=1000),
    )


def shards() -> list[ParameterShard]:
    whole = (Region.contiguous(0, 6000),)
    part = (Region.contiguous(0, 3000),)
    return [ParameterShard("w", (60, 100), torch.zeros(3000, dtype=torch.bfloat16), part, whole)]


def place(monkeypatch, rank: Rank, free: int, device=CenterDevice.auto, **sharding) -> torch.device:
    module = SimpleNamespace(empty_cache=lambda: None, mem_get_info=lambda _: (free, 0))
    monkeypatch.setattr(torch, "get_device_module", lambda _: module)
    return center_device(configured(device, **sharding), rank, shards(), MODEL)


NEEDED = 4 * 3000 + 1000 * (CACHED + STATES) + LOGITS


def test_it_stays_on_the_device_where_generation_leaves_room(monkeypatch):
    assert place(monkeypatch, Rank(), NEEDED) == CUDA
    assert place(monkeypatch, Rank(), NEEDED - 1) == HOST
    assert place(monkeypatch, Rank((1.0, 1.0)), NEEDED) == CUDA
    assert place(monkeypatch, Rank((1.0, 0.0)), NEEDED) == HOST  # as on the others
    assert place(monkeypatch, Rank(ranks_on_device=2), 2 * NEEDED - 1) == HOST
    assert place(monkeypatch, Rank(ranks_on_device=2), 2 * NEEDED) == CUDA
    module = SimpleNamespace(empty_cache=lambda: None, mem_get_info=lambda _: (NEEDED, 100))
    monkeypatch.setattr(torch, "get_device_module", lambda _: module)
    config = configured(CenterDevice.auto)
    assert MARGIN > 0 and center_device(config, Rank(), shards(), MODEL) == HOST


@pytest.mark.parametrize(
    "device, sharding, rank, expected",
    [
        (CenterDevice.host, {}, Rank(), HOST),
        (CenterDevice.device, {}, Rank(), CUDA),
        (CenterDevice.auto, {"offload": Offload.cpu}, Rank(), HOST),
        (CenterDevice.device, {}, Rank(device=HOST), HOST),
        (CenterDevice.auto, {}, Rank(device=HOST), HOST),
    ],
)
def test_it_lies_where_the_settings_say(monkeypatch, device, sharding, rank, expected):
    free = 0 if device is CenterDevice.device else 2**60
    assert place(monkeypatch, rank, free, device, **sharding) == expected


def test_gathered_weights_count_unless_they_are_allocated_already():
    alone = generation_bytes(configured(CenterDevice.auto), MODEL, 2, SLICES)
    for engine, gathered in ((EngineName.fsdp, 6000 * 2), (EngineName.deepspeed, 0)):
        config = configured(CenterDevice.auto, shard=2)
        config.engine = engine
        assert generation_bytes(config, MODEL, 2, SLICES) == alone + gathered


def test_sizes_that_a_config_does_not_have_are_no_error():
    from transformers import MambaConfig

    config = configured(CenterDevice.auto)
    assert generation_bytes(config, MambaConfig(), 2, SLICES) > LOGITS
