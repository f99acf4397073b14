"""The hostfile's checks, as a user calls them, and those that the trainer makes itself."""

import base64
import json
import sys

import pytest
import yaml

from launch import call, run, script

hostfile = script("launchers/hostfile.py")


@pytest.fixture
def config(tmp_path) -> str:
    file = tmp_path / "config.yaml"
    file.write_text(
        yaml.safe_dump({"model": {"path": "m"}, "run": {"dir": "r"}, "sharding": {"shard": 2}})
    )
    return str(file)


@pytest.mark.parametrize(
    "text, keys, code, said",
    [
        ("a slots=2\nb slots=2\n", [], 0, "4 ranks on 2 hosts: a, b"),
        ("a slots=2\nb slots=2\n", ["sharding.tensor=2"], 0, "4 ranks"),
        ("a slots=3\nb slots=3\n", ["sharding.tensor=2"], 2, "does not divide the 6 ranks"),
        ("a slots=2\nb slots=4\n", [], 2, "a has 2 slots and b 4"),
        (None, [], 2, "no such file"),
    ],
)
def test_check(tmp_path, config, text, keys, code, said):
    file = tmp_path / "hosts"
    if text:
        file.write_text(text)
    done = call(hostfile.main, "check", file, config, *keys)
    assert done.returncode == code and said in done.stdout + done.stderr
    assert len((done.stdout + done.stderr).splitlines()) == 1


def test_write_outside_of_slurm(tmp_path, monkeypatch):
    monkeypatch.delenv("SLURM_JOB_NODELIST", raising=False)
    monkeypatch.delenv("SLURM_STEP_NODELIST", raising=False)
    done = call(hostfile.main, "write", tmp_path / "hosts", "--slots", 2)
    assert (done.returncode, done.stderr) == (
        2,
        "error: SLURM_JOB_NODELIST is not set: this is no SLURM job\n",
    )


CHECK = (
    "from shardes.distributed.hosts import check_launcher, expected_hosts; "
    "print(expected_hosts()); check_launcher()"
)


@pytest.mark.slow
def test_what_deepspeeds_launcher_was_told(tmp_path):
    file = tmp_path / "check.py"
    file.write_text(CHECK)
    launcher = [
        sys.executable,
        "-m",
        "deepspeed.launcher.runner",
        "--num_gpus",
        "1",
        "--no_local_rank",
    ]
    done = run([*launcher, str(file)])
    assert done.returncode == 0 and "['localhost']" in done.stdout, done.stderr
    done = run([*launcher, "--hostfile", str(tmp_path / "hosts"), str(file)])
    assert done.returncode == 1 and f"hostfile {tmp_path}/hosts: no such file" in done.stderr
    unequal = base64.urlsafe_b64encode(json.dumps({"a": [0], "b": [0, 1]}).encode()).decode()
    launcher = [
        sys.executable,
        "-m",
        "deepspeed.launcher.launch",
        "--world_info",
        unequal,
        "--no_local_rank",
    ]
    done = run([*launcher, str(file)])
    assert done.returncode == 1 and "hostfile: a has 1 slots and b 2" in done.stderr
