"""Print the table of docs/scaling.md: models of three sizes on nodes of H100s, planned.

python -m benchmarks.plan_table
"""

from dataclasses import replace
from pathlib import Path

from shardes.commands.plan import Planner, shown_bytes, work_of
from shardes.config import Config, ModelConfig, RunConfig, TaskConfig
from shardes.estimate import DEVICES
from shardes.plan import Machine

DATA = Path(__file__).parent.parent / "tests" / "data"
MODELS = {"8B": "llama-3.1-8b", "70B": "llama-3.1-70b", "405B": "llama-3.1-405b"}


def markdown() -> str:
    """The table of docs/scaling.md: the paper's Countdown settings on nodes of eight H100s, and on one H100."""
    lines = [
        "| model | GPUs | layout | GPU | host, per node | an iteration takes at least |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for name, directory in MODELS.items():
        path = str(DATA / directory)
        config = Config(model=ModelConfig(path), task=TaskConfig("countdown"), run=RunConfig("runs/plan"))
        work = work_of(config, None, None)
        planner = Planner(config, work, Machine(1, 1, int(80e9), int(2e12)), DEVICES["h100"], work.max_new_tokens)
        for nodes, gpus in ((1, 1), (1, 8), (8, 8)):
            planner.machine = replace(planner.machine, nodes=nodes, per_node=gpus)
            layout = planner.suggest()
            if layout is None:
                lines.append(f"| {name} | {nodes * gpus} | does not fit | | | |")
                continue
            judged = planner.judge(layout)
            took = judged["seconds"]["total"]
            shown = f"{took:.0f} s" if took < 600 else f"{took / 60:.0f} min"
            lines.append(
                f"| {name} | {nodes * gpus} | {layout} | {shown_bytes(judged['gpu_total'])} | "
                f"{shown_bytes(judged['host_total_per_node'])} | {shown} |"
            )
    return "\n".join(lines)


if __name__ == "__main__":
    print(markdown())
