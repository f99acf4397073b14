"""The processes of a run: replicas × shard × tensor ranks, and how they meet.

Each replica is a world of its own: its `shard × tensor` ranks form their own default process group, so that
DeepSpeed and transformers see a plain world. Replicas meet in one key-value store and nowhere else.
"""

import json
import os
import random
import secrets
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from shardes.config import ConfigError, RunError
from shardes.rendezvous import meet, reach

# One name is newer, the other deprecated: all ranks' tensors, one after the other, into one.
all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


@dataclass
class Job:
    """What the launcher started: this process's global rank, their number, and the store they all see."""

    rank: int
    size: int
    store: dist.Store


@dataclass
class World:
    """This rank's replica, and its place in it.

    `store` is where the run's replicas meet, `near` where the ranks of this launch do: in the run's home they are one,
    with keys under `room`. In a replica that has joined, `store` leads to the home, and only the leading rank has it.
    `replicas` is the number of the home's; those that join have higher numbers.
    """

    job: Job
    replica: int
    replicas: int
    mesh: DeviceMesh  # axes "shard" and "tensor"
    device: torch.device
    room: str
    near: dist.Store
    store: dist.Store

    @property
    def leads(self) -> bool:
        """Whether this rank speaks for its replica in the store."""
        return dist.get_rank() == 0

    @property
    def speaks(self) -> bool:
        """Whether this rank prints and writes the run directory: rank 0 of replica 0."""
        return self.leads and self.replica == 0

    @property
    def joined(self) -> bool:
        """Whether this replica is of another launch than the run's home."""
        return self.replica >= self.replicas

    @property
    def layout(self) -> dict[str, int | str]:
        """How this launch's ranks are laid out, in figures."""
        shard, tensor = self.mesh.shape
        device = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else self.device.type
        return dict(ranks=self.job.size, replicas=self.replicas, shard=shard, tensor=tensor, device=device)

    def join(self, replica: int, replicas: int, store: dist.Store | None) -> None:
        """Be, from now on, a replica of another launch's run; `store` is there on the leading rank."""
        self.replica, self.replicas = replica, replicas
        if store is not None:
            self.store = store

    def sum_uint64(self, value: int) -> int:
        """The sum over the replica's ranks, modulo 2**64, of an integer in [0, 2**64)."""
        total = torch.tensor([value - 2**64 if value >= 2**63 else value], device=self.device)
        dist.all_reduce(total)
        return int(total.item()) % 2**64

    def sum(self, *values: float) -> list[float]:
        """The sums over the replica's ranks, in float64."""
        totals = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(totals)
        return totals.tolist()

    def led(self, work: Callable[[], list[float]], count: int) -> list[float]:
        """The `count` values of `work()` on the leading rank, which alone calls it, on every rank of the replica.

        Raises:
            ConfigError: on every rank, where `work` raises one.
        """
        values, problem = [0.0] * count, None
        if self.leads:
            try:
                values = work()
            except ConfigError as error:
                problem = error
        *values, failed = self.broadcast([*values, float(problem is not None)], count + 1)
        if failed:
            raise problem or ConfigError("the replica's leading rank says what is wrong")
        return values

    def broadcast(self, values: list[float] | None, count: int) -> list[float]:
        """The leading rank's `count` float64 values, on every rank of the replica."""
        shared = torch.tensor(values or [0.0] * count, dtype=torch.float64, device=self.device)
        dist.broadcast(shared, src=0)
        return shared.tolist()


def join_job(timeout: float) -> Job:
    """Meet the processes that the launcher started (`deepspeed`, `torchrun`, `srun`, or none: a world of one).

    Raises:
        ConfigError: the environment is not a launcher's, or the port at which they are to meet is another run's.
        RunError: they did not meet within `timeout` seconds; names who is missing, or what cannot be reached.
    """
    alone = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
    if "RANK" not in os.environ:
        os.environ |= alone | {"MASTER_PORT": str(free_port())}
    try:
        address = os.environ["MASTER_ADDR"]
        rank, size, port = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "MASTER_PORT"))
    except (KeyError, ValueError) as error:
        raise ConfigError(f"RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT: not as a launcher sets them: {error}") from None
    where, here = f"{address}:{port}", f"rank {rank} of {size} on {socket.gethostname()}"
    agents = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"  # torchrun's own process serves the store
    serves = rank == 0 and not agents
    if not serves:
        reach(address, port, here, timeout)
    try:
        limit = timedelta(seconds=timeout)
        store = dist.TCPStore(address, port, size, serves, limit, wait_for_workers=False, multi_tenant=not agents)
    except (dist.DistError, TimeoutError, RuntimeError) as error:
        if "EADDRINUSE" in str(error):
            message = f"MASTER_PORT={port}: in use on this host, perhaps by another run; "
            raise ConfigError(message + "start this one with --master_port and another number") from None
        raise RunError(f"{here}: no store at MASTER_ADDR:MASTER_PORT={where}: {str(error).splitlines()[0]}") from error
    try:
        meet(store, rank, size, where, timeout)
    except dist.DistError as error:
        raise RunError(f"{here}: waited for the others at {where}: {str(error).splitlines()[0]}") from error
    return Job(rank, size, store)


def agree(job: Job, problem: str | None, settings: str, say: Callable[[str], None]) -> bool:
    """Whether no rank has a problem and all have the same settings; else rank 0 hands the first problem to `say`.

    Every rank calls this once its cheap checks are done, before any starts heavy work, so that a mistake
    that only some ranks can see (a file missing on one host) ends them all.
    """
    job.store.set(f"checked/{job.rank}", json.dumps([problem or "", settings]))
    if job.rank == 0:
        found = [json.loads(job.store.get(f"checked/{rank}")) for rank in range(job.size)]
        problems = [text for text, _ in found]
        if not any(problems):
            differ = "has other settings than rank 0: start every host with the same config and overrides"
            problems = ["" if theirs == settings else f"rank {rank} {differ}" for rank, (_, theirs) in enumerate(found)]
        seen = [text if rank == 0 else f"{text} (seen by rank {rank})" for rank, text in enumerate(problems) if text]
        if seen:
            say(seen[0])
        job.store.set("agreed", "" if seen else "yes")
    agreed = bool(job.store.get("agreed"))
    if not agreed:
        part(job, 10)
    return agreed


def await_keys(
    store: dist.Store, keys: list[str], timeout: float, what: str, poll: Callable[[], None] = lambda: None
) -> None:
    """Wait until all keys are set, calling `poll` meanwhile.

    Not `store.wait`, which keeps every other thread of the process from the store.

    Raises:
        RunError: they were not within `timeout` seconds; names the missing ones. `what` says what they are.
    """
    since = time.monotonic()
    while not store.check(keys):
        poll()
        if time.monotonic() - since > timeout:
            missing = ", ".join(key for key in keys if not store.check([key]))
            raise RunError(f"{what}: after {timeout:.0f} s still missing: {missing}")
        rest(since)


def rest(since: float) -> None:
    """Sleep before the next look for what one has waited for since then: the longer, the longer one has waited.

    Ten thousand replicas that wait for one must not keep its host busy with their questions.
    """
    time.sleep(min(max((time.monotonic() - since) / 10, 0.02), 1.0))


def root(store: dist.Store) -> dist.TCPStore:
    """The store behind prefixes."""
    while isinstance(store, dist.PrefixStore):
        store = store.underlying_store
    assert isinstance(store, dist.TCPStore)
    return store


def connect_anew(store: dist.Store) -> dist.Store:
    """Another connection to the same store, for another thread."""
    return store.clone()  # type: ignore[attr-defined]  # torch's stubs lack it


def part(job: Job, seconds: float) -> list[int]:
    """Leave the job. Rank 0, which may serve the store, leaves last: after all others, or `seconds` at the most.

    The launcher, too, ends everyone when the first rank fails. Returns, on rank 0, the ranks that did not come.
    """
    job.store.set(f"parted/{job.rank}", "")
    missing = list(range(job.size)) if job.rank == 0 else []
    deadline = time.monotonic() + seconds
    while missing:
        missing = [rank for rank in missing if not job.store.check([f"parted/{rank}"])]
        if not missing or time.monotonic() > deadline:
            break
        time.sleep(0.05)
    return missing


def form_replica(job: Job, replicas: int, shard: int, tensor: int, timeout: float) -> World:
    """Make this rank's replica its default process group; the environment then shows the replica's world."""
    ranks = shard * tensor
    assert replicas * ranks == job.size
    replica, rank = divmod(job.rank, ranks)
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
        backend = "cpu:gloo,cuda:nccl"
    else:
        device, backend = torch.device("cpu"), "gloo"
    dist.init_process_group(
        backend,
        store=dist.PrefixStore(f"replica{replica}", job.store),
        rank=rank,
        world_size=ranks,
        timeout=timedelta(seconds=timeout),
    )
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(ranks)}
    mesh = init_device_mesh(device.type, (shard, tensor), mesh_dim_names=("shard", "tensor"))
    if job.rank == 0:
        job.store.set("room", secrets.token_hex(8))
    room = job.store.get("room").decode()
    store = dist.PrefixStore(room, root(job.store))
    return World(job, replica, replicas, mesh, device, room, store, store)


def free_port() -> int:
    """A port of this host that nobody listens on, and that the system gives to nobody who asks for just any."""
    for port in random.SystemRandom().sample(range(15000, 32768), 100):
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise RunError("this host has no free port among 100 tried between 15000 and 32767")
