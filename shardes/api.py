"""shardes from Python: train, evaluate, plan, and read what a run has written.

A run takes place in this process, as one rank, or, with `gpus`, in ranks that are started for it.
Nothing of it is left afterwards: no process, process group, or handler of a signal. A mistake is
raised as ConfigError, any other failure of a run as RunError, and a stop as KeyboardInterrupt.
"""

import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shardes.config import loading
from shardes.config.schema import Config
from shardes.distributed import environment
from shardes.distributed.local_ranks import run_ranks
from shardes.errors import PRIMARY_LOST, ConfigError, RunError, Stopped
from shardes.reporting import json_lines

if TYPE_CHECKING:
    from shardes.tasks import ScoringTask

# A config file, or settings by section or dotted key.
ConfigSource = str | os.PathLike[str] | Mapping[str, Any]


@dataclass(frozen=True)
class Run:
    """What a run directory holds.

    Attributes:
        directory: the run directory.
        config: all settings of the run's last start.
        metrics: an object per iteration, as in metrics.jsonl: "iteration", "reward_mean",
            "reward_std", "reward_min", "reward_max", "generated_tokens", "seconds"; after an
            evaluation also "center_reward", "held_out_reward" and, if the task has one,
            "held_out_accuracy".
        samples: the center's responses at each evaluation: "iteration", "split", "prompt",
            "response", "reward".
        summary: the finished run's results, such as "held_out_reward_first", "held_out_reward_last"
            and "digest"; empty if the run has not finished.
    """

    directory: Path
    config: Config
    metrics: list[dict[str, Any]]
    samples: list[dict[str, Any]]
    summary: dict[str, Any]

    def __repr__(self) -> str:
        done = f"{len(self.metrics)} of {self.config.es.iterations} iterations"
        rewards = [row["held_out_reward"] for row in self.metrics if "held_out_reward" in row]
        rewards += [self.summary["held_out_reward_last"]] if self.summary else []
        ends = f", held-out {rewards[0]:.4g} → {rewards[-1]:.4g}" if rewards else ""
        return f"Run({self.directory}: {done}{ends})"

    @property
    def center(self) -> Path | None:
        """The newest snapshot: a model directory that transformers loads, in float32.

        None if there is none yet, or with checkpoint.every=0.
        """
        from shardes.storage import snapshots  # imports torch

        found = snapshots.by_iteration(self.directory)
        return found[max(found)] if found else None


def train(
    config: ConfigSource,
    overrides: Mapping[str, Any] | None = None,
    *,
    task: "ScoringTask | None" = None,
    gpus: int | None = None,
    callback: Callable[[dict[str, float]], None] | None = None,
) -> Run:
    """Fine-tune a model; if `run.dir` holds the run already, go on with it.

    Args:
        config: a config file, or settings: {"es": {"sigma": 0.002}} or {"es.sigma": 0.002}.
        overrides: further settings, by dotted key.
        task: an object with `prompts` and `score` (shardes.tasks.ScoringTask), in place of
            task.name and task.path; only in this process.
        gpus: start so many ranks on this host; on a host without GPUs they share its cores.
            None: one rank, in this process.
        callback: is called after each iteration with its metrics. What it raises ends the run,
            and is raised; the iteration is in the journal.

    Returns:
        What the run has written.

    Raises:
        ConfigError: a mistake of the user's.
        RunError: the run cannot go on; its message says whether starting it again helps.
        KeyboardInterrupt: it was stopped. Nothing is lost: call again to go on.
    """
    loaded = _load(config, overrides)
    if callback is not None and not callable(callback):
        raise ConfigError(
            f"callback={callback!r:.100}: must be a function of an iteration's metrics"
        )
    on_metrics = callback or _ignore
    if gpus is None:
        from shardes import lifecycle, training

        prepare = partial(training.prepare, loaded, task=task, on_metrics=on_metrics)
        with _stops_raise_keyboard_interrupt():
            lifecycle.run_alone(prepare, training.work)
    else:
        _run_ranks("train", loaded, [], gpus, task, on_metrics)
    return load_run(loaded.run.dir)


def evaluate(
    config: ConfigSource,
    overrides: Mapping[str, Any] | None = None,
    *,
    model: str | os.PathLike[str] | None = None,
    base: bool = False,
    splits: Sequence[str] = ("test",),
    samples: int = 0,
    out: str | os.PathLike[str] | None = None,
    task: "ScoringTask | None" = None,
    gpus: int | None = None,
) -> dict[str, Any]:
    """Let a model answer the task's prompts, and score the answers.

    Args:
        config, overrides, task, gpus: as for `train`; `model.path` is the base model.
        model: the tuned model: a snapshot or an export. None: the base model itself.
        base: let the base model answer, too, and compare both.
        splits: "train", "test", or names of task.tests.
        samples: sampled responses per prompt, besides the greedy one.
        out: a file for the report. None: there is none.

    Returns:
        The report: {"splits": {"test": {"greedy": {"reward": ...,
        "reward_interval": [low, high], ...}, "responses": [...], ...}}, ...}.

    Raises:
        ConfigError, RunError, KeyboardInterrupt: as `train`; a stop leaves no report.
    """
    if isinstance(splits, str) or not splits:
        raise ConfigError(f'splits={splits!r}: must be a list of splits, such as ["test"]')
    loaded = _load(config, overrides)
    tuned = None if model is None else os.path.expanduser(os.fspath(model))
    with _temporary_file() if out is None else nullcontext(Path(os.path.expanduser(out))) as path:
        if gpus is None:
            from shardes import evaluation, lifecycle

            options: dict[str, Any] = dict(model=tuned, base=base, split=splits, samples=samples)
            prepare = partial(evaluation.prepare, loaded, task=task, out=path, **options)
            with _stops_raise_keyboard_interrupt():
                lifecycle.run_alone(prepare, evaluation.work)
        else:
            arguments = ["--samples", str(samples), "--out", str(path), "--split", *splits]
            arguments += [*(["--model", tuned] if tuned else []), *(["--base"] if base else [])]
            _run_ranks("evaluate", loaded, arguments, gpus, task)
        report: dict[str, Any] = json.loads(path.read_bytes())
        return report


def plan(
    config: ConfigSource,
    overrides: Mapping[str, Any] | None = None,
    *,
    gpus: int = 8,
    nodes: int = 1,
    gpu: str | None = None,
    gpu_memory: str | None = None,
    host_memory: str | None = None,
    response_tokens: int | None = None,
) -> dict[str, Any]:
    """Estimate whether a run fits in memory, and its time; search for the fastest settings.

    Args:
        config, overrides: as for `train`.
        gpus: per node.
        gpu: the card's name, such as "H100", or "cpu" for this machine, which is measured.
        gpu_memory: of one GPU, such as "80GB"; in place of, or besides, `gpu`.
        host_memory: of one node.
        response_tokens: of a response; default: the longest that the settings allow.

    Returns:
        What `shardes plan --json` prints: "configured" and "suggested" settings with their memory
        and times, the "best" few, and "notes" on what was assumed.

    Raises:
        ConfigError: a mistake of the user's.
    """
    from shardes.planning.search import Situation, find_plans

    situation = Situation(
        gpus, nodes, gpu, gpu_memory, host_memory, response_tokens=response_tokens
    )
    return find_plans(_load(config, overrides), situation).to_json()


def load_run(directory: str | os.PathLike[str]) -> Run:
    """Read a run directory; the run may be under way.

    Raises:
        ConfigError: it holds no run.
    """
    path = Path(os.path.expanduser(directory))
    file = path / "config.yaml"
    if not file.is_file():
        raise ConfigError(f"{path}: no run directory: it has no config.yaml")
    from shardes.reporting.run_directory import read_summary  # imports plotly

    return Run(
        path,
        loading.load(str(file), []),
        json_lines.read(path / "metrics.jsonl"),
        json_lines.read(path / "samples.jsonl"),
        read_summary(path),
    )


@contextmanager
def _temporary_file() -> Iterator[Path]:
    """A file for a report that is gone afterwards, with what was written beside it.

    Of that, what the message of an error names is kept: the responses that could not be scored.
    """
    directory = tempfile.mkdtemp(prefix="shardes_")
    kept = False
    try:
        yield Path(directory, "evaluation.json")
    except ConfigError as error:
        kept = directory in str(error)
        raise
    finally:
        if not kept:
            shutil.rmtree(directory)


def _ignore(metrics: dict[str, float]) -> None:
    """The default callback."""


def _load(config: ConfigSource, overrides: Mapping[str, Any] | None) -> Config:
    given = _assignments(overrides or {})
    if isinstance(config, Mapping):
        return loading.load(None, [*_assignments(config), *given])
    return loading.load(os.fspath(config), given)


def _assignments(settings: Mapping[str, Any]) -> list[str]:
    """Settings as `key=value`, the values as YAML, of which JSON is a part."""
    if not isinstance(settings, Mapping):
        raise ConfigError(f"{settings!r:.100}: must be a mapping of settings, {{key: value}}")
    assignments = []
    for key, value in settings.items():
        try:
            text = json.dumps(value, ensure_ascii=False, default=os.fspath)
        except (TypeError, ValueError):
            raise ConfigError(
                f"{key}={value!r:.100}: must be made of Python's numbers, texts, lists and mappings"
            ) from None
        assignments.append(f"{key}={text}")
    return assignments


def _run_ranks(
    command: str,
    config: Config,
    arguments: list[str],
    ranks: int,
    task: object,
    on_metrics: Callable[[dict[str, float]], None] = _ignore,
) -> None:
    """Run `shardes COMMAND` with these settings on several ranks."""
    if not isinstance(ranks, int) or ranks < 1:
        raise ConfigError(f"gpus={ranks!r}: must be a number of ranks, at least 1")
    if task is not None:
        raise ConfigError(
            f"task={type(task).__name__}: an object of this process, which the ranks of "
            f"gpus={ranks} cannot use: put the class in a file and set task.path=FILE.py:CLASS"
        )
    with (
        tempfile.TemporaryDirectory() as directory,
        _stops_raise_keyboard_interrupt(),
    ):
        file = Path(directory, "config.yaml")
        file.write_text(loading.to_yaml(config), encoding="utf-8")
        program = [sys.executable, "-m", f"shardes.commands.{command}", str(file)]
        run_ranks([*program, *arguments], ranks, on_metrics)


@contextmanager
def _stops_raise_keyboard_interrupt() -> Iterator[None]:
    try:
        yield
    except Stopped as stopped:
        if stopped.code == PRIMARY_LOST:
            raise RunError(str(stopped)) from None
        raise KeyboardInterrupt(str(stopped)) from None


environment.prepare()  # before torch is imported
