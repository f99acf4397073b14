"""Replicas come to a run and leave it, and it arrives at the same center, to the bit."""

import json
import os
import re
import signal
import time
from contextlib import suppress
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import yaml
from gateways import forgeries
from transformers import LlamaConfig, LlamaForCausalLM

from models import SIZES, save_model
from shardes.replicas.gateway_client import connect
from shardes.replicas.protocol import KEPT_RECORDS
from shardes.storage import journal
from zygote import Run

pytestmark = pytest.mark.cluster

TASK = '''
class Letters:
    """A reward that differs from member to member."""
    def prompts(self, split):
        return ["abc", "a much longer prompt", "x"] if split == "train" else ["hello"]
    def score(self, split, responses):
        return [float(sum(map(ord, text)) % 97) for text in responses]
'''
RULE = """
class Momentum:
    buffers = 1
    def update(self, theta, step, alpha, momentum):
        momentum.mul_(0.5).add_(step)
        theta.add_(momentum)
"""
TIMEOUT = 1.5  # seconds without a sign of life


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("joining")
    (folder / "task.py").write_text(TASK)
    sizes = SIZES | dict(hidden_size=64, intermediate_size=300)
    for name, seed in (("model", 6), ("other", 7)):
        torch.manual_seed(seed)
        save_model(folder / name, LlamaForCausalLM(LlamaConfig(**sizes)))
    settings = {
        "model": {"path": str(folder / "model"), "dtype": "float32"},
        "es": {"population_size": 6, "sigma": 0.05, "alpha": 0.05, "iterations": 6},
        "generation": {"max_new_tokens": 24},
        "task": {"path": f"{folder}/task.py:Letters"},
        "eval": {"every": 2},
        "checkpoint": {"every": 2},
        "replicas": {"timeout": TIMEOUT},
        "run": {"timeout": 60},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(settings))
    return folder


@pytest.fixture
def start(zygote, folder, tmp_path):
    """Starts launches of one run; those that join are told where."""
    config = str(folder / "config.yaml")
    run = tmp_path / "run"
    count = 0

    def started(*keys: str, join: bool = True, ranks: int = 1, **faults) -> Run:
        nonlocal count
        count += 1
        where = (
            [f"replicas.join={await_text(run / 'meeting').strip()}"]
            if join
            else ["replicas.port=0"]
        )
        log = tmp_path / f"{count}.log"
        return zygote.start(config, f"run.dir={run}", *where, *keys, ranks=ranks, log=log, **faults)

    return started


@pytest.fixture(scope="module")
def alone(zygote, folder):
    """The center at which the run arrives when nobody joins."""
    run = zygote.start(
        str(folder / "config.yaml"), f"run.dir={folder / 'alone'}", log=folder / "alone.log"
    )
    assert run.wait() == [0], run.text()
    return journal.read(folder / "alone" / "journal.jsonl").finish.digest


def await_text(file: Path, text: str = "", seconds: float = 60) -> str:
    """What a file says, once it is there and says `text`."""
    until = time.monotonic() + seconds
    while not file.exists() or not (found := file.read_text()) or text not in found:
        assert time.monotonic() < until, f"{file}: no {text}"
        time.sleep(0.02)
    return found


def await_journal(run: Path, kind: str, count: int) -> None:
    """Wait until the journal has so many lines of a kind."""
    until = time.monotonic() + 60
    while (
        not (run / "journal.jsonl").exists()
        or (run / "journal.jsonl").read_text().count(f'"{kind}", "it') < count
    ):
        assert time.monotonic() < until
        time.sleep(0.02)


def arrived(run: Path) -> str:
    summary = json.loads((run / "summary.json").read_text())
    assert journal.read(run / "journal.jsonl").finish.digest == summary["digest"]
    samples = [json.loads(line) for line in (run / "samples.jsonl").read_text().splitlines()]
    assert sorted({row["iteration"] for row in samples}) == [0, 2, 4, 6]
    assert len(samples) == 4 * 4
    return summary["digest"]


def evaluated(client: Run) -> int:
    """How many members a replica says that it has evaluated."""
    (line,) = (line for line in client.text().splitlines() if line.startswith("done: this replica"))
    return int(line.split()[4])


def test_a_replica_joins_in_the_midst_and_takes_members(start, alone, tmp_path):
    primary = start(join=False, slow=0.02)
    await_journal(tmp_path / "run", "iteration", 2)
    client = start()
    assert client.wait() == [0] and primary.wait() == [0], primary.text() + client.text()
    assert "joined the run at" in client.text() and "as replica 1" in client.text()
    assert evaluated(client) > 4
    assert arrived(tmp_path / "run") == alone
    assert not (tmp_path / "run" / "meeting").exists()
    assert (tmp_path / "run" / "token").read_text().strip() not in primary.text() + client.text()


@pytest.mark.slow
def test_a_replica_joins_when_the_store_has_few_of_the_records(start, tmp_path):
    keys = ["es.iterations=150", "es.population_size=2", "generation.max_new_tokens=2"]
    keys += ["eval.every=0", "checkpoint.every=0"]
    primary = start(*keys, join=False)
    await_journal(tmp_path / "run", "iteration", KEPT_RECORDS + 6)
    client = start(*keys)
    assert client.wait() == [0] and primary.wait() == [0], primary.text() + client.text()
    (joined,) = re.findall(r"in iteration (\d+): the base model and (\d+) iter", client.text())
    assert joined[0] == joined[1] and int(joined[0]) > KEPT_RECORDS + 5
    finish = journal.read(tmp_path / "run" / "journal.jsonl").finish
    assert f"center {finish.digest}" in client.text()


@pytest.mark.slow
def test_a_replica_joins_a_run_whose_rule_keeps_values(start, tmp_path):
    """It begins from the base model, although its directory has a snapshot."""
    (tmp_path / "own.py").write_text(RULE)
    keys = [f"es.update={tmp_path}/own.py:Momentum", "es.alpha=0.01"]
    primary = start(*keys, join=False, slow=0.02)
    await_journal(tmp_path / "run", "iteration", 3)
    client = start(*keys)
    assert client.wait() == [0] and primary.wait() == [0], primary.text() + client.text()
    (joined,) = re.findall(r"in iteration (\d+): the base model and (\d+) iter", client.text())
    assert joined[0] == joined[1] and int(joined[0]) >= 3
    finish = journal.read(tmp_path / "run" / "journal.jsonl").finish
    assert f"center {finish.digest}" in client.text()


@pytest.mark.slow
@pytest.mark.parametrize(
    "keys", [["sharding.tensor=2"], ["engine=fsdp", "sharding.shard=2"]], ids=["TP 2", "FSDP 2"]
)
def test_a_replica_of_another_layout_joins(start, alone, tmp_path, keys):
    primary = start(join=False, slow=0.02)
    client = start(*keys, ranks=2)
    assert client.wait() == [0, 0] and primary.wait() == [0], primary.text() + client.text()
    assert evaluated(client) > 0
    assert arrived(tmp_path / "run") == alone


@pytest.mark.slow
def test_a_replica_without_the_runs_directory_needs_the_token_and_begins_from_the_base(
    start, alone, tmp_path, monkeypatch
):
    primary = start(join=False, slow=0.02)
    await_journal(tmp_path / "run", "iteration", 3)
    elsewhere = f"run.dir={tmp_path}/elsewhere"
    stranger = start(elsewhere)
    assert stranger.wait() == [2]
    assert "no token: set SHARDES_TOKEN" in stranger.text()
    token = (tmp_path / "run" / "token").read_text().strip()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "token").write_text(token)
    client = start(elsewhere)
    assert client.wait() == [0] and primary.wait() == [0], primary.text() + client.text()
    assert "the base model and " in client.text()
    assert arrived(tmp_path / "run") == alone
    assert [file.name for file in (tmp_path / "elsewhere").iterdir()] == ["token"]


@pytest.mark.slow
def test_a_replica_that_is_killed_loses_its_member_alone(start, alone, tmp_path, record_property):
    primary = start(join=False, slow=0.005)
    client = start(slow=0.2)  # a member takes it five seconds, so that it is killed within one
    await_text(client.log, "joined")
    await_journal(tmp_path / "run", "iteration", 1)
    time.sleep(1)
    client.kill()
    killed, before = time.monotonic(), len(journal.read(tmp_path / "run" / "journal.jsonl").records)
    await_journal(tmp_path / "run", "iteration", before + 1)
    took = time.monotonic() - killed
    client.wait()
    assert primary.wait() == [0], primary.text()
    assert arrived(tmp_path / "run") == alone
    record_property(
        f"seconds from the kill to the iteration's end, with replicas.timeout={TIMEOUT}", took
    )
    assert took < 4 * TIMEOUT + 10


@pytest.mark.slow
def test_who_forges_loses_its_place_and_the_run_arrives_where_it_would(start, alone, tmp_path):
    """Each forger takes a member first, which another replica must then evaluate."""
    run = tmp_path / "run"
    primary = start(join=False, slow=0.02)
    address, token = await_text(run / "meeting").strip(), (run / "token").read_text().strip()
    own, forged, members = 10**9 - 1, 0, 0
    requests = [r for r in forgeries(own)[::301] if r[0] != "check" and r[1] != "welcome"]
    for number, request in enumerate(requests):
        client = connect(address, token, 10)
        replica = client.take_replica_number()
        iteration = (run / "journal.jsonl").read_text().count('"iteration", "it')
        queue = client.queue(f"iteration {iteration}")
        if number % 20 == 0 and (member := queue.claim()) < 6:
            queue.set_claimant(member, replica)
            members += 1
            request = ["compare_set", f"iteration {iteration}/result/{member}", "", f"{replica}:[]"]
        with suppress(dist.DistError):
            client._base._ask(*request)
            continue
        forged += 1
    assert forged > 50 and members > 2
    honest = start()
    assert primary.wait() == [0] and honest.wait() == [0], primary.text() + honest.text()
    assert arrived(run) == alone
    assert "Traceback" not in primary.text() + honest.text()
    excluded = [line for line in primary.text().splitlines() if "is excluded and its work" in line]
    assert len(excluded) == forged


@pytest.mark.slow
def test_a_replica_that_comes_back_late_is_ignored_and_goes_on(start, alone, tmp_path):
    primary = start(join=False, slow=0.02)
    client = start(slow=0.1)
    await_text(client.log, "joined")
    await_journal(tmp_path / "run", "iteration", 1)
    time.sleep(0.5)
    os.killpg(client.group, signal.SIGSTOP)
    await_journal(tmp_path / "run", "iteration", 3)
    os.killpg(client.group, signal.SIGCONT)
    assert client.wait() == [0] and primary.wait() == [0], primary.text() + client.text()
    assert arrived(tmp_path / "run") == alone


def test_when_the_primary_job_dies_its_clients_end_and_the_run_goes_on_from_the_journal(
    start, alone, tmp_path
):
    primary = start(join=False, slow=0.02)
    client = start(slow=0.02)
    await_text(client.log, "joined")
    await_journal(tmp_path / "run", "iteration", 2)
    primary.kill()
    primary.wait()
    assert client.wait(4 * TIMEOUT + 10) == [1]
    assert "the primary job is gone" in client.text()
    (tmp_path / "run" / "meeting").unlink()
    primary = start(join=False, slow=0.01)
    client = start()
    assert client.wait() == [0] and primary.wait() == [0], primary.text() + client.text()
    assert "resuming at iteration" in primary.text()
    assert arrived(tmp_path / "run") == alone


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 0), (signal.SIGUSR1, 75)])
def test_a_signal_to_the_primary_job_ends_its_clients_likewise(start, tmp_path, number, code):
    primary = start(join=False, slow=0.02)
    client = start(slow=0.02)
    await_text(client.log, "joined")
    await_journal(tmp_path / "run", "iteration", 1)
    os.kill(primary.group, number)
    assert primary.wait(10) == [code], primary.text()
    assert client.wait(10) == [code], client.text()
    assert "Traceback" not in primary.text() + client.text()


@pytest.mark.slow
def test_a_client_that_is_asked_to_leave_gives_its_member_up_at_once(start, alone, tmp_path):
    primary = start("replicas.timeout=30", join=False, slow=0.005)
    client = start("replicas.timeout=30", slow=0.2)
    await_text(client.log, "joined")
    await_journal(tmp_path / "run", "iteration", 1)
    time.sleep(1)
    os.kill(client.group, signal.SIGUSR1)
    assert client.wait(10) == [75], client.text()
    left = time.monotonic()
    assert primary.wait(25) == [0], primary.text()
    assert time.monotonic() - left < 25
    assert arrived(tmp_path / "run") == alone


@pytest.mark.slow
def test_a_client_whose_center_went_wrong_ends_and_the_run_goes_on(start, alone, tmp_path):
    primary = start(join=False, slow=0.02)
    client = start(flip=[0, 2])
    assert client.wait() == [1]
    assert "is rebuilt with digest" in client.text()
    assert not list((tmp_path / "run").glob("logs/*/rank*"))
    assert primary.wait() == [0], primary.text()
    assert arrived(tmp_path / "run") == alone


@pytest.mark.slow
def test_who_does_not_fit_is_refused_in_one_line_and_the_run_is_not_disturbed(
    start, alone, folder, tmp_path
):
    primary = start("es.iterations=500", join=False, slow=0.005)
    await_text(tmp_path / "run" / "meeting")
    (tmp_path / "strange").mkdir()
    (tmp_path / "strange" / "token").write_text("that of another run")
    cases = [
        ([f"run.dir={tmp_path}/strange"], {}, "the token does not match"),
        ([f"model.path={folder}/other"], {}, "model.safetensors is not the run's"),
        (["es.sigma=0.06"], {}, "es.sigma=0.06: the run has 0.05"),
        (["eval.every=3"], {}, "eval.every=3: the run has 2"),
        (["replicas.join=127.0.0.1:1"], {}, "cannot join"),
        (
            ["es.noise=low_rank"],
            {},
            "the run's noise is philox4x32-10/quantile16/1, this job's philox4x32-10/quantile16/l",
        ),
        ([], {"ranks": 2}, "a launch joins as one replica"),
    ]
    clients = [start("es.iterations=500", *keys, **given) for keys, given, _ in cases]
    for client, (_, given, complaint) in zip(clients, cases, strict=True):
        ranks = given.get("ranks", 1)
        assert client.wait() == [2] * ranks, client.text()
        errors = [line for line in client.text().splitlines() if line.startswith("error: ")]
        assert len(errors) == 1 and complaint in errors[0], client.text()
        assert "Traceback" not in client.text()
    assert primary.poll(0) == [None], primary.text()
    known = journal.read(folder / "alone" / "journal.jsonl").records
    await_journal(tmp_path / "run", "iteration", len(known) + 1)
    os.kill(primary.group, signal.SIGTERM)
    assert primary.wait(10) == [0], primary.text()
    records = journal.read(tmp_path / "run" / "journal.jsonl").records
    assert records[: len(known)] == known and records[len(known)].digest == alone


@pytest.mark.slow
def test_a_faster_replica_takes_more_and_nobody_waits_long(start, alone, tmp_path):
    primary = start("es.population_size=16", "es.iterations=3", join=False, slow=0.02)
    client = start("es.population_size=16", "es.iterations=3", slow=0.06)
    assert client.wait() == [0] and primary.wait() == [0], primary.text() + client.text()
    rows = [
        json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    ]
    slowest = (
        0.06 * 24 + 0.3
    )  # seconds that a member takes the slow one: its decode steps, and some more
    assert 4 <= evaluated(client) <= 20  # a quarter of 48 members is its share
    assert max(row["seconds_idle"] for row in rows) < slowest, rows
