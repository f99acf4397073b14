"""How the launcher's processes find each other, and who is named when some do not come."""

import os
import socket
import sys
import time
from datetime import timedelta

import torch.distributed as dist

from shardes.config import ConfigError, RunError
from shardes.hosts import expected_hosts

NOTICE = 30.0  # seconds after which it is said, once, who is waited for


def reach(address: str, port: int, here: str, timeout: float) -> None:
    """Wait until someone listens at MASTER_ADDR:MASTER_PORT; `here` is who waits.

    Raises:
        RunError: nobody did within `timeout` seconds.
    """
    since, noticed = time.monotonic(), os.environ.get("LOCAL_RANK", "0") != "0"  # one rank of a host speaks
    while True:
        try:
            socket.create_connection((address, port), timeout=5).close()
            return
        except OSError as error:
            reason = error.strerror or str(error)
        waited = time.monotonic() - since
        what = f"{here}: no answer at MASTER_ADDR:MASTER_PORT={address}:{port} for {waited:.0f} s ({reason})"
        if waited > timeout:
            raise RunError(what + "; is rank 0 running there, and the port open between the hosts?")
        if waited > NOTICE and not noticed:
            noticed = True
            say(f"{what}; trying for {timeout - waited:.0f} s more")
        time.sleep(0.2)


def meet(store: dist.Store, rank: int, size: int, where: str, timeout: float) -> None:
    """Wait until all ranks are here; rank 0 looks who is missing. `where` names the store.

    Raises:
        ConfigError: the store is another run's.
        RunError: not all came within `timeout` seconds; rank 0's says who.
    """
    # torchrun's agents keep one store when they start their ranks again.
    hall = dist.PrefixStore(f"meeting {os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
    host = socket.gethostname()
    expected = int(hall.compare_set("size", "", str(size)))
    if expected != size or hall.add(f"rank/{rank}", 1) > 1:
        held = f"a job of {expected} ranks" if expected != size else f"another rank {rank}"
        raise ConfigError(
            f"rank {rank} of {size} on {host}: {where} is the meeting place of {held}: start every host with the same "
            "command and a node number of its own, or, where it is another run's, with another --master_port"
        )
    hall.set(f"host/{rank}", host)
    hall.add("came", 1)
    if rank:
        hall.wait(["met"], timedelta(seconds=timeout + 10))  # rank 0 has been waiting for longer
        if not hall.get("met"):
            raise RunError(f"rank {rank} of {size} on {host}: not all ranks have come to {where}; rank 0 says which")
        return
    since, noticed = time.monotonic(), False
    while hall.add("came", 0) < size:
        waited = time.monotonic() - since
        if waited > timeout:
            hall.set("met", "")
            time.sleep(1)  # for the others to read it: this rank may serve the store
            raise RunError(f"after {waited:.0f} s have not come to {where}: {missing_ranks(hall, size)}")
        if waited > NOTICE and not noticed:
            noticed = True
            say(f"waiting at {where} on {host}, for {timeout - waited:.0f} s more, for {missing_ranks(hall, size)}")
        time.sleep(0.05)
    hall.set("met", "yes")


def missing_ranks(hall: dist.Store, size: int) -> str:
    """Which ranks have not come, by node, with the hosts' names where they are known."""
    per_node = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or size)  # torchrun, deepspeed
    names = dict(enumerate(expected_hosts()))
    nodes: dict[int, list[int]] = {}
    for rank in range(size):
        if not hall.check([f"host/{rank}"]):
            nodes.setdefault(rank // per_node, []).append(rank)
        else:
            names[rank // per_node] = hall.get(f"host/{rank}").decode()
    return "; ".join(
        f"rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks))} of node {node}"
        + (f" ({names[node]})" if node in names else "")
        for node, ranks in nodes.items()
    )


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
