"""The members of a probe, and what their answers are worth."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from shardes.config.schema import Config
from shardes.es.population import Iteration, Member

SIGNS = (1, -1)
SIGMAS = 6  # by default,
FACTOR = 10**0.5  # this factor apart,
BELOW = 3  # so many of them below the config's


@dataclass(frozen=True)
class Answered:
    """What one model's answers to the iteration's prompts are worth.

    Attributes:
        rewards: by prompt. Empty if training would end here: a response that the model could not
            complete, with task.on_error=fail.
        changed: answers that differ from the center's, in any token.
        empty: answers without text.
        unended: answers with text that max_new_tokens cut off.
        failed: answers that could not be completed or scored.
        tokens: of all answers.
    """

    rewards: list[float]
    changed: int
    empty: int
    unended: int
    failed: int
    tokens: int


@dataclass(frozen=True)
class Plan:
    """The members of a probe: for each seed, for each σ, the pair θ ± σ·ε(seed)."""

    sigmas: tuple[float, ...]
    iteration: Iteration

    @classmethod
    def derive(
        cls,
        config: Config,
        sigmas: Sequence[float],
        pairs: int,
        digest: str,
        prompts: Sequence[list[int]],
    ) -> "Plan":
        """Pairs of the seeds and prompts of a run's first iteration.

        Args:
            digest, prompts: see `Iteration.derive`.
        """
        es = replace(config.es, population_size=2 * pairs, antithetic=True)
        iteration = Iteration.derive(replace(config, es=es), 0, digest, prompts)
        members = [
            Member(seed, sign * sigma)
            for seed in iteration.seeds
            for sigma in sigmas
            for sign in SIGNS
        ]
        return cls(tuple(sigmas), replace(iteration, members=members))

    def by_sigma(self, results: Mapping[int, Answered]) -> dict[float, list[Answered]]:
        """The members that have a result, by σ: complete pairs only, whose members follow one
        another.
        """
        found: dict[float, list[Answered]] = {sigma: [] for sigma in self.sigmas}
        for first in range(0, len(self.iteration.members), len(SIGNS)):
            if first in results and first + 1 in results:
                sigma = abs(self.iteration.members[first].sigma)
                found[sigma] += [results[first], results[first + 1]]
        return found


@dataclass(frozen=True)
class CenterAnswers:
    """The center's answers, scored twice; `rescoring` is the root mean square of the difference of
    an answer's two rewards, over √2: the standard deviation of a reward that is not a function of
    the answer.
    """

    answered: Answered
    rescoring: float


def default_sigmas(sigma: float) -> list[float]:
    """SIGMAS values around a config's σ."""
    return [float(f"{sigma * FACTOR ** (step - BELOW):.3g}") for step in range(SIGMAS)]
