"""Variables that a process sets for itself before it imports torch."""

import os
import signal
import subprocess
import sys

import pytest

from launch import ROOT, run
from shardes.distributed import environment

NO_SPACE = "[Errno 28] No space left on device"
TASK = {
    "SLURM_JOB_ID": "77",
    "SLURM_STEP_ID": "3",
    "SLURM_STEP_NUM_TASKS": "5",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2),1",
    "SLURM_NODEID": "1",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
}
RANK = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@pytest.fixture
def environ(monkeypatch):
    """An environment without a launcher, undone afterwards."""
    monkeypatch.setattr(os, "environ", {k: v for k, v in os.environ.items() if k not in RANK})
    monkeypatch.setattr(environment, "slurm_hosts", lambda: ["node-a", "node-b", "node-c"])
    return os.environ


def test_a_task_of_srun_is_a_rank(environ):
    environ |= TASK
    environment.prepare()
    port = 15000 + 31 * 77 + 3
    expected = ("3", "5", "1", "2", "node-a", str(port))
    assert tuple(environ[name] for name in RANK) == expected
    environ |= {"RANK": "9"}
    environment.prepare()  # a launcher within the task has the last word
    assert environ["RANK"] == "9"


@pytest.mark.parametrize("given", [{}, TASK | {"SLURM_STEP_NUM_TASKS": "1"}, {"SLURM_JOB_ID": "7"}])
def test_without_several_tasks_there_is_no_rank(environ, given):
    environ |= given
    environment.prepare()
    assert not set(RANK) & set(environ)


def test_a_terminal_that_cannot_encode_a_character_gets_its_code():
    program = (
        "from shardes.distributed import environment as e; e.run(lambda _: print('1 ± 2') or 7)"
    )
    done = run([sys.executable, "-c", program], PYTHONIOENCODING="ascii", PYTHONPATH=str(ROOT))
    assert (done.returncode, done.stdout, done.stderr) == (7, "1 \\xb1 2\n", "")


@pytest.mark.parametrize("arguments", ["configs", "--help"])
def test_an_output_that_nobody_reads_ends_a_command_quietly(arguments):
    """As with `shardes configs | head -1`."""
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "shardes.commands.cli", *arguments.split()]
    done = subprocess.run(
        command, stdout=writer, stderr=subprocess.PIPE, text=True, cwd=ROOT, timeout=60
    )
    os.close(writer)
    assert not done.stderr
    assert done.returncode in (0, 128 + signal.SIGPIPE)  # whether it had more to say


def test_an_output_that_cannot_be_written_is_named():
    command = [sys.executable, "-m", "shardes.commands.cli", "--help"]
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            command, stdout=full, stderr=subprocess.PIPE, text=True, cwd=ROOT, timeout=60
        )
    assert done.returncode == 1
    assert done.stderr == f"error: the output cannot be written: {NO_SPACE}\n"


def test_a_process_may_begin_without_an_output():
    command = f"exec {sys.executable} -m shardes.commands.cli configs >&-"
    done = run(["sh", "-c", command])
    assert done.returncode == 0 and not done.stderr


def test_another_pipe_that_broke_is_told():
    program = (
        "import os\nfrom shardes.distributed import environment\n"
        "reader, writer = os.pipe()\nos.close(reader)\n"
        "environment.run(lambda _: os.write(writer, b'x'))"
    )
    done = run([sys.executable, "-c", program], PYTHONPATH=str(ROOT))
    assert done.returncode == 1 and "BrokenPipeError" in done.stderr


@pytest.mark.parametrize(
    "number, code", [(signal.SIGINT, 0), (signal.SIGTERM, 0), (signal.SIGUSR1, 75)]
)
def test_a_signal_before_anything_began_ends_the_process_whatever_it_is_in(number, code):
    program = (
        "import os\nfrom shardes.distributed import environment\n"
        "with environment.ended_by_signals():\n"
        f"    try:\n        os.kill(os.getpid(), {int(number)})\n"
        "    except BaseException:\n        pass\n"
        "print('went on')"
    )
    done = run([sys.executable, "-c", program], PYTHONPATH=str(ROOT))
    assert done.returncode == code and done.stdout.count("\n") == 1, done.stderr
    assert "before the work began" in done.stdout and not done.stderr
