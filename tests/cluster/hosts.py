"""Two hosts on this machine: network namespaces with a cable between them, names and ssh servers of
their own.
"""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from launch import ROOT

PROGRAMS = ("ip", "unshare", "ssh", "sshd", "ssh-keygen", "pdsh")
PATH = os.pathsep.join([os.environ["PATH"], "/usr/sbin", "/sbin"])
NAMES = ("host-a", "host-b")
ADDRESSES = ("10.77.0.1", "10.77.0.2")
INTERFACE = "cable0"

SSHD = """\
Port 22
HostKey {home}/host_key
AuthorizedKeysFile {home}/key.pub
StrictModes no
UsePAM no
PermitRootLogin yes
PidFile none
"""
SSH = """\
IdentityFile {home}/key
StrictHostKeyChecking no
UserKnownHostsFile /dev/null
LogLevel ERROR
ConnectTimeout 5
"""


def quietly(*command: str) -> None:
    subprocess.run(
        command, check=True, capture_output=True, timeout=30, env=os.environ | {"PATH": PATH}
    )


class Hosts:
    """A context in which the two exist; afterwards nothing of them is left. Needs root.

    As on many machines a host's own name is, on it, a loopback address, of no use to the other.
    """

    def __enter__(self) -> "Hosts":
        self.home = Path(tempfile.mkdtemp(prefix="shardes-hosts-"))
        self._spaces = [f"shardes-{os.getpid()}-{name}" for name in NAMES]
        self._processes: list[subprocess.Popen] = []
        try:
            self._start()
        except BaseException:
            self.__exit__()
            raise
        return self

    def _start(self) -> None:
        home = self.home
        for key in ("key", "host_key"):
            quietly("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(home / key))
        (home / "ssh_config").write_text(SSH.format(home=home))
        wrapper = (
            home / "bin" / "ssh"
        )  # what deepspeed and pdsh call has no place for a config file
        wrapper.parent.mkdir()
        wrapper.write_text(
            f'#!/bin/sh\nexec {shutil.which("ssh", path=PATH)} -F {home}/ssh_config "$@"\n'
        )
        wrapper.chmod(0o755)
        for space in self._spaces:
            quietly("ip", "netns", "add", space)
        ends = [word for space in self._spaces for word in ("name", INTERFACE, "netns", space)]
        quietly("ip", "link", "add", *ends[:4], "type", "veth", "peer", *ends[4:])
        for number, (space, address) in enumerate(zip(self._spaces, ADDRESSES, strict=True)):
            for interface in ("lo", INTERFACE):
                quietly("ip", "-n", space, "link", "set", interface, "up")
            quietly("ip", "-n", space, "address", "add", f"{address}/24", "dev", INTERFACE)
            known = Path("/etc/netns") / space  # where `ip netns exec` looks
            known.mkdir(parents=True)
            peer = f"{ADDRESSES[1 - number]} {NAMES[1 - number]}"
            (known / "hosts").write_text(
                f"127.0.0.1 localhost\n127.0.1.1 {NAMES[number]}\n{peer}\n"
            )
            (home / "sshd_config").write_text(SSHD.format(home=home))
            sshd = shutil.which("sshd", path=PATH)
            server = (
                "mount -t tmpfs none /run && mkdir /run/sshd && "
                f"exec {sshd} -D -e -f {home}/sshd_config"
            )
            self.start(number, ["sh", "-c", server], home / f"sshd{number}.log")
        for name in NAMES:
            self._await_ssh(name)

    def _await_ssh(self, name: str) -> None:
        number = 1 - NAMES.index(name)  # from the other one
        for _ in range(50):
            found = self.start(number, ["ssh", name, "hostname"], self.home / "probe.log")
            if found.wait(20) == 0:
                return
            time.sleep(0.2)
        raise AssertionError(
            (self.home / "probe.log").read_text() + (self.home / "sshd0.log").read_text()
        )

    def start(
        self, number: int, command: Sequence[str], log: Path, **environ: str
    ) -> subprocess.Popen:
        """Start a command on a host, in the repository; what it prints goes to the end of `log`."""
        inside = f'hostname {NAMES[number]} && exec "$@"'
        env = {
            key: value
            for key, value in os.environ.items()
            if key not in ("OMP_NUM_THREADS", "NUMBA_NUM_THREADS")
        }
        with open(log, "a") as out:
            process = subprocess.Popen(
                [
                    "ip",
                    "netns",
                    "exec",
                    self._spaces[number],
                    "unshare",
                    "--uts",
                    "sh",
                    "-c",
                    inside,
                    "sh",
                    *command,
                ],
                cwd=ROOT,
                env=env
                | {"PATH": f"{self.home}/bin:{Path(sys.executable).parent}:{PATH}", **environ},
                stdout=out,
                stderr=out,
                start_new_session=True,
            )
        self._processes.append(process)
        return process

    def end(self, process: subprocess.Popen) -> None:
        """Kill a command that `start` has started, and what it has started in turn."""
        os.killpg(process.pid, signal.SIGKILL)
        process.wait(10)

    def cut(self) -> None:
        """Pull the cable out."""
        quietly("ip", "-n", self._spaces[1], "link", "set", INTERFACE, "down")

    def plug(self) -> None:
        """Put it back."""
        quietly("ip", "-n", self._spaces[1], "link", "set", INTERFACE, "up")

    def processes(self) -> list[int]:
        """The processes on both."""
        found = []
        for space in self._spaces:
            if (Path("/run/netns") / space).exists():
                done = subprocess.run(
                    ["ip", "netns", "pids", space], capture_output=True, text=True, timeout=30
                )
                found += map(int, done.stdout.split())
        return found

    def __exit__(self, *_) -> None:
        for _ in range(3):
            for process in self.processes():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process, signal.SIGKILL)
            time.sleep(0.1)
        for process in self._processes:
            process.wait(10)
        for space in self._spaces:
            with contextlib.suppress(subprocess.CalledProcessError):
                quietly("ip", "netns", "delete", space)
            shutil.rmtree(Path("/etc/netns") / space, ignore_errors=True)
        shutil.rmtree(self.home, ignore_errors=True)
