"""Write a run's center as a Hugging Face checkpoint: python tools/export_safetensors.py RUN_DIR OUT_DIR; see --help."""

from shardes import environment
from shardes.commands.export import main

if __name__ == "__main__":
    environment.run(main)
