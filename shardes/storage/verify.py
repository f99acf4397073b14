"""Verifies a run's snapshots and centers against its journal, and compares two journals."""

from pathlib import Path

import torch

from shardes.engines import open_model
from shardes.errors import ConfigError
from shardes.es.rule import Rule
from shardes.sharding.digest import digest, format_digest
from shardes.sharding.model_directory import model_directory
from shardes.sharding.regions import Region
from shardes.storage import snapshots
from shardes.storage.files import differing, fingerprint
from shardes.storage.journal import History


def snapshot_problems(directory: Path, history: History) -> dict[int, str | None]:
    """What is wrong with each snapshot of a run, by iteration; None: it is valid."""
    problems: dict[int, str | None] = {}
    for iteration, path in snapshots.by_iteration(directory).items():
        try:
            snapshots.verify_snapshot(path, iteration, history.digest(iteration), history.run)
            problems[iteration] = None
        except ConfigError as error:
            problems[iteration] = str(error)
    return problems


def replayed_digests(history: History, base: str | None, rule: Rule | None = None) -> list[str]:
    """The digests of all centers, that of the base model first, by replaying the journal.

    One parameter is in memory at a time.

    Args:
        base: directory of the base model; None: the one that the run began with.
        rule: the code of es.update.

    Raises:
        ConfigError: it is not the run's base model, or not the run's rule.
    """
    files, module = open_model(model_directory(base or history.header.model), torch.float32)
    if names := differing(history.header.files, fingerprint(files)):
        raise ConfigError(
            f"{files.directory}: {names[0]} is not what the run began with; "
            "pass the base model's directory as --base"
        )
    totals = [0] * (len(history.records) + 1)
    for name, param in module.named_parameters():
        theta, regions = torch.empty(param.numel()), [Region.contiguous(0, param.numel())]
        files.read(name, regions, theta)
        totals[0] += digest(name, regions, theta)
        kept = [torch.zeros_like(theta) for _ in range(rule.buffers if rule else 0)]
        for number, record in enumerate(history.records, 1):
            record.update.apply(
                theta, name, tuple(param.shape), regions, files, rule=rule, kept=kept
            )
            totals[number] += digest(name, regions, theta)
    return [format_digest(total) for total in totals]


def differences(one: History, other: History) -> list[str]:
    """How two runs differ: settings, base models, sources, and the first differing iteration."""
    lines = [
        f"settings: {key}: {one.header.settings.get(key)} and {other.header.settings.get(key)}"
        for key in differing(one.header.settings, other.header.settings)
    ]
    lines += [
        f"base model: {name} differs" for name in differing(one.header.files, other.header.files)
    ]
    lines += [f"{key} differs" for key in differing(one.header.sources, other.header.sources)]
    for record, counterpart in zip(one.records, other.records, strict=False):
        if keys := [key for key in vars(record) if vars(record)[key] != vars(counterpart)[key]]:
            pairs = zip(record.rewards, counterpart.rewards, strict=False)
            members = [str(number) for number, (a, b) in enumerate(pairs) if a != b]
            of_members = f" (of members {', '.join(members)})" if members else ""
            lines.append(
                f"iteration {record.iteration}, the first to differ: {', '.join(keys)}{of_members}"
            )
            break
    return lines
