"""Runs to be disturbed, and what they have written, to be compared with another run's."""

import json
import random
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path

from shardes.storage import journal
from shardes.trainer import PARTS

TASK = '''
class Letters:
    """A reward that differs from member to member."""
    def prompts(self, split):
        return ["abc", "a much longer prompt", "x"] if split == "train" else ["hello"]
    def score(self, split, responses, which=None):
        return [float(sum(map(ord, text)) % 97) for text in responses]
'''


def outcome(directory: Path) -> dict:
    """What a run has written, without times and without what depends on the layout."""
    history = journal.read(directory / "journal.jsonl")
    summary = json.loads((directory / "summary.json").read_text())
    return {
        "records": history.records,
        "evaluations": [
            asdict(evaluation) | {"metrics": rounded(evaluation.metrics)}
            for _, evaluation in sorted(history.evaluations.items())
        ],
        "best": history.best,
        "finish": history.finish,
        "metrics": [
            {key: value for key, value in row.items() if key not in NOT_COMPARED}
            for row in map(rounded, rows(directory / "metrics.jsonl"))
        ],
        "samples": rows(directory / "samples.jsonl"),
        "summary": {key: value for key, value in rounded(summary).items() if key != "seconds"},
    }


NOT_COMPARED = {
    "seconds",
    *(f"seconds_{part}" for part in (*PARTS, "idle")),
    "exchanged_bytes",
    "peak_resident_bytes",
}


def rounded(row: dict) -> dict:
    """Without the last digits of sums of floats, whose order depends on the layout."""
    return {k: round(v, 12) if isinstance(v, float) else v for k, v in row.items()}


def finish_of(directory: Path) -> journal.Finish | None:
    return journal.read(directory / "journal.jsonl").finish


def rows(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def killed_often(
    start: Callable[[Path], object], folder: Path, seconds: float, kills: int
) -> Iterator[Path]:
    """Kill runs of several ranks at random instants, and start them again, until so many kills.

    Args:
        start: starts, or resumes, the run in a directory.
        seconds: what a run takes.

    Yields:
        The directories of runs that were killed; each may still have to be finished.
    """
    generator = random.Random(kills)
    done, number = 0, 0
    while done < kills:
        directory = folder / f"run{number}"
        number += 1
        while done < kills:
            fresh, started = not directory.exists(), time.monotonic()
            run = start(directory)
            codes = run.poll(generator.uniform(0.1 * seconds, seconds))
            if not any(codes) and None not in codes:
                if fresh:  # a whole run takes less time than expected
                    seconds = time.monotonic() - started
                break
            # One rank may end a moment after the other.
            assert set(codes) <= {0, None}, (codes, run.text())
            run.kill()
            run.wait()
            done += 1
        yield directory


def settings(model: Path, folder: Path, directory: Path) -> dict:
    """Those of a run with `TASK`, which is in task.py of `folder`."""
    return {
        "model": {"path": str(model), "dtype": "float32"},
        "es": {"population_size": 4, "sigma": 0.05, "alpha": 0.05, "iterations": 5},
        "generation": {"max_new_tokens": 24},
        "task": {"path": f"{folder}/task.py:Letters"},
        "eval": {"every": 3},
        "checkpoint": {"every": 2, "shard_size": "100KB", "verify_every": 1, "best": True},
        "run": {"dir": str(directory), "timeout": 60},
    }


def finish(zygote, config: str, directory: Path, *keys: str, ranks: int = 2) -> str:
    """Resume the run to its end; returns its output."""
    run = zygote.start(config, *keys, ranks=ranks, log=directory.with_suffix(".log"))
    assert run.wait() == [0] * ranks, run.text()
    return run.text()


def stopped_run(zygote, configure, tmp_path) -> tuple[str, Path]:
    """The config and directory of a run killed in its last iteration, with snapshots 2 and 4."""
    directory = tmp_path / "run"
    config = configure(directory)
    run = zygote.start(
        config, ranks=2, log=tmp_path / "killed.log", kill_in_append=["iteration", 5]
    )
    assert run.wait() == [-signal.SIGKILL] * 2, run.text()
    assert len(journal.read(directory / "journal.jsonl").records) == 4
    return config, directory
