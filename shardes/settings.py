"""The settings of a run: read from a file and overrides, checked before anything heavy starts, written as YAML."""

import difflib
import math
import re
from pathlib import Path
from typing import Any

from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import ConfigKeyError, OmegaConfBaseException

from shardes.config import Config, ConfigError, Restore, keys


def load(path: str, overrides: list[str]) -> Config:
    """The settings of a YAML file with `key=value` overrides, typed and checked.

    Raises:
        ConfigError: an unreadable file, an unknown key, a value of the wrong type or out of range.
    """
    if not Path(path).is_file():
        raise ConfigError(f"{path}: no such config file")
    for override in overrides:
        if "=" not in override:
            raise ConfigError(f"{override}: overrides are written key=value")
    try:
        given = OmegaConf.load(path)
    except Exception as error:  # whatever the YAML reader raises, it is the user's file
        reason = " ".join(str(error).split())
        raise ConfigError(f"{path}: not readable as YAML: {reason}") from error
    if not isinstance(given, DictConfig):
        raise ConfigError(f"{path}: holds no settings (key: value lines); see configs/ for examples")
    try:
        if not isinstance(given.get("resume", {}), DictConfig | dict):
            given["resume"] = {"source": given["resume"]}
        overrides = [re.sub(r"^resume=", "resume.source=", override) for override in overrides]
        merged = OmegaConf.merge(OmegaConf.structured(Config), given, OmegaConf.from_dotlist(overrides))
        config = OmegaConf.to_object(merged)
    except ConfigKeyError as error:
        raise ConfigError(_unknown_key(error.full_key or "")) from None
    except OmegaConfBaseException as error:
        raise ConfigError(_wrong_value(error.full_key or path, str(error).splitlines()[0])) from None
    assert isinstance(config, Config)
    check(config)
    return config


def _unknown_key(key: str) -> str:
    near = difflib.get_close_matches(key, keys(), n=1, cutoff=0.4)
    return f"{key}: no such key" + (f"; did you mean {near[0]}?" if near else "; see --help for every key")


def _wrong_value(key: str, reason: str) -> str:
    if key not in keys():
        return f"{key}: {reason}"
    default, meaning = keys()[key]
    if isinstance(default, list):
        return f"{key}: must be a list, written {key}=[first,second]"
    if "to string" in reason:  # YAML takes braces and brackets for a structure
        return f"{key}: must be text; where it has brackets or braces quote it twice, as in {key}='\"{{...}}\"'"
    return f"{key}: {reason}; the key's meaning: {meaning}"


LEAST = {
    "es.population_size": 2,  # rewards are compared with each other
    "es.alpha": 0,
    "es.alpha_final": 0,
    "es.iterations": 1,
    "es.seed": 0,
    "sharding.replicas": 1,
    "sharding.shard": 1,
    "sharding.tensor": 1,
    "generation.max_new_tokens": 1,
    "generation.batch_tokens": 1,
    "task.workers": 1,
    "task.prompts_per_iteration": 1,
    "eval.every": 0,
    "checkpoint.every": 0,
    "checkpoint.keep": 1,
    "checkpoint.verify_every": 0,
}
POSITIVE = ("es.sigma", "es.sigma_final", "task.timeout", "task.memory", "replicas.timeout", "run.timeout")


def check(config: Config) -> None:
    """Raise ConfigError for values that no run could use, whatever the world."""
    es, task, checkpoint, replicas = config.es, config.task, config.checkpoint, config.replicas
    for key, least in LEAST.items():
        _demand(config, key, _at(config, key) is None or _at(config, key) >= least, f"must be at least {least}")
    for key in POSITIVE:
        _demand(config, key, _at(config, key) is None or _at(config, key) > 0, "must be positive")
    rules = [
        (config.model.path != MISSING, "model.path", "is required: a checkpoint directory or a hub id"),
        (config.run.dir != MISSING, "run.dir", "is required: where the run is written"),
        (
            not (es.antithetic and es.population_size % 2),
            "es.population_size",
            "must be even with es.antithetic=true: its members come in pairs",
        ),
        (0 <= es.weight_decay < 1, "es.weight_decay", "must be at least 0 and below 1"),
        (is_pattern(es.evolve), "es.evolve", "must be a regular expression, or null"),
        (
            task.on_error == "fail" or is_finite(task.on_error),
            "task.on_error",
            "must be fail, or the reward of a response that cannot be scored: a finite number",
        ),
        (not checkpoint.best or checkpoint.every > 0, "checkpoint.best", "needs checkpoint.every above 0"),
        (is_size(checkpoint.shard_size), "checkpoint.shard_size", "must be a size such as 5GB or 500MB"),
        (all(config.generation.stop), "generation.stop", "must not hold an empty string"),
        (replicas.port is None or 0 <= replicas.port < 65536, "replicas.port", "must be from 0 to 65535, or null"),
        (
            replicas.join is None or re.fullmatch(r".+:\d+", replicas.join) is not None,
            "replicas.join",
            "must be written HOST:PORT, as the run to join prints it",
        ),
        (
            replicas.join is None or replicas.port is None,
            "replicas.port",
            "is for the run that others join; with replicas.join leave it out",
        ),
        (
            es.restore is Restore.copy or (replicas.join is None and replicas.port is None),
            "es.restore",
            "each replica drifts by itself, so none can join or be joined; use copy",
        ),
    ]
    for holds, key, demand in rules:
        _demand(config, key, holds, demand)


def _at(config: Config, key: str) -> Any:
    section, name = key.split(".")
    return getattr(getattr(config, section), name)


def _demand(config: Config, key: str, holds: bool, demand: str) -> None:
    if not holds:
        value = _at(config, key)
        raise ConfigError(f"{key}={getattr(value, 'value', value)}: {demand}")


def is_pattern(text: str | None) -> bool:
    """Whether a text, if there is one, is a regular expression."""
    try:
        re.compile(text or "")
    except re.error:
        return False
    return True


def is_finite(text: str) -> bool:
    """Whether a text is a finite number."""
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


def is_size(text: str) -> bool:
    """Whether a text is a number of bytes as Hugging Face's libraries write it."""
    return re.fullmatch(r"[1-9]\d*[KMGT]B", text) is not None


def check_layout(config: Config, world_size: int) -> int:
    """The number of replicas that the layout makes of `world_size` ranks; ConfigError where it does not divide."""
    s = config.sharding
    ranks = s.shard * s.tensor
    replicas = s.replicas if s.replicas is not None else max(world_size // ranks, 1)
    if replicas * ranks != world_size:
        given = "" if s.replicas is None else f"sharding.replicas={s.replicas} × "
        raise ConfigError(
            f"{given}sharding.shard={s.shard} × sharding.tensor={s.tensor}: does not "
            f"{'fill' if s.replicas is not None else 'divide'} the {world_size} ranks that were started: "
            f"{'they take' if s.replicas is not None else 'a replica takes'} {ranks * (s.replicas or 1)}"
        )
    if config.replicas.join is not None and replicas != 1:
        raise ConfigError(
            f"replicas.join={config.replicas.join}: a launch joins as one replica, of sharding.shard={s.shard} × "
            f"sharding.tensor={s.tensor} ranks; {world_size} were started"
        )
    return replicas


def to_yaml(config: Config) -> str:
    """The resolved settings as YAML, which `load` reads."""
    return OmegaConf.to_yaml(OmegaConf.structured(config))


def nested(config: Config) -> dict[Any, Any]:
    """The resolved settings as nested dicts of what YAML has."""
    found = OmegaConf.to_container(OmegaConf.structured(config), enum_to_str=True)
    assert isinstance(found, dict)
    return {str(key): value for key, value in found.items()}
