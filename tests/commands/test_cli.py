"""The command `shardes`: its subcommands, its help, and how it starts ranks."""

import importlib
import json
import os
import pty
import re
import select
import shutil
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
import yaml

from launch import ROOT, call, run
from shardes.commands import cli
from shardes.config.loading import load

TASK = """
class Letters:
    def prompts(self, split):
        return ["abc", "a much longer prompt"] if split == "train" else ["hello"]
    def score(self, split, responses):
        return [float(sum(map(ord, text)) % 97) for text in responses]
"""


@pytest.fixture
def config(tmp_path, uneven_llama) -> str:
    (tmp_path / "task.py").write_text(TASK)
    settings = {
        "model": {"path": str(uneven_llama), "dtype": "float32"},
        "es": {"population_size": 4, "sigma": 0.05, "alpha": 0.05, "iterations": 1},
        "generation": {"max_new_tokens": 4},
        "task": {"path": f"{tmp_path}/task.py:Letters"},
        "run": {"dir": str(tmp_path / "run"), "timeout": 60},
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(settings))
    return str(tmp_path / "config.yaml")


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch):
    """No test here runs as a rank, whatever variables the environment has."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize("command", ["", *cli.COMMANDS])
def test_help_shows_examples(command):
    done = call(cli.main, *filter(None, [command]), "--help")
    assert done.returncode == 0
    assert done.stdout.count(f"shardes {command}".strip() + " ") >= 1 or command == "env", (
        done.stdout
    )
    assert command not in ("train", "evaluate") or "es.population_size" in done.stdout


def test_without_a_command_there_is_help():
    done = call(cli.main)
    assert done.returncode == 2 and "usage: shardes COMMAND" in done.stderr


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["trian"], "trian: no such command; did you mean train?"),
        (["xyzzy"], "xyzzy: no such command; there are: train, evaluate, "),
        (["train", "x.yaml", "--gpus", "0"], "--gpus 0: must be at least 1"),
        (
            ["train", "x.yaml", "--gpus", "two"],
            "argument --gpus/--nproc: invalid int value: 'two'; see shardes train",
        ),
        (["evaluate", "x.yaml", "--dry-run"], "--dry-run: only for train"),
        (["train", "x.yaml", "--dry-run"], "x.yaml: no such config file"),
    ],
)
def test_mistakes(arguments, message):
    done = call(cli.main, *arguments)
    assert done.returncode == 2 and done.stderr.startswith(f"error: {message}"), done.stderr


def test_a_rank_does_not_start_ranks(monkeypatch):
    monkeypatch.setenv("RANK", "0")
    done = call(cli.main, "train", "x.yaml", "--gpus", "2")
    assert done.returncode == 2 and "a launcher has started this rank already" in done.stderr


def test_a_dry_run_checks_and_writes_nothing(config, tmp_path):
    before = sorted(tmp_path.rglob("*"))
    done = call(
        cli.main, "train", config, "--gpus", "4", "--dry-run", "sharding.shard=2", "es.seed=7"
    )
    assert done.returncode == 0, done.stderr
    assert sorted(path for path in tmp_path.rglob("*") if "__pycache__" not in str(path)) == before
    assert f"# run.dir: {tmp_path}/run, a new run" in done.stdout
    assert "# layout: 4 ranks, 2 replicas × shard 2 × tensor 1" in done.stdout
    assert (
        "# prompts: 2 train, up to 20 tokens, 1 test" in done.stdout
        and "# memory of a rank: about 0" in done.stdout
    )
    (tmp_path / "resolved.yaml").write_text(done.stdout)
    assert load(str(tmp_path / "resolved.yaml"), []) == load(
        config, ["sharding.shard=2", "es.seed=7"]
    )
    for override, message in (
        ("sharding.shard=3", "does not divide the 4 ranks"),
        ("es.sigm=1", "mean es.sigma"),
    ):
        done = call(cli.main, "train", config, "--gpus", "4", "--dry-run", override)
        assert done.returncode == 2 and message in done.stderr and not done.stdout


def test_ranks_are_started_on_this_host(config, tmp_path):
    shardes = [sys.executable, "-m", "shardes.commands.cli"]
    done = run([*shardes, "train", config, "--gpus", "2", "eval.every=0"])
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["iterations"] == 1
    environment = json.loads(
        (tmp_path / "run" / "logs" / "attempt_1" / "environment.json").read_text()
    )
    assert environment["world"] == dict(ranks=2, replicas=2, shard=1, tensor=1, device="cpu")
    # The same share of the cores as when the user starts deepspeed
    share = str(max(environment["cores"] // 2, 1))
    assert environment["environment"]["OMP_NUM_THREADS"] == share

    done = call(cli.main, "train", config, "--dry-run")
    assert "/run, a run of 1 iteration so far, to be resumed" in done.stdout, done.stderr
    done = call(cli.main, "train", config, "--dry-run", "es.alpha=0.5")
    assert done.returncode == 2 and "es.alpha=0.5: the run in" in done.stderr
    assert call(cli.main, "journal", tmp_path / "run").returncode == 0
    done = call(cli.main, "report", tmp_path / "run")
    assert done.returncode == 0 and "attempt_1" in Path(done.stdout.strip()).read_text()


def test_ctrl_c_stops_the_ranks_in_one_line(config, tmp_path):
    command = [sys.executable, "-m", "shardes.commands.cli", "train", config, "--gpus", "2"]
    environ = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    pid, terminal = pty.fork()
    if pid == 0:
        os.execve(sys.executable, [*command, "es.iterations=100000", "eval.every=0"], environ)
    try:
        output = read_until(terminal, "iteration 1 ")
        ranks = {int(path.name) for path in Path("/proc").glob("[0-9]*") if parent(path) == pid}
        os.write(terminal, b"\x03")
        output += read_until(terminal, None)
        _, status = os.waitpid(pid, 0)
    finally:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)  # and with it its ranks
    assert os.waitstatus_to_exitcode(status) == 0, output
    said = "stopped as asked; all finished members are kept: start the same command again to go on"
    assert output.count(said) == 1, output
    assert not re.search("Traceback|error|WARNING|INFO|interrupt", output), output
    assert len(ranks) == 2 and not any(Path(f"/proc/{rank}").exists() for rank in ranks)
    done = call(cli.main, "journal", tmp_path / "run", "verify")
    assert done.returncode == 0, done.stderr


def read_until(terminal: int, text: str | None, seconds: float = 120) -> str:
    """A terminal's output up to a text, or to its end."""
    output, deadline = "", time.monotonic() + seconds
    while text is None or text not in output:
        assert time.monotonic() < deadline, output
        if select.select([terminal], [], [], 1)[0]:
            try:
                output += os.read(terminal, 1 << 16).decode(errors="replace")
            except OSError:  # all processes have closed it
                break
    return output


def parent(process: Path) -> int:
    try:
        return int((process / "stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return 0


def test_env_hides_secrets(monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "abcdef")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    done = call(cli.main, "env")
    printed = dict(line.split(maxsplit=1) for line in done.stdout.splitlines())
    assert (
        printed["HF_HUB_OFFLINE"] == "1"
        and printed["WANDB_API_KEY"] == "(hidden)"
        and "abcdef" not in done.stdout
    )
    assert (
        printed["python"] == sys.version.split()[0]
        and {"torch", "deepspeed", "GPUs", "cores"} <= printed.keys()
    )


def test_the_console_script_is_there():
    tomllib = pytest.importorskip("tomllib")
    module, _, function = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"][
        "scripts"
    ]["shardes"].partition(":")
    assert getattr(importlib.import_module(module), function) is cli.command


@pytest.mark.parametrize("command", ["--help", "report"])
def test_commands_that_need_no_model_start_without_torch(command, tmp_path):
    record = ROOT / "tests" / "storage" / "format_1" / "run"
    directory = shutil.copytree(record, tmp_path / "run")
    arguments = [command, *([str(directory)] if command == "report" else [])]
    code = (
        "import sys; from shardes.commands import cli; code = cli.main(sys.argv[1:]); "
        "print(code, *{'torch', 'transformers', 'deepspeed', 'numba'} & sys.modules.keys())"
    )
    done = run([sys.executable, "-c", code, *arguments], seconds=60)
    assert done.stdout.splitlines()[-1] == "0", done.stdout + done.stderr
