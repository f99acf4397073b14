"""The roles of the ranks of a run, and how a rank's trainer is put together from them.

The primary job owns the run directory; its first rank is the primary rank. A client job has joined
a run as one more replica. A rank's role is settled here, once: trainer and evaluator never ask.
"""

import time
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shardes import launch
from shardes.clock import Clock
from shardes.config.schema import Noise, Restore
from shardes.distributed.device import choose_device, device_name
from shardes.distributed.signals import ShutdownWatcher
from shardes.distributed.store import clone_store
from shardes.distributed.world import Job
from shardes.errors import RunError, Stopped
from shardes.evaluator import Evaluator, PrimaryEvaluator
from shardes.launch import PreparedRun
from shardes.replicas.consistency import ConsistencyCheck
from shardes.replicas.coordinator import (
    ClientCoordinator,
    ClientLeader,
    Coordinator,
    FollowerCoordinator,
    PrimaryCoordinator,
)
from shardes.replicas.heartbeat import ClientHeartbeats, Heartbeats, end_run
from shardes.replicas.joining import JoinedRun, gateway_open
from shardes.replicas.protocol import MemberResult, RunStore
from shardes.replicas.validation import ResultLimits
from shardes.reporting.reporter import (
    ConsoleReporter,
    OnMetrics,
    Reporter,
    RunReporter,
    add_recorded_evaluations,
    ignore,
)
from shardes.rewards.scoring import Scorer
from shardes.sharding.weight_files import WeightFiles
from shardes.storage.resume import ResumePoint, RunDirectory
from shardes.storage.snapshots import NoSnapshots, Snapshots, SnapshotWriter
from shardes.trainer import Trainer
from shardes.words import counted


@dataclass
class PreparedTraining(PreparedRun):
    """`prompts` are token ids by split; `run` is set on rank 0 of the job only; `on_metrics` is
    called on the primary rank.
    """

    prompts: dict[str, list[list[int]]]
    run: RunDirectory | JoinedRun | None
    on_metrics: OnMetrics = ignore

    def abandon(self) -> None:
        if isinstance(self.run, RunDirectory):
            self.run.abandon()


def head_lines(prepared: PreparedTraining, ranks: int, run: RunDirectory) -> list[str]:
    """What a start prints first: what is trained, on what, where, and from where it goes on."""
    config, model = prepared.config, prepared.config.model
    es, sharding = config.es, config.sharding
    numel = sum(param.numel() for param in prepared.module.parameters())
    noise = "full noise" if es.noise is Noise.full else f"noise of rank {es.rank}"
    counts = ", ".join(f"{len(rows)} {split}" for split, rows in prepared.prompts.items())
    if config.task.prompts_per_iteration is not None:
        counts += f"; {config.task.prompts_per_iteration} per iteration"
    done = run.resume.iteration
    state = f"{done} done" if done else "a new run"
    if done == es.iterations:
        state = "all done (a larger es.iterations goes on)"
    rows = {
        "model": f"{model.path}, {numel:,} parameters in {model.dtype.value}",
        "layout": f"{counted(ranks, 'rank')}: {counted(prepared.replicas, 'replica')} × shard "
        f"{sharding.shard} × tensor {sharding.tensor}, {config.engine.value}",
        "device": device_name(choose_device()),
        "members": f"{es.population_size} of σ = {es.sigma:g}, α = {es.alpha:g}, {noise}",
        "prompts": f"{counts}; up to {config.generation.max_new_tokens} new tokens",
        "run": f"{config.run.dir}, {counted(es.iterations, 'iteration')}; {state}",
    }
    return [*(f"{name:<8} {value}" for name, value in rows.items()), *run.notes]


class JobRoles(ABC):
    """Puts together one rank's trainer; each kind of job is a subclass.

    Args:
        stack: closes, after the run, what is opened here.
    """

    def __init__(
        self, job: Job, prepared: PreparedTraining, watcher: ShutdownWatcher, stack: ExitStack
    ):
        self.job, self.prepared, self.watcher, self.stack = job, prepared, watcher, stack
        self.config, self.clock = prepared.config, Clock()
        self.directory = Path(self.config.run.dir)
        self.resume = self._share_resume_point()
        self.store = self.run_store()  # before weights are read: ranks may take different times
        replica = launch.open_replica(job, prepared, self._source, self.clock, self.joined())
        self.world, self.sampler = replica.world, replica.sampler
        self.center, self.answers = replica.center, replica.answers
        self.scorer = Scorer(
            self.config.task,
            prepared.task,
            self.directory / "failed_scoring.json",
            watcher.poll,
            watcher.users_code,
        )
        stack.callback(self.scorer.close)

    @abstractmethod
    def joined(self) -> tuple[int, int] | None:
        """This job's number in the run that it joined, and the primary job's number of replicas."""

    @abstractmethod
    def run_store(self) -> RunStore:
        """The run's store; on a client job's other ranks, the store with copies of the records."""

    @abstractmethod
    def reporter(self) -> Reporter: ...

    @abstractmethod
    def coordinator(self, reporter: Reporter) -> Coordinator: ...

    def trainer(self) -> Trainer:
        config, prepared = self.config, self.prepared
        reporter = self.reporter()
        self.stack.callback(reporter.close)
        coordinator = self.coordinator(reporter)
        snapshots = self._snapshots(reporter)
        if not self.watcher.owns_process:  # elsewhere a stop does not wait for a snapshot
            self.stack.callback(snapshots.close)
        trace = self.directory / f"trace_rank{self.job.rank}.json.gz"
        return Trainer(
            config,
            self.world,
            prepared.task,
            prepared.prompts,
            self.center,
            self.sampler,
            self.answers,
            self.scorer,
            self._evaluator(coordinator, reporter),
            coordinator,
            self._consistency(),
            snapshots,
            reporter,
            self.resume,
            self.clock,
            self.watcher.poll,
            trace if config.profile and self.world.replica == 0 else None,
        )

    def _evaluator(self, coordinator: Coordinator, reporter: Reporter) -> Evaluator:
        # Only replica 0 measures the distance, for which it reads the base model.
        distance = self.center.distance if self.world.replica == 0 else dict
        shared: dict[str, Any] = dict(
            config=self.config,
            world=self.world,
            center=self.center,
            sampler=self.sampler,
            coordinator=coordinator,
            prompts=self.prepared.prompts,
            distance=distance,
            poll=self.watcher.poll,
            known=self.resume.evaluations,
            best=self.resume.best,
        )
        if not isinstance(reporter, RunReporter):
            return Evaluator(**shared)
        assert isinstance(self.prepared.run, RunDirectory)
        return PrimaryEvaluator(
            **shared,
            task=self.prepared.task,
            scorer=self.scorer,
            reporter=reporter,
            journal=self.prepared.run.journal,
        )

    def _snapshots(self, reporter: Reporter) -> Snapshots:
        run = self.prepared.run
        if self.world.replica != 0:
            return NoSnapshots()
        return SnapshotWriter(
            self.directory,
            self.config.checkpoint,
            self.world,
            self.center,
            self.prepared.files,
            run.journal.run if isinstance(run, RunDirectory) else "",
            self.resume.best,
            reporter.say,
            self.config.run.timeout,
            self.watcher.poll,
        )

    def _consistency(self) -> ConsistencyCheck:
        """Replicas are compared if there are several and their centers do not drift."""
        exact = self.config.es.restore is Restore.copy
        comparable = exact and self.world.replicas > 1 and not self.world.is_client
        every = self.config.checkpoint.verify_every if comparable else 0
        timeout = self.config.run.timeout
        poll = self.watcher.poll
        return ConsistencyCheck(self.world, self.store, self.center, every, timeout, poll)

    def _share_resume_point(self) -> ResumePoint:
        """The resume point that rank 0 has, on every rank of the job."""
        if self.prepared.run:
            self.job.keys.set_resume_point(self.prepared.run.resume.to_json())
        return ResumePoint.from_json(self.job.keys.resume_point())

    def _source(self) -> WeightFiles:
        """The files from which the center is read: a snapshot's or the base model's."""
        source = self.resume.source
        if source is None:
            return self.prepared.files
        if not Path(source).is_dir():
            raise RunError(
                f"rank {self.job.rank}: no {source} here; run.dir must be on a file system "
                "that all hosts share"
            )
        files = WeightFiles(Path(source))
        files.map_names(self.prepared.module)
        return files


class PrimaryJob(JobRoles):
    """The roles in the job that owns the run."""

    def __init__(
        self, job: Job, prepared: PreparedTraining, watcher: ShutdownWatcher, stack: ExitStack
    ):
        if isinstance(prepared.run, RunDirectory):
            stack.callback(prepared.run.close)
            prepared.run.begin()
            add_recorded_evaluations(Path(prepared.config.run.dir), prepared.run.resume)
            self.head = head_lines(prepared, job.size, prepared.run)
            print("\n".join(self.head), flush=True)
        super().__init__(job, prepared, watcher, stack)

    def joined(self) -> None:
        return None

    def run_store(self) -> RunStore:
        return RunStore.of_job(self.job)

    def reporter(self) -> Reporter:
        if not self.world.is_primary:
            return Reporter()
        layout, on_metrics = self.world.layout, self.prepared.on_metrics
        return RunReporter(self.config, self.resume, layout, self.head, on_metrics)

    def coordinator(self, reporter: Reporter) -> Coordinator:
        world, store, run = self.world, self.store, self.prepared.run
        shared: dict[str, Any] = dict(
            known={
                number: MemberResult(
                    reward.reward,
                    reward.tokens,
                    0,
                    time.time(),
                    reward.scores,
                    reward.failures,
                    reward.parts,
                )
                for number, reward in self.resume.rewards.items()
            },
            timeout=self.config.run.timeout,
            poll=self.watcher.poll,
            clock=self.clock,
        )
        if not world.is_leader:
            return FollowerCoordinator(world, store, None, **shared)
        timeout = self.config.replicas.timeout
        heartbeats = Heartbeats(store, store.clone(), world.replica, timeout)
        if not isinstance(run, RunDirectory):
            self.stack.enter_context(heartbeats)
            return FollowerCoordinator(world, store, heartbeats, **shared)
        self._open_gateway(run, reporter)
        self.stack.enter_context(self._run_ended())
        self.stack.enter_context(heartbeats)
        return PrimaryCoordinator(
            world,
            store,
            heartbeats,
            run.journal,
            self.config.es,
            self.prepared.rule.name if self.prepared.rule else "",
            reporter,
            **shared,
        )

    def _open_gateway(self, run: RunDirectory, reporter: Reporter) -> None:
        """Let replicas join, if the config says so, and report how the run starts."""
        if self.config.es.restore is Restore.subtract and self.world.replicas > 1:
            reporter.say(
                "warning: es.restore=subtract: each replica's center drifts by itself; "
                "only copy is exact"
            )
        if placement := self.center.placement:
            reporter.say(placement)
        if applied := self.prepared.decoder.applied:
            reporter.say(f"greedy decoding applies the checkpoint's generation config: {applied}")
        if self.config.replicas.port is not None:
            limits = ResultLimits.of_run(
                self.config,
                {split: len(rows) for split, rows in self.prepared.prompts.items()},
                self.prepared.module.config.get_text_config().vocab_size,
                self.world.replicas,
            )
            gateway = gateway_open(
                self.config, self.prepared.files, self.world, self.store, run, limits, reporter.say
            )
            address = self.stack.enter_context(gateway)
            reporter.say(f"replicas can join this run with replicas.join={address}")

    @contextmanager
    def _run_ended(self) -> Iterator[None]:
        """A context on whose exit the replicas that joined learn the run's exit code."""
        code = 1
        try:
            yield
            code = 0
        except Stopped as stopped:
            code = stopped.code
            raise
        finally:
            end_run(self.store, self.world.replicas, self.config.replicas.timeout, code)


class ClientJob(JobRoles):
    """The roles in a job that joined the run of another: its rank 0 alone is connected to it."""

    def joined(self) -> tuple[int, int]:
        run = self.prepared.run
        if isinstance(run, JoinedRun):
            self.job.keys.set_replica_number(run.replica, run.replicas)
        return self.job.keys.replica_number()

    def run_store(self) -> RunStore:
        run = self.prepared.run
        return run.store if isinstance(run, JoinedRun) else self._records()

    def reporter(self) -> Reporter:
        return ConsoleReporter() if self.world.is_leader else Reporter()

    def coordinator(self, reporter: Reporter) -> Coordinator:
        world, run = self.world, self.prepared.run
        shared: dict[str, Any] = dict(
            timeout=self.config.run.timeout, poll=self.watcher.poll, clock=self.clock
        )
        records = self._records()
        if not isinstance(run, JoinedRun):
            return ClientCoordinator(world, records, None, records, **shared)
        for note in run.notes:
            reporter.say(note)
        heartbeats = ClientHeartbeats(
            run.store,
            run.store,
            world.replica,
            self.config.replicas.timeout,
            self.watcher.stop,
        )
        self.stack.enter_context(heartbeats)
        return ClientLeader(world, run.store, heartbeats, records, **shared)

    def _records(self) -> RunStore:
        """A store of this job, in which its leader repeats the records for the other ranks."""
        return RunStore(clone_store(self.job.store), "records")
