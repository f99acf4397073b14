"""Write a run's center as a Hugging Face checkpoint.

    shardes export RUN_DIR OUT_DIR [--iteration K] [--dtype bfloat16] [--shard-size 5GB]

`python tools/export_safetensors.py` is the same. Examples:

    shardes export runs/mine exported                the newest center, in the run's model.dtype
    shardes export runs/mine early --iteration 20    the center after 20 iterations

It runs in one process, without a GPU, with one tensor in memory at a time: from the newest valid
snapshot up to the iteration, or the base model, with the later updates of the journal applied.
In place of RUN_DIR it takes a directory of transformers' distributed save, or what DeepSpeed's
zero_to_fp32.py --safe_serialization makes of a ZeRO-3 checkpoint; --base then names their model.
"""

import sys
from math import prod
from os.path import expanduser
from pathlib import Path

from shardes.commands.arguments import CommandParser, path, reports_errors
from shardes.config.limits import is_size
from shardes.distributed import environment
from shardes.errors import ConfigError, RunError
from shardes.es.rule import load_rule
from shardes.reporting.progress import slow_step
from shardes.storage import journal
from shardes.storage.checkpoint import PARTIAL, is_free
from shardes.storage.export import (
    DTYPES_BY_NAME,
    center_of_run,
    external_checkpoint,
    write_export,
)
from shardes.words import counted


def parser() -> CommandParser:
    parser = CommandParser("export", __doc__)
    parser.add_argument(
        "source",
        metavar="RUN_DIR",
        type=path,
        help="run directory, or another program's checkpoint",
    )
    parser.add_argument("out", metavar="OUT_DIR", type=path, help="directory to create")
    parser.add_argument(
        "--iteration",
        type=int,
        metavar="K",
        help="export the center after K iterations; default: the newest",
    )
    parser.add_argument(
        "--dtype",
        choices=DTYPES_BY_NAME,
        help="default: the run's model.dtype; float32 for other programs' checkpoints",
    )
    parser.add_argument(
        "--shard-size", default="5GB", help="maximum size of one file; default: %(default)s"
    )
    parser.add_argument(
        "--base",
        metavar="DIR",
        type=expanduser,
        help="the base model; default: the run's model.path",
    )
    parser.add_argument(
        "--update",
        metavar="FILE:CLASS",
        type=expanduser,
        help="the code of the run's es.update, if it has one and no snapshot of that center",
    )
    return parser


@reports_errors
def main(argv: list[str]) -> int:
    options = parser().parse_args(argv)
    if not is_size(options.shard_size):
        raise ConfigError(f"--shard-size {options.shard_size}: must be a size such as 5GB or 500MB")
    if options.out.resolve() == Path.cwd():  # replacing it would leave a shell in a removed one
        raise ConfigError(
            f"OUT_DIR {options.out}: the working directory; name a directory to create"
        )
    partial = options.out.absolute().with_name(options.out.absolute().name + PARTIAL)
    if not is_free(partial):
        raise ConfigError(
            f"{partial}: already exists, and the export would be written there until it is "
            "complete; choose another OUT_DIR"
        )
    if options.out.exists() and (not options.out.is_dir() or any(options.out.iterdir())):
        raise ConfigError(f"{options.out}: already exists; choose another OUT_DIR")
    try:
        history = journal.read(options.source / journal.JOURNAL)
        if history:
            rule = load_rule(options.update)
            with slow_step(f"finding the center in {options.source}"):
                source = center_of_run(
                    options.source, history, options.base, options.iteration, rule
                )
        else:
            source = external_checkpoint(options.source, options.base)
        for warning in source.warnings:
            print(warning, file=sys.stderr)
        dtype = DTYPES_BY_NAME[options.dtype] if options.dtype else source.dtype
        with slow_step(f"writing {options.out}"):
            write_export(source, options.out, dtype, options.shard_size)
    except OSError as error:
        raise RunError(str(error)) from error
    parameters = sum(map(prod, source.shapes.values()))
    print(
        f"{options.out}: {parameters:,} parameters after {counted(source.iteration, 'iteration')}"
    )
    return 0


if __name__ == "__main__":
    environment.run(main)
