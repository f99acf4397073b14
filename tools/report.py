"""Write a run's report, one HTML page: python tools/report.py RUN_DIR [--out FILE]; see --help."""

from shardes import environment
from shardes.commands.report import main

if __name__ == "__main__":
    environment.run(main)
