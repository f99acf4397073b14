"""A run over two hosts, made of network namespaces: pytest -m cluster."""

import os
import re
import sys
import time
from pathlib import Path

import pytest

from cluster import hosts as cluster
from cluster.hosts import ADDRESSES, INTERFACE, Hosts
from launch import free_port, skip_without
from shardes.storage import journal

pytestmark = [pytest.mark.cluster, pytest.mark.slow]

GLOO = {
    "GLOO_SOCKET_IFNAME": INTERFACE,
    "OMP_NUM_THREADS": "1",
}  # a host's own name leads to its loopback address here


@pytest.fixture(scope="module")
def hosts():
    if os.geteuid():
        pytest.skip("network namespaces need root")
    skip_without(cluster.PROGRAMS, "iproute2 openssh-server openssh-client pdsh")
    with Hosts() as hosts:
        yield hosts
    assert hosts.processes() == []


@pytest.fixture
def hostfile(tmp_path) -> Path:
    file = tmp_path / "hostfile"
    file.write_text("host-a slots=1\nhost-b slots=1\n")
    return file


def no_ssh(hostfile: Path, number: int, port: int, *arguments: str) -> list[str]:
    """deepspeed's launcher, started on a host by itself."""
    where = [
        "--no_ssh",
        "--node_rank",
        str(number),
        "--master_addr",
        ADDRESSES[0],
        "--master_port",
        str(port),
    ]
    return ["deepspeed", "--hostfile", str(hostfile), *where, "launchers/train.py", *arguments]


def await_line(log: Path, pattern: str, seconds: float) -> re.Match:
    """Wait for a line that matches."""
    deadline = time.monotonic() + seconds
    while not (found := re.search(pattern, log.read_text(errors="replace"), re.MULTILINE)):
        assert time.monotonic() < deadline, f"after {seconds} s no {pattern}\n{log.read_text()}"
        time.sleep(0.2)
    return found


def test_deepspeed_by_ssh(hosts, hostfile, config, tmp_path, arrived):
    """One replica over both hosts. What ssh does not hand on stands in deepspeed's own file."""
    environ, log = tmp_path / "environ", tmp_path / "log"
    handed_on = GLOO | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    environ.write_text("".join(f"{name}={value}\n" for name, value in handed_on.items()))
    command = [
        "deepspeed",
        "--hostfile",
        str(hostfile),
        "--master_port",
        str(free_port()),
        "launchers/train.py",
        config,
    ]
    process = hosts.start(0, [*command, "sharding.shard=2"], log, DS_ENV_FILE=str(environ))
    assert process.wait(900) == 0, log.read_text()
    assert {"host-a:", "host-b:"} <= {line.split(" ")[0] for line in log.read_text().splitlines()}
    arrived()


def test_torchrun(hosts, config, tmp_path, arrived):
    """A replica on each host."""
    logs, processes = [tmp_path / name for name in "ab"], []
    rendezvous = [
        "--rdzv-backend",
        "c10d",
        "--rdzv-endpoint",
        f"{ADDRESSES[0]}:{free_port()}",
        "--rdzv-id",
        "test",
    ]
    for number in (0, 1):
        ours = ["--rdzv-conf", f"is_host={1 - number}", "--local-addr", ADDRESSES[number]]
        command = ["torchrun", "--nnodes", "2", "--nproc-per-node", "1", *rendezvous, *ours]
        processes.append(
            hosts.start(number, [*command, "launchers/train.py", config], logs[number], **GLOO)
        )
    codes = [process.wait(900) for process in processes]
    assert codes == [0, 0], "\n".join(log.read_text() for log in logs)
    arrived()


def test_deepspeed_without_ssh_and_with_other_settings(hosts, hostfile, config, tmp_path):
    logs, port = [tmp_path / name for name in "ab"], free_port()
    for number, keys in ((0, []), (1, ["es.sigma=0.06"])):
        hosts.start(number, no_ssh(hostfile, number, port, config, *keys), logs[number], **GLOO)
    await_line(
        logs[0],
        "^error: rank 1 has other settings than rank 0: start every host with the same config",
        240,
    )
    for log in logs:
        await_line(log, "exits with return code = 2", 60)


@pytest.mark.parametrize("present", [0, 1], ids=["rank 0 waits", "rank 0 is missing"])
def test_a_missing_host_is_named(hosts, hostfile, config, tmp_path, present, record_property):
    log, port = tmp_path / "log", free_port()
    command = no_ssh(hostfile, present, port, config)
    process = hosts.start(present, command, log)
    where = f"{ADDRESSES[0]}:{port}"
    named = [
        rf"^waiting at {where} on host-a, for 2\d\d s more, for rank 1 of node 1 \(host-b\)$",
        rf"^rank 1 of 2 on host-b: no answer at MASTER_ADDR:MASTER_PORT={where} for \d+ s "
        r"\(Connection refused\);",
    ]
    await_line(log, "spawned with command", 120)
    since = time.monotonic()
    await_line(log, named[present], 150)
    record_property(
        "seconds from the rank's start to the missing host's name", time.monotonic() - since
    )
    hosts.end(process)


def test_a_host_behind_a_cut_cable_is_named(hosts, hostfile, config, tmp_path, record_property):
    log = tmp_path / "log"
    hosts.cut()
    try:
        process = hosts.start(1, no_ssh(hostfile, 1, free_port(), config), log)
        await_line(log, "spawned with command", 120)
        since = time.monotonic()
        await_line(
            log,
            r"^rank 1 of 2 on host-b: no answer at MASTER_ADDR:MASTER_PORT=.* \(.*unreachable\)",
            150,
        )
        record_property(
            "seconds from the rank's start to the unreachable address", time.monotonic() - since
        )
        hosts.end(process)
    finally:
        hosts.plug()


def test_a_replica_behind_a_cut_cable_loses_its_member_alone(
    hosts, config, settings, run_dir, tmp_path, arrived, record_property
):
    """The primary takes its member over; the replica ends by itself, and says why."""
    slow = settings["task"]["path"].replace(":Letters", ":SlowLetters")
    command = [
        sys.executable,
        "launchers/train.py",
        config,
        f"task.path={slow}",
        "replicas.timeout=3",
    ]
    logs, port = [tmp_path / name for name in "ab"], free_port()
    primary = hosts.start(
        0, [*command, f"replicas.host={ADDRESSES[0]}", f"replicas.port={port}"], logs[0]
    )
    await_line(logs[0], r"^iteration 0 ", 240)
    client = hosts.start(
        1, [*command, f"replicas.join={(run_dir / 'meeting').read_text().strip()}"], logs[1]
    )
    try:
        await_line(logs[1], "joined the run", 120)
        time.sleep(2)
        hosts.cut()
        cut, before = time.monotonic(), len(journal.read(run_dir / "journal.jsonl").records)
        await_line(logs[0], rf"^iteration {before} ", 60)
        record_property("seconds from the cut to the iteration's end", time.monotonic() - cut)
        assert client.wait(60) == 1, logs[1].read_text()
        record_property("seconds from the cut to the replica's end", time.monotonic() - cut)
        assert "the primary job is gone" in logs[1].read_text()
        assert primary.wait(120) == 0, logs[0].read_text()
    finally:
        hosts.plug()
    arrived()


def test_a_hostfile_that_is_not_there(hosts, config, tmp_path):
    """deepspeed would run on one host alone."""
    log = tmp_path / "log"
    command = [
        "deepspeed",
        "--hostfile",
        f"{tmp_path}/hosts",
        "--num_gpus",
        "1",
        "--master_port",
        str(free_port()),
    ]
    assert hosts.start(0, [*command, "launchers/train.py", config], log).wait(240) == 2
    errors = [line for line in log.read_text().splitlines() if line.startswith("error:")]
    assert errors == [
        f"error: hostfile {tmp_path}/hosts: no such file; deepspeed would run on this host alone"
    ]
