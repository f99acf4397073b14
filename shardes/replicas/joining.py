"""How a job joins the run of another: what the primary job offers, and what both must have in
common.
"""

import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch.distributed as dist

from shardes.config.loading import replica_settings
from shardes.config.schema import Config
from shardes.distributed.world import World
from shardes.errors import ConfigError, RunError
from shardes.replicas.gateway import StoreGateway
from shardes.replicas.gateway_client import connect
from shardes.replicas.protocol import RunStore, Welcome
from shardes.replicas.token import run_token
from shardes.replicas.validation import ResultLimits
from shardes.sharding.weight_files import WeightFiles
from shardes.storage.files import differing, fingerprint, write_whole
from shardes.storage.journal import Header
from shardes.storage.resume import ResumePoint, RunDirectory, noise_name
from shardes.storage.snapshots import latest_valid_snapshot
from shardes.storage.sources import first_difference


@contextmanager
def gateway_open(
    config: Config,
    base: WeightFiles,
    world: World,
    store: RunStore,
    run: RunDirectory,
    limits: ResultLimits,
    warn: Callable[[str], None],
) -> Iterator[str]:
    """A context in which other jobs can join the run; for the primary rank. Yields HOST:PORT.

    The address is also in the file `meeting` of the run directory.

    Args:
        limits: what jobs that join may post.
        warn: takes a line for the user, from a thread.
    """
    directory, replicas = Path(config.run.dir), config.replicas
    header = _header(config, base, run.sources, run.date)
    store.welcome(Welcome(header, world.replicas))
    token = run_token(directory, create=True)
    gateway = StoreGateway(
        replicas.host,
        replicas.port or 0,
        token,
        store,
        limits,
        run.journal.path,
        replicas.timeout,
        warn,
    )
    address = f"{replicas.host or socket.gethostname()}:{gateway.port}"
    file = directory / "meeting"
    try:
        try:
            write_whole(file, address + "\n")
        except OSError as error:
            raise RunError(f"{file}: cannot be written ({error})") from error
        yield address
    finally:
        file.unlink(missing_ok=True)
        gateway.close()


@dataclass
class RunConnection:
    """A job's connection to the store of a run that it may join."""

    store: RunStore
    welcome: Welcome

    @property
    def date(self) -> str:
        """The date that the run's chat templates show, in ISO format."""
        return self.welcome.header.date


def connect_to_run(config: Config) -> RunConnection:
    """Connect to the run at `replicas.join`; for rank 0 of a job.

    Raises:
        ConfigError: cannot connect.
        RunError: the run does not answer.
    """
    address = config.replicas.join
    assert address is not None
    token, timeout = run_token(Path(config.run.dir)), config.replicas.timeout
    store = connect(address, token, timeout)
    with _reachable(address):
        return RunConnection(store, store.read_welcome())


@contextmanager
def _reachable(address: str) -> Iterator[None]:
    """A context in which the loss of the connection to a run is a RunError."""
    try:
        yield
    except dist.DistError as error:
        raise RunError(
            f"replicas.join={address}: {error}; is the run still active? Start this again to join"
        ) from error


@dataclass
class JoinedRun:
    """A run that this job has joined: its store, and what its primary job said."""

    store: RunStore
    replica: int  # this job's number
    replicas: int  # of the primary job
    resume: ResumePoint
    notes: list[str]  # for the user


def join_run(
    connection: RunConnection,
    config: Config,
    base: WeightFiles,
    sources: dict[str, str],
    stateful: bool = False,
) -> JoinedRun:
    """Join a run; for rank 0 of a job.

    The center is rebuilt from a snapshot, if `run.dir` is the run's own, or from the base model:
    always with `stateful`, see `open_run_directory`.

    Raises:
        ConfigError: the run has another base model, other noise, settings, code, data or prompts.
        RunError: the run does not answer.
    """
    store, welcome, directory = connection.store, connection.welcome, Path(config.run.dir)
    _compare(welcome.header, _header(config, base, sources, connection.date))
    address = config.replicas.join
    assert address is not None
    with _reachable(address):
        current = store.wait_current(config.run.timeout)
        records = [store.record(number) for number in range(current.iteration)]
    digests = [*(record.digest for record in records), current.digest]
    runs = [] if stateful else [directory]
    snapshot, notes = latest_valid_snapshot(runs, current.iteration, digests.__getitem__)
    evaluations: dict = {current.iteration: {}} if current.evaluated else {}
    resume = ResumePoint.after(records, snapshot, current.digest, evaluations=evaluations)
    with _reachable(address):
        replica = store.take_replica_number()
    note = (
        f"joined the run at {address} as replica {replica}, in iteration "
        f"{current.iteration}: {resume.origin}"
    )
    return JoinedRun(store, replica, welcome.replicas, resume, [*notes, note])


def _header(config: Config, base: WeightFiles, sources: dict[str, str], date: str) -> Header:
    """What all replicas of a run must have in common."""
    settings = replica_settings(config)
    files, noise = fingerprint(base), noise_name(config)
    return Header(config.model.path, files, settings, noise=noise, sources=sources, date=date)


def _compare(run: Header, job: Header) -> None:
    if run.noise != job.noise:
        raise ConfigError(
            f"replicas.join: the run's noise is {run.noise}, this job's {job.noise}; "
            "join with the run's es.noise and version"
        )
    if differences := differing(run.files, job.files):
        name = differences[0]
        expected, actual = (files.get(name, "missing")[:16] for files in (run.files, job.files))
        raise ConfigError(
            f"model.path={job.model}: {name} is not the run's (SHA-256 {actual}, the run's "
            f"{expected}); join with the base model that the run began with"
        )
    for key, value in run.settings.items():
        if job.settings.get(key) != value:
            raise ConfigError(
                f"{key}={job.settings.get(key)}: the run has {value}; join with the run's config"
            )
    if difference := first_difference(job.sources, run.sources):
        raise ConfigError(
            f"{difference} differs from the run's; join with the run's code, data and tokenizer"
        )
