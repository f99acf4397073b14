"""How members answer the training prompts: one after another with perturbed weights, or several
side by side in one batch.
"""

from collections.abc import Callable, Sequence
from typing import Protocol

from shardes.clock import Clock
from shardes.config.schema import Config
from shardes.distributed.world import World
from shardes.es.center import Center
from shardes.es.population import Iteration
from shardes.es.side_by_side import SideBySide
from shardes.inference.generation import rows_of_batch
from shardes.inference.sampler import Sampler


class Answers(Protocol):
    """Lets groups of members answer; every rank of a replica makes the same calls."""

    def group_size(self, iteration: Iteration) -> int:
        """How many members answer together."""
        ...

    def generate(
        self, iteration: Iteration, group: Sequence[int], poll: Callable[[], None]
    ) -> list[list[list[int]]]:
        """Each member's responses to the iteration's prompts, as token ids.

        Args:
            group: the members' numbers.
            poll: called between decode steps; what it raises ends the decoding.
        """
        ...


class InPlace(Answers):
    """One member at a time: its noise is added to the weights, and gone afterwards."""

    def __init__(self, center: Center, sampler: Sampler):
        self._center, self._sampler = center, sampler

    def group_size(self, iteration: Iteration) -> int:
        return 1

    def generate(
        self, iteration: Iteration, group: Sequence[int], poll: Callable[[], None]
    ) -> list[list[list[int]]]:
        responses = []
        for number in group:
            with self._center.perturbed(iteration.members[number]):  # θ + σ·ε(s_n)
                responses.append(self._sampler.generate(iteration.prompts, poll=poll))
        return responses


class OneBatch(Answers):
    """Members of low-rank noise in one batch: the weights are the center's throughout."""

    def __init__(
        self,
        config: Config,
        world: World,
        center: Center,
        sampler: Sampler,
        side_by_side: SideBySide,
        clock: Clock,
    ):
        self._config, self._world, self._clock = config, world, clock
        self._center, self._sampler, self._side_by_side = center, sampler, side_by_side

    def group_size(self, iteration: Iteration) -> int:
        """`es.members_per_batch`; by default as many as `generation.batch_tokens` holds.

        If there are several replicas, or may be, that is at most half a replica's share of the
        members, so that a fast one can take more than a slow one.
        """
        if self._config.es.members_per_batch is not None:
            return self._config.es.members_per_batch
        generation, prompts = self._config.generation, iteration.prompts
        tokens = max(map(len, prompts)) + generation.max_new_tokens
        rows = rows_of_batch(tokens, generation.batch_tokens, generation.decode)
        rows *= self._config.sharding.shard
        share, replicas = len(iteration.members), self._world.replicas
        if replicas > 1 or self._config.replicas.port is not None or self._world.is_client:
            share = -(-share // (2 * replicas))
        return max(min(rows // len(prompts), share), 1)

    def generate(
        self, iteration: Iteration, group: Sequence[int], poll: Callable[[], None]
    ) -> list[list[list[int]]]:
        with self._clock("perturb"):
            self._center.load_into_model()
        members, count = [iteration.members[number] for number in group], len(iteration.prompts)
        with self._side_by_side.members(members, self._clock):
            responses = self._sampler.generate(
                iteration.prompts * len(members),
                poll=poll,
                members=[i for i in range(len(members)) for _ in range(count)],
                set_members=self._side_by_side.set_rows,
            )
        return [responses[first : first + count] for first in range(0, len(responses), count)]
