"""What the launchers share: cheap checks before heavy work, one message for a mistake, exit codes, leaving together."""

import argparse
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from inspect import signature
from typing import TypeVar

import torch
import torch.distributed as dist
from transformers import AutoTokenizer, GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from shardes import loggers, settings
from shardes.config import Config, ConfigError, RunError, help_text
from shardes.engines import Engine, build, check_model, open_model, reason
from shardes.generation import Decoder, decoder
from shardes.hosts import check_launcher
from shardes.responses import Responder
from shardes.stop import Stopped, StopWatch
from shardes.tasks import Task, configured_task
from shardes.weights import WeightFiles, model_directory
from shardes.world import Job, World, agree, form_replica, join_job, part

MEETING = 300.0  # seconds for the launcher's processes to meet


@dataclass
class Plan:
    """What the cheap checks leave ready."""

    config: Config
    replicas: int
    files: WeightFiles
    module: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    task: Task
    decoder: Decoder


def check(config: Config, job: Job) -> Plan:
    """Check everything that can be checked before heavy work; ConfigError for what cannot run."""
    check_launcher()
    replicas = settings.check_layout(config, job.size)
    t = config.task
    task = configured_task(t)
    if t.prompts_per_iteration is not None and hasattr(task, "score"):
        try:
            signature(task.score).bind("train", [], [])
        except TypeError:
            raise ConfigError(
                "task.prompts_per_iteration: the task's score must take the prompts that were asked as a third "
                "argument: score(split, responses, which=None); see shardes.tasks.Task"
            ) from None
    loggers.check(config.tracking.loggers)
    directory = model_directory(config.model.path)
    trusted = config.model.trust_remote_code
    if trusted and job.rank == 0:
        warn(
            f"model.trust_remote_code=true: Python code that comes with {config.model.path} is run on every rank, "
            "with all that you may do here"
        )
    files, module = open_model(directory, getattr(torch, config.model.dtype.value), trusted)
    check_model(config, module)
    try:
        tokenizer = AutoTokenizer.from_pretrained(directory, trust_remote_code=trusted)
    except (OSError, ValueError) as error:
        raise ConfigError(f"model.path={directory}: no usable tokenizer: {reason(error)}") from error
    decoding = decoder(
        tokenizer,
        GenerationConfig.from_pretrained(directory)
        if (directory / "generation_config.json").exists()
        else GenerationConfig.from_model_config(module.config),
        max_new_tokens=config.generation.max_new_tokens,
        stop=config.generation.stop,
        batch_tokens=config.generation.batch_tokens,
    )
    return Plan(config, replicas, files, module, tokenizer, task, decoding)


Checked = TypeVar("Checked", bound=Plan)


def build_replica(job: Job, plan: Plan) -> tuple[World, Engine, Responder]:
    """This rank's world and engine, its weights not yet loaded, and what answers prompts with them."""
    sharding = plan.config.sharding
    world = form_replica(job, plan.replicas, sharding.shard, sharding.tensor, plan.config.run.timeout)
    engine = build(plan.config, plan.module, world)
    return world, engine, Responder(world, engine, plan.decoder, plan.tokenizer)


class Parser(argparse.ArgumentParser):
    """A parser of a launcher's arguments: CONFIG.yaml, key=value overrides, and what the launcher itself adds."""

    def __init__(self, name: str, options: str, description: str, examples: str):
        super().__init__(
            usage=f"shardes {name} CONFIG.yaml {options} [key=value ...]\n"
            f"       deepspeed --num_gpus N launchers/{name}.py CONFIG.yaml [options] [key=value ...]",
            description=description,
            epilog=f"{examples}\nkeys, with their defaults:\n{help_text()}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        self.add_argument("config", metavar="CONFIG.yaml", help="settings; see configs/")
        self.add_argument("overrides", metavar="key=value", nargs="*", help="settings that override the file's")
        self.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)  # deepspeed's launcher

    def read(self, argv: list[str]) -> tuple[argparse.Namespace, Config]:
        """The arguments, and the settings that they make."""
        arguments = self.parse_intermixed_args(argv)
        return arguments, settings.load(arguments.config, arguments.overrides)

    def error(self, message: str):
        raise ConfigError(f"{message}; see --help")


def launch(
    argv: list[str],
    parser: Parser,
    prepare: Callable[[list[str], Job], Checked],
    work: Callable[[Job, Checked, StopWatch], None],
) -> int:
    """Run this rank of a launcher to its end; returns the exit code.

    `prepare` makes the cheap checks. `work` follows once no rank has found a mistake and all have the same settings.
    """
    if {"-h", "--help"} & set(argv):
        if os.environ.get("RANK", "0") == "0":
            parser.print_help()
        return 0
    try:
        job = join_job(MEETING)
    except (ConfigError, RunError) as error:
        if os.environ.get("LOCAL_RANK", "0") == "0":  # a host's ranks meet the same mistake
            complain(str(error))
        return 2 if isinstance(error, ConfigError) else 1
    plan, problem = None, None
    try:
        plan = prepare(argv, job)
    except ConfigError as error:
        problem = str(error)
    if not agree(job, problem, settings.to_yaml(plan.config) if plan else "", say=complain) or plan is None:
        return 2
    watch, code, timeout = StopWatch(job), 1, plan.config.run.timeout
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
        missing = part(job, timeout if code == 0 else 10)
    if missing and code == 0:
        complain(f"the run is done, but after {timeout:.0f} s ranks {missing} have not ended")
        return 1
    return code


def warn(message: str) -> None:
    print(f"WARNING: {message}", file=sys.stderr, flush=True)


def complain(message: str) -> None:
    print(f"error: {message}", file=sys.stderr, flush=True)
