"""Measure members' times, for the distribution in benchmarks/simulate.py.

    python -m benchmarks.member_times

One rank with one thread trains SmolLM2-135M-Instruct for some iterations. A member's time is the
time between two scores: post, claim, perturb, generate, score. It is CPU time of the process, so
other work on the machine matters little. Writes benchmarks/results/member_times.json.
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
    """The paper's questions. Records when each member was scored."""

    def score(self, split, responses, which=None):
        with open(os.environ["MEMBER_TIMES"], "a") as file:
            file.write(json.dumps([split, time.process_time()]) + "\n")
        return super().score(split, responses, which)


def member_seconds(marks: list[tuple[str, float]], members: int) -> list[float]:
    """The seconds between scores of members of the same iteration.

    Left out are the first iteration, which warms up, and the first member of each iteration, which
    follows an update. Scores of the center are the test scores and the train score before each.

    Args:
        marks: (split, CPU seconds) of each score, of whole iterations.
    """
    center = {i + step for i, (split, _) in enumerate(marks) if split == "test" for step in (-1, 0)}
    times = [seconds for i, (_, seconds) in enumerate(marks) if i not in center]
    assert len(times) % members == 0
    return [times[i] - times[i - 1] for i in range(members, len(times)) if i % members]


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="benchmarks.member_times", description=__doc__.splitlines()[0]
    )
    parser.add_argument(
        "--model",
        type=Path,
        default=Path("models/SmolLM2-135M-Instruct"),
        help="default: %(default)s",
    )
    parser.add_argument(
        "--members", type=int, default=20, help="per iteration; default: %(default)s"
    )
    parser.add_argument(
        "--iterations", type=int, default=8, help="default: %(default)s, after one that warms up"
    )
    parser.add_argument(
        "--tokens", type=int, default=96, help="longest response; default: %(default)s"
    )
    parser.add_argument("--out", type=Path, default=OUT, help="default: %(default)s")
    options = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        marks = Path(folder, "marks")
        keys = [f"task.path={__file__}:Timed", "es.sigma=0.002"]
        environ = {"OMP_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "1", "MEMBER_TIMES": str(marks)}
        sizes = options.tokens, options.members, options.iterations
        iteration.train(options.model, 1, 2, *sizes, *keys, **environ)
        lines = marks.read_text().splitlines()
    times = member_seconds(list(map(json.loads, lines)), options.members)
    mean = sum(times) / len(times)
    report = {
        "command": f"python -m benchmarks.member_times {' '.join(argv)}".strip(),
        "what": "CPU seconds per member: SmolLM2-135M-Instruct, float32, one thread, the two "
        f"conciseness questions, at most {options.tokens} new tokens",
        "mean_seconds": mean,
        "relative": [round(value / mean, 4) for value in times],
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(report, indent=1) + "\n")
    spread = (sum((value / mean - 1) ** 2 for value in times) / len(times)) ** 0.5
    print(
        f"{len(times)} members: mean {mean:.3g} s, standard deviation "
        f"{100 * spread:.0f} % of the mean, slowest {max(times) / mean:.2f} times the mean"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
