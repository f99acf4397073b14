"""The ranks of a job, and how they form replicas.

A job has replicas × shard × tensor ranks. Each replica forms a default process group of its own
from its shard × tensor ranks, so that DeepSpeed and transformers see a plain world. Replicas share
a key-value store and no collective.
"""

import os
import socket
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from types import MappingProxyType

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from shardes.distributed.device import choose_backend, choose_device, device_name
from shardes.distributed.job_store import CheckResult, JobStore, keys_of_this_start
from shardes.distributed.ports import free_port
from shardes.distributed.rendezvous import wait_for_ranks, wait_for_store
from shardes.errors import ConfigError, RunError

# torch renamed all_gather_into_tensor. Both concatenate the ranks' tensors.
all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor

NOTHING: Mapping = MappingProxyType({})


@dataclass(frozen=True)
class Job:
    """The processes of one launcher: this one's global rank, their number, their store."""

    rank: int
    size: int
    store: dist.Store

    @property
    def keys(self) -> JobStore:
        """The store's keys, typed."""
        return JobStore(self.store)


@dataclass(frozen=True)
class World:
    """This rank's replica and its place in it.

    The primary job's replicas are numbered from 0 to `replicas` − 1. A job that joined the run has
    a higher number.
    """

    job: Job
    replica: int
    replicas: int
    mesh: DeviceMesh  # axes "shard" and "tensor"
    device: torch.device
    ranks_on_device: int = 1  # ranks of the replica that share the device

    @property
    def is_leader(self) -> bool:
        """Whether this rank is its replica's first, which uses the run's store."""
        return dist.get_rank() == 0

    @property
    def is_primary(self) -> bool:
        """Whether this is rank 0 of replica 0, which owns the run directory."""
        return self.is_leader and self.replica == 0

    @property
    def is_client(self) -> bool:
        """Whether this job joined a run that another job, the primary, owns."""
        return self.replica >= self.replicas

    @property
    def layout(self) -> dict[str, int | str]:
        """The job's ranks, replicas, shard and tensor degrees, and the name of the device."""
        shard, tensor = self.mesh.shape
        device = device_name(self.device)
        return dict(
            ranks=self.job.size, replicas=self.replicas, shard=shard, tensor=tensor, device=device
        )

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

    def run_on_leader(self, work: Callable[[], float | None]) -> float:
        """The number that `work` returns on the replica's leader, on every rank; 0.0 for None.

        Only the leader calls `work`; every rank of the replica calls this.

        Raises:
            ConfigError: on every rank, if `work` raises one.
        """
        value, problem = 0.0, None
        if self.is_leader:
            try:
                value = work() or 0.0
            except ConfigError as error:
                problem = error
        value, failed = self._broadcast(value, float(problem is not None))
        if failed:
            raise problem or ConfigError("the leader of this replica reports the mistake")
        return value

    def _broadcast(self, *values: float) -> list[float]:
        """The leader's values, float64, on every rank of the replica."""
        shared = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.broadcast(shared, src=0)
        return shared.tolist()


def join_job(timeout: float) -> Job:
    """Connect to the other processes of the launcher (`deepspeed`, `torchrun`, `srun`; none: a
    world of one).

    Raises:
        ConfigError: the environment is not a launcher's, or another run uses the port.
        RunError: ranks are missing after `timeout` seconds; names them, or the address without an
            answer.
    """
    rank, size, address, port = _launched_as()
    store_address = f"{address}:{port}"
    this_rank = f"rank {rank} of {size} on {socket.gethostname()}"
    # torchrun's own process may serve the store.
    agent_serves = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    serves = rank == 0 and not agent_serves
    if not serves:
        wait_for_store(address, port, this_rank, timeout)
    try:
        store: dist.Store = dist.TCPStore(
            address,
            port,
            size,
            serves,
            timedelta(seconds=timeout),
            wait_for_workers=False,
            multi_tenant=not agent_serves,
        )
        store = keys_of_this_start(store)
    except (dist.DistError, TimeoutError, RuntimeError) as error:
        if "EADDRINUSE" in str(error):
            raise ConfigError(
                f"MASTER_PORT={port}: in use on this host, perhaps by another run; "
                "start this one with --master_port and another number"
            ) from None
        reason = str(error).splitlines()[0]
        raise RunError(
            f"{this_rank}: no store at MASTER_ADDR:MASTER_PORT={store_address}: {reason}"
        ) from error
    try:
        wait_for_ranks(store, rank, size, store_address, timeout)
    except dist.DistError as error:
        reason = str(error).splitlines()[0]
        raise RunError(
            f"{this_rank}: waited for the other ranks at {store_address}: {reason}"
        ) from error
    return Job(rank, size, store)


def _launched_as() -> tuple[int, int, str, int]:
    """RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT; without a launcher, those of a single rank."""
    if "RANK" not in os.environ:
        os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    try:
        address = os.environ["MASTER_ADDR"]
        rank, size, port = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "MASTER_PORT"))
    except (KeyError, ValueError) as error:
        raise ConfigError(
            f"RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT: not as a launcher sets them: {error}"
        ) from None
    return rank, size, address, port


def agree(
    job: Job,
    problem: str | None,
    settings: str,
    report: Callable[[str], None],
    sources: Mapping[str, str] = NOTHING,
) -> bool:
    """Whether no rank has a problem and all have the same settings and sources; else rank 0 reports
    the first problem.

    Args:
        settings: the resolved settings as YAML.
        sources: the SHA-256s of what else decides the run: code, data, prompts.

    Every rank calls this after its cheap checks, before any starts heavy work, so that a mistake
    that only some ranks can see (a file missing on one host) ends them all.
    """
    own = CheckResult(problem or "", settings, dict(sources))
    job.keys.post_check(job.rank, own)
    if job.rank == 0:
        results = job.keys.checks(job.size)
        problems = [result.problem for result in results]
        if not any(problems):
            problems = [_difference(rank, result, own) for rank, result in enumerate(results)]
        reported = [
            text if rank == 0 else f"{text} (seen by rank {rank})"
            for rank, text in enumerate(problems)
            if text
        ]
        if reported:
            report(reported[0])
        job.keys.set_agreed(not reported)
    agreed = job.keys.agreed()
    if not agreed:
        leave_job(job, 10)
    return agreed


def _difference(rank: int, result: CheckResult, first: CheckResult) -> str:
    """How a rank's settings or sources differ from rank 0's; "" if they do not."""
    if result.settings != first.settings:
        return (
            f"rank {rank} has other settings than rank 0: start every host with the same config "
            "and overrides"
        )
    for key in sorted(result.sources.keys() | first.sources.keys()):
        if result.sources.get(key) != first.sources.get(key):
            return (
                f"rank {rank} has another {key} than rank 0: every host must see the same files, "
                "and a task must return the same prompts in the same order on every rank"
            )
    return ""


def leave_job(job: Job, seconds: float) -> list[int]:
    """Leave the job. Rank 0, which may serve the store, leaves after all others, or after
    `seconds`.

    A launcher ends all ranks as soon as one fails, so rank 0 must not fail before the others have
    left. Returns, on rank 0, the ranks that have not left.
    """
    try:
        job.keys.leave(job.rank)
    except dist.DistError:  # rank 0 is gone, and so nobody waits
        return []
    missing = list(range(job.size)) if job.rank == 0 else []
    deadline = time.monotonic() + seconds
    while missing:
        missing = [rank for rank in missing if not job.keys.has_left(rank)]
        if not missing or time.monotonic() > deadline:
            break
        time.sleep(0.05)
    return missing


def form_replica(
    job: Job, replicas: int, shard: int, tensor: int, timeout: float, joined_as: int | None = None
) -> World:
    """Make this rank's replica its default process group; RANK and WORLD_SIZE then describe the
    replica.

    Args:
        replicas: the primary job's number of replicas.
        joined_as: the replica's number, for a job that joins another job's run as one replica.
        timeout: seconds that a collective may take.
    """
    ranks = shard * tensor
    replica, rank = divmod(job.rank, ranks)
    assert job.size == (replicas * ranks if joined_as is None else ranks)
    replica = replica if joined_as is None else joined_as
    device = choose_device()
    first = job.rank - rank
    replica_ranks = range(first, first + ranks)
    backend, sharing = choose_backend(device, job.keys, job.rank, replica_ranks)
    dist.init_process_group(
        backend,
        store=dist.PrefixStore(f"replica{replica}", job.store),
        rank=rank,
        world_size=ranks,
        timeout=timedelta(seconds=timeout),
    )
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(ranks)}
    mesh = init_device_mesh(device.type, (shard, tensor), mesh_dim_names=("shard", "tensor"))
    return World(job, replica, replicas, mesh, device, sharing)
