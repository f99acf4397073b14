"""Where the plan has the float32 center: memory, time, and the run's own rule."""

import json
from types import SimpleNamespace

import pytest
import torch

from launch import ROOT, call
from shardes.commands.plan import main
from shardes.config.schema import (
    CenterConfig,
    CenterDevice,
    Config,
    EngineName,
    ESConfig,
    Gather,
    ModelConfig,
    Restore,
    ShardingConfig,
)
from shardes.es.staging import center_device
from shardes.planning.memory import center_on_device
from shardes.planning.shapes import read_shapes, slice_elements
from shardes.sharding.regions import ParameterShard, Region

DATA = ROOT / "tests" / "data"
PARAMETERS = 8_030_261_248  # of Llama 3.1 8B
CUDA = torch.device("cuda", 0)
MACHINE = ["--gpus", 1, "--gpu", "H100"]


def report(*arguments):
    done = call(main, *arguments, "--json")
    assert done.returncode in (0, 1), done.stderr
    return json.loads(done.stdout)


def test_memory_and_time_are_those_of_the_place(config):
    file = config(DATA / "llama-3.1-8b")
    host, device, auto = (
        report(file, f"center.device={name}", *MACHINE)["configured"]
        for name in ("host", "device", "auto")
    )
    assert [plan["center_device"] for plan in (host, device, auto)] == ["host", "device", "device"]
    assert device["gpu"].pop("center") == host["host"].pop("center") == 4 * PARAMETERS
    assert device["gpu"] == host["gpu"] and device["host"] == host["host"]
    # Each of 30 members crosses the link at 64 GB/s, or is read and written at 3,350 GB/s.
    noise = PARAMETERS / 3.1e11
    assert host["seconds"]["perturb"] == pytest.approx(30 * 4 * PARAMETERS / 64e9)
    here = 6 * PARAMETERS / 3350e9 + noise
    assert device["seconds"]["perturb"] == pytest.approx(30 * here)
    # With the digest of the new center
    update = 30 * noise + 4 * PARAMETERS / 64e9 + PARAMETERS / 5e9
    assert host["seconds"]["update"] == pytest.approx(update)
    update = 30 * noise + 10 * PARAMETERS / 3350e9 + PARAMETERS / 1e10
    assert device["seconds"]["update"] == pytest.approx(update)
    for part in ("gather", "prefill", "decode"):
        assert device["seconds"][part] == host["seconds"][part]


def test_a_center_on_the_gpu_counts_beside_the_cache_of_vllm(config):
    file, keys = config(DATA / "llama-3.1-8b"), ["engine=vllm", "vllm.cache_size=20"]
    host, device, auto, beside = (
        report(file, *keys, f"center.device={place}", *more, *MACHINE)["configured"]
        for place, *more in (
            ["host"], ["device"], ["auto"], ["auto", "vllm.cache_size=45"],
        )
    )  # fmt: skip
    assert device["gpu"].pop("center") == host["host"].pop("center") == 4 * PARAMETERS
    assert device["gpu"] == host["gpu"] and device["host"] == host["host"]
    assert auto["fits"] and auto["center_device"] == "device"
    assert beside["fits"] and beside["center_device"] == "host"


def test_the_search_settles_the_place_and_prints_it(config):
    """A center on the GPU serves where memory is left or the host's is short; else, a larger
    batch.
    """
    file = config(DATA / "llama-3.1-8b")
    many = report(file, *MACHINE)["suggested"]
    assert many["center_device"] == "host" and "center.device=host" in many["settings"]
    few = ["--prompts", 20, "--prompt-tokens", 100]
    best = report(file, "generation.batch_tokens=30000", "center.device=host", *few, *MACHINE)
    assert best["suggested"]["center_device"] == "device"
    assert "center.device=device" in best["suggested"]["settings"].split()
    assert "center on the GPU" in best["suggested"]["plan"]
    assert best["suggested"]["seconds"]["total"] < best["configured"]["seconds"]["total"]
    short = report(file, *MACHINE, "--host-memory", "20GB")
    assert [plan["center_device"] for plan in short["best"]] == ["device"]
    for keys in (["es.restore=subtract"], ["sharding.offload=cpu"]):
        plan = report(file, *keys, *MACHINE)["configured"]
        assert plan["center_device"] is None and "center.device" not in plan["settings"]


class Rank:
    """A replica of one rank, on a GPU that this machine does not have."""

    device, ranks_on_device = CUDA, 1

    def sum(self, *values):
        return list(values)


@pytest.mark.parametrize("engine", [EngineName.deepspeed, EngineName.fsdp])
@pytest.mark.parametrize("sharding", [{}, {"shard": 2}, {"shard": 2, "gather": Gather.layer}])
def test_auto_is_decided_as_a_run_decides(engine, sharding, monkeypatch):
    config = Config(
        engine, ModelConfig(str(DATA / "qwen2.5-7b")), sharding=ShardingConfig(**sharding)
    )
    model, module = read_shapes(config)
    tensor, shard = config.sharding.tensor, config.sharding.shard
    held, slices = model.held(tensor, shard, 0, 0), slice_elements(model, tensor)
    shards = []
    for parameter, numel, of_slice in zip(model.parameters, held, slices, strict=True):
        live = torch.empty(numel, dtype=torch.bfloat16, device="meta")
        regions = [(Region.contiguous(0, size),) for size in (numel, of_slice)]
        shards.append(ParameterShard(parameter.name, parameter.shape, live, *regions))
    gathered = engine is EngineName.deepspeed and shard > 1 and config.sharding.gather
    allocated = 2 * (sum(held) + (sum(slices) if gathered is Gather.member else 0))

    def in_a_run(capacity):
        free = capacity - allocated
        fake = SimpleNamespace(empty_cache=lambda: None, mem_get_info=lambda _: (free, capacity))
        monkeypatch.setattr(torch, "get_device_module", lambda _: fake)
        return center_device(config, Rank(), shards, module.config) == CUDA

    low, high = 10**9, 10**12
    while high - low > 100:
        middle = (low + high) // 2
        low, high = (low, middle) if in_a_run(middle) else (middle, high)
    assert 20e9 < high < 100e9
    assert not center_on_device(config, model, module.config, low - 100)
    assert center_on_device(config, model, module.config, high + 100)


def test_settings_without_a_choice():
    config = Config(model=ModelConfig(str(DATA / "qwen2.5-7b")))
    model, module = read_shapes(config)

    def place(gpu_memory=1e13, **sections):
        changed = Config(model=config.model, **sections)
        return center_on_device(changed, model, module.config, gpu_memory)

    assert place() and not place(gpu_memory=None)
    assert not place(es=ESConfig(restore=Restore.subtract))
    on_device = CenterConfig(CenterDevice.device)
    assert place(1.0, center=on_device) and not place(center=CenterConfig(CenterDevice.host))
