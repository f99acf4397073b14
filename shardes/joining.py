"""How a replica of another launch comes into a run: what the home tells it, and what it must have in common."""

import json
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch.distributed as dist

from shardes import resume
from shardes.config import Config, ConfigError
from shardes.door import Door, enter, token_of
from shardes.files import differing
from shardes.journal import Header, Record
from shardes.noise.definition import NOISE
from shardes.resume import DECISIVE, Start
from shardes.weights import WeightFiles
from shardes.world import World, await_keys, root

SHARED = [*DECISIVE, "es.iterations", "eval.every", "task.test"]  # settings that all replicas of a run must have


@contextmanager
def open_door(config: Config, base: WeightFiles, world: World, records: Sequence[Record]) -> Iterator[str]:
    """A context in which replicas can join the run; for its rank 0. Yields the address, written HOST:PORT.

    `records` are those of the journal. The address is also in run.dir's file `meeting`.
    """
    directory, store = Path(config.run.dir), world.store
    for record in records:
        store.set(f"record/{record.iteration}", json.dumps(asdict(record)))
    store.add("replicas", world.replicas)
    header = Header(config.model.path, base.fingerprint(), resume.values(config, SHARED))
    store.set("welcome", json.dumps([asdict(header), world.replicas]))
    token = token_of(directory, make=True)
    door = Door(
        config.replicas.host,
        config.replicas.port or 0,
        token,
        root(world.job.store),
        world.room,
        config.replicas.timeout,
    )
    address = f"{config.replicas.host or socket.gethostname()}:{door.port}"
    file = directory / "meeting"
    try:
        file.write_text(address + "\n")
        yield address
    finally:
        file.unlink(missing_ok=True)
        door.close()


@dataclass
class Joined:
    """A place in a run: `replica` is this one's number, `replicas` how many the home's launch has."""

    store: dist.Store
    beats: dist.Store  # another connection to it
    replica: int
    replicas: int
    start: Start
    notes: list[str]


def join_world(world: World, place: Joined | None) -> dist.Store | None:
    """Make a launch's ranks a replica of the run in which rank 0 has a place; returns its connection for signs of life.

    Raises:
        ConfigError: the launch has more ranks than one replica.
    """
    if place:
        world.near.set("place", json.dumps([place.replica, place.replicas]))
    replica, replicas = json.loads(world.near.get("place"))
    world.join(replica, replicas, place.store if place else None)
    return place.beats if place else None


def join_run(config: Config, base: WeightFiles) -> Joined:
    """Come in through the door at `replicas.join`, and find out where the run stands; for rank 0 of a launch.

    The center begins from a snapshot, where `run.dir` is the run's own, or from the base model.

    Raises:
        ConfigError: nobody lets this replica in, or it has another base model, noise or settings than the run.
    """
    address, directory = config.replicas.join, Path(config.run.dir)
    assert address is not None
    token = token_of(directory)
    store, beats = (enter(address, token, config.replicas.timeout) for _ in range(2))
    header, replicas = json.loads(store.get("welcome"))
    _compare(Header(**header), Header(config.model.path, base.fingerprint(), resume.values(config, SHARED)))
    await_keys(store, ["now"], config.run.timeout, "the run's home is not ready")
    iteration, digest = json.loads(store.get("now"))
    records = [Record(**json.loads(store.get(f"record/{number}"))) for number in range(iteration)]
    digests = [*(record.digest for record in records), digest]
    begin = resume.newest_sound([directory], iteration, lambda number: digests[number])
    start = Start(iteration, begin.source, begin.digest, digest, records[begin.iteration :])
    replica = store.add("replicas", 1) - 1
    note = f"joined the run at {address} as replica {replica}, in iteration {iteration}: {start.origin}"
    return Joined(store, beats, replica, replicas, start, [*begin.notes, note])


def _compare(theirs: Header, ours: Header) -> None:
    if theirs.noise != NOISE:
        raise ConfigError(
            f"replicas.join: the run's noise is {theirs.noise}, this version's {NOISE}; install the run's version"
        )
    if differ := differing(theirs.files, ours.files):
        then, now = (files.get(differ[0], "missing")[:16] for files in (theirs.files, ours.files))
        raise ConfigError(
            f"model.path={ours.model}: {differ[0]} is not the run's (SHA-256 {now}, the run's {then}); "
            "join with the base model that the run began with"
        )
    for key, value in theirs.settings.items():
        if ours.settings.get(key) != value:
            raise ConfigError(f"{key}={ours.settings.get(key)}: the run has {value}; join with the run's config")
