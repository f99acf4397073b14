"""Write a run's center as a Hugging Face checkpoint: the same as `shardes export`; see --help."""

from shardes.commands.export import main
from shardes.distributed import environment

if __name__ == "__main__":
    environment.run(main)
