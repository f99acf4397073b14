"""Fine-tune a language model with evolution strategies.

    shardes train CONFIG.yaml --gpus 2 [key=value ...]
    deepspeed --num_gpus 2 launchers/train.py CONFIG.yaml [key=value ...]

The launcher's ranks form replicas × shard × tensor ranks; without a launcher there is one rank.
Started again with the same run.dir, it goes on where the run stopped. Exit codes: 0 done or stopped
by SIGINT or SIGTERM, 75 stopped by SIGUSR1 (start it again), 2 a mistake of the user, 1 any other
failure.
"""

from contextlib import ExitStack
from pathlib import Path

from shardes.distributed import environment

with environment.quiet():
    import deepspeed  # noqa: F401

import torch
import torch.distributed as dist

from shardes import launch
from shardes.commands.arguments import LaunchParser, reports_errors
from shardes.config import loading as settings
from shardes.distributed.signals import ShutdownWatcher, Stopped
from shardes.distributed.world import Job
from shardes.errors import RunError
from shardes.inference.prompts import encode
from shardes.launch import PreparedRun
from shardes.planning.layouts import Layout
from shardes.planning.memory import rank_memory
from shardes.planning.shapes import read_shapes
from shardes.planning.workload import Workload
from shardes.replicas.joining import join_run
from shardes.reporting.attempts import record_failure
from shardes.roles import ClientJob, PreparedTraining, PrimaryJob
from shardes.storage.resume import describe_run_directory, open_run_directory

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
    _, config = parser().read(argv)
    prepared = launch.check(config, job)
    prompts = encode_prompts(prepared)
    open_run = open_run_directory if config.replicas.join is None else join_run
    run = open_run(config, prepared.files) if job.rank == 0 else None
    return PreparedTraining(**vars(prepared), prompts=prompts, run=run)


@reports_errors
def dry_run(argv: list[str], ranks: int) -> int:
    """Make the checks that a start on so many ranks makes, and print, as YAML, what it would run;
    write nothing.
    """
    _, config = parser().read(argv)
    prepared = launch.check(config, Job(0, ranks, dist.HashStore()))
    lengths = {split: list(map(len, found)) for split, found in encode_prompts(prepared).items()}
    state = describe_run_directory(config)
    s, generation = config.sharding, config.generation
    layout = Layout(prepared.replicas, s.shard, s.tensor, s.gather, s.offload)
    train, test = tuple(lengths["train"]), tuple(lengths["test"])
    asked = Workload(train, test, generation.max_new_tokens, generation.batch_tokens)
    device = torch.cuda.get_device_properties(0).total_memory if torch.cuda.is_available() else None
    need = rank_memory(read_shapes(config)[0], layout, asked, config.es.restore, device)
    on_device = f"{sum(need.gpu.values()) / 1e9:.3g} GB on its GPU, " if device else ""
    prompts = ", ".join(
        f"{len(found)} {split}, up to {max(found)} tokens" for split, found in lengths.items()
    )
    print(f"# run.dir: {Path(config.run.dir).absolute()}, {state}")
    degrees = f"shard {s.shard} × tensor {s.tensor}"
    print(f"# layout: {ranks} ranks, {prepared.replicas} replicas × {degrees}")
    print(f"# prompts: {prompts}")
    print(
        f"# memory of a rank: about {on_device}{sum(need.host.values()) / 1e9:.3g} GB on its host"
    )
    print(settings.to_yaml(config), end="")
    return 0


def encode_prompts(prepared: PreparedRun) -> dict[str, list[list[int]]]:
    """The token ids of both splits' prompts."""
    task, tokenizer = prepared.task, prepared.tokenizer
    return {split: encode(tokenizer, task.prompts(split)) for split in ("train", "test")}


def work(job: Job, prepared: PreparedTraining, watcher: ShutdownWatcher) -> None:
    """Put this rank's trainer together, and train."""
    config = prepared.config
    is_client = config.replicas.join is not None
    with ExitStack() as stack:
        trainer = (ClientJob if is_client else PrimaryJob)(job, prepared, watcher, stack).trainer()
        try:
            watcher.expect_polls()
            trainer.train()
        except Stopped as stopped:
            trainer.reporter.say(str(stopped))
            raise
        except Exception as error:
            if is_client and isinstance(error, dist.DistError):
                join = f"replicas.join={config.replicas.join}"
                raise RunError(f"{join}: the primary job is gone ({error})") from error
            if not is_client:  # the run directory belongs to the primary job
                record_failure(Path(config.run.dir), job.rank, error)
            raise
        if is_client:
            trainer.reporter.say(
                f"done: this replica evaluated {trainer.members_evaluated} members; "
                f"center {trainer.digest}"
            )
        dist.barrier()


def main(argv: list[str]) -> int:
    return launch.launch(argv, parser(), prepare, work)


if __name__ == "__main__":
    environment.run(main)
