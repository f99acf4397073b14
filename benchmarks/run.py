"""Measure everything and print one table.

python -m benchmarks.run [--only NAME ...]
"""

import argparse
import json
import os
import platform
import sys
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path

from shardes import environment

environment.prepare()

import torch  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.table import Table  # noqa: E402

from benchmarks import generation, iteration, noise  # noqa: E402
from benchmarks.measure import Row  # noqa: E402

GROUPS = {
    "noise": lambda options: noise.rows(options.model, options.toy),
    "generation": lambda options: generation.rows(options.model, options.toy),
    "vllm": lambda options: [generation.against_vllm(options.model, options.toy, options.vllm)],
    "iteration": lambda options: iteration.rows(options.model, options.toy),
}


def rows(options: argparse.Namespace) -> Iterator[Row]:
    for name in options.only or GROUPS:
        yield from GROUPS[name](options)


def table(found: list[Row]) -> Table:
    shown = Table("what", "against", "ratio", "spread", "target", "reached", "note")
    for row in found:
        target = "" if row.target is None else f"{'≤' if row.at_most else '≥'} {row.target:g}"
        ratio, spread = (
            (f"{row.ratio:.3g}", f"{min(row.ratios):.3g} to {max(row.ratios):.3g}") if row.ratios else ("", "")
        )
        shown.add_row(row.what, row.against, ratio, spread, target, row.verdict, row.note)
    return shown


def plot(found: list[Row], file: Path) -> None:
    """The ratios over their targets, as bars with their spread; logarithmic."""
    from matplotlib.figure import Figure

    judged = [row for row in found if row.ratios and row.target is not None][::-1]
    # To the right of 1 is better than the target, whichever way the target points.
    scores = [[_score(row, ratio) for ratio in row.ratios] for row in judged]
    middle = [_score(row, row.ratio) for row in judged]
    pairs = list(zip(middle, scores, strict=True))
    spread = [[m - min(score) for m, score in pairs], [max(score) - m for m, score in pairs]]
    figure = Figure(figsize=(9, 1 + 0.45 * len(judged)), layout="constrained")
    axes = figure.subplots()
    axes.barh([f"{row.what}\nagainst {row.against}" for row in judged], middle, xerr=spread, color="#4878a8", capsize=3)
    axes.axvline(1, color="black", linewidth=1)
    axes.set_xscale("log")
    axes.set_xlabel("measured over target (1: the target is met; further right is better)")
    axes.tick_params(axis="y", labelsize=7)
    figure.savefig(file, dpi=130)


def _score(row: Row, ratio: float) -> float:
    return row.target / max(ratio, row.target / 100) if row.at_most else ratio / row.target


def kept(file: Path, toy: bool, found: list[Row]) -> list[Row]:
    """The rows of an earlier report at the same size, those measured now in their places."""
    rows = {}
    if file.exists() and (report := json.loads(file.read_text()))["toy"] == toy:
        names = {field.name for field in fields(Row)}
        earlier = ({key: value for key, value in row.items() if key in names} for row in report["rows"])
        rows = {row["name"]: Row(**row) for row in earlier}
    return list((rows | {row.name: row for row in found}).values())


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.run", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--only", nargs="+", choices=GROUPS, metavar="NAME", help=f"of {', '.join(GROUPS)}; default: all"
    )
    parser.add_argument("--model", type=Path, default=Path("models/SmolLM2-135M-Instruct"), help="default: %(default)s")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"), help="default: %(default)s")
    parser.add_argument("--vllm", metavar="PYTHON", help="the Python of an environment that has vLLM")
    parser.add_argument("--toy", action="store_true", help="small sizes, to see that every row runs")
    options = parser.parse_args(argv)
    if not options.model.is_dir():
        print(f"--model {options.model}: no such directory; python tools/get_smollm2.py brings it", file=sys.stderr)
        return 2
    found = []
    for row in rows(options):
        found.append(row)
        print(
            f"{row.what} against {row.against}: {f'{row.ratio:.3g}' if row.ratios else 'skipped'}  {row.note}",
            flush=True,
        )
    options.out.mkdir(parents=True, exist_ok=True)
    found = kept(options.out / "benchmarks.json", options.toy, found)
    console = Console(width=None if sys.stdout.isatty() else 200)
    console.print(table(found))
    machine = {"python": platform.python_version(), "torch": torch.__version__, "cores": len(os.sched_getaffinity(0))}
    report = {"machine": machine, "toy": options.toy, "rows": [row.as_dict() for row in found]}
    (options.out / "benchmarks.json").write_text(json.dumps(report, indent=2) + "\n")
    plot(found, options.out / "benchmarks.png")
    return 0


if __name__ == "__main__":
    environment.run(main)
