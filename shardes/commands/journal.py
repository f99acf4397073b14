"""Show, verify or compare journals.

    shardes journal RUN_DIR show             print a table of the run's iterations
    shardes journal RUN_DIR verify           check lines, snapshots, and digests by replay
    shardes journal RUN_DIR diff OTHER_RUN   print the first difference between two runs

Exit code 1: verify found something invalid, or diff found a difference.
"""

import sys
from os.path import expanduser
from pathlib import Path

from rich.console import Console
from rich.table import Table

from shardes.commands.arguments import CommandParser, path, reports_errors
from shardes.distributed import environment
from shardes.errors import ConfigError, unusable_files
from shardes.es.rule import load_rule
from shardes.es.statistics import mean, std
from shardes.reporting.progress import slow_step
from shardes.storage import snapshots
from shardes.storage.journal import JOURNAL, History, read
from shardes.storage.verify import differences, replayed_digests, snapshot_problems
from shardes.words import counted


def read_history(directory: Path) -> History:
    history = read(directory / JOURNAL)
    if history is None:
        raise ConfigError(f"{directory}: no journal there; pass a run directory")
    return history


def show(directory: Path, console: Console) -> None:
    """Print the settings and a table of the iterations."""
    history = read_history(directory)
    settings = ", ".join(
        f"{key}={value}" for key, value in history.settings.items() if value not in (None, [])
    )
    console.print(f"base model {history.header.model}\nsettings {settings}", soft_wrap=True)
    for resumption in history.resumptions:
        for note in resumption.change_notes():
            console.print(f"before iteration {resumption.iteration}: {note}", soft_wrap=True)
    saved = snapshots.by_iteration(directory)
    console.print(iteration_table(history, saved))
    newest = len(history.records)
    if history.rewards:
        members = counted(len(history.rewards), "member")
        console.print(f"iteration {newest} is unfinished: rewards of {members} are recorded")
    if history.finish:
        with_snapshot = ", with a snapshot" if newest in saved else ""
        console.print(
            f"finished after {counted(newest, 'iteration')}: center {history.finish.digest}"
            f"{with_snapshot}"
        )
    if history.incomplete_line:
        console.print(history.incomplete_line)


def iteration_table(history: History, saved: dict[int, Path]) -> Table:
    resumed = [resumption.iteration for resumption in history.resumptions]
    table = Table("iteration", "reward", "± std", "best", "σ", "α", "center before", "")
    for record in history.records:
        rewards, starts = record.rewards, resumed.count(record.iteration)
        notes = [f"resumed {starts}×"] if starts else []
        notes += ["snapshot"] if record.iteration in saved else []
        notes += ["best held-out"] if record.iteration == history.best else []
        numbers = [
            f"{value:.4g}"
            for value in (mean(rewards), std(rewards), max(rewards), record.sigma, record.alpha)
        ]
        table.add_row(str(record.iteration), *numbers, record.digest, ", ".join(notes))
    return table


def verify(directory: Path, base: str | None, update: str | None, console: Console) -> bool:
    """Print what is valid and what is not; returns whether all is valid."""
    history = read_history(directory)
    incomplete = f"; {history.incomplete_line}" if history.incomplete_line else ""
    console.print(f"journal: {len(history.records)} iterations, every checksum matches{incomplete}")
    with slow_step("reading the snapshots"):
        problems = snapshot_problems(directory, history)
    for iteration, problem in problems.items():
        verdict = f"INVALID: {problem}" if problem else "every file matches its SHA-256"
        console.print(f"snapshot of iteration {iteration}: {verdict}")
    valid = not any(problems.values())
    if history.settings["es.restore"] != "copy":
        console.print(
            "digests: not replayed: es.restore=subtract leaves rounding errors that the journal "
            "does not record"
        )
        return valid
    with slow_step(f"replaying {counted(len(history.records), 'iteration')}"):
        digests = replayed_digests(history, base, load_rule(update))
    for iteration, replayed in enumerate(digests):
        recorded = history.digest(iteration)
        if recorded not in (None, replayed):
            console.print(
                f"digests: INVALID: replayed, the center before iteration {iteration} has "
                f"{replayed}, the journal {recorded}"
            )
            return False
    console.print(
        f"digests: replayed from the base model, all match; the newest center is {digests[-1]}"
    )
    return valid


def diff(directory: Path, other_directory: Path, console: Console) -> bool:
    """Print how two runs differ; returns whether they are the same as far as both have run."""
    one, other = read_history(directory), read_history(other_directory)
    lines = differences(one, other)
    for line in lines:
        console.print(line)
    shorter, longer = sorted([len(one.records), len(other.records)])
    if not lines:
        continues = f"; one continues to {longer}" if longer > shorter else ""
        console.print(f"the same for {shorter} iterations{continues}")
    return not lines


@reports_errors
@unusable_files()
def main(argv: list[str]) -> int:
    parser = CommandParser("journal", __doc__)
    parser.add_argument("run", metavar="RUN_DIR", type=path)
    parser.add_argument("action", choices=["show", "verify", "diff"], nargs="?", default="show")
    parser.add_argument("other", metavar="OTHER_RUN", type=path, nargs="?", help="for diff")
    parser.add_argument(
        "--base",
        metavar="DIR",
        type=expanduser,
        help="for verify: the base model; default: the run's model.path",
    )
    parser.add_argument(
        "--update",
        metavar="FILE:CLASS",
        type=expanduser,
        help="for verify: the code of the run's es.update, if it has one",
    )
    console = Console(highlight=False, markup=False, width=None if sys.stdout.isatty() else 120)
    options = parser.parse_args(argv)
    if (options.other is not None) != (options.action == "diff"):
        parser.error("diff takes a second run directory, and nothing else does")
    if options.action == "show":
        show(options.run, console)
        return 0
    if options.action == "verify":
        valid = verify(options.run, options.base, options.update, console)
    else:
        valid = diff(options.run, options.other, console)
    return 0 if valid else 1


if __name__ == "__main__":
    environment.run(main)
