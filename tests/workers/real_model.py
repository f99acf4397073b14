"""A real model under one layout: real_model.py SHARD TENSOR MODEL_DIRECTORY"""

import sys
import threading
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from shardes import environment

environment.prepare()

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from transformers import AutoTokenizer, GenerationConfig  # noqa: E402

from launch import report  # noqa: E402
from shardes.config import ShardingConfig  # noqa: E402
from shardes.engines import empty_model  # noqa: E402
from shardes.engines.deepspeed import DeepSpeedEngine  # noqa: E402
from shardes.generation import decoder, encode  # noqa: E402
from shardes.tasks.conciseness import Conciseness  # noqa: E402
from shardes.weights import WeightFiles, load  # noqa: E402
from shardes.world import form_replica, join_job  # noqa: E402


class Peak:
    """The largest resident set of this process while the context lasts, in bytes."""

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
    dist.barrier()  # the first collective starts threads and buffers that are not the model's
    with Peak() as peak:
        engine = DeepSpeedEngine(module, world, ShardingConfig(shard=shard, tensor=tensor))
        load(files, engine.shards)
    params = engine._params.values()
    tokenizer = AutoTokenizer.from_pretrained(directory)
    decode = decoder(tokenizer, GenerationConfig.from_pretrained(directory), max_new_tokens=16)
    prompts = encode(tokenizer, Conciseness().prompts("test"))
    with engine.ready() as module:
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
