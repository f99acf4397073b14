"""One rank of a training run: resident.py CONFIG [key=value ...]. Reports the most memory that it had resident."""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
os.environ["OMP_NUM_THREADS"] = "1"  # threads that wait for each other on a busy machine would only take time

from launch import report, script

train = script("launchers/train.py")

from shardes.metrics import peak_resident_bytes  # noqa: E402


def main() -> int:
    rank = int(os.environ["RANK"])  # a replica's ranks are renumbered later
    code = train.main(sys.argv[1:])
    report({"rank": rank, "peak": peak_resident_bytes()})
    return code


if __name__ == "__main__":
    train.environment.run(lambda _: main())
