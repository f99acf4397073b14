"""What makes a replica on CPUs fast: dense layers through oneDNN, sums over its ranks through shared memory."""

import fcntl
import os
import socket
import sys
import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.tensor import DTensor

from shardes.config import RunError


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """`F.linear`; in float32 on a CPU through oneDNN, as torch does for bfloat16 by itself.

    torch hands float32 to MKL, which for the few rows of a decode step can take several times as long.
    """
    if x.device.type == "cpu" and x.dtype == torch.float32 and torch.backends.mkldnn.is_available():
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return F.linear(x, weight, bias)


def speed_up(module: nn.Module) -> None:
    """Let a module's plain linear layers use `linear`."""
    for part in module.modules():
        if type(part) is nn.Linear and not isinstance(part.weight, DTensor):
            part.forward = partial(forward, part)  # type: ignore[method-assign]


def forward(layer: Any, x: torch.Tensor) -> torch.Tensor:
    """What a layer with `weight` and `bias` makes of x, through `linear`."""
    return linear(x, layer.weight, layer.bias)


def load_operation() -> None:
    """Build, once, or load DeepSpeed's operation for sums through shared memory.

    torch marks a build by a file, which outlives a process that is killed, and waits for it to go. So the
    operation has a directory of its own, used by one process at a time under a lock that the system frees: a mark
    found there is a dead one's.

    Raises:
        RunError: another process has held the lock for ten minutes.
    """
    from deepspeed.comm.torch import build_shm_op  # the other engine does without deepspeed
    from torch.utils.cpp_extension import get_default_build_root

    given = os.environ.get("TORCH_EXTENSIONS_DIR")
    installed = zlib.crc32(f"{sys.prefix} {sys.version}".encode())
    directory = Path(given or get_default_build_root()) / f"shardes_{torch.__version__}_{installed:08x}"
    directory.mkdir(parents=True, exist_ok=True)
    with open(directory / "in_use", "w") as lock:
        deadline = time.monotonic() + 600
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise RunError(f"{directory}: in use by another process for ten minutes; end it") from None
                time.sleep(0.05)
        for mark in directory.glob("*/lock"):
            mark.unlink()
        os.environ["TORCH_EXTENSIONS_DIR"] = str(directory)
        try:
            build_shm_op()
        finally:
            del os.environ["TORCH_EXTENSIONS_DIR"]
            if given is not None:
                os.environ["TORCH_EXTENSIONS_DIR"] = given


@contextmanager
def shared_memory(replica: int) -> Iterator[bool]:
    """A context for `deepspeed.init_distributed`: whether it sets up sums through shared memory.

    The operation that does is built or loaded on entering. It does where all ranks of the default process group are on
    one host. DeepSpeed names the memory by the job's port, which other replicas have too, and leaves it behind: here
    each replica has its own name, which is gone once all ranks have the memory in hand.
    """
    host = torch.tensor([zlib.crc32(socket.gethostname().encode())])
    load_operation()
    least, most = host.clone(), host.clone()
    dist.all_reduce(least, dist.ReduceOp.MIN)
    dist.all_reduce(most, dist.ReduceOp.MAX)
    local = bool(least == most)
    address, port = os.environ["MASTER_ADDR"], f"{os.environ['MASTER_PORT']}_{replica}"
    names = {"LOCAL_SIZE": str(dist.get_world_size()) if local else "0", "MASTER_PORT": port}
    before = {name: os.environ.pop(name, None) for name in names}
    os.environ |= names
    try:
        yield local
    finally:
        for name, value in before.items():
            del os.environ[name]
            if value is not None:
                os.environ[name] = value
    dist.barrier()
    segment = f"deepspeed_allreduce_buffer_{os.getuid()}_{address}_{port}_{dist.get_rank()}"
    Path("/dev/shm", segment).unlink(missing_ok=True)
