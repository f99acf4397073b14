"""Does a run fit, and what will it take: from the config and the model's config.json, before a GPU hour is spent.

    shardes plan CONFIG.yaml --gpus 8 --gpu-memory 80GB [--nodes 2] [key=value ...]

`python tools/plan.py` is the same.

Exit codes: 0 it fits, 1 it does not (the suggestion is shown, if there is one), 2 the user's mistake.
"""

import argparse
import json
import re
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

from shardes import environment

environment.prepare()
with environment.quiet():
    import deepspeed  # noqa: F401

from rich.console import Console  # noqa: E402
from rich.table import Table  # noqa: E402

from shardes import estimate, settings  # noqa: E402
from shardes.commands.arguments import Parser  # noqa: E402
from shardes.config import Config, ConfigError  # noqa: E402
from shardes.engines import check_model  # noqa: E402
from shardes.estimate import DEVICES, Device  # noqa: E402
from shardes.generation import Prompt, encode  # noqa: E402
from shardes.plan import Layout, Machine, Work, config_file, layouts, memory, read_model  # noqa: E402
from shardes.tasks import configured_task  # noqa: E402

UNITS = {"KB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}
CHARACTERS = 3  # of a prompt per token, where there is no tokenizer; SmolLM2's has 3.4 in Countdown's prompts
FIGURES = {
    "memory": "bytes per second from the GPU's memory",
    "flops": "dense bfloat16 operations per second",
    "link": "bytes per second between GPUs of a node, each way",
    "network": "bytes per second and GPU between nodes, each way",
    "host": "bytes per second between a GPU and its host, each way",
    "normals": "values of ε per second from the noise kernel",
    "latency": "seconds that a sum over ranks takes at least",
}
WORDS = "a model from data-sheet figures, not measured on GPUs: read the times as “at least”"


def size(text: str, flag: str) -> int:
    """A number of bytes written as 80GB or 2TiB."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?) ?([KMGT]i?B)", text)
    if not found or not float(found[1]):
        raise ConfigError(f"{flag} {text}: must be a size such as 80GB, 500MB or 2TB")
    return int(float(found[1]) * UNITS[found[2]])


def work_of(config: Config, prompts: int | None, prompt_tokens: int | None) -> Work:
    """What the config's task asks; lengths by the model's tokenizer where there is one, or as they are given."""
    generation = config.generation
    if prompts is not None and prompt_tokens is not None:
        lengths = {"train": [prompt_tokens] * prompts, "test": []}
    else:
        loaded = configured_task(config.task)
        asked = {split: loaded.prompts(split) for split in ("train", "test")}
        lengths = {split: _lengths(config.model.path, found) for split, found in asked.items()}
        if prompt_tokens is not None:
            lengths = {split: [prompt_tokens] * len(found) for split, found in lengths.items()}
        if prompts is not None:
            lengths["train"] = [max(lengths["train"])] * prompts
    size = config.task.prompts_per_iteration
    if size is not None:
        lengths["train"] = sorted(lengths["train"])[-size:]  # the longest that a batch may draw
    train, test = tuple(lengths["train"]), tuple(lengths["test"])
    return Work(train, test, generation.max_new_tokens, generation.batch_tokens)


def _lengths(path: str, prompts: Sequence[Prompt]) -> list[int]:
    directory = Path(path)
    if directory.is_dir() and any(directory.glob("tokenizer*")):
        from transformers import AutoTokenizer

        return list(map(len, encode(AutoTokenizer.from_pretrained(directory, trust_remote_code=False), prompts)))
    texts = (p if isinstance(p, str) else "".join(message["content"] for message in p) for p in prompts)
    return [-(-len(text) // CHARACTERS) for text in texts]


class Planner:
    """Judges layouts of one config on one machine. `device` is None where no times are known."""

    def __init__(self, config: Config, work: Work, machine: Machine, device: Device | None, response: int):
        self.config, self.work, self.machine, self.device, self.response = config, work, machine, device, response
        self.model, self.module = read_model(config)

    def judge(self, layout: Layout) -> dict:
        """Everything about a layout, as JSON has it; on CPUs and GPUs of unknown speed "seconds" is None."""
        es = self.config.es
        need = memory(self.model, layout, self.work, es.restore, self.machine.gpu_memory)
        found = {
            "layout": {key: getattr(value, "value", value) for key, value in asdict(layout).items()},
            "fits": need.fits(self.machine),
            "gpu": need.gpu,
            "host": need.host,
            "gpu_total": sum(need.gpu.values()),
            "host_total_per_node": need.node(self.machine),
            "members_per_replica": estimate.members(layout, es.population_size),
            "network": asdict(estimate.traffic(self.model, layout, self.work, es.population_size, self.response)),
            "seconds": None,
        }
        if self.device:
            parts = estimate.seconds(
                self.model, layout, self.work, es.restore, es.population_size, self.response, self.device, self.machine
            )
            found["seconds"] = asdict(parts) | {"total": parts.total}
        return found

    def suggest(self) -> Layout | None:
        """The layout to take, of those that fit: the preferred one, unless another is a tenth faster."""
        best: tuple[Layout, float] | None = None
        for layout in layouts(self.config, self.module, self.machine):
            judged = self.judge(layout)
            if not judged["fits"]:
                continue
            took = judged["seconds"]["total"] if judged["seconds"] else 0.0
            gathers = layout.shard > 1
            if best is None or (took < 0.9 * best[1] and gathers == (best[0].shard > 1)
                                and layout.gather is best[0].gather):  # fmt: skip
                best = layout, took
        return best[0] if best else None

    def nodes_needed(self) -> int | None:
        """The fewest nodes, by doubling, on which anything fits."""
        machine = self.machine
        try:
            for _ in range(7):
                self.machine = replace(self.machine, nodes=2 * self.machine.nodes)
                if self.suggest():
                    return self.machine.nodes
            return None
        finally:
            self.machine = machine


def configured(config: Config, planner: Planner) -> Layout:
    """The config's own layout; ConfigError where it does not divide the machine, or the engine cannot take it."""
    try:
        replicas = settings.check_layout(config, planner.machine.ranks)
    except ConfigError as error:
        raise ConfigError(str(error).replace("ranks that were started", "GPUs")) from None
    check_model(config, planner.module)
    sharding = config.sharding
    return Layout(replicas, sharding.shard, sharding.tensor, sharding.gather, sharding.offload)


def show(console: Console, planner: Planner, plans: dict[str, tuple[Layout, dict]]) -> None:
    model, machine, work = planner.model, planner.machine, planner.work
    where = "ranks on CPUs" if machine.gpu_memory is None else f"GPUs of {machine.gpu_memory / 1e9:.0f} GB"
    table = Table(
        "", *(f"{title}\n{layout}" for title, (layout, _) in plans.items()), caption=WORDS if planner.device else None
    )
    table.title = (
        f"{planner.config.model.path}: {model.numel / 1e9:.2f} billion parameters, {machine.nodes} × "
        f"{machine.per_node} {where}; replicas × shard × tensor"
    )
    found = [judged for _, judged in plans.values()]
    for place, name in (("gpu", "GPU"), ("host", "host")):
        for part in found[0][place] | found[-1][place]:
            table.add_row(f"{name}: {part}", *(shown_bytes(judged[place].get(part, 0)) for judged in found))
    if machine.gpu_memory is not None:
        table.add_row(
            "GPU in all", *(f"{shown_bytes(j['gpu_total'])} of {shown_bytes(machine.gpu_memory)}" for j in found)
        )
    limit = shown_bytes(machine.host_memory)
    table.add_row("host in all, per node", *(f"{shown_bytes(j['host_total_per_node'])} of {limit}" for j in found))
    table.add_row("fits", *("yes" if judged["fits"] else "NO" for judged in found), end_section=True)
    table.add_row("replicas ↔ store, per iteration", *(shown_bytes(judged["network"]["replicas"]) for judged in found))
    for key, name in (
        ("reduced_per_token", "sums within a replica, per token"),
        ("reduced", "the same, per iteration"),
        ("gathered_per_member", "gathers within a replica, per member"),
        ("gathered", "the same, per iteration"),
    ):
        table.add_row(f"{name} (sent by a rank)", *(shown_bytes(judged["network"][key]) for judged in found))
    table.columns[0].no_wrap = True
    if planner.device:
        table.add_section()
        for part in found[0]["seconds"]:
            name = "an iteration, at least" if part == "total" else part
            table.add_row(name, *(f"{judged['seconds'][part]:.1f} s" for judged in found))
    console.print(table)
    console.print(
        f"{planner.config.es.population_size} members, {len(work.train)} prompts of up to {max(work.train)} tokens, "
        f"responses of {planner.response} tokens; evaluations of the center are not counted."
    )


def shown_bytes(count: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"


def parse(argv: list[str]) -> argparse.Namespace:
    parser = Parser("plan", __doc__)
    add = parser.add_argument
    add("config", metavar="CONFIG.yaml", nargs="?", help="settings; see configs/")
    add("overrides", metavar="key=value", nargs="*", help="settings that override the file's")
    add("--gpus", type=int, default=8, help="GPUs per node (default 8); with --device cpu: ranks per node")
    add("--nodes", type=int, default=1, help="nodes (default 1)")
    add("--gpu-memory", metavar="80GB", help="memory of one GPU; needed but for --device cpu")
    add("--host-memory", metavar="2TB", default="2TB", help="memory of one node's host (default 2TB, as a DGX H100's)")
    add("--device", choices=[*DEVICES, "cpu"], default="h100", help="whose figures to take (default h100): those "
        "of vendors' data sheets for SXM GPUs, DGX networks; normals per second and latency are assumed")  # fmt: skip
    for figure, meaning in FIGURES.items():
        default = getattr(DEVICES["h100"], figure)
        add(f"--{figure}", type=float, metavar="X", help=f"{meaning} (h100: {default:.4g})")
    add("--prompts", type=int, help="training prompts per iteration (default: the task's)")
    add("--prompt-tokens", type=int, help="tokens of a prompt (default: by the model's tokenizer; where there is none, "
        f"{CHARACTERS} characters make one); with --prompts too, the task is not opened")  # fmt: skip
    add("--response-tokens", type=int, help="tokens of a response (default: generation.max_new_tokens, the longest)")
    add("--json", action="store_true", help="print JSON")
    return parser.parse_intermixed_args(argv)


def plan(options: argparse.Namespace, console: Console) -> int:
    if options.config is None:
        raise ConfigError("CONFIG.yaml is missing; see --help")
    on_cpu = options.device == "cpu"
    for flag in ("gpus", "nodes", "prompts", "prompt_tokens", "response_tokens"):
        if getattr(options, flag) is not None and getattr(options, flag) < 1:
            raise ConfigError(f"--{flag.replace('_', '-')} {getattr(options, flag)}: must be at least 1")
    if options.gpu_memory is None and not on_cpu:
        raise ConfigError("--gpu-memory is missing: one GPU's memory, such as 80GB")
    config = settings.load(options.config, options.overrides)
    gpu = None if on_cpu else size(options.gpu_memory, "--gpu-memory")
    machine = Machine(options.nodes, options.gpus, gpu, size(options.host_memory, "--host-memory"))
    device = None
    if not on_cpu:
        given = {name: getattr(options, name) for name in FIGURES}
        for name, value in given.items():
            if value is not None and value <= 0:
                raise ConfigError(f"--{name} {value}: must be positive")
        device = replace(DEVICES[options.device], **{name: value for name, value in given.items() if value})
    config_file(config.model.path)
    work = work_of(config, options.prompts, options.prompt_tokens)
    response = min(options.response_tokens or work.max_new_tokens, work.max_new_tokens)
    planner = Planner(config, work, machine, device, response)
    own = configured(config, planner)
    plans = {"configured": (own, planner.judge(own))}
    fits = plans["configured"][1]["fits"]
    suggestion = planner.suggest()
    if suggestion and suggestion != own:
        plans["suggested"] = suggestion, planner.judge(suggestion)
    if options.json:
        print(json.dumps({"note": WORDS} | {title: judged for title, (_, judged) in plans.items()}, indent=2))
        return 0 if fits else 1
    show(console, planner, plans)
    if suggestion and suggestion != own:
        keys = f"sharding.shard={suggestion.shard} sharding.tensor={suggestion.tensor}"
        console.print(f"suggested: {keys} sharding.gather={suggestion.gather.value} sharding.offload=none")
    elif suggestion is None:
        nodes = planner.nodes_needed()
        console.print(f"no layout fits; {nodes} such nodes would do" if nodes else "no layout fits")
    return 0 if fits else 1


def main(argv: list[str]) -> int:
    console = Console(highlight=False, markup=False, width=None if sys.stdout.isatty() else 150)
    try:
        return plan(parse(argv), console)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    environment.run(main)
