"""Does a run fit: python tools/plan.py CONFIG.yaml --gpus 8 --gpu-memory 80GB; see --help."""

from shardes import environment
from shardes.commands.plan import main, work_of

__all__ = ["main", "work_of"]

if __name__ == "__main__":
    environment.run(main)
