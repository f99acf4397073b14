"""The hosts of a job: from DeepSpeed's hostfile, its launcher's arguments, or SLURM's node list."""

import base64
import json
import os
import re
import subprocess
from pathlib import Path

from shardes.errors import ConfigError

LINE = re.compile(r"(\w[\w.@:-]*)\s+slots=([1-9]\d*)(\s+#.*)?", re.ASCII)


def parse_hostfile(text: str, name: str) -> dict[str, int]:
    """The number of slots (ranks) of each host; `name` is the file's.

    Raises:
        ConfigError: an invalid line, a duplicate host, no host, or unequal numbers of slots.
    """
    hosts: dict[str, int] = {}
    for number, line in enumerate(map(str.strip, text.splitlines()), 1):
        if not line or line.startswith("#"):
            continue
        match = LINE.fullmatch(line)
        if not match:
            raise ConfigError(f"{name}, line {number}: {line!r}: a line is written HOST slots=N")
        host, slots = match[1], int(match[2])
        if host in hosts:
            raise ConfigError(f"{name}, line {number}: {host} is listed twice: one line per host")
        hosts[host] = slots
    if not hosts:
        raise ConfigError(f"{name}: names no host; a line is written HOST slots=N")
    check_equal(hosts, name)
    return hosts


def read_hostfile(path: str) -> dict[str, int]:
    """The number of slots of each host in a hostfile.

    Raises:
        ConfigError: as `parse_hostfile`, or the file cannot be read.
    """
    try:
        return parse_hostfile(Path(path).read_text(encoding="utf-8"), path)
    except (OSError, UnicodeDecodeError) as error:
        reason = "no such file" if isinstance(error, FileNotFoundError) else str(error)
        raise ConfigError(
            f"hostfile {path}: {reason}; deepspeed would run on this host alone"
        ) from None


def check_equal(hosts: dict[str, int], name: str) -> None:
    """Raise ConfigError if hosts have different numbers of slots."""
    first = next(iter(hosts))
    for host, slots in hosts.items():
        if slots != hosts[first]:  # LOCAL_RANK, and so the GPU of a rank, would be wrong
            raise ConfigError(
                f"{name}: {first} has {hosts[first]} slots and {host} {slots}: "
                "give all the same number"
            )


def slurm_hosts() -> list[str]:
    """The names of the SLURM job's nodes, in order.

    Raises:
        ConfigError: this is no SLURM job, or SLURM does not answer.
    """
    nodes = os.environ.get("SLURM_STEP_NODELIST") or os.environ.get("SLURM_JOB_NODELIST")
    if not nodes:
        raise ConfigError("SLURM_JOB_NODELIST is not set: this is no SLURM job")
    try:
        command = ["scontrol", "show", "hostnames", nodes]
        return subprocess.run(
            command, capture_output=True, text=True, timeout=10, check=True
        ).stdout.split()
    except (OSError, subprocess.SubprocessError) as error:
        raise ConfigError(f"scontrol show hostnames {nodes}: {error}") from None


def expected_hosts() -> list[str]:
    """The names of the job's hosts by node number, if deepspeed's launcher or SLURM lists them."""
    try:
        return list(_deepspeed_hosts()) or slurm_hosts()
    except ConfigError:
        return []


def check_launcher() -> None:
    """Raise ConfigError if deepspeed's launcher ignored a hostfile or found unequal slots."""
    check_equal(_deepspeed_hosts() or {"": 0}, "hostfile")
    launcher = os.getppid()
    if "deepspeed.launcher.launch" not in _arguments(launcher):
        return
    path = _option(_arguments(_parent(launcher)), "--hostfile", "-H")
    if path and not Path(path).is_file():  # deepspeed only warns, and goes on with this host
        read_hostfile(path)


def _deepspeed_hosts() -> dict[str, int]:
    """The number of slots of each host in the arguments of deepspeed's launcher, the parent."""
    arguments = _arguments(os.getppid())
    if "deepspeed.launcher.launch" not in arguments:
        return {}
    encoded = _option(arguments, "--world_info")
    if not encoded:
        return {}
    return {
        host: len(slots) for host, slots in json.loads(base64.urlsafe_b64decode(encoded)).items()
    }


def _option(arguments: list[str], *names: str) -> str | None:
    for argument, following in zip(arguments, [*arguments[1:], ""], strict=True):
        for name in names:
            if argument == name:
                return following
            if argument.startswith(name + "="):
                return argument.removeprefix(name + "=")
    return None


def _arguments(process: int) -> list[str]:
    try:
        text = Path(f"/proc/{process}/cmdline").read_text(encoding="utf-8", errors="replace")
    except OSError:  # the process has ended
        return []
    return text.split("\0")[:-1]


def _parent(process: int) -> int:
    try:
        status = Path(f"/proc/{process}/status").read_text()
    except OSError:
        return 0
    match = re.search(r"^PPid:\s*(\d+)", status, re.MULTILINE)
    return int(match[1]) if match else 0
