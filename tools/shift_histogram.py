"""Plot how far fine-tuning moved the weights, beside a random walk (the paper's A.5).

    python tools/shift_histogram.py BASE RUN [LABEL=RUN ...] [--out shifts]

BASE is a model directory, RUN a run directory. The last snapshot of the run is compared with the
base, one block of a tensor at a time. For each kind of layer, the plot shows a histogram of |Δθ| as
shares of the weights, in log-spaced bins, and the share of weights that did not move.

The random walk has the steps of the first run's journal: a normal step c·ε for each coefficient c.
Its end is distributed as |N(0, s²)| with s² = Σ c². Several runs, such as one with
es.restore=subtract and one with an exact center, are drawn over each other. Writes OUT.png, OUT.svg
and OUT.json.
"""

import argparse
import json
import math
import re
import sys
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch

from shardes.commands.arguments import reports_errors
from shardes.engines import open_model
from shardes.errors import ConfigError
from shardes.sharding.regions import BLOCK, Region
from shardes.sharding.weight_files import WeightFiles
from shardes.storage import journal, snapshots

BINS = 60


def kind_of(name: str) -> str:
    """A parameter's kind of layer: its name without the layer's number and the word weight."""
    parts = [
        part
        for part in name.split(".")
        if not part.isdigit() and part not in ("model", "layers", "weight")
    ]
    return re.sub(r"^(self_attn|mlp)\.", "", ".".join(parts))


class Histogram:
    """|Δθ| of one kind of layer: counts between `edges`, number of zeros, sum of squares."""

    def __init__(self, edges: np.ndarray):
        self.edges = edges
        # The first and the last count the values outside the edges.
        self.counts = np.zeros(len(edges) + 1, dtype=np.int64)
        self.unmoved = self.total = 0
        self.squares = 0.0

    def add(self, shift: np.ndarray) -> None:
        shift = np.abs(shift)
        self.unmoved += int(np.sum(shift == 0))
        self.total += shift.size
        self.squares += float(np.sum(shift.astype(np.float64) ** 2))
        self.counts += np.bincount(
            np.searchsorted(self.edges, shift[shift > 0]), minlength=len(self.counts)
        )

    @property
    def shares(self) -> np.ndarray:
        """The share of all weights in each bin."""
        return self.counts[1:-1] / self.total

    def report(self) -> dict:
        """The entry in OUT.json. `spread` is the root mean square of Δθ."""
        return dict(
            weights=self.total,
            unmoved=self.unmoved / self.total,
            spread=math.sqrt(self.squares / self.total),
            shares=self.shares.tolist(),
        )


def walk(edges: np.ndarray, spread: float) -> np.ndarray:
    """The share of |N(0, spread²)| that falls in each bin."""
    below = [math.erf(edge / (spread * math.sqrt(2))) for edge in edges]
    return np.diff(below)


def histograms(
    base: WeightFiles, tuned: WeightFiles, sizes: dict[str, int], edges: np.ndarray
) -> dict[str, Histogram]:
    """The histograms by kind of layer, and "all". Reads one block of one parameter at a time."""
    by_kind: dict[str, Histogram] = defaultdict(lambda: Histogram(edges))
    for name, numel in sizes.items():
        for begin in range(0, numel, BLOCK):
            block = Region.contiguous(begin, min(BLOCK, numel - begin))
            before, after = torch.empty(block.numel), torch.empty(block.numel)
            base.read(name, [block], before)
            tuned.read(name, [block], after)
            shift = (after - before).numpy()
            for kind in ("all", kind_of(name)):
                by_kind[kind].add(shift)
    return dict(by_kind)


def newest(directory: Path) -> WeightFiles:
    """The last snapshot of a run."""
    paths = list(snapshots.by_iteration(directory).values())
    if not paths:
        raise ConfigError(f"{directory}: no run directory with a snapshot")
    return open_model(paths[0], torch.float32)[0]


def draw(runs: dict[str, dict[str, Histogram]], spread: float, title: str, out: Path) -> None:
    """Plot a panel per kind of layer: each run's histogram, and the random walk as a line."""
    import matplotlib.pyplot as plt

    kinds = list(next(iter(runs.values())))
    columns = min(3, len(kinds))
    rows = -(-len(kinds) // columns)
    figure, axes = plt.subplots(
        rows,
        columns,
        figsize=(4 * columns, 2.6 * rows),
        layout="constrained",
        sharex=True,
        squeeze=False,
    )
    for panel, kind in zip(axes.flat, kinds, strict=False):
        for label, histograms in runs.items():
            histogram = histograms[kind]
            legend = f"{label or '|Δθ|'}: {histogram.unmoved / histogram.total:.1%} unmoved"
            panel.stairs(histogram.shares, histogram.edges, fill=True, alpha=0.4, label=legend)
        middles = np.sqrt(histogram.edges[1:] * histogram.edges[:-1])
        panel.plot(middles, walk(histogram.edges, spread), color="black", lw=1, label="random walk")
        panel.set(xscale="log", title=kind)
        panel.spines[["top", "right"]].set_visible(False)
        panel.legend(frameon=False, fontsize="xx-small", loc="upper left")
    for panel in axes.flat[len(kinds) :]:
        panel.set_visible(False)
    figure.supxlabel("|Δθ|")
    figure.supylabel("share of the weights")
    figure.suptitle(title)
    for kind in ("png", "svg"):
        figure.savefig(out.with_suffix(f".{kind}"), dpi=130)
    plt.close(figure)


def spread_of_walk(directory: Path) -> float:
    """The standard deviation of a weight's random walk: √Σ c² over the journal's coefficients."""
    history = journal.read(directory / journal.JOURNAL)
    spread = (
        math.sqrt(math.fsum(c * c for record in history.records for c in record.coefficients))
        if history
        else 0.0
    )
    if spread == 0:
        raise ConfigError(f"{directory}: no journal of a run that took a step")
    return spread


@reports_errors
def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        prog="tools/shift_histogram.py",
    )
    parser.add_argument("base", metavar="BASE", type=Path)
    parser.add_argument("runs", metavar="RUN", nargs="+", help="a run directory, or LABEL=RUN")
    parser.add_argument("--out", type=Path, default=Path("shifts"), help="default: %(default)s")
    parser.add_argument("--title", default="", help="title above the panels")
    options = parser.parse_args(argv)
    runs = {
        label if path else "": Path(path or label)
        for label, _, path in (run.partition("=") for run in options.runs)
    }
    base, module = open_model(options.base, torch.float32)
    sizes = {name: param.numel() for name, param in module.named_parameters()}
    spread = spread_of_walk(next(iter(runs.values())))
    edges = np.geomspace(spread * 1e-3, spread * 8, BINS + 1)
    by_run = {label: histograms(base, newest(run), sizes, edges) for label, run in runs.items()}
    draw(by_run, spread, options.title, options.out)
    report = {
        label: {kind: histogram.report() for kind, histogram in by_kind.items()}
        for label, by_kind in by_run.items()
    }
    options.out.with_suffix(".json").write_text(
        json.dumps(dict(walk=spread, edges=edges.tolist(), runs=report), indent=1) + "\n"
    )
    print(f"random walk: spread {spread:.3g}")
    for label, kinds in report.items():
        total = kinds["all"]
        unmoved = f"{total['unmoved']:.2%} of {total['weights']:,} unmoved"
        print(f"{label or runs[label]}: spread {total['spread']:.3g}, {unmoved}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
