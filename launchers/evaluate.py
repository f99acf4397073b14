"""Judge a model: deepspeed --num_gpus 2 launchers/evaluate.py CONFIG.yaml --model DIR; see --help."""

from shardes import environment
from shardes.commands.evaluate import main, prepare

__all__ = ["main", "prepare"]

if __name__ == "__main__":
    environment.run(main)
