"""A run's output: the terminal, the metrics files, the loggers, the attempt directories."""

import json
import re
import time
from pathlib import Path

import pytest
import yaml
from tensorboard.backend.event_processing import plugin_event_accumulator
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from shardes.errors import ConfigError, RunError
from shardes.reporting import loggers
from shardes.reporting.attempts import Attempt, record_failure
from shardes.reporting.loggers import Loggers
from shardes.reporting.reporter import RunReporter
from shardes.reporting.system_info import variables
from shardes.storage.resume import ResumePoint
from written_run import METRICS, settings_of

OWN = """
import json

class Letters:
    def prompts(self, split):
        return ["abc", "a much longer prompt", "x"] if split == "train" else ["hello", "you"]
    def score(self, split, responses):
        return [float(sum(map(ord, text)) % 97) for text in responses]

class Recorder:
    def __init__(self, directory, settings):
        self.file = open(directory / "recorded.jsonl", "a")
        self.file.write(json.dumps(["settings", settings["es"]["sigma"]]) + "\\n")
    def log(self, metrics, step):
        self.file.write(json.dumps([step, metrics]) + "\\n")
    def log_samples(self, samples, step):
        self.file.write(json.dumps(["samples", step, samples]) + "\\n")
    def close(self):
        self.file.close()

class Fails:
    def __init__(self, directory, settings):
        pass
    def log(self, metrics, step):
        raise OSError(f"no such server at step {step}")
    def close(self):
        raise AssertionError("not after it has failed")
"""

HEAD = r"""model    {model}, [0-9,]+ parameters in float32
layout   1 rank: 1 replica × shard 1 × tensor 1, deepspeed
device   cpu
members  4 of σ = 0\.05, α = 0\.05, full noise
prompts  3 train, 2 test; up to 8 new tokens
run      {run}, \d iterations; .*
"""


@pytest.fixture
def own(tmp_path) -> str:
    """A user's file, with a task and loggers."""
    file = tmp_path / "own.py"
    file.write_text(OWN)
    return str(file)


def lines(file: Path) -> list:
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_a_run_is_tracked(zygote, tmp_path, own, uneven_llama):
    directory = tmp_path / "run"
    names = ["tensorboard", f"{own}:Recorder", f"{own}:Fails"]
    config = {
        "model": {"path": str(uneven_llama), "dtype": "float32"},
        "es": {"population_size": 4, "sigma": 0.05, "alpha": 0.05, "iterations": 2},
        "generation": {"max_new_tokens": 8},
        "task": {"path": f"{own}:Letters"},
        "run": {"dir": str(directory), "timeout": 60},
        "tracking": {"loggers": names},
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    states = ["2 iterations; a new run", "3 iterations; 2 done", "; all done (a larger "]
    for attempt, iterations in ((1, 2), (2, 3), (3, 3)):
        run = zygote.start(
            str(tmp_path / "config.yaml"), f"es.iterations={iterations}", log=tmp_path / "log"
        )
        assert run.wait() == [0], run.text()
        assert run.text().count("Fails: OSError: no such server at step") == 1
        logs = directory / "logs" / f"attempt_{attempt}"
        printed, logged = (
            sorted(
                line for line in text.splitlines() if line.startswith(("iter", "done", "warning"))
            )
            for text in (run.text(), (logs / "output.log").read_text())
        )
        for text in (run.text(), (logs / "output.log").read_text()):
            assert re.search(HEAD.format(model=uneven_llama, run=directory), text), text
        assert states[attempt - 1] in run.text()
        assert printed == logged  # sorted, because a logger's thread may warn at any time
        assert yaml.safe_load((logs / "config.yaml").read_text())["es"]["iterations"] == iterations
        environment = json.loads((logs / "environment.json").read_text())
        assert environment["world"] == dict(ranks=1, replicas=1, shard=1, tensor=1, device="cpu")
        assert environment["versions"]["torch"] and environment["host"]

    recorded = lines(directory / "recorded.jsonl")
    samples = [entry for entry in recorded if entry[0] == "samples"]
    recorded = [entry for entry in recorded if entry[0] != "samples"]
    assert [entry[0] for entry in recorded] == [
        *("settings", 0, 1, 2),
        *("settings", 2, 3),
        *("settings", 3),
    ]
    assert recorded[0][1] == 0.05
    assert [row for _, _, rows in samples for row in rows] == lines(directory / "samples.jsonl")
    assert [step for _, step, _ in samples] == [0, 0, 2, 2, 3, 3]
    metrics = lines(directory / "metrics.jsonl")
    assert [entry[1] for entry in recorded if entry[0] in (0, 1)] == metrics[:2]
    summary = json.loads((directory / "summary.json").read_text())
    assert recorded[-1][1]["held_out_reward"] == summary["held_out_reward_last"]
    board = EventAccumulator(str(directory)).Reload()
    assert [event.step for event in board.Scalars("reward/mean")] == [0, 1, 2]
    assert board.Scalars("center/held_out_reward")[-1].step == 3
    shown = plugin_event_accumulator.EventAccumulator(str(directory)).Reload()
    for split in ("train", "test"):
        events = shown.Tensors(f"samples/{split}/text_summary")
        assert [event.step for event in events] == [0, 2, 3]
        for event in events:
            text = event.tensor_proto.string_val[0].decode()
            rows = next(r for _, s, r in samples if s == event.step and r[0]["split"] == split)
            for row in rows:
                assert f"reward {row['reward']:.4g}\n\n    {row['prompt']}\n" in text
                assert f"    → {(row['response'].splitlines() or [''])[0]}" in text

    extremes = lines(directory / "extremes.jsonl")
    assert [(row["iteration"], row["kind"]) for row in extremes] == [
        (i, k) for i in range(3) for k in ("best", "worst")
    ]
    prompts = ["abc", "a much longer prompt", "x"]
    for row in extremes:
        iteration = metrics[row["iteration"]]
        assert row["prompt"] in prompts and row["member"] in range(4)
        assert row["reward"] == sum(map(ord, row["response"])) % 97
        low, high = iteration["reward_min"], iteration["reward_max"]
        assert row["reward"] >= high if row["kind"] == "best" else row["reward"] <= low


def test_wandb_offline(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    warnings = []
    for _ in range(2):
        logger = Loggers(["wandb"], tmp_path, {"es": {"sigma": 0.1}}, warnings.append)
        row = {"split": "test", "prompt": [{"role": "user", "content": "q"}], "reward": 0.5}
        for step in range(3):
            logger.log_samples([row | {"response": f"answer {step}"}], step)
            logger.log({"reward_mean": step / 7}, step)
        logger.close()
    assert warnings == []
    run_id = (tmp_path / "wandb_id").read_text()
    files = list((tmp_path / "wandb").glob(f"offline-run-*-{run_id}/*.wandb"))
    assert files
    deadline = time.monotonic() + 30  # W&B's service writes them in a process of its own
    for file in files:
        while b"reward/mean" not in file.read_bytes() and time.monotonic() < deadline:
            time.sleep(0.1)
        assert b"reward/mean" in file.read_bytes() and b"sigma" in file.read_bytes()
        tables = (file.parent / "files" / "media" / "table" / "samples").glob("test_*.json")
        assert sorted(json.loads(table.read_text())["data"] for table in tables) == [
            [["user: q", f"answer {step}", 0.5]] for step in range(3)
        ]


def test_wandb_offline_begins_with_the_iterations_before(tmp_path, monkeypatch):
    """The directory that is synchronized last replaces the others."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    logged: list[tuple[str, int]] = []
    rows = [{"iteration": step, "reward_mean": step / 7} for step in range(3)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    sample = {"split": "test", "prompt": "q", "response": "a", "reward": 1.0}
    rows = [sample | {"iteration": step} for step in (0, 2, 3)]
    (tmp_path / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    class Spy:
        offline = True

        def log(self, values, step):
            logged.extend((name, step) for name in values)

        def finish(self):
            pass

    monkeypatch.setattr("wandb.init", lambda **_: Spy())
    warnings: list[str] = []
    logger = Loggers(["wandb"], tmp_path, {}, warnings.append)
    logger.log({"reward_mean": 3 / 7}, 3)
    logger.close()
    assert warnings == []
    table, mean = "samples/test", "reward/mean"
    assert logged == [
        (table, 0),
        (mean, 0),
        (mean, 1),
        (table, 2),
        (mean, 2),
        (table, 3),
        (mean, 3),
    ]


def test_a_logger_that_hangs_does_not_stop_the_end(tmp_path, monkeypatch):
    (tmp_path / "slow.py").write_text(
        "import time\nclass Slow:\n def __init__(self, *_): time.sleep(30)\n"
    )
    monkeypatch.setattr(loggers, "CLOSE_TIMEOUT", 0.1)
    warnings: list[str] = []
    hanging = Loggers([f"{tmp_path}/slow.py:Slow"], tmp_path, {}, warnings.append)
    hanging.log({"reward_mean": 1.0}, 0)
    hanging.close()
    assert len(warnings) == 1 and "slow.py:Slow: not done after" in warnings[0]


def test_metrics_are_grouped_and_none_hides_another():
    """A task names the parts of a reward: one may be called as a metric is."""
    names = ["reward_mean", "reward/mean", "reward/a", "center_reward", "held_out_accuracy",
             "distance", "distance_relative", "seconds", "seconds_idle", "generated_tokens",
             "scoring_failures", "evaluation_scoring_failures", "exchanged_bytes"]  # fmt: skip
    found = loggers.grouped(dict.fromkeys(["iteration", *names], 1.0))
    assert list(found) == [
        "reward/mean", "reward_parts/mean", "reward_parts/a", "center/reward",
        "center/held_out_accuracy", "center/distance", "center/distance_relative",
        "seconds/iteration", "seconds/idle", "tokens/generated", "failures/scoring_failures",
        "failures/evaluation_scoring_failures", "system/exchanged_bytes",
    ]  # fmt: skip


@pytest.mark.parametrize(
    "name, message",
    [
        ("tensorbord", r"tracking\.loggers=tensorbord: no such logger; did you mean tensorboard\?"),
        ("mlflow", r"there are: tensorboard, wandb, or your own as file\.py:Class"),
        ("{own}:Recoder", r"no class Recoder there; it has Letters, Recorder, Fails"),
        ("{own}:Letters", r"Letters has no log\(\); see shardes\.reporting\.loggers\.Logger"),
        ("/no/such.py:Logger", r"there is no file /no/such\.py"),
    ],
)
def test_loggers_that_cannot_be_used(own, name, message):
    with pytest.raises(ConfigError, match=message):
        loggers.check([name.format(own=own)])


def test_extremes_are_the_first_best_and_worst_and_are_trimmed_on_resume(tmp_path):
    for begin in (0, 1):
        reporter = RunReporter(
            settings_of(tmp_path), ResumePoint(begin, reward_means=[1.0] * begin)
        )
        for iteration in range(begin, 2):
            for member, rewards in enumerate(([1, 1, 1], [2, 0, 2], [2, 0, -1])):
                reporter.responses(member, "abc", ["answer 0", "answer 1", "answer 2"], rewards)
            reporter.log_iteration(METRICS | {"iteration": iteration})
        reporter.close()
    expected = (("best", 1, "a", "answer 0", 2), ("worst", 2, "c", "answer 2", -1))
    assert lines(tmp_path / "extremes.jsonl") == [
        dict(
            iteration=iteration,
            kind=kind,
            member=member,
            prompt=prompt,
            response=response,
            reward=reward,
        )
        for iteration in (0, 1)
        for kind, member, prompt, response, reward in expected
    ]


def test_the_error_that_ended_a_rank_is_logged(tmp_path):
    record_failure(tmp_path, 1, ValueError("no attempt yet"))  # writes nothing
    attempt = Attempt(tmp_path, settings_of(tmp_path), {})
    for rank, error in ((0, RunError("disk: full")), (3, ValueError("bad"))):
        try:
            raise error
        except Exception as raised:
            record_failure(tmp_path, rank, raised)
    assert (attempt.directory / "rank0.log").read_text() == "error: disk: full\n"
    log = (attempt.directory / "rank3.log").read_text()
    assert "Traceback" in log and "ValueError: bad" in log


def test_secrets_are_hidden():
    environ = {
        "SHARDES_TOKEN": "s1", "WANDB_API_KEY": "s2", "HF_TOKEN": "s3",
        "HUGGINGFACE_HUB_TOKEN": "s4", "TOKENIZERS_PARALLELISM": "false",
        "WANDB_BASE_URL": "https://me:s5@host/x", "AWS_SECRET_ACCESS_KEY": "s6",
        "HF_HOME": "/hf", "CUDA_VISIBLE_DEVICES": "0", "RANK": "1", "HOME": "/root",
        "SLURM_JWT": "s7",
    }  # fmt: skip
    values = variables(environ)
    assert not any(f"s{number}" in str(values) for number in range(1, 8))
    assert values["TOKENIZERS_PARALLELISM"] == "false"
    assert values["WANDB_BASE_URL"] == "https://(hidden)@host/x"
    assert {"HF_HOME", "CUDA_VISIBLE_DEVICES", "RANK", "SHARDES_TOKEN"} <= values.keys()
    assert not {"HOME", "AWS_SECRET_ACCESS_KEY"} & values.keys()
