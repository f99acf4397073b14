"""Starts commands and ranks, with a time limit, and leaves no process behind."""

import contextlib
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from io import StringIO
from pathlib import Path
from types import ModuleType

import pytest

from shardes.distributed.ports import free_port

ROOT = Path(__file__).parent.parent
NO_GPU = {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}  # for a process on the CPU


def run(
    command: list[str], seconds: float = 240, cwd: Path = ROOT, **environ: str
) -> subprocess.CompletedProcess:
    """Run a command in its own session; none of its processes outlives this call."""
    env = {
        key: value
        for key, value in os.environ.items()
        if key not in ("OMP_NUM_THREADS", "NUMBA_NUM_THREADS")
    }
    process = subprocess.Popen(
        command,
        cwd=cwd,
        env=env | environ,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        out, err = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        out, err = process.communicate()
        pytest.fail(f"{command} took more than {seconds} s\n{out[-2000:]}\n{err[-4000:]}")
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    return subprocess.CompletedProcess(command, process.returncode, out, err)


def skip_without(programs: tuple[str, ...], packages: str) -> None:
    """Skip the test if programs are missing, and say how to install them."""
    path = os.pathsep.join([os.environ["PATH"], "/usr/sbin", "/sbin"])
    missing = [program for program in programs if not shutil.which(program, path=path)]
    if missing:
        pytest.skip(f"no {', '.join(missing)}: apt-get install --no-install-recommends {packages}")


def script(path: str) -> ModuleType:
    """Import a script of the repository as a module."""
    spec = importlib.util.spec_from_file_location(Path(path).stem, ROOT / path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def call(main: Callable[[list[str]], int], *arguments: object) -> subprocess.CompletedProcess:
    """Call a command's `main` in this process; returns its exit code and output."""
    with (
        contextlib.redirect_stdout(StringIO()) as out,
        contextlib.redirect_stderr(StringIO()) as err,
    ):
        try:
            code = main(list(map(str, arguments)))
        except SystemExit as error:
            code = error.code
    return subprocess.CompletedProcess(arguments, code, out.getvalue(), err.getvalue())


def deepspeed(ranks: int, *arguments: str, seconds: float = 240) -> subprocess.CompletedProcess:
    """`deepspeed --num_gpus RANKS ARGUMENTS`, on a free port."""
    launcher = [sys.executable, "-m", "deepspeed.launcher.runner"]
    return run(
        [*launcher, "--num_gpus", str(ranks), "--master_port", str(free_port()), *arguments],
        seconds,
    )


def torchrun(ranks: int, worker: str, *arguments: str, seconds: float = 240) -> list[dict]:
    """Run tests/workers/WORKER on several ranks; returns each rank's `report`, by rank."""
    launcher = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc_per_node",
        str(ranks),
        "--no-python",
    ]
    command = [*launcher, "--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0"]
    script = str(ROOT / "tests" / "workers" / worker)
    with tempfile.TemporaryDirectory() as directory:
        done = run([*command, sys.executable, script, *arguments], seconds, RESULTS=directory)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
        return [json.loads((Path(directory) / f"{rank}.json").read_text()) for rank in range(ranks)]


def report(result: dict) -> None:
    """For workers: pass this rank's result to the test. It has the key "rank"."""
    (Path(os.environ["RESULTS"]) / f"{result['rank']}.json").write_text(json.dumps(result))
