"""Print the table of docs/plan.md: plans for models of three sizes on H100s.

python -m benchmarks.plan_table
"""

from dataclasses import replace
from pathlib import Path

from shardes.commands.plan_table import shown_bytes, shown_seconds
from shardes.config.schema import Config, ModelConfig, RunConfig, TaskConfig
from shardes.planning.devices import GPUS
from shardes.planning.layouts import Machine
from shardes.planning.planner import Planner
from shardes.planning.workload import read_workload

DATA = Path(__file__).parent.parent / "tests" / "data"
MODELS = {"8B": "llama-3.1-8b", "70B": "llama-3.1-70b", "405B": "llama-3.1-405b"}


def row(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def markdown() -> str:
    """The table of docs/plan.md: Countdown with the paper's settings, on up to 64 H100s."""
    head = ["model", "GPUs", "layout", "batch_tokens", "GPU", "host, per node", "an iteration, ≥"]
    lines = [row(head), row(["---"] * len(head))]
    for name, directory in MODELS.items():
        path = str(DATA / directory)
        config = Config(
            model=ModelConfig(path), task=TaskConfig("countdown"), run=RunConfig("runs/plan")
        )
        work = read_workload(config, None, None)
        planner = Planner(
            config, work, Machine(1, 1, int(80e9), int(2e12)), GPUS["H100"], work.max_new_tokens
        )
        for nodes, gpus in ((1, 1), (1, 8), (8, 8)):
            planner.machine = replace(planner.machine, nodes=nodes, per_node=gpus)
            best = planner.search(1)
            cells = [name, str(nodes * gpus), "does not fit", "", "", "", ""]
            if best:
                assessment = planner.assess(best[0])
                cells[2:] = [
                    str(best[0].layout),
                    f"{best[0].batch_tokens:,}",
                    shown_bytes(assessment["gpu_total"]),
                    shown_bytes(assessment["host_total_per_node"]),
                    shown_seconds(assessment["seconds"]["total"]),
                ]
            lines.append(row(cells))
    return "\n".join(lines)


if __name__ == "__main__":
    print(markdown())
