"""How the processes of a job find each other, and name those that are missing."""

import os
import socket
import sys
import time

import torch.distributed as dist

from shardes.distributed.hosts import expected_hosts
from shardes.distributed.job_store import RendezvousStore
from shardes.errors import ConfigError, RunError

NOTICE = 30.0  # seconds after which a rank reports once that it is waiting


def wait_for_store(address: str, port: int, rank: str, timeout: float) -> None:
    """Wait until a process listens at MASTER_ADDR:MASTER_PORT; `rank` describes the waiting rank.

    Raises:
        RunError: none listened there within `timeout` seconds.
    """
    since = time.monotonic()
    noticed = os.environ.get("LOCAL_RANK", "0") != "0"  # one rank of each host reports
    while True:
        try:
            socket.create_connection((address, port), timeout=5).close()
            return
        except OSError as error:
            reason = error.strerror or str(error)
        waited = time.monotonic() - since
        status = (
            f"{rank}: no answer at MASTER_ADDR:MASTER_PORT={address}:{port} "
            f"for {waited:.0f} s ({reason})"
        )
        if waited > timeout:
            raise RunError(
                f"{status}; is rank 0 running there, and the port open between the hosts?"
            )
        if waited > NOTICE and not noticed:
            noticed = True
            report(f"{status}; trying for {timeout - waited:.0f} s more")
        time.sleep(0.2)


def wait_for_ranks(store: dist.Store, rank: int, size: int, address: str, timeout: float) -> None:
    """Wait until all ranks have arrived at the job's store, whose address is named in messages.

    Raises:
        ConfigError: the store belongs to another job.
        RunError: ranks were missing after `timeout` seconds; rank 0's error names them.
    """
    rendezvous_store, host = RendezvousStore(store), socket.gethostname()
    expected = rendezvous_store.agree_on_size(size)
    if expected != size or not rendezvous_store.claim_rank(rank):
        user = f"a job of {expected} ranks" if expected != size else f"another rank {rank}"
        raise ConfigError(
            f"rank {rank} of {size} on {host}: {address} is used by {user}: start every host with "
            "the same command and a node number of its own, or choose another --master_port if "
            "another run uses this one"
        )
    rendezvous_store.arrive(rank, host)
    if rank == 0:
        _wait_for_arrivals(rendezvous_store, size, address, host, timeout)
    elif not rendezvous_store.wait_complete(timeout + 10):  # rank 0 began to wait earlier
        raise RunError(
            f"rank {rank} of {size} on {host}: not all ranks arrived at {address}; "
            "rank 0 names the missing ones"
        )


def _wait_for_arrivals(
    rendezvous_store: RendezvousStore, size: int, address: str, host: str, timeout: float
) -> None:
    """Rank 0's part of `wait_for_ranks`."""
    since, noticed = time.monotonic(), False
    while rendezvous_store.arrived() < size:
        waited = time.monotonic() - since
        if waited > timeout:
            rendezvous_store.set_complete(False)
            time.sleep(1)  # the other ranks read it: this rank may serve the store
            missing = missing_ranks(rendezvous_store, size)
            raise RunError(f"after {waited:.0f} s not arrived at {address}: {missing}")
        if waited > NOTICE and not noticed:
            noticed = True
            report(
                f"waiting at {address} on {host}, for {timeout - waited:.0f} s more, "
                f"for {missing_ranks(rendezvous_store, size)}"
            )
        time.sleep(0.05)
    rendezvous_store.set_complete(True)


def missing_ranks(rendezvous_store: RendezvousStore, size: int) -> str:
    """The ranks that have not arrived, by node, with the host names that are known."""
    local_size = os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE")
    per_node = int(local_size or size)
    names = dict(enumerate(expected_hosts()))
    missing: dict[int, list[int]] = {}
    for rank in range(size):
        host = rendezvous_store.host(rank)
        if host is None:
            missing.setdefault(rank // per_node, []).append(rank)
        else:
            names[rank // per_node] = host
    return "; ".join(
        f"rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks))} of node {node}"
        + (f" ({names[node]})" if node in names else "")
        for node, ranks in missing.items()
    )


def report(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
