"""Exports a center as a Hugging Face checkpoint: one process, one tensor in memory at a time."""

from collections.abc import Callable
from dataclasses import dataclass, field
from math import prod
from pathlib import Path

import torch
from transformers import PreTrainedModel

from shardes.engines import empty_model, open_model
from shardes.errors import ConfigError
from shardes.es.rule import Rule
from shardes.sharding.digest import digest, format_digest
from shardes.sharding.model_directory import model_directory
from shardes.sharding.regions import Region
from shardes.sharding.tensor_names import tensor_names
from shardes.sharding.weight_files import WeightFiles
from shardes.storage.checkpoint import DTYPES, Checkpoint, Manifest
from shardes.storage.external import ExternalCheckpoint
from shardes.storage.files import differing, fingerprint
from shardes.storage.journal import History, Record
from shardes.storage.model_card import model_card
from shardes.storage.snapshots import latest_valid_snapshot

DTYPES_BY_NAME = {name: dtype for dtype, (_, name) in DTYPES.items()}


@dataclass
class ExportSource:
    """The weights to export, and the model that they belong to.

    Args:
        base: the model whose config and tokenizer are exported too.
        shapes: those of the parameters, by name.
        read: returns a parameter's values, flat, given its name and number of elements.
        dtype: the dtype to export by default.
        iteration: the number of iterations that the center has been trained for.
        digest: the digest that the center must have, if known.
        card: text of the model card; "": none.
        warnings: messages for the user.
        replaced: values of tensors of `base` that belong to no parameter.
        run: the checksum of the journal's header, if it is a run's center.
    """

    base: WeightFiles
    shapes: dict[str, tuple[int, ...]]
    read: Callable[[str, int], torch.Tensor]
    dtype: torch.dtype
    iteration: int = 0
    digest: str | None = None
    card: str = ""
    warnings: list[str] = field(default_factory=list)
    replaced: dict[str, torch.Tensor] = field(default_factory=dict)
    run: str = ""


def center_of_run(
    directory: Path,
    history: History,
    base: str | None,
    iteration: int | None,
    rule: Rule | None = None,
) -> ExportSource:
    """The center of a run before `iteration`, by default the newest.

    Args:
        rule: the code of es.update; not needed if there is a snapshot of that center.

    Raises:
        ConfigError: the run has no such center, or the base model is not the run's.
    """
    newest = len(history.records)
    iteration = newest if iteration is None else iteration
    if not 0 <= iteration <= newest:
        raise ConfigError(
            f"--iteration {iteration}: the run in {directory} has the centers 0 to {newest}"
        )
    path = base or history.header.model
    hub_id = None if Path(path).is_dir() else path
    files, module = _open_base(path, history)
    snapshot, warnings = latest_valid_snapshot([directory], iteration, history.digest, history.run)
    source, first = files, 0
    if snapshot and (snapshot.iteration == iteration or not (rule and rule.buffers)):
        source, first = WeightFiles(snapshot.directory), snapshot.iteration
        source.map_names(module)
    dtype = DTYPES_BY_NAME[history.settings["model.dtype"]]
    # With es.restore=subtract the live weights are the center, so each update was rounded to their
    # dtype, and a replay lacks the rounding errors that the members left behind.
    exact = history.settings["es.restore"] == "copy"
    records, computed = history.records[first:iteration], torch.float32 if exact else dtype
    return ExportSource(
        files,
        _shapes(module),
        _replay(source, records, computed, files, _shapes(module), rule),
        dtype,
        iteration,
        history.digest(iteration) if exact or first == iteration else None,
        model_card(history, iteration, files.directory, hub_id),
        warnings,
        run=history.run,
    )


def _open_base(path: str, history: History) -> tuple[WeightFiles, PreTrainedModel]:
    """The run's base model: its files, and the module on the meta device."""
    files, module = open_model(model_directory(path), torch.float32)
    model = fingerprint(files)
    if model not in (history.header.files, history.files):
        names = ", ".join(differing(history.header.files, model))
        raise ConfigError(
            f"{files.directory}: not the model that the run began with ({names} differ); "
            "pass that model's directory as --base"
        )
    return files, module


def external_checkpoint(directory: Path, base: str | None) -> ExportSource:
    """The weights that another program saved.

    Raises:
        ConfigError: they cannot be read, or are not those of the model `base`.
    """
    checkpoint = ExternalCheckpoint(directory)
    if base is None:
        raise ConfigError(
            f"{directory}: pass the model that it was made from as --base, for its config and "
            "tokenizer"
        )
    files, module = open_model(model_directory(base), torch.float32)
    shapes = _shapes(module)
    try:
        names = tensor_names(module, checkpoint.shapes, checkpoint.equal)
    except ConfigError as error:
        raise ConfigError(f"{directory}: {error}; is it another model's?") from None
    if _shapes(module) != shapes:
        raise ConfigError(f"{directory}: {names.warnings[0]}; the base {base} has them as one")
    for name, shape in shapes.items():
        parts = names.parts.get(name, [])
        sizes = [checkpoint.shapes[part] for part in parts]
        fits = sizes == [shape] or (len(sizes) > 1 and sum(map(prod, sizes)) == prod(shape))
        if not fits:
            raise ConfigError(
                f"{directory}: {name} is {sizes[0] if sizes else 'missing'}, "
                f"in {base} it is {shape}"
            )
    unknown = [tensor for tensor in names.unused if tensor not in files.tensors]
    if unknown:
        raise ConfigError(f"{directory}: {base} has no {unknown[0]}; is it another model's?")

    def read(name: str, numel: int) -> torch.Tensor:
        return torch.cat([checkpoint.read(part) for part in names.parts[name]])

    replaced = {
        tensor: checkpoint.read(names.buffers[buffer]).to(files.tensor(tensor).dtype)
        for buffer, tensor in files.buffers.items()
        if buffer in names.buffers
    }
    return ExportSource(files, shapes, read, torch.float32, replaced=replaced)


def write_export(source: ExportSource, out: Path, dtype: torch.dtype, shard_size: str) -> None:
    """Write the checkpoint `out`. The directory gets this name only once it is complete.

    Raises:
        ConfigError: the weights read or written have another digest than they must have.
    """
    module = empty_model(source.base.directory, dtype)
    kept = {name for name, param in module.named_parameters() if param.dtype == torch.float32}
    checkpoint = Checkpoint(
        out, source.base, source.shapes, dtype, shard_size, source.replaced, kept
    )
    total = 0
    try:
        checkpoint.create()
        for name, shape in source.shapes.items():
            regions = [Region.contiguous(0, prod(shape))]
            values = source.read(name, prod(shape))
            total += digest(name, regions, values)
            checkpoint.write(name, regions, values)
        center_digest = format_digest(total)
        if source.digest not in (None, center_digest):
            raise ConfigError(
                f"the exported center has digest {center_digest}, the journal's is {source.digest}"
            )
        checkpoint.flush()
        hashes = {file: checkpoint.read_back(file) for file in checkpoint.files}
        digest_on_disk = format_digest(sum(part for _, part in hashes.values()))
        if dtype == torch.float32 and digest_on_disk != center_digest:
            raise ConfigError(f"{out}: the files on disk differ from what was written")
        shas = {file: sha for file, (sha, _) in hashes.items()}
        manifest = Manifest(source.iteration, center_digest, shas, source.run)
        checkpoint.publish(manifest, source.card)
    except BaseException:
        checkpoint.discard()
        raise


def _replay(
    source: WeightFiles,
    records: list[Record],
    dtype: torch.dtype,
    base: WeightFiles,
    shapes: dict[str, tuple[int, ...]],
    rule: Rule | None,
) -> Callable[[str, int], torch.Tensor]:
    """A reader of the values of `source` with the updates of `records` applied."""

    def read(name: str, numel: int) -> torch.Tensor:
        theta, regions = torch.empty(numel, dtype=dtype), [Region.contiguous(0, numel)]
        source.read(name, regions, theta)
        kept = [torch.zeros_like(theta) for _ in range(rule.buffers if rule else 0)]
        for record in records:
            record.update.apply(theta, name, shapes[name], regions, base, rule=rule, kept=kept)
        return theta

    return read


def _shapes(module: PreTrainedModel) -> dict[str, tuple[int, ...]]:
    return {name: tuple(param.shape) for name, param in module.named_parameters()}
