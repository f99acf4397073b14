"""Fine-tune a language model with evolution strategies.

    deepspeed --num_gpus 2 launchers/train.py CONFIG.yaml [key=value ...]

The launcher's ranks become replicas × shard × tensor ranks; without a launcher it is a world of one.
Started again with the same run.dir, it goes on where it was.
Exit codes: 0 done or stopped by SIGINT or SIGTERM, 75 stopped by SIGUSR1 (start it again), 2 the user's mistake,
1 anything else.
"""

import argparse
import os
import sys
from dataclasses import dataclass
from pathlib import Path

from shardes import environment

environment.prepare()
with environment.quiet():
    import deepspeed  # noqa: F401

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from torch import nn  # noqa: E402
from transformers import AutoTokenizer, GenerationConfig, PreTrainedTokenizerBase  # noqa: E402

from shardes import config as settings  # noqa: E402
from shardes.center import open_center  # noqa: E402
from shardes.config import Config, ConfigError, RunError  # noqa: E402
from shardes.engines import build, check_model, empty_model  # noqa: E402
from shardes.generation import Greedy, encode, greedy  # noqa: E402
from shardes.resume import Opened, Start, open_run  # noqa: E402
from shardes.stop import Stopped, StopWatch  # noqa: E402
from shardes.tasks import Task, load_task  # noqa: E402
from shardes.trainer import Trainer  # noqa: E402
from shardes.weights import WeightFiles, model_directory  # noqa: E402
from shardes.world import Job, agree, form_replica, join_job, part  # noqa: E402

MEETING = 300.0  # seconds for the launcher's processes to meet


@dataclass
class Plan:
    """What the cheap checks leave ready for the run."""

    config: Config
    replicas: int
    files: WeightFiles
    module: nn.Module
    tokenizer: PreTrainedTokenizerBase
    task: Task
    greedy: Greedy
    encoded: dict[str, list[list[int]]]
    opened: Opened | None  # on rank 0


class _Parser(argparse.ArgumentParser):
    def error(self, message: str):
        raise ConfigError(message)


def parser() -> argparse.ArgumentParser:
    parser = _Parser(
        usage="deepspeed [--num_gpus N] launchers/train.py CONFIG.yaml [key=value ...]",
        description=__doc__.splitlines()[0],
        epilog="keys, with their defaults:\n" + settings.help_text(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("config", metavar="CONFIG.yaml", help="settings; see configs/")
    parser.add_argument("overrides", metavar="key=value", nargs="*", help="settings that override the file's")
    parser.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)  # deepspeed's launcher
    return parser


def prepare(argv: list[str], job: Job) -> Plan:
    """Check everything that can be checked before heavy work; ConfigError for what cannot run."""
    arguments = parser().parse_args(argv)
    config = settings.load(arguments.config, arguments.overrides)
    replicas = settings.check_layout(config, job.size)
    task = load_task(config.task.name, config.task.path, config.task.train, config.task.test)
    directory = model_directory(config.model.path)
    module = empty_model(directory, getattr(torch, config.model.dtype.value))
    check_model(config, module)
    files = WeightFiles(directory)
    files.stack(module)
    files.check({name: param.shape for name, param in module.named_parameters()})
    try:
        tokenizer = AutoTokenizer.from_pretrained(directory, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ConfigError(f"model.path={directory}: no usable tokenizer: {str(error).splitlines()[0]}") from error
    encoded = {split: encode(tokenizer, task.prompts(split)) for split in ("train", "test")}
    decoding = greedy(
        tokenizer,
        GenerationConfig.from_pretrained(directory)
        if (directory / "generation_config.json").exists()
        else GenerationConfig.from_model_config(module.config),
        max_new_tokens=config.generation.max_new_tokens,
        stop=config.generation.stop,
        batch_tokens=config.generation.batch_tokens,
    )
    opened = open_run(config, files) if job.rank == 0 else None
    return Plan(config, replicas, files, module, tokenizer, task, decoding, encoded, opened)


def train(argv: list[str]) -> int:
    """Run this rank to the end; returns the exit code."""
    job = join_job(MEETING)
    plan, problem = None, None
    try:
        plan = prepare(argv, job)
    except ConfigError as error:
        problem = str(error)
    if not agree(job, problem, settings.to_yaml(plan.config) if plan else "", say=complain):
        return 2
    watch, code = StopWatch(job), 1
    try:
        work(job, plan, watch)
        code = 0
    except Stopped as stopped:
        code = stopped.code
        watch.end(code)
    except (ConfigError, RunError) as error:
        code = 2 if isinstance(error, ConfigError) else 1
        if not dist.is_initialized() or dist.get_rank() == 0:  # a replica's ranks meet the same mistake
            complain(str(error))
        watch.end(code)
    except BaseException:
        watch.end(1)
        raise
    finally:
        watch.close()
        missing = part(job, plan.config.run.timeout if code == 0 else 10)
    if missing and code == 0:
        complain(f"the run is done, but after {plan.config.run.timeout:.0f} s ranks {missing} have not ended")
        return 1
    return code


def work(job: Job, plan: Plan, watch: StopWatch) -> None:
    """Build the replica and train."""
    config = plan.config
    if plan.opened:
        plan.opened.start.send(job.store)
    start = Start.receive(job.store)
    world = form_replica(job, plan.replicas, config.sharding.shard, config.sharding.tensor, config.run.timeout)
    engine = build(config, plan.module, world)
    source = plan.files
    if start.source:
        if not Path(start.source).is_dir():
            raise RunError(f"rank {job.rank}: no {start.source} here; run.dir must be where all hosts see it")
        source = WeightFiles(Path(start.source))
        source.stack(plan.module)
    center = open_center(config.es.restore, engine.shards, world, source)
    journal = plan.opened.journal if plan.opened else None
    trainer = Trainer(
        config, world, engine, center, plan.files, plan.task, plan.tokenizer, plan.greedy, plan.encoded, watch, start,
        journal,
    )  # fmt: skip
    try:
        for note in plan.opened.notes if plan.opened else ():
            trainer.say(note)
        trainer.run()
        dist.barrier()
    except Stopped as stopped:
        trainer.say(str(stopped))
        raise
    finally:
        trainer.close()
        if plan.opened:
            plan.opened.close()


def complain(message: str) -> None:
    print(f"error: {message}", file=sys.stderr, flush=True)


def main(argv: list[str]) -> int:
    if {"-h", "--help"} & set(argv):
        if os.environ.get("RANK", "0") == "0":
            parser().print_help()
        return 0
    try:
        return train(argv)
    except ConfigError as error:
        complain(str(error))
        return 2


if __name__ == "__main__":
    environment.run(main)
