"""Which device a rank computes on, and which backends its collectives have."""

import os
import socket
import sys

import torch
import torch.distributed as dist

from shardes.distributed.job_store import JobStore

ACCELERATORS = ("cuda", "xpu")  # torch's name for AMD's GPUs is "cuda" too


def choose_device() -> torch.device:
    """This rank's device, which becomes the current one: of those that it sees, number LOCAL_RANK.

    A scheduler may show each task one device only, as number 0, so the count wraps around. Then
    LOCAL_RANK becomes the device's number, for which DeepSpeed and torch take it.
    """
    accelerator = (
        torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    )
    if accelerator is None or accelerator.type not in ACCELERATORS:
        return torch.device("cpu")
    index = int(os.environ["LOCAL_RANK"]) % torch.accelerator.device_count()
    torch.accelerator.set_device_index(index)
    os.environ["LOCAL_RANK"] = str(index)
    return torch.device(accelerator.type, index)


def device_name(device: torch.device) -> str:
    """The name that a device's vendor gives it, or cpu."""
    if device.type == "cpu":
        return "cpu"
    return torch.get_device_module(device).get_device_name(device)


def choose_backend(
    device: torch.device, keys: JobStore, rank: int, replica: range
) -> tuple[str, int]:
    """The backends of a replica's process group, for `init_process_group`, and how many of its
    ranks share this rank's device.

    The backends are gloo for tensors on CPUs, and that of the device, NCCL or XCCL, for the others.
    Those refuse two ranks on one device; then gloo serves all.

    Args:
        keys: the job's store. Every rank of the replica calls this.
        rank: of this process in the job.
        replica: the ranks of the replica.
    """
    if device.type == "cpu":
        return "gloo", 1
    sharing = 1
    backend = dist.get_default_backend_for_device(device)
    if len(replica) > 1:
        keys.post_device(rank, unique_name(device))
        names = keys.devices(replica)
        sharing = names.count(names[rank - replica.start])
        if len(set(names)) < len(names):
            if rank == replica.start:
                print(_shared_device_warning(names, replica, backend), file=sys.stderr, flush=True)
            backend = "gloo"
    return f"cpu:gloo,{device.type}:{backend}", sharing


def unique_name(device: torch.device) -> str:
    """A name that only ranks on the same device of the same host share."""
    properties = torch.get_device_module(device).get_device_properties(device)
    return f"{socket.gethostname()} {device.type} {getattr(properties, 'uuid', device.index)}"


def _shared_device_warning(names: list[str], replica: range, backend: str) -> str:
    shared = next(name for name in names if names.count(name) > 1)
    ranks = [rank for rank, name in zip(replica, names, strict=True) if name == shared]
    return (
        f"WARNING: ranks {ranks} share one device, which {backend} does not support: their "
        "collectives go through gloo and the host, which is slow and for trying out only"
    )
