"""Every setting, typed, and checked before anything heavy starts."""

import difflib
import math
import re
from dataclasses import dataclass, field, fields, is_dataclass
from enum import Enum
from pathlib import Path
from typing import Any

from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import ConfigKeyError, OmegaConfBaseException


class ConfigError(ValueError):
    """The user's mistake: the message names the key, its value and what to do. Exit code 2."""


class RunError(RuntimeError):
    """The run cannot go on, and the message says why and what to do. Exit code 1."""


class Engine(Enum):
    deepspeed = "deepspeed"
    fsdp = "fsdp"


class DType(Enum):
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


class Gather(Enum):
    member = "member"
    layer = "layer"


class Offload(Enum):
    none = "none"
    cpu = "cpu"


class Restore(Enum):
    copy = "copy"
    subtract = "subtract"


class Fitness(Enum):
    standardized = "standardized"
    centered_rank = "centered_rank"


class Schedule(Enum):
    linear = "linear"
    cosine = "cosine"


class DecayTo(Enum):
    zero = "zero"
    base = "base"


def _key(meaning: str, default: Any) -> Any:
    if isinstance(default, list | dict):
        return field(default_factory=lambda: type(default)(default), metadata={"help": meaning})
    return field(default=default, metadata={"help": meaning})


@dataclass
class ModelConfig:
    path: str = _key("checkpoint directory (safetensors, config.json, tokenizer) or hub id", MISSING)
    dtype: DType = _key("dtype of the live weights: float32, bfloat16 or float16", DType.bfloat16)
    trust_remote_code: bool = _key(
        "run Python code that comes with the model, on every rank; only after reading it", False
    )


@dataclass
class ShardingConfig:
    replicas: int | None = _key("copies of the model, each evaluating its own members; null: fill the world", None)
    shard: int = _key("ranks over which ZeRO-3 or FSDP spreads a replica's weights; they split a member's prompts", 1)
    tensor: int = _key("ranks that compute each layer together (tensor parallel)", 1)
    gather: Gather = _key(
        "where shard > 1: member gathers the weights once per member and generates at full speed; "
        "layer gathers layer by layer, for models whose tensor-parallel slice does not fit",
        Gather.member,
    )
    offload: Offload = _key("cpu: the live shards wait on the host, for models beyond the GPUs' memory", Offload.none)


@dataclass
class ESConfig:
    population_size: int = _key("members N evaluated per iteration", 30)
    sigma: float = _key("σ, standard deviation of the perturbation", 0.001)
    alpha: float = _key("α, step size (the paper's 1/σ is digested into it)", 0.0005)
    iterations: int = _key("iterations in all", 500)
    seed: int = _key("run seed, from which every member's seed is drawn", 0)
    restore: Restore = _key(
        "copy: an exact float32 center beside the live weights; "
        "subtract: the paper's way, no second copy, the live weights drift by rounding",
        Restore.copy,
    )
    antithetic: bool = _key("members come in pairs of one seed, θ + σ·ε and θ − σ·ε", False)
    fitness: Fitness = _key(
        "what weighs a member's noise: standardized rewards, or centered_rank: ranks from −0.5 to 0.5",
        Fitness.standardized,
    )
    standardize_prompts: bool = _key("standardise each prompt's rewards over the members before averaging them", False)
    sigma_final: float | None = _key("σ of the last iteration; null: σ stays", None)
    alpha_final: float | None = _key("α of the last iteration; null: α stays", None)
    schedule: Schedule = _key("how σ and α go to their final values: linear or cosine", Schedule.linear)
    weight_decay: float = _key("λ: each update also takes λ·(θ − anchor) away", 0.0)
    decay_to: DecayTo = _key("the anchor of weight decay: zero, or base, the base model's weights", DecayTo.zero)
    evolve: str | None = _key("regular expression: only parameters whose names it is found in are trained", None)


@dataclass
class GenerationConfig:
    max_new_tokens: int = _key("longest response, in tokens", 1024)
    stop: list[str] = _key("strings that end a response (they stay in it), besides the end-of-sequence tokens", [])
    batch_tokens: int = _key(
        "prompts decoded together on a rank: at most this many tokens, prompt and longest response", 65536
    )


@dataclass
class TaskConfig:
    name: str | None = _key("a built-in task: conciseness, countdown, math; or jsonl: your own data and reward", None)
    path: str | None = _key("your own task: file.py:Class", None)
    train: str | None = _key(
        "file of training problems (countdown: JSON; math, jsonl: JSON lines or datasets:NAME:SPLIT); "
        "null: the shipped ones",
        None,
    )
    test: str | None = _key("the same for held-out problems", None)
    tests: dict[str, str] = _key("math, jsonl: further named test sets, for evaluate.py --split NAME", {})
    template: str | None = _key(
        "jsonl: the prompt, with {field} where an example's field goes ({{ and }} for braces); null: the field prompt",
        None,
    )
    chat: bool = _key("jsonl: prompts are put as a user's message, by the chat template; false: as raw text", True)
    reward: str | None = _key(
        "jsonl: my_module:function or my_reward.py:function; called with (response, example), it returns a float", None
    )
    workers: int = _key("processes of each replica that score responses (jsonl, and classes with reward)", 4)
    timeout: float = _key("seconds that scoring one response may take there; then its process is ended", 10.0)
    memory: float = _key("gigabytes that one of these processes may allocate", 8.0)
    on_error: str = _key(
        "what follows where a response cannot be scored there: fail ends the run; a number is its reward", "fail"
    )
    prompts_per_iteration: int | None = _key(
        "training prompts asked per iteration, the same for every member, reshuffled each epoch; null: all", None
    )


@dataclass
class EvalConfig:
    every: int = _key("iterations between evaluations of the center; 0: at the start and the end only", 10)


@dataclass
class CheckpointConfig:
    every: int = _key("iterations between snapshots of the center, the last one included; 0: none", 20)
    keep: int = _key("snapshots that are kept, the newest ones", 2)
    shard_size: str = _key("most bytes of one safetensors file of a snapshot", "5GB")
    best: bool = _key("also keep the center with the best held-out reward, as snapshots/best", False)
    verify_every: int = _key("iterations between comparisons of the replicas' centers (es.restore=copy); 0: never", 10)


@dataclass
class ReplicasConfig:
    port: int | None = _key("where replicas of other launches can join this run; 0: a free port; null: nowhere", None)
    host: str | None = _key("the address that is listened on, and that joining replicas are told; null: all", None)
    join: str | None = _key("HOST:PORT of a run that this launch joins, as one more replica", None)
    timeout: float = _key("seconds without a sign of life after which a replica's member is another's", 60.0)


@dataclass
class ResumeConfig:
    source: str = _key(
        "auto: go on if run.dir has a journal; never: refuse; or a run directory or snapshot, from whose journal "
        "this run begins (also written resume=...)",
        "auto",
    )
    allow_changes: list[str] = _key("settings that decide the center and may differ from the journal's", [])


@dataclass
class RunConfig:
    dir: str = _key("run directory: config, metrics, journal, samples, snapshots, TensorBoard files", MISSING)
    timeout: float = _key("seconds that a rank waits for another before the run stops", 1800.0)


@dataclass
class TrackingConfig:
    loggers: list[str] = _key(
        "where metrics go besides metrics.jsonl: tensorboard, wandb, your own as logger.py:Class", ["tensorboard"]
    )


@dataclass
class Config:
    engine: Engine = _key(
        "what holds the model: deepspeed (ZeRO-3 × AutoTP) or fsdp (FSDP2 × transformers' tensor parallel)",
        Engine.deepspeed,
    )
    model: ModelConfig = field(default_factory=ModelConfig)
    sharding: ShardingConfig = field(default_factory=ShardingConfig)
    es: ESConfig = field(default_factory=ESConfig)
    generation: GenerationConfig = field(default_factory=GenerationConfig)
    task: TaskConfig = field(default_factory=TaskConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    replicas: ReplicasConfig = field(default_factory=ReplicasConfig)
    resume: ResumeConfig = field(default_factory=ResumeConfig)
    run: RunConfig = field(default_factory=RunConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    profile: bool = _key("write torch.profiler traces of the second iteration, for Perfetto, to run.dir", False)


def keys(config: Any = Config, prefix: str = "") -> dict[str, tuple[Any, str]]:
    """Every dotted key with its default and its meaning."""
    found: dict[str, tuple[Any, str]] = {}
    for entry in fields(config):
        if is_dataclass(entry.type):
            found |= keys(entry.type, f"{prefix}{entry.name}.")
        else:
            default = entry.default_factory() if callable(entry.default_factory) else entry.default
            found[prefix + entry.name] = (default, entry.metadata["help"])
    return found


def help_text() -> str:
    """One line per key: name, default, meaning."""
    lines = [f"  {key:<28} {shown(default):<10} {meaning}" for key, (default, meaning) in keys().items()]
    return "\n".join(lines)


def shown(default: Any) -> str:
    if default is None:
        return "null"
    if default == MISSING:
        return "required"
    if isinstance(default, bool):
        return str(default).lower()
    return default.value if isinstance(default, Enum) else str(default)


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
