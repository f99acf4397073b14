"""The main job, started as a user starts it."""

import gzip
import json
import re
import shutil
import socket
import sys
from pathlib import Path

import pytest
import torch.distributed as dist
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from launch import deepspeed, run, script
from shardes.distributed.world import Job
from shardes.errors import ConfigError

train = script("launchers/train.py")

TASK = '''
class Letters:
    """Prompts of different lengths, raw and chat; a reward that differs from member to member."""
    def prompts(self, split):
        texts = ["abc", "a much longer prompt", "x"] if split == "train" else ["hello", "you"]
        return [*texts, [{"role": "user", "content": "chat"}]]
    def score(self, split, responses):
        return [float(sum(map(ord, text)) % 97) for text in responses]
'''


@pytest.fixture
def settings(tmp_path, uneven_llama) -> dict:
    (tmp_path / "task.py").write_text(TASK)
    return {
        "model": {"path": str(uneven_llama), "dtype": "float32"},
        "es": {"population_size": 5, "sigma": 0.05, "alpha": 0.05, "iterations": 3},
        "generation": {"max_new_tokens": 8},
        "task": {"path": f"{tmp_path}/task.py:Letters"},
        "eval": {"every": 2},
        "run": {"dir": str(tmp_path / "run"), "timeout": 60},
    }


@pytest.fixture
def config(tmp_path, settings):
    """A writer of config files: the settings above, changed by (section, key, value)."""

    def write(*changes: tuple[str, str, object]) -> str:
        for section, key, value in changes:
            (settings.setdefault(section, {}) if section else settings)[key] = value
        file = tmp_path / "config.yaml"
        file.write_text(yaml.safe_dump(settings))
        return str(file)

    return write


def lines(file) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def records(directory) -> list[dict]:
    return [entry for entry in lines(directory / "journal.jsonl") if entry["kind"] == "iteration"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Run directories by layout, for tests that compare layouts."""
    return {}


@pytest.mark.parametrize(
    "layout",
    [
        ("deepspeed", 2, 1, 1),
        pytest.param(("deepspeed", 1, 2, 2), marks=pytest.mark.slow),
        pytest.param(("fsdp", 1, 2, 1), marks=pytest.mark.slow),
    ],
    ids=["2 replicas", "ZeRO 2 × TP 2", "FSDP 2"],
)
def test_a_run_from_start_to_end(config, layout, tmp_path, runs):
    engine, replicas, shard, tensor = layout
    ranks = replicas * shard * tensor
    keys = [f"engine={engine}", f"sharding.shard={shard}", f"sharding.tensor={tensor}"]
    memory = set(Path("/dev/shm").iterdir())
    done = deepspeed(ranks, "launchers/train.py", config(), *keys)
    assert done.returncode == 0, done.stdout + done.stderr
    shown = [line for line in done.stdout.splitlines() if line.startswith(("iteration", "done"))]
    assert len(shown) == 4, done.stdout  # one rank speaks
    assert not {
        file.name for file in set(Path("/dev/shm").iterdir()) - memory if "allreduce" in file.name
    }

    directory = tmp_path / "run"
    assert yaml.safe_load((directory / "config.yaml").read_text())["sharding"]["shard"] == shard
    metrics, journal = lines(directory / "metrics.jsonl"), records(directory)
    summary = json.loads((directory / "summary.json").read_text())
    assert (
        [row["iteration"] for row in metrics] == [row["iteration"] for row in journal] == [0, 1, 2]
    )
    for row, record in zip(metrics, journal, strict=True):
        assert row["reward_min"] <= row["reward_mean"] <= row["reward_max"]
        assert row["reward_mean"] == pytest.approx(sum(record["rewards"]) / 5)
        assert row["reward_std"] > 0 and row["generated_tokens"] > 0
        assert ("held_out_reward" in row) == (row["iteration"] % 2 == 0)
        for part in ("perturb", "gather", "generate", "restore", "update", "exchange"):
            assert 0 <= row[f"seconds_{part}"] <= row["seconds"]
        assert 0 <= row["seconds_idle"] < row["seconds"] + 1 and 0 < row["exchanged_bytes"] < 50_000
        assert len(record["seeds"]) == len(record["rewards"]) == len(record["coefficients"]) == 5
        assert (record["sigma"], record["alpha"], len(record["digest"])) == (0.05, 0.05, 16)
    assert summary["iterations"] == 3
    assert summary["reward_mean_first"] == metrics[0]["reward_mean"]
    assert summary["reward_mean_last"] == metrics[-1]["reward_mean"]
    assert len({record["digest"] for record in journal} | {summary["digest"]}) == 4

    samples = lines(directory / "samples.jsonl")
    assert {(row["iteration"], row["split"]) for row in samples} == {
        (i, s) for i in (0, 2, 3) for s in ("train", "test")
    }
    board = EventAccumulator(str(directory)).Reload()
    assert [event.step for event in board.Scalars("reward/mean")] == [0, 1, 2]

    # In float32 this small model answers alike on every layout, so the whole run is the same to the
    # bit.
    runs[layout] = (
        [(record["seeds"], record["rewards"], record["digest"]) for record in journal],
        summary["digest"],
    )
    assert len(set(map(str, runs.values()))) == 1


def test_a_profile_of_one_iteration(zygote, config, tmp_path):
    run = zygote.start(
        config(("es", "iterations", 2)), "profile=true", ranks=2, log=tmp_path / "log"
    )
    assert run.wait() == [0, 0], run.text()
    (file,) = (tmp_path / "run").glob("trace_rank*.json.gz")
    with gzip.open(file, "rt") as opened:
        names = {event.get("name") for event in json.load(opened)["traceEvents"]}
    assert "aten::scaled_dot_product_attention" in names


def test_a_mistake_ends_every_rank_with_one_line(config):
    done = deepspeed(2, "launchers/train.py", config(), "es.sigm=1", seconds=120)
    assert done.returncode == 2
    errors = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert errors == ["error: es.sigm: no such key; did you mean es.sigma?"]
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    "body, code, message",
    [
        (
            "return [float('nan') for _ in responses]",
            2,
            "score gave prompt 0 of train the reward nan, not a number",
        ),
        ("return [0.0]", 2, "error: task: score gave 1 rewards for 4 responses"),
        (
            "raise OSError('the judge is out')",
            2,
            "scoring train raised OSError: the judge is out; the responses: ",
        ),
    ],
    ids=["NaN", "too few", "raises"],
)
def test_a_reward_that_fails_ends_every_rank(zygote, config, tmp_path, body, code, message):
    path = config()
    source = TASK.replace("return [float(sum(map(ord, text)) % 97) for text in responses]", body)
    (tmp_path / "task.py").write_text(source)
    run = zygote.start(path, "sharding.shard=2", ranks=2, log=tmp_path / "log")
    assert run.wait() == [code, code], run.text()
    assert message in run.text()
    saved = tmp_path / "run" / "failed_scoring.json"
    assert saved.exists() == (body != "return [0.0]")
    if saved.exists():
        rows = json.loads(saved.read_text())
        assert [row["prompt"] for row in rows][:3] == ["abc", "a much longer prompt", "x"]
        assert all(isinstance(row["response"], str) for row in rows)


def test_equal_rewards_teach_nothing_and_say_so(zygote, config, tmp_path):
    path = config(("es", "iterations", 3))
    (tmp_path / "task.py").write_text(TASK.replace("float(sum(map(ord, text)) % 97)", "1.0"))
    run = zygote.start(path, log=tmp_path / "log")
    assert run.wait() == [0], run.text()
    assert "warning: iteration 0: all 5 rewards are 1.0, so nothing is learned; " in run.text()
    warnings = re.findall(r"warning: .* nothing is learned; (.*)", run.text())
    assert warnings and sorted(warnings) == sorted(set(warnings))  # each cause once
    record, *_ = records(tmp_path / "run")
    assert record["coefficients"] == [0.0] * 5
    assert record["digest"] == json.loads((tmp_path / "run" / "summary.json").read_text())["digest"]


def test_an_evaluation_asks_a_fixed_part_of_the_held_out_prompts(zygote, config, tmp_path):
    path = config(("eval", "prompts", 2), ("es", "population_size", 2))
    (tmp_path / "task.py").write_text("""
class Letters:
    def prompts(self, split):
        return [f"{split} {number}" for number in range(5)]
    def score(self, split, responses, which=None):
        return [float(n) + 0.01 * len(text) for n, text in zip(which or range(5), responses)]
    def correct(self, split, responses, which=None):
        return [number > 0 for number in which]
""")
    asked = []
    for limit, iterations in ((2, 2), (2, 3), (3, 4)):
        keys = [f"eval.prompts={limit}", f"es.iterations={iterations}"]
        run = zygote.start(path, *keys, ranks=2, log=tmp_path / f"log{iterations}")
        assert run.wait() == [0, 0], run.text()
        assert ("held-out rewards before and after are not" in run.text()) == (limit == 3)
        rows = lines(tmp_path / "run" / "samples.jsonl")
        last = max(row["iteration"] for row in rows)
        asked.append([r for r in rows if r["split"] == "test" and r["iteration"] == last])
    assert [len(rows) for rows in asked] == [2, 2, 3]
    prompts = [[row["prompt"] for row in rows] for rows in asked]
    assert prompts[0] == prompts[1] and set(prompts[1]) < set(prompts[2])
    for row in asked[2]:  # scored as the prompt that it is
        assert row["reward"] == float(row["prompt"][-1]) + 0.01 * len(row["response"])


def spoiled(tmp_path, model, spoil) -> str:
    directory = shutil.copytree(model, tmp_path / "spoiled")
    spoil(directory)
    return str(directory)


def no_template(directory):
    (directory / "chat_template.jinja").unlink()


def cut_short(directory):
    file = directory / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-4])


MISTAKES = {
    "a task that is not told which": (
        [("eval", "prompts", 2)],
        ["eval.prompts: the task's score must take the numbers", "which=None"],
    ),
    "more prompts than there are": (
        [
            ("task", "path", None),
            ("task", "name", "countdown"),
            ("task", "prompts_per_iteration", 201),
        ],
        ["task.prompts_per_iteration=201", "200 training prompts"],
    ),
    "unknown key": ([("es", "sigam", 1)], ["es.sigam", "es.sigma"]),
    "sigma": ([("es", "sigma", 0)], ["es.sigma=0"]),
    "population": ([("es", "population_size", 1)], ["es.population_size=1"]),
    "layout": ([("sharding", "shard", 3)], ["sharding.shard=3", "4 ranks"]),
    "tensor degree": ([("sharding", "tensor", 4)], ["sharding.tensor=4", "3 key-value heads"]),
    "model": ([("model", "path", "/no/such/model")], ["model.path=/no/such/model"]),
    "task": (
        [("task", "path", None), ("task", "name", "concisenes")],
        ["task.name=concisenes", "conciseness"],
    ),
    "engine": ([("", "engine", "megatron")], ["engine", "megatron"]),
    "uneven heads": (
        [("", "engine", "fsdp"), ("sharding", "tensor", 2)],
        ["sharding.tensor=2", "3 key-value heads"],
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_found_before_heavy_work(config, mistake, tmp_path):
    changes, expected = MISTAKES[mistake]
    with pytest.raises(ConfigError) as error:
        train.prepare([config(*changes)], Job(0, 4, dist.HashStore()))
    assert not (tmp_path / "run").exists()
    assert "\n" not in str(error.value)
    for part in expected:
        assert part in str(error.value)


@pytest.mark.parametrize(
    "spoil, expected", [(no_template, "chat template"), (cut_short, "model.safetensors")]
)
def test_spoiled_models_are_found_before_heavy_work(config, tied_llama, tmp_path, spoil, expected):
    path = config(("model", "path", spoiled(tmp_path, tied_llama, spoil)))
    with pytest.raises(ConfigError, match=expected):
        train.prepare([path], Job(0, 1, dist.HashStore()))


def test_experts_that_autotp_cannot_cut(config, moe_qwen):
    path = config(("model", "path", str(moe_qwen)), ("sharding", "tensor", 2))
    with pytest.raises(ConfigError, match=r"sharding\.tensor=2: AutoTP cannot split .*engine=fsdp"):
        train.prepare([path], Job(0, 2, dist.HashStore()))


def test_no_prompts(config, tmp_path):
    path = config()
    (tmp_path / "task.py").write_text(
        "class Letters:\n"
        "    def prompts(self, split): return []\n"
        "    def score(self, s, r): return []\n"
    )
    with pytest.raises(ConfigError, match="empty"):
        train.prepare([path], Job(0, 1, dist.HashStore()))


def test_a_directory_that_cannot_be_made(config):
    with pytest.raises(ConfigError, match=r"run\.dir=/proc/run"):
        train.prepare([config(("run", "dir", "/proc/run"))], Job(0, 1, dist.HashStore()))


@pytest.mark.slow
def test_a_port_in_use_is_named(config):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        launcher = [
            sys.executable,
            "-m",
            "deepspeed.launcher.runner",
            "--num_gpus",
            "1",
            "--master_port",
            port,
        ]
        done = run([*launcher, "launchers/train.py", config()], seconds=120)
    assert done.returncode == 2
    assert f"error: MASTER_PORT={port}: in use" in done.stderr


def test_help_lists_the_keys(capsys):
    assert train.main(["--help"]) == 0
    shown = capsys.readouterr().out
    assert "sharding.gather" in shown and "es.population_size" in shown
