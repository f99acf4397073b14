"""Faster all-reduces on CPUs: DeepSpeed's shared memory."""

import fcntl
import os
import socket
import sys
import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import torch
import torch.distributed as dist

from shardes.errors import ConfigError, RunError

SHARED_MEMORY = Path("/dev/shm")
SEGMENT = "deepspeed_allreduce_buffer"
ABANDONED_AFTER = 60.0  # seconds; a run opens its segments within moments of each other


def load_shared_memory_op() -> None:
    """Load DeepSpeed's operation for all-reduces through shared memory; build it the first time.

    torch's build creates a lock file. If the process is killed, the file stays and every later
    build waits for it forever. So the operation has a directory of its own, which one process at a
    time uses under a lock that the operating system frees; a lock file of torch's there is stale.

    Raises:
        ConfigError: the directory for extensions cannot be written.
        RunError: another process has held the lock for ten minutes.
    """
    from deepspeed.comm.torch import build_shm_op  # engine=fsdp does not need deepspeed
    from torch.utils.cpp_extension import get_default_build_root

    extensions = os.environ.get("TORCH_EXTENSIONS_DIR")
    installation = zlib.crc32(f"{sys.prefix} {sys.version}".encode())
    name = f"shardes_{torch.__version__}_{installation:08x}"
    directory = Path(extensions or get_default_build_root()) / name
    try:
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "in_use").touch()
    except OSError as error:
        raise ConfigError(
            f"TORCH_EXTENSIONS_DIR: {directory} cannot be written ({error.strerror}), and an "
            "extension of DeepSpeed's must be built there; set it to a directory that can be"
        ) from None
    with open(directory / "in_use", "w") as lock, _environment(TORCH_EXTENSIONS_DIR=str(directory)):
        _lock(lock, directory)
        for stale in directory.glob("*/lock"):
            stale.unlink()
        build_shm_op()


def _lock(file: IO[str], directory: Path) -> None:
    deadline = time.monotonic() + 600
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if time.monotonic() > deadline:
                raise RunError(
                    f"{directory}: another process has used it for ten minutes; end that process"
                ) from None
            time.sleep(0.05)


@contextmanager
def _environment(**variables: str) -> Iterator[None]:
    """A context in which environment variables have these values."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ |= variables
    try:
        yield
    finally:
        for name, value in before.items():
            del os.environ[name]
            if value is not None:
                os.environ[name] = value


@contextmanager
def shared_memory(replica: int) -> Iterator[bool]:
    """A context for `deepspeed.init_distributed`: whether it all-reduces through shared memory.

    It does if all ranks of the default process group are on one host. DeepSpeed names the memory
    after the job's port, which other replicas have too, and never removes the name. Here each
    replica has a name of its own, removed once all its ranks have opened the memory.
    """
    load_shared_memory_op()
    remove_abandoned_segments()
    host = torch.tensor([zlib.crc32(socket.gethostname().encode())])
    lowest, highest = host.clone(), host.clone()
    dist.all_reduce(lowest, dist.ReduceOp.MIN)
    dist.all_reduce(highest, dist.ReduceOp.MAX)
    one_host = bool(lowest == highest)
    address, port = os.environ["MASTER_ADDR"], f"{os.environ['MASTER_PORT']}_{replica}"
    local_size = str(dist.get_world_size()) if one_host else "0"
    with _environment(LOCAL_SIZE=local_size, MASTER_PORT=port):
        yield one_host
    dist.barrier()
    segment = f"{SEGMENT}_{os.getuid()}_{address}_{port}_{dist.get_rank()}"
    (SHARED_MEMORY / segment).unlink(missing_ok=True)


def remove_abandoned_segments() -> None:
    """Remove the names of shared memory that runs of this user left when they were killed while
    starting.

    A segment has a name only while its run starts. It is abandoned if no process maps it; one that
    is new may belong to a process that is about to, or to another container, and is left.
    """
    found = SHARED_MEMORY.glob(f"{SEGMENT}_{os.getuid()}_*")
    segments = [path for path in found if _age(path) > ABANDONED_AFTER]
    used = "".join(map(_mapped, Path("/proc").glob("[0-9]*"))) if segments else ""
    for path in segments:
        if str(path) not in used:
            path.unlink(missing_ok=True)


def _age(path: Path) -> float:
    try:
        return time.time() - path.stat().st_mtime
    except FileNotFoundError:  # another rank has removed it
        return 0.0


def _mapped(process: Path) -> str:
    try:
        return (process / "maps").read_text(errors="replace")
    except OSError:  # it has ended, or is another user's
        return ""
