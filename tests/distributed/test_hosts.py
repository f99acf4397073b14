"""A hostfile's mistakes are found before deepspeed makes something of them."""

import pytest

from shardes.distributed.hosts import parse_hostfile, read_hostfile, slurm_hosts
from shardes.errors import ConfigError


def test_a_hostfile():
    text = "# two hosts\n\nnode-1 slots=8\n  10.0.0.2   slots=8  # the other\n"
    assert parse_hostfile(text, "hosts") == {"node-1": 8, "10.0.0.2": 8}


@pytest.mark.parametrize(
    "text, message",
    [
        ("", "hosts: names no host"),
        ("# only words\n", "hosts: names no host"),
        ("a slots=2\nb\n", "hosts, line 2: 'b': a line is written HOST slots=N"),
        ("a slot=2", "line 1: 'a slot=2'"),
        ("a slots=0", "line 1"),
        ("a slots=2x", "line 1"),
        ("-oProxyCommand=x slots=2", "line 1"),
        ("a slots=2\na slots=2\n", "hosts, line 2: a is listed twice"),
        ("a slots=2\nb slots=2\nc slots=1\n", "hosts: a has 2 slots and c 1"),
    ],
)
def test_damaged_hostfiles(text, message):
    with pytest.raises(ConfigError) as error:
        parse_hostfile(text, "hosts")
    assert message in str(error.value) and "\n" not in str(error.value)


def test_no_hostfile(tmp_path):
    with pytest.raises(
        ConfigError, match=r"hostfile .*hosts: no such file; deepspeed would run on this host alone"
    ):
        read_hostfile(str(tmp_path / "hosts"))
    (tmp_path / "hosts").write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match=r"hostfile .*hosts: .*decode"):
        read_hostfile(str(tmp_path / "hosts"))


def test_no_slurm(monkeypatch, tmp_path):
    monkeypatch.delenv("SLURM_STEP_NODELIST", raising=False)
    monkeypatch.delenv("SLURM_JOB_NODELIST", raising=False)
    with pytest.raises(ConfigError, match="this is no SLURM job"):
        slurm_hosts()
    monkeypatch.setenv("SLURM_JOB_NODELIST", "n[1-2]")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConfigError, match="scontrol"):
        slurm_hosts()
