"""The search for the fastest plan that fits, cards by name, the whole run, and plans of a model."""

import json
import shutil
import socket

import pytest

from benchmarks import update_limit
from launch import ROOT, call
from shardes.commands.plan import main
from shardes.config.loading import load
from shardes.config.schema import Config, ESConfig, ModelConfig, Noise
from shardes.planning.devices import GPUS, slowest_gpu
from shardes.planning.layouts import Machine
from shardes.planning.planner import Planner, largest
from shardes.planning.workload import Workload

DATA = ROOT / "tests" / "data"


def report(*arguments, code=0):
    done = call(main, *arguments, "--json")
    assert done.returncode == code, done.stdout + done.stderr
    return json.loads(done.stdout)


def test_a_batch_that_fills_the_memory_is_faster(config):
    """72 billion parameters on 2 × 8 GPUs of 80 GB: one batch of 200 prompts instead of four."""
    machine = ["--gpus", 8, "--nodes", 2, "--gpu", "H100"]
    plan = report(config(DATA / "qwen2.5-72b", tensor=4), *machine)
    configured, suggested = plan["configured"], plan["suggested"]
    assert configured["fits"] and configured["seconds"]["total"] == pytest.approx(469.7, rel=0.02)
    assert suggested["batch_tokens"] == pytest.approx(230_000, rel=0.01)
    assert suggested["gpu_total"] == pytest.approx(67.8e9, rel=0.01)
    assert suggested["seconds"]["total"] == pytest.approx(163.2, rel=0.02)
    assert [plan["best"][0]["plan"], len(plan["best"])] == [suggested["plan"], 4]
    seconds = [each["seconds"]["total"] for each in plan["best"]]
    assert seconds == sorted(seconds)


def test_a_batch_that_does_not_fit_is_cut(config, tmp_path):
    """7 billion parameters on one card of 24 GB; the settings can be pasted."""
    file, machine = config(DATA / "qwen2.5-7b"), ["--gpus", 1, "--gpu", "4090"]
    plan = report(file, "generation.batch_tokens=230000", *machine, code=1)
    assert not plan["configured"]["fits"]
    suggested = plan["suggested"]
    assert suggested["fits"] and suggested["batch_tokens"] == pytest.approx(90_000, rel=0.05)
    assert suggested["gpu_total"] > 0.97 * 24e9
    pasted = suggested["settings"].split()
    assert load(file, pasted).generation.batch_tokens == suggested["batch_tokens"]
    again = report(file, *pasted, *machine)
    assert again["configured"]["seconds"] == suggested["seconds"] and "suggested" not in again


def test_members_of_low_rank_noise_share_batches_and_gathers(config):
    """With a shard axis, one gather serves all members of a batch."""
    keys = ["es.noise=low_rank", "sharding.shard=8", "sharding.gather=layer"]
    few = ["--prompts", 8, "--prompt-tokens", 100, "--gpus", 8, "--gpu", "H100"]
    file = config(DATA / "llama-3.1-70b")
    low_rank = report(file, *keys, *few)["configured"]
    full = report(file, *keys[1:], *few)["configured"]
    assert low_rank["members_per_batch"] == 30 and full["members_per_batch"] == 1
    assert 20 * low_rank["network"]["gathered"] < full["network"]["gathered"]
    assert low_rank["gpu"]["low-rank factors"] > 0 and "low-rank factors" not in full["gpu"]
    assert 4 * low_rank["seconds"]["update"] < 4.01 * full["seconds"]["update"]
    for part in ("decode", "gather"):
        assert low_rank["seconds"][part] < full["seconds"][part] / 4


def test_plans_of_low_rank_noise_fit_and_use_more_memory_for_larger_batches():
    config = Config(
        model=ModelConfig(str(DATA / "llama-3.1-8b")), es=ESConfig(noise=Noise.low_rank)
    )
    workload = Workload((100,) * 8, (100,) * 8, 256, 65536)
    sizes = []
    for memory in (20e9, 22e9, 40e9):
        machine = Machine(1, 1, memory, int(2e12))
        planner = Planner(config, workload, machine, GPUS["4090"], 256)
        plan = planner.search()[0]
        assert planner.memory(plan).fits(machine) and plan.members > 1
        sizes.append(plan.batch_tokens)
    assert sizes == sorted(set(sizes)) and sizes[-1] == 30 * 8 * 356


def test_no_plan_is_suggested_that_training_refuses(config):
    """Graphs need weights at fixed addresses; members share experts only on a whole tensor axis."""
    machine = ["--gpus", 4, "--gpu", "H100"]
    for engine in ("deepspeed", "fsdp"):
        keys = ["generation.decode=graph", f"engine={engine}"]
        for plan in report(config(DATA / "qwen2.5-7b"), *keys, *machine)["best"]:
            layout = plan["layout"]
            assert layout["shard"] == 1 or (layout["engine"], layout["gather"]) == (
                "deepspeed",
                "member",
            )
            assert layout["offload"] == "none" or layout["gather"] == "member"
    few = ["--prompts", 2, "--prompt-tokens", 100, *machine]
    keys = ["es.noise=low_rank", "engine=fsdp", "generation.max_new_tokens=16"]
    for plan in report(config(DATA / "qwen3-30b-a3b"), *keys, *few)["best"]:
        assert plan["layout"]["tensor"] == 1 or plan["members_per_batch"] == 1


@pytest.mark.parametrize(
    "model, keys, message",
    [
        (
            "qwen2.5-7b",
            ["generation.decode=graph", "sharding.shard=2", "sharding.gather=layer"],
            "error: generation.decode=graph: with sharding.gather=layer",
        ),
        ("qwen2.5-7b", ["es.noise=low_rank", "es.rank=100000"], "error: es.rank=100000: "),
        (
            "qwen3-30b-a3b",
            ["es.noise=low_rank", "engine=fsdp", "sharding.tensor=2", "es.members_per_batch=4"],
            "error: es.members_per_batch=4: low-rank members cannot share experts",
        ),
    ],
)
def test_settings_that_training_refuses_are_refused(config, model, keys, message):
    done = call(main, config(DATA / model), *keys, "--gpus", 4, "--gpu", "H100")
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith(message) and done.stderr.count("\n") == 1, done.stderr


def test_the_largest_number_with_room():
    calls = []

    def room(number):
        calls.append(number)
        return 1e6 - 3 * (number // 500 * 500)  # a staircase, as memory is

    assert 0.98 * 1e6 / 3 < largest(room, 100, 10**9) <= 333_499 and len(calls) <= 10
    assert largest(room, 100, 1000) == 1000 and largest(lambda number: -1.0, 1, 5) is None


def test_memory_alone_stands_for_the_slowest_card(config):
    assert slowest_gpu(int(24e9)) == "L4" and slowest_gpu(int(80e9)) == "A100-80"
    file = config(DATA / "qwen2.5-7b")
    by_memory, by_name = (
        report(file, "--gpus", 1, *flag) for flag in (["--gpu-memory", "24GB"], ["--gpu", "l4"])
    )
    assert by_memory["best"] == by_name["best"]
    assert "L4, the slowest card known with that memory" in by_memory["notes"][0]


def test_the_whole_run(config):
    file = config(DATA / "llama-3.1-8b")
    machine = ["--gpus", 8, "--gpu", "H100"]
    keys = ["es.iterations=100", "eval.every=10", "checkpoint.keep=2"]
    once, often = (report(file, *keys, f"eval.every={n}", *machine) for n in (0, 10))
    seconds = once["configured"]["seconds"]["total"]
    for plan, evaluations in ((once, 2), (often, 11)):
        run = plan["configured"]["run"]
        figures = {name: figure["value"] for name, figure in run.items()}
        assert all(figure["assumption"] for figure in run.values())
        assert (
            f"100 iterations and {evaluations} evaluations" in run["hours, at least"]["assumption"]
        )
        assert figures["hours, likely"] == pytest.approx(2 * figures["hours, at least"])
        assert figures["GPU hours, likely"] == pytest.approx(8 * figures["hours, likely"])
        assert figures["disk"] == pytest.approx(3 * 4 * 8.03e9, rel=0.01)
        assert figures["bytes between replicas"] == 100 * 30 * 337
        evaluated = figures["hours, at least"] * 3600 - 100 * seconds
        assert 0.2 * evaluations * seconds / 4 < evaluated < 2 * evaluations * seconds


def test_a_directory_with_only_a_config_needs_no_config_and_no_hub(tmp_path, monkeypatch):
    def refuse(*_):
        raise AssertionError("a local model asks no hub")

    shutil.copy(DATA / "qwen2.5-7b" / "config.json", tmp_path)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    plan = report("--model", tmp_path, "--gpus", 1, "--gpu", "4090", "es.population_size=8")
    assert "configured" not in plan and plan["suggested"]["fits"]
    assert "task.name=countdown" in plan["notes"][0] and "N = 8" in plan["notes"][0]


def test_a_cpu_is_measured(config, uneven_llama):
    keys = ["model.dtype=float32", "generation.max_new_tokens=8"]
    few = ["--gpus", 2, "--gpu", "cpu", "--prompts", 4, "--prompt-tokens", 20]
    plan = report(config(uneven_llama), *keys, *few)
    configured = plan["configured"]
    assert "measured now on this machine" in plan["notes"][-1]
    assert configured["gpu"] == {} and configured["seconds"]["decode"] > 0
    assert configured["layout"]["replicas"] == 2


def test_the_docs_have_the_tables_of_the_updates_limit():
    rows = json.loads((ROOT / "results" / "scaling" / "update_limit.json").read_text())
    page = (ROOT / "docs" / "scaling.md").read_text()
    assert update_limit.update_table(rows) in page
    assert update_limit.iteration_table(rows) in page
    limits = {(row["model"], row["noise"]): row["limit"] for row in rows}
    for model in ("8B", "70B"):
        assert limits[model, "low_rank"] > 5 * limits[model, "full"]
        cost = update_limit.costs(model, Noise.full)
        assert limits[model, "full"] == pytest.approx(cost.limit, rel=0.01)
