"""Both engines on the device, and ranks that share it, beside one rank on the CPU."""

import json
import sys
from itertools import chain

import pytest

from launch import NO_GPU, ROOT, run

pytestmark = pytest.mark.gpu
LAYOUTS = {  # engine, shard, tensor
    "1 rank": ("deepspeed", 1, 1),
    "FSDP, 1 rank": ("fsdp", 1, 1),
    "ZeRO 2": ("deepspeed", 2, 1),
    "TP 2": ("deepspeed", 1, 2),
    "FSDP 2": ("fsdp", 2, 1),
    "FSDP, TP 2": ("fsdp", 1, 2),
    "ZeRO 2 × TP 2": ("deepspeed", 2, 2),
    "FSDP 2 × TP 2": ("fsdp", 2, 2),
}
GREEDY = ("tokens", "processed tokens", "member tokens", "low-rank member tokens", "side by side")


def examine(model, folder, layout, environ: dict[str, str]) -> tuple[list[dict], str]:
    """Each rank's report, as far as it got, and the output."""
    engine, shard, tensor = layout
    folder.mkdir()
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node"]
    command += [str(shard * tensor), "--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0"]
    command += [str(ROOT / "tests/workers/gpu_layout.py"), engine, str(shard), str(tensor)]
    threads = {"OMP_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "1"}  # the model is tiny
    done = run([*command, str(model)], 280, RESULTS=str(folder), **threads, **environ)
    reports = [json.loads(file.read_text()) for file in sorted(folder.glob("*.json"))]
    return reports, f"exit code {done.returncode}\n{done.stdout[-1000:]}\n{done.stderr[-4000:]}"


@pytest.fixture(scope="module")
def started(device, environ, pool, biased_qwen, most_ranks, chosen, tmp_path_factory):
    """The layouts' results to come, and those of the CPU."""
    folder = tmp_path_factory.mktemp("layouts")

    def start(name, layout, variables):
        return pool.submit(examine, biased_qwen, folder / name, layout, variables)

    futures = {"CPU": start("CPU", LAYOUTS["1 rank"], NO_GPU)}
    for name, layout in LAYOUTS.items():
        if name in chosen and layout[1] * layout[2] <= most_ranks:
            futures[name] = start(name, layout, environ)
    yield futures
    for future in futures.values():
        future.cancel()


@pytest.fixture(scope="module")
def expected(started) -> dict[str, dict]:
    """What the CPU computes, by dtype."""
    (report,), output = started["CPU"].result()
    assert report["variants"], output
    by_dtype = {name.split(",")[0]: values for name, values in report["variants"].items()}
    assert not any("failed" in values for values in by_dtype.values()), by_dtype
    return by_dtype


@pytest.fixture(scope="module", params=LAYOUTS)
def results(request, started, most_ranks):
    """Each rank's results of each variant that it could compute: (rank, variant, values)."""
    if request.param not in started:
        pytest.skip(f"{request.param} needs 4 ranks, and this test starts {most_ranks} here")
    reports, output = started[request.param].result()
    return reports, output


def variants(results):
    return [
        (report["rank"], name, values)
        for report in results[0]
        for name, values in report["variants"].items()
        if "failed" not in values
    ]


def test_every_variant_runs(device, results):
    reports, output = results
    failed = [
        f"rank {report['rank']}, {name}:\n{values['failed']}"
        for report in reports
        for name, values in report["variants"].items()
        if "failed" in values
    ]
    assert not failed, "\n".join(failed)
    assert reports and all(report["variants"] for report in reports), output
    assert output.startswith("exit code 0"), output
    assert {report["device"].split(":")[0] for report in reports} == {device.type}


def test_centers_are_those_of_the_cpu(results, expected):
    for rank, name, values in variants(results):
        cpu = expected[name.split(",")[0]]
        for key in ("base", "digests", "low-rank digest", "numel"):
            part = values[key]
            if key != "numel" or len(results[0]) == 1:
                assert part == cpu[key], (rank, name, key)
        assert values["after a failure"] == cpu["base"] and values["live again"], (rank, name)
        assert values["distance"] == pytest.approx(cpu["distance"]), (rank, name)


def test_members_weights_are_those_of_the_cpu(results, expected):
    """In bfloat16 and float16 too, a member is rounded once, from the exact center."""
    for rank, name, values in variants(results):
        assert values["member weights"] == expected[name.split(",")[0]]["member weights"], (
            rank,
            name,
        )


def share(one: list, other: list) -> float:
    """The share of responses that are equal, in percent."""
    return 100 * sum(a == b for a, b in zip(one, other, strict=True)) / len(one)


def test_answers_are_those_of_the_cpu(results, expected, record_property):
    """In float32; where two logits nearly tie, a rounding may choose the other token."""
    for rank, name, values in variants(results):
        dtype = name.split(",")[0]
        got, wanted = (list(chain(*(v[key] for key in GREEDY))) for v in (values, expected[dtype]))
        equal = share(got, wanted)
        if rank == 0:
            record_property(f"responses as on the CPU, {name}, percent", equal)
        assert dtype != "float32" or equal >= 85, (rank, name, equal)
        assert values["tokens again"] == values["tokens"], (rank, name)
        assert not any(values["invalid tokens"]), (rank, name)
        if dtype == "float32":
            for own, other in zip(values["log_probs"], expected[dtype]["log_probs"], strict=True):
                assert own == pytest.approx(other, abs=2e-3), (rank, name)


def test_members_side_by_side_answer_as_alone(results, expected):
    for rank, name, values in variants(results):
        alone = values["low-rank member tokens"]
        equal = share(values["side by side"][: len(alone)], alone)
        assert not name.startswith("float32") or equal >= 80, (rank, name, equal)
        assert share(values["alone again"], values["tokens"]) >= 80, (rank, name)
