"""Every setting: its type, default and meaning. `shardes.settings` reads and checks them."""

from dataclasses import dataclass, field, fields, is_dataclass
from enum import Enum
from typing import Any

from omegaconf import MISSING


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
