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
import sys
from dataclasses import replace

from rich.console import Console

from shardes.commands.arguments import CommandParser, reports_errors
from shardes.commands.plan_table import print_plans
from shardes.config import loading as settings
from shardes.config.schema import Config
from shardes.distributed import environment
from shardes.errors import ConfigError, unusable_files
from shardes.planning.devices import GPUS
from shardes.planning.search import HOST_MEMORY, RATES, Found, Situation, find_plans
from shardes.planning.workload import CHARACTERS_PER_TOKEN
from shardes.reporting.progress import slow_step

KNOWN = (  # the flags that are fields of Situation
    "gpus",
    "nodes",
    "gpu",
    "gpu_memory",
    "host_memory",
    "prompts",
    "prompt_tokens",
    "response_tokens",
)
WITHOUT_CONFIG = (
    "without a config: the defaults of shardes train with task.name=countdown; key=value changes "
    "them: N = {es.population_size}, {es.iterations} iterations, "
    "{generation.max_new_tokens} new tokens, {model.dtype.value}"
)


@reports_errors
@unusable_files()
def main(argv: list[str]) -> int:
    console = Console(highlight=False, markup=False, width=None if sys.stdout.isatty() else 150)
    return run(parse(argv), console)


def find(options: argparse.Namespace) -> Found:
    known = {name: getattr(options, name) for name in KNOWN}
    situation = Situation(**known, rates={name: getattr(options, name) for name in RATES})
    if options.model is None:
        if options.config is None:
            raise ConfigError("CONFIG.yaml or --model is missing; see --help")
        return find_plans(settings.load(options.config, options.overrides), situation)
    config = _without_file(options)
    found = find_plans(config, situation, is_configured=False)
    return replace(found, notes=[WITHOUT_CONFIG.format(**vars(config)), *found.notes])


def run(options: argparse.Namespace, console: Console) -> int:
    with slow_step("searching for the fastest settings"):
        found = find(options)
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


def _without_file(options: argparse.Namespace) -> Config:
    """The settings for --model: defaults, and the overrides, of which the first is in `config`."""
    overrides = [*filter(None, [options.config]), *options.overrides]
    given = [f"model.path={options.model}", "run.dir=runs/plan"]
    if not any(override.startswith("task.") for override in overrides):
        given.append("task.name=countdown")
    return settings.load(None, [*given, *overrides])


if __name__ == "__main__":
    environment.run(main)
