"""The whole run: hours, rates, bytes on the network and on disk."""

from typing import Any

from shardes.config.schema import Config, Restore
from shardes.planning.devices import SHARE
from shardes.planning.shapes import ModelShapes
from shardes.planning.time import Estimate
from shardes.words import counted

# Bytes of a record per member: 24 kB for 400 (docs/scaling.md)
RECORD = 60


def whole_run(config: Config, estimate: Estimate) -> dict[str, Any]:
    """Figures of a run from its first iteration to its last, each with its assumption.

    Returns:
        by name: "value", in hours, tokens per second or bytes, and "assumption".
    """
    es, machine = config.es, estimate.machine
    iteration = estimate.seconds().total
    evaluations = 1 + len(range(0, es.iterations, config.eval.every or es.iterations))
    seconds = es.iterations * iteration + evaluations * estimate.evaluation()
    on_cpu = machine.gpu_memory is None
    likely = seconds if on_cpu else seconds / SHARE
    tokens = es.population_size * len(estimate.workload.train) * estimate.response
    sent = estimate.traffic()
    within = machine.ranks * (sent.reduced + sent.gathered)
    rates = f"{SHARE:.0%} of the peak rates: an assumption"
    if on_cpu:
        rates = (
            "measured rates of this CPU; iterations of runs took 1.1 to 1.6 times that: "
            "docs/plan.md"
        )
    of_ranks = "rank hours, likely" if on_cpu else "GPU hours, likely"
    figures = {
        "hours, at least": (
            seconds / 3600,
            f"{counted(es.iterations, 'iteration')} and "
            f"{counted(evaluations, 'evaluation')} of the center, every "
            "response as long as allowed, at full rates",
        ),
        "hours, likely": (likely / 3600, rates),
        of_ranks: (likely / 3600 * machine.ranks, rates),
        "tokens/s, likely": (tokens * es.iterations / likely, "of members' responses"),
        "bytes between replicas": (
            sent.replicas * es.iterations,
            "337 bytes per member, measured with eight members",
        ),
        "bytes within replicas": (within * es.iterations, "sums and gathers in a ring"),
        "disk": _disk(config, estimate.model),
    }
    return {
        name: {"value": value, "assumption": assumption}
        for name, (value, assumption) in figures.items()
    }


def _disk(config: Config, model: ModelShapes) -> tuple[int, str]:
    """The bytes of a run directory, and what they hold."""
    es, checkpoint = config.es, config.checkpoint
    kept = checkpoint.keep + 1 + checkpoint.best if checkpoint.every else 0
    itemsize = 4 if es.restore is Restore.copy else model.itemsize
    return (
        kept * itemsize * model.numel + es.iterations * es.population_size * RECORD,
        f"{kept} snapshots of the center, one of them being written, and the journal; "
        "samples and logs left out",
    )
