"""Look at a run's journal: python tools/journal.py RUN_DIR show | verify | diff OTHER_RUN; see --help."""

from shardes import environment
from shardes.commands.journal import main

if __name__ == "__main__":
    environment.run(main)
