"""How a job joins the run of another: what the primary job offers, and what both must have in
common.
"""

import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from shardes.config.loading import replica_settings
from shardes.config.schema import Config
from shardes.distributed.world import World
from shardes.errors import ConfigError
from shardes.noise.definition import NOISE
from shardes.replicas.gateway import StoreGateway, connect, run_token
from shardes.replicas.protocol import RunStore, Welcome
from shardes.sharding.weight_files import WeightFiles
from shardes.storage.files import differing, fingerprint
from shardes.storage.journal import Header, Record
from shardes.storage.resume import ResumePoint
from shardes.storage.snapshots import latest_valid_snapshot


@contextmanager
def gateway_open(
    config: Config, base: WeightFiles, world: World, store: RunStore, records: Sequence[Record]
) -> Iterator[str]:
    """A context in which other jobs can join the run; for the primary rank. Yields HOST:PORT.

    Args:
        records: those of the journal so far.

    The address is also in the file `meeting` of the run directory.
    """
    directory, replicas = Path(config.run.dir), config.replicas
    for record in records:
        store.publish(record)
    store.welcome(Welcome(_header(config, base), world.replicas))
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
class JoinedRun:
    """A run that this job has joined: its store, and what its primary job said."""

    store: RunStore
    heartbeat_store: RunStore  # another connection
    replica: int  # this job's number
    replicas: int  # of the primary job
    resume: ResumePoint
    notes: list[str]  # for the user


def join_run(config: Config, base: WeightFiles) -> JoinedRun:
    """Join the run at `replicas.join`; for rank 0 of a job.

    The center is rebuilt from a snapshot, if `run.dir` is the run's own, or from the base model.

    Raises:
        ConfigError: cannot join, or the run has another base model, other noise or other settings.
    """
    address, directory = config.replicas.join, Path(config.run.dir)
    assert address is not None
    token, timeout = run_token(directory), config.replicas.timeout
    store, heartbeat_store = (connect(address, token, timeout) for _ in range(2))
    welcome = store.read_welcome()
    _compare(welcome.header, _header(config, base))
    current = store.wait_current(config.run.timeout)
    records = [store.record(number) for number in range(current.iteration)]
    digests = [*(record.digest for record in records), current.digest]
    snapshot, notes = latest_valid_snapshot([directory], current.iteration, digests.__getitem__)
    resume = ResumePoint.after(records, snapshot, current.digest)
    replica = store.take_replica_number()
    note = (
        f"joined the run at {address} as replica {replica}, in iteration {current.iteration}: "
        f"{resume.origin}"
    )
    return JoinedRun(store, heartbeat_store, replica, welcome.replicas, resume, [*notes, note])


def _header(config: Config, base: WeightFiles) -> Header:
    """What all replicas of a run must have in common."""
    return Header(config.model.path, fingerprint(base), replica_settings(config))


def _compare(run: Header, job: Header) -> None:
    if run.noise != NOISE:
        raise ConfigError(
            f"replicas.join: the run's noise is {run.noise}, this version's {NOISE}; "
            "install the run's version"
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
