"""How members answer the training prompts: one after another with perturbed weights, or several
side by side in one batch.
"""

from collections.abc import Callable, Hashable, Sequence
from contextlib import AbstractContextManager
from typing import Protocol

from shardes.clock import Clock
from shardes.config.schema import Config
from shardes.distributed.world import World
from shardes.es.center import Center
from shardes.es.population import Iteration, Member
from shardes.es.side_by_side import members_together
from shardes.inference.sampler import Sampler

Finished = Callable[[int, list[list[int]]], None]  # a member's number, its responses as token ids


class Answers(Protocol):
    """Lets groups of members answer; every rank of a replica makes the same calls."""

    def group_size(self, iteration: Iteration) -> int:
        """How many members answer together."""
        ...

    def generate(
        self,
        iteration: Iteration,
        group: Sequence[int],
        poll: Callable[[], None],
        finished: Finished,
    ) -> None:
        """Let members answer the iteration's prompts.

        Args:
            group: the members' numbers.
            poll: called between decode steps; what it raises ends the decoding.
            finished: told each member when its last response ends, while others may go on.
        """
        ...


class MembersTogether(Protocol):
    """Lets the rows of a batch be answered by members of low-rank noise."""

    def members(self, members: Sequence[Member], clock: Clock) -> AbstractContextManager[None]:
        """A context in which rows can belong to these members."""
        ...

    def set_rows(self, members: Sequence[int]) -> Hashable:
        """See `Decoder`, `set_members`."""
        ...


class InPlace(Answers):
    """One member at a time: its noise is added to the weights, and gone afterwards."""

    def __init__(self, center: Center, sampler: Sampler):
        self._center, self._sampler = center, sampler

    def group_size(self, iteration: Iteration) -> int:
        return 1

    def generate(
        self,
        iteration: Iteration,
        group: Sequence[int],
        poll: Callable[[], None],
        finished: Finished,
    ) -> None:
        for number in group:
            with self._center.perturbed(iteration.members[number]):  # θ + σ·ε(s_n)
                responses = self._sampler.generate(iteration.prompts, poll=poll)
            finished(number, responses)


class OneBatch(Answers):
    """Members of low-rank noise in one batch: the weights are the center's throughout."""

    def __init__(
        self,
        config: Config,
        world: World,
        center: Center,
        sampler: Sampler,
        together: MembersTogether,
        clock: Clock,
    ):
        self._config, self._world, self._clock = config, world, clock
        self._center, self._sampler, self._together = center, sampler, together

    def group_size(self, iteration: Iteration) -> int:
        lengths = list(map(len, iteration.prompts))
        return members_together(self._config, lengths, self._world.replicas)

    def generate(
        self,
        iteration: Iteration,
        group: Sequence[int],
        poll: Callable[[], None],
        finished: Finished,
    ) -> None:
        with self._clock("perturb"):
            self._center.load_into_model()
        members, count = [iteration.members[number] for number in group], len(iteration.prompts)
        answered: list[dict[int, list[int]]] = [{} for _ in members]

        def ended(row: int, response: list[int]) -> None:
            member, prompt = divmod(row, count)
            answered[member][prompt] = response
            if len(answered[member]) == count:
                finished(group[member], [answered[member][prompt] for prompt in range(count)])

        with self._together.members(members, self._clock):
            self._sampler.generate(
                iteration.prompts * len(members),
                poll=poll,
                members=[i for i in range(len(members)) for _ in range(count)],
                set_members=self._together.set_rows,
                ended=ended,
            )
