"""Measure σ, α and population size: deepspeed launchers/probe.py CONFIG.yaml; see --help."""

from shardes.commands.probe import main, prepare
from shardes.distributed import environment

__all__ = ["main", "prepare"]

if __name__ == "__main__":
    environment.run(main)
