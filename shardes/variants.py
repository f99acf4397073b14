"""What may differ from the paper's Algorithm 2; every variant is off by default.

`es.antithetic`: members come in pairs θ ± σ·ε(s). `es.fitness`: what rewards are turned into. `es.standardize_prompts`:
each prompt's rewards count by how they differ between members. `es.sigma_final`, `es.alpha_final`, `es.schedule`: σ
and α over the iterations. `task.prompts_per_iteration`: which prompts are asked. Weight decay and the parameters that
evolve are in `shardes.update`.
"""

import math
from collections.abc import Sequence
from typing import TypeVar

import numpy as np

from shardes.config import ESConfig, Fitness, Schedule
from shardes.population import mean, member_seeds, standardize

P = TypeVar("P")


def noise_seeds(es: ESConfig, iteration: int) -> list[int]:
    """The seeds of the iteration's noise: one per member, or per antithetic pair."""
    return member_seeds(es.seed, iteration, es.population_size // (2 if es.antithetic else 1))


def perturbation(es: ESConfig, seeds: Sequence[int], member: int, sigma: float) -> tuple[int, float]:
    """A member's seed, and what its noise is multiplied by: σ, or for every second antithetic member −σ."""
    if es.antithetic:
        return seeds[member // 2], -sigma if member % 2 else sigma
    return seeds[member], sigma


def scheduled(es: ESConfig, iteration: int) -> tuple[float, float]:
    """σ and α of an iteration: from their first to their final values, in a line or half a cosine wave."""
    progress = iteration / max(es.iterations - 1, 1)
    if es.schedule is Schedule.cosine:
        progress = (1 - math.cos(math.pi * progress)) / 2
    pairs = ((es.sigma, es.sigma_final), (es.alpha, es.alpha_final))
    sigma, alpha = (first if final is None else first + (final - first) * progress for first, final in pairs)
    return sigma, alpha


def centered_ranks(rewards: Sequence[float]) -> list[float]:
    """Ranks, scaled to lie from −0.5 for the lowest reward to 0.5 (Salimans et al. 2017); equals share their mean."""
    ordered = sorted(rewards)
    places: dict[float, list[int]] = {}
    for place, reward in enumerate(ordered):
        places.setdefault(reward, []).append(place)
    return [(mean(places[reward]) / (len(rewards) - 1)) - 0.5 for reward in rewards]


def fitness(es: ESConfig, scores: Sequence[Sequence[float]]) -> list[float]:
    """What each member's noise is weighted by, before α/N; `scores` are its rewards by prompt.

    With `standardize_prompts` a prompt's rewards are standardised over the members, before they are averaged over
    prompts, so that no prompt counts for more because its rewards spread more.
    """
    if es.standardize_prompts:
        scores = list(zip(*map(standardize, zip(*scores, strict=True)), strict=True))
    rewards = list(map(mean, scores))
    return centered_ranks(rewards) if es.fitness is Fitness.centered_rank else standardize(rewards)


def coefficients(es: ESConfig, alpha: float, weights: Sequence[float]) -> list[float]:
    """c = (α/N)·fitness as float32, per seed of the iteration's noise; of a pair, the difference."""
    if es.antithetic:
        weights = [weights[n] - weights[n + 1] for n in range(0, len(weights), 2)]
    return [float(np.float32(alpha / es.population_size * weight)) for weight in weights]


def prompt_batch(run_seed: int, iteration: int, size: int | None, count: int) -> list[int] | None:
    """The numbers of the training prompts, of `count`, that every member of an iteration is asked; None: all.

    Batches walk through the prompts in an order that each epoch shuffles anew, from nothing but (run seed, epoch).
    """
    if size is None:
        return None
    first, last = iteration * size, (iteration + 1) * size
    orders = []
    for epoch in range(first // count, (last - 1) // count + 1):
        keys = np.random.SeedSequence([run_seed, epoch, 1]).generate_state(count, np.uint64)
        orders += np.argsort(keys, kind="stable").tolist()
    begin = first % count
    return orders[begin : begin + size]


def chosen(prompts: Sequence[P], asked: list[int] | None) -> list[P]:
    """The prompts `asked`, by number; None: all."""
    return list(prompts) if asked is None else [prompts[number] for number in asked]
