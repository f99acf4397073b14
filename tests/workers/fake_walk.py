"""Walks an engine's life on a GPU that is not there: MODEL_DIRECTORY DTYPE."""

import os
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from fake_device import CUDA, fake_cuda
from torch.distributed.device_mesh import init_device_mesh
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import AutoTokenizer, GenerationConfig

from shardes.clock import Clock
from shardes.config.schema import Restore, ShardingConfig
from shardes.distributed.world import World
from shardes.engines import empty_model
from shardes.engines.fsdp import FSDPEngine
from shardes.es.center import open_center
from shardes.es.population import Member
from shardes.es.side_by_side import SideBySide
from shardes.es.update import Update
from shardes.inference.engine_generation import ModuleGeneration
from shardes.inference.generation import decoder
from shardes.inference.sampler import Sampler
from shardes.noise import LowRank, reference
from shardes.sharding.regions import Region
from shardes.sharding.weight_files import WeightFiles

PROMPTS = [[40, 41, 42], [50], [60, 61], [70, 71, 72, 73]]
RESPONSES = [[30], [31, 32], [33], [34, 35, 36]]
PROCESSORS = dict(repetition_penalty=1.3, no_repeat_ngram_size=3, suppress_tokens=[5])
HOST = torch.device("cpu")
RANK = 2
UPDATES = [dict(), dict(weight_decay=0.1), dict(weight_decay=0.1, decay_to="base")]


def main(argv: list[str]) -> None:
    directory = Path(argv[0])
    os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
    dist.init_process_group("fake", rank=0, world_size=1, store=FakeStore())
    mesh = init_device_mesh("cpu", (1, 1), mesh_dim_names=("shard", "tensor"))
    world = World(SimpleNamespace(rank=0, size=1), 0, 1, mesh, CUDA)
    dtype = getattr(torch, argv[1])
    files, module = WeightFiles(directory), empty_model(directory, dtype)
    files.map_names(module)
    with fake_cuda(pytest.MonkeyPatch()):
        engine = FSDPEngine(module, world, ShardingConfig())
        shards = engine.shards
        assert {shard.tensor.device for shard in shards} == {CUDA}
        for device in (HOST, CUDA):
            for rank in (0, RANK):
                center = open_center(Restore.copy, shards, world, files, rank=rank, device=device)
                walk_center(center, rank, device)
        walk_center(open_center(Restore.subtract, shards, world, files), 0, CUDA)
        walk_generation(engine, module, world, directory)
        walk_reference()
    print("walked")


def walk_reference() -> None:
    """The noise on accelerators without Triton."""
    x, region = torch.zeros(12, device=CUDA), Region.contiguous(3, 12)
    reference.add_noise(x, "w", [region], [1], [0.1], x)
    reference.add_low_rank_noise(x, "w", [region], [1], [0.1], x, LowRank((6, 4), RANK))


def walk_center(center, rank: int, device: torch.device) -> None:
    for shard in center._shards:
        assert center.values(shard).device == device
    with center.perturbed(Member(7, 0.05)):
        pass
    center.load_into_model()
    for more in UPDATES:
        center.update(Update([1, 2], [0.1, -0.2], rank=rank, **more))
    center.digest()
    center.tensor_digests()
    assert all(shard.tensor.device == CUDA for shard in center._shards)


def walk_generation(engine, module, world: World, directory: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(directory)
    for eos, keys in (([1], {}), ([255], {}), ([1], PROCESSORS)):
        generation = GenerationConfig(eos_token_id=eos, **keys)
        decode = decoder(tokenizer, generation, max_new_tokens=3)
        sampler = Sampler(world, ModuleGeneration(world, engine, decode), tokenizer)
        assert len(sampler.generate(PROMPTS)) == len(PROMPTS)
    sampler.log_probs(PROMPTS, RESPONSES)
    side_by_side = SideBySide(module, engine.shards, engine.device, RANK)
    group = [Member(7, 0.05), Member(8, 0.05), Member(7, -0.05)]
    with side_by_side.members(group, Clock()):
        members = [member for member in range(len(group)) for _ in PROMPTS]
        prompts = PROMPTS * len(group)
        sampler.generate(prompts, members=members, set_members=side_by_side.set_rows)


if __name__ == "__main__":
    main(sys.argv[1:])
