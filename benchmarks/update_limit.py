"""Iteration time against replicas, for both noises, and what the update costs per member.

    python -m benchmarks.update_limit

A member's time and the update's are the planner's, for H100s; the queue is simulated. Prints the
tables of docs/scaling.md and writes results/scaling/update_limit.json, .png and .svg.
"""

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np

from benchmarks.plan_table import DATA, MODELS, row
from benchmarks.replicas import Setting
from benchmarks.scaling import ROOT, TIMES, iterations_for
from benchmarks.simulate import simulate
from shardes.config.schema import Config, ESConfig, ModelConfig, Noise, RunConfig, TaskConfig
from shardes.es.tuning import plain
from shardes.planning.devices import GPUS
from shardes.planning.layouts import Machine
from shardes.planning.planner import Planner
from shardes.planning.workload import read_workload

OUT = ROOT / "results" / "scaling" / "update_limit"
REPLICAS = (1, 3, 10, 30, 100, 300, 1000, 3000, 10_000)
EACH = 4  # members per replica: N = 4 R
GPUS_EACH = {"8B": (1, 1), "70B": (1, 4), "405B": (2, 8)}  # nodes × GPUs of a replica
DRAWN = ("8B", "70B")
# Nanoseconds per element and member of the update on one core: docs/performance.md, "update, N =
# 30, one thread", of 134.5 million parameters
CORE = {Noise.full: 1.83e9 / 30 / 134.5e6, Noise.low_rank: 0.25e9 / 30 / 134.5e6}


@dataclass(frozen=True)
class Costs:
    """Seconds of one replica.

    Attributes:
        group: members that answer side by side.
        evaluation: of a group.
        prefill: of its prompts, which is part of that.
        update, update_each: of the update, without members and for each.
    """

    parameters: int
    group: int
    evaluation: float
    prefill: float
    update: float
    update_each: float

    @property
    def limit(self) -> float:
        """The replicas with which the update of all members takes as long as their evaluation."""
        return self.evaluation / self.group / self.update_each


def costs(name: str, noise: Noise) -> Costs:
    """What the planner suggests for one replica of H100s with `EACH` members, Countdown's."""
    nodes, gpus = GPUS_EACH[name]
    es = ESConfig(population_size=EACH, noise=noise)
    config = Config(
        model=ModelConfig(str(DATA / MODELS[name])),
        es=es,
        task=TaskConfig("countdown"),
        run=RunConfig("runs/plan"),
    )
    work = read_workload(config, None, None)
    machine = Machine(nodes, gpus, GPUS["H100"].capacity, int(2e12))
    planner = Planner(config, work, machine, GPUS["H100"], work.max_new_tokens)
    plan = next(plan for plan in planner.search(99) if plan.layout.replicas == 1)
    estimate = planner.estimate(plan)
    seconds = estimate.seconds()
    more = replace(estimate, es=replace(es, population_size=EACH + 1000)).seconds()
    each = (more.update - seconds.update) / 1000
    groups = -(-EACH // plan.members)
    return Costs(
        planner.model.numel,
        plan.members,
        (seconds.total - seconds.update) / groups,
        seconds.prefill / groups,
        seconds.update - EACH * each,
        each,
    )


def iteration(replicas: int, cost: Costs) -> float:
    """The seconds of an iteration of N = 4 R members, without failures."""
    members, count = EACH * replicas, iterations_for(replicas)
    setting = Setting(
        replicas,
        members // cost.group,
        count,
        times=np.array(json.loads(TIMES.read_text())["relative"]),
        mean=cost.evaluation,
        spread=0.1,
        exchange=0.1,
        update=cost.update + members * cost.update_each,
        seed=1,
    )
    return simulate(setting).elapsed / count


def measure() -> list[dict]:
    rows = []
    for name in GPUS_EACH:
        for noise in Noise:
            cost = costs(name, noise)
            times = [iteration(r, cost) for r in REPLICAS] if name in DRAWN else []
            rows.append({
                "model": name, "noise": noise.value, "limit": cost.limit, "iteration": times,
            } | asdict(cost))  # fmt: skip
    return rows


def update_table(rows: Sequence[dict]) -> str:
    """The update's time per member, on one core and on a replica's GPUs."""
    head = ["model", "noise", "one core", "a replica's H100s", "a member's evaluation"]
    head += ["R at the limit", "N there", "first prefill"]
    lines = [row(head), row(["---"] * len(head))]
    for noise in Noise:
        seconds = CORE[noise] * 0.1345
        lines.append(row(["135M", noise.value, f"{1e3 * seconds:.1f} ms, measured", *[""] * 5]))
    for each in rows:
        core = CORE[Noise(each["noise"])] * each["parameters"] / 1e9
        nodes, gpus = GPUS_EACH[each["model"]]
        cells = [
            each["model"],
            each["noise"],
            f"{core:.3g} s",
            f"{1e3 * each['update_each']:.0f} ms ({nodes * gpus})",
            f"{plain(each['evaluation'] / each['group'], 3)} s",
            f"{each['limit']:,.0f}",
            f"{EACH * each['limit']:,.0f}",
            f"{each['prefill']:.2g} s",
        ]
        lines.append(row(cells))
    return "\n".join(lines)


def iteration_table(rows: Sequence[dict]) -> str:
    drawn = [each for each in rows if each["iteration"]]
    head = ["R", "N", *(f"{each['model']}, {each['noise']}" for each in drawn)]
    lines = [row(head), row(["---"] * len(head))]
    for i, r in enumerate(REPLICAS):
        cells = [f"{each['iteration'][i]:,.0f} s" for each in drawn]
        lines.append(row([f"{r:,}", f"{EACH * r:,}", *cells]))
    return "\n".join(lines)


def draw(rows: Sequence[dict], out: Path) -> None:
    """Draw the time of an iteration, and the members per second, against replicas."""
    import matplotlib.pyplot as plt

    figure, (time, rate) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for each in rows:
        if not each["iteration"]:
            continue
        color = {"8B": "#1f5f99", "70B": "#c4512d"}[each["model"]]
        style = "-" if each["noise"] == Noise.full.value else "--"
        label = f"{each['model']}, {each['noise']}"
        look = {"color": color, "linestyle": style, "marker": "o", "markersize": 3.5}
        seconds = each["iteration"]
        time.plot(REPLICAS, seconds, label=label, **look)
        per_second = [EACH * r / s for r, s in zip(REPLICAS, seconds, strict=True)]
        rate.plot(REPLICAS, per_second, label=label, **look)
    for panel, name in ((time, "seconds of an iteration"), (rate, "members per second")):
        panel.set(
            xscale="log", yscale="log", xlabel="replicas R, with N = 4 R members", ylabel=name
        )
        panel.spines[["top", "right"]].set_visible(False)
    time.legend(frameon=False, fontsize=8)
    for kind in ("png", "svg"):
        figure.savefig(out.with_suffix(f".{kind}"), dpi=130)
    plt.close(figure)


def main() -> int:
    rows = measure()
    OUT.with_suffix(".json").write_text(json.dumps(rows, indent=1) + "\n")
    draw(rows, OUT)
    print(update_table(rows), iteration_table(rows), sep="\n\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
