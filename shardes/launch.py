"""What a rank needs before it works: cheap checks, its prompts, its part of a replica."""

import os
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime
from inspect import signature
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from shardes.answers import Answers, InPlace, MembersTogether, OneBatch
from shardes.clock import Clock
from shardes.config import loading
from shardes.config.schema import Config, EngineName, ESConfig, GenerationConfig
from shardes.distributed.hosts import check_launcher
from shardes.distributed.world import Job, World, form_replica
from shardes.engines import Engine, build, check_model, open_model
from shardes.engines.attention import check_attention
from shardes.engines.vllm import VLLMEngine, check_context, check_processors, check_vllm
from shardes.errors import ConfigError, mistakes_in, one_line
from shardes.es.adapted_members import AdaptedMembers, adapter_slots, check_adapters
from shardes.es.center import Center, open_center
from shardes.es.matrix_layers import check_members_can_share
from shardes.es.population import check_rank, noise_rank
from shardes.es.rule import Rule, load_rule
from shardes.es.side_by_side import SideBySide, answer_side_by_side
from shardes.es.staging import center_device
from shardes.es.update import evolves
from shardes.inference.decode_graph import check_static_decoding
from shardes.inference.engine_generation import Generation, ModuleGeneration
from shardes.inference.generation import Decoder, decoder
from shardes.inference.limits import beyond_context, check_decoding, check_prompts
from shardes.inference.processors import checkpoint_generation_config
from shardes.inference.prompts import encode
from shardes.inference.sampler import Sampler
from shardes.inference.vllm_generation import VLLMGeneration, check_rotary
from shardes.reporting import loggers
from shardes.reporting.progress import slow_step
from shardes.sharding.model_directory import model_directory, open_tokenizer
from shardes.sharding.weight_files import WeightFiles
from shardes.tasks import Task, configured_task, prompts_of

# In the names of classes whose modules text does not use
MODALITIES = re.compile("Vision|Audio|Image|Video|Siglip|MultiModal|Multimodal")
BUILDING = {  # what is waited for, while the engine is built
    EngineName.deepspeed: "building the model with DeepSpeed, which compiles its operators at its "
    "first start on a host (engine=fsdp compiles nothing)",
    EngineName.fsdp: "building the model with FSDP",
    EngineName.vllm: "building the model with vLLM, which compiles it unless vllm.enforce_eager is "
    "true",
}


@dataclass
class PreparedRun:
    """What the cheap checks leave ready."""

    config: Config
    replicas: int  # of this job
    files: WeightFiles
    module: PreTrainedModel  # without storage
    tokenizer: PreTrainedTokenizerBase
    task: Task
    decoder: Decoder
    rule: Rule | None  # es.update
    sources: dict[str, str] = field(default_factory=dict, kw_only=True)  # see `run_sources`
    longest: int = field(default=0, kw_only=True)  # tokens of an encoded prompt and its response

    def abandon(self) -> None:
        """Leave everything as it was: another rank cannot start."""


@dataclass(frozen=True)
class Replica:
    """This rank's part of a replica, with weights: the center, and what lets members answer."""

    world: World
    sampler: Sampler
    center: Center
    answers: Answers


def check(config: Config, job: Job, task: Task | None = None) -> PreparedRun:
    """Check all that can be checked before heavy work.

    Args:
        task: the user's object, in place of the task that the settings name.

    Raises:
        ConfigError: the run cannot start.
    """
    check_launcher()
    if config.engine is EngineName.vllm:
        check_vllm(config)
    replicas = loading.check_layout(config, job.size)
    task = configured_task(config.task, task)
    _check_task_takes_numbers(config, task)
    loggers.check(config.tracking.loggers)
    files, module = _open_module(config, job)
    with mistakes_in(f"model.path={files.directory}"):
        check_model(config, module)
        tokenizer = open_tokenizer(files.directory, config.model.trust_remote_code)
        check_decoding(config.model.path, module)
        check_static_decoding(config, module)
        decode = _decoder(config.generation, files.directory, module, tokenizer)
    if config.engine is EngineName.vllm:
        check_processors(decode.applied)
        check_rotary(config, module)
    rule = load_rule(config.es.update)
    return PreparedRun(config, replicas, files, module, tokenizer, task, decode, rule)


def _open_module(config: Config, job: Job) -> tuple[WeightFiles, PreTrainedModel]:
    """The model's files and its module on the meta device, which members can be made of."""
    directory = model_directory(config.model.path)
    trusted = config.model.trust_remote_code
    if trusted and job.rank == 0:
        warn(
            f"model.trust_remote_code=true: Python code that comes with {config.model.path} "
            "runs on every rank, with all permissions of this user"
        )
    check_attention(config.model)
    dtype = getattr(torch, config.model.dtype.value)
    files, module = open_model(directory, dtype, trusted, config.model.attention)
    for warning in files.warnings if job.rank == 0 else ():
        warn(warning)
    _check_evolve(config, module)
    if job.rank == 0:
        _warn_of_unused(config, module)
    check_rank(config.es, ((name, tuple(p.shape)) for name, p in module.named_parameters()))
    if answer_side_by_side(config.es):
        check_members_can_share(module, config.es)
        if config.engine is EngineName.vllm:
            check_adapters(module, config.es)
    return files, module


def _decoder(
    settings: GenerationConfig,
    directory: Path,
    module: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
) -> Decoder:
    """The decoder of the settings and of the checkpoint's own generation config."""
    generation = checkpoint_generation_config(
        directory, module, settings.max_new_tokens, settings.logits_processors
    )
    return decoder(
        tokenizer,
        generation,
        max_new_tokens=settings.max_new_tokens,
        stop=settings.stop,
        batch_tokens=settings.batch_tokens,
        logits_processors=settings.logits_processors,
        decode=settings.decode,
    )


def unused_by_text(module: PreTrainedModel, es: ESConfig) -> list[str]:
    """The trained parameters of the model's parts for images, video and audio, by name."""
    parts = [
        f"{name}."
        for name, part in module.named_modules()
        if MODALITIES.search(type(part).__name__) and name
    ]
    return [
        name
        for name, param in module.named_parameters()
        if name.startswith(tuple(parts))
        and evolves(es.evolve, noise_rank(es), name, tuple(param.shape))
    ]


def _warn_of_unused(config: Config, module: PreTrainedModel) -> None:
    if unused := unused_by_text(module, config.es):
        warn(
            f"model.path={config.model.path}: text prompts do not use {unused[0]} and "
            f"{len(unused) - 1} other parameters for images or audio, and members change these "
            "too; es.evolve can leave them out"
        )


def _check_evolve(config: Config, module: PreTrainedModel) -> None:
    pattern, names = config.es.evolve, [name for name, _ in module.named_parameters()]
    rank = noise_rank(config.es)
    if not any(evolves(pattern, rank, n, tuple(p.shape)) for n, p in module.named_parameters()):
        raise ConfigError(
            f"es.evolve={pattern}: matches none of the {len(names)} parameters of "
            f"{config.model.path}, such as {names[0]} and {names[-1]}; nothing would be trained"
        )


def _check_task_takes_numbers(config: Config, task: Task) -> None:
    """Raise ConfigError if the task must be told which prompts were asked, and cannot be."""
    asked: dict[str, tuple[int | None, tuple[str, ...]]] = {
        "task.prompts_per_iteration": (config.task.prompts_per_iteration, ("score",)),
        "eval.prompts": (config.eval.prompts, ("score", "correct")),
    }
    for key, (value, methods) in asked.items():
        for name in methods:
            if value is None or not hasattr(task, name):
                continue
            try:
                signature(getattr(task, name)).bind("train", [], [])
            except TypeError:
                raise ConfigError(
                    f"{key}: the task's {name} must take the numbers of the prompts as a third "
                    f"argument: {name}(split, responses, which=None); see shardes.tasks.Task"
                ) from None


def encode_split(prepared: PreparedRun, split: str, date: datetime) -> list[list[int]]:
    """The token ids of a split's prompts. Warns of those beyond the model's context.

    Raises:
        ConfigError: a prompt cannot be encoded, or the model cannot take it.
    """
    model, new_tokens = prepared.config.model.path, prepared.config.generation.max_new_tokens
    prompts = encode(prepared.tokenizer, prompts_of(prepared.task, split), date)
    longest = max(map(len, prompts), default=0) + new_tokens
    prepared.longest = max(prepared.longest, longest)
    with mistakes_in(f"model.path={model}"):
        check_prompts(model, prepared.module, split, prompts, new_tokens)
        if prepared.config.engine is EngineName.vllm:
            check_context(prepared.config, prepared.module, split, prompts)
        warning = beyond_context(model, prepared.module, split, prompts, new_tokens)
    if warning and os.environ.get("RANK", "0") == "0":  # the other ranks have the same prompts
        warn(warning)
    return prompts


def shared_date(job: Job, read: Callable[[], str]) -> datetime:
    """The date that chat templates show: the one that `read` returns on rank 0, or else now.

    Every rank calls this; only rank 0 calls `read`, which returns a date in ISO format or "".
    """
    date = (read() if job.rank == 0 else "") or now()
    if job.size > 1:
        if job.rank == 0:
            job.keys.set_date(date)
        date = job.keys.date()
    return datetime.fromisoformat(date)


def now() -> str:
    """The present local date and time, in ISO format."""
    return datetime.now().isoformat(timespec="seconds")


def build_replica(
    job: Job,
    prepared: PreparedRun,
    clock: Clock | None = None,
    joined: tuple[int, int] | None = None,
) -> tuple[World, Engine, Sampler]:
    """This rank's world, its engine with weights not yet loaded, and the replica's sampler.

    Args:
        joined: this replica's number in the run that the job joined, and the number of replicas of
            the run's primary job.
    """
    sharding, timeout = prepared.config.sharding, prepared.config.run.timeout
    number, replicas = joined or (None, prepared.replicas)
    world = form_replica(job, replicas, sharding.shard, sharding.tensor, timeout, number)
    with slow_step(BUILDING[prepared.config.engine], job.rank == 0):
        engine, generation = _engine(prepared, world, clock)
    return world, engine, Sampler(world, generation, prepared.tokenizer, clock)


def _engine(prepared: PreparedRun, world: World, clock: Clock | None) -> tuple[Engine, Generation]:
    """The configured engine, its weights not yet loaded, and its generation."""
    config, module = prepared.config, prepared.module
    if config.engine is EngineName.vllm:
        slots = adapter_slots(config.es)
        vllm = VLLMEngine(config, module, prepared.files, world, slots, prepared.longest)
        generation = VLLMGeneration(vllm, prepared.decoder, clock)
        generation.check_writes()
        return vllm, generation
    engine = build(config, module, world)
    return engine, ModuleGeneration(world, engine, prepared.decoder, clock)


def _members_together(engine: Engine, prepared: PreparedRun) -> MembersTogether:
    es, module = prepared.config.es, prepared.module
    if isinstance(engine, VLLMEngine):
        adapted = AdaptedMembers(module, engine, es)
        adapted.check(VLLMGeneration(engine, prepared.decoder))
        return adapted
    return SideBySide(module, engine.shards, engine.device, es.rank, es.evolve)


def open_replica(
    job: Job,
    prepared: PreparedRun,
    source: Callable[[], WeightFiles],
    clock: Clock,
    joined: tuple[int, int] | None = None,
) -> Replica:
    """This rank's part of a replica, whose center is read from the files that `source` returns.

    Args:
        joined: see `build_replica`.
    """
    world, engine, sampler = build_replica(job, prepared, clock, joined)
    config, es, rule = prepared.config, prepared.config.es, prepared.rule
    together = _members_together(engine, prepared) if answer_side_by_side(es) else None
    files = source()
    with slow_step(f"loading the weights of {files.directory}", job.rank == 0):
        center = open_center(
            es.restore,
            engine.shards,
            world,
            files,
            prepared.files,
            es.evolve,
            clock,
            noise_rank(es),
            center_device(
                config,
                world,
                engine.shards,
                prepared.module.config,
                rule.buffers if rule else 0,
            ),
            rule,
        )
    answers: Answers = (
        OneBatch(config, world, center, sampler, together, clock)
        if together
        else InPlace(center, sampler)
    )
    return Replica(world, sampler, center, answers)


def warn(message: str) -> None:
    print(f"WARNING: {one_line(message)}", file=sys.stderr, flush=True)
