"""Measure how long members take: the distribution that benchmarks/simulate.py draws from.

    python -m benchmarks.member_times

One rank on one thread trains SmolLM2-135M-Instruct for some iterations; a member's time goes from one score to the
next: post, claim, perturb, generate, score. Seconds are the process's CPU seconds, so that whatever else the machine
does counts little. Writes benchmarks/results/member_times.json.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path

from benchmarks import iteration
from shardes.tasks.conciseness import Conciseness

OUT = Path("benchmarks/results/member_times.json")


class Timed(Conciseness):
    """The paper's questions; notes when each member was scored."""

    def score(self, split, responses, which=None):
        with open(os.environ["MEMBER_TIMES"], "a") as file:
            file.write(json.dumps([split, time.process_time()]) + "\n")
        return super().score(split, responses, which)


def member_seconds(marks: list[tuple[str, float]], members: int) -> list[float]:
    """The seconds between scores of one iteration's members, from marks of whole iterations.

    The first iteration, which warms up, is left out, and so is each iteration's first member, before which the center
    was updated. Test scores, and the train score just before each, are the center's.
    """
    center = {i + step for i, (split, _) in enumerate(marks) if split == "test" for step in (-1, 0)}
    times = [seconds for i, (_, seconds) in enumerate(marks) if i not in center]
    assert len(times) % members == 0
    return [times[i] - times[i - 1] for i in range(members, len(times)) if i % members]


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="benchmarks.member_times", description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=Path("models/SmolLM2-135M-Instruct"), help="default: %(default)s")
    parser.add_argument("--members", type=int, default=20, help="per iteration; default: %(default)s")
    parser.add_argument("--iterations", type=int, default=8, help="default: %(default)s, after one that warms up")
    parser.add_argument("--tokens", type=int, default=96, help="longest answer; default: %(default)s")
    parser.add_argument("--out", type=Path, default=OUT, help="default: %(default)s")
    options = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        marks = Path(folder, "marks")
        keys = [f"task.path={__file__}:Timed", "es.sigma=0.002"]
        one = {"OMP_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "1", "MEMBER_TIMES": str(marks)}
        iteration.train(
            options.model, 1, 2, options.tokens, options.members, options.iterations, *keys, **one
        )  # fmt: skip
        found = member_seconds(list(map(json.loads, marks.read_text().splitlines())), options.members)
    mean = sum(found) / len(found)
    report = {
        "command": f"python -m benchmarks.member_times {' '.join(argv)}".strip(),
        "what": "CPU seconds per member: SmolLM2-135M-Instruct, float32, one thread, the two conciseness questions, "
        f"at most {options.tokens} new tokens",
        "mean_seconds": mean,
        "relative": [round(value / mean, 4) for value in found],
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(report, indent=1) + "\n")
    spread = (sum((value / mean - 1) ** 2 for value in found) / len(found)) ** 0.5
    print(
        f"{len(found)} members: mean {mean:.3g} s, deviation {100 * spread:.0f} % of it, slowest "
        f"{max(found) / mean:.2f} times it"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
