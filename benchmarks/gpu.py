"""Measure a GPU: kernels, decoding, members side by side, loading, whole iterations.

python -m benchmarks.run --gpu [--parts NAME ...] [--seconds S]

Models have random weights and are made on the spot, so that nothing is fetched. Each part is a
process of its own: one that fails or takes too long leaves the others. Figures are written as they
come, to gpu.json and gpu.md of --out. `--device cpu` rehearses everything with a tiny model.
"""

import argparse
import contextlib
import json
import os
import platform
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from benchmarks.measure import environment_with

ROOT = Path(__file__).parent.parent
PREFIX = "figure: "  # of a part's lines on standard output that have a figure as JSON
PARTS = {  # and the most seconds that each may take
    "noise": 120,
    "decode": 400,
    "members": 300,
    "load": 120,
    "gather": 300,
    "iteration": 900,
}


@dataclass
class Figure:
    """One measured quantity. A figure without values was not measured, and `note` says why.

    Attributes:
        values: one per repeat.
        against, baseline: what it is compared with, and its values.
    """

    part: str
    what: str
    unit: str
    values: list[float] = field(default_factory=list)
    against: str = ""
    baseline: list[float] = field(default_factory=list)
    note: str = ""

    @property
    def ratio(self) -> float | None:
        if not self.values or not self.baseline:
            return None
        return statistics.median(self.values) / statistics.median(self.baseline)

    def cells(self) -> list[str]:
        """The figure as a row of the table."""
        if not self.values:
            return [self.part, self.what, "not measured", "", "", "", self.note]
        spread = f"{min(self.values):.3g} to {max(self.values):.3g}"
        ratio = "" if self.ratio is None else f"{self.ratio:.3g}"
        against = self.against
        if self.baseline:
            against += f": {statistics.median(self.baseline):.3g}"
        median = f"{statistics.median(self.values):.4g} {self.unit}"
        return [self.part, self.what, median, spread, against, ratio, self.note]


HEADER = ["part", "what", "median", "spread", "against", "ratio", "note"]


def markdown(machine: dict[str, Any], figures: list[Figure]) -> str:
    """The table for docs/performance.md."""
    rows = [HEADER, ["---"] * len(HEADER), *(figure.cells() for figure in figures)]
    lines = [f"| {' | '.join(cell.replace('|', '/') for cell in row)} |" for row in rows]
    about = ", ".join(f"{name} {value}" for name, value in machine.items())
    return f"Measured on {about}.\n\n" + "\n".join(lines) + "\n"


def machine(device: str) -> dict[str, Any]:
    def version(package: str) -> str:
        try:
            return metadata.version(package)
        except metadata.PackageNotFoundError:
            return "missing"

    on_gpu = device == "cuda"
    packages = ("torch", "triton", "transformers", "deepspeed", "vllm")
    return {
        "device": torch.cuda.get_device_name() if on_gpu else "CPU (rehearsal, tiny model)",
        "devices": torch.cuda.device_count() if on_gpu else 1,
        "cores": len(os.sched_getaffinity(0)),
        "Python": platform.python_version(),
    } | {package: version(package) for package in packages}


def run_part(
    name: str,
    device: str,
    work: str,
    seconds: float,
    show: Callable[[Figure], None],
) -> str | None:
    """Run a part as a process and show its figures as they come; what went wrong, or None."""
    command = [sys.executable, "-m", "benchmarks.gpu_parts", name, "--device", device]
    command += ["--work", work, "--seconds", f"{seconds:.0f}"]
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment_with(ROOT, PYTHONUNBUFFERED="1"),
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            start_new_session=True,
        )
        timer = threading.Timer(seconds + 15, _kill, [process])
        timer.start()
        try:
            assert process.stdout is not None
            for line in process.stdout:
                if line.startswith(PREFIX):
                    show(Figure(**json.loads(line.removeprefix(PREFIX))))
            code = process.wait()
        finally:
            timer.cancel()
            _kill(process)
        errors.seek(0)
        last = [line for line in errors.read().splitlines() if line.strip()][-1:]
    if code == -signal.SIGKILL:
        return f"ended after {seconds:.0f} s"
    return f"exit code {code}: {''.join(last)[:300]}" if code else None


def _kill(process: subprocess.Popen) -> None:
    """End a part and the ranks that it started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def measure(options: argparse.Namespace, work: str) -> list[Figure]:
    """Run the parts; print and write each figure when it is there."""
    figures: list[Figure] = []
    deadline = time.monotonic() + options.seconds
    about = machine(options.device)

    def show(figure: Figure) -> None:
        figures.append(figure)
        print("  ".join(cell for cell in figure.cells() if cell), flush=True)
        write(options, about, figures)

    for name in options.parts:
        start = time.monotonic()
        seconds = min(PARTS[name], deadline - start - 15)
        if seconds < 15:
            problem: str | None = "no time was left: see --seconds"
        else:
            problem = run_part(name, options.device, work, seconds, show)
        if problem:
            show(Figure(name, "part", "", note=problem))
        print(f"({name}: {time.monotonic() - start:.0f} s)", flush=True)
    return figures


def write(options: argparse.Namespace, about: dict[str, Any], figures: list[Figure]) -> None:
    stem = "gpu" if options.device == "cuda" else "gpu_rehearsal"
    report = {
        "machine": about,
        "command": f"python -m benchmarks.run {' '.join(options.command)}",
        "figures": [asdict(figure) | {"ratio": figure.ratio} for figure in figures],
    }
    (options.out / f"{stem}.json").write_text(json.dumps(report, indent=1) + "\n")
    (options.out / f"{stem}.md").write_text(markdown(about, figures))


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.run --gpu", description=__doc__.splitlines()[0]
    )
    parser.add_argument(
        "--parts",
        nargs="+",
        choices=PARTS,
        default=list(PARTS),
        metavar="NAME",
        help=f"of {', '.join(PARTS)}; default: all",
    )
    parser.add_argument(
        "--seconds", type=float, default=1700, help="in all, at most; default: %(default)s"
    )
    parser.add_argument(
        "--device", choices=("cuda", "cpu"), default="cuda", help="cpu: rehearse with a tiny model"
    )
    parser.add_argument(
        "--out", type=Path, default=Path("benchmarks/results"), help="default: %(default)s"
    )
    parser.add_argument(
        "--work", type=Path, help="directory for models, up to 20 GB; default: a temporary one"
    )
    options = parser.parse_args(argv)
    options.command = ["--gpu", *argv]
    return options


def main(argv: list[str]) -> int:
    options = parse(argv)
    if options.device == "cuda" and not torch.cuda.is_available():
        print(
            "--gpu: torch sees no GPU (shardes env); --device cpu rehearses without one",
            file=sys.stderr,
        )
        return 2
    options.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=options.work) as work:
        figures = measure(options, work)
    print(f"\n{markdown(machine(options.device), figures)}")
    return 0 if all(figure.values or figure.note.startswith("needs") for figure in figures) else 1
