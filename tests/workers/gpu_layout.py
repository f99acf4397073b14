"""What `layout.py` examines, one report per variant: gpu_layout.py ENGINE SHARD TENSOR MODEL

Started by torchrun. With one rank, a variant that fails leaves the others.
"""

import os
import sys
import traceback
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
sys.path.insert(0, str(Path(__file__).parent.parent.parent))

import torch.distributed as dist

from launch import report
from shardes.config.schema import Gather, Offload, ShardingConfig
from shardes.distributed import environment
from shardes.distributed.world import form_replica, join_job
from shardes.engines.deepspeed import DeepSpeedEngine
from shardes.engines.fsdp import FSDPEngine
from workers.layout import VARIANTS, examine


def main(argv: list[str]) -> int:
    kind = {"deepspeed": DeepSpeedEngine, "fsdp": FSDPEngine}[argv[0]]
    shard, tensor, directory = int(argv[1]), int(argv[2]), Path(argv[3])
    rank = int(os.environ["RANK"])
    result = {"rank": rank, "variants": {}}
    report(result)
    world = form_replica(join_job(60), 1, shard, tensor, 60)
    result["device"] = str(world.device)
    for dtype, gather, offload in VARIANTS:
        if shard == 1 and (
            gather is Gather.layer or (kind is FSDPEngine and offload is Offload.cpu)
        ):
            continue
        sharding = ShardingConfig(shard=shard, tensor=tensor, gather=gather, offload=offload)
        precision = str(dtype).removeprefix("torch.")
        name = f"{precision}, gather {gather.value}, offload {offload.value}"
        try:
            result["variants"][name] = examine(kind, directory, dtype, sharding, world)
        except Exception:
            result["variants"][name] = {"failed": traceback.format_exc()}
            if shard * tensor > 1:  # the other ranks may wait in a collective
                break
        finally:
            report(result)
    else:
        dist.barrier()
    return 0


if __name__ == "__main__":
    environment.run(main)
