"""Estimate whether a run fits in memory, and its time, and search for the fastest settings.

    shardes plan CONFIG.yaml --gpus 8 --gpu H100 [--nodes 2] [key=value ...]
    shardes plan --model ID_OR_DIR --gpus 8 --gpu H100 [key=value ...]

It reads config.json of the model, but no weights. It searches layouts, engines, gathering,
offloading and batch sizes, and prints the best few with the settings to paste. Without a config
the settings are the defaults of `shardes train`, with the built-in Countdown problems.

Exit codes: 0 the configured settings fit (with --model: any do), 1 they do not, 2 a user error.
"""

import argparse
import json
import math
import os
import re
import sys
from dataclasses import dataclass
from typing import Any

from shardes.distributed import environment

with environment.quiet():
    import deepspeed  # noqa: F401

import torch
from rich.console import Console

from shardes.commands.arguments import CommandParser, reports_errors
from shardes.commands.plan_table import print_plans
from shardes.config import loading as settings
from shardes.config.schema import Config, EngineName
from shardes.errors import ConfigError, unusable_files
from shardes.planning.devices import GPUS, Device, gpu, measured_cpu, slowest_gpu, with_rates
from shardes.planning.layouts import Machine
from shardes.planning.planner import Plan, Planner
from shardes.planning.shapes import config_file
from shardes.planning.workload import CHARACTERS_PER_TOKEN, read_workload

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
WITHOUT_CONFIG = (
    "without a config: the defaults of shardes train with task.name=countdown; key=value changes "
    "them: N = {es.population_size}, {es.iterations} iterations, "
    "{generation.max_new_tokens} new tokens, {model.dtype.value}"
)
VLLM = (
    "engine=vllm: the times are those of the project's own decoder with batches of "
    "generation.batch_tokens. Memory does not count compiled code and CUDA graphs, and was "
    "compared with one run, on a CPU"
)


@reports_errors
@unusable_files()
def main(argv: list[str]) -> int:
    console = Console(highlight=False, markup=False, width=None if sys.stdout.isatty() else 150)
    return run(parse(argv), console)


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


def find_plans(options: argparse.Namespace, given: Config | None = None) -> Found:
    """Search as the options say.

    Args:
        given: the settings, in place of those that the options name.

    Raises:
        ConfigError: an option, or a setting, is not possible.
    """
    planner, notes = _planner(options, given)
    assessments: dict[str, dict[str, Any]] = {}
    configured = None if options.model else planner.configured()
    if configured:
        assessments["configured"] = planner.assess(configured)
    best = planner.search()
    if best and best[0] != configured:
        assessments["suggested"] = planner.assess(best[0])
    return Found(planner, assessments, best, notes)


def run(options: argparse.Namespace, console: Console) -> int:
    found = find_plans(options)
    if options.json:
        print(json.dumps(found.to_json(), indent=2))
        return 0 if found.fits else 1
    print_plans(console, found.planner, found.assessments, found.best)
    if not found.best:
        nodes = found.planner.nodes_needed()
        sufficient = f"; {nodes} such nodes would be enough" if nodes else ""
        console.print(f"nothing fits{sufficient}")
    for note in found.notes:
        console.print(note)
    return 0 if found.fits else 1


def parse(argv: list[str]) -> argparse.Namespace:
    parser = CommandParser("plan", __doc__)
    add = parser.add_argument
    add("config", metavar="CONFIG.yaml", nargs="?", help="settings; see configs/")
    add("overrides", metavar="key=value", nargs="*", help="settings that override the file's")
    add("--model", metavar="ID_OR_DIR", help="in place of a config: a model directory or hub id")
    gpus = "GPUs per node (default 8); with --gpu cpu: ranks per node"
    add("--gpus", type=int, default=8, help=gpus)
    add("--nodes", type=int, default=1, help="nodes (default 1)")
    card = (
        f"the card: {', '.join(GPUS)}; its memory and peak rates are from vendors' data sheets "
        "(normals per second, except the H100's, and latency are assumptions). cpu: this "
        "machine's, measured"
    )
    add("--gpu", metavar="NAME", help=card)
    gpu_memory = (
        "memory of one GPU (default: the card's). Without --gpu, the rates are those of the "
        "slowest card of this memory"
    )
    add("--gpu-memory", metavar="80GB", help=gpu_memory)
    host_memory = f"host memory of one node (default {HOST_MEMORY}; with --gpu cpu: this machine's)"
    add("--host-memory", metavar=HOST_MEMORY, help=host_memory)
    for rate, meaning in RATES.items():
        add(f"--{rate}", type=float, metavar="X", help=f"{meaning} (default: the card's)")
    add("--prompts", type=int, help="training prompts per iteration (default: the task's)")
    prompt_tokens = (
        "tokens of a prompt (default: counted by the model's tokenizer, or estimated from "
        f"{CHARACTERS_PER_TOKEN} characters per token if it has none); with --prompts too, the "
        "task is not loaded"
    )
    add("--prompt-tokens", type=int, help=prompt_tokens)
    response_tokens = "tokens of a response (default: generation.max_new_tokens, the longest)"
    add("--response-tokens", type=int, help=response_tokens)
    add("--json", action="store_true", help="print JSON")
    return parser.parse_intermixed_args(argv)


def _planner(options: argparse.Namespace, given: Config | None) -> tuple[Planner, list[str]]:
    """The planner, and notes on what it assumes."""
    for flag in RATES:
        value = getattr(options, flag)
        if value is not None and not 0 < value < math.inf:
            raise ConfigError(f"--{flag} {value}: must be positive")
    for flag, most in MOST.items():
        value = getattr(options, flag)
        if value is not None and not 1 <= value <= most:
            name = flag.replace("_", "-")
            raise ConfigError(f"--{name} {value}: must be at least 1 and at most {most}")
    config, notes = (given, []) if given else _config(options)
    longest = config.generation.max_new_tokens
    if options.response_tokens is not None and options.response_tokens > longest:
        raise ConfigError(
            f"--response-tokens {options.response_tokens}: no response is longer than "
            f"generation.max_new_tokens={longest}"
        )
    config_file(config.model.path)  # a wrong path is reported before the task is loaded
    device, note = _device(options, config)
    notes.append(note)
    if config.engine is EngineName.vllm:
        notes.append(VLLM)
    on_cpu = not device.capacity
    host_memory = _size(options.host_memory or HOST_MEMORY, "--host-memory")
    if on_cpu and not options.host_memory:
        host_memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    memory = None if on_cpu else device.capacity
    machine = Machine(options.nodes, options.gpus, memory, host_memory)
    workload = read_workload(config, options.prompts, options.prompt_tokens)
    response = options.response_tokens or longest
    return Planner(config, workload, machine, device, response), notes


def _config(options: argparse.Namespace) -> tuple[Config, list[str]]:
    if options.model is None:
        if options.config is None:
            raise ConfigError("CONFIG.yaml or --model is missing; see --help")
        return settings.load(options.config, options.overrides), []
    overrides = [*filter(None, [options.config]), *options.overrides]
    given = [f"model.path={options.model}", "run.dir=runs/plan"]
    if not any(override.startswith("task.") for override in overrides):
        given.append("task.name=countdown")
    config = settings.load(None, [*given, *overrides])
    return config, [WITHOUT_CONFIG.format(**vars(config))]


def _device(options: argparse.Namespace, config: Config) -> tuple[Device, str]:
    """The device, and what is to be known of its rates."""
    rates = {name: getattr(options, name) for name in RATES}
    memory = _size(options.gpu_memory, "--gpu-memory") if options.gpu_memory else None
    if options.gpu is None and memory is None:
        raise ConfigError(
            f"--gpu is missing: the card's name, one of {', '.join(GPUS)}, or cpu; or "
            "--gpu-memory, one GPU's memory, such as 80GB"
        )
    if (options.gpu or "").lower() == "cpu":
        if memory is not None:
            raise ConfigError(
                f"--gpu-memory {options.gpu_memory}: --gpu cpu has no GPUs; leave it out, or set "
                "--host-memory"
            )
        device = measured_cpu(options.gpus, getattr(torch, config.model.dtype.value))
        note = (
            f"rates of a rank, measured now on this machine: {device.bandwidth / 1e9:.3g} GB/s, "
            f"{device.flops / 1e9:.3g} GFLOP/s, {device.normals / 1e6:.3g}M values of ε per second"
        )
        return with_rates(device, rates), note
    name = options.gpu or slowest_gpu(memory or 0)
    device = gpu(name)
    rates["capacity"] = memory
    source = (
        f"{name}'s data sheet"
        if options.gpu
        else (f"{name}, the slowest card known with that memory (name yours with --gpu)")
    )
    note = (
        f"rates: peaks of {source}: {device.bandwidth / 1e9:.4g} GB/s, "
        f"{device.flops / 1e12:.4g} TFLOP/s, links {device.link / 1e9:.3g} GB/s. Not compared "
        "with runs on GPUs: read the times as “at least”"
    )
    return with_rates(device, rates), note


def _size(text: str, flag: str) -> int:
    """A number of bytes written as 80GB or 2TiB."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?) ?([KMGT]i?B)", text)
    size = float(match[1]) * UNITS[match[2]] if match else 0
    if not 1 <= size < 2**63:
        raise ConfigError(f"{flag} {text}: must be a size such as 80GB, 500MB or 2TB")
    return int(size)


if __name__ == "__main__":
    environment.run(main)
