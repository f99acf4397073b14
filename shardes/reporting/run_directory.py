"""The files of a run directory, as the report reads them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from shardes.errors import ConfigError, mistakes_in, one_line
from shardes.reporting import json_lines
from shardes.reporting.attempts import attempts
from shardes.reporting.probe import FILE as PROBE
from shardes.storage.journal import JOURNAL, History, read

LARGEST = 1e100  # that is drawn; the limit of rewards


class RunContents:
    """The contents of a run directory. Damaged files and lines are left out, with a warning.

    Raises:
        ConfigError: it is no run directory.
    """

    def __init__(self, directory: Path):
        history = read(directory / JOURNAL)
        if history is None:
            raise ConfigError(f"{directory}: no run directory: it has no {JOURNAL}")
        self.directory = directory
        self.history: History = history
        self.warnings: list[str] = []
        self.metrics, self.samples, self.extremes = (
            json_lines.read(directory / f"{name}.jsonl", self.warnings.append)
            for name in ("metrics", "samples", "extremes")
        )
        self.summary = self._read(directory / "summary.json", read_json)
        self.settings = _flat(self._read(directory / "config.yaml", _settings))
        starts = {
            path.name: self._read(path / "environment.json", read_json)
            for path in attempts(directory)
        }
        self.starts = {name: start for name, start in starts.items() if start}
        self.probe = self._read(directory / PROBE, read_json)

    def _read(self, file: Path, read: Callable[[Path], Any]) -> dict[str, Any]:
        """The mapping in a file; empty if there is none, or if it is damaged."""
        if not file.is_file():
            return {}
        try:
            return {str(key): value for key, value in read(file).items()}
        except Exception as error:  # whatever a reader meets in a damaged file
            self.warnings.append(f"WARNING: {file}: damaged and left out: {one_line(error)}")
            return {}

    @property
    def state(self) -> str:
        finish = self.history.finish
        return f"finished: center {finish.digest}" if finish else "under way, or stopped"

    def curve(self, key: str) -> dict[float, float]:
        """A metric by iteration; for evaluations, the final center's is included."""
        values = {row["iteration"]: row[key] for row in self.metrics if key in row}
        final = self.summary.get(key if key.startswith("distance") else f"{key}_last")
        if final is not None and key != "reward_mean":
            values[self.summary["iterations"]] = final
        return {iteration: value for iteration, value in values.items() if drawable(value)}

    def total(self, key: str) -> float:
        """The sum of a metric over the iterations."""
        return sum(row[key] for row in self.metrics if drawable(row.get(key)))


def drawable(value: Any) -> bool:
    """Whether a value is a number for which axes can be computed."""
    return isinstance(value, int | float) and abs(value) <= LARGEST  # false of NaN


def read_json(file: Path) -> Any:
    return json.loads(file.read_bytes())


def read_summary(directory: Path) -> dict[str, Any]:
    """A run's summary.json; empty if there is none.

    Raises:
        ConfigError: it is damaged.
    """
    file = directory / "summary.json"
    if not file.is_file():
        return {}
    with mistakes_in(f"{file}: damaged; start the run again, which writes it"):
        summary = dict(read_json(file))
        if "iterations" not in summary:
            raise ValueError("it has no iterations")
        return summary


def _settings(file: Path) -> Any:
    return OmegaConf.to_container(OmegaConf.load(file))


def _flat(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings by dotted key."""
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        if isinstance(value, dict) and value:
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat
