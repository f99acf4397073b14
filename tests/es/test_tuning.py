"""A probe's figures and rules, on rewards of weights whose form is known."""

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from shardes.config.schema import ESConfig, Fitness
from shardes.es.population import member_seeds
from shardes.es.statistics import mean, std
from shardes.es.tuning import best, figures, prompt_noise, step_size, suggest
from shardes.noise import add_noise
from shardes.sharding.regions import Region

SIZE, PAIRS = 2000, 24
REGIONS = (Region.contiguous(0, SIZE),)
SLOPE = torch.randn(SIZE, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def scores_of(
    reward: Callable[[torch.Tensor], list[float]], sigma: float, pairs: int = PAIRS
) -> list[list[float]]:
    """Rewards by prompt of the members σ·ε around a center of zeros."""
    scores = []
    for seed in member_seeds(0, 0, pairs):
        for sign in (1, -1):
            theta = torch.zeros(SIZE)
            add_noise(theta, "weight", REGIONS, [seed], [sign * sigma], theta, None)
            scores.append(reward(theta.double()))
    return scores


def linear(theta: torch.Tensor) -> list[float]:
    return [float(SLOPE @ theta)]


def quadratic(theta: torch.Tensor) -> list[float]:
    return [-float(SLOPE**2 @ theta**2)]


@pytest.mark.parametrize("es", [ESConfig(), ESConfig(fitness=Fitness.centered_rank)])
def test_a_linear_reward_is_signal_alone(es):
    sigma = 0.01
    found = figures(es, sigma, scores_of(linear, sigma), 0.0)
    assert found.correlation == pytest.approx(-1, abs=0.02)
    if es.fitness is Fitness.standardized:  # the gain is the slope along the members' noise
        assert found.gain == pytest.approx(found.spread / sigma, rel=0.01)
    assert found.lower_gain > 0 and found.noise is None
    assert abs(found.drop) < 1e-6 * found.spread + 1e-12


def test_a_quadratic_reward_at_its_optimum_has_no_signal():
    found = figures(ESConfig(), 0.01, scores_of(quadratic, 0.01), 0.0)
    assert found.correlation == pytest.approx(1)
    assert found.gain < 0 and best([found]) is None
    assert found.drop == pytest.approx(1e-4 * float(SLOPE**2 @ torch.ones(SIZE).double()), rel=0.1)


def test_noise_that_a_pair_does_not_share_cancels():
    generator = torch.Generator().manual_seed(5)

    def noisy(theta: torch.Tensor) -> list[float]:
        return [float(torch.randn(1, generator=generator))]

    found = figures(ESConfig(), 0.01, scores_of(noisy, 0.01, 400), 0.0)
    assert abs(found.correlation) < 0.15
    assert abs(found.gain) < 3 * found.gain_error


def test_the_sigma_with_signal_is_found():
    """Below it answers do not change, and beyond it the model is broken."""

    def reward(theta: torch.Tensor) -> list[float]:
        if theta.square().mean() > 0.02**2:
            return [-50.0]
        return [round(linear(theta)[0] * 4) / 4]

    sigmas = [0.0003, 0.003, 0.0101, 0.03]
    found = [figures(ESConfig(), sigma, scores_of(reward, sigma), 0.0) for sigma in sigmas]
    assert found[0].correlation is None or found[0].correlation > -0.9
    assert found[3].spread == 0 and found[3].correlation is None and found[3].gain == 0
    assert best(found).sigma in (0.003, 0.0101)


def test_the_rise_that_is_expected_is_that_of_updates():
    """Over many populations; the reward has a slope and a curvature."""

    def reward(theta: torch.Tensor) -> list[float]:
        return [linear(theta)[0] + 20 * quadratic(theta)[0]]

    sigma = 0.01
    chosen = figures(ESConfig(), sigma, scores_of(reward, sigma, 100), 0.0)
    found = suggest(ESConfig(population_size=10), chosen)
    rises = []
    for t in range(60):
        seeds = member_seeds(7, t, found.population_size)
        rewards, noises = [], []
        for seed in seeds:
            noise = torch.zeros(SIZE)
            add_noise(noise, "weight", REGIONS, [seed], [1.0], noise, None)
            noises.append(noise.double())
            rewards.append(reward(sigma * noises[-1])[0])
        middle, spread = mean(rewards), std(rewards)
        step = torch.zeros(SIZE, dtype=torch.float64)
        for value, noise in zip(rewards, noises, strict=True):
            step += found.alpha / len(seeds) * (value - middle) / spread * noise
        assert step.square().mean().sqrt() == pytest.approx(found.step, rel=0.1)
        rises.append(reward(step)[0])
    assert mean(rises) == pytest.approx(found.rise, rel=0.25)


def test_alpha_is_that_of_half_the_best_step_or_of_what_members_explored():
    sigma, size = 0.01, 16
    curved = figures(
        ESConfig(),
        sigma,
        scores_of(lambda theta: [linear(theta)[0] + 100 * quadratic(theta)[0]], sigma),
        0.0,
    )
    alpha, _ = step_size(curved, size)
    drop = curved.drop + curved.drop_error

    def rise(a: float) -> float:
        return a * curved.gain - (curved.fitness_rms * a / math.sqrt(size) / sigma) ** 2 * drop

    assert max(range(1, 400), key=lambda n: rise(alpha * n / 100)) in range(190, 211)
    flat = figures(ESConfig(), sigma, scores_of(linear, sigma), 0.0)
    alpha, reason = step_size(flat, size)
    assert alpha / math.sqrt(size) == pytest.approx(sigma / 2, rel=0.05) and "σ/2" in reason
    ranked = figures(ESConfig(fitness=Fitness.centered_rank), sigma, scores_of(linear, sigma), 0.0)
    assert ranked.fitness_rms == pytest.approx(0.29, abs=0.01)
    assert step_size(ranked, size)[0] == pytest.approx(alpha / 0.29, rel=0.05)


def test_a_population_is_larger_where_less_is_signal():
    found = figures(ESConfig(), 0.01, scores_of(linear, 0.01), 0.0)

    def size(correlation: float, configured: int = 2) -> int:
        figures = replace(found, correlation=correlation)
        return suggest(ESConfig(population_size=configured), figures).population_size

    assert [size(rho) for rho in (-1.0, -0.5, -0.1, -0.09)] == [4, 8, 40, 46]
    assert [size(rho, 30) for rho in (-1.0, -0.09)] == [30, 46]


def test_the_noise_of_prompts_is_what_members_and_prompts_do_not_explain():
    generator = torch.Generator().manual_seed(2)
    members, prompts = torch.randn(60, 1, generator=generator), 5 * torch.arange(40.0)
    exact = (members + prompts).tolist()
    assert prompt_noise(exact) == pytest.approx(0, abs=1e-6)
    noisy = (members + prompts + 3 * torch.randn(60, 40, generator=generator)).tolist()
    assert prompt_noise(noisy) == pytest.approx(3 / math.sqrt(40), rel=0.1)
    assert prompt_noise([[1.0], [2.0]]) is None
