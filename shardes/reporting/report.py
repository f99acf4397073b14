"""The report of one run, or of several beside each other: one HTML page, made from the files of
their directories.

It also works for a run that is still under way: what is not there yet is left out.
"""

import json
import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from shardes.config.schema import SETTINGS
from shardes.errors import ConfigError, one_line
from shardes.reporting.answers import before_and_after
from shardes.reporting.charts import Series, line_chart, stacked_chart
from shardes.reporting.page import (
    Answer,
    Answers,
    Block,
    Cards,
    Chart,
    Details,
    Heading,
    Table,
    Text,
    page,
)
from shardes.reporting.probe import FILE as PROBE
from shardes.reporting.probe import section
from shardes.reporting.progress import duration
from shardes.reporting.run_directory import RunContents, drawable, read_json
from shardes.storage.journal import JOURNAL

PARTS = ("generate", "gather", "perturb", "restore", "update", "exchange")
RESULTS = {
    "held_out_reward": "held-out reward",
    "held_out_accuracy": "held-out accuracy",
    "center_reward": "center's reward, training prompts",
    "reward_mean": "members' mean reward",
}
CURVES = {  # of a run by themselves; reward_mean has the range of the members around it
    "reward_mean": "members' mean (band: worst to best member)",
    "center_reward": "center, training prompts",
    "held_out_reward": "center, held-out prompts",
    "held_out_accuracy": "held-out accuracy",
    "distance_relative": "distance from the base model, relative",
}
CHARTS = {
    "Reward": ("reward_mean", "center_reward", "held_out_reward"),
    "Held-out accuracy": ("held_out_accuracy",),
    "Distance from the base model": ("distance_relative",),
}
FROM_ZERO = ("Held-out accuracy", "Seconds per iteration", "Tokens per second")


def render_probe(directory: Path) -> str | None:
    """The page of a directory that holds a probe and no run; None if it is another one.

    Raises:
        ConfigError: the probe is damaged.
    """
    file = directory / PROBE
    if (directory / JOURNAL).exists() or not file.is_file():
        return None
    try:
        return page(directory.resolve().name, [], {"Probe of σ": section(read_json(file))})
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ConfigError(f"{file}: damaged: {one_line(error)}; run the probe again") from error


def render(runs: Sequence[RunContents]) -> str:
    """The page of a run, or one that compares several."""
    named = dict(zip(_names(runs), runs, strict=True))
    about = [
        line
        for name, run in named.items()
        for line in (f"{name}: {_about(run)}" if len(runs) > 1 else _about(run), *run.warnings)
    ]
    sections: dict[str, Callable[[], list[Block]]] = {
        "Before and after": lambda: before_and_after(named)
    }
    if len(runs) == 1:
        (run,) = runs
        sections |= {
            "Results": lambda: [Cards(_figures(run)), *_curves(run)],
            "Time": lambda: _times(run),
            "Probe of σ": lambda: section(run.probe) if run.probe else [],
            "Best and worst responses": lambda: _extremes(run),
            "Settings": lambda: _settings(run),
            "Starts and environment": lambda: _starts(run),
        }
    else:
        sections |= {
            "Results": lambda: [_results(named), *_compared(named)],
            "Settings that differ": lambda: [_differences(named)],
        }
    return page(" · ".join(named), about, {name: _safe(make) for name, make in sections.items()})


def _names(runs: Iterable[RunContents]) -> list[str]:
    """The directories' names, with as many of their parents as it takes to tell them apart."""
    parts = [run.directory.resolve().parts for run in runs]
    depth = 1
    while len({part[-depth:] for part in parts}) < len(parts) and depth < max(map(len, parts)):
        depth += 1
    return ["/".join(part[-depth:]) for part in parts]


def _about(run: RunContents) -> str:
    task = run.settings.get("task.name") or run.settings.get("task.path") or "in Python"
    return f"task {task}; base model {run.history.header.model}; {run.state}"


def _safe(make: Callable[[], list[Block]]) -> list[Block]:
    """A section, or why it cannot be shown: values may be of any kind in damaged files."""
    try:
        return make()
    except Exception as error:
        problem = f"{type(error).__name__}: {error}"
        return [Text(f"Cannot be shown, because a file of the run is damaged: {problem}")]


def _figures(run: RunContents) -> dict[str, str]:
    """The most important figures by name."""
    seconds, tokens = run.total("seconds"), run.total("generated_tokens")
    figures = {
        "iterations": f"{len(run.history.records)} of {run.settings.get('es.iterations', '?')}"
    }
    for key, name in RESULTS.items():
        values = list(run.curve(key).values())
        if len(values) > 1:
            figures[name] = f"{values[0]:.4g} → {values[-1]:.4g}"
    figures["time in iterations"] = duration(seconds)
    if seconds:
        figures["tokens generated"] = f"{tokens:,} ({tokens / seconds:,.0f}/s)"
    return figures


def _curves(run: RunContents) -> list[Block]:
    band = {
        row["iteration"]: (row["reward_min"], row["reward_max"])
        for row in run.metrics
        if drawable(row.get("reward_min")) and drawable(row.get("reward_max"))
    }
    parts = sorted({key for row in run.metrics for key in row if key.startswith("reward/")})
    return _charts({
        title: [
            Series(
                CURVES.get(key, key.removeprefix("reward/")),
                run.curve(key),
                band if key == "reward_mean" else {},
                dots=key not in ("reward_mean", *parts),
            )
            for key in keys
        ]
        for title, keys in (CHARTS | {"Parts of the members' reward": tuple(parts)}).items()
    })  # fmt: skip


def _compared(runs: dict[str, RunContents]) -> list[Block]:
    """A chart per metric, with a curve per run."""
    names = RESULTS | {"distance_relative": "distance from the base model, relative"}
    series = {
        name.capitalize(): [
            Series(run, contents.curve(key), dots=key != "reward_mean")
            for run, contents in runs.items()
        ]
        for key, name in names.items()
    }
    series["Seconds per iteration"] = [
        Series(name, run.curve("seconds")) for name, run in runs.items()
    ]
    series["Tokens per second"] = [Series(name, _speed(run)) for name, run in runs.items()]
    return _charts(series)


def _charts(series: dict[str, list[Series]]) -> list[Block]:
    """The charts that have a curve, by title."""
    charts = {
        title: line_chart(curves, from_zero=title in FROM_ZERO) for title, curves in series.items()
    }
    return [Chart(title, figure) for title, figure in charts.items() if figure]


def _speed(run: RunContents) -> dict[float, float]:
    """Generated tokens per second by iteration."""
    return {
        row["iteration"]: row["generated_tokens"] / row["seconds"]
        for row in run.metrics
        if row.get("seconds")
    }


def _results(runs: dict[str, RunContents]) -> Table:
    """The most important figures, a column per run."""
    figures = [_figures(run) for run in runs.values()]
    keys = dict.fromkeys(key for values in figures for key in values)
    rows = [[key, *(values.get(key, "–") for values in figures)] for key in keys]
    return Table(rows, ["", *runs])


def _differences(runs: dict[str, RunContents]) -> Block:
    keys = dict.fromkeys(key for run in runs.values() for key in run.settings if key != "run.dir")
    values = {key: [_json(run.settings.get(key)) for run in runs.values()] for key in keys}
    rows = [[key, *found] for key, found in values.items() if len(set(found)) > 1]
    return Table(rows, ["key", *runs]) if rows else Text("None.")


def _times(run: RunContents) -> list[Block]:
    """Seconds by part, and tokens per second."""
    timed = [row for row in run.metrics if "seconds" in row]
    if not timed:
        return [Text("No iteration is done.")]
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
    total = run.total("seconds")
    totals = {part: math.fsum(values.values()) for part, values in parts.items()}
    bars = stacked_chart(parts)
    return [
        Text(
            "Seconds of rank 0 per iteration, by part; “rest” is the time outside these parts, "
            "scoring included. The replica that waited longest for the last reward of each "
            f"iteration was idle for {run.total('seconds_idle'):,.1f} s in all."
        ),
        *([Chart("Seconds per iteration", bars)] if bars else []),
        Table(
            [(part, f"{time:,.1f} s", f"{time / total:.1%}") for part, time in totals.items()],
            ("part", "in all", ""),
        ),
        *_charts({"Tokens per second": [Series("all replicas", _speed(run))]}),
    ]


def _extremes(run: RunContents) -> list[Block]:
    """The best and the worst response of the first and the last iteration."""
    if not run.extremes:
        return []
    blocks: list[Block] = [Text("Of all members that replica 0 evaluated, on training prompts.")]
    for iteration in sorted({run.extremes[0]["iteration"], run.extremes[-1]["iteration"]}):
        blocks.append(Heading(f"Iteration {iteration}"))
        for row in run.extremes:
            if row["iteration"] == iteration:
                caption = f"{row['kind']}, by member {row['member']}"
                answer = Answer(caption, row["response"], float(row["reward"]))
                blocks.append(Answers(row["prompt"], [answer]))
    return blocks


def _settings(run: RunContents) -> list[Block]:
    changed: list[tuple[str, str]] = []
    others: list[tuple[str, str]] = []
    for key, value in run.settings.items():
        default = SETTINGS[key].default if key in SETTINGS else None
        default = getattr(default, "value", default)
        rows = others if value == default else changed
        rows.append((key, _json(value)))
    return [
        Table(changed, ("set", "")),
        Details("the others, at their defaults", [Table(others, ("key", ""))]),
    ]


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def _starts(run: RunContents) -> list[Block]:
    """Every start: its time, host, devices and layout; and every change of settings at a resume."""
    resumed = [
        (
            str(entry.iteration),
            "; ".join(f"{key}: {old} → {new}" for key, (old, new) in entry.changes.items())
            or "none",
        )
        for entry in run.history.resumptions
    ]
    blocks: list[Block] = [
        Table(resumed, ("resumed at iteration", "settings changed"))
        if resumed
        else Text("Never resumed.")
    ]
    if not run.starts:
        return [*blocks, Text("The run directory has no logs of its starts.")]
    rows = []
    for name, start in run.starts.items():
        layout = ", ".join(f"{key} {value}" for key, value in start["world"].items())
        devices = ", ".join(sorted(set(start["devices"]))) or "no GPU"
        rows.append(
            (name, start["started"], start["host"], f"{devices}; {start['cores']} cores", layout)
        )
    newest = next(reversed(run.starts.values()))
    return [
        *blocks,
        Table(rows, ("start", "at", "host", "devices of the host", "layout")),
        Heading("Versions and environment of the newest"),
        Table([*_rows(newest["versions"]), ("system", newest["system"])]),
        Details("environment variables", [Table(_rows(newest["environment"]), ("variable", ""))]),
    ]


def _rows(values: dict[str, Any]) -> list[tuple[str, str]]:
    return [(key, str(value)) for key, value in values.items()]
