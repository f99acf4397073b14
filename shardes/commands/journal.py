"""Look at a run's journal.

    shardes journal RUN_DIR show             a table of its iterations
    shardes journal RUN_DIR verify           check every line, every snapshot, and every digest by replay
    shardes journal RUN_DIR diff OTHER_RUN   where two runs part

`python tools/journal.py` is the same.
"""

import sys
from pathlib import Path

from shardes import environment

environment.prepare()

import torch  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.table import Table  # noqa: E402

from shardes import snapshots  # noqa: E402
from shardes.checkpoint import verify as verify_snapshot  # noqa: E402
from shardes.commands.arguments import Parser  # noqa: E402
from shardes.config import ConfigError  # noqa: E402
from shardes.engines import open_model  # noqa: E402
from shardes.files import differing  # noqa: E402
from shardes.journal import JOURNAL, History, read  # noqa: E402
from shardes.population import mean, std  # noqa: E402
from shardes.shards import digest, run  # noqa: E402
from shardes.weights import WeightFiles, model_directory  # noqa: E402


def history_of(directory: Path) -> History:
    history = read(directory / JOURNAL)
    if history is None:
        raise ConfigError(f"{directory}: no journal there; give a run directory")
    return history


def show(directory: Path, console: Console) -> None:
    history = history_of(directory)
    settings = ", ".join(f"{key}={value}" for key, value in history.settings.items() if value not in (None, []))
    console.print(f"base model {history.header.model}\nsettings {settings}", soft_wrap=True)
    resumed: dict[int, int] = {}
    for resumption in history.resumptions:
        resumed[resumption.iteration] = resumed.get(resumption.iteration, 0) + 1
        for key, (old, new) in resumption.changes.items():
            console.print(f"before iteration {resumption.iteration}, {key} was changed from {old} to {new}")
    kept = snapshots.found(directory)
    table = Table("iteration", "reward", "± std", "best", "σ", "α", "center before", "")
    for record in history.records:
        notes = [f"resumed {resumed[record.iteration]}×"] if record.iteration in resumed else []
        notes += ["snapshot"] if record.iteration in kept else []
        rewards = record.rewards
        numbers = [f"{value:.4g}" for value in (mean(rewards), std(rewards), max(rewards), record.sigma, record.alpha)]
        table.add_row(str(record.iteration), *numbers, record.digest, ", ".join(notes))
    console.print(table)
    newest = len(history.records)
    if history.rewards:
        console.print(f"iteration {newest} is under way: {len(history.rewards)} members are evaluated")
    if history.finish:
        also = ", with a snapshot" if newest in kept else ""
        console.print(f"finished after {newest} iterations: center {history.finish.digest}{also}")
    if history.torn:
        console.print(history.torn)


def verify(directory: Path, base: str | None, console: Console) -> bool:
    """Print what is sound and what is not; returns whether all is."""
    history = history_of(directory)
    console.print(
        f"journal: {len(history.records)} iterations, every checksum fits{'; ' * bool(history.torn)}{history.torn}"
    )
    sound = True
    for iteration, path in snapshots.found(directory).items():
        try:
            manifest = verify_snapshot(path)
            if history.digest(iteration) not in (None, manifest.digest):
                raise ConfigError(f"{path}: its digest is {manifest.digest}, the journal's {history.digest(iteration)}")
            console.print(f"snapshot of iteration {iteration}: every file is as written")
        except ConfigError as error:
            sound = False
            console.print(f"snapshot of iteration {iteration}: NOT SOUND: {error}")
    if history.settings["es.restore"] != "copy":
        console.print("digests: es.restore=subtract leaves rounding behind that no journal has, so there is no replay")
        return sound
    files, module = open_model(model_directory(base or history.header.model), torch.float32)
    if changed := differing(history.header.files, files.fingerprint()):
        raise ConfigError(f"{files.directory}: {changed[0]} is not what the run began with; see --base")
    digests = replay(files, {name: param.numel() for name, param in module.named_parameters()}, history)
    wrong = [i for i, found in enumerate(digests) if history.digest(i) not in (None, found)]
    if wrong:
        console.print(
            f"digests: NOT SOUND: replayed, the center before iteration {wrong[0]} has {digests[wrong[0]]}, "
            f"the journal {history.digest(wrong[0])}"
        )
    else:
        console.print(f"digests: replayed from the base model, all fit; the newest center is {digests[-1]}")
    return sound and not wrong


def replay(files: WeightFiles, sizes: dict[str, int], history: History) -> list[str]:
    """The digests of all centers, the base's first; one parameter in memory at a time."""
    totals = [0] * (len(history.records) + 1)
    for name, numel in sizes.items():
        whole = [run(0, numel)]
        theta = torch.empty(numel)
        files.read(name, whole, theta)
        totals[0] += digest(name, whole, theta)
        for number, record in enumerate(history.records, 1):
            record.update.apply(theta, name, whole, files)
            totals[number] += digest(name, whole, theta)
    return [f"{total % 2**64:016x}" for total in totals]


def diff(one: Path, other: Path, console: Console) -> bool:
    """Print where two runs part; returns whether they are the same as far as both go."""
    a, b = history_of(one), history_of(other)
    differences = [
        f"settings: {key}: {a.header.settings.get(key)} and {b.header.settings.get(key)}"
        for key in differing(a.header.settings, b.header.settings)
    ]
    differences += [f"base model: {name} differs" for name in differing(a.header.files, b.header.files)]
    for mine, theirs in zip(a.records, b.records, strict=False):
        parts = [key for key in vars(mine) if getattr(mine, key) != getattr(theirs, key)]
        if parts:
            members = [
                n for n, pair in enumerate(zip(mine.rewards, theirs.rewards, strict=False)) if pair[0] != pair[1]
            ]
            which = f" (of members {', '.join(map(str, members))})" if members else ""
            differences.append(f"iteration {mine.iteration}, the first to differ: {', '.join(parts)}{which}")
            break
    for line in differences:
        console.print(line)
    lengths = sorted([len(a.records), len(b.records)])
    longer = f"; one goes on to {lengths[1]}" if lengths[0] != lengths[1] else ""
    if not differences:
        console.print(f"the same for {lengths[0]} iterations{longer}")
    return not differences


def main(argv: list[str]) -> int:
    parser = Parser("journal", __doc__)
    parser.add_argument("run", metavar="RUN_DIR", type=Path)
    parser.add_argument("what", choices=["show", "verify", "diff"], nargs="?", default="show")
    parser.add_argument("other", metavar="OTHER_RUN", type=Path, nargs="?", help="for diff")
    parser.add_argument("--base", metavar="DIR", help="for verify: the base model; default: where the run had it")
    console = Console(highlight=False, markup=False, width=None if sys.stdout.isatty() else 120)
    try:
        options = parser.parse_args(argv)
        if (options.other is not None) != (options.what == "diff"):
            parser.error("diff takes a second run directory, and nothing else does")
        if options.what == "show":
            show(options.run, console)
            return 0
        sound = (
            verify(options.run, options.base, console)
            if options.what == "verify"
            else diff(options.run, options.other, console)
        )
        return 0 if sound else 1
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    environment.run(main)
