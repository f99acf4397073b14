"""The report of a probe: figures by σ and a suggestion, as JSON, on the terminal and as HTML."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Console
from rich.table import Table as TerminalTable

from shardes.config.schema import Config, ESConfig
from shardes.es.population import noise_rank
from shardes.es.probing import Answered, CenterAnswers, Plan
from shardes.es.statistics import mean
from shardes.es.tuning import LEAST_PAIRS, Figures, best, figures, plain, suggest
from shardes.reporting.charts import Series, line_chart
from shardes.reporting.page import Block, Cards, Chart, Table, Text

FILE = Path("probe", "probe.json")  # in the run directory
HEAD = ("σ", "reward", "spread", "noise", "changed", "broken", "ρ(R₊, R₋)", "gain per α")
ROUNDING = 1e-12  # a smaller standard deviation is none
NO_SIGNAL = (
    "no σ has a gain above its standard error, so none is suggested: take more --pairs, more "
    "prompts or a finer reward (docs/tuning.md)"
)


def probe_report(
    config: Config,
    plan: Plan,
    center: CenterAnswers,
    results: Mapping[int, Answered],
    rms: Mapping[str, float],
) -> dict[str, Any]:
    """The contents of probe.json.

    Args:
        results: of the members that were evaluated, by number.
        rms: of the parameters that training changes, by name.
    """
    reward, prompts = mean(center.answered.rewards), len(plan.iteration.prompts)
    rows, known = [], []
    for sigma, members in plan.by_sigma(results).items():
        scored = _scored_pairs(members)
        row: dict[str, Any] = {
            "sigma": sigma,
            "members": len(members),
            "not_scored": sum(not member.rewards for member in members),
        }
        row |= _shares(members, prompts)
        if len(scored) >= 2 * LEAST_PAIRS:
            found = figures(config.es, sigma, [member.rewards for member in scored], reward)
            row |= asdict(found)
            if len(scored) == len(members):  # a run with this σ would not end for a member
                known.append(found)
        rewards = [mean(member.rewards) for member in scored]
        rows.append(row | {"rewards": list(zip(rewards[::2], rewards[1::2], strict=True))})
    chosen = best(known)
    return {
        "model": config.model.path,
        "task": config.task.name or config.task.path,
        "noise": config.es.noise.value,
        "rank": noise_rank(config.es),
        "fitness": config.es.fitness.value,
        "antithetic": config.es.antithetic,
        "seed": config.es.seed,
        "digest": plan.iteration.digest,
        "prompts": prompts,
        "evaluated": len(results),
        "members": len(plan.iteration.members),
        "center": {"reward": reward, "rescoring": center.rescoring}
        | _shares([center.answered], prompts),
        "sigmas": rows,
        "suggestion": _suggestion(config.es, chosen, rms) if chosen else None,
    }


def _scored_pairs(members: Sequence[Answered]) -> list[Answered]:
    """The members of the pairs both of which have rewards."""
    pairs = zip(members[::2], members[1::2], strict=True)
    return [member for pair in pairs if all(m.rewards for m in pair) for member in pair]


def _shares(members: Sequence[Answered], prompts: int) -> dict[str, float]:
    """Shares of the members' answers; `broken` are all that are empty, cut off or failed."""
    answers = max(len(members) * prompts, 1)
    shares = {
        name: sum(getattr(member, name) for member in members) / answers
        for name in ("changed", "empty", "unended", "failed")
    }
    broken = shares["empty"] + shares["unended"] + shares["failed"]
    return shares | {"broken": min(broken, 1.0)}


def _suggestion(es: ESConfig, chosen: Figures, rms: Mapping[str, float]) -> dict[str, Any]:
    """The suggestion, and its step and σ in units of each parameter's root mean square."""
    found = suggest(es, chosen)
    relative = {
        name: {"rms": size, "step": found.step / size, "sigma": found.sigma / size}
        for name, size in rms.items()
        if size > 0
    }
    overrides = (
        f"es.sigma={found.sigma:g} es.alpha={found.alpha:g} "
        f"es.population_size={found.population_size}"
    )
    if es.sigma_final is not None:
        overrides += f" es.sigma_final={es.sigma_final / es.sigma * found.sigma:.3g}"
    if es.alpha_final is not None and es.alpha:
        overrides += f" es.alpha_final={es.alpha_final / es.alpha * found.alpha:.3g}"
    return asdict(found) | {"overrides": overrides, "parameters": relative}


def kinds(parameters: Mapping[str, Mapping[str, float]]) -> dict[str, dict[str, list[float]]]:
    """Values of parameters that have the same name but for the layer's number, shown as *.

    Each value is a list of the lowest, median and highest of the layers.
    """
    groups: dict[str, list[Mapping[str, float]]] = {}
    for name, values in parameters.items():
        groups.setdefault(re.sub(r"\.\d+(?=\.)", ".*", name), []).append(values)
    return {
        kind: {key: _range([row[key] for row in rows]) for key in rows[0]}
        for kind, rows in groups.items()
    }


def _range(values: Sequence[float]) -> list[float]:
    return [min(values), median(values), max(values)]


def print_report(report: Mapping[str, Any], command: str) -> None:
    """Print the table and the suggestion.

    Args:
        command: that starts the run, without overrides of the suggestion.
    """
    console = Console(highlight=False, soft_wrap=True)
    drawn = TerminalTable(*HEAD, box=None, pad_edge=False, header_style="bold")
    for column in drawn.columns:
        column.justify, column.no_wrap = "right", True
    for row in cells(report):
        drawn.add_row(*row)
    console.print(drawn)
    for line in [*notes(report), *conclusion(report)]:
        console.print(line, markup=False)
    if found := report["suggestion"]:
        start = "start" if found["certain"] else "start, if you trust it"
        console.print(f"{start}: {command} {found['overrides']}", markup=False)


def cells(report: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """The table's rows, as text: the center, and each σ."""
    center = report["center"]
    head = ("0 (center)", f"{center['reward']:.4g}", "", "", "", f"{center['broken']:.0%}", "", "")
    return [head, *map(_cells, report["sigmas"])]


def _cells(row: Mapping[str, Any]) -> tuple[str, ...]:
    shares = (f"{row['changed']:.0%}", f"{row['broken']:.0%}") if row["members"] else ("", "")
    if "gain" not in row:
        return (f"{row['sigma']:g}", "–", "–", "–", *shares, "–", "–")
    noise, correlation = row["noise"], row["correlation"]
    return (
        f"{row['sigma']:g}",
        f"{row['mean']:.4g}",
        f"{row['spread']:.3g}",
        "–" if noise is None else f"{noise if noise > ROUNDING else 0:.3g}",
        *shares,
        "–" if correlation is None else f"{correlation:+.2f}",
        f"{plain(row['gain'], 3)} ± {plain(row['gain_error'], 2)}",
    )


def notes(report: Mapping[str, Any]) -> list[str]:
    """What the table does not show."""
    center, found = report["center"], []
    if report["evaluated"] < report["members"]:
        found.append(
            f"stopped after {report['evaluated']} of {report['members']} members: the figures are "
            "those of complete pairs"
        )
    if center["unended"] > 0.2:
        found.append(
            f"{center['unended']:.0%} of the center's answers are cut off at "
            "generation.max_new_tokens, and counted as broken"
        )
    if center["rescoring"] > 0:
        found.append(
            f"the reward is not a function of the answer: scored twice, an answer's reward varies "
            f"by {center['rescoring']:.3g} (standard deviation)"
        )
    for row in report["sigmas"]:
        if row["not_scored"]:
            count = f"{row['not_scored']} of {row['members']} members"
            found.append(
                f"σ = {row['sigma']:g}: {count} gave logits that are NaN or infinite, which ends a "
                "run with task.on_error=fail"
            )
    return found


def conclusion(report: Mapping[str, Any]) -> list[str]:
    """The suggestion with its reasons and expected step; or why there is none."""
    found = report["suggestion"]
    if not found:
        return [_without_suggestion(report)]
    named = ("sigma", "alpha", "population_size")
    lines = [
        f"es.{name}={found[name]:g}: {reason}"
        for name, reason in zip(named, found["reasons"], strict=True)
    ]
    if not found["certain"]:
        lines.insert(
            0,
            "uncertain: this gain is below two standard errors, which chance reaches often; take "
            "more --pairs",
        )
    steps = [values["step"] for values in found["parameters"].values()]
    if steps:
        low, middle, high = _range(steps)
        lines.append(
            f"an update moves a weight by {found['step']:.2g} (root mean square): {middle:.2%} of "
            f"a parameter's root mean square (median; {low:.2%} to {high:.2%}), and is expected to "
            f"raise the members' reward by {found['rise']:.2g}"
        )
    return lines


def _without_suggestion(report: Mapping[str, Any]) -> str:
    rows = [row for row in report["sigmas"] if row["members"]]
    stopped = report["evaluated"] < report["members"]
    if stopped and not all("gain" in row for row in report["sigmas"]):
        return f"too few pairs to say anything: {LEAST_PAIRS} at each σ are the least"
    largest = rows[-1]["sigma"] if rows else 0
    if rows and not any(row["changed"] for row in rows):
        return f"no answer changed: σ is too small up to {largest:g}; try larger --sigmas"
    center_whole = report["center"]["broken"] <= 0.9  # or σ is not what breaks answers
    if rows and center_whole and all(row["broken"] > 0.9 for row in rows):
        return (
            "nearly all answers are broken at every σ: try smaller --sigmas, or a larger "
            "generation.max_new_tokens if they are cut off"
        )
    measured = [row for row in rows if "spread" in row]
    if measured and not any(row["spread"] for row in measured):
        return "all rewards are equal although answers change: the reward needs to be finer"
    return NO_SIGNAL


def section(report: Mapping[str, Any]) -> list[Block]:
    """The report as a part of a page."""
    found = report["suggestion"]
    blocks: list[Block] = [Text(_about(report))]
    if found:
        blocks.append(Cards({
            "σ": f"{found['sigma']:g}",
            "α": f"{found['alpha']:g}",
            "N": str(found["population_size"]),
            "step of a weight": f"{found['step']:.2g}",
            "expected rise per update": f"{found['rise']:.2g}",
        }))  # fmt: skip
    blocks += [Text(line) for line in [*notes(report), *conclusion(report)]]
    blocks += [Table(cells(report), HEAD), *_charts(report["sigmas"])]
    if found:
        rows = [
            (kind, *(f"{low:.3g} to {high:.3g}" for low, _, high in values.values()))
            for kind, values in kinds(found["parameters"]).items()
        ]
        blocks += [
            Text(
                "The suggested step and σ in units of each parameter's root mean square; the range "
                "is that over layers."
            ),
            Table(rows, ("parameters", "root mean square", "step", "σ")),
        ]
    return blocks


def _about(report: Mapping[str, Any]) -> str:
    noise = report["noise"] + (f" of rank {report['rank']}" if report["rank"] else "")
    return (
        f"Antithetic pairs of {report['model']} with {noise} noise on {report['prompts']} prompts "
        f"of {report['task']}, run seed {report['seed']}. ρ is −1 where the reward is linear in "
        "the noise, 0 where it is chance and 1 where it is curvature."
    )


def _charts(rows: Sequence[Mapping[str, Any]]) -> list[Block]:
    def curve(name: str, key: str, error: str = "") -> Series:
        points = {r["sigma"]: r[key] for r in rows if r.get(key) is not None}
        band = {
            r["sigma"]: (r[key] - r[error], r[key] + r[error])
            for r in rows
            if error and r.get(key) is not None
        }
        return Series(name, points, band, dots=True)

    series = {
        "Gain per α": [curve("gain (band: standard error)", "gain", "gain_error")],
        "ρ(R₊, R₋)": [curve("correlation of a pair's rewards", "correlation")],
        "Standard deviation of rewards": [
            curve("spread over members", "spread"),
            curve("noise of scoring", "noise"),
        ],
        "Share of answers": [curve("changed", "changed"), curve("broken", "broken")],
    }
    charts = {title: line_chart(curves, "σ", log_x=True) for title, curves in series.items()}
    return [Chart(title, figure) for title, figure in charts.items() if figure]
