"""Fine-tune a language model with evolution strategies.

    shardes train CONFIG.yaml --gpus 2 [key=value ...]
    deepspeed --num_gpus 2 launchers/train.py CONFIG.yaml [key=value ...]

The launcher's ranks form replicas × shard × tensor ranks; without a launcher there is one rank.
Started again with the same run.dir, it goes on where the run stopped. Exit codes: 0 done or stopped
by SIGINT or SIGTERM, 75 stopped by SIGUSR1 (start it again), 2 a mistake of the user, 1 any other
failure.
"""

from dataclasses import replace
from datetime import datetime
from pathlib import Path

import torch
import torch.distributed as dist

from shardes import launch, lifecycle, training
from shardes.commands.arguments import LaunchParser, reports_errors
from shardes.config import loading as settings
from shardes.config.schema import Config
from shardes.distributed import environment
from shardes.distributed.world import Job
from shardes.errors import ConfigError, one_line, unusable_files
from shardes.es.side_by_side import members_together
from shardes.planning.layouts import Layout
from shardes.planning.memory import center_on_device, rank_memory
from shardes.planning.shapes import read_shapes
from shardes.planning.workload import Workload
from shardes.roles import PreparedTraining
from shardes.storage.resume import describe_run_directory, recorded_date
from shardes.storage.sources import run_sources
from shardes.words import counted

EXAMPLES = """examples:
  shardes train configs/quickstart.yaml --gpus 2            two ranks on this host (or --nproc 2)
  shardes train configs/quickstart.yaml --gpus 2 sharding.tensor=2 es.seed=1
  shardes train configs/quickstart.yaml --gpus 8 --dry-run  check, print the settings, start nothing
  deepspeed --num_gpus 2 launchers/train.py configs/quickstart.yaml
  torchrun --nproc_per_node 2 launchers/train.py configs/quickstart.yaml
"""


def parser() -> LaunchParser:
    return LaunchParser("train", "[--gpus N] [--dry-run]", __doc__.splitlines()[0], EXAMPLES)


def prepare(argv: list[str], job: Job) -> PreparedTraining:
    """The settings of the command line, checked; of a rank of `--gpus`, metrics are reported."""
    return training.prepare(parser().read(argv)[1], job, on_metrics=report_metrics)


def report_metrics(metrics: dict[str, float]) -> None:
    environment.report(metrics=metrics)


@reports_errors
@unusable_files()
def dry_run(argv: list[str], ranks: int) -> int:
    """Make the checks of a start on `ranks` ranks and print the settings; write nothing."""
    _, config = parser().read(argv)
    prepared = launch.check(config, Job(0, ranks, dist.HashStore()))
    date = datetime.fromisoformat(recorded_date(config) or launch.now())
    prompts = training.encode_prompts(prepared, date)
    state = describe_run_directory(
        config, run_sources(config.task, prompts, update=config.es.update)
    )
    sharding = config.sharding
    shard, tensor = sharding.shard, sharding.tensor
    layout = Layout(prepared.replicas, shard, tensor, sharding.gather, sharding.offload)
    lengths = {split: tuple(map(len, rows)) for split, rows in prompts.items()}
    workload = Workload.of_run(config, lengths["train"], lengths["test"])
    together = members_together(config, workload.train, prepared.replicas)
    workload = replace(workload, members=together)
    counts = ", ".join(
        f"{len(rows)} {split}, up to {max(rows)} tokens" for split, rows in lengths.items()
    )
    print(f"# run.dir: {Path(config.run.dir).absolute()}, {state}")
    degrees = f"shard {shard} × tensor {tensor}"
    replicas = counted(prepared.replicas, "replica")
    print(f"# layout: {counted(ranks, 'rank')}, {replicas} × {degrees}")
    print(f"# prompts: {counts}")
    if applied := prepared.decoder.applied:
        print(f"# greedy decoding: {applied} (the checkpoint's generation config)")
    print(f"# memory of a rank: {_memory(config, layout, workload)}")
    print(settings.to_yaml(config), end="")
    return 0


def _memory(config: Config, layout: Layout, workload: Workload) -> str:
    """The estimated memory of a rank; of models that the planner does not know, why there is none.

    They may run nevertheless.
    """
    device = torch.cuda.get_device_properties(0).total_memory if torch.cuda.is_available() else None
    try:
        shapes, module = read_shapes(config)
        on_device = center_on_device(config, shapes, module.config, device)
        memory = rank_memory(
            shapes, layout, workload, config.es, device, center_on_device=on_device
        )
    except (ConfigError, TypeError, AttributeError, ArithmeticError) as error:
        return f"not estimated ({one_line(error)})"
    on_gpu = f"{sum(memory.gpu.values()) / 1e9:.3g} GB on its GPU, " if device else ""
    return f"about {on_gpu}{sum(memory.host.values()) / 1e9:.3g} GB on its host"


def main(argv: list[str]) -> int:
    return lifecycle.launch(argv, parser(), prepare, training.work)


if __name__ == "__main__":
    environment.run(main)
