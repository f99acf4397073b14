"""The printed output of `shardes plan`."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from shardes.planning.layouts import Machine
from shardes.planning.planner import Plan, Planner
from shardes.words import counted

Assessment = Mapping[str, Any]  # what Planner.assess returns


def print_plans(
    console: Console, planner: Planner, assessments: Mapping[str, Assessment], best: Sequence[Plan]
) -> None:
    """Print the assessments by title, the best plans, and the whole run."""
    if assessments:
        _print_assessments(console, planner, assessments)
        *_, last = assessments
        _print_run(console, last, assessments[last]["run"])
    for number, plan in enumerate(best):
        memory, seconds = planner.memory(plan), planner.estimate(plan).seconds().total
        used = sum(memory.gpu.values()) or memory.host_per_node(planner.machine)
        place = "GPU" if memory.gpu else "node"
        title = "suggested" if number == 0 else f"{number + 1}."
        console.print(
            f"{title}: {shown_seconds(seconds)}, {shown_bytes(used)} per {place}, {plan.layout}: "
            f"{plan.settings(planner.config)}",
            soft_wrap=True,
        )


def _print_assessments(
    console: Console, planner: Planner, assessments: Mapping[str, Assessment]
) -> None:
    model, machine, workload = planner.model, planner.machine, planner.workload
    ranks = "ranks on CPUs"
    if machine.gpu_memory is not None:
        ranks = f"GPUs of {machine.gpu_memory / 1e9:.0f} GB"
    table = Table(
        "",
        *(f"{title}\n{assessment['plan']}" for title, assessment in assessments.items()),
        title=f"{planner.config.model.path}: {model.numel / 1e9:.2f} billion parameters, "
        f"{counted(machine.nodes, 'node')} of {machine.per_node} {ranks}; layouts are replicas × "
        "shard × tensor",
    )
    columns = list(assessments.values())
    for name, cells in _memory_rows(columns, machine):
        table.add_row(name, *cells, end_section=name == "fits")
    for name, cells in _network_rows(columns):
        table.add_row(name, *cells)
    table.columns[0].no_wrap = True
    table.add_section()
    for part in columns[0]["seconds"]:
        name = "an iteration, at least" if part == "total" else part
        table.add_row(name, *(shown_seconds(column["seconds"][part]) for column in columns))
    console.print(table)
    console.print(
        f"{planner.config.es.population_size} members, {len(workload.train)} prompts of up to "
        f"{max(workload.train)} tokens, responses of {planner.response} tokens; evaluations of the "
        "center are not included."
    )


def _memory_rows(
    columns: Sequence[Assessment], machine: Machine
) -> Iterator[tuple[str, list[str]]]:
    for place, name in (("gpu", "GPU"), ("host", "host")):
        for part in columns[0][place] | columns[-1][place]:
            sizes = [shown_bytes(column[place].get(part, 0)) for column in columns]
            yield f"{name}, each rank: {part}", sizes
    if machine.gpu_memory is not None:
        limit = shown_bytes(machine.gpu_memory)
        sizes = [f"{shown_bytes(column['gpu_total'])} of {limit}" for column in columns]
        yield "GPU in all", sizes
    limit = shown_bytes(machine.host_memory)
    sizes = [f"{shown_bytes(column['host_total_per_node'])} of {limit}" for column in columns]
    yield "host in all, per node", sizes
    yield "fits", ["yes" if column["fits"] else "NO" for column in columns]


def _network_rows(columns: Sequence[Assessment]) -> Iterator[tuple[str, list[str]]]:
    for key, name in (
        ("replicas", "replicas ↔ store, per iteration"),
        ("reduced_per_token", "sums within a replica, per token (sent by a rank)"),
        ("reduced", "the same, per iteration (sent by a rank)"),
        ("gathered_per_member", "gathers within a replica, per member (sent by a rank)"),
        ("gathered", "the same, per iteration (sent by a rank)"),
    ):
        yield name, [shown_bytes(column["network"][key]) for column in columns]


def _print_run(console: Console, title: str, figures: Mapping[str, Mapping[str, Any]]) -> None:
    table = Table(f"the whole run ({title})", "", "with")
    for name, figure in figures.items():
        value = figure["value"]
        is_size = "bytes" in name or name == "disk"
        table.add_row(
            name,
            shown_bytes(value) if is_size else f"{value:,.0f}" if value >= 100 else f"{value:.3g}",
            figure["assumption"],
        )
    console.print(table)


def shown_seconds(seconds: float) -> str:
    if seconds < 1:
        return f"{1000 * seconds:.3g} ms"
    return f"{seconds:.1f} s" if seconds < 600 else f"{seconds / 60:.0f} min"


def shown_bytes(count: float) -> str:
    """A number of bytes with three digits and a unit."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} PB"
