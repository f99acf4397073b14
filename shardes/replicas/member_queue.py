"""The members of one iteration, shared out between replicas."""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Protocol

from shardes.config.limits import REWARD_RANGE, is_reward
from shardes.errors import ConfigError
from shardes.es.population import Iteration
from shardes.replicas.protocol import MemberResult
from shardes.replicas.work_queue import WorkQueue
from shardes.storage.journal import Journal, Reward

REPORT_INTERVAL = 0.5  # seconds between two looks for other replicas' results


@dataclass(frozen=True)
class IterationResults:
    """All members' results in member order, and the bytes that the primary rank exchanged for them.

    Only the primary rank collects them; on other ranks this is empty.
    """

    members: list[MemberResult] = field(default_factory=list)
    exchanged_bytes: int = 0

    @property
    def idle_seconds(self) -> float:
        """How long the first replica to run out of members waited for the last result."""
        last: dict[int, float] = {}
        for member in self.members:
            last[member.replica] = max(member.finished, last.get(member.replica, member.finished))
        return max(last.values()) - min(last.values()) if last else 0.0


class MemberObserver(Protocol):
    """Follows the members of an iteration, on the primary rank."""

    def member_finished(self, tokens: int) -> None:
        """A member, evaluated by any replica, has generated this many tokens."""
        ...

    def progress(self, iteration: int, done: int) -> None:
        """So many of the iteration's members are evaluated."""
        ...


class MemberQueue:
    """Hands out members to this replica, and takes their results.

    Iterating yields groups of member numbers: first those that this replica claims, then those of
    replicas that died; it ends once all members are evaluated. Members of a group answer together.
    An empty group says that all of this replica's results must be posted now: the others wait.

    Args:
        size: members of a group, at most.
    """

    def __init__(self, queue: WorkQueue, iteration: Iteration, size: int, poll: Callable[[], None]):
        self._queue, self._iteration, self._size, self._poll = queue, iteration, size, poll

    def __iter__(self) -> Iterator[Sequence[int]]:
        claims = self._queue.claims()
        while group := list(islice(claims, self._size)):
            yield group
        yield []
        for group in self._queue.orphans(self._size):
            yield group
            yield []

    def poll(self) -> None:
        """To be called between decode steps; what it raises ends the run."""
        self._poll()

    def post(self, number: int, result: MemberResult) -> None:
        """Publish a member's result.

        Raises:
            ConfigError: its reward is not one (`config.limits.is_reward`); names the member and its
                seed.
        """
        if not is_reward(result.reward):
            seed = self._iteration.members[number].seed
            raise ConfigError(
                f"task: the reward of member {number} of iteration {self._iteration.index} "
                f"(seed {seed}) is {result.reward}; a reward must be {REWARD_RANGE}"
            )
        self._queue.post(number, result.to_json())

    def results(self) -> IterationResults:
        return IterationResults()


class PrimaryMemberQueue(MemberQueue):
    """The queue on the primary rank: it journals each reward as it arrives, and collects all
    results.
    """

    def __init__(
        self,
        queue: WorkQueue,
        iteration: Iteration,
        size: int,
        poll: Callable[[], None],
        journal: Journal,
        observer: MemberObserver,
    ):
        super().__init__(queue, iteration, size, poll)
        self._journal, self._observer = journal, observer
        self._reported = time.monotonic()
        queue.poll = self.poll  # rewards are journaled while this rank waits, too
        queue.post_known()

    def poll(self) -> None:
        super().poll()
        if time.monotonic() - self._reported > REPORT_INTERVAL:
            self._reported = time.monotonic()
            self._report()

    def post(self, number: int, result: MemberResult) -> None:
        super().post(number, result)
        self._report()

    def results(self) -> IterationResults:
        members = list(map(MemberResult.from_json, self._queue.collect()))
        self._journal_rewards()
        return IterationResults(members, self._queue.bytes)

    def _report(self) -> None:
        self._journal_rewards()
        self._observer.progress(self._iteration.index, self._queue.number_done())

    def _journal_rewards(self) -> None:
        index, digest = self._iteration.index, self._iteration.digest
        for number, text in self._queue.news():
            result = MemberResult.from_json(text)
            self._journal.append(
                Reward(
                    index,
                    number,
                    result.reward,
                    result.tokens,
                    digest,
                    result.scores,
                    result.failures,
                    result.parts,
                )
            )
            self._observer.member_finished(result.tokens)
