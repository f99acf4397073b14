"""How far fine-tuning moved the weights, beside a random walk of the same steps (the paper's A.5).

    python tools/shift_histogram.py BASE RUN [LABEL=RUN ...] [--out shifts]

BASE is a model directory, a RUN that of a training run; its last snapshot is compared with the base, a block of a
tensor at a time, never a model as a whole. Draws, per kind of layer, the histogram of |Δθ| as a share of the weights,
in log-spaced bins, with the share that did not move at all. The random walk has the steps of the first run's journal:
a normal step of c·ε for each of its coefficients c, so that it arrives at |N(0, s²)| with s² = Σ c². Several runs, such
as one with es.restore=subtract beside one with an exact center, are drawn over each other. Writes OUT.png, OUT.svg and
OUT.json.
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

from shardes import journal, snapshots
from shardes.config import ConfigError
from shardes.engines import open_model
from shardes.shards import BLOCK, run
from shardes.weights import WeightFiles

BINS = 60


def kind_of(name: str) -> str:
    """A parameter's kind of layer: its name without the layer's number and the word weight."""
    parts = [part for part in name.split(".") if not part.isdigit() and part not in ("model", "layers", "weight")]
    return re.sub(r"^(self_attn|mlp)\.", "", ".".join(parts))


class Histogram:
    """|Δθ| of one kind of layer: counts in `edges`, how many are exactly 0, and the sum of squares."""

    def __init__(self, edges: np.ndarray):
        self.edges = edges
        self.counts = np.zeros(len(edges) + 1, dtype=np.int64)  # the first and the last are what lies outside
        self.still = self.total = 0
        self.squares = 0.0

    def add(self, shift: np.ndarray) -> None:
        shift = np.abs(shift)
        self.still += int(np.sum(shift == 0))
        self.total += shift.size
        self.squares += float(np.sum(shift.astype(np.float64) ** 2))
        self.counts += np.bincount(np.searchsorted(self.edges, shift[shift > 0]), minlength=len(self.counts))

    @property
    def shares(self) -> np.ndarray:
        """The share of all weights in each bin."""
        return self.counts[1:-1] / self.total

    def report(self) -> dict:
        """For OUT.json; `spread` is the root mean square of Δθ."""
        return dict(
            weights=self.total,
            unmoved=self.still / self.total,
            spread=math.sqrt(self.squares / self.total),
            shares=self.shares.tolist(),
        )


def walk(edges: np.ndarray, spread: float) -> np.ndarray:
    """The share of |N(0, spread²)| that falls in each bin."""
    below = [math.erf(edge / (spread * math.sqrt(2))) for edge in edges]
    return np.diff(below)


def histograms(base: WeightFiles, tuned: WeightFiles, sizes: dict[str, int], edges: np.ndarray) -> dict[str, Histogram]:
    """By kind of layer, and "all"; one block of one parameter in memory at a time."""
    found: dict[str, Histogram] = defaultdict(lambda: Histogram(edges))
    for name, numel in sizes.items():
        for begin in range(0, numel, BLOCK):
            where = [run(begin, min(BLOCK, numel - begin))]
            before, after = torch.empty(where[0].numel), torch.empty(where[0].numel)
            base.read(name, where, before)
            tuned.read(name, where, after)
            shift = (after - before).numpy()
            for kind in ("all", kind_of(name)):
                found[kind].add(shift)
    return dict(found)


def newest(directory: Path) -> WeightFiles:
    """The last snapshot of a run."""
    paths = list(snapshots.found(directory).values())
    if not paths:
        raise ConfigError(f"{directory}: no run directory with a snapshot")
    return open_model(paths[0], torch.float32)[0]


def draw(found: dict[str, dict[str, Histogram]], spread: float, title: str, out: Path) -> None:
    """A panel per kind of layer: each run's histogram as an area, the random walk as a line."""
    import matplotlib.pyplot as plt

    kinds = list(next(iter(found.values())))
    columns = min(3, len(kinds))
    rows = -(-len(kinds) // columns)
    figure, axes = plt.subplots(
        rows, columns, figsize=(4 * columns, 2.6 * rows), layout="constrained", sharex=True, squeeze=False
    )
    for panel, kind in zip(axes.flat, kinds, strict=False):
        for label, histograms in found.items():
            mine = histograms[kind]
            still = f"{label or '|Δθ|'}: {mine.still / mine.total:.1%} unmoved"
            panel.stairs(mine.shares, mine.edges, fill=True, alpha=0.4, label=still)
        middles = np.sqrt(mine.edges[1:] * mine.edges[:-1])
        panel.plot(middles, walk(mine.edges, spread), color="black", lw=1, label="random walk")
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


def steps_of(directory: Path) -> float:
    """The standard deviation of each weight's random walk: the root of the journal's sum of squared coefficients."""
    history = journal.read(directory / journal.JOURNAL)
    spread = math.sqrt(math.fsum(c * c for record in history.records for c in record.coefficients)) if history else 0.0
    if spread == 0:
        raise ConfigError(f"{directory}: no journal of a run that took a step")
    return spread


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, prog="tools/shift_histogram.py"
    )
    parser.add_argument("base", metavar="BASE", type=Path)
    parser.add_argument("runs", metavar="RUN", nargs="+", help="a run directory, or LABEL=RUN")
    parser.add_argument("--out", type=Path, default=Path("shifts"), help="default: %(default)s")
    parser.add_argument("--title", default="", help="above the panels")
    options = parser.parse_args(argv)
    runs = {
        label if given else "": Path(given or label) for label, _, given in (run.partition("=") for run in options.runs)
    }
    try:
        base, module = open_model(options.base, torch.float32)
        sizes = {name: param.numel() for name, param in module.named_parameters()}
        spread = steps_of(next(iter(runs.values())))
        edges = np.geomspace(spread * 1e-3, spread * 8, BINS + 1)
        found = {label: histograms(base, newest(run), sizes, edges) for label, run in runs.items()}
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    draw(found, spread, options.title, options.out)
    report = {label: {kind: one.report() for kind, one in kinds.items()} for label, kinds in found.items()}
    options.out.with_suffix(".json").write_text(
        json.dumps(dict(walk=spread, edges=edges.tolist(), runs=report), indent=1) + "\n"
    )
    print(f"random walk: spread {spread:.3g}")
    for label, kinds in report.items():
        whole = kinds["all"]
        still = f"{whole['unmoved']:.2%} of {whole['weights']:,} unmoved"
        print(f"{label or runs[label]}: spread {whole['spread']:.3g}, {still}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
