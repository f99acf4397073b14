"""From rewards to update coefficients: c_n = (α/N)·fitness(R_n), by default with the paper's
z-scores.

`es.fitness` chooses z-scores or centered ranks. With `es.standardize_prompts` each prompt's rewards
are standardized over the members first. `es.antithetic` pairs share a seed, and so a coefficient.
"""

from collections.abc import Sequence

import numpy as np

from shardes.config.schema import ESConfig, Fitness
from shardes.es.statistics import mean, std


def standardize(rewards: Sequence[float]) -> list[float]:
    """z_n = (R_n − mean R) / (std R + 1e-8), ddof 0 (Algorithm 2); all 0 where all rewards are
    equal.
    """
    if max(rewards) == min(rewards):
        return [0.0] * len(rewards)
    average, spread = mean(rewards), std(rewards) + 1e-8
    return [(reward - average) / spread for reward in rewards]


def centered_ranks(rewards: Sequence[float]) -> list[float]:
    """Ranks from −0.5, of the lowest reward, to 0.5 (Salimans et al., 2017).

    Equal rewards share their mean rank.
    """
    ranks: dict[float, list[int]] = {}
    for rank, reward in enumerate(sorted(rewards)):
        ranks.setdefault(reward, []).append(rank)
    return [mean(ranks[reward]) / (len(rewards) - 1) - 0.5 for reward in rewards]


def fitness(es: ESConfig, scores: Sequence[Sequence[float]]) -> list[float]:
    """Each member's weight in the update, before α/N.

    Args:
        scores: each member's rewards by prompt, or its mean reward alone.

    With `es.standardize_prompts`, a prompt whose rewards spread widely counts no more than others.
    """
    if es.standardize_prompts:
        scores = list(zip(*map(standardize, zip(*scores, strict=True)), strict=True))
    rewards = list(map(mean, scores))
    return centered_ranks(rewards) if es.fitness is Fitness.centered_rank else standardize(rewards)


def coefficients(es: ESConfig, alpha: float, weights: Sequence[float]) -> list[float]:
    """c = (α/N)·fitness as float32, one per seed: an antithetic pair's is the difference of its
    members'.
    """
    if es.antithetic:
        weights = [weights[n] - weights[n + 1] for n in range(0, len(weights), 2)]
    return [float(np.float32(alpha / es.population_size * weight)) for weight in weights]
