"""Runs and evaluations on engine=vllm and fsdp in one process, one of which fails: SETTINGS (JSON)
DIRECTORY.
"""

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
    run = shardes.load_run(directory / "0")
    asked = dict(model=run.center, samples=1)  # of which the divergence from the base is computed
    reports = [
        shardes.evaluate(settings, {"engine": engine, "run.dir": str(run.directory)}, **asked)
        for engine in ("vllm", "fsdp")
    ]
    gc.collect()
    from shardes.engines.vllm import VLLMEngine

    engines = sum(type(thing) is VLLMEngine for thing in gc.get_objects())
    left = [engines, dist.is_initialized()]
    sampled = ["kl" in report["splits"]["test"]["sampled"] for report in reports]
    print(json.dumps({"digests": digests, "left": left, "sampled": sampled}))


if __name__ == "__main__":
    main(json.loads(sys.argv[1]), Path(sys.argv[2]))
