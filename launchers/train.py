"""Fine-tune a model: deepspeed --num_gpus 2 launchers/train.py CONFIG.yaml [key=value ...]; see --help."""

from shardes import environment
from shardes.commands.train import main, prepare, work

__all__ = ["main", "prepare", "work"]

if __name__ == "__main__":
    environment.run(main)
