"""Every layout computes the same center, to the bit: sharding changes memory and speed alone."""

import json
from pathlib import Path

import pytest

from models import paper_coefficients
from reference import Reference
from shardes.es.population import member_seeds
from workers.layout import ENDS, GROUP, PROCESSORS, PROMPTS, RANK, RESPONSES, REWARDS, SEEDS

LAYOUTS = {  # engine, replicas, shard, tensor
    "1 rank": ("deepspeed", 1, 1, 1),
    "ZeRO 2": ("deepspeed", 1, 2, 1),
    "TP 2": ("deepspeed", 1, 1, 2),
    "ZeRO 2 × TP 2": ("deepspeed", 1, 2, 2),
    "2 replicas × ZeRO 2": ("deepspeed", 2, 2, 1),
    "FSDP, 1 rank": ("fsdp", 1, 1, 1),
    "FSDP 2": ("fsdp", 1, 2, 1),
    "FSDP, TP 2": ("fsdp", 1, 1, 2),
    "FSDP 2 × TP 2": ("fsdp", 1, 2, 2),
}


# The layouts of the default run, with a few models each. The other layouts cover the same code, and
# tests/launchers always runs two replicas.
FAST = {
    "1 rank": ["tied_llama", "moe_qwen"],
    "ZeRO 2": ["uneven_llama", "moe_qwen"],
    "ZeRO 2 × TP 2": ["uneven_llama"],  # four ranks are slow on two cores
    "FSDP 2 × TP 2": ["biased_qwen"],
}


def models(name: str) -> list[str]:
    """Those that a layout runs: only AutoTP splits heads unevenly, and not experts."""
    if name in FAST:
        return FAST[name]
    engine, _, _, tensor = LAYOUTS[name]
    names = ["tied_llama", "biased_qwen"]
    if engine == "deepspeed":
        names.append("uneven_llama")
    if engine == "fsdp" or tensor == 1:
        names.append("moe_qwen")
    return names


@pytest.fixture(
    scope="module",
    params=[pytest.param(name, marks=() if name in FAST else pytest.mark.slow) for name in LAYOUTS],
)
def layout(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def results(zygote, layout, directories, tmp_path_factory) -> list[dict]:
    _, replicas, shard, tensor = LAYOUTS[layout]
    every = 2 if layout in FAST and shard > 1 else 1
    ranks, folder = replicas * shard * tensor, tmp_path_factory.mktemp("layout")
    arguments = [*LAYOUTS[layout], every, *(directories[name] for name in models(layout))]
    run = zygote.start(*map(str, arguments), ranks=ranks, log=folder / "log", tool="layout")
    assert run.wait(240) == [0] * ranks, run.text()
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(ranks)]


@pytest.fixture(scope="module")
def directories(uneven_llama, tied_llama, biased_qwen, moe_qwen) -> dict[str, Path]:
    return {
        "uneven_llama": uneven_llama,
        "tied_llama": tied_llama,
        "biased_qwen": biased_qwen,
        "moe_qwen": moe_qwen,
    }


@pytest.fixture(scope="module")
def references(directories) -> dict[str, dict]:
    return {name: expected_results(directory) for name, directory in directories.items()}


def expected_results(directory: Path) -> dict:
    """What every layout must give; see tests/workers/layout.py."""
    reference = Reference(directory)
    expected = {
        "base": reference.digest(),
        "tokens": reference.generate(PROMPTS, 24, ENDS),
        "processed tokens": reference.generate(PROMPTS, 24, ENDS, **PROCESSORS),
        "sampled": [reference.sample(*row, 24, ENDS) for row in zip(PROMPTS, SEEDS, strict=True)],
        "log_probs": list(map(reference.log_probs, PROMPTS, RESPONSES)),
        "numel": sum(weight.numel() for weight in reference.weights.values()),
    }
    reference.perturb(7, 0.05)
    expected["member tokens"] = reference.generate(PROMPTS, 24, ENDS)
    low_rank = Reference(directory)
    low_rank.perturb(7, 0.05, RANK)
    expected["low-rank member tokens"] = low_rank.generate(PROMPTS, 24, ENDS)
    expected["side by side"] = [*expected["low-rank member tokens"]]
    for member in GROUP[1:]:
        alone = Reference(directory)
        alone.perturb(member.seed, member.sigma, RANK)
        expected["side by side"] += alone.generate(PROMPTS, 24, ENDS)
    seeds = member_seeds(5, 0, len(REWARDS[0]))
    low_rank.update(seeds, paper_coefficients(REWARDS[0], 0.05), RANK)
    expected["low-rank digest"] = low_rank.digest()
    expected["digests"] = []
    for iteration, rewards in enumerate(REWARDS):
        seeds = member_seeds(5, iteration, len(rewards))
        reference.update(seeds, paper_coefficients(rewards, 0.05))
        expected["digests"].append(reference.digest())
    return expected


def cases(results: list[dict]):
    """Each rank's results by model, dtype and gather mode: (rank, model, dtype, values)."""
    for result in results:
        for key, values in result.items():
            if key != "rank":
                yield result["rank"], key.split()[0], key.split()[1], values


def test_centers_are_the_same_to_the_bit_in_every_dtype(results, references):
    for rank, model, dtype, values in cases(results):
        expected = references[model]
        assert values["base"] == expected["base"], (rank, model, dtype)
        assert values["digests"] == expected["digests"], (rank, model, dtype)
        assert values["low-rank digest"] == expected["low-rank digest"], (rank, model, dtype)


def test_responses_end_at_different_lengths(references):
    """Otherwise the forward passes of the shard axis would be in step without synchronization."""
    for name, expected in references.items():
        assert len({len(tokens) for tokens in expected["tokens"]}) > 1, name


@pytest.mark.parametrize(
    "key", ["tokens", "processed tokens", "member tokens", "low-rank member tokens", "sampled"]
)
def test_tokens_are_those_of_transformers_on_every_rank(results, references, key):
    for rank, model, dtype, values in cases(results):
        if dtype == "float32":
            assert values[key] == references[model][key], (rank, model)


def test_decode_steps_of_fixed_shapes_give_the_same_tokens(results, references):
    for rank, model, dtype, values in cases(results):
        if dtype == "float32":
            expected = references[model]["member tokens"]
            assert values["static member tokens"] == expected, (rank, model)


def test_members_answer_side_by_side_as_alone(results, references, layout):
    for rank, model, dtype, values in cases(results):
        if "moe" in model and LAYOUTS[layout][3] > 1:
            assert "experts.gate_up_proj" in values["side by side"]
        elif dtype == "float32":
            for key in ("side by side", "static side by side"):
                assert values[key] == references[model]["side by side"], (rank, model, key)
            assert values["alone again"] == values["tokens"], (rank, model)


def test_log_probabilities_are_those_of_transformers_on_every_rank(results, references):
    for rank, model, dtype, values in cases(results):
        tolerance = 1e-4 if dtype == "float32" else 0.2
        pairs = zip(values["log_probs"], references[model]["log_probs"], strict=True)
        for log_probs, expected in pairs:
            assert log_probs == pytest.approx(expected, abs=tolerance), (rank, model, dtype)


def test_every_rank_sees_logits_that_are_not_finite(results):
    for _, _, _, values in cases(results):
        assert values["invalid tokens"] == [[]] * len(PROMPTS)


def test_the_center_is_restored_after_a_failure(results):
    for _, _, _, values in cases(results):
        assert values["after a failure"] == values["base"]
        assert values["live again"]
        assert values["tokens again"] == values["tokens"]


def test_every_element_is_counted_once(results, references, layout):
    replicas = LAYOUTS[layout][1]
    totals: dict[str, int] = {}
    for result in results:
        for key, values in result.items():
            if key != "rank":
                totals[key] = totals.get(key, 0) + values["numel"]
    for key, total in totals.items():
        assert total == replicas * references[key.split()[0]]["numel"], key


def test_nothing_of_training_is_kept(results):
    for _, _, _, values in cases(results):
        assert values["gradients"] == 0
        assert values.get("optimizer") in (None, ["DeepSpeedZeRoOffload", None])


def test_the_distance_from_the_base_is_that_of_the_update(results):
    distances = [values["distance"] for _, _, _, values in cases(results)]
    assert all(distance["distance"] > 0 for distance in distances)
    by_model: dict[str, list[float]] = {}
    for _, model, _, values in cases(results):
        by_model.setdefault(model, []).append(values["distance"]["distance_relative"])
    for relative in by_model.values():
        assert max(relative) == pytest.approx(min(relative), rel=1e-9)
