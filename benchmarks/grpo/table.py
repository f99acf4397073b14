"""Tables and figure of the comparison, from the reports of its runs."""

import json
from collections.abc import Sequence
from pathlib import Path

from benchmarks.grpo.points import REPORT
from shardes.es.statistics import mean, proportion_interval

NAMES = {"es": "ES", "grpo": "GRPO"}
Run = dict  # what `runs.train` returns, with evaluated points


def read_runs(directories: Sequence[Path]) -> list[Run]:
    """The reports of runs, without points that were not evaluated."""
    runs = [json.loads((directory / REPORT).read_text()) for directory in directories]
    for run in runs:
        run["points"] = [point for point in run["points"] if "correct" in point]
    return runs


def best_settings(runs: Sequence[Run]) -> tuple[float, int]:
    """Learning rate and responses of a step of the GRPO run that solves most problems at its end.

    Only the smallest seed counts, that of the sweep.
    """
    return _settings(max(_sweep(runs), key=lambda run: run["points"][-1]["correct"]))


def _settings(run: Run) -> tuple[float, int]:
    return run["learning_rate"], run["responses"]


def _sweep(runs: Sequence[Run]) -> list[Run]:
    """The GRPO runs of the smallest seed, by their settings."""
    grpo = [run for run in runs if run["method"] == "grpo"]
    seed = min(run["seed"] for run in grpo)
    return sorted((run for run in grpo if run["seed"] == seed), key=_settings)


def compared(runs: Sequence[Run]) -> dict[str, list[Run]]:
    """The runs of each method by seed; of GRPO's those with the best settings."""
    best = best_settings(runs)
    chosen = [run for run in runs if run["method"] == "es" or _settings(run) == best]
    chosen.sort(key=lambda run: run["seed"])
    return {name: [run for run in chosen if run["method"] == name] for name in ("es", "grpo")}


def last_within(run: Run, tokens: float) -> dict:
    """The last point of a run for which it had generated at most `tokens` tokens."""
    return [point for point in run["points"] if point["tokens"] <= tokens][-1]


def tables(runs: Sequence[Run]) -> str:
    """The comparison in Markdown."""
    groups = compared(runs)
    chosen = [run for group in groups.values() for run in group]
    fewest = min(run["points"][-1]["tokens"] for run in chosen)
    base = groups["es"][0]["points"][0]
    seconds = " or ".join(sorted({f"{run['seconds']:g}" for run in chosen}))
    parts = [
        f"Base: {accuracy(base)}; sampled {accuracy(base, 'sampled_correct')}.",
        f"## After {seconds} s",
        _accuracies(groups, lambda run: run["points"][-1]),
        "## Sampled at temperature 1, the same models",
        _accuracies(groups, lambda run: run["points"][-1], "sampled_correct"),
        f"## After at most {fewest / 1e6:.2f} million generated tokens",
        _accuracies(groups, lambda run: last_within(run, fewest)),
        "## Cost",
        _costs(groups),
        f"## GRPO's settings, seed {_sweep(runs)[0]['seed']}",
        _table(
            ["learning rate", "responses of a step", "steps", "generated tokens", "accuracy"],
            [
                [
                    f"{run['learning_rate']:g}",
                    str(run["responses"]),
                    str(run["points"][-1]["step"]),
                    _millions(run["points"][-1]["tokens"]),
                    accuracy(run["points"][-1]),
                ]
                for run in _sweep(runs)
            ],
        ),
    ]
    return "\n\n".join(parts) + "\n"


def accuracy(point: dict, key: str = "correct") -> str:
    """The share of solved problems with Wilson's 95 % interval, in per cent."""
    low, high = proportion_interval(point[key], point["problems"])
    share = point[key] / point["problems"]
    return f"{100 * share:.1f} % ({100 * low:.1f} to {100 * high:.1f})"


def _accuracies(groups: dict[str, list[Run]], choose, key: str = "correct") -> str:
    """A row for each method: the chosen point of each of its runs."""
    seeds = sorted({run["seed"] for group in groups.values() for run in group})
    rows = []
    for name, group in groups.items():
        points = {run["seed"]: choose(run) for run in group}
        shares = [100 * point[key] / point["problems"] for point in points.values()]
        rows.append([
            NAMES[name],
            f"{mean([point['seconds'] for point in points.values()]):.0f}",
            _millions(mean([point["tokens"] for point in points.values()])),
            *(accuracy(points[seed], key) if seed in points else "" for seed in seeds),
            f"{mean(shares):.1f} %",
        ])  # fmt: skip
    return _table(
        ["", "seconds", "generated tokens", *(f"seed {seed}" for seed in seeds), "mean"], rows
    )


def _costs(groups: dict[str, list[Run]]) -> str:
    """A row for each method, of the largest values of its runs."""
    rows = [
        [
            NAMES[name],
            f"{max(run['peak_resident_bytes'] for run in group) / 1e9:.2f} GB",
            f"{max(run['peak_private_bytes'] for run in group) / 1e9:.2f} GB",
            str(group[0]["config_lines"]),
            f"{mean([run['points'][-1]['step'] for run in group]):.0f}",
        ]
        for name, group in groups.items()
    ]
    header = ["", "peak resident", "of it not mapped from files", "lines of settings", "steps"]
    return _table(header, rows)


def _millions(tokens: float) -> str:
    return f"{tokens / 1e6:.2f} million"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def draw(runs: Sequence[Run], out: Path) -> None:
    """Plot the accuracy by time and by tokens, a line for each run, as OUT.png and OUT.svg."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(10, 3.8), layout="constrained", sharey=True)
    for color, (name, group) in zip(("C0", "C1"), compared(runs).items(), strict=True):
        for number, run in enumerate(group):
            points = run["points"]
            shares = [100 * point["correct"] / point["problems"] for point in points]
            style = dict(color=color, marker=".", label=None if number else NAMES[name])
            axes[0].plot([point["seconds"] for point in points], shares, **style)
            # The base has generated none, which a logarithm does not show.
            axes[1].plot([point["tokens"] for point in points[1:]], shares[1:], **style)
    axes[0].set(xlabel="seconds of training", ylabel="solved test problems, greedy, %")
    axes[1].set(xlabel="generated tokens", xscale="log")
    axes[0].legend(frameon=False)
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
    for kind in ("png", "svg"):
        figure.savefig(out.with_suffix(f".{kind}"), dpi=150)
    plt.close(figure)


def write_results(directories: Sequence[Path], out: Path) -> str:
    """Write runs.json, table.md and curves.png and .svg; returns the table."""
    runs = read_runs(directories)
    out.mkdir(parents=True, exist_ok=True)
    (out / "runs.json").write_text(json.dumps(runs, indent=1) + "\n")
    text = tables(runs)
    (out / "table.md").write_text(text)
    draw(runs, out / "curves")
    return text
