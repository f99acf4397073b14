"""Each variant does what its formula says; together they keep a run exact."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from scipy.stats import rankdata

from launch import call
from shardes.commands import export, journal
from shardes.config.schema import Config, ESConfig, Fitness, Schedule
from shardes.es.fitness import centered_ranks, coefficients, fitness
from shardes.es.population import (
    Iteration,
    Member,
    member_seeds,
    members,
    prompt_batch,
    schedule,
)
from shardes.es.update import Update
from shardes.noise import gaussian
from shardes.sharding.regions import Region
from shardes.sharding.weight_files import WeightFiles
from shardes.storage.journal import read

TASK = """
class Letters:
    def prompts(self, split):
        train = ["abc", "a much longer prompt", "x", "yz", "0"]
        return train if split == "train" else ["hello", "you"]
    def score(self, split, responses, which=None):
        return [float(sum(map(ord, text)) % 97) for text in responses]
"""
VARIANTS = {
    "antithetic": True,
    "fitness": "centered_rank",
    "standardize_prompts": True,
    "sigma_final": 0.03,
    "alpha_final": 0.01,
    "schedule": "cosine",
    "weight_decay": 0.01,
    "decay_to": "base",
    "evolve": "mlp|embed",
}


def test_antithetic_members_are_mirrored_and_their_update_is_the_difference():
    es = ESConfig(population_size=4, antithetic=True)
    iteration = Iteration.derive(Config(es=es), 3, "digest", [[1]])
    seeds = member_seeds(es.seed, 3, 2)
    assert iteration.seeds == seeds and len(seeds) == 2
    expected = [(seeds[0], 0.1), (seeds[0], -0.1), (seeds[1], 0.1), (seeds[1], -0.1)]
    assert members(es, seeds, 0.1) == [Member(*pair) for pair in expected]
    found = coefficients(es, 0.2, [1.0, -0.5, 0.25, 0.5])
    assert found == [float(np.float32(0.05 * difference)) for difference in (1.5, -0.25)]


@given(st.lists(st.sampled_from([-2.0, 0.0, 0.5, 3.0, 7.0]), min_size=2, max_size=20))
def test_centered_ranks_are_those_of_scipy(rewards):
    expected = (rankdata(rewards) - 1) / (len(rewards) - 1) - 0.5
    assert centered_ranks(rewards) == pytest.approx(expected.tolist())


def test_each_prompts_rewards_are_standardised_over_the_members():
    scores = np.array([[1.0, 100.0, 5.0], [2.0, 300.0, 5.0], [4.0, -50.0, 5.0], [0.0, 20.0, 5.0]])
    spread = scores.std(0)
    z = (scores - scores.mean(0)) / np.where(spread > 0, spread, 1)
    expected = z.mean(1)
    es = ESConfig(standardize_prompts=True)
    assert fitness(es, scores.tolist()) == pytest.approx(
        ((expected - expected.mean()) / expected.std()).tolist()
    )
    es = ESConfig(standardize_prompts=True, fitness=Fitness.centered_rank)
    assert fitness(es, scores.tolist()) == centered_ranks(expected.tolist())


@pytest.mark.parametrize("kind, middle", [(Schedule.linear, 0.55), (Schedule.cosine, 0.55)])
def test_schedules_go_from_the_first_value_to_the_final_one(kind, middle):
    es = ESConfig(sigma=1.0, sigma_final=0.1, alpha=0.5, iterations=9, schedule=kind)
    assert [schedule(es, i)[0] for i in (0, 4, 8)] == pytest.approx([1.0, middle, 0.1])
    assert {schedule(es, i)[1] for i in range(9)} == {0.5}
    quarter = 1 - 0.9 * (0.25 if kind is Schedule.linear else (1 - 2**-0.5) / 2)
    assert schedule(es, 2)[0] == pytest.approx(quarter)


@given(st.integers(0, 5), st.integers(1, 30), st.integers(1, 12))
def test_every_epoch_asks_every_prompt_once(seed, size, count):
    asked = [
        number
        for iteration in range(2 * count)
        for number in prompt_batch(seed, iteration, size, count)
    ]
    epochs = [asked[begin : begin + count] for begin in range(0, len(asked) - count + 1, count)]
    assert all(sorted(epoch) == list(range(count)) for epoch in epochs)
    assert prompt_batch(seed, 0, None, count) is None


def test_epochs_and_run_seeds_are_shuffled_differently():
    orders = {tuple(prompt_batch(seed, epoch, 50, 50)) for seed in range(3) for epoch in range(3)}
    assert len(orders) == 9


@pytest.mark.parametrize("decay_to", ["zero", "base"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weight_decay_is_its_formula_on_any_cut(tmp_path, decay_to, dtype):
    save_file({"w": torch.randn(1000)}, tmp_path / "model.safetensors")
    base, theta = WeightFiles(tmp_path), torch.randn(1000).to(dtype)
    update = Update([5, 6], [0.5, -0.25], weight_decay=0.1, decay_to=decay_to)
    origin = torch.empty(1000)
    base.read("w", [Region.contiguous(0, 1000)], origin)
    anchor = origin if decay_to == "base" else torch.zeros(1000)
    noise = 0.5 * gaussian(5, "w", 0, 1000) - 0.25 * gaussian(6, "w", 0, 1000)
    expected = (theta.double() - 0.1 * (theta.double() - anchor) + noise).to(dtype)
    whole = theta.clone()
    update.apply(whole, "w", (1000,), [Region.contiguous(0, 1000)], base, whole)
    assert whole.float() == pytest.approx(
        expected.float(), abs=1e-5 if dtype is torch.float32 else 0.05
    )
    pieces = [theta[begin : begin + 125].clone() for begin in range(0, 1000, 125)]
    for number, piece in enumerate(pieces):
        update.apply(piece, "w", (1000,), [Region.contiguous(125 * number, 125)], base, piece)
    assert torch.equal(torch.cat(pieces), whole)


def test_what_does_not_evolve_is_left_alone(tmp_path):
    save_file({"w": torch.randn(8)}, tmp_path / "model.safetensors")
    theta = torch.ones(8)
    for pattern, touched in (("^v", False), ("w|x", True), (None, True)):
        update = Update([1], [0.5], weight_decay=0.5, evolve=pattern)
        found = theta.clone()
        update.apply(found, "w", (8,), [Region.contiguous(0, 8)], WeightFiles(tmp_path))
        assert torch.equal(found, theta) != touched


def test_with_low_rank_noise_vectors_are_left_alone(tmp_path):
    save_file({"w": torch.randn(2, 4)}, tmp_path / "model.safetensors")
    update, base = Update([1], [0.5], weight_decay=0.5, rank=1), WeightFiles(tmp_path)
    for shape, touched in (((8,), False), ((2, 4), True)):
        theta = torch.ones(8)
        update.apply(theta, "w", shape, [Region.contiguous(0, 8)], base)
        assert torch.equal(theta, torch.ones(8)) != touched


@pytest.fixture(scope="module")
def varied(zygote, uneven_llama, tmp_path_factory):
    """Run directories with every variant on, on two layouts and after a kill."""
    home = tmp_path_factory.mktemp("varied")
    (home / "task.py").write_text(TASK)
    directories = {}
    for name, keys, faults in (
        ("one", [], {}),
        ("sharded", ["sharding.shard=2"], {}),
        ("killed", [], {"kill_in_append": ["reward", 9]}),
    ):
        settings = {
            "model": {"path": str(uneven_llama), "dtype": "float32"},
            "es": {"population_size": 6, "sigma": 0.05, "alpha": 0.05, "iterations": 4, **VARIANTS},
            "generation": {"max_new_tokens": 6},
            "task": {"path": f"{home}/task.py:Letters", "prompts_per_iteration": 2},
            "eval": {"every": 1},
            "checkpoint": {"every": 3, "keep": 1, "best": True},
            "run": {"dir": str(home / name), "timeout": 60},
        }
        file = home / f"{name}.yaml"
        file.write_text(yaml.safe_dump(settings))
        started = zygote.start(
            str(file), *keys, ranks=1 + len(keys), log=home / f"{name}.log", **faults
        )
        if faults:
            assert started.wait() != [0]
            started = zygote.start(str(file), *keys, log=home / f"{name}.log")
        assert set(started.wait()) == {0}, started.text()
        directories[name] = home / name
    return directories


def test_all_variants_together_are_exact_on_any_layout_and_after_a_kill(varied):
    one, *others = (read(directory / "journal.jsonl") for directory in varied.values())
    assert len(one.records) == 4
    for other in others:
        assert other.records == one.records
        assert other.finish.digest == one.finish.digest


def test_every_evaluation_asks_the_training_prompts_of_the_first_iteration(varied):
    asked: dict[int, list[str]] = {}
    for row in map(json.loads, (varied["one"] / "samples.jsonl").read_text().splitlines()):
        if row["split"] == "train":
            asked.setdefault(row["iteration"], []).append(row["prompt"])
    assert sorted(asked) == [0, 1, 2, 3, 4] and len(asked[0]) == 2
    assert all(prompts == asked[0] for prompts in asked.values())


def test_the_journal_rebuilds_what_variants_made(varied):
    assert call(journal.main, varied["one"], "verify").returncode == 0
    out = varied["one"].with_name("exported")
    done = call(export.main, varied["one"], out, "--dtype", "float32")
    assert done.returncode == 0, done.stderr


def test_the_record_says_which_prompts_were_asked_and_the_metrics_where_the_rewards_are_from(
    varied, uneven_llama
):
    records = read(varied["one"] / "journal.jsonl").records
    assert [record.prompts for record in records] == [prompt_batch(0, i, 2, 5) for i in range(4)]
    assert [len(record.seeds) for record in records] == [3] * 4
    assert records[0].sigma == 0.05
    assert records[3].sigma == pytest.approx(0.03)
    base, tuned = (
        WeightFiles(uneven_llama),
        WeightFiles(varied["one"] / "snapshots" / "iteration_4"),
    )
    for name in ("model.layers.0.mlp.up_proj.weight", "model.layers.0.self_attn.q_proj.weight"):
        numel = int(np.prod(base.tensors[name].shape))
        before, after = torch.empty(numel), torch.empty(numel)
        base.read(name, [Region.contiguous(0, numel)], before)
        tuned.read(name, [Region.contiguous(0, numel)], after)
        assert torch.equal(before, after) == ("mlp" not in name)


def test_the_best_held_out_center_is_kept(varied):
    directory: Path = varied["one"]
    rows = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    summary = json.loads((directory / "summary.json").read_text())
    rewards = [row["held_out_reward"] for row in rows] + [summary["held_out_reward_last"]]
    best = rewards.index(max(rewards))
    assert (directory / "snapshots" / "best").readlink() == Path(f"iteration_{best}")
    assert (directory / "snapshots" / "best" / "config.json").exists()
