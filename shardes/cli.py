"""The command `shardes`: one door to what launchers/ and tools/ do.

`shardes train` and `shardes evaluate` start their ranks on this host, by deepspeed's launcher, whose exit code is that
of the rank that failed. Started by a launcher themselves (torchrun, srun), they are one of its ranks.
"""

import argparse
import difflib
import os
import sys
from importlib import import_module
from typing import NoReturn

from shardes import __version__, environment

COMMANDS = {
    "train": "fine-tune a model",
    "evaluate": "judge a model on a task's prompts",
    "export": "write a run's center as a Hugging Face checkpoint",
    "plan": "say whether a run fits and what it will take",
    "report": "write a run's report, one HTML page",
    "journal": "look at a run's journal: show, verify, diff",
    "env": "print what a report of a bug needs",
}
HELP = f"""usage: shardes COMMAND [arguments]

{chr(10).join(f"  {name:<10} {meaning}" for name, meaning in COMMANDS.items())}

examples:
  shardes train configs/quickstart.yaml --gpus 2        start two ranks on this host
  shardes train configs/quickstart.yaml --dry-run       check everything cheap, print the settings, start nothing
  shardes report runs/quickstart                        write runs/quickstart/report.html
  shardes export runs/quickstart exported               write the newest center

shardes COMMAND --help says more; shardes --version
"""


def main(argv: list[str]) -> int:
    if not argv or argv[0] in ("-h", "--help"):
        print(HELP, end="", file=sys.stdout if argv else sys.stderr)
        return 0 if argv else 2
    if argv[0] == "--version":
        print(f"shardes {__version__}")
        return 0
    name, *rest = argv
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, n=1, cutoff=0.4)
        hint = f"did you mean {near[0]}?" if near else f"there are: {', '.join(COMMANDS)}"
        return _complain(f"{name}: no such command; {hint}")
    if name in ("train", "evaluate") and not {"-h", "--help"} & set(rest):
        return start(name, rest)
    return import_module(f"shardes.commands.{name}").main(rest)


def start(name: str, argv: list[str]) -> int:
    """Run train or evaluate, on as many ranks as --gpus says: by default one for each GPU, or one."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--gpus", "--nproc", type=int, dest="ranks")
    parser.add_argument("--dry-run", action="store_true")
    try:
        options, rest = parser.parse_known_args(argv)
    except argparse.ArgumentError as error:
        return _complain(f"{error}; see shardes {name} --help")
    if options.ranks is not None and options.ranks < 1:
        return _complain(f"--gpus {options.ranks}: must be at least 1")
    launched = "RANK" in os.environ
    if launched and options.ranks is not None:
        return _complain(f"--gpus {options.ranks}: a launcher has started this rank already; leave --gpus out")
    if options.dry_run and name != "train":
        return _complain("--dry-run: only for train")
    given = dict(os.environ)
    environment.prepare()  # for this process; each rank finds its own part of the host
    ranks = options.ranks or (1 if launched and not options.dry_run else _default_ranks())
    if ranks > 1 and not options.dry_run:
        sys.stdout.flush()
        os.execve(sys.executable, launcher(name, ranks, rest), given)
    command = import_module(f"shardes.commands.{name}")
    return command.dry_run(rest, ranks) if options.dry_run else command.main(rest)


def launcher(name: str, ranks: int, argv: list[str]) -> list[str]:
    """The command line that starts a command's ranks on this host."""
    from shardes.world import free_port

    started = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_gpus", str(ranks)]
    return [*started, "--master_port", str(free_port()), "--module", f"shardes.commands.{name}", *argv]


def _default_ranks() -> int:
    import torch

    return max(torch.cuda.device_count(), 1)


def _complain(message: str) -> int:
    print(f"error: {message}", file=sys.stderr)
    return 2


def command() -> NoReturn:
    """The console script."""
    environment.run(main)


if __name__ == "__main__":
    command()
