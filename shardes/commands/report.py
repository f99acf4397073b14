"""Write a run's report: one HTML page that needs nothing else, neither a network nor JavaScript.

    shardes report RUN_DIR [--out FILE]

The page has the run's curves, its settings and layout, where the time went, samples from before and after, the
environment of each start, and resumptions. It works for runs that are still under way. Examples:

    shardes report runs/mine                      writes runs/mine/report.html
    shardes report runs/mine --out mine.html
"""

import json
import math
import sys
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from shardes import environment
from shardes.attempts import attempts
from shardes.commands.arguments import Parser
from shardes.commands.charts import Series, line_chart, stacked_chart
from shardes.commands.page import cards, escaped, page, rows_of, sample, table
from shardes.config import ConfigError, keys
from shardes.journal import JOURNAL, History, read
from shardes.progress import duration

PARTS = ("generate", "gather", "perturb", "restore", "update", "exchange")
GROUP = 4  # samples of a kind


class Run:
    """What a run directory holds, as far as it is there."""

    def __init__(self, directory: Path):
        history = read(directory / JOURNAL)
        if history is None:
            raise ConfigError(f"{directory}: no run directory: it has no {JOURNAL}")
        self.directory = directory
        self.history: History = history
        self.metrics = self._lines("metrics.jsonl")
        self.samples = self._lines("samples.jsonl")
        self.extremes = self._lines("extremes.jsonl")
        summary = directory / "summary.json"
        self.summary: dict[str, Any] = json.loads(summary.read_text()) if summary.is_file() else {}
        config = directory / "config.yaml"
        self.settings: dict[str, Any] = _flat(_settings(config)) if config.is_file() else {}
        self.starts = {
            path.name: json.loads((path / "environment.json").read_text(encoding="utf-8"))
            for path in attempts(directory)
            if (path / "environment.json").is_file()
        }

    def _lines(self, name: str) -> list[dict[str, Any]]:
        file = self.directory / name
        lines = file.read_text(encoding="utf-8").split("\n")[:-1] if file.is_file() else []
        return list(map(json.loads, lines))

    def curve(self, key: str) -> dict[float, float]:
        """A metric by iteration; of evaluations, the final center's too."""
        found = {row["iteration"]: row[key] for row in self.metrics if key in row}
        final = self.summary.get(key, self.summary.get(f"{key}_last"))
        if final is not None and key != "reward_mean":
            found[self.summary["iterations"]] = final
        return found


def _settings(file: Path) -> dict[str, Any]:
    found = OmegaConf.to_container(OmegaConf.load(file))
    assert isinstance(found, dict)
    return {str(key): value for key, value in found.items()}


def _flat(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in settings.items():
        found |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) and value else {prefix + key: value}
    return found


def overview(run: Run) -> str:
    """The figures that matter most."""
    seconds = math.fsum(row.get("seconds", 0.0) for row in run.metrics)
    tokens = sum(row.get("generated_tokens", 0) for row in run.metrics)
    found = {"iterations": f"{len(run.history.records)} of {run.settings.get('es.iterations', '?')}"}
    for key, name in (
        ("held_out_reward", "held-out reward"),
        ("held_out_accuracy", "held-out accuracy"),
        ("center_reward", "center's reward, training prompts"),
        ("reward_mean", "members' mean reward"),
    ):
        values = list(run.curve(key).values())
        if len(values) > 1:
            found[name] = f"{values[0]:.4g} → {values[-1]:.4g}"
    found["time in iterations"] = duration(seconds)
    if seconds:
        found["tokens generated"] = f"{tokens:,} ({tokens / seconds:,.0f}/s)"
    return cards(found)


def rewards(run: Run) -> str:
    band = {row["iteration"]: (row["reward_min"], row["reward_max"]) for row in run.metrics if "reward_min" in row}
    shown = line_chart([
        Series("members' mean (band: worst to best member)", run.curve("reward_mean"), band),
        Series("center, training prompts", run.curve("center_reward"), dots=True),
        Series("center, held-out prompts", run.curve("held_out_reward"), dots=True),
    ])  # fmt: skip
    accuracy = line_chart([Series("held-out accuracy", run.curve("held_out_accuracy"), dots=True)])
    moved = line_chart([Series("distance from the base model, relative", run.curve("distance_relative"), dots=True)])
    return shown + accuracy + moved


def times(run: Run) -> str:
    """Where the seconds went, by part, and how fast tokens came."""
    timed = [row for row in run.metrics if "seconds" in row]
    if not timed:
        return "<p>No iteration is done.</p>"
    parts = {part: {row["iteration"]: row.get(f"seconds_{part}", 0.0) for row in timed} for part in PARTS}
    named = {row["iteration"]: math.fsum(parts[part][row["iteration"]] for part in PARTS) for row in timed}
    parts["rest"] = {row["iteration"]: max(row["seconds"] - named[row["iteration"]], 0.0) for row in timed}
    whole = math.fsum(row["seconds"] for row in timed)
    sums = {part: math.fsum(values.values()) for part, values in parts.items()}
    speed = {row["iteration"]: row["generated_tokens"] / row["seconds"] for row in timed}
    idle = math.fsum(row.get("seconds_idle", 0.0) for row in timed)
    return (
        "<p>Seconds of rank 0 per iteration, by part; <em>rest</em> is what no part is charged with (scoring among it)."
        "</p>"
        + stacked_chart(parts)
        + table([(part, f"{took:,.1f} s", f"{took / whole:.1%}") for part, took in sums.items()], "part", "in all", "")
        + f"<p>Waiting for an iteration's last reward cost the replica that waited longest {idle:,.1f} s in all.</p>"
        + line_chart([Series("tokens per second, all replicas", speed)])
    )


def samples(run: Run) -> str:
    """Held-out responses of the first and the last center that were evaluated, to the same prompts."""
    held_out = [row for row in run.samples if row["split"] == "test"]
    evaluated = sorted({row["iteration"] for row in held_out})
    if len(evaluated) < 2:
        return "<p>There are not two evaluations yet.</p>"
    first, last = evaluated[0], evaluated[-1]
    before, after = ([row for row in held_out if row["iteration"] == when] for when in (first, last))
    pairs = sorted(zip(before, after, strict=False), key=lambda pair: pair[0]["reward"] - pair[1]["reward"])
    better = [pair for pair in pairs if pair[1]["reward"] > pair[0]["reward"]]
    worse = [pair for pair in reversed(pairs) if pair[1]["reward"] < pair[0]["reward"]]
    same = [pair for pair in pairs if pair[1]["reward"] == pair[0]["reward"]]
    text = (
        f"<p>The center's responses to held-out prompts after {first} and after {last} iterations. Of "
        f"{len(pairs)}, {len(better)} are worth more than before, {len(worse)} less, {len(same)} the same. Shown are "
        f"the {GROUP} largest gains, the {GROUP} largest losses and the first {GROUP} of the same reward.</p>"
    )
    for name, group in (("Gained", better), ("Lost", worse), ("The same", same)):
        text += f"<h3>{name}</h3>" if group else ""
        for old, new in group[:GROUP]:
            text += sample(old["prompt"], {f"after {first} iterations": old, f"after {last} iterations": new})
    return text


def extremes(run: Run) -> str:
    """The best and the worst response of the first and the last iteration."""
    if not run.extremes:
        return ""
    text = "<p>Of all members that the leading replica evaluated, on training prompts.</p>"
    for iteration in sorted({run.extremes[0]["iteration"], run.extremes[-1]["iteration"]}):
        found = [row for row in run.extremes if row["iteration"] == iteration]
        text += f"<h3>Iteration {iteration}</h3>"
        for row in found:
            text += sample(row["prompt"], {f"{row['kind']}, by member {row['member']}": row})
    return text


def settings(run: Run) -> str:
    defaults = {key: default for key, (default, _) in keys().items()}
    changed: list[tuple[str, str]] = []
    others: list[tuple[str, str]] = []
    for key, value in run.settings.items():
        default = defaults.get(key)
        default = getattr(default, "value", default)
        (others if value == default else changed).append((key, json.dumps(value, ensure_ascii=False)))
    return (
        table(changed, "set", "")
        + "<details><summary>the others, at their defaults</summary>"
        + table(others, "key", "")
        + "</details>"
    )


def starts(run: Run) -> str:
    """Every start: where, when, with what; and what was resumed with which changes."""
    resumed = [
        (
            str(entry.iteration),
            "; ".join(f"{key}: {old} → {new}" for key, (old, new) in entry.changes.items()) or "none",
        )
        for entry in run.history.resumptions
    ]
    text = table(resumed, "resumed at iteration", "settings changed") if resumed else "<p>Never resumed.</p>"
    if not run.starts:
        return text + "<p>The run directory has no logs of its starts.</p>"
    rows = []
    for name, found in run.starts.items():
        world = ", ".join(f"{key} {value}" for key, value in found["world"].items())
        devices = ", ".join(sorted(set(found["devices"]))) or "no GPU"
        rows.append((name, found["started"], found["host"], f"{devices}; {found['cores']} cores", world))
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


def render(run: Run) -> str:
    """The page."""
    history = run.history
    state = f"finished: center {history.finish.digest}" if history.finish else "under way, or stopped"
    task = run.settings.get("task.name") or run.settings.get("task.path")
    about = escaped(f"task {task}; base model {history.header.model}; {state}")
    sections = {
        "Rewards": rewards(run),
        "Samples before and after": samples(run),
        "Best and worst responses": extremes(run),
        "Time": times(run),
        "Settings": settings(run),
        "Starts and environment": starts(run),
    }
    return page(f"{run.directory.resolve().name}", f"<p>{about}</p>{overview(run)}", sections)


def main(argv: list[str]) -> int:
    parser = Parser("report", __doc__)
    parser.add_argument("run", metavar="RUN_DIR", type=Path)
    parser.add_argument("--out", metavar="FILE", type=Path, help="default: report.html in the run directory")
    try:
        options = parser.parse_args(argv)
        out = options.out or options.run / "report.html"
        text = render(Run(options.run))
        try:
            out.write_text(text, encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"{out}: cannot be written: {error}; choose another place with --out") from error
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(out)
    return 0


if __name__ == "__main__":
    environment.run(main)
