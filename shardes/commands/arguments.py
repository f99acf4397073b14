"""How the commands read their arguments."""

import argparse
from typing import NoReturn

from shardes.config import ConfigError


class Parser(argparse.ArgumentParser):
    """A parser of `shardes NAME`; what is wrong is a ConfigError, of one line."""

    def __init__(self, name: str, description: str | None):
        super().__init__(
            prog=f"shardes {name}", description=description, formatter_class=argparse.RawDescriptionHelpFormatter
        )

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}; see {self.prog} --help")
