"""How a job joins the run of another: what the primary job offers, and what both must have in
common.
"""

import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from shardes.config.loading import replica_settings
from shardes.config.schema import Config
from shardes.distributed.world import World
from shardes.errors import ConfigError
from shardes.replicas.gateway import StoreGateway, connect, run_token
from shardes.replicas.protocol import RunStore, Welcome
from shardes.sharding.weight_files import WeightFiles
from shardes.storage.files import differing, fingerprint
from shardes.storage.journal import Header
from shardes.storage.resume import ResumePoint, RunDirectory, noise_name
from shardes.storage.snapshots import latest_valid_snapshot
from shardes.storage.sources import first_difference


@contextmanager
def gateway_open(
    config: Config, base: WeightFiles, world: World, store: RunStore, run: RunDirectory
) -> Iterator[str]:
    """A context in which other jobs can join the run; for the primary rank. Yields HOST:PORT.

    The address is also in the file `meeting` of the run directory.
    """
    directory, replicas = Path(config.run.dir), config.replicas
    for record in run.records:
        store.publish(record)
    header = _header(config, base, run.sources, run.date)
    store.welcome(Welcome(header, world.replicas))
    token = run_token(directory, create=True)
    gateway = StoreGateway(replicas.host, replicas.port or 0, token, store, replicas.timeout)
    address = f"{replicas.host or socket.gethostname()}:{gateway.port}"
    file = directory / "meeting"
    try:
        file.write_text(address + "\n")
        yield address
    finally:
        file.unlink(missing_ok=True)
        gateway.close()


@dataclass
class RunConnection:
    """A job's connections to the store of a run that it may join."""

    store: RunStore
    heartbeat_store: RunStore  # another connection
    welcome: Welcome

    @property
    def date(self) -> str:
        """The date that the run's chat templates show, in ISO format."""
        return self.welcome.header.date


def connect_to_run(config: Config) -> RunConnection:
    """Connect to the run at `replicas.join`; for rank 0 of a job.

    Raises:
        ConfigError: cannot connect.
    """
    address = config.replicas.join
    assert address is not None
    token, timeout = run_token(Path(config.run.dir)), config.replicas.timeout
    store, heartbeat_store = (connect(address, token, timeout) for _ in range(2))
    return RunConnection(store, heartbeat_store, store.read_welcome())


@dataclass
class JoinedRun:
    """A run that this job has joined: its store, and what its primary job said."""

    store: RunStore
    heartbeat_store: RunStore  # another connection
    replica: int  # this job's number
    replicas: int  # of the primary job
    resume: ResumePoint
    notes: list[str]  # for the user


def join_run(
    connection: RunConnection, config: Config, base: WeightFiles, sources: dict[str, str]
) -> JoinedRun:
    """Join a run; for rank 0 of a job.

    The center is rebuilt from a snapshot, if `run.dir` is the run's own, or from the base model.

    Raises:
        ConfigError: the run has another base model, other noise, settings, code, data or prompts.
    """
    store, welcome, directory = connection.store, connection.welcome, Path(config.run.dir)
    _compare(welcome.header, _header(config, base, sources, connection.date))
    current = store.wait_current(config.run.timeout)
    records = [store.record(number) for number in range(current.iteration)]
    digests = [*(record.digest for record in records), current.digest]
    snapshot, notes = latest_valid_snapshot([directory], current.iteration, digests.__getitem__)
    resume = ResumePoint.after(records, snapshot, current.digest)
    replica = store.take_replica_number()
    note = (
        f"joined the run at {config.replicas.join} as replica {replica}, in iteration "
        f"{current.iteration}: {resume.origin}"
    )
    heartbeat_store, replicas = connection.heartbeat_store, welcome.replicas
    return JoinedRun(store, heartbeat_store, replica, replicas, resume, [*notes, note])


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
