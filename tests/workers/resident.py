"""One rank of a training run, which reports its peak resident memory: resident.py CONFIG ..."""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
os.environ["OMP_NUM_THREADS"] = "1"  # on a busy machine, threads would only wait for each other

from launch import report
from shardes.commands import train
from shardes.distributed import environment
from shardes.reporting.reporter import peak_resident_bytes


def main() -> int:
    rank = int(os.environ["RANK"])  # a replica's ranks are renumbered later
    code = train.main(sys.argv[1:])
    report({"rank": rank, "peak": peak_resident_bytes()})
    return code


if __name__ == "__main__":
    environment.run(lambda _: main())
