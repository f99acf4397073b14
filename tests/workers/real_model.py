"""A real model under one layout: real_model.py SHARD TENSOR MODEL_DIRECTORY"""

import sys
import threading
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
import torch.distributed as dist
from transformers import AutoTokenizer, GenerationConfig

from launch import report
from shardes.config.schema import ShardingConfig
from shardes.distributed.world import form_replica, join_job
from shardes.engines import empty_model
from shardes.engines.deepspeed import DeepSpeedEngine
from shardes.inference.generation import decoder
from shardes.inference.prompts import encode
from shardes.sharding.weight_files import WeightFiles, load
from shardes.tasks.conciseness import Conciseness


class Peak:
    """Measures the peak resident memory of this process within the context, in bytes."""

    def __enter__(self):
        self.start = self.bytes = resident()
        self.stopped = threading.Event()
        self.thread = threading.Thread(target=self.watch)
        self.thread.start()
        return self

    def watch(self):
        while not self.stopped.wait(0.002):
            self.bytes = max(self.bytes, resident())

    def __exit__(self, *_):
        self.stopped.set()
        self.thread.join()


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def main() -> None:
    shard, tensor, directory = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
    job = join_job(60)
    world = form_replica(job, 1, shard, tensor, 120)
    module = empty_model(directory, torch.float32)
    files = WeightFiles(directory)
    dist.barrier()  # the first collective allocates threads and buffers, which must not be counted
    with Peak() as peak:
        engine = DeepSpeedEngine(module, world, ShardingConfig(shard=shard, tensor=tensor))
        load(files, engine.shards)
    params = engine._params.values()
    tokenizer = AutoTokenizer.from_pretrained(directory)
    decode = decoder(tokenizer, GenerationConfig.from_pretrained(directory), max_new_tokens=16)
    prompts = encode(tokenizer, Conciseness().prompts("test"))
    with engine.gathered() as module:
        tokens = decode(module, prompts, vocabulary=engine.vocabulary)
    result = {
        "rank": job.rank,
        "tokens": tokens,
        "peak": peak.bytes - peak.start,
        "slice": sum(param.ds_numel for param in params) * 4,
        "shard": sum(part.tensor.numel() for part in engine.shards) * 4,
        "largest": max(param.ds_numel for param in params) * 4,
    }
    report(result)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
