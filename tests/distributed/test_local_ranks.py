"""Ranks on this host: their environment, their end, and what the user is told."""

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from launch import ROOT
from shardes.distributed import local_ranks
from shardes.distributed.local_ranks import run_ranks
from shardes.errors import ConfigError, RunError, Stopped

# What a rank imports first; then it watches for signals as `ShutdownWatcher` does.
RANK = """
import json, os, signal, sys, time
from shardes.distributed import environment
environment.prepare()
rank = int(os.environ["RANK"])
def stopped(number, frame):
    if rank == 0:
        environment.report(stopped=75 if number == signal.SIGUSR1 else 0)
    os._exit(75 if number == signal.SIGUSR1 else 0)
def watch():
    signal.signal(signal.SIGTERM, stopped)
    signal.signal(signal.SIGUSR1, stopped)
def wait():
    with open(f"{sys.argv[1]}/starting{rank}", "w") as file:
        file.write(str(os.getpid()))
    os.rename(file.name, f"{sys.argv[1]}/{rank}")
    time.sleep(60)
"""


@pytest.fixture
def ranks(tmp_path, monkeypatch):
    """Starts two ranks that run a script; afterwards none of them is left."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))

    def start(script: str, on_metrics=lambda metrics: None) -> None:
        run_ranks([sys.executable, "-c", RANK + script, str(tmp_path)], 2, on_metrics)

    yield start
    for file in tmp_path.glob("[01]"):
        assert not alive(int(file.read_text()))


def alive(pid: int) -> bool:
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False


def until(condition, seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@contextlib.contextmanager
def signalled_when_ready(directory: Path, number: int):
    """A context in which this process gets a signal once both ranks wait."""

    def send() -> None:
        until(lambda: all((directory / rank).exists() for rank in "01"))
        os.kill(os.getpid(), number)

    thread = threading.Thread(target=send)
    thread.start()
    yield
    thread.join()


def test_ranks_have_the_variables_of_a_launcher(ranks):
    seen = []
    ranks(
        "names = 'RANK LOCAL_RANK WORLD_SIZE LOCAL_WORLD_SIZE MASTER_ADDR MASTER_PORT'.split()\n"
        "environment.report(metrics={name: os.environ[name] for name in names})\n"
        "assert environment.STARTED_BY not in os.environ",
        seen.append,
    )
    seen.sort(key=lambda variables: variables["RANK"])
    assert [(row["RANK"], row["LOCAL_RANK"]) for row in seen] == [("0", "0"), ("1", "1")]
    assert {row["WORLD_SIZE"] + row["LOCAL_WORLD_SIZE"] for row in seen} == {"22"}
    assert seen[0]["MASTER_ADDR"] == "127.0.0.1"
    assert seen[0]["MASTER_PORT"] == seen[1]["MASTER_PORT"]


@pytest.mark.parametrize(
    "script, error, message",
    [
        ("environment.complain('es.sigm: no such key', 2); os._exit(2)", ConfigError, "^es.sigm:"),
        ("environment.complain('lost'); os._exit(1)", RunError, "^lost$"),
        ("os._exit(3) if rank else wait()", RunError, "^rank 1 ended with exit code 3; its output"),
        ("os.kill(os.getpid(), 9) if rank else wait()", RunError, "^rank 1 was ended by SIGKILL"),
    ],
)
def test_a_failure_is_told_once_and_ends_all_ranks(ranks, monkeypatch, script, error, message):
    monkeypatch.setattr(local_ranks, "FAILED_GRACE", 0.5)
    with pytest.raises(error, match=message):
        ranks(script)


@pytest.mark.parametrize("watches", ["watch()", "pass"], ids=["ready", "starting"])
@pytest.mark.parametrize(
    "number, code", [(signal.SIGINT, 0), (signal.SIGTERM, 0), (signal.SIGUSR1, 75)]
)
def test_a_signal_stops_all_ranks(ranks, tmp_path, number, code, watches):
    before = signal.getsignal(number)
    with signalled_when_ready(tmp_path, number), pytest.raises(Stopped) as stopped:
        ranks(f"{watches}; wait()")
    assert stopped.value.code == code and stopped.value.said == (watches == "watch()")
    assert signal.getsignal(number) == before


def test_a_rank_that_does_not_stop_is_named(ranks, tmp_path, monkeypatch):
    monkeypatch.setattr(local_ranks, "STOP_GRACE", 0.5)
    with (
        signalled_when_ready(tmp_path, signal.SIGINT),
        pytest.raises(RunError, match="rank 1 did not end"),
    ):
        ranks("watch()\nif rank: signal.signal(signal.SIGTERM, signal.SIG_IGN)\nwait()")


def test_ranks_do_not_outlive_what_raises_in_the_callback(ranks):
    def callback(metrics) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        ranks("environment.report(metrics={}); wait()", callback)


def test_ranks_end_with_the_process_that_started_them(tmp_path):
    code = (
        "import sys; from shardes.distributed.local_ranks import run_ranks; "
        "run_ranks([sys.executable, '-c', *sys.argv[1:]], 2)"
    )
    command = [sys.executable, "-c", code, RANK + "wait()", str(tmp_path)]
    process = subprocess.Popen(command, env=os.environ | {"PYTHONPATH": str(ROOT)})
    until(lambda: all((tmp_path / rank).exists() for rank in "01"))
    process.kill()
    process.wait()
    pids = [int((tmp_path / rank).read_text()) for rank in "01"]
    until(lambda: not any(map(alive, pids)))
