"""Estimate whether a run fits in memory, and its time, from its config and the model's config.json.

    shardes plan CONFIG.yaml --gpus 8 --gpu-memory 80GB [--nodes 2] [key=value ...]

Exit codes: 0 the configured layout fits, 1 it does not (a layout that fits is suggested, if there
is one), 2 a user error.
"""

import argparse
import json
import re
import sys
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from shardes.distributed import environment

with environment.quiet():
    import deepspeed  # noqa: F401

from rich.console import Console
from rich.table import Table

from shardes.commands.arguments import CommandParser, reports_errors
from shardes.config import loading as settings
from shardes.config.schema import Noise
from shardes.errors import ConfigError, unusable_files
from shardes.planning.layouts import Layout, Machine
from shardes.planning.planner import Planner
from shardes.planning.shapes import config_file
from shardes.planning.time import DEVICES, Device
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
    "memory": "bytes per second from the GPU's memory",
    "flops": "dense bfloat16 operations per second",
    "link": "bytes per second between GPUs of a node, each way",
    "network": "bytes per second and GPU between nodes, each way",
    "host": "bytes per second between a GPU and its host, each way",
    "normals": "values of ε per second from the noise kernel",
    "latency": "seconds that a sum over ranks takes at least",
}
NOTE = "a model from data-sheet figures, not measured on GPUs: read the times as “at least”"
FULL_NOISE = (
    "all figures are those of es.noise=full: with low_rank, members that answer side by side take "
    "less time, and more memory for their rows"
)

Assessment = dict[str, Any]  # what Planner.assess returns
Assessments = dict[str, tuple[Layout, Assessment]]  # by title


@reports_errors
@unusable_files()
def main(argv: list[str]) -> int:
    console = Console(highlight=False, markup=False, width=None if sys.stdout.isatty() else 150)
    return run(parse(argv), console)


def run(options: argparse.Namespace, console: Console) -> int:
    planner = _planner(options)
    configured = planner.configured()
    assessments: Assessments = {"configured": (configured, planner.assess(configured))}
    fits = assessments["configured"][1]["fits"]
    suggested = planner.suggest()
    if suggested and suggested != configured:
        assessments["suggested"] = suggested, planner.assess(suggested)
    other_noise = FULL_NOISE if planner.config.es.noise is Noise.low_rank else ""
    if options.json:
        report = {title: assessment for title, (_, assessment) in assessments.items()}
        note = "; ".join(filter(None, [NOTE, other_noise]))
        print(json.dumps({"note": note} | report, indent=2))
        return 0 if fits else 1
    print_assessments(console, planner, assessments)
    if other_noise:
        console.print(other_noise)
    if suggested is None:
        nodes = planner.nodes_needed()
        sufficient = f"; {nodes} such nodes would be enough" if nodes else ""
        console.print(f"no layout fits{sufficient}")
    elif suggested != configured:
        console.print(
            f"suggested: sharding.shard={suggested.shard} sharding.tensor={suggested.tensor} "
            f"sharding.gather={suggested.gather.value} sharding.offload=none"
        )
    return 0 if fits else 1


def parse(argv: list[str]) -> argparse.Namespace:
    parser = CommandParser("plan", __doc__)
    add = parser.add_argument
    add("config", metavar="CONFIG.yaml", nargs="?", help="settings; see configs/")
    add("overrides", metavar="key=value", nargs="*", help="settings that override the file's")
    gpus = "GPUs per node (default 8); with --device cpu: ranks per node"
    add("--gpus", type=int, default=8, help=gpus)
    add("--nodes", type=int, default=1, help="nodes (default 1)")
    gpu_memory = "memory of one GPU; required unless --device is cpu"
    add("--gpu-memory", metavar="80GB", help=gpu_memory)
    host_memory = "host memory of one node (default 2TB, as in a DGX H100)"
    add("--host-memory", metavar="2TB", default="2TB", help=host_memory)
    device = (
        "the GPU whose rates are used (default h100), from vendors' data sheets for SXM GPUs and "
        "DGX networks; normals per second and latency are assumptions"
    )
    add("--device", choices=[*DEVICES, "cpu"], default="h100", help=device)
    for rate, meaning in RATES.items():
        default = getattr(DEVICES["h100"], rate)
        add(f"--{rate}", type=float, metavar="X", help=f"{meaning} (h100: {default:.4g})")
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


def _planner(options: argparse.Namespace) -> Planner:
    if options.config is None:
        raise ConfigError("CONFIG.yaml is missing; see --help")
    for flag in ("gpus", "nodes", "prompts", "prompt_tokens", "response_tokens"):
        value = getattr(options, flag)
        if value is not None and value < 1:
            raise ConfigError(f"--{flag.replace('_', '-')} {value}: must be at least 1")
    on_cpu = options.device == "cpu"
    if options.gpu_memory is None and not on_cpu:
        raise ConfigError("--gpu-memory is missing: one GPU's memory, such as 80GB")
    config = settings.load(options.config, options.overrides)
    gpu_memory = None if on_cpu else size(options.gpu_memory, "--gpu-memory")
    host_memory = size(options.host_memory, "--host-memory")
    machine = Machine(options.nodes, options.gpus, gpu_memory, host_memory)
    device = None if on_cpu else _device(options)
    config_file(config.model.path)  # a wrong path is reported before the task is loaded
    workload = read_workload(config, options.prompts, options.prompt_tokens)
    response = min(options.response_tokens or workload.max_new_tokens, workload.max_new_tokens)
    return Planner(config, workload, machine, device, response)


def _device(options: argparse.Namespace) -> Device:
    rates = {name: getattr(options, name) for name in RATES}
    for name, value in rates.items():
        if value is not None and value <= 0:
            raise ConfigError(f"--{name} {value}: must be positive")
    return replace(
        DEVICES[options.device], **{name: value for name, value in rates.items() if value}
    )


def size(text: str, flag: str) -> int:
    """A number of bytes written as 80GB or 2TiB."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?) ?([KMGT]i?B)", text)
    if not match or not float(match[1]):
        raise ConfigError(f"{flag} {text}: must be a size such as 80GB, 500MB or 2TB")
    return int(float(match[1]) * UNITS[match[2]])


def print_assessments(console: Console, planner: Planner, assessments: Assessments) -> None:
    model, machine, workload = planner.model, planner.machine, planner.workload
    ranks = (
        "ranks on CPUs"
        if machine.gpu_memory is None
        else f"GPUs of {machine.gpu_memory / 1e9:.0f} GB"
    )
    table = Table(
        "",
        *(f"{title}\n{layout}" for title, (layout, _) in assessments.items()),
        title=f"{planner.config.model.path}: {model.numel / 1e9:.2f} billion parameters, "
        f"{machine.nodes} × {machine.per_node} {ranks}; replicas × shard × tensor",
        caption=NOTE if planner.device else None,
    )
    columns = [assessment for _, assessment in assessments.values()]
    for name, cells in _memory_rows(columns, machine):
        table.add_row(name, *cells, end_section=name == "fits")
    for name, cells in _network_rows(columns):
        table.add_row(name, *cells)
    table.columns[0].no_wrap = True
    if planner.device:
        table.add_section()
        for part in columns[0]["seconds"]:
            name = "an iteration, at least" if part == "total" else part
            table.add_row(name, *(f"{column['seconds'][part]:.1f} s" for column in columns))
    console.print(table)
    console.print(
        f"{planner.config.es.population_size} members, {len(workload.train)} prompts of up to "
        f"{max(workload.train)} tokens, responses of {planner.response} tokens; evaluations of the "
        "center are not included."
    )


def _memory_rows(columns: list[Assessment], machine: Machine) -> Iterator[tuple[str, list[str]]]:
    for place, name in (("gpu", "GPU"), ("host", "host")):
        for part in columns[0][place] | columns[-1][place]:
            sizes = [shown_bytes(column[place].get(part, 0)) for column in columns]
            yield f"{name}: {part}", sizes
    if machine.gpu_memory is not None:
        limit = shown_bytes(machine.gpu_memory)
        sizes = [f"{shown_bytes(column['gpu_total'])} of {limit}" for column in columns]
        yield "GPU in all", sizes
    limit = shown_bytes(machine.host_memory)
    sizes = [f"{shown_bytes(column['host_total_per_node'])} of {limit}" for column in columns]
    yield "host in all, per node", sizes
    yield "fits", ["yes" if column["fits"] else "NO" for column in columns]


def _network_rows(columns: list[Assessment]) -> Iterator[tuple[str, list[str]]]:
    for key, name in (
        ("replicas", "replicas ↔ store, per iteration"),
        ("reduced_per_token", "sums within a replica, per token (sent by a rank)"),
        ("reduced", "the same, per iteration (sent by a rank)"),
        ("gathered_per_member", "gathers within a replica, per member (sent by a rank)"),
        ("gathered", "the same, per iteration (sent by a rank)"),
    ):
        yield name, [shown_bytes(column["network"][key]) for column in columns]


def shown_bytes(count: float) -> str:
    """A number of bytes with three digits and a unit."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"


if __name__ == "__main__":
    environment.run(main)
