"""Runs on engine=vllm and fsdp in one process, one of which fails: SETTINGS (JSON) DIRECTORY."""

import gc
import json
import sys
from pathlib import Path

import torch.distributed as dist

import shardes

RUNS = [  # engine, other settings
    ("vllm", {}),
    ("vllm", {"vllm.cache_size": 1e-6}),
    ("fsdp", {}),
    ("vllm", {"es.members_per_batch": 1}),
]


def main(settings: dict, directory: Path) -> None:
    digests = []
    for number, (engine, others) in enumerate(RUNS):
        overrides = {"engine": engine, "run.dir": str(directory / str(number)), **others}
        try:
            digests.append(shardes.train(settings, overrides).summary["digest"])
        except shardes.ConfigError as error:
            digests.append(str(error))
    gc.collect()
    from shardes.engines.vllm import VLLMEngine

    engines = sum(type(thing) is VLLMEngine for thing in gc.get_objects())
    print(json.dumps({"digests": digests, "left": [engines, dist.is_initialized()]}))


if __name__ == "__main__":
    main(json.loads(sys.argv[1]), Path(sys.argv[2]))
