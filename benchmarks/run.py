"""Measure everything, print a table and draw it.

python -m benchmarks.run [--only NAME ...]

With --gpu, measure a GPU instead: see benchmarks/gpu.py.
"""

import argparse
import json
import os
import platform
import sys
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from benchmarks import generation, gpu, iteration, noise, side_by_side
from benchmarks.measure import Row
from shardes.distributed import environment

GROUPS = {
    "noise": lambda options: noise.rows(options.model, options.toy),
    "generation": lambda options: generation.rows(options.model, options.toy),
    "vllm": lambda options: [generation.against_vllm(options.model, options.toy, options.vllm)],
    "side_by_side": lambda options: side_by_side.rows(options.model, options.toy),
    "iteration": lambda options: iteration.rows(options.model, options.toy),
}


def rows(options: argparse.Namespace) -> Iterator[Row]:
    for name in options.only or GROUPS:
        yield from GROUPS[name](options)


def table(rows: list[Row]) -> Table:
    table = Table("what", "against", "ratio", "spread", "target", "reached", "note")
    for row in rows:
        target = "" if row.target is None else f"{'≤' if row.at_most else '≥'} {row.target:g}"
        ratio = spread = ""
        if row.ratios:
            ratio = f"{row.ratio:.3g}"
            spread = f"{min(row.ratios):.3g} to {max(row.ratios):.3g}"
        table.add_row(row.what, row.against, ratio, spread, target, row.verdict, row.note)
    return table


def plot(rows: list[Row], file: Path) -> None:
    """Draw the ratios relative to their targets, with their spread, on a logarithmic scale."""
    from matplotlib.figure import Figure

    judged = [row for row in rows if row.ratios and row.target is not None][::-1]
    scores = [[_score(row, ratio) for ratio in row.ratios] for row in judged]
    medians = [_score(row, row.ratio) for row in judged]
    pairs = list(zip(medians, scores, strict=True))
    spread = [
        [median - min(values) for median, values in pairs],
        [max(values) - median for median, values in pairs],
    ]
    figure = Figure(figsize=(9, 1 + 0.45 * len(judged)), layout="constrained")
    axes = figure.subplots()
    axes.barh(
        [f"{row.what}\nagainst {row.against}" for row in judged],
        medians,
        xerr=spread,
        color="#4878a8",
        capsize=3,
    )
    axes.axvline(1, color="black", linewidth=1)
    axes.set_xscale("log")
    axes.set_xlabel("measured / target (at 1 the target is reached; larger is better)")
    axes.tick_params(axis="y", labelsize=7)
    figure.savefig(file, dpi=130)


def _score(row: Row, ratio: float) -> float:
    """The ratio relative to the target; more than 1 is always better than the target."""
    return row.target / max(ratio, row.target / 100) if row.at_most else ratio / row.target


def merge(file: Path, toy: bool, rows: list[Row]) -> list[Row]:
    """The rows of an earlier report of the same size, replaced by those measured now."""
    merged = {}
    if file.exists() and (report := json.loads(file.read_text()))["toy"] == toy:
        names = {field.name for field in fields(Row)}
        for values in report["rows"]:
            row = Row(**{key: value for key, value in values.items() if key in names})
            merged[row.name] = row
    return list((merged | {row.name: row for row in rows}).values())


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.run", description=__doc__.splitlines()[0]
    )
    parser.add_argument(
        "--only",
        nargs="+",
        choices=GROUPS,
        metavar="NAME",
        help=f"of {', '.join(GROUPS)}; default: all",
    )
    parser.add_argument(
        "--model",
        type=Path,
        default=Path("models/SmolLM2-135M-Instruct"),
        help="default: %(default)s",
    )
    parser.add_argument(
        "--out", type=Path, default=Path("benchmarks/results"), help="default: %(default)s"
    )
    parser.add_argument("--gpu", action="store_true", help="measure a GPU; --gpu --help says more")
    parser.add_argument("--vllm", metavar="PYTHON", help="Python of an environment with vLLM")
    parser.add_argument(
        "--toy", action="store_true", help="small sizes, to check that every row runs"
    )
    return parser.parse_args(argv)


def main(argv: list[str]) -> int:
    if "--gpu" in argv:
        return gpu.main([argument for argument in argv if argument != "--gpu"])
    options = parse(argv)
    if not options.model.is_dir():
        print(
            f"--model {options.model}: no such directory; create it with shardes get-smollm2",
            file=sys.stderr,
        )
        return 2
    measured = []
    for row in rows(options):
        measured.append(row)
        ratio = f"{row.ratio:.3g}" if row.ratios else "skipped"
        print(f"{row.what} against {row.against}: {ratio}  {row.note}", flush=True)
    options.out.mkdir(parents=True, exist_ok=True)
    merged = merge(options.out / "benchmarks.json", options.toy, measured)
    console = Console(width=None if sys.stdout.isatty() else 200)
    console.print(table(merged))
    machine = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cores": len(os.sched_getaffinity(0)),
    }
    report = {"machine": machine, "toy": options.toy, "rows": [row.as_dict() for row in merged]}
    (options.out / "benchmarks.json").write_text(json.dumps(report, indent=2) + "\n")
    plot(merged, options.out / "benchmarks.png")
    return 0


if __name__ == "__main__":
    environment.run(main)
