"""Train with the σ that a probe suggests and with its neighbours, to see whether it wins.

    python tools/compare_sigmas.py configs/quickstart.yaml runs/sigmas [--pairs 15] \\
        [--seeds 0 1 2] [--ranks 2] [key=value ...]

`shardes probe` writes OUT_DIR/probe/probe.json. Every run has the suggested α and population size,
so the updates have the same length: only σ differs. A further group of runs has the config's own
settings. Writes results.json and table.md: rewards of the center before and after, mean ± standard
deviation over run seeds, and the rise of the members' reward over the first ten iterations beside
the one that the probe expects. An interrupted comparison resumes when it is started again.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from shardes.config.loading import load
from shardes.errors import ConfigError, RunError
from shardes.es.statistics import mean, std

FIRST = 10  # iterations, over which the rise is measured


def shardes(command: str, ranks: int, *arguments: object) -> None:
    """Run a command of shardes on several ranks of this host.

    Raises:
        RunError: it failed.
    """
    line = [command, *map(str, arguments), "--gpus", str(ranks)]
    done = subprocess.run([sys.executable, "-m", "shardes.commands.cli", *line])
    if done.returncode:
        raise RunError(f"{' '.join(line)} ended with {done.returncode}; start again to resume")


def settings(report: Mapping[str, Any], config: tuple[float, float, int]) -> list[dict[str, Any]]:
    """The suggested σ, its neighbours in the probe, and the config's settings: each with σ, α, N,
    and the rise that the probe expects.
    """
    found = report["suggestion"]
    if not found:
        raise RunError("the probe suggests no σ: raise --pairs")
    sigmas = [row["sigma"] for row in report["sigmas"]]
    chosen = sigmas.index(found["sigma"])
    near = range(max(chosen - 1, 0), min(chosen + 2, len(sigmas)))
    alpha, size = found["alpha"], found["population_size"]
    names = {-1: "smaller", 0: "suggested", 1: "larger"}
    groups = [
        dict(name=names[place - chosen], sigma=sigmas[place], alpha=alpha, size=size)
        for place in near
    ]
    rows = {row["sigma"]: row for row in report["sigmas"]}
    own = dict(zip(("sigma", "alpha", "size"), config, strict=True))
    groups.append({"name": "config"} | own)
    for group in groups:
        row = rows.get(group["sigma"], {})
        group["expected"] = expected_rise(row, group["alpha"], group["size"])
    return groups


def expected_rise(row: Mapping[str, Any], alpha: float, size: int) -> float | None:
    """The rise of the reward per update that a row of the probe lets expect; see es/tuning.py."""
    if "gain" not in row:
        return None
    step = row["fitness_rms"] * alpha / size**0.5
    return alpha * row["gain"] - (step / row["sigma"]) ** 2 * max(row["drop"], 0.0)


def outcome(run: Path) -> dict[str, float]:
    """What a finished run has written: the center's rewards, and the rise of the members' mean."""
    summary = json.loads((run / "summary.json").read_text(encoding="utf-8"))
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    means = [json.loads(line)["reward_mean"] for line in lines][: FIRST + 1]
    keys = [
        f"{name}_{time}"
        for name in ("center_reward", "held_out_reward", "held_out_accuracy")
        for time in ("first", "last")
    ]
    return {key: summary[key] for key in keys if key in summary} | {"rise": slope(means)}


def slope(values: Sequence[float]) -> float:
    """The slope of the least-squares line through values one apart."""
    middle, average = (len(values) - 1) / 2, mean(values)
    squares = sum((i - middle) ** 2 for i in range(len(values)))
    return sum((i - middle) * (v - average) for i, v in enumerate(values)) / squares


def table(groups: Sequence[Mapping[str, Any]]) -> str:
    keys = [key for key in groups[0]["runs"][0] if key != "rise"]
    head = ["", "σ", "α", "N", *keys, "rise per update", "expected"]
    lines = [f"| {' | '.join(head)} |", "|" + " --- |" * len(head)]
    for group in groups:
        cells = [group["name"], *(f"{group[key]:g}" for key in ("sigma", "alpha", "size"))]
        for key in (*keys, "rise"):
            values = [run[key] for run in group["runs"]]
            cells.append(f"{mean(values):.4g} ± {std(values):.2g}")
        expected = group["expected"]
        cells.append("–" if expected is None else f"{expected:.3g}")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def compare(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Probe, and train with every setting and seed, unless that is done already."""
    probed = options.out / "probe" / "probe.json"
    if not probed.exists():
        pairs = ["--pairs", options.pairs] if options.pairs else []
        keys = [f"run.dir={options.out}", *options.overrides]
        shardes("probe", options.ranks, options.config, *keys, *pairs)
    report = json.loads(probed.read_text(encoding="utf-8"))
    es = load(options.config, options.overrides).es
    groups = settings(report, (es.sigma, es.alpha, es.population_size))
    for group in groups:
        group["runs"] = []
        for seed in options.seeds:
            run = options.out / f"{group['name']}_seed{seed}"
            keys = [
                f"es.sigma={group['sigma']}",
                f"es.alpha={group['alpha']}",
                f"es.population_size={group['size']}",
                f"es.seed={seed}",
                "checkpoint.every=0",
                f"run.dir={run}",
            ]
            if not (run / "summary.json").exists():
                shardes("train", options.ranks, options.config, *options.overrides, *keys)
            group["runs"].append(outcome(run))
    return groups


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        prog="tools/compare_sigmas.py",
    )
    parser.add_argument("config", metavar="CONFIG.yaml")
    parser.add_argument("out", metavar="OUT_DIR", type=Path)
    parser.add_argument("overrides", metavar="key=value", nargs="*")
    parser.add_argument("--pairs", type=int, help="of the probe, at each σ")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="default: 0 1 2")
    parser.add_argument("--ranks", type=int, default=1, help="on this host; default: %(default)s")
    return parser


def main(argv: list[str]) -> int:
    options = parser().parse_intermixed_args(argv)
    options.out.mkdir(parents=True, exist_ok=True)
    try:
        groups = compare(options)
    except (ConfigError, RunError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, ConfigError) else 1
    (options.out / "results.json").write_text(json.dumps(groups, indent=1) + "\n")
    (options.out / "table.md").write_text(table(groups), encoding="utf-8")
    print(table(groups), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
