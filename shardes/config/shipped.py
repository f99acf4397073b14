"""The configs that come with the package: configs/ and examples/ of the repository.

The wheel has them inside the package (setup.py), a checkout beside it.
"""

from pathlib import Path

from shardes.errors import ConfigError, suggestion

MADE_BY = {  # models of the configs, and the commands that make them
    "models/SmolLM2-135M-Instruct": "shardes get-smollm2",
    "models/countdown-base": "python tools/make_countdown_base.py, of the repository,",
}


def shipped_configs() -> dict[str, Path]:
    """The files by name: `quickstart` of configs/quickstart.yaml, `facts` of
    examples/facts/config.yaml.
    """
    package = Path(__file__).parent.parent
    root = package if (package / "configs").is_dir() else package.parent
    examples = {file.parent.name: file for file in sorted(root.glob("examples/*/config.yaml"))}
    configs = {
        file.relative_to(root / "configs").with_suffix("").as_posix(): file
        for file in sorted(root.glob("configs/**/*.yaml"))
    }
    return examples | configs


def shipped_config(name: str) -> Path:
    """The file of that name.

    Raises:
        ConfigError: there is none.
    """
    known = shipped_configs()
    if name not in known:
        raise ConfigError(f"{name}: no such config; {suggestion(name, known)}")
    return known[name]


def summary(file: Path) -> str:
    """What a shipped config is for: the comment in its first line."""
    return file.read_text(encoding="utf-8").splitlines()[0].removeprefix("#").strip()


def is_example(file: Path) -> bool:
    """Whether the config belongs to an example, whose data and reward lie beside it."""
    return file.parent.parent.name == "examples"
