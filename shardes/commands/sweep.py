"""Train with every (σ, α) and several run seeds, evaluate the models, and plot reward against KL.

    shardes sweep configs/conciseness_small.yaml runs/sweep \\
        --setting 0.002 0.003 --setting 0.001 0.0015 \\
        [--seeds 0 1 2 3] [--samples 20] [--gpus 2] [key=value ...]

As in section 4.2 of the paper, every setting is run with every seed. The tuned model gives
`--samples` responses to each held-out prompt; a run's results are their mean reward and KL to the
base. Writes table.md (Table 2's columns: mean ± standard deviation over the seeds), pareto.png and
pareto.svg (Figure 1) and sweep.json. An interrupted sweep resumes when it is started again.
Snapshots are removed after their evaluation; the journals suffice to rebuild them.
"""

import argparse
import json
import shutil
import sys
from pathlib import Path

from shardes.commands.arguments import CommandParser, path, reports_errors
from shardes.commands.plot import matplotlib_or_error
from shardes.config.loading import load
from shardes.distributed import environment
from shardes.distributed.local_ranks import run_ranks
from shardes.errors import ConfigError, Stopped, unusable_files
from shardes.es.statistics import mean, std

OWN = ("es.sigma", "es.alpha", "es.seed", "run.dir")  # the keys that a sweep sets


def launch(ranks: int, command: str, *arguments: object) -> None:
    """Run a command of shardes on several ranks of this host.

    Raises:
        ConfigError, RunError: a rank failed.
        Stopped: it was asked to stop.
    """
    program = [sys.executable, "-m", f"shardes.commands.{command}"]
    run_ranks([*program, *map(str, arguments)], ranks)


def directory(options: argparse.Namespace, sigma: float, alpha: float, seed: int) -> Path:
    """The run directory of a run of the sweep."""
    return options.out / f"sigma{sigma:g}_alpha{alpha:g}_seed{seed}"


def settings(options: argparse.Namespace, sigma: float, alpha: float, seed: int) -> list[str]:
    """The settings of a run of the sweep, as `key=value`."""
    run = directory(options, sigma, alpha, seed)
    values = zip(OWN, (sigma, alpha, seed, run), strict=True)
    return [*(f"{key}={value}" for key, value in values), *options.overrides]


def check(options: argparse.Namespace) -> None:
    """Raise ConfigError for what would end the sweep after a part of its work."""
    for override in options.overrides:
        if override.partition("=")[0] in OWN:
            raise ConfigError(
                f"{override}: a sweep sets it, by --setting, --seeds and OUT_DIR; leave it out"
            )
    for sigma, alpha in options.setting:
        for seed in options.seeds:
            every = load(options.config, settings(options, sigma, alpha, seed)).checkpoint.every
            if not every:
                raise ConfigError(
                    "checkpoint.every=0: a sweep evaluates each run's last snapshot; use at least 1"
                )


def run_results(options: argparse.Namespace, sigma: float, alpha: float, seed: int) -> dict:
    """Train and evaluate one run, unless that is done already; returns its results."""
    run = directory(options, sigma, alpha, seed)
    evaluation = run / "evaluation.json"
    if not evaluation.exists():
        keys = settings(options, sigma, alpha, seed)
        launch(options.ranks, "train", options.config, *keys)
        iterations = load(options.config, keys).es.iterations
        tuned = run / "snapshots" / f"iteration_{iterations}"
        flags = ["--model", tuned, "--samples", options.samples, "--out", evaluation]
        launch(options.ranks, "evaluate", options.config, *keys, *flags)
        shutil.rmtree(run / "snapshots")
    report = json.loads(evaluation.read_text(encoding="utf-8"))["splits"]["test"]
    figures = {key: report["sampled"][key] for key in ("reward", "kl")}
    return dict(sigma=sigma, alpha=alpha, seed=seed, **figures, greedy=report["greedy"]["reward"])


def rows_of(runs: list[dict]) -> list[dict]:
    """One row per (σ, α): mean and standard deviation (ddof 0) over its seeds."""
    in_order = dict.fromkeys((run["sigma"], run["alpha"]) for run in runs)
    rows = []
    for sigma, alpha in in_order:
        group = [run for run in runs if (run["sigma"], run["alpha"]) == (sigma, alpha)]
        row = dict(sigma=sigma, alpha=alpha, seeds=len(group))
        for key in ("reward", "kl"):
            values = [run[key] for run in group]
            row |= {key: mean(values), f"{key}_std": std(values)}
        rows.append(row)
    return rows


def front(rows: list[dict]) -> list[dict]:
    """The Pareto front: the rows that no other row beats in both reward and KL, by KL."""
    best: list[dict] = []
    for row in sorted(rows, key=lambda row: (row["kl"], -row["reward"])):
        if not best or row["reward"] > best[-1]["reward"]:
            best.append(row)
    return best


def table(rows: list[dict]) -> str:
    lines = ["| σ | α | run seeds | reward | KL |", "| --- | --- | --- | --- | --- |"]
    lines += [
        f"| {row['sigma']:g} | {row['alpha']:g} | {row['seeds']} | "
        f"{row['reward']:.1f} ± {row['reward_std']:.1f} | {row['kl']:.4f} ± {row['kl_std']:.4f} |"
        for row in rows
    ]
    return "\n".join(lines) + "\n"


def draw(rows: list[dict], runs: list[dict], base_reward: float, out: Path) -> None:
    """Plot reward against KL: runs small, settings large, the Pareto front as a line."""
    plt = matplotlib_or_error()
    figure, axes = plt.subplots(figsize=(6.4, 4.2), layout="constrained")
    for color, row in enumerate(rows):
        group = [run for run in runs if all(run[key] == row[key] for key in ("sigma", "alpha"))]
        axes.scatter(
            [run["kl"] for run in group],
            [run["reward"] for run in group],
            s=14,
            alpha=0.5,
            color=f"C{color}",
        )
        label = f"σ = {row['sigma']:g}, α = {row['alpha']:g}"
        axes.scatter(row["kl"], row["reward"], s=70, color=f"C{color}", label=label, zorder=3)
    base = dict(kl=0.0, reward=base_reward)
    line = front([base, *rows])
    axes.plot(
        [row["kl"] for row in line], [row["reward"] for row in line], color="gray", lw=1, zorder=1
    )
    axes.scatter(0, base_reward, marker="*", s=120, color="black", label="base", zorder=3)
    axes.set(xlabel="KL to the base, nats per token", ylabel="mean reward, held-out prompts")
    axes.legend(frameon=False, fontsize="small")
    for kind in ("png", "svg"):
        figure.savefig(out / f"pareto.{kind}", dpi=150)
    plt.close(figure)


def base_reward(options: argparse.Namespace) -> float:
    """The base model's mean reward, sampled like that of the tuned models."""
    evaluation = options.out / "base.json"
    if not evaluation.exists():
        keys = [f"run.dir={options.out}", *options.overrides]
        flags = ["--samples", options.samples, "--out", evaluation]
        launch(options.ranks, "evaluate", options.config, *keys, *flags)
    report = json.loads(evaluation.read_text(encoding="utf-8"))
    return report["splits"]["test"]["sampled"]["reward"]


def parser() -> CommandParser:
    parser = CommandParser("sweep", __doc__)
    parser.add_argument("config", metavar="CONFIG.yaml")
    parser.add_argument("out", metavar="OUT_DIR", type=path)
    parser.add_argument("overrides", metavar="key=value", nargs="*")
    parser.add_argument(
        "--setting",
        nargs=2,
        type=float,
        action="append",
        required=True,
        metavar=("σ", "α"),
        help="may be repeated",
    )
    parser.add_argument(
        "--seeds", nargs="+", type=int, default=[0, 1, 2, 3], help="run seeds; default: 0 1 2 3"
    )
    parser.add_argument(
        "--samples",
        type=int,
        default=20,
        help="responses per held-out prompt; default: %(default)s",
    )
    parser.add_argument(
        "--gpus",
        type=int,
        default=1,
        dest="ranks",
        metavar="N",
        help="ranks on this host; default: %(default)s",
    )
    return parser


@reports_errors
@unusable_files()
def main(argv: list[str]) -> int:
    options = parser().parse_intermixed_args(argv)
    for flag in ("samples", "ranks"):
        if getattr(options, flag) < 1:
            name = {"ranks": "gpus"}.get(flag, flag)
            raise ConfigError(f"--{name} {getattr(options, flag)}: must be at least 1")
    matplotlib_or_error()
    check(options)
    options.out.mkdir(parents=True, exist_ok=True)
    try:
        base = base_reward(options)
        runs = [
            run_results(options, sigma, alpha, seed)
            for sigma, alpha in options.setting
            for seed in options.seeds
        ]
    except Stopped as stopped:
        if not stopped.said:
            print(stopped, flush=True)
        return stopped.code
    rows = rows_of(runs)
    (options.out / "sweep.json").write_text(json.dumps(dict(base=base, runs=runs), indent=1) + "\n")
    (options.out / "table.md").write_text(table(rows), encoding="utf-8")
    draw(rows, runs, base, options.out)
    print(table(rows), end="")
    return 0


if __name__ == "__main__":
    environment.run(main)
