"""Measure which σ, α and population size a run should start with.

    shardes probe CONFIG.yaml --gpus 2 [--sigmas 0.0003 0.001 0.003] [--pairs 15] [key=value ...]
    deepspeed --num_gpus 2 launchers/probe.py CONFIG.yaml [options] [key=value ...]

Antithetic pairs of members, with the same seeds at each σ, answer the prompts of the run's first
iteration. The table shows, for each σ, how rewards spread, how many answers change or break, and
how much of the spread is signal; what is suggested follows from it (docs/tuning.md). The same is
written to probe/probe.json in run.dir, and `shardes report` shows it. A run in that directory is
neither read nor changed: to probe a later center, pass model.path=SNAPSHOT.
"""

import shlex
from argparse import ArgumentTypeError
from contextlib import ExitStack, closing
from dataclasses import dataclass
from math import isfinite
from pathlib import Path

import torch.distributed as dist

from shardes import launch, lifecycle
from shardes.clock import Clock
from shardes.commands.arguments import LaunchParser
from shardes.distributed import environment
from shardes.distributed.signals import ShutdownWatcher
from shardes.distributed.world import Job
from shardes.errors import ConfigError, RunError, Stopped
from shardes.es.probing import Answered, CenterAnswers, Plan, default_sigmas
from shardes.es.tuning import LEAST_PAIRS
from shardes.launch import PreparedRun
from shardes.probe import Probe
from shardes.replicas.protocol import RunStore
from shardes.replicas.work_queue import WorkQueue
from shardes.reporting import json_lines
from shardes.reporting.probe import FILE, print_report, probe_report
from shardes.reporting.progress import counting
from shardes.rewards.scoring import Scorer
from shardes.storage.files import make_directory, write_whole
from shardes.storage.journal import JOURNAL
from shardes.storage.resume import recorded_date

EXAMPLES = """examples:
  shardes probe configs/quickstart.yaml --gpus 2
  shardes probe configs/quickstart.yaml --gpus 2 --sigmas 0.001 0.002 0.004 --pairs 30
  deepspeed --num_gpus 2 launchers/probe.py configs/quickstart.yaml sharding.tensor=2
"""


@dataclass
class PreparedProbe(PreparedRun):
    """`prompts` are the training prompts' token ids; `command` starts the run."""

    prompts: list[list[int]]
    sigmas: list[float]
    pairs: int
    command: str


def parser() -> LaunchParser:
    options = "[--gpus N] [--sigmas S ...] [--pairs K]"
    parser = LaunchParser("probe", options, __doc__.splitlines()[0], EXAMPLES)
    parser.add_argument(
        "--sigmas",
        nargs="+",
        type=_number,
        metavar="S",
        help="default: six values, a factor √10 apart, around es.sigma",
    )
    parser.add_argument(
        "--pairs",
        type=int,
        metavar="K",
        help="antithetic pairs for each σ; default: half of es.population_size",
    )
    return parser


def _number(text: str) -> float:
    if "=" in text:
        raise ArgumentTypeError(f"{text}: write settings (key=value) before it")
    try:
        return float(text)
    except ValueError:
        raise ArgumentTypeError(f"{text}: not a number") from None


def prepare(argv: list[str], job: Job) -> PreparedProbe:
    arguments, config = parser().read(argv)
    for key in ("join", "port"):
        value = getattr(config.replicas, key)
        if value is not None:
            raise ConfigError(
                f"replicas.{key}={value}: a probe has no other jobs' help; set replicas.{key}=null"
            )
    sigmas = sorted(arguments.sigmas or default_sigmas(config.es.sigma))
    for sigma in sigmas:
        if not (isfinite(sigma) and sigma > 0):
            raise ConfigError(f"--sigmas {sigma:g}: must be positive")
    if len(set(sigmas)) < len(sigmas):
        raise ConfigError("--sigmas: a value is given twice")
    pairs = max(config.es.population_size // 2, LEAST_PAIRS)
    if arguments.pairs is not None:
        pairs = arguments.pairs
    if pairs < LEAST_PAIRS:
        raise ConfigError(f"--pairs {pairs}: must be at least {LEAST_PAIRS}")
    prepared = launch.check(config, job)
    date = launch.shared_date(job, lambda: recorded_date(config))
    prompts = launch.encode_split(prepared, "train", date)
    if job.rank == 0:
        make_directory((Path(config.run.dir) / FILE).parent)
    command = shlex.join(["shardes", "train", arguments.config, *arguments.overrides])
    if job.size > 1:
        command += f" --gpus {job.size}"
    if (Path(config.run.dir) / JOURNAL).exists():  # a run that has other values
        command += f" {shlex.quote(f'run.dir={config.run.dir}_probed')}"
    return PreparedProbe(
        **vars(prepared), prompts=prompts, sigmas=sigmas, pairs=pairs, command=command
    )


def work(job: Job, prepared: PreparedProbe, watcher: ShutdownWatcher) -> None:
    """Evaluate the members; the primary rank reports, also on those before a stop."""
    config = prepared.config
    store = RunStore.of_job(job)  # before weights are read: ranks may take different times
    replica = launch.open_replica(job, prepared, lambda: prepared.files, Clock())
    world, center = replica.world, replica.center
    plan = Plan.derive(config, prepared.sigmas, prepared.pairs, center.digest(), prepared.prompts)
    rms = center.rms()
    members = len(plan.iteration.members)
    queue = WorkQueue(
        world, store.queue("probe"), "probe", members, config.run.timeout, poll=watcher.poll
    )
    watcher.expect_polls()
    saved = Path(config.run.dir) / FILE.parent / "failed_scoring.json"
    scorer = Scorer(config.task, prepared.task, saved, watcher.poll, watcher.users_code)
    with ExitStack() as stack:
        stack.enter_context(closing(scorer))
        poll = watcher.poll
        if world.is_primary:
            print(
                f"{members} members: {prepared.pairs} pairs at each of {len(prepared.sigmas)} "
                f"values of σ, on {len(plan.iteration.prompts)} prompts",
                flush=True,
            )
            progress = counting("members", members, queue.number_done, watcher.poll)
            poll = queue.poll = stack.enter_context(progress)
        probe = Probe(config, plan, replica, scorer, queue, poll)
        center_answers = probe.answer_with_center()
        try:
            probe.answer_with_members()
            results = probe.results() if world.is_primary else {}
        except Stopped as stopped:
            stopped.said = True
            stack.close()
            _report(prepared, plan, center_answers, probe.results_so_far(), rms)
            raise
    if world.is_primary:
        _report(prepared, plan, center_answers, results, rms)
    dist.barrier()


def _report(
    prepared: PreparedProbe,
    plan: Plan,
    center: CenterAnswers,
    results: dict[int, Answered],
    rms: dict[str, float],
) -> None:
    """Write and print what the members say that were evaluated."""
    report = probe_report(prepared.config, plan, center, results, rms)
    file = Path(prepared.config.run.dir) / FILE
    print_report(report, prepared.command)  # whatever becomes of the file
    try:
        write_whole(file, json_lines.to_json(report, indent=1) + "\n")
    except OSError as error:
        raise RunError(f"{file}: cannot be written: {error}") from error
    print(f"all figures: {file}", flush=True)


def main(argv: list[str]) -> int:
    return lifecycle.launch(argv, parser(), prepare, work)


if __name__ == "__main__":
    environment.run(main)
