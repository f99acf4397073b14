"""Every setting, declared once: its type, default, help, limit, and whether it decides the center.

`shardes.config.loading` reads and checks the settings. This file is one long list on purpose: every
key stands here with all that is said of it, and help, docs and checks are made from it.
"""

from dataclasses import dataclass, field, fields, is_dataclass
from enum import Enum
from typing import Any, Literal

from omegaconf import MISSING

from shardes.config.limits import (
    POSITIVE,
    REWARD_RANGE,
    Limit,
    at_least,
    is_address,
    is_pattern,
    is_reward_text,
    is_size,
    required,
)


class EngineName(Enum):
    deepspeed = "deepspeed"
    fsdp = "fsdp"
    vllm = "vllm"


class DType(Enum):
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


class Attention(Enum):
    auto = "auto"
    sdpa = "sdpa"
    eager = "eager"
    flash_attention_2 = "flash_attention_2"
    flash_attention_3 = "flash_attention_3"
    flex_attention = "flex_attention"


class Gather(Enum):
    member = "member"
    layer = "layer"


class Offload(Enum):
    none = "none"
    cpu = "cpu"


class CenterDevice(Enum):
    auto = "auto"
    host = "host"
    device = "device"


class Noise(Enum):
    full = "full"
    low_rank = "low_rank"


class Restore(Enum):
    copy = "copy"
    subtract = "subtract"


class Fitness(Enum):
    standardized = "standardized"
    centered_rank = "centered_rank"


class LogitsProcessors(Enum):
    checkpoint = "checkpoint"
    none = "none"


class Decode(Enum):
    eager = "eager"
    graph = "graph"


class Schedule(Enum):
    linear = "linear"
    cosine = "cosine"


class DecayTo(Enum):
    zero = "zero"
    base = "base"


@dataclass(frozen=True)
class Setting:
    """What is declared of one setting.

    Attributes:
        limit: the check of every value but null.
        decides_center: whether the center depends on the setting, given the model and the machine.
            A run that resumes must keep such a setting. "scheduled": only if σ or α has a schedule.
            None: not declared, which the sections es, generation and task do not allow.
        same_in_replicas: whether a replica that joins a run must have the run's value. Settings
            that decide the center must be the same in any case.
        largest: of a number, the largest absolute value.
        is_path: whether a leading ~ is the home directory.
    """

    default: Any
    help: str
    limit: Limit | None = None
    decides_center: bool | Literal["scheduled"] | None = None
    same_in_replicas: bool = False
    largest: int = 2**31 - 1
    is_path: bool = False


def _setting(default: Any, help: str, **declared: Any) -> Any:
    metadata = {"setting": Setting(default, help, **declared)}
    if isinstance(default, list | dict):
        return field(default_factory=lambda: type(default)(default), metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass
class ModelConfig:
    path: str = _setting(
        MISSING,
        "checkpoint directory (safetensors, config.json, tokenizer) or hub id",
        limit=required("a checkpoint directory or a hub id"),
        is_path=True,
    )
    dtype: DType = _setting(
        DType.bfloat16,
        "dtype of the live weights: float32, bfloat16 or float16",
        decides_center=True,
    )
    attention: Attention = _setting(
        Attention.auto,
        "how attention is computed: sdpa, eager, flash_attention_2, flash_attention_3 or "
        "flex_attention; auto: as transformers chooses for the model",
    )
    trust_remote_code: bool = _setting(
        False, "run the Python code in the model's repository, on every rank; read it first"
    )


@dataclass
class ShardingConfig:
    replicas: int | None = _setting(
        None,
        "copies of the model; each evaluates its own members; null: as many as the ranks make",
        limit=at_least(1),
    )
    shard: int = _setting(
        1,
        "ranks that ZeRO-3 or FSDP shards a replica's weights over; "
        "they split each member's prompts",
        limit=at_least(1),
    )
    tensor: int = _setting(
        1, "ranks that compute each layer together (tensor parallel)", limit=at_least(1)
    )
    gather: Gather = _setting(
        Gather.member,
        "with shard > 1: member gathers the weights once per member and generates at full speed; "
        "layer gathers layer by layer, for models whose tensor-parallel slice does not fit",
    )
    offload: Offload = _setting(
        Offload.none,
        "cpu: keep the live shards in host memory, for models larger than the GPUs' memory",
    )


@dataclass
class ESConfig:
    population_size: int = _setting(
        30,
        "N, members evaluated per iteration",
        limit=at_least(2),  # rewards are compared with each other
        decides_center=True,
    )
    sigma: float = _setting(
        0.001, "σ, standard deviation of the perturbation", limit=POSITIVE, decides_center=True
    )
    alpha: float = _setting(
        0.0005,
        "α, step size (it includes the paper's factor 1/σ)",
        limit=at_least(0),
        decides_center=True,
    )
    iterations: int = _setting(
        500,
        "total number of iterations",
        limit=at_least(1),
        decides_center="scheduled",
        same_in_replicas=True,
    )
    seed: int = _setting(
        0,
        "run seed; every member's seed is derived from it",
        limit=at_least(0),
        decides_center=True,
        largest=2**64 - 1,
    )
    restore: Restore = _setting(
        Restore.copy,
        "copy: keep an exact float32 center beside the live weights; "
        "subtract: the paper's way, without a copy; the live weights drift by rounding",
        decides_center=True,
    )
    noise: Noise = _setting(
        Noise.full,
        "a member's noise: full (the paper's, a number for every weight) or low_rank (on each "
        "matrix a product of two factors of rank es.rank; vectors are not trained)",
        decides_center=True,
    )
    rank: int = _setting(
        1, "r, rank of the noise on a matrix (low_rank)", limit=at_least(1), decides_center=True
    )
    members_per_batch: int | None = _setting(
        None,
        "members of low-rank noise that answer side by side in one batch; 1: one after another, "
        "with perturbed weights; null: as many as generation.batch_tokens holds (with engine=vllm "
        "16), but with several replicas at most half of a replica's share",
        limit=at_least(1),
        decides_center=False,
    )
    antithetic: bool = _setting(
        False, "members come in pairs of one seed, θ + σ·ε and θ − σ·ε", decides_center=True
    )
    fitness: Fitness = _setting(
        Fitness.standardized,
        "weight of a member's noise in the update: standardized (its standardized reward) or "
        "centered_rank (its rank, scaled to −0.5 to 0.5)",
        decides_center=True,
    )
    standardize_prompts: bool = _setting(
        False,
        "standardize each prompt's rewards over the members before averaging them",
        decides_center=True,
    )
    sigma_final: float | None = _setting(
        None,
        "σ of the last iteration; null: σ is constant",
        limit=POSITIVE,
        decides_center=True,
    )
    alpha_final: float | None = _setting(
        None,
        "α of the last iteration; null: α is constant",
        limit=at_least(0),
        decides_center=True,
    )
    schedule: Schedule = _setting(
        Schedule.linear,
        "how σ and α reach their final values: linear or cosine",
        decides_center=True,
    )
    weight_decay: float = _setting(
        0.0,
        "λ: each update also subtracts λ·(θ − anchor)",
        limit=Limit("must be at least 0 and below 1", lambda value: 0 <= value < 1),
        decides_center=True,
    )
    decay_to: DecayTo = _setting(
        DecayTo.zero,
        "anchor of the weight decay: zero, or base (the base model's weights)",
        decides_center=True,
    )
    evolve: str | None = _setting(
        None,
        "regular expression; only parameters with a matching name are trained; null: all",
        limit=Limit("must be a regular expression, or null", is_pattern),
        decides_center=True,
    )
    update: str | None = _setting(
        None,
        "your own rule of how the center moves, file.py:Class, see docs/variants.md; null: by the "
        "members' weighted noise, as in the paper",
        decides_center=True,
        is_path=True,
    )


@dataclass
class CenterConfig:
    device: CenterDevice = _setting(
        CenterDevice.auto,
        "where the exact float32 center of es.restore=copy lies: device (GPU) or host (pinned "
        "memory, from which each member is copied); auto: the device, if generation leaves room",
    )


@dataclass
class GenerationConfig:
    max_new_tokens: int = _setting(
        1024, "longest response, in tokens", limit=at_least(1), decides_center=True
    )
    stop: list[str] = _setting(
        [],
        "strings that end a response, besides the end-of-sequence tokens; they stay in the text",
        limit=Limit("must not hold an empty string", all),
        decides_center=True,
    )
    logits_processors: LogitsProcessors = _setting(
        LogitsProcessors.checkpoint,
        "greedy decoding: checkpoint applies what the model's generation config has, such as "
        "repetition_penalty, as transformers' generate does; none takes the largest logit, as vLLM "
        "does with SamplingParams(temperature=0)",
        decides_center=True,
    )
    batch_tokens: int = _setting(
        65536,
        "largest batch on a rank, in tokens (prompts plus longest responses)",
        limit=at_least(1),
        decides_center=False,
    )
    decode: Decode = _setting(
        Decode.eager,
        "eager: decode steps launch one kernel after another; graph: with a static key-value cache "
        "and, on a GPU, CUDA graphs, for models whose step is shorter than its launches",
        decides_center=False,
    )


@dataclass
class VLLMConfig:
    cache_size: float = _setting(
        4.0, "engine=vllm: gigabytes of a rank's key-value cache", limit=POSITIVE
    )
    max_model_len: int | None = _setting(
        None,
        "engine=vllm: more tokens than the longest prompt and its response have; null: the model's "
        "context",
        limit=at_least(2),
    )
    enforce_eager: bool = _setting(
        False, "engine=vllm: true: start fast, without compiled code and CUDA graphs"
    )


@dataclass
class TaskConfig:
    name: str | None = _setting(
        None,
        "built-in task: conciseness, countdown, extraction or math; or jsonl, for your own data "
        "and reward",
        decides_center=True,
    )
    path: str | None = _setting(
        None, "your own task: file.py:Class", decides_center=True, is_path=True
    )
    train: str | None = _setting(
        None,
        "training problems (countdown, extraction, math, jsonl): a file (.jsonl, .json, .csv, "
        ".parquet), a directory that save_to_disk wrote, or datasets:NAME:SPLIT; null: the "
        "built-in ones",
        decides_center=True,
        is_path=True,
    )
    test: str | None = _setting(
        None,
        "held-out problems, in the same formats",
        decides_center=False,
        same_in_replicas=True,
        is_path=True,
    )
    tests: dict[str, str] = _setting(
        {},
        "math, jsonl: more test sets by name, for shardes evaluate --split NAME",
        decides_center=False,
        is_path=True,
    )
    template: str | None = _setting(
        None,
        "jsonl: the prompt; {field} inserts a field of the example, {{ and }} are braces; "
        "null: the field task.prompt_field",
        decides_center=True,
    )
    prompt_field: str | None = _setting(
        None,
        "jsonl: the example's field that is the prompt, a text or a list of chat messages; "
        "null: prompt",
        limit=Limit("must be the name of a field", bool),
        decides_center=True,
    )
    chat: bool = _setting(
        True,
        "jsonl: true: put the prompt as a user message into the chat template; false: raw text",
        decides_center=True,
    )
    system: str | None = _setting(
        None, "jsonl: a system message before the user's; null: none", decides_center=True
    )
    reward: str | None = _setting(
        None,
        "jsonl: my_module:function or my_reward.py:function; called with (response, example), it "
        "returns a number, or a dict with 'reward'; it may be async; a function named score_batch "
        "takes lists (responses, examples)",
        decides_center=True,
        is_path=True,
    )
    workers: int = _setting(
        4,
        "worker processes per replica that score responses (jsonl, and task classes with reward)",
        limit=at_least(1),
        decides_center=False,
    )
    concurrency: int = _setting(
        8,
        "calls of an async reward function that are in flight at once in each worker",
        limit=at_least(1),
        decides_center=False,
    )
    timeout: float = _setting(
        10.0,
        "seconds that one call of the reward function may take; then its worker is killed",
        limit=POSITIVE,
        decides_center=False,
    )
    memory: float = _setting(
        8.0,
        "gigabytes that one worker process may allocate",
        limit=POSITIVE,
        decides_center=False,
    )
    on_error: str = _setting(
        "fail",
        "if a worker cannot score a response: fail ends the run; a number becomes its reward",
        limit=Limit(
            f"must be fail, or the reward of a response that cannot be scored: {REWARD_RANGE}",
            lambda value: value == "fail" or is_reward_text(value),
        ),
        decides_center=True,
    )
    prompts_per_iteration: int | None = _setting(
        None,
        "training prompts per iteration, the same for every member, reshuffled each epoch; "
        "null: all",
        limit=at_least(1),
        decides_center=True,
    )


@dataclass
class EvalConfig:
    every: int = _setting(
        10,
        "iterations between evaluations of the center; 0: only at the start and the end",
        limit=at_least(0),
        same_in_replicas=True,
    )
    prompts: int | None = _setting(
        None,
        "held-out prompts that an evaluation during training asks, always the same; null: all",
        limit=at_least(1),
        same_in_replicas=True,
    )


@dataclass
class CheckpointConfig:
    every: int = _setting(
        20,
        "iterations between snapshots of the center, also taken at the end; 0: no snapshots",
        limit=at_least(0),
    )
    keep: int = _setting(2, "number of newest snapshots to keep", limit=at_least(1))
    shard_size: str = _setting(
        "5GB",
        "largest size of one safetensors file of a snapshot",
        limit=Limit("must be a size such as 5GB or 500MB", is_size),
    )
    best: bool = _setting(
        False, "also keep the center with the best held-out reward, as snapshots/best"
    )
    verify_every: int = _setting(
        10,
        "iterations between comparisons of the replicas' centers (es.restore=copy); 0: never",
        limit=at_least(0),
    )


@dataclass
class ReplicasConfig:
    port: int | None = _setting(
        None,
        "port of the primary job, where other launches can join this run as replicas; "
        "0: any free port; null: no one can join",
        limit=Limit("must be from 0 to 65535, or null", lambda value: 0 <= value < 65536),
    )
    host: str | None = _setting(
        None,
        "address that the primary job listens on and gives to joined replicas; null: all addresses",
    )
    join: str | None = _setting(
        None,
        "HOST:PORT of the primary job of a run that this launch joins, as one more replica",
        limit=Limit(
            "must be written HOST:PORT, as the run to join prints it",
            is_address,
        ),
    )
    timeout: float = _setting(
        60.0,
        "seconds without a heartbeat after which another replica evaluates a replica's member",
        limit=POSITIVE,
    )


@dataclass
class ResumeConfig:
    source: str = _setting(
        "auto",
        "auto: resume if run.dir has a journal; never: refuse to; or a run directory or snapshot, "
        "from whose journal this run starts (also written resume=...)",
        is_path=True,
    )
    allow_changes: list[str] = _setting(
        [], "settings that decide the center and may differ from those in the journal"
    )


@dataclass
class RunConfig:
    dir: str = _setting(
        MISSING,
        "run directory: config, metrics, journal, samples, snapshots, TensorBoard files",
        limit=required("where the run is written"),
        is_path=True,
    )
    timeout: float = _setting(
        1800.0,
        "seconds that a rank waits for another rank before it ends the run",
        limit=at_least(1),
    )


@dataclass
class TrackingConfig:
    loggers: list[str] = _setting(
        ["tensorboard"],
        "loggers besides metrics.jsonl: tensorboard, wandb, or your own as logger.py:Class",
        is_path=True,
    )


@dataclass
class Config:
    engine: EngineName = _setting(
        EngineName.deepspeed,
        "engine that holds the model: deepspeed (ZeRO-3 × AutoTP), "
        "fsdp (FSDP2 × transformers' tensor parallel) or vllm (vLLM and its tensor parallelism)",
    )
    model: ModelConfig = field(default_factory=ModelConfig)
    sharding: ShardingConfig = field(default_factory=ShardingConfig)
    es: ESConfig = field(default_factory=ESConfig)
    center: CenterConfig = field(default_factory=CenterConfig)
    generation: GenerationConfig = field(default_factory=GenerationConfig)
    vllm: VLLMConfig = field(default_factory=VLLMConfig)
    task: TaskConfig = field(default_factory=TaskConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    replicas: ReplicasConfig = field(default_factory=ReplicasConfig)
    resume: ResumeConfig = field(default_factory=ResumeConfig)
    run: RunConfig = field(default_factory=RunConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    profile: bool = _setting(
        False, "write torch.profiler traces of the second iteration to run.dir, for Perfetto"
    )


def _declared(config: Any, prefix: str = "") -> dict[str, Setting]:
    settings: dict[str, Setting] = {}
    for entry in fields(config):
        if is_dataclass(entry.type):
            settings |= _declared(entry.type, f"{prefix}{entry.name}.")
        else:
            settings[prefix + entry.name] = entry.metadata["setting"]
    return settings


SETTINGS = _declared(Config)  # by dotted key, in the order of declaration

# The settings that decide the center, given the model and the machine, in the journal's order
CENTER_SETTINGS = [key for key, setting in SETTINGS.items() if setting.decides_center is True]
# The settings that decide it besides, if σ or α has a schedule
SCHEDULED_CENTER_SETTINGS = [
    key for key, setting in SETTINGS.items() if setting.decides_center == "scheduled"
]
# The settings that all replicas of a run must share
REPLICA_SETTINGS = [
    *CENTER_SETTINGS,
    *(key for key, setting in SETTINGS.items() if setting.same_in_replicas),
]


def help_text() -> str:
    """One line per key: name, default, help."""
    lines = [
        f"  {key:<28} {shown(setting.default):<10} {setting.help}"
        for key, setting in SETTINGS.items()
    ]
    return "\n".join(lines)


def shown(default: Any) -> str:
    """A default value as help texts show it."""
    if default is None:
        return "null"
    if default == MISSING:
        return "required"
    if isinstance(default, bool):
        return str(default).lower()
    return default.value if isinstance(default, Enum) else str(default)
