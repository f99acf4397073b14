"""Copy a config that comes with shardes, to start an own one from.

    shardes init DIR [NAME]

NAME is one that `shardes configs` lists; by default facts, an example with data and a reward
function. DIR/config.yaml then names the copies. Examples:

    shardes init mine                 data, reward function and config of the example facts
    shardes init mine three_words     a task as a Python class
    shardes init mine quickstart      a config alone
"""

import re
import shutil
from pathlib import Path

from shardes.commands.arguments import CommandParser, path, reports_errors
from shardes.config.loading import load
from shardes.config.shipped import MADE_BY, is_example, shipped_config
from shardes.distributed import environment
from shardes.errors import ConfigError, unusable_files

PLAIN = re.compile(r"[\w./+-][\w./+@-]*")  # a path that YAML and a shell take without quotes
LAUNCH = re.compile(r"deepspeed --num_gpus (\d+) launchers/(\w+)\.py (\S+)")


@reports_errors
@unusable_files()
def main(argv: list[str]) -> int:
    parser = CommandParser("init", __doc__)
    parser.add_argument("directory", metavar="DIR", type=path)
    parser.add_argument("name", metavar="NAME", nargs="?", default="facts")
    options = parser.parse_args(argv)
    config = copy(shipped_config(options.name), options.directory)
    for line in next_steps(config):
        print(line)
    return 0


def next_steps(config: Path) -> list[str]:
    """What is left to do with a config that was copied."""
    text = config.read_text(encoding="utf-8")
    files = sorted(path.name for path in config.parent.iterdir() if path != config)
    command = re.search(r"shardes train \S+(?: --gpus \d+)?", text)
    start = command.group() if command else f"shardes train {config}"
    return [
        f"{config}: a config to make your own{', with ' if files else ''}{', '.join(files)}",
        *_model_missing(config),
        f"check it:  {start} --dry-run",
        f"start it:  {start}",
    ]


def _model_missing(config: Path) -> list[str]:
    """A line if the config's model is yet to be made in the working directory."""
    path = load(str(config), []).model.path
    if path not in MADE_BY or Path(path).is_dir():
        return []
    return [f"its model: {path} is not here yet; {MADE_BY[path]} makes it"]


def copy(source: Path, directory: Path) -> Path:
    """Copy a shipped config, and what lies beside an example's; returns the new config's path.

    Raises:
        ConfigError: the directory is not empty, or its name would need quotes in the config.
    """
    if not PLAIN.fullmatch(str(directory)):
        raise ConfigError(
            f"{directory}: choose a path of letters, digits and ._-+@/ only, with no @ in front"
        )
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise ConfigError(f"{directory}: exists and is not empty; choose another directory")
    directory.mkdir(parents=True, exist_ok=True)
    config = directory / "config.yaml"
    beside = source.parent.iterdir() if is_example(source) else ()
    for file in beside:
        if file.is_file():
            shutil.copyfile(file, directory / file.name)
    text = source.read_text(encoding="utf-8")
    text = LAUNCH.sub(r"shardes \2 \3 --gpus \1", text)
    if is_example(source):
        text = text.replace(f"examples/{source.parent.name}/", f"{directory}/")
    else:
        text = re.sub(r"(?<=shardes train )configs/\S+", lambda _: str(config), text)
    text = re.sub(r"(?m)^  dir: runs/\S+$", f"  dir: runs/{directory.resolve().name}", text)
    config.write_text(text, encoding="utf-8")
    return config


if __name__ == "__main__":
    environment.run(main)
