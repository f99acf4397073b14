"""A SLURM of two nodes on this machine, in a directory of its own."""

import contextlib
import getpass
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from launch import ROOT, free_port

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol")

CONF = """\
ClusterName=shardes
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
FirstJobId={first}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={home}/munge.socket
CredType=cred/munge
StateSaveLocation={home}/state
SlurmdSpoolDir={home}/spool.%n
SlurmctldPidFile={home}/slurmctld.pid
SlurmdPidFile={home}/slurmd.%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
ReturnToService=2
SchedulerParameters=batch_sched_delay=0,sched_min_interval=100000
SlurmdParameters=config_overrides
KillWait=10
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=4 RealMemory=4000
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=4 RealMemory=4000
PartitionName=main Nodes=n1,n2 Default=YES PriorityTier=1
PartitionName=urgent Nodes=n1,n2 PriorityTier=2 PreemptMode=OFF
"""


class Slurm:
    """A context in which it runs; afterwards no process of it, nor of its jobs, is left.

    Daemons stay in the foreground, as children. Its commands and jobs also get the environment
    variables `environ`.
    """

    def __init__(self, **environ: str):
        self._given = environ

    def __enter__(self) -> "Slurm":
        self.home = Path(tempfile.mkdtemp(prefix="shardes-slurm-"))
        self.home.chmod(0o755)  # munged asks for it
        self._daemons: list[subprocess.Popen] = []
        environ = {
            key: value
            for key, value in os.environ.items()
            if key not in ("OMP_NUM_THREADS", "NUMBA_NUM_THREADS")
        }
        path = os.pathsep.join(
            [str(Path(sys.executable).parent), os.environ["PATH"], "/usr/sbin", "/sbin"]
        )
        self._environ = (
            environ | {"SLURM_CONF": str(self.home / "slurm.conf"), "PATH": path} | self._given
        )
        try:
            self._start()
        except BaseException:
            self.__exit__()
            raise
        return self

    def _start(self) -> None:
        home = self.home
        key = home / "munge.key"
        key.touch(mode=0o600)
        key.write_bytes(os.urandom(128))
        for name in ("state", "spool.n1", "spool.n2"):
            (home / name).mkdir()
        ports = [free_port() for _ in range(3)]
        first = random.randrange(1000, 1000000)  # jobs' ports come from their numbers
        conf = CONF.format(
            home=home, host=socket.gethostname(), user=getpass.getuser(), ports=ports, first=first
        )
        (home / "slurm.conf").write_text(conf)
        munge = {f"--{name}-file": home / f"munge.{name}" for name in ("key", "pid", "log", "seed")}
        self._daemon(
            "munged",
            "--foreground",
            f"--socket={home}/munge.socket",
            *(f"{k}={v}" for k, v in munge.items()),
        )
        self._await("munged", lambda: (home / "munge.socket").exists())
        self._daemon("slurmctld", "-D", "-c")
        for node in ("n1", "n2"):
            self._daemon("slurmd", "-D", "-N", node)
        self._await(
            "both nodes",
            lambda: self.command("sinfo", "-h", "-p", "main", "-o", "%t %D").stdout == "idle 2\n",
        )

    def _daemon(self, *command: str) -> None:
        log = open(self.home / f"{len(self._daemons)}-{command[0]}.out", "a")
        program = shutil.which(command[0], path=self._environ["PATH"])
        process = subprocess.Popen(
            [program, *command[1:]], env=self._environ, stdout=log, stderr=log, cwd=self.home
        )
        self._daemons.append(process)

    def _await(self, what: str, holds, seconds: float = 60) -> None:
        deadline = time.monotonic() + seconds
        while not holds():
            if time.monotonic() > deadline:
                raise AssertionError(f"after {seconds} s no {what}\n{self.logs()}")
            time.sleep(0.1)

    def logs(self) -> str:
        return "\n".join(f"{file}:\n{file.read_text()[-2000:]}" for file in self.home.glob("*.out"))

    def command(self, *command: str, seconds: float = 60) -> subprocess.CompletedProcess:
        return subprocess.run(
            command,
            env=self._environ,
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=seconds,
            check=False,
        )

    def submit(self, *arguments: str, output: Path) -> str:
        """`sbatch ARGUMENTS` in the repository; returns the job's number."""
        done = self.command(
            "sbatch", "--parsable", f"--output={output}", "--open-mode=append", *arguments
        )
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    def state(self, job: str) -> dict[str, str]:
        """What `scontrol show job` says of it, by key."""
        text = self.command("scontrol", "show", "job", "-o", job).stdout
        return dict(entry.split("=", 1) for entry in text.split() if "=" in entry)

    def wait(self, job: str, seconds: float = 900, states: tuple[str, ...] = ()) -> dict[str, str]:
        """The job's state once it is at one of `states`, or has ended."""
        ends = states or (
            "COMPLETED",
            "FAILED",
            "CANCELLED",
            "TIMEOUT",
            "NODE_FAIL",
            "BOOT_FAIL",
            "OUT_OF_MEMORY",
        )
        deadline = time.monotonic() + seconds
        while (state := self.state(job)).get("JobState") not in ends:
            assert time.monotonic() < deadline, (
                f"job {job}: after {seconds} s {state}\n{self.logs()}"
            )
            time.sleep(0.2)
        return state

    def processes(self) -> list[int]:
        """The processes that live with this SLURM's configuration: its daemons, steps and their
        ranks.
        """
        mark, found = f"SLURM_CONF={self.home}/slurm.conf".encode(), []
        for directory in Path("/proc").iterdir():
            with contextlib.suppress(OSError):
                if directory.name.isdigit() and mark in (directory / "environ").read_bytes().split(
                    b"\0"
                ):
                    found.append(int(directory.name))
        return found

    def __exit__(self, *_) -> None:
        if len(self._daemons) > 1:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.command("scancel", "--user", getpass.getuser(), seconds=20)
                deadline = time.monotonic() + 15
                while (
                    self.command("squeue", "-h", seconds=20).stdout and time.monotonic() < deadline
                ):
                    time.sleep(0.2)
        for daemon in reversed(self._daemons):
            daemon.terminate()
        for daemon in self._daemons:
            with contextlib.suppress(subprocess.TimeoutExpired):
                daemon.wait(10)
        for _ in range(2):
            for process in self.processes():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process, signal.SIGKILL)
            time.sleep(0.2)
        shutil.rmtree(self.home, ignore_errors=True)
