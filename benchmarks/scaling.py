"""Simulate ES iterations on 10 to 10,000 replicas, and say what they would do and ask of the store.

    python -m benchmarks.scaling

prints the tables of docs/scaling.md and writes results/scaling/simulated.json, .png and .svg.
"""

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from benchmarks.replicas import Draw, Looks, Outcome, Setting, fixed_rounds
from benchmarks.simulate import claimed
from shardes.population import LOOKS

ROOT = Path(__file__).parent.parent
TIMES = ROOT / "benchmarks" / "results" / "member_times.json"
STORE = ROOT / "results" / "scaling" / "store.json"
OUT = ROOT / "results" / "scaling" / "simulated"
REPLICAS = (10, 100, 1000, 10_000)
PER_REPLICA = (1, 2, 4, 8, 16)
UPDATES = (0.0, 1e-4, 1e-3, 1e-2)  # the update's time per member of the population, over a member's time
DAY = 86400.0


def setting(replicas: int, per_replica: int, iterations: int, update: float = 0.0, **changes) -> Setting:
    """What the tables are about, unless they say otherwise. `update` is over a member's time, per member."""
    times = np.array(json.loads(TIMES.read_text())["relative"])
    count = replicas * per_replica
    given = dict(times=times, mean=60.0, spread=0.1, mtbf=DAY, restart=300.0, exchange=0.1, seed=1)
    return Setting(replicas, count, iterations, **given | {"update": update * 60.0 * count} | changes)


def iterations_for(replicas: int) -> int:
    """Enough members for a steady mean, few enough for seconds of computing."""
    return {10: 50, 100: 10, 1000: 4}.get(replicas, 2)


def row(at: Setting) -> dict:
    """What came of one setting."""
    began = time.process_time()
    draw = Draw.of(at)
    outcome = claimed(at, draw)
    mean, peak = outcome.rate()
    shares = {what: outcome.share(what) for what in ("useful", "waiting", "exchange", "update", "lost", "down")}
    return {
        "replicas": at.replicas, "members": at.members, "iterations": at.iterations, "update": at.update,
        "seconds_per_iteration": outcome.elapsed / at.iterations, "seconds_idle": float(np.mean(outcome.idle)),
        **{key: float(value) for key, value in shares.items()},
        "fixed_rounds": float(fixed_rounds(at, draw)),
        "deaths": outcome.deaths, "takeovers": outcome.takeovers,
        "requests_per_second": mean, "requests_peak": peak,
        "requests_by_kind": {kind: len(found) / outcome.elapsed for kind, found in outcome.requests.items()},
        "peak_of": peak_of(outcome), "asked_per_second": asked_of(at, outcome) / outcome.elapsed,
        "seconds_to_simulate": time.process_time() - began,
    }  # fmt: skip


def peak_of(outcome: Outcome) -> dict[str, int]:
    """The requests within the busiest second, by kind."""
    longest = max(int(found.max(initial=0)) for found in outcome.requests.values()) + 1
    counts = {kind: np.bincount(found.astype(int), minlength=longest) for kind, found in outcome.requests.items()}
    second = int(sum(counts.values()).argmax())
    return {kind: int(count[second]) for kind, count in counts.items()}


def asked_of(at: Setting, outcome: Outcome) -> float:
    """Of how many members waiting replicas ask, a few of them every quarter of the timeout, whether they are found."""
    return min(LOOKS, at.members) * sum(int(waited / (at.timeout / 4)) for waited in outcome.waits)


def sweep(replicas: Sequence[int], per_replica: Sequence[int]) -> dict[str, list[dict]]:
    """By replicas and members of each; and the largest numbers of replicas with other constants and updates."""
    found: dict[str, list[dict]] = {"by_size": [], "no_failures": [], "watched": [], "looks": [], "updates": []}
    for count in replicas:
        for each in per_replica:
            found["by_size"].append(row(setting(count, each, iterations_for(count))))
            without = setting(count, each, iterations_for(count), mtbf=np.inf)
            found["no_failures"].append(row(without))
            found["watched"].append(row(setting(count, each, iterations_for(count), watched=True)))
            for what in ("by_size", "no_failures", "watched"):
                print(f"{what}: {line(found[what][-1])}", flush=True)
        for longest in (1.0, 5.0, 20.0):
            changed = setting(count, 4, iterations_for(count), looks=Looks(longest=longest))
            found["looks"].append({"longest": longest} | row(changed))
            print(f"looks at most {longest:g} s apart: {line(found['looks'][-1])}", flush=True)
        for update in UPDATES:
            found["updates"].append({"ratio": update} | row(setting(count, 4, iterations_for(count), update)))
            print(f"update {update:g}: {line(found['updates'][-1])}", flush=True)
    return found


def line(found: dict) -> str:
    return (
        f"{found['replicas']:>6} replicas, N = {found['members']:>6}: useful {100 * found['useful']:.1f} %, waiting "
        f"{100 * found['waiting']:.1f}, exchange {100 * found['exchange']:.1f}, update {100 * found['update']:.1f}, "
        f"lost {100 * found['lost']:.2f}, down {100 * found['down']:.2f}; fixed rounds "
        f"{100 * found['fixed_rounds']:.1f} %; {found['requests_per_second']:.0f} requests/s, peak "
        f"{found['requests_peak']}; simulated in {found['seconds_to_simulate']:.1f} s"
    )


def table(found: list[dict], per_replica: Sequence[int]) -> str:
    """Markdown: a line per number of replicas, a column per members of each."""
    head = "| replicas | " + " | ".join(f"N = {each} R" for each in per_replica) + " |"
    lines = [head, "| --- " * (1 + len(per_replica)) + "|"]
    for count in sorted({each["replicas"] for each in found}):
        cells = [f"{100 * each['useful']:.0f} ({100 * each['fixed_rounds']:.0f})" for each in found
                 if each["replicas"] == count]  # fmt: skip
        lines.append(f"| {count:,} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def draw(found: dict[str, list[dict]], out: Path) -> None:
    """Three panels: busy share by members of each replica, requests by replicas, what the update leaves."""
    import matplotlib.pyplot as plt

    figure, (busy, asked, left) = plt.subplots(1, 3, figsize=(13, 4), layout="constrained")
    counts = sorted({each["replicas"] for each in found["by_size"]})
    colors = dict(zip(counts, plt.get_cmap("viridis")(np.linspace(0, 0.85, len(counts))), strict=True))
    for count in counts:
        rows = [each for each in found["no_failures"] if each["replicas"] == count]
        failing = [each for each in found["by_size"] if each["replicas"] == count]
        members, color = [each["members"] / count for each in rows], colors[count]
        busy.plot(members, [100 * each["useful"] for each in rows], color=color, marker="o", markersize=4,
                  label=f"{count:,} replicas")  # fmt: skip
        busy.plot(members, [100 * each["useful"] for each in failing], color=color, linestyle=":")
        busy.plot(members, [100 * each["fixed_rounds"] for each in rows], color=color, linestyle="--", linewidth=1)
    for style, label in (("-", "claimed"), (":", "claimed, each fails once a day"), ("--", "fixed rounds")):
        busy.plot([], [], color="gray", linestyle=style, label=label)
    busy.set(xscale="log", xlabel="members per replica, N / R", ylabel="busy share, %", ylim=(0, 100),
             title="Busy share, the update left out")  # fmt: skip
    busy.set_xticks(members, [f"{each:g}" for each in members])
    busy.minorticks_off()

    for longest, style in ((1.0, "-"), (20.0, ":")):
        rows = [each for each in found["looks"] if each["longest"] == longest]
        label = f"looks at most {longest:g} s apart"
        asked.plot([each["replicas"] for each in rows], [each["requests_per_second"] for each in rows],
                   color="#1f5f99", linestyle=style, marker="o", markersize=4, label=f"mean, {label}")  # fmt: skip
        asked.plot([each["replicas"] for each in rows], [each["requests_peak"] for each in rows], color="#c4512d",
                   linestyle=style, marker="s", markersize=4, label=f"busiest second, {label}")  # fmt: skip
    measured = json.loads(STORE.read_text())["capacity"] if STORE.exists() else []
    for each in measured:
        if each["kind"] == "looks" and not each["idle_connections"]:
            asked.axhline(1e6 / each["store_cpu_us"], color="black", linewidth=1)
            asked.text(10, 0.6e6 / each["store_cpu_us"], "one core's worth of looks, measured", fontsize=8)
    asked.set(
        xscale="log",
        yscale="log",
        xlabel="replicas R",
        ylabel="requests per second",
        title="Requests to the store, N = 4 R",
    )

    shades = plt.get_cmap("plasma")(np.linspace(0, 0.8, len(UPDATES)))
    for ratio, color in zip(UPDATES, shades, strict=True):
        rows = [each for each in found["updates"] if each["ratio"] == ratio]
        left.plot([each["replicas"] for each in rows], [100 * each["useful"] for each in rows], color=color, marker="o",
                  markersize=4, label=f"{ratio:g}" if ratio else "none")  # fmt: skip
    left.set(xscale="log", xlabel="replicas R", ylabel="busy share, %", ylim=(0, 100),
             title="Busy share with the update, N = 4 R")  # fmt: skip
    for panel in (busy, asked, left):
        panel.spines[["top", "right"]].set_visible(False)
        title = "update per member /\nmember's time" if panel is left else None
        panel.legend(frameon=False, fontsize=7.5, title=title, title_fontsize=7.5)
    for kind in ("png", "svg"):
        figure.savefig(out.with_suffix(f".{kind}"), dpi=130)
    plt.close(figure)


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="benchmarks.scaling", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--replicas", type=int, nargs="+", default=REPLICAS, help="default: %(default)s")
    parser.add_argument("--per-replica", type=int, nargs="+", default=PER_REPLICA, help="default: %(default)s")
    parser.add_argument("--draw", action="store_true", help="only draw what an earlier run wrote")
    parser.add_argument("--out", type=Path, default=OUT, help="default: %(default)s")
    options = parser.parse_args(argv)
    file = options.out.with_suffix(".json")
    if options.draw:
        found = json.loads(file.read_text())
    else:
        found = sweep(options.replicas, options.per_replica)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(found, indent=1) + "\n")
    draw(found, options.out)
    print(table(found["by_size"], options.per_replica))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
