"""Evaluate a model: deepspeed launchers/evaluate.py CONFIG.yaml --model DIR; see --help."""

from shardes.commands.evaluate import main, prepare
from shardes.distributed import environment

__all__ = ["main", "prepare"]

if __name__ == "__main__":
    environment.run(main)
