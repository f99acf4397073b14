"""Fine-tune a model: deepspeed launchers/train.py CONFIG.yaml [key=value ...]; see --help."""

from shardes.commands.train import main, prepare
from shardes.distributed import environment

__all__ = ["main", "prepare"]

if __name__ == "__main__":
    environment.run(main)
