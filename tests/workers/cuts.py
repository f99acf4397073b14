"""Counts each rank's elements of each parameter: cuts.py ENGINE TENSOR RANKS CONFIG_DIRECTORY ...

Reports, per model, the counts of each rank (tensor ranks within shard ranks), as the engine shards
the model.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
sys.path.insert(0, str(Path(__file__).parent))

import real_sizes as engine

from launch import report


def main() -> None:
    name, tensor, ranks = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    cut = {"deepspeed": engine.by_deepspeed, "fsdp": engine.by_fsdp}[name]
    engine.dist.init_process_group("fake", store=engine.FakeStore(), rank=0, world_size=ranks)
    if name == "deepspeed":
        engine.deepspeed.deepspeed.init_distributed(dist_init_required=False)
    result = {"rank": 0}
    for directory in map(Path, sys.argv[4:]):
        held = [
            [sum(region.numel for region in regions) for regions, _ in parts]
            for _, _, parts in cut(directory, tensor, ranks // tensor)
        ]
        result[directory.name] = [list(of_rank) for of_rank in zip(*held, strict=True)]
    report(result)


if __name__ == "__main__":
    main()
