"""The search for the fastest settings that fit, from what a user knows of model and machine."""

import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from shardes.config.schema import Config, EngineName
from shardes.errors import ConfigError
from shardes.planning.devices import GPUS, Device, gpu, measured_cpu, slowest_gpu, with_rates
from shardes.planning.layouts import Machine
from shardes.planning.planner import Plan, Planner
from shardes.planning.workload import read_workload
from shardes.sharding.model_directory import config_file

UNITS = {
    "KB": 1e3,
    "MB": 1e6,
    "GB": 1e9,
    "TB": 1e12,
    "KiB": 2**10,
    "MiB": 2**20,
    "GiB": 2**30,
    "TiB": 2**40,
}
RATES = {  # the fields of Device that have a flag
    "bandwidth": "bytes per second of the GPU's memory",
    "flops": "dense bfloat16 operations per second",
    "link": "bytes per second between GPUs of a node, each way",
    "network": "bytes per second and GPU between nodes, each way",
    "host": "bytes per second between a GPU and its host, each way",
    "normals": "values of ε per second from the noise kernel",
    "latency": "seconds that a sum over ranks takes at least",
}
MOST = {  # of the flags that count; more would only take long to compute
    "gpus": 1024,
    "nodes": 100_000,
    "prompts": 1_000_000,
    "prompt_tokens": 100_000_000,
    "response_tokens": 100_000_000,
}
HOST_MEMORY = "2TB"  # as in a DGX H100
VLLM = (
    "engine=vllm: the times are those of the project's own decoder with batches of "
    "generation.batch_tokens. Memory does not count compiled code and CUDA graphs, and was "
    "compared with one run, on a CPU"
)


@dataclass(frozen=True)
class Situation:
    """What is known of the machine and the task; None: the card's, the config's or the task's own.

    Attributes:
        gpus: per node; on CPUs, ranks.
        gpu: the card's name, or "cpu" for this machine.
        gpu_memory, host_memory: sizes such as "80GB", of one GPU and of one node.
        rates: of the card, by the names of `RATES`.
        prompts: training prompts per iteration.
        prompt_tokens, response_tokens: of each prompt and response.
    """

    gpus: int = 8
    nodes: int = 1
    gpu: str | None = None
    gpu_memory: str | None = None
    host_memory: str | None = None
    rates: Mapping[str, float | None] = field(default_factory=dict)
    prompts: int | None = None
    prompt_tokens: int | None = None
    response_tokens: int | None = None


@dataclass(frozen=True)
class Found:
    """What a search found: the configured and the suggested settings, and the best few."""

    planner: Planner
    assessments: dict[str, dict[str, Any]]
    best: list[Plan]
    notes: list[str]

    @property
    def fits(self) -> bool:
        """Whether the configured settings fit; without a config, whether any do."""
        configured = self.assessments.get("configured")
        return configured["fits"] if configured else bool(self.best)

    def to_json(self) -> dict[str, Any]:
        others = [self.planner.assess(plan) for plan in self.best]
        return {"notes": self.notes} | self.assessments | {"best": others}


def find_plans(config: Config, situation: Situation, is_configured: bool = True) -> Found:
    """Search for the fastest settings that fit.

    Args:
        is_configured: whether the settings are a user's, to be compared with what is found.

    Raises:
        ConfigError: a setting, or what is said of the machine, is not possible.
    """
    planner, notes = _planner(config, situation)
    assessments: dict[str, dict[str, Any]] = {}
    configured = planner.configured() if is_configured else None
    if configured:
        assessments["configured"] = planner.assess(configured)
    best = planner.search()
    if best and best[0] != configured:
        assessments["suggested"] = planner.assess(best[0])
    return Found(planner, assessments, best, notes)


def _planner(config: Config, known: Situation) -> tuple[Planner, list[str]]:
    """The planner, and notes on what it assumes."""
    _check(config, known)
    config_file(config.model.path)  # a wrong path is reported before the task is loaded
    device, note = _device(config, known)
    notes = [note] + [VLLM] * (config.engine is EngineName.vllm)
    on_cpu = not device.capacity
    host_memory = _size(known.host_memory or HOST_MEMORY, "--host-memory")
    if not (on_cpu or known.host_memory):
        notes.append(f"host memory: {HOST_MEMORY} per node, an assumption (--host-memory)")
    if on_cpu and not known.host_memory:
        host_memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    memory = None if on_cpu else device.capacity
    machine = Machine(known.nodes, known.gpus, memory, host_memory)
    workload = read_workload(config, known.prompts, known.prompt_tokens)
    response = known.response_tokens or config.generation.max_new_tokens
    return Planner(config, workload, machine, device, response), notes


def _check(config: Config, known: Situation) -> None:
    for flag, value in known.rates.items():
        if value is not None and not 0 < value < math.inf:
            raise ConfigError(f"--{flag} {value}: must be positive")
    for flag, most in MOST.items():
        value = getattr(known, flag)
        if value is not None and not 1 <= value <= most:
            name = flag.replace("_", "-")
            raise ConfigError(f"--{name} {value}: must be at least 1 and at most {most}")
    longest = config.generation.max_new_tokens
    if known.response_tokens is not None and known.response_tokens > longest:
        raise ConfigError(
            f"--response-tokens {known.response_tokens}: no response is longer than "
            f"generation.max_new_tokens={longest}"
        )


def _device(config: Config, known: Situation) -> tuple[Device, str]:
    """The device, and what is to be known of its rates."""
    memory = _size(known.gpu_memory, "--gpu-memory") if known.gpu_memory else None
    if known.gpu is None and memory is None:
        raise ConfigError(
            f"--gpu is missing: the card's name, one of {', '.join(GPUS)}, or cpu; or "
            "--gpu-memory, one GPU's memory, such as 80GB"
        )
    if (known.gpu or "").lower() == "cpu":
        if memory is not None:
            raise ConfigError(
                f"--gpu-memory {known.gpu_memory}: --gpu cpu has no GPUs; leave it out, or set "
                "--host-memory"
            )
        busy = os.getloadavg()[0]  # of the last minute, before anything is measured
        device = measured_cpu(known.gpus, getattr(torch, config.model.dtype.value))
        note = (
            f"rates of a rank, measured now on this machine: {device.bandwidth / 1e9:.3g} GB/s, "
            f"{device.flops / 1e9:.3g} GFLOP/s, {device.normals / 1e6:.3g}M values of ε per second"
        )
        if busy > 0.5:
            note += (
                f"; the machine was busy in the last minute (load {busy:.1f}), and so rates and "
                "times may be far off"
            )
        return with_rates(device, known.rates), note
    name = known.gpu or slowest_gpu(memory or 0)
    device = gpu(name)
    source = (
        f"{name}'s data sheet"
        if known.gpu
        else (f"{name}, the slowest card known with that memory (name yours with --gpu)")
    )
    note = (
        f"rates: peaks of {source}: {device.bandwidth / 1e9:.4g} GB/s, "
        f"{device.flops / 1e12:.4g} TFLOP/s, links {device.link / 1e9:.3g} GB/s. Not compared "
        "with runs on GPUs: read the times as “at least”"
    )
    return with_rates(device, {**known.rates, "capacity": memory}), note


def _size(text: str, flag: str) -> int:
    """A number of bytes written as 80GB or 2TiB."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?) ?([KMGT]i?B)", str(text))  # 80, from Python
    size = float(match[1]) * UNITS[match[2]] if match else 0
    if not 1 <= size < 2**63:
        raise ConfigError(f"{flag} {text}: must be a size such as 80GB, 500MB or 2TB")
    return int(size)
