"""A run directory, as a run that was resumed before its last iteration writes it; and the settings
and metrics of a reporter of one iteration.
"""

from pathlib import Path

from shardes.config.loading import center_settings, to_yaml
from shardes.config.schema import Config, ModelConfig, RunConfig
from shardes.reporting.reporter import RunReporter
from shardes.storage.journal import JOURNAL, Finish, Header, Journal, Record, Resumption
from shardes.storage.resume import ResumePoint

EVIL = (
    "</pre><script>alert(1)</script><img src=x onerror=alert(2)>\x00\x1b[31m "
    "& \"quoted\" 'too' \u202eright to left"
)


METRICS = dict(
    iteration=0,
    reward_mean=1.0,
    reward_std=0.5,
    reward_min=0.0,
    reward_max=2.0,
    seconds=2.0,
    generated_tokens=100,
)


def settings_of(directory: Path, *names: str) -> Config:
    config = Config(model=ModelConfig("model"), run=RunConfig(str(directory)))
    config.es.iterations, config.es.population_size = 4, 3
    config.tracking.loggers = list(names)
    return config


def write_run(directory: Path, sigma: float = 0.001) -> None:
    """Write a run of three iterations, whose model answers with EVIL."""
    config = Config(model=ModelConfig("models/small"), run=RunConfig(str(directory)))
    config.task.name, config.es.iterations, config.es.population_size = "conciseness", 3, 2
    config.tracking.loggers, config.es.sigma = [], sigma
    directory.mkdir()
    (directory / "config.yaml").write_text(to_yaml(config))
    journal = Journal(directory / JOURNAL, None)
    journal.append(Header("models/small", {}, center_settings(config)))
    reporter = RunReporter(config, ResumePoint())
    for iteration in range(3):
        if iteration == 2:
            journal.append(Resumption(2, {"es.alpha": [0.1, 0.2]}))
        rewards = [float(iteration), iteration + 1.0]
        journal.append(Record(iteration, [1, 2], rewards, [0.1, -0.1], 0.1, 0.2, "0" * 16))
        chat = [{"role": "user", "content": EVIL}]
        reporter.responses(1, [chat, "second"], [EVIL, EVIL], rewards)
        reporter.samples(
            iteration, "test", [chat, EVIL, "same"], [EVIL, "", "x"], [iteration, -iteration, 0.5]
        )
        reporter.samples(iteration, "train", [chat], [f"answer {iteration}"], [iteration])
        metrics = dict(
            iteration=iteration, reward_mean=iteration + 0.5, reward_std=0.5, reward_min=iteration
        )
        metrics |= dict(
            reward_max=iteration + 1, seconds=2.0, seconds_generate=1.5, seconds_exchange=0.25
        )
        metrics |= dict(
            seconds_idle=0.1,
            generated_tokens=100,
            held_out_reward=iteration / 3,
            held_out_accuracy=0.5,
            **{"reward/format": iteration / 2},
        )
        reporter.log_iteration(metrics)
    journal.append(Finish(3, "f" * 16))
    journal.close()
    last = dict(center_reward=1.0, held_out_reward=1.25, distance=2.0, distance_relative=0.1)
    reporter.summary([0.5, 1.5, 2.5], {3: last}, "f" * 16, 6.0)
    reporter.close()
