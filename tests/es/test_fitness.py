"""Seeds, z-scores and coefficients."""

import math
import warnings

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from models import paper_coefficients
from shardes.config.limits import LARGEST_REWARD
from shardes.config.schema import ESConfig, Fitness
from shardes.es.fitness import coefficients, fitness, standardize
from shardes.es.population import member_seeds
from shardes.es.statistics import interval, mean, std


def test_seeds_follow_from_run_seed_and_iteration_alone():
    assert member_seeds(3, 5, 8) == member_seeds(3, 5, 8)
    assert member_seeds(3, 5, 12)[:8] == member_seeds(3, 5, 8)
    everything = [seed for run in range(20) for t in range(20) for seed in member_seeds(run, t, 8)]
    assert len(set(everything)) == len(everything)
    assert max(everything) > 2**63
    numpys = np.random.SeedSequence([0, 0]).generate_state(2, np.uint64)
    assert member_seeds(0, 0, 2) == numpys.tolist()


@given(st.lists(st.floats(-1e6, 1e6), min_size=2, max_size=40))
def test_standardized_rewards_are_the_papers_z_scores(rewards):
    z = standardize(rewards)
    if len(set(rewards)) == 1:
        assert z == [0.0] * len(rewards)
    else:
        expected = (np.array(rewards) - np.mean(rewards)) / (np.std(rewards) + 1e-8)
        assert z == pytest.approx(expected.tolist(), rel=1e-6, abs=1e-6)


def test_coefficients_are_float32():
    coefficients = paper_coefficients([1.0, 2.0, 4.0], 0.3)
    assert coefficients == [float(np.float32(0.1 * z)) for z in standardize([1.0, 2.0, 4.0])]
    assert paper_coefficients([2.5, 2.5], 0.3) == [0.0, 0.0]


REWARDS = st.floats(-LARGEST_REWARD, LARGEST_REWARD)


@pytest.mark.parametrize("kind", list(Fitness))
@pytest.mark.parametrize("by_prompt", [False, True])
@pytest.mark.parametrize("antithetic", [False, True])
@settings(max_examples=20)
@given(scores=st.lists(st.tuples(REWARDS, REWARDS, REWARDS), min_size=2, max_size=12))
@example(scores=[(LARGEST_REWARD,) * 3, (-LARGEST_REWARD,) * 3] * 500)
@example(scores=[(LARGEST_REWARD,) * 3, (math.nextafter(LARGEST_REWARD, 0),) * 3] * 5)
def test_every_update_from_rewards_in_range_is_finite(kind, by_prompt, antithetic, scores):
    scores = scores[: len(scores) // 2 * 2]
    es = ESConfig(
        population_size=len(scores),
        fitness=kind,
        standardize_prompts=by_prompt,
        antithetic=antithetic,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        weights = fitness(es, scores)
        update = coefficients(es, 1.0, weights)
    means = list(map(mean, scores))
    assert all(map(math.isfinite, [*weights, *update, std(means), *interval(means)]))
    assert max(map(abs, weights)) <= math.sqrt(len(scores)) * 1.001
    assert len(update) == len(scores) // (1 + antithetic)
