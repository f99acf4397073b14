"""Checks the shards of large models: real_sizes.py ENGINE TENSOR CONFIG_DIRECTORY ...

One process simulates all ranks. With torch's fake process group the engine shards a model without
storage, and the regions of every rank follow. Reports the parameters of each model whose regions
do not cover every element exactly once, and how evenly the ranks are filled.
"""

import sys
from contextlib import suppress
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import numpy as np
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import DistributedConfig

from launch import report
from shardes.engines import deepspeed, empty_model, fsdp
from shardes.sharding.regions import Region

RANKS = 64


class Cut(Exception):
    """AutoTP is done, and no parameter has storage yet."""


def by_deepspeed(directory: Path, tensor: int, shards: int):
    """Yield each distinct parameter's name, shape, and (regions, counted) of every rank."""

    def stop(engine):
        raise Cut

    deepspeed._EmptyModelEngine._broadcast_model = stop
    module = empty_model(directory, torch.bfloat16)
    shapes = {name: tuple(param.shape) for name, param in module.named_parameters()}
    deepspeed.set_autotp_mode(training=True)
    settings = deepspeed._deepspeed_config(
        module, tensor, deepspeed.Offload.none, torch.device("cpu")
    )
    with suppress(Cut):
        deepspeed._EmptyModelEngine(
            args=None,
            model=module,
            config_class=deepspeed.DeepSpeedConfig(settings),
            dont_change_device=True,
        )
    for name, param in module.named_parameters():
        param.ds_shape = param.shape
        slices = [
            deepspeed.slice_regions(name, shapes[name], param, rank) for rank in range(tensor)
        ]
        yield (
            name,
            shapes[name],
            [
                (deepspeed.zero_partition(regions, shards, rank), counted)
                for regions, counted in slices
                for rank in range(shards)
            ],
        )


def by_fsdp(directory: Path, tensor: int, shards: int):
    """The same for FSDP2 × transformers' tensor parallel."""
    module = empty_model(directory, torch.bfloat16)
    shapes = {name: tuple(param.shape) for name, param in module.named_parameters()}
    fsdp.distribute(module, DistributedConfig(tp_size=tensor, fsdp_size=shards))
    for name, param in module.named_parameters():
        by_tensor, by_shard = fsdp.placements(param)
        yield (
            name,
            shapes[name],
            [
                fsdp.regions_of(shapes[name], by_tensor, by_shard, (tensor, t), (shards, s))
                for t in range(tensor)
                for s in range(shards)
            ],
        )


def holes(numel: int, regions: list[Region]) -> bool:
    """Whether the regions fail to cover the elements 0 to numel - 1 exactly once each."""
    starts = np.concatenate(
        [region.start + region.stride * np.arange(region.rows) for region in regions]
    )
    counts = np.concatenate([np.full(region.rows, region.cols) for region in regions])
    order = np.argsort(starts)
    ends = starts[order] + counts[order]
    return bool(
        starts[order[0]] != 0 or ends[-1] != numel or np.any(ends[:-1] != starts[order][1:])
    )


def main() -> None:
    cut, tensor = {"deepspeed": by_deepspeed, "fsdp": by_fsdp}[sys.argv[1]], int(sys.argv[2])
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=RANKS)
    if sys.argv[1] == "deepspeed":
        deepspeed.deepspeed.init_distributed(dist_init_required=False)
    shards = RANKS // tensor
    result = {"rank": 0}
    for directory in map(Path, sys.argv[3:]):
        held, replicated, total, wrong, seen = np.zeros(RANKS), 0, 0, [], {}
        for name, shape, parts in cut(directory, tensor, shards):
            numel = int(np.prod(shape))
            counts = np.array([sum(region.numel for region in regions) for regions, _ in parts])
            held, total = held + counts, total + numel
            if not all(counted for _, counted in parts):
                replicated += numel * (1 - 1 / tensor)
            pattern = str(parts)
            if pattern not in seen:  # a model's layers have the same pattern
                seen[pattern] = holes(
                    numel, [region for regions, counted in parts if counted for region in regions]
                )
            if seen[pattern]:
                wrong.append(name)
        # An even share, and this rank's share of the parameters that tensor parallel replicates.
        share = total / RANKS + replicated / shards
        result[directory.name] = {
            "wrong": wrong,
            "total": total,
            "excess": float(held.max() / share - 1),
        }
    report(result)


if __name__ == "__main__":
    main()
