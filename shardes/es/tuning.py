"""What a probe says of σ, α and N: figures of the members at one σ, and the rules that choose.

A probe evaluates antithetic pairs θ ± σ·ε. The rewards of a pair have an even part (R₊ + R₋)/2 and
an odd part (R₊ − R₋)/2. To first order the reward changes by σ·g·ε, which is odd: the variance of
the odd part is the signal that an update uses. Curvature is even. What a pair does not share (an
answer that flips for no reason, a finite set of prompts) is in both parts alike. So

    Var(odd) − Var(even) = first-order signal − curvature,

in which noise of any kind cancels, and the correlation of R₊ and R₋ is
ρ = (Var(even) − Var(odd)) / (Var(even) + Var(odd)): −1 where the reward is linear, +1 where it is
quadratic around an optimum, 0 where it is noise.

An update moves each weight by about α/√N, whatever σ is, and raises the reward by α·G to first
order, with G = (Var(odd) − Var(even)) / (σ·std R) = −ρ·std(R)/σ, the **gain**. It also costs: a
step of N random directions has the size α/√N of a perturbation, so it costs the share (α/(√N·σ))²
of the drop d = R(θ) − mean R at σ. From these:

- **σ**: that of the largest gain, by the gain's lower bound (one standard error below), so that a
  gain which was measured badly is not preferred. No σ is suggested if no lower bound is above 0.
  The suggestion is uncertain if the gain is below two standard errors: of several σ without any
  signal, one often reaches one of them by chance.
- **N**: the configured one, but at least 4/(−ρ). An update's rise is α·G, and differs by chance
  with a standard deviation of α·G/√(−ρ·N), so it is then two of them above 0.
- **α**: half of what is best for a single step, G·N·σ²/(2·d), because the drops of many steps add
  up: three quarters of that step's rise at a quarter of its drop. And no more than moves the
  weights by σ/2 (root mean square): the members have explored no further than σ.

With centered ranks and standardized prompts, the fitness takes the place of the standardized
reward, so that G, N and α are those of the configured update.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from shardes.config.schema import ESConfig
from shardes.es.fitness import fitness
from shardes.es.statistics import mean, std

LEAST_PAIRS = 3  # of which the spread of even parts can be told
CERTAINTY = 2.0  # standard deviations by which a gain, and an update's rise, are to exceed chance
CAUTION = 0.5  # share of the α that is best for one step, and of σ that a step may move the weights

Scores = Sequence[Sequence[float]]  # rewards by member and prompt; pairs follow one another


@dataclass(frozen=True)
class Figures:
    """What the pairs at one σ say; rewards are those of members, means over the prompts.

    Attributes:
        pairs: those that were complete.
        mean, spread: of the rewards, and their standard deviation.
        noise: the part of the spread that other prompts of the same kind would give in their turn:
            the standard error of a member's reward over the prompts; None with one prompt.
        correlation: ρ of a pair's fitness; None if all are equal.
        gain: G, rise of the reward to first order per unit of α.
        gain_error: its standard error.
        drop, drop_error: the center's reward minus the mean of the members', and its standard
            error.
        fitness_rms: root mean square of a seed's weight in the update, before α/N, times √(seeds
            per member); the update's root mean square is α/√N times this.
    """

    sigma: float
    pairs: int
    mean: float
    spread: float
    noise: float | None
    correlation: float | None
    gain: float
    gain_error: float
    drop: float
    drop_error: float
    fitness_rms: float

    @property
    def lower_gain(self) -> float:
        """One standard error below the gain."""
        return self.gain - self.gain_error


@dataclass(frozen=True)
class Suggestion:
    """σ, α and N, and what an update with them is expected to do.

    Attributes:
        step: root mean square of the update's elements.
        rise: of the reward, per update.
        certain: whether the gain is at least two standard errors above 0.
        reasons: a sentence each for σ, α and N.
    """

    sigma: float
    alpha: float
    population_size: int
    step: float
    rise: float
    certain: bool
    reasons: tuple[str, str, str]


def figures(es: ESConfig, sigma: float, scores: Scores, center: float) -> Figures:
    """The figures of the members at one σ.

    Args:
        scores: at least LEAST_PAIRS pairs; the members of a pair follow one another.
        center: the center's reward.
    """
    rewards = [mean(row) for row in scores]
    weights = fitness(es, scores)
    even, odd = _parts(rewards)
    even_weights, odd_weights = _parts(weights)
    signal, error = _signal(even, odd, even_weights, odd_weights)
    correlation = _correlation(even_weights, odd_weights)
    square = mean([weight**2 for weight in weights])
    if es.antithetic and correlation is not None:
        square *= 1 - correlation  # a pair's coefficient is the difference of its weights
    return Figures(
        sigma,
        len(even),
        mean(rewards),
        std(rewards),
        prompt_noise(scores),
        correlation,
        signal / sigma,
        error / sigma,
        center - mean(rewards),
        _sample_std(even) / math.sqrt(len(even)),
        math.sqrt(square),
    )


def prompt_noise(scores: Scores) -> float | None:
    """The standard error of a member's mean reward over the prompts, given that all members answer
    the same ones: from what is left of the rewards without each member's and each prompt's mean.
    """
    members, prompts = len(scores), len(scores[0])
    if prompts < 2:
        return None
    member_means = [mean(row) for row in scores]
    prompt_means = [mean(column) for column in zip(*scores, strict=True)]
    middle = mean(member_means)
    rest = math.fsum(
        (reward - member_mean - prompt_mean + middle) ** 2
        for row, member_mean in zip(scores, member_means, strict=True)
        for reward, prompt_mean in zip(row, prompt_means, strict=True)
    )
    return math.sqrt(rest / ((members - 1) * (prompts - 1)) / prompts)


def best(all_figures: Sequence[Figures]) -> Figures | None:
    """The σ of the largest gain by its lower bound; None if no lower bound is above 0."""
    chosen = max(all_figures, key=lambda figures: figures.lower_gain, default=None)
    return chosen if chosen and chosen.lower_gain > 0 else None


def suggest(es: ESConfig, chosen: Figures) -> Suggestion:
    """σ, α and N for the figures that `best` chose; see the rules above."""
    sigma, correlation = chosen.sigma, chosen.correlation or 0.0
    least = least_population(-correlation)
    size = max(least, es.population_size)
    alpha, limit = step_size(chosen, size)
    step = chosen.fitness_rms * alpha / math.sqrt(size)
    rise = alpha * chosen.gain - (step / sigma) ** 2 * max(chosen.drop, 0.0)
    reasons = (
        f"its gain, {plain(chosen.gain, 3)} ± {plain(chosen.gain_error, 2)} per unit of α, has the "
        "highest lower bound",
        limit,
        f"at least {least}, since ρ = {correlation:.2f}: the rise of an update is then twice what "
        "it varies by chance",
    )
    certain = chosen.gain >= CERTAINTY * chosen.gain_error
    return Suggestion(sigma, alpha, size, step, rise, certain, reasons)


def least_population(share: float) -> int:
    """The least N, from the share of the rewards' variance that is signal: even, at least 4."""
    size = math.ceil(CERTAINTY**2 / max(share, 1e-3))
    return max(size + size % 2, 4)


def step_size(chosen: Figures, size: int) -> tuple[float, str]:
    """α for a population of `size`, and what limits it."""
    sigma, scale = chosen.sigma, chosen.fitness_rms / math.sqrt(size)
    explored = CAUTION * sigma / scale
    drop = chosen.drop + chosen.drop_error  # a drop that was measured badly may be larger
    if drop > 0:
        steepest = CAUTION * chosen.gain * (sigma / scale) ** 2 / (2 * drop)
        if steepest < explored:
            return _rounded(steepest), (
                f"half of what is best for one step: at σ the reward drops by {chosen.drop:.3g} ± "
                f"{chosen.drop_error:.2g}"
            )
    return _rounded(explored), (
        "it moves the weights by σ/2, root mean square: half as far as a member"
    )


def _parts(values: Sequence[float]) -> tuple[list[float], list[float]]:
    """The even and odd parts of pairs that follow one another."""
    pairs = list(zip(values[::2], values[1::2], strict=True))
    return [(a + b) / 2 for a, b in pairs], [(a - b) / 2 for a, b in pairs]


def _signal(
    even: Sequence[float],
    odd: Sequence[float],
    even_weights: Sequence[float],
    odd_weights: Sequence[float],
) -> tuple[float, float]:
    """The covariance of odd parts of reward and weight, less that of even parts; its standard
    error.

    Odd parts have the expected value 0, since a pair's signs are arbitrary.
    """
    count, middle, middle_weight = len(even), mean(even), mean(even_weights)
    terms = [
        o * ow - (e - middle) * (ew - middle_weight) * count / (count - 1)
        for e, o, ew, ow in zip(even, odd, even_weights, odd_weights, strict=True)
    ]
    return mean(terms), _sample_std(terms) / math.sqrt(count)


def _correlation(even: Sequence[float], odd: Sequence[float]) -> float | None:
    even_variance, odd_variance = _sample_std(even) ** 2, mean([value**2 for value in odd])
    total = even_variance + odd_variance
    return (even_variance - odd_variance) / total if total else None


def _sample_std(values: Sequence[float]) -> float:
    """Standard deviation with ddof 1."""
    return std(values) * math.sqrt(len(values) / (len(values) - 1))


def _rounded(value: float) -> float:
    """Two significant digits."""
    return float(f"{value:.2g}")


def plain(value: float, digits: int) -> str:
    """A number with so many significant digits, and without an exponent up to a million."""
    return f"{float(f'{value:.{digits}g}'):g}"
