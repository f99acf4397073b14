"""Plot the rewards of runs, with a band over run seeds.

    shardes plot RUN... [--out plot] [--title TEXT] [--reward]

RUN is a run directory. LABEL=RUN,RUN,... are runs with one setting and several run seeds, drawn as
their mean and the range from the lowest to the highest. Writes OUT.png and OUT.svg: the members'
mean reward by iteration, and the center's accuracy on held-out prompts, or its reward if the task
does not define correct responses or with --reward.
"""

from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from shardes.commands.arguments import CommandParser, path, reports_errors
from shardes.distributed import environment
from shardes.errors import ConfigError, unusable_files
from shardes.reporting import json_lines
from shardes.reporting.run_directory import read_summary


def matplotlib_or_error() -> Any:
    """matplotlib.pyplot.

    Raises:
        ConfigError: it is not installed.
    """
    try:
        return import_module("matplotlib.pyplot")
    except ImportError as error:
        raise ConfigError(f"matplotlib is needed ({error}); pip install matplotlib") from None


def curve(directory: Path, key: str) -> dict[int, float]:
    """A run's metric by iteration. The last evaluation is in summary.json."""
    rows = json_lines.read(directory / "metrics.jsonl")
    values = {row["iteration"]: row[key] for row in rows if key in row}
    last = read_summary(directory)
    if key != "reward_mean" and f"{key}_last" in last:  # the members' last is in metrics.jsonl
        values[last["iterations"]] = last[f"{key}_last"]
    return values


def band(curves: list[dict[int, float]]) -> tuple[list[int], np.ndarray]:
    """The iterations that all curves have, and the values there: [curves, iterations]."""
    shared = sorted(set.intersection(*map(set, curves)))
    return shared, np.array([[values[i] for i in shared] for values in curves])


def draw(groups: dict[str, list[Path]], title: str, out: Path, reward: bool = False) -> None:
    """Plot two panels: the members' mean reward, and the center on held-out prompts."""
    plt = matplotlib_or_error()
    from matplotlib.ticker import MaxNLocator

    accuracy = not reward and all(
        curve(run, "held_out_accuracy") for runs in groups.values() for run in runs
    )
    held_out = ("held_out_accuracy", "accuracy") if accuracy else ("held_out_reward", "reward")
    panels = [
        ("reward_mean", "members' mean reward"),
        (held_out[0], f"the center's {held_out[1]}, held-out prompts"),
    ]
    figure, axes = plt.subplots(1, 2, figsize=(10, 3.8), layout="constrained")
    for panel, (key, label) in zip(axes, panels, strict=True):
        for name, runs in groups.items():
            iterations, values = band([curve(run, key) for run in runs])
            marker = "o" if key != "reward_mean" else None
            (line,) = panel.plot(
                iterations, values.mean(0), label=name, marker=marker, markersize=3
            )
            if len(runs) > 1:
                panel.fill_between(
                    iterations, values.min(0), values.max(0), color=line.get_color(), alpha=0.2
                )
        panel.set(xlabel="iteration", ylabel=label)
        panel.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
        panel.spines[["top", "right"]].set_visible(False)
    axes[0].legend(frameon=False, loc="lower right")
    figure.suptitle(title)
    for kind in ("png", "svg"):
        figure.savefig(out.with_suffix(f".{kind}"), dpi=150)
    plt.close(figure)


@reports_errors
@unusable_files()
def main(argv: list[str]) -> int:
    parser = CommandParser("plot", __doc__)
    parser.add_argument(
        "runs", metavar="RUN", nargs="+", help="a run directory, or LABEL=RUN,RUN,..."
    )
    parser.add_argument("--out", type=path, default=Path("plot"), help="default: %(default)s")
    parser.add_argument("--title", default="", help="title above the panels")
    parser.add_argument(
        "--reward", action="store_true", help="the held-out reward, although there is an accuracy"
    )
    options = parser.parse_args(argv)
    groups = {}
    for argument in options.runs:
        label, labelled, runs = argument.partition("=")
        groups[label] = [path(run) for run in runs.split(",")] if labelled else [path(argument)]
    for run in (run for runs in groups.values() for run in runs):
        if not (run / "metrics.jsonl").is_file():
            raise ConfigError(f"{run}: no run directory: it has no metrics.jsonl")
    with matplotlib_or_error().rc_context({"text.parse_math": False}):  # a $ is a $
        draw(groups, options.title, options.out, options.reward)
    print(f"{options.out.with_suffix('.png')}, {options.out.with_suffix('.svg')}")
    return 0


if __name__ == "__main__":
    environment.run(main)
