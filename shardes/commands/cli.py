"""The command `shardes`: it runs a subcommand, and starts the ranks of those that need several.

`shardes train`, `shardes probe` and `shardes evaluate` start their ranks on this host. The exit
code is that of the rank that failed. Under a launcher (deepspeed, torchrun, srun), each is one
rank.
"""

import argparse
import os
import sys
from contextlib import nullcontext
from importlib import import_module
from typing import NoReturn

from shardes import __version__
from shardes.commands.arguments import reports_errors
from shardes.distributed import environment
from shardes.distributed.local_ranks import run_ranks
from shardes.errors import ConfigError, Stopped, suggestion

COMMANDS = {
    "train": "fine-tune a model",
    "evaluate": "evaluate a model on a task's prompts",
    "probe": "measure which σ, α and population size to start with",
    "export": "write a run's center as a Hugging Face checkpoint",
    "plan": "estimate whether a run fits in memory, and its time",
    "report": "write a run's report, one HTML page",
    "plot": "plot the rewards of runs, with a band over run seeds",
    "sweep": "train with several σ, α and run seeds; plot reward against KL",
    "configs": "list the configs that come with shardes",
    "init": "copy one of them, with its data and reward function, to start from",
    "get-smollm2": "fetch a small model to try shardes with",
    "journal": "show, verify or compare journals",
    "env": "print versions, devices and settings for a bug report",
}
LAUNCHED = ("train", "evaluate", "probe")  # on several ranks
HELP = f"""usage: shardes COMMAND [arguments]

{chr(10).join(f"  {name:<12} {summary}" for name, summary in COMMANDS.items())}

examples:
  shardes train configs/quickstart.yaml --gpus 2       start two ranks on this host
  shardes train configs/quickstart.yaml --dry-run      check and print the settings, start nothing
  shardes init mine                                    copy an example task to start from
  shardes report runs/quickstart                       write runs/quickstart/report.html
  shardes export runs/quickstart exported              write the newest center

shardes COMMAND --help describes a command; shardes --version prints the version
"""


@reports_errors
def main(argv: list[str]) -> int:
    if not argv or argv[0] in ("-h", "--help"):
        print(HELP, end="", file=sys.stdout if argv else sys.stderr)
        return 0 if argv else 2
    if argv[0] == "--version":
        print(f"shardes {__version__}")
        return 0
    name, *arguments = argv
    if name not in COMMANDS:
        raise ConfigError(f"{name}: no such command; {suggestion(name, COMMANDS)}")
    if name in LAUNCHED and not {"-h", "--help"} & set(arguments):
        return start(name, arguments)
    return import_module(f"shardes.commands.{name.replace('-', '_')}").main(arguments)


def start(name: str, argv: list[str]) -> int:
    """Run a command on the number of ranks that --gpus gives (default: one per GPU)."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--gpus", "--nproc", type=int, dest="ranks")
    parser.add_argument("--dry-run", action="store_true")
    try:
        options, arguments = parser.parse_known_args(argv)
    except argparse.ArgumentError as error:
        raise ConfigError(f"{error}; see shardes {name} --help") from error
    launched = "RANK" in os.environ
    _check(name, options, launched)
    # A rank's launcher decides what a signal does.
    with nullcontext() if launched else environment.ended_by_signals():
        ranks = options.ranks or (1 if launched and not options.dry_run else _default_ranks())
        if ranks > 1 and not options.dry_run:
            return _run_ranks(name, arguments, ranks)
        command = import_module(f"shardes.commands.{name}")
        return command.dry_run(arguments, ranks) if options.dry_run else command.main(arguments)


def _run_ranks(name: str, arguments: list[str], ranks: int) -> int:
    try:
        run_ranks([sys.executable, "-m", f"shardes.commands.{name}", *arguments], ranks)
    except Stopped as stopped:
        if not stopped.said:
            print(stopped, flush=True)
        return stopped.code
    return 0


def _check(name: str, options: argparse.Namespace, launched: bool) -> None:
    if options.ranks is not None and options.ranks < 1:
        raise ConfigError(f"--gpus {options.ranks}: must be at least 1")
    if launched and options.ranks is not None:
        raise ConfigError(
            f"--gpus {options.ranks}: a launcher has started this rank already; leave --gpus out"
        )
    if options.dry_run and name != "train":
        raise ConfigError("--dry-run: only for train")


def _default_ranks() -> int:
    import torch

    return max(torch.accelerator.device_count(), 1)


def command() -> NoReturn:
    """The console script."""
    environment.run(main)


if __name__ == "__main__":
    command()
