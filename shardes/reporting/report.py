"""The report of a run: one HTML page, made from the files of a run directory.

It also works for a run that is still under way: what is not there yet is left out.
"""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from shardes.config.schema import SETTINGS
from shardes.errors import ConfigError, one_line
from shardes.reporting import json_lines
from shardes.reporting.attempts import attempts
from shardes.reporting.charts import Series, line_chart, stacked_chart
from shardes.reporting.page import cards, escaped, page, rows_of, sample, table
from shardes.reporting.probe import FILE as PROBE
from shardes.reporting.probe import section
from shardes.reporting.progress import duration
from shardes.storage.journal import JOURNAL, History, read

PARTS = ("generate", "gather", "perturb", "restore", "update", "exchange")
GROUP = 4  # samples per group
LARGEST = 1e100  # that is drawn; the limit of rewards


class Run:
    """The contents of a run directory."""

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
        self.summary = self._read(directory / "summary.json", _json)
        self.settings = _flat(self._read(directory / "config.yaml", _settings))
        starts = {
            path.name: self._read(path / "environment.json", _json) for path in attempts(directory)
        }
        self.starts = {name: start for name, start in starts.items() if start}
        self.probe = self._read(directory / PROBE, _json)

    def _read(self, file: Path, read: Callable[[Path], Any]) -> dict[str, Any]:
        """The mapping in a file; empty if there is none, or if it is damaged."""
        if not file.is_file():
            return {}
        try:
            return {str(key): value for key, value in read(file).items()}
        except Exception as error:  # whatever a reader meets in a damaged file
            self.warnings.append(f"WARNING: {file}: damaged and left out: {one_line(error)}")
            return {}

    def curve(self, key: str) -> dict[float, float]:
        """A metric by iteration; for evaluations, the final center's is included."""
        values = {row["iteration"]: row[key] for row in self.metrics if key in row}
        final = self.summary.get(key, self.summary.get(f"{key}_last"))
        if final is not None and key != "reward_mean":
            values[self.summary["iterations"]] = final
        return {iteration: value for iteration, value in values.items() if drawable(value)}


def drawable(value: Any) -> bool:
    """Whether a value is a number for which axes can be computed."""
    return isinstance(value, int | float) and abs(value) <= LARGEST  # false of NaN


def _json(file: Path) -> Any:
    return json.loads(file.read_bytes())


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


def render_probe(directory: Path) -> str | None:
    """The page of a directory that holds a probe and no run; None if it is another one.

    Raises:
        ConfigError: the probe is damaged.
    """
    file = directory / PROBE
    if (directory / JOURNAL).exists() or not file.is_file():
        return None
    try:
        return page(directory.resolve().name, "", {"Probe of σ": section(_json(file))})
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ConfigError(f"{file}: damaged: {one_line(error)}; run the probe again") from error


def render(run: Run) -> str:
    """The page."""
    history = run.history
    state = (
        f"finished: center {history.finish.digest}" if history.finish else "under way, or stopped"
    )
    task = run.settings.get("task.name") or run.settings.get("task.path")
    about = escaped(f"task {task}; base model {history.header.model}; {state}")
    makers = {
        "Rewards": _rewards,
        "Probe of σ": _probe,
        "Samples before and after": _samples,
        "Best and worst responses": _extremes,
        "Time": _times,
        "Settings": _settings_tables,
        "Starts and environment": _starts,
    }
    sections = {name: _section(make, run) for name, make in makers.items()}
    head = f"<p>{about}</p>{_section(_overview, run)}"
    head += "".join(f"<p>{escaped(warning)}</p>" for warning in run.warnings)
    return page(f"{run.directory.resolve().name}", head, sections)


def _section(make: Callable[[Run], str], run: Run) -> str:
    """A section, or why it cannot be shown: values may be of any kind in damaged files."""
    try:
        return make(run)
    except Exception as error:
        problem = f"{type(error).__name__}: {error}"
        return f"<p>Cannot be shown, because a file of the run is damaged: {escaped(problem)}</p>"


def _overview(run: Run) -> str:
    """The most important figures."""
    seconds = math.fsum(row.get("seconds", 0.0) for row in run.metrics)
    tokens = sum(row.get("generated_tokens", 0) for row in run.metrics)
    figures = {
        "iterations": f"{len(run.history.records)} of {run.settings.get('es.iterations', '?')}"
    }
    for key, name in (
        ("held_out_reward", "held-out reward"),
        ("held_out_accuracy", "held-out accuracy"),
        ("center_reward", "center's reward, training prompts"),
        ("reward_mean", "members' mean reward"),
    ):
        values = list(run.curve(key).values())
        if len(values) > 1:
            figures[name] = f"{values[0]:.4g} → {values[-1]:.4g}"
    figures["time in iterations"] = duration(seconds)
    if seconds:
        figures["tokens generated"] = f"{tokens:,} ({tokens / seconds:,.0f}/s)"
    return cards(figures)


def _rewards(run: Run) -> str:
    band = {
        row["iteration"]: (row["reward_min"], row["reward_max"])
        for row in run.metrics
        if drawable(row.get("reward_min")) and drawable(row.get("reward_max"))
    }
    rewards = [
        Series("members' mean (band: worst to best member)", run.curve("reward_mean"), band),
        Series("center, training prompts", run.curve("center_reward"), dots=True),
        Series("center, held-out prompts", run.curve("held_out_reward"), dots=True),
    ]
    accuracy = Series("held-out accuracy", run.curve("held_out_accuracy"), dots=True)
    distance = Series(
        "distance from the base model, relative", run.curve("distance_relative"), dots=True
    )
    return line_chart(rewards) + line_chart([accuracy]) + line_chart([distance])


def _probe(run: Run) -> str:
    return section(run.probe) if run.probe else ""


def _times(run: Run) -> str:
    """Seconds by part, and tokens per second."""
    timed = [row for row in run.metrics if "seconds" in row]
    if not timed:
        return "<p>No iteration is done.</p>"
    parts = {
        part: {row["iteration"]: row.get(f"seconds_{part}", 0.0) for row in timed} for part in PARTS
    }
    sum_of_parts = {
        row["iteration"]: math.fsum(parts[part][row["iteration"]] for part in PARTS)
        for row in timed
    }
    parts["rest"] = {
        row["iteration"]: max(row["seconds"] - sum_of_parts[row["iteration"]], 0.0) for row in timed
    }
    total = math.fsum(row["seconds"] for row in timed)
    totals = {part: math.fsum(values.values()) for part, values in parts.items()}
    speed = {row["iteration"]: row["generated_tokens"] / row["seconds"] for row in timed}
    idle = math.fsum(row.get("seconds_idle", 0.0) for row in timed)
    return (
        "<p>Seconds of rank 0 per iteration, by part; <em>rest</em> is the time outside these "
        "parts, scoring included.</p>"
        + stacked_chart(parts)
        + table(
            [(part, f"{time:,.1f} s", f"{time / total:.1%}") for part, time in totals.items()],
            "part",
            "in all",
            "",
        )
        + "<p>The replica that waited longest for the last reward of each iteration was idle for "
        + f"{idle:,.1f} s in all.</p>"
        + line_chart([Series("tokens per second, all replicas", speed)])
    )


def _samples(run: Run) -> str:
    """Held-out responses of the first and the last evaluated center, to the same prompts."""
    held_out = [row for row in run.samples if row["split"] == "test"]
    evaluated = sorted({row["iteration"] for row in held_out})
    if len(evaluated) < 2:
        return "<p>There are not two evaluations yet.</p>"
    first, last = evaluated[0], evaluated[-1]
    before, after = (
        [row for row in held_out if row["iteration"] == iteration] for iteration in (first, last)
    )
    pairs = sorted(
        zip(before, after, strict=False), key=lambda pair: pair[0]["reward"] - pair[1]["reward"]
    )
    better = [pair for pair in pairs if pair[1]["reward"] > pair[0]["reward"]]
    worse = [pair for pair in reversed(pairs) if pair[1]["reward"] < pair[0]["reward"]]
    same = [pair for pair in pairs if pair[1]["reward"] == pair[0]["reward"]]
    text = (
        f"<p>The center's responses to held-out prompts after {first} and after {last} iterations. "
        f"Of {len(pairs)}, {len(better)} are worth more than before, {len(worse)} less, "
        f"{len(same)} the same. Shown are the {GROUP} largest gains, the {GROUP} largest losses "
        f"and the first {GROUP} of the same reward.</p>"
    )
    for name, group in (("Gained", better), ("Lost", worse), ("The same", same)):
        text += f"<h3>{name}</h3>" if group else ""
        for old, new in group[:GROUP]:
            text += sample(
                old["prompt"], {f"after {first} iterations": old, f"after {last} iterations": new}
            )
    return text


def _extremes(run: Run) -> str:
    """The best and the worst response of the first and the last iteration."""
    if not run.extremes:
        return ""
    text = "<p>Of all members that replica 0 evaluated, on training prompts.</p>"
    for iteration in sorted({run.extremes[0]["iteration"], run.extremes[-1]["iteration"]}):
        text += f"<h3>Iteration {iteration}</h3>"
        for row in run.extremes:
            if row["iteration"] == iteration:
                text += sample(row["prompt"], {f"{row['kind']}, by member {row['member']}": row})
    return text


def _settings_tables(run: Run) -> str:
    changed: list[tuple[str, str]] = []
    others: list[tuple[str, str]] = []
    for key, value in run.settings.items():
        default = SETTINGS[key].default if key in SETTINGS else None
        default = getattr(default, "value", default)
        rows = others if value == default else changed
        rows.append((key, json.dumps(value, ensure_ascii=False)))
    return (
        table(changed, "set", "")
        + "<details><summary>the others, at their defaults</summary>"
        + table(others, "key", "")
        + "</details>"
    )


def _starts(run: Run) -> str:
    """Every start: its time, host, devices and layout; and every change of settings at a resume."""
    resumed = [
        (
            str(entry.iteration),
            "; ".join(f"{key}: {old} → {new}" for key, (old, new) in entry.changes.items())
            or "none",
        )
        for entry in run.history.resumptions
    ]
    text = (
        table(resumed, "resumed at iteration", "settings changed")
        if resumed
        else "<p>Never resumed.</p>"
    )
    if not run.starts:
        return text + "<p>The run directory has no logs of its starts.</p>"
    rows = []
    for name, start in run.starts.items():
        layout = ", ".join(f"{key} {value}" for key, value in start["world"].items())
        devices = ", ".join(sorted(set(start["devices"]))) or "no GPU"
        rows.append(
            (name, start["started"], start["host"], f"{devices}; {start['cores']} cores", layout)
        )
    newest = next(reversed(run.starts.values()))
    return (
        text
        + table(rows, "start", "at", "host", "devices of the host", "layout")
        + "<h3>Versions and environment of the newest</h3>"
        + table([*rows_of(newest["versions"]), ("system", newest["system"])], "", "")
        + "<details><summary>environment variables</summary>"
        + table(rows_of(newest["environment"]), "variable", "")
        + "</details>"
    )
