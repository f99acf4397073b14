"""The scripts of launchers/slurm on a real SLURM of two nodes: pytest -m cluster."""

import json
import time
from pathlib import Path

import pytest

from cluster import slurm as cluster
from cluster.slurm import Slurm
from launch import ROOT, skip_without

pytestmark = [pytest.mark.cluster, pytest.mark.slow]

SMALL = ["--gpus-per-node=0", "--cpus-per-task=1", "--mem=0"]
ONE_NODE = [*SMALL, "launchers/slurm/one_node.sbatch"]
NODES = [*SMALL, "--nodes=2", "--ntasks-per-node=1", "launchers/slurm/nodes.sbatch"]
DEEPSPEED = [*SMALL, "--nodes=2", "launchers/slurm/deepspeed.sbatch"]
REPLICAS = [*SMALL, "--array=0-1", "launchers/slurm/replicas.sbatch"]
SEEDS = [*SMALL, "--array=3-4", "launchers/slurm/seeds.sbatch"]


@pytest.fixture(scope="module")
def slurm():
    skip_without(cluster.PROGRAMS, "slurm-wlm munge")
    with Slurm(RANKS_PER_NODE="1", OMP_NUM_THREADS="1") as slurm:
        yield slurm
    assert slurm.processes() == []


@pytest.fixture
def submit(slurm, tmp_path):
    """Submits a script; returns the job's number. No job outlives its test."""
    jobs = []

    def submit(script: list[str], *arguments: str) -> str:
        jobs.append(slurm.submit(*script, *arguments, output=tmp_path / "%j.out"))
        return jobs[-1]

    yield submit
    slurm.command("scancel", *jobs)


@pytest.fixture
def told(tmp_path, run_dir):
    """What a run's jobs and their tasks have printed."""

    def read() -> str:
        files = [*tmp_path.glob("*.out"), *run_dir.glob("logs/*/*")]
        return "\n".join(
            f"{file.name}:\n{file.read_text(errors='replace')}" for file in files if file.is_file()
        )

    return read


def await_iteration(slurm, job: str, run_dir, number: int, seconds: float = 600) -> None:
    """Wait until a running job has recorded an iteration."""
    journal, deadline = run_dir / "journal.jsonl", time.monotonic() + seconds
    while not journal.exists() or f'"iteration": {number},' not in journal.read_text():
        state = slurm.state(job)
        assert state["JobState"] in ("PENDING", "RUNNING") and time.monotonic() < deadline, state
        time.sleep(0.1)


def start_again(slurm, job: str) -> dict[str, str]:
    """Have SLURM start a requeued job in five seconds instead of two minutes; returns its state
    when it has ended.
    """
    done = slurm.command(
        "scontrol", "update", f"JobId={job}", "StartTime=now+5"
    )  # at once its credential is revoked
    assert done.returncode == 0, done.stderr
    return slurm.wait(job)


@pytest.mark.parametrize(
    "script", [ONE_NODE, NODES, DEEPSPEED], ids=["one node", "srun", "deepspeed"]
)
def test_a_run_from_start_to_end(slurm, submit, told, config, run_dir, arrived, script):
    job = submit(script, config)
    assert slurm.wait(job)["JobState"] == "COMPLETED", told()
    arrived()
    logs = run_dir / "logs" / job
    shown = [file for file in logs.iterdir() if "done: member reward" in file.read_text()]
    assert len(shown) == 1, told()
    tasks = 1 if script is ONE_NODE else 2
    assert len(list(logs.glob("task*.log"))) == tasks
    if script is not NODES:
        assert len(list(logs.glob("*_rank*.log"))) == tasks


@pytest.mark.parametrize("script", [NODES, DEEPSPEED], ids=["srun", "deepspeed"])
def test_a_preempted_run_is_requeued_and_goes_on(
    slurm, submit, told, config, run_dir, arrived, script, record_property
):
    job = submit(script, config, "sharding.shard=2")
    await_iteration(slurm, job, run_dir, 2)
    asked = time.monotonic()
    assert slurm.command("scancel", "--batch", "--signal=USR1", job).returncode == 0
    slurm.wait(job, 120, ("PENDING",))
    record_property("seconds from USR1 to requeued", time.monotonic() - asked)
    assert (
        "preempted; all finished members are kept" in told()
        and "preempted (exit code 75); requeued" in told()
    )
    state = start_again(slurm, job)
    assert (state["JobState"], state["Restarts"]) == ("COMPLETED", "1"), told()
    history = arrived()
    assert len(history.resumptions) == 1 and 2 <= history.resumptions[0].iteration < 8


def test_a_run_that_is_preempted_while_it_starts(slurm, submit, told, config, run_dir, arrived):
    """The announcement comes before any rank listens, and is not lost."""
    job = submit(NODES, config)
    slurm.wait(job, 120, ("RUNNING",))
    while not list(run_dir.glob("logs/*")):
        time.sleep(0.1)
    slurm.command("scancel", "--batch", "--signal=USR1", job)
    slurm.wait(job, 600, ("PENDING",))
    assert start_again(slurm, job)["JobState"] == "COMPLETED", told()
    arrived()


def test_a_more_urgent_job_takes_the_nodes(slurm, submit, told, config, run_dir, arrived):
    """SLURM kills the run and requeues it; what is in the journal is kept."""
    job = submit(NODES, config)
    await_iteration(slurm, job, run_dir, 1)
    urgent = slurm.submit(
        "--partition=urgent",
        "--nodes=2",
        "--exclusive",
        "--wrap=sleep 3",
        output=run_dir / "urgent",
    )
    slurm.wait(job, 120, ("PENDING",))
    assert slurm.wait(urgent, 120)["JobState"] == "COMPLETED"
    state = start_again(slurm, job)
    assert (state["JobState"], state["Restarts"]) == ("COMPLETED", "1"), told()
    arrived()


@pytest.mark.parametrize(
    "script, keys, said",
    [
        (NODES, ["es.sigm=1"], "error: es.sigm: no such key; did you mean es.sigma?"),
        (
            DEEPSPEED,
            ["sharding.shard=3"],
            "error: sharding.shard=3 × sharding.tensor=1: does not divide the 2 ranks",
        ),
    ],
    ids=["key", "layout"],
)
def test_mistakes_end_a_job_at_once(slurm, submit, told, config, run_dir, script, keys, said):
    job = submit(script, config, *keys)
    state = slurm.wait(job, 300)
    assert (state["JobState"], state["Restarts"]) == ("FAILED", "0")
    assert sum(line.startswith(said) for line in told().splitlines()) == 1, told()
    assert not list(run_dir.glob("logs/*/task*"))


def test_a_task_that_does_not_come_is_named(slurm, run_dir, tmp_path, config):
    """Ranks that wait for a node name it as SLURM does."""
    script = tmp_path / "wait.sh"
    script.write_text(
        "if [[ $SLURM_PROCID == 0 ]]; then "
        "export RANK=0 WORLD_SIZE=2 LOCAL_RANK=0 LOCAL_WORLD_SIZE=1\n"
        "export MASTER_ADDR=127.0.0.1 MASTER_PORT=0\n"
        'exec python -c "from shardes.distributed import rendezvous, world; '
        'rendezvous.NOTICE = 1; world.join_job(3)"; fi\n'
    )
    done = slurm.command("srun", "--nodes=2", "--ntasks=2", "bash", str(script))
    assert "for rank 1 of node 1 (n2)" in done.stderr and "not arrived at" in done.stderr, (
        done.stderr
    )


def test_an_array_of_replicas(slurm, submit, told, config, run_dir, arrived, settings):
    task = settings["task"]["path"].removesuffix(":Letters")
    job = submit(REPLICAS, config, f"task.path={task}:PatientLetters", "run.timeout=600")
    log = run_dir / "logs" / f"{job}_1" / "task0.log"
    Path(task).with_name("log_to_watch").write_text(str(log))
    for number in ("0", "1"):
        assert slurm.wait(f"{job}_{number}")["JobState"] == "COMPLETED", told()
    arrived()
    assert "joined the run at" in log.read_text(), told()


def test_an_array_of_run_seeds(slurm, submit, told, config, run_dir):
    job = submit(SEEDS, config)
    digests = set()
    for seed in (3, 4):
        assert slurm.wait(f"{job}_{seed}")["JobState"] == "COMPLETED", told()
        directory = run_dir.with_name(f"{run_dir.name}_seed{seed}")
        assert f"seed: {seed}\n" in (directory / "config.yaml").read_text()
        digests.add(json.loads((directory / "summary.json").read_text())["digest"])
    assert len(digests) == 2


def test_the_sites_setup_is_read_in_every_task(slurm, submit, told, config, run_dir, arrived):
    """A variable that a module sets, one that is unset, and the command of a container."""
    site = ROOT / "launchers/slurm/site.sh"
    if site.exists():
        pytest.skip(f"{site} exists")
    site.write_text(
        "module() { export HF_HUB_OFFLINE=1$UNSET; }\nmodule load\n"
        "container=(env HF_HUB_DISABLE_TELEMETRY=1)\n"
    )
    try:
        job = submit(NODES, config)
        assert slurm.wait(job)["JobState"] == "COMPLETED", told()
    finally:
        site.unlink()
    arrived()
    (file,) = run_dir.glob("logs/attempt_1/environment.json")
    environment = json.loads(file.read_text())["environment"]
    assert environment["HF_HUB_OFFLINE"] == environment["HF_HUB_DISABLE_TELEMETRY"] == "1"
