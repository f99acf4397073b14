"""Print the table of docs/scaling.md: plans for models of three sizes on H100s.

python -m benchmarks.plan_table
"""

from dataclasses import replace
from pathlib import Path

from shardes.commands.plan import shown_bytes
from shardes.config.schema import Config, ModelConfig, RunConfig, TaskConfig
from shardes.planning.layouts import Machine
from shardes.planning.planner import Planner
from shardes.planning.time import DEVICES
from shardes.planning.workload import read_workload

DATA = Path(__file__).parent.parent / "tests" / "data"
MODELS = {"8B": "llama-3.1-8b", "70B": "llama-3.1-70b", "405B": "llama-3.1-405b"}


def markdown() -> str:
    """The table of docs/scaling.md: Countdown with the paper's settings, on up to 64 H100s."""
    lines = [
        "| model | GPUs | layout | GPU | host, per node | an iteration takes at least |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for name, directory in MODELS.items():
        path = str(DATA / directory)
        config = Config(
            model=ModelConfig(path), task=TaskConfig("countdown"), run=RunConfig("runs/plan")
        )
        work = read_workload(config, None, None)
        planner = Planner(
            config, work, Machine(1, 1, int(80e9), int(2e12)), DEVICES["h100"], work.max_new_tokens
        )
        for nodes, gpus in ((1, 1), (1, 8), (8, 8)):
            planner.machine = replace(planner.machine, nodes=nodes, per_node=gpus)
            layout = planner.suggest()
            if layout is None:
                lines.append(f"| {name} | {nodes * gpus} | does not fit | | | |")
                continue
            assessment = planner.assess(layout)
            seconds = assessment["seconds"]["total"]
            time = f"{seconds:.0f} s" if seconds < 600 else f"{seconds / 60:.0f} min"
            lines.append(
                f"| {name} | {nodes * gpus} | {layout} | {shown_bytes(assessment['gpu_total'])} | "
                f"{shown_bytes(assessment['host_total_per_node'])} | {time} |"
            )
    return "\n".join(lines)


if __name__ == "__main__":
    print(markdown())
