"""What an iteration consists of, derived from (config, iteration): σ, α, seeds, members, prompts.

Seeds, σ, α, members and prompts are functions of (config, iteration) alone, so every rank and every
resumed run derives the same. `digest` records the center to which they apply.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from shardes.config.schema import Config, ESConfig, Noise, Schedule
from shardes.errors import ConfigError
from shardes.es.update import evolves

P = TypeVar("P")


@dataclass(frozen=True)
class Member:
    """θ + σ·ε(seed). The second member of an antithetic pair has −σ."""

    seed: int  # 64 bits
    sigma: float


@dataclass(frozen=True)
class Iteration:
    """All that one iteration of Algorithm 2 consists of, before anything is evaluated.

    `digest` is that of the center θ before the iteration. An antithetic pair of members shares a
    seed, so there are half as many `seeds` then. `prompt_numbers` are the training prompts that
    every member answers, None for all; `prompts` are their token ids.
    """

    index: int
    digest: str
    sigma: float
    alpha: float
    seeds: list[int]
    members: list[Member]
    prompt_numbers: list[int] | None
    prompts: list[list[int]]

    @classmethod
    def derive(
        cls, config: Config, index: int, digest: str, prompts: Sequence[list[int]]
    ) -> "Iteration":
        """Iteration `index`, counted from 0.

        `prompts` are the token ids of all training prompts.
        """
        es = config.es
        sigma, alpha = schedule(es, index)
        seeds = member_seeds(es.seed, index, es.population_size // (2 if es.antithetic else 1))
        numbers = prompt_batch(es.seed, index, config.task.prompts_per_iteration, len(prompts))
        chosen = select(prompts, numbers)
        return cls(index, digest, sigma, alpha, seeds, members(es, seeds, sigma), numbers, chosen)


def member_seeds(run_seed: int, iteration: int, count: int) -> list[int]:
    """Seeds of 64 bits each, a function of (run seed, iteration) alone."""
    return np.random.SeedSequence([run_seed, iteration]).generate_state(count, np.uint64).tolist()


def members(es: ESConfig, seeds: Sequence[int], sigma: float) -> list[Member]:
    """The population: one member per seed, or a pair θ ± σ·ε(seed) with `es.antithetic`."""
    signs = (1, -1) if es.antithetic else (1,)
    return [Member(seed, sign * sigma) for seed in seeds for sign in signs]


def noise_rank(es: ESConfig) -> int:
    """r of noise of low rank; 0: full noise."""
    return es.rank if es.noise is Noise.low_rank else 0


def check_rank(es: ESConfig, shapes: Iterable[tuple[str, tuple[int, ...]]]) -> None:
    """Raise ConfigError if es.rank is above the smaller side of a matrix that is trained.

    Args:
        shapes: the parameters' names and shapes.
    """
    rank = noise_rank(es)
    for name, shape in shapes if rank else ():
        side = min(shape[-2:], default=0)
        if evolves(es.evolve, rank, name, shape) and rank > side:
            rows, cols = shape[-2:]
            raise ConfigError(
                f"es.rank={rank}: {name} is {rows} × {cols}, so its rank is at most {side}; use "
                "a smaller rank, or leave such parameters out with es.evolve"
            )


def schedule(es: ESConfig, iteration: int) -> tuple[float, float]:
    """σ and α of an iteration: from their first to their final values, linearly or along half a
    cosine wave.
    """
    progress = iteration / max(es.iterations - 1, 1)
    if es.schedule is Schedule.cosine:
        progress = (1 - math.cos(math.pi * progress)) / 2
    pairs = ((es.sigma, es.sigma_final), (es.alpha, es.alpha_final))
    sigma, alpha = (
        first if final is None else first + (final - first) * progress for first, final in pairs
    )
    return sigma, alpha


def prompt_batch(run_seed: int, iteration: int, size: int | None, count: int) -> list[int] | None:
    """The numbers of the `size` training prompts, of `count`, that an iteration uses; None for all.

    Batches walk through the prompts in an order that each epoch shuffles anew, a function of (run
    seed, epoch).
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


def evaluated_numbers(config: Config, count: int) -> list[int] | None:
    """The numbers of the training prompts, of `count`, that every evaluation of the center asks:
    those of the first iteration, so that evaluations can be compared; None for all.
    """
    return prompt_batch(config.es.seed, 0, config.task.prompts_per_iteration, count)


def check_prompts_per_iteration(config: Config, count: int) -> None:
    """Raise ConfigError if an iteration is to have more than the `count` training prompts."""
    size = config.task.prompts_per_iteration
    if size is not None and size > count:
        raise ConfigError(
            f"task.prompts_per_iteration={size}: the task has {count} training prompts; use at "
            "most so many, or null for all"
        )


def held_out_numbers(limit: int | None, count: int) -> list[int] | None:
    """The numbers of the held-out prompts, of `count`, that evaluations ask; None for all.

    They are a function of `limit` and `count` alone, so runs with other seeds are compared on the
    same prompts.
    """
    if limit is None or limit >= count:
        return None
    keys = np.random.SeedSequence([count, 2]).generate_state(count, np.uint64)
    return sorted(np.argsort(keys, kind="stable")[:limit].tolist())


def select(prompts: Sequence[P], numbers: Sequence[int] | None) -> list[P]:
    """The prompts of these numbers; None for all."""
    return list(prompts) if numbers is None else [prompts[number] for number in numbers]
