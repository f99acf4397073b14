"""Reading settings from a file and overrides, checking them, and writing them as YAML."""

import re
from collections.abc import Iterator
from enum import Enum
from os.path import expanduser
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigKeyError, OmegaConfBaseException

from shardes.config.limits import is_text
from shardes.config.schema import (
    CENTER_SETTINGS,
    REPLICA_SETTINGS,
    SCHEDULED_CENTER_SETTINGS,
    SETTINGS,
    CenterDevice,
    Config,
    Noise,
    Offload,
    Restore,
)
from shardes.errors import ConfigError, nearby, one_line, suggestion


def load(path: str | None, overrides: list[str]) -> Config:
    """Read the settings of a YAML file with `key=value` overrides; check types and values.

    Args:
        path: None: no file, only overrides of the defaults.

    Raises:
        ConfigError: an unreadable file, an unknown key, a value of the wrong type or out of range.
    """
    if path is not None:
        path = expanduser(path)
        if Path(path).is_dir():
            raise ConfigError(f"{path}: a directory; name the config file in it")
        if not Path(path).is_file():
            known = "shardes configs lists those that come with shardes"
            raise ConfigError(f"{path}: no such config file{nearby(path, known)}")
    for override in overrides:
        if "=" not in override:
            raise ConfigError(f"{override}: overrides are written key=value")
    settings = _read_yaml(path) if path is not None else OmegaConf.create()
    given, path = [_read_override(override) for override in overrides], path or "the defaults"
    try:
        if not isinstance(settings.get("resume", {}), DictConfig | dict):
            settings["resume"] = {"source": settings["resume"]}
        config = OmegaConf.to_object(
            OmegaConf.merge(OmegaConf.structured(Config), settings, *given)
        )
    except ConfigKeyError as error:
        raise ConfigError(_unknown_key(error.full_key or "")) from None
    except OmegaConfBaseException as error:
        reason = one_line(str(error).partition("\n")[0])
        raise ConfigError(_wrong_value(error.full_key or path, reason)) from None
    except Exception as error:  # OmegaConf's own code, on values that it does not expect
        raise ConfigError(f"{path} and the overrides: {one_line(error)}") from error
    assert isinstance(config, Config)
    _check_kinds(config)
    _expand_paths(config)
    check(config)
    return config


def _read_yaml(path: str) -> DictConfig:
    try:
        settings = OmegaConf.load(path)
    except Exception as error:  # the YAML reader raises errors of many types for a malformed file
        raise ConfigError(f"{path}: not readable as YAML: {one_line(error)}") from error
    if not isinstance(settings, DictConfig):
        raise ConfigError(
            f"{path}: holds no settings (key: value lines); see configs/ for examples"
        )
    return settings


def _read_override(override: str) -> DictConfig:
    """The settings of one `key=value`."""
    override = re.sub(r"^resume=", "resume.source=", override)
    try:
        return OmegaConf.from_dotlist([override])
    except Exception as error:  # as above
        key, _, value = override.partition("=")
        reason = one_line(getattr(error, "problem", None) or error)
        raise ConfigError(
            f"{key}={value}: not readable as YAML: {reason}; quote the value twice, "
            f"as in {key}='\"...\"'"
        ) from None


def _expand_paths(config: Config) -> None:
    """Replace a leading ~ of paths by the home directory."""
    for key, setting in SETTINGS.items():
        if setting.is_path:
            section, _, name = key.rpartition(".")
            owner, value = getattr(config, section), _value(config, key)
            if isinstance(value, dict):
                setattr(owner, name, {split: expanduser(path) for split, path in value.items()})
            elif isinstance(value, list):
                setattr(owner, name, list(map(expanduser, value)))
            elif value is not None:
                setattr(owner, name, expanduser(value))


def _unknown_key(key: str) -> str:
    return f"{key}: no such key; {suggestion(key, SETTINGS, 'see --help for every key')}"


def _wrong_value(key: str, reason: str) -> str:
    if key not in SETTINGS:
        return f"{key}: {reason}"
    setting = SETTINGS[key]
    if isinstance(setting.default, list):
        return f"{key}: must be a list, written {key}=[first,second]"
    if "to string" in reason:  # YAML reads braces and brackets as a mapping or a list
        return (
            f"{key}: must be text; if it has brackets or braces, quote it twice, "
            f"as in {key}='\"{{...}}\"'"
        )
    return f"{key}: {reason}; the key's meaning: {setting.help}"


def check(config: Config) -> None:
    """Raise ConfigError for settings that no run can use, on any number of ranks."""
    for key, setting in SETTINGS.items():
        if setting.limit:
            value = _value(config, key)
            holds = value is None or setting.limit.holds(value)
            _demand(config, key, holds, setting.limit.demand)
    for key, holds, demand in _combinations(config):
        _demand(config, key, holds, demand)


def _combinations(config: Config) -> Iterator[tuple[str, bool, str]]:
    """Settings that others exclude: the key, whether it holds, and what it must be."""
    es, replicas, copies = config.es, config.replicas, config.es.restore is Restore.copy
    yield (
        "es.population_size",
        not (es.antithetic and es.population_size % 2),
        "must be even with es.antithetic=true: members come in pairs",
    )
    yield (
        "checkpoint.best",
        not config.checkpoint.best or config.checkpoint.every > 0,
        "needs checkpoint.every above 0",
    )
    yield (
        "replicas.port",
        replicas.join is None or replicas.port is None,
        "is for the run that others join; leave it out with replicas.join",
    )
    yield (
        "es.restore",
        copies or (replicas.join is None and replicas.port is None),
        "replicas drift apart by rounding, so none can join the run; use copy",
    )
    yield (
        "es.restore",
        copies or es.noise is Noise.full,
        "is for es.noise=full; use copy with es.noise=low_rank",
    )
    yield (
        "es.update",
        es.update is None or copies,
        "is for es.restore=copy, in which the center is exact",
    )
    yield (
        "center.device",
        config.center.device is not CenterDevice.device or config.sharding.offload is Offload.none,
        "the live shards are in host memory with sharding.offload=cpu, and so is the center; "
        "use auto or host",
    )
    yield (
        "es.members_per_batch",
        es.members_per_batch is None or es.noise is Noise.low_rank,
        "is for es.noise=low_rank: with full noise a member changes every weight",
    )


def _check_kinds(config: Config) -> None:
    """Raise ConfigError for what no number and no text may be."""
    for key, setting in SETTINGS.items():
        value = _value(config, key)
        if isinstance(value, int | float):
            holds = abs(value) <= setting.largest  # false of NaN
            _demand(config, key, holds, f"must be a finite number, at most {setting.largest}")
        elif not isinstance(value, Enum | None):
            demand = "must be text: UTF-8 without a zero byte"
            _demand(config, key, all(map(is_text, _texts(value))), demand)


def _texts(value: Any) -> list[Any]:
    """The items of a list, keys and values of a mapping, or the value itself."""
    if isinstance(value, dict):
        return [*value.keys(), *value.values()]
    return value if isinstance(value, list) else [value]


def _value(config: Config, key: str) -> Any:
    value: Any = config
    for name in key.split("."):
        value = getattr(value, name)
    return value


def _demand(config: Config, key: str, holds: bool, demand: str) -> None:
    if not holds:
        value = _value(config, key)
        raise ConfigError(f"{key}={getattr(value, 'value', value)}: {demand}")


def check_layout(config: Config, world_size: int) -> int:
    """Return the number of replicas that `world_size` ranks form.

    Raises:
        ConfigError: the layout does not use exactly `world_size` ranks.
    """
    s = config.sharding
    ranks = s.shard * s.tensor
    replicas = s.replicas if s.replicas is not None else max(world_size // ranks, 1)
    if replicas * ranks != world_size:
        layout = f"sharding.shard={s.shard} × sharding.tensor={s.tensor}"
        if s.replicas is None:
            verdict = f"does not divide the {world_size} ranks that were started: a replica takes"
        else:
            layout = f"sharding.replicas={s.replicas} × {layout}"
            verdict = f"does not fill the {world_size} ranks that were started: they take"
        raise ConfigError(f"{layout}: {verdict} {ranks * (s.replicas or 1)}")
    if config.replicas.join is not None and replicas != 1:
        raise ConfigError(
            f"replicas.join={config.replicas.join}: a launch joins as one replica, with "
            f"sharding.shard={s.shard} × sharding.tensor={s.tensor} ranks; "
            f"{world_size} were started"
        )
    return replicas


def center_settings(config: Config) -> dict[str, Any]:
    """The settings that decide the center, as JSON values by key."""
    keys = CENTER_SETTINGS
    if config.es.sigma_final is not None or config.es.alpha_final is not None:
        keys = CENTER_SETTINGS + SCHEDULED_CENTER_SETTINGS
    return _json_values(config, keys)


def replica_settings(config: Config) -> dict[str, Any]:
    """The settings that all replicas of a run must share, as JSON values by key."""
    return _json_values(config, REPLICA_SETTINGS)


def _json_values(config: Config, keys: list[str]) -> dict[str, Any]:
    values = {key: _value(config, key) for key in keys}
    return {key: getattr(value, "value", value) for key, value in values.items()}


def to_yaml(config: Config) -> str:
    """The resolved settings as YAML, which `load` reads."""
    return OmegaConf.to_yaml(OmegaConf.structured(config))


def nested(config: Config) -> dict[Any, Any]:
    """The resolved settings as nested dicts of YAML values."""
    values = OmegaConf.to_container(OmegaConf.structured(config), enum_to_str=True)
    assert isinstance(values, dict)
    return {str(key): value for key, value in values.items()}
