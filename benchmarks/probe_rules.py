"""How well a probe's rules choose σ, in a simulation whose truth is known.

    python -m benchmarks.probe_rules

A pair's rewards are ±L·x + C·y + n·(chance of each member), where x and y are standard normal and
the same at every σ. With s = σ over the σ of the best region, which differs from case to case by a
factor of 12, the linear part is L = s·exp(−s²/2), the curvature C = 0.3·s²/(1 + s²) and chance
n = 0.6·√s·exp(−s²/8), at most 0.6. Without signal, only chance is left.
"""

import sys

import numpy as np

from shardes.config.schema import ESConfig
from shardes.es.tuning import Figures, best, figures, suggest

CASES = 1000
SIGMAS = [10 ** (step / 2) for step in range(-3, 3)]


def parts(sigma: float, middle: float) -> tuple[float, float, float]:
    """Standard deviations of the linear part, of curvature and of chance."""
    s = sigma / middle
    chance = 0.6 * min(1, s**0.5) * np.exp(-(s**2) / 8)
    return s * np.exp(-(s**2) / 2), 0.3 * s**2 / (1 + s**2), chance


def true_gain(sigma: float, middle: float) -> float:
    linear, curvature, chance = parts(sigma, middle)
    return linear**2 / np.sqrt(linear**2 + curvature**2 + chance**2) / sigma


def probe(rng: np.random.Generator, pairs: int, middle: float | None) -> list[Figures]:
    """The figures of a probe; middle None: without signal."""
    x, y = rng.normal(size=(2, pairs))
    found = []
    for sigma in SIGMAS:
        linear, curvature, chance = parts(sigma, middle) if middle else (0, 0, 1)
        noise = chance * rng.normal(size=(pairs, 2))
        rewards = (linear * x)[:, None] * [1, -1] + (curvature * y)[:, None] + noise
        found.append(figures(ESConfig(), sigma, [[r] for r in rewards.ravel().tolist()], 0.0))
    return found


def row(pairs: int) -> str:
    """A row of the table: what is chosen with signal, and how often anything is without."""
    rng = np.random.default_rng(pairs)
    shares, places, none = [], [], 0
    for _ in range(CASES):
        middle = 10 ** rng.uniform(-0.8, 0.3)
        chosen = best(probe(rng, pairs, middle))
        if chosen is None:
            none += 1
            continue
        gains = [true_gain(sigma, middle) for sigma in SIGMAS]
        place = SIGMAS.index(chosen.sigma)
        shares.append(gains[place] / max(gains))
        places.append(abs(place - int(np.argmax(gains))))
    empty = [best(probe(rng, pairs, None)) for _ in range(CASES)]
    suggested = [found for found in empty if found]
    certain = [found for found in suggested if suggest(ESConfig(), found).certain]
    cells = [
        none / CASES,
        np.mean(shares),
        np.mean(np.equal(places, 0)),
        np.mean(np.less_equal(places, 1)),
        len(suggested) / CASES,
        len(certain) / CASES,
    ]
    return f"| {pairs} | " + " | ".join(f"{cell:.0%}" for cell in cells) + " |"


def main() -> int:
    print(
        "| pairs | no σ suggested | gain, as a share of the best | the best σ | it or a neighbor "
        "| without signal: a σ suggested | and called certain |\n" + "|" + " --- |" * 7
    )
    for pairs in (5, 15, 30):
        print(row(pairs), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
