"""Training runs of both methods, in processes of their own, watched from outside."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import psutil

from benchmarks.grpo.points import RANKS, ROOT, SETTINGS, Points
from benchmarks.measure import environment_with
from shardes.distributed.world import free_port

POLL = 0.2  # seconds
SLOW = 900.0  # seconds that a run may take beside those of its training
STOPPING = 60.0  # seconds that it may take to end


class Memory:
    """The peak memory of a process and its descendants.

    Attributes:
        private: the largest sum of what is not mapped from files, in bytes.
    """

    def __init__(self) -> None:
        self.private = 0
        self._peaks: dict[int, int] = {}

    @property
    def resident(self) -> int:
        """The sum of each process's largest resident set, in bytes."""
        return sum(self._peaks.values())

    def sample(self, process: psutil.Process) -> None:
        private = 0
        for one in [process, *process.children(recursive=True)]:
            try:
                status = Path(f"/proc/{one.pid}/status").read_text()
            except OSError:  # it has ended
                continue
            self._peaks[one.pid] = max(self._peaks.get(one.pid, 0), _bytes(status, "VmHWM:"))
            private += _bytes(status, "RssAnon:") + _bytes(status, "RssShmem:")
        self.private = max(self.private, private)


def _bytes(status: str, name: str) -> int:
    value = status.partition(name)[2].split()[:1]
    return int(value[0]) * 1024 if value else 0  # a process that has ended has no memory


class Iterations:
    """Follows the metrics of an ES run, and writes the points of its curve.

    The clock starts with the first iteration. An iteration is done when its metrics are written.
    """

    def __init__(self, metrics: Path, points: Points, seconds: float):
        self._metrics, self._points, self._seconds = metrics, points, seconds
        self._read = self._tokens = self._step = self._written = 0
        self._started, self._last = 0.0, 0.0

    def follow(self) -> bool:
        """Read what is new; returns whether the time is up."""
        now = time.monotonic()
        text = self._metrics.read_text() if self._metrics.exists() else ""
        lines = text[: text.rfind("\n") + 1].splitlines()
        for line in lines[self._read :]:
            self._add(json.loads(line), now)
        self._read = len(lines)
        return self._read > 0 and now - self._started >= self._seconds

    def finish(self) -> None:
        """Make a point of the last iteration within the time."""
        if self._written < self._step:
            self._points.write(self._step, self._last, self._tokens)

    def _add(self, row: dict[str, float], now: float) -> None:
        if not self._read:
            self._started = now - row["seconds"]
        seconds = now - self._started
        if self._step and seconds > self._seconds:
            return
        self._step, self._last = int(row["iteration"]) + 1, seconds
        self._tokens += int(row["generated_tokens"])
        if self._points.due(seconds, self._tokens):
            self._points.write(self._step, seconds, self._tokens)
            self._written = self._step


def train(method: str, config: Path, seed: int, seconds: float, grpo: dict, out: Path) -> dict:
    """Train; returns the report of the run, with points that are not yet evaluated.

    Args:
        config: of the ES run; GRPO takes model, task and `generation.max_new_tokens` from it.
        grpo: GRPO's learning_rate, and the responses of a step; empty for ES.

    Raises:
        RuntimeError: the run failed.
    """
    out.mkdir(parents=True)
    memory = Memory()
    points = Points(out, seconds)
    if method == "es":
        run = out / "run"
        rows = Iterations(run / "metrics.jsonl", points, seconds)
        _run(_es(config, seed, run), out, seconds, memory, rows.follow)
        rows.finish()
    else:
        program = _grpo(config, dict(seed=seed, seconds=seconds) | grpo, out)
        _run(program, out, seconds, memory, lambda: False)
    return dict(
        method=method,
        config=str(config),
        **grpo,
        seed=seed,
        seconds=seconds,
        cores=len(os.sched_getaffinity(0)),
        config_lines=_lines(config if method == "es" else SETTINGS),
        peak_resident_bytes=memory.resident,
        peak_private_bytes=memory.private,
        versions={
            name: version(name)
            for name in ("torch", "transformers", *(["trl"] if method == "grpo" else []))
        },
        points=[dict(step=0, seconds=0.0, tokens=0), *points.read()],
    )


def _es(config: Path, seed: int, run: Path) -> list[str]:
    """The program of an ES run that ends when it is ended.

    It evaluates nothing after its start, and the points' models can be rebuilt from its journal.
    """
    keys = [f"es.seed={seed}", "es.iterations=1000000", f"run.dir={run.absolute()}"]
    return ["launchers/train.py", str(config.absolute()), *keys, "eval.every=0"]


def _grpo(config: Path, options: dict, out: Path) -> list[str]:
    program = ["-m", "benchmarks.grpo.trainer", str(config.absolute()), str(out.absolute())]
    return program + [f"--{name.replace('_', '-')}={value}" for name, value in options.items()]


def _run(
    arguments: list[str],
    out: Path,
    seconds: float,
    memory: Memory,
    is_over: Callable[[], bool],
) -> None:
    """Run a program's ranks until they end or are to be ended; OUT/output.log has their output.

    Args:
        arguments: of torch.distributed.run.
        seconds: of the training itself.

    Raises:
        RuntimeError: it failed, or took too long.
    """
    threads = {f"{name}_NUM_THREADS": "1" for name in ("OMP", "MKL", "NUMBA")}
    cpu = {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
    environ = environment_with(ROOT) | threads | cpu
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(RANKS)]
    launcher += ["--master_addr", "127.0.0.1", "--master_port", str(free_port())]
    started, over, log = time.monotonic(), False, out / "output.log"
    with open(log, "w") as output:
        process = psutil.Popen(
            [*launcher, *arguments],
            cwd=ROOT,
            env=environ,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
        try:
            while process.poll() is None and not over:
                memory.sample(process)
                over = is_over()
                if time.monotonic() - started > seconds + SLOW:
                    raise RuntimeError(f"{log}: after {seconds + SLOW:.0f} s the run has not ended")
                time.sleep(POLL)
        finally:
            _end(process)
    if not over and process.returncode:
        end = log.read_text(errors="replace")[-3000:]
        raise RuntimeError(f"{log}: exit code {process.returncode}\n{end}")


def _end(process: psutil.Popen) -> None:
    """End a process that has not ended by itself, with its descendants."""
    if process.poll() is not None:
        return
    running = [process, *process.children(recursive=True)]
    process.terminate()
    for late in psutil.wait_procs(running, STOPPING)[1]:
        late.kill()
    process.wait()


def _lines(path: Path) -> int:
    """How many lines of a YAML file are settings."""
    lines = map(str.strip, path.read_text().splitlines())
    return sum(bool(line) and not line.startswith("#") for line in lines)
