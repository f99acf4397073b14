"""Simulate ES iterations on 10 to 10,000 replicas: their use of time, and the store's load.

    python -m benchmarks.scaling

Prints the tables of docs/scaling.md and writes results/scaling/simulated.json, .png and .svg.
"""

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from benchmarks.replicas import Draw, Outcome, Polls, Setting, fixed_rounds
from benchmarks.simulate import simulate
from shardes.replicas.work_queue import ORPHAN_CHECKS

ROOT = Path(__file__).parent.parent
TIMES = ROOT / "benchmarks" / "results" / "member_times.json"
STORE = ROOT / "results" / "scaling" / "store.json"
OUT = ROOT / "results" / "scaling" / "simulated"
REPLICAS = (10, 100, 1000, 10_000)
PER_REPLICA = (1, 2, 4, 8, 16)
UPDATES = (0.0, 1e-4, 1e-3, 1e-2)  # update time per member / evaluation time of a member
DAY = 86400.0


def setting(
    replicas: int, per_replica: int, iterations: int, update: float = 0.0, **changes
) -> Setting:
    """The setting of the tables, with `changes`.

    Args:
        update: update time per member, relative to the evaluation time of a member.
    """
    members = replicas * per_replica
    values = {
        "times": np.array(json.loads(TIMES.read_text())["relative"]),
        "mean": 60.0,
        "spread": 0.1,
        "mtbf": DAY,
        "restart": 300.0,
        "exchange": 0.1,
        "update": update * 60.0 * members,
        "seed": 1,
    }
    return Setting(replicas, members, iterations, **values | changes)


def iterations_for(replicas: int) -> int:
    """Enough iterations for a stable mean, in seconds of computing time."""
    return {10: 50, 100: 10, 1000: 4}.get(replicas, 2)


def row(setting: Setting) -> dict:
    """The outcome of one setting."""
    began = time.process_time()
    draw = Draw.of(setting)
    outcome = simulate(setting, draw)
    mean, peak = outcome.rate()
    elapsed = outcome.elapsed
    activities = ("useful", "waiting", "exchange", "update", "lost", "down")
    return {
        "replicas": setting.replicas,
        "members": setting.members,
        "iterations": setting.iterations,
        "seconds_per_iteration": elapsed / setting.iterations,
        "seconds_idle": float(np.mean(outcome.idle)),
        **{activity: float(outcome.share(activity)) for activity in activities},
        "fixed_rounds": float(fixed_rounds(setting, draw)),
        "deaths": outcome.deaths,
        "takeovers": outcome.takeovers,
        "requests_per_second": mean,
        "requests_peak": peak,
        "requests_by_kind": {kind: len(each) / elapsed for kind, each in outcome.requests.items()},
        "peak_of": requests_at_peak(outcome),
        "lookups_per_second": lookups(setting, outcome) / elapsed,
        "seconds_to_simulate": time.process_time() - began,
    }


def requests_at_peak(outcome: Outcome) -> dict[str, int]:
    """The requests in the busiest second, by kind."""
    longest = max(int(times.max(initial=0)) for times in outcome.requests.values()) + 1
    counts = {
        kind: np.bincount(times.astype(int), minlength=longest)
        for kind, times in outcome.requests.items()
    }
    second = int(sum(counts.values()).argmax())
    return {kind: int(count[second]) for kind, count in counts.items()}


def lookups(setting: Setting, outcome: Outcome) -> float:
    """How many times waiting replicas look up whether a member is finished."""
    rounds = sum(int(waited / (setting.timeout / 4)) for waited in outcome.waits)
    return min(ORPHAN_CHECKS, setting.members) * rounds


def sweep(replicas: Sequence[int], per_replica: Sequence[int]) -> dict[str, list[dict]]:
    """Rows for all sizes; and with 4 members per replica, for other polls and update times."""
    rows: dict[str, list[dict]] = {
        "by_size": [],
        "no_failures": [],
        "watched": [],
        "polls": [],
        "updates": [],
    }
    for count in replicas:
        iterations = iterations_for(count)
        for each in per_replica:
            rows["by_size"].append(row(setting(count, each, iterations)))
            rows["no_failures"].append(row(setting(count, each, iterations, mtbf=np.inf)))
            rows["watched"].append(row(setting(count, each, iterations, watched=True)))
            for name in ("by_size", "no_failures", "watched"):
                print(f"{name}: {line(rows[name][-1])}", flush=True)
        for longest in (1.0, 5.0, 20.0):
            changed = setting(count, 4, iterations, polls=Polls(longest=longest))
            rows["polls"].append({"longest": longest} | row(changed))
            print(f"polls at most {longest:g} s apart: {line(rows['polls'][-1])}", flush=True)
        for update in UPDATES:
            rows["updates"].append({"ratio": update} | row(setting(count, 4, iterations, update)))
            print(f"update {update:g}: {line(rows['updates'][-1])}", flush=True)
    return rows


def line(row: dict) -> str:
    return (
        f"{row['replicas']:>6} replicas, N = {row['members']:>6}: "
        f"useful {100 * row['useful']:.1f} %, waiting {100 * row['waiting']:.1f}, "
        f"exchange {100 * row['exchange']:.1f}, update {100 * row['update']:.1f}, "
        f"lost {100 * row['lost']:.2f}, down {100 * row['down']:.2f}; "
        f"fixed rounds {100 * row['fixed_rounds']:.1f} %; "
        f"{row['requests_per_second']:.0f} requests/s, peak {row['requests_peak']}; "
        f"simulated in {row['seconds_to_simulate']:.1f} s"
    )


def table(rows: list[dict], per_replica: Sequence[int]) -> str:
    """Markdown: a line per number of replicas, a column per number of members of each."""
    head = "| replicas | " + " | ".join(f"N = {each} R" for each in per_replica) + " |"
    lines = [head, "| --- " * (1 + len(per_replica)) + "|"]
    for count in sorted({row["replicas"] for row in rows}):
        cells = [
            f"{100 * row['useful']:.0f} ({100 * row['fixed_rounds']:.0f})"
            for row in rows
            if row["replicas"] == count
        ]
        lines.append(f"| {count:,} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def draw(rows: dict[str, list[dict]], out: Path) -> None:
    """Draw three panels: the busy share, requests to the store, and the effect of the update."""
    import matplotlib.pyplot as plt

    figure, (busy, requests, update) = plt.subplots(1, 3, figsize=(13, 4), layout="constrained")
    _draw_busy(busy, plt.get_cmap("viridis"), rows)
    _draw_requests(requests, rows)
    _draw_update(update, plt.get_cmap("plasma"), rows)
    for panel in (busy, requests, update):
        panel.spines[["top", "right"]].set_visible(False)
        title = "update per member /\nmember's time" if panel is update else None
        panel.legend(frameon=False, fontsize=7.5, title=title, title_fontsize=7.5)
    for kind in ("png", "svg"):
        figure.savefig(out.with_suffix(f".{kind}"), dpi=130)
    plt.close(figure)


def _draw_busy(panel, colors, rows: dict[str, list[dict]]) -> None:
    counts = sorted({row["replicas"] for row in rows["by_size"]})
    for count, color in zip(counts, colors(np.linspace(0, 0.85, len(counts))), strict=True):
        lasting = [row for row in rows["no_failures"] if row["replicas"] == count]
        failing = [row for row in rows["by_size"] if row["replicas"] == count]
        members = [row["members"] / count for row in lasting]
        useful, label = _percent(lasting, "useful"), f"{count:,} replicas"
        panel.plot(members, useful, color=color, marker="o", markersize=4, label=label)
        panel.plot(members, _percent(failing, "useful"), color=color, linestyle=":")
        rounds = _percent(lasting, "fixed_rounds")
        panel.plot(members, rounds, color=color, linestyle="--", linewidth=1)
    for style, label in (
        ("-", "claimed"),
        (":", "claimed, each fails once a day"),
        ("--", "fixed rounds"),
    ):
        panel.plot([], [], color="gray", linestyle=style, label=label)
    panel.set(
        xscale="log",
        xlabel="members per replica, N / R",
        ylabel="busy share, %",
        ylim=(0, 100),
        title="Busy share, without the update",
    )
    panel.set_xticks(members, [f"{each:g}" for each in members])
    panel.minorticks_off()


def _draw_requests(panel, rows: dict[str, list[dict]]) -> None:
    for longest, style in ((1.0, "-"), (20.0, ":")):
        chosen = [row for row in rows["polls"] if row["longest"] == longest]
        replicas = [row["replicas"] for row in chosen]
        for key, name, color, marker in (
            ("requests_per_second", "mean", "#1f5f99", "o"),
            ("requests_peak", "busiest second", "#c4512d", "s"),
        ):
            label, values = (
                f"{name}, polls at most {longest:g} s apart",
                [row[key] for row in chosen],
            )
            look = {"color": color, "linestyle": style, "marker": marker, "markersize": 4}
            panel.plot(replicas, values, label=label, **look)
    for row in json.loads(STORE.read_text())["capacity"] if STORE.exists() else []:
        if row["kind"] == "polls" and not row["idle_connections"]:
            microseconds = row["store_cpu_us"]
            panel.axhline(1e6 / microseconds, color="black", linewidth=1)
            text = "polls that one core can serve, measured"
            panel.text(10, 0.6e6 / microseconds, text, fontsize=8)
    panel.set(
        xscale="log",
        yscale="log",
        xlabel="replicas R",
        ylabel="requests per second",
        title="Requests to the store, N = 4 R",
    )


def _draw_update(panel, colors, rows: dict[str, list[dict]]) -> None:
    for ratio, color in zip(UPDATES, colors(np.linspace(0, 0.8, len(UPDATES))), strict=True):
        chosen = [row for row in rows["updates"] if row["ratio"] == ratio]
        replicas, label = [row["replicas"] for row in chosen], f"{ratio:g}" if ratio else "none"
        useful = _percent(chosen, "useful")
        panel.plot(replicas, useful, color=color, marker="o", markersize=4, label=label)
    panel.set(
        xscale="log",
        xlabel="replicas R",
        ylabel="busy share, %",
        ylim=(0, 100),
        title="Busy share with the update, N = 4 R",
    )


def _percent(rows: list[dict], key: str) -> list[float]:
    return [100 * row[key] for row in rows]


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="benchmarks.scaling",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--replicas", type=int, nargs="+", default=REPLICAS, help="default: %(default)s"
    )
    parser.add_argument(
        "--per-replica", type=int, nargs="+", default=PER_REPLICA, help="default: %(default)s"
    )
    parser.add_argument(
        "--draw", action="store_true", help="only draw the results of an earlier run"
    )
    parser.add_argument("--out", type=Path, default=OUT, help="default: %(default)s")
    options = parser.parse_args(argv)
    file = options.out.with_suffix(".json")
    if options.draw:
        rows = json.loads(file.read_text())
    else:
        rows = sweep(options.replicas, options.per_replica)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(rows, indent=1) + "\n")
    draw(rows, options.out)
    print(table(rows["by_size"], options.per_replica))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
