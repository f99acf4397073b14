"""Write a run's center as an ordinary Hugging Face checkpoint.

    shardes export RUN_DIR OUT_DIR [--iteration K] [--dtype bfloat16] [--shard-size 5GB]

`python tools/export_safetensors.py` is the same. Examples:

    shardes export runs/mine exported                     the newest center, in the run's model.dtype
    shardes export runs/mine early --iteration 20         the center after 20 iterations

One process, no GPU, one tensor in memory at a time: the newest sound snapshot up to the iteration, or the base model,
and the updates that the journal records after it. In place of RUN_DIR it takes a directory of transformers'
distributed save, or what DeepSpeed's zero_to_fp32.py --safe_serialization makes of a ZeRO-3 checkpoint; --base then
says which model they belong to.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from pathlib import Path

from shardes import environment

environment.prepare()

import torch  # noqa: E402
from transformers import PreTrainedModel  # noqa: E402

from shardes import snapshots  # noqa: E402
from shardes.checkpoint import DTYPES, Checkpoint, verify  # noqa: E402
from shardes.commands.arguments import Parser  # noqa: E402
from shardes.config import ConfigError  # noqa: E402
from shardes.engines import open_model  # noqa: E402
from shardes.files import differing  # noqa: E402
from shardes.foreign import ForeignFiles  # noqa: E402
from shardes.journal import JOURNAL, History, Record, read  # noqa: E402
from shardes.population import mean  # noqa: E402
from shardes.settings import is_size  # noqa: E402
from shardes.shards import digest, run  # noqa: E402
from shardes.weights import WeightFiles, model_directory  # noqa: E402

Read = Callable[[str, int], torch.Tensor]  # (parameter, numel) -> flat values
CHOICES = {names[1]: dtype for dtype, names in DTYPES.items()}


@dataclass
class Plan:
    """What is to be written: the parameters of `base`, with values from `read`; `digest` is to come out."""

    base: WeightFiles
    shapes: dict[str, tuple[int, ...]]
    read: Read
    dtype: torch.dtype
    iteration: int = 0
    digest: str | None = None
    card: str = ""


def of_run(directory: Path, history: History, base: str | None, iteration: int | None) -> Plan:
    """The center before `iteration` of a run; by default the newest."""
    newest = len(history.records)
    iteration = newest if iteration is None else iteration
    if not 0 <= iteration <= newest:
        raise ConfigError(f"--iteration {iteration}: the run in {directory} has the centers 0 to {newest}")
    files, module = open_model(model_directory(base or history.header.model), torch.float32)
    fingerprint = files.fingerprint()
    if fingerprint not in (history.header.files, history.files):
        raise ConfigError(
            f"{files.directory}: {', '.join(differing(history.header.files, fingerprint))}: not as when the run began; "
            "give the model's directory as --base"
        )
    dtype = CHOICES[history.settings["model.dtype"]]
    exact = history.settings["es.restore"] == "copy"
    source, first = files, 0
    for number, path in snapshots.found(directory).items():
        if number <= iteration:
            try:
                if verify(path).digest == history.digest(number) or history.digest(number) is None:
                    source, first = WeightFiles(path), number
                    source.stack(module)
                    break
            except ConfigError as error:
                print(f"WARNING: a snapshot is not used: {error}", file=sys.stderr)
    records = history.records[first:iteration]
    # Where the live weights are the center, updates are rounded to their dtype.
    held = torch.float32 if exact else dtype
    known = history.digest(iteration) if exact or first == iteration else None
    card = model_card(history, iteration, dtype)
    return Plan(files, shapes_of(module), replayed(source, records, held, files), dtype, iteration, known, card)


def replayed(source: WeightFiles, records: list[Record], dtype: torch.dtype, base: WeightFiles) -> Read:
    """Values of `source` with the updates of `records`."""

    def values(name: str, numel: int) -> torch.Tensor:
        theta = torch.empty(numel, dtype=dtype)
        source.read(name, [run(0, numel)], theta)
        for record in records:
            record.update.apply(theta, name, [run(0, numel)], base)
        return theta

    return values


def of_checkpoint(directory: Path, base: str | None) -> Plan:
    """What another program saved."""
    tensors = ForeignFiles(directory)
    if base is None:
        raise ConfigError(f"{directory}: give the model that it was made from as --base, for its config and tokenizer")
    files, module = open_model(model_directory(base), torch.float32)
    shapes = shapes_of(module)
    for name, shape in shapes.items():
        if tensors.shapes.get(name) != shape:
            raise ConfigError(f"{directory}: {name} is {tensors.shapes.get(name, 'missing')}, in {base} it is {shape}")
    unknown = sorted(tensors.shapes.keys() - module.state_dict().keys())
    if unknown:
        raise ConfigError(f"{directory}: {unknown[0]} has no place in {base}; is it another model's?")
    return Plan(files, shapes, lambda name, _: tensors.read(name), torch.float32)


def shapes_of(module: PreTrainedModel) -> dict[str, tuple[int, ...]]:
    return {name: tuple(param.shape) for name, param in module.named_parameters()}


def export(plan: Plan, out: Path, dtype: torch.dtype, shard_size: str) -> None:
    """Write the checkpoint; it has its name only once it is complete."""
    checkpoint = Checkpoint(out, plan.base, plan.shapes, dtype, shard_size)
    total = 0
    try:
        checkpoint.create()
        for name, shape in plan.shapes.items():
            whole = [run(0, prod(shape))]
            values = plan.read(name, prod(shape))
            total += digest(name, whole, values)
            checkpoint.write(name, whole, values)
        found = f"{total % 2**64:016x}"
        if plan.digest not in (None, found):
            raise ConfigError(f"the center comes out with digest {found}, where the journal has {plan.digest}")
        checkpoint.flush()
        read = {file: checkpoint.read_back(file) for file in checkpoint.files}
        if dtype == torch.float32 and sum(part for _, part in read.values()) % 2**64 != total % 2**64:
            raise ConfigError(f"{out}: read back, it is not what was written")
        checkpoint.publish(plan.iteration, found, {file: sha for file, (sha, _) in read.items()}, plan.card)
    except BaseException:
        checkpoint.discard()
        raise


def model_card(history: History, iteration: int, dtype: torch.dtype) -> str:
    """A README.md: base model, task, settings, reward curve, how to load."""
    means = [mean(record.rewards) for record in history.records[:iteration]]
    shown = sorted({round(i * (len(means) - 1) / 11) for i in range(12)}) if means else []
    curve = "\n".join(f"| {i} | {means[i]:.4g} | {max(history.records[i].rewards):.4g} |" for i in shown)
    task = history.settings["task.name"] or Path(history.settings["task.path"].rpartition(":")[0]).name
    keys = "\n".join(f"| `{key}` | {value} |" for key, value in history.settings.items() if key != "task.path")
    name = Path(history.header.model).name
    return f"""---
library_name: transformers
pipeline_tag: text-generation
tags: [evolution-strategies, shardes]
---

# {name}, fine-tuned with evolution strategies

The center after {iteration} iterations of a run of shardes, after
[Evolution Strategies at Scale](https://arxiv.org/abs/2509.24372). Base model: `{name}`; its licence holds for this
model too. Task: {task}.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("PATH", dtype="{DTYPES[dtype][1]}")
tokenizer = AutoTokenizer.from_pretrained("PATH")
```

The run computed in {DTYPES[dtype][1]}, with greedy decoding.

## Settings

| | |
| --- | --- |
{keys}

## Rewards

| iteration | members' mean | best member |
| --- | --- | --- |
{curve}
"""


def main(argv: list[str]) -> int:
    parser = Parser("export", __doc__)
    parser.add_argument("source", metavar="RUN_DIR", type=Path, help="run directory, or another program's checkpoint")
    parser.add_argument("out", metavar="OUT_DIR", type=Path, help="what to make")
    parser.add_argument("--iteration", type=int, metavar="K", help="the center after K iterations; default: the newest")
    parser.add_argument("--dtype", choices=CHOICES, help="default: the run's model.dtype; of checkpoints float32")
    parser.add_argument("--shard-size", default="5GB", help="most bytes of one file; default: %(default)s")
    parser.add_argument("--base", metavar="DIR", help="the base model; default: where the run had it")
    try:
        options = parser.parse_args(argv)
        if not is_size(options.shard_size):
            raise ConfigError(f"--shard-size {options.shard_size}: must be a size such as 5GB or 500MB")
        if options.out.exists() and (not options.out.is_dir() or any(options.out.iterdir())):
            raise ConfigError(f"{options.out}: is there already; choose another OUT_DIR")
        history = read(options.source / JOURNAL)
        if history:
            plan = of_run(options.source, history, options.base, options.iteration)
        else:
            plan = of_checkpoint(options.source, options.base)
        export(plan, options.out, CHOICES[options.dtype] if options.dtype else plan.dtype, options.shard_size)
    except (ConfigError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, ConfigError) else 1
    print(f"{options.out}: {sum(map(prod, plan.shapes.values())):,} parameters after {plan.iteration} iterations")
    return 0


if __name__ == "__main__":
    environment.run(main)
