"""The commands' argument parsers, and the handler of the errors that end a command."""

import argparse
import sys
from collections.abc import Callable
from functools import wraps
from os.path import expanduser
from pathlib import Path
from typing import NoReturn, ParamSpec

from shardes.config import loading
from shardes.config.schema import Config, help_text
from shardes.errors import ConfigError, RunError, one_line

P = ParamSpec("P")


def reports_errors(main: Callable[P, int]) -> Callable[P, int]:
    """Let `main` print `error: MESSAGE` and return 2 for a ConfigError, 1 for a RunError."""

    @wraps(main)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> int:
        try:
            return main(*args, **kwargs)
        except (ConfigError, RunError) as error:
            print(f"error: {one_line(error)}", file=sys.stderr, flush=True)
            return 2 if isinstance(error, ConfigError) else 1

    return wrapped


def path(text: str) -> Path:
    """An argument that is a path; a leading ~ is the home directory."""
    return Path(expanduser(text))


class CommandParser(argparse.ArgumentParser):
    """The parser of `shardes NAME`. It raises ConfigError where argparse would end the process."""

    def __init__(
        self, name: str, description: str | None, usage: str | None = None, epilog: str = ""
    ):
        super().__init__(
            prog=f"shardes {name}",
            usage=usage,
            description=description,
            epilog=epilog,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )

    def error(self, message: str) -> NoReturn:
        # What argparse takes for required if options and arguments are mixed, but is not.
        message = message.replace(", key=value", "")
        raise ConfigError(f"{message}; see {self.prog} --help")


class LaunchParser(CommandParser):
    """The parser of `shardes train` and `shardes evaluate`: CONFIG.yaml and key=value overrides.

    `options` are the command's own, as its usage line shows them.
    """

    def __init__(self, name: str, options: str, description: str, examples: str):
        super().__init__(
            name,
            description,
            usage=f"shardes {name} CONFIG.yaml {options} [key=value ...]\n"
            f"       deepspeed --num_gpus N launchers/{name}.py CONFIG.yaml [options] "
            "[key=value ...]",
            epilog=f"{examples}\nkeys, with their defaults:\n{help_text()}",
        )
        self.add_argument("config", metavar="CONFIG.yaml", help="settings; see shardes configs")
        self.add_argument(
            "overrides", metavar="key=value", nargs="*", help="settings that override the file's"
        )
        # These are the command line's, which starts the ranks; a rank does not get them.
        ranks = "--gpus N, --nproc N  ranks on this host; default: one for each GPU"
        if "--dry-run" in options:
            ranks += "\n--dry-run            check, print the settings, start nothing"
        self.add_argument_group("options of the start", ranks)
        # deepspeed's launcher passes it
        self.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)

    def read(self, argv: list[str]) -> tuple[argparse.Namespace, Config]:
        """Parse the arguments and load the settings."""
        arguments = self.parse_intermixed_args(argv)
        return arguments, loading.load(arguments.config, arguments.overrides)
