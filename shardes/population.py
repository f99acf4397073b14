"""An iteration's members: their seeds, who evaluates which, the rewards exchanged, the fitness.

Replicas meet in a store: a replica claims the next member (`add`) and posts its reward (`compare_set`: the first post
counts). A faster replica takes more members, and those of a replica that died are taken over; nothing that crosses
depends on the model's size.
"""

import json
import math
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType

import numpy as np
import torch.distributed as dist

from shardes.config import ConfigError
from shardes.meeting import Meeting
from shardes.world import World, rest

NOTHING: Mapping = MappingProxyType({})
DONE, WAITING = -1, -2  # where there is no piece to take over
LOOKS = 32  # pieces that a waiting replica asks for at a time: all of them, asked by thousands, would be too many
NEWS = 1024  # pieces that the home asks for at a time, between two members


def member_seeds(run_seed: int, iteration: int, population_size: int) -> list[int]:
    """The members' seeds, 64 bits each, from nothing but (run seed, iteration)."""
    return np.random.SeedSequence([run_seed, iteration]).generate_state(population_size, np.uint64).tolist()


def mean(rewards: Sequence[float]) -> float:
    """Their mean; the sum is exactly rounded, so that every machine computes the same."""
    return math.fsum(rewards) / len(rewards)


def std(rewards: Sequence[float]) -> float:
    """Their population standard deviation (ddof 0); sums are exactly rounded."""
    center = mean(rewards)
    return math.sqrt(math.fsum((r - center) ** 2 for r in rewards) / len(rewards))


def standardize(rewards: Sequence[float]) -> list[float]:
    """z_n = (R_n − mean R) / (std R + 1e-8), ddof 0 (Algorithm 2); all zero where all rewards are equal."""
    if max(rewards) == min(rewards):
        return [0.0] * len(rewards)
    center, spread = mean(rewards), std(rewards) + 1e-8
    return [(r - center) / spread for r in rewards]


class Exchange:
    """Pieces of work, numbered from 0, that replicas share out, and what was found, as text.

    Every rank of a replica makes the same calls; the replica's leading rank speaks to the store. `known` is what was
    found before, by piece: nobody is to do those. `bytes` counts the keys and values that this rank has sent to and
    received from the store.
    """

    def __init__(self, world: World, name: str, count: int, timeout: float, known: Mapping[int, str] = NOTHING):
        self._world = world
        self._store = dist.PrefixStore(name, world.store)
        self._name = name
        self._count = count
        self._timeout = timeout
        self._known = known
        self._unseen = deque(number for number in range(count) if number not in known)
        self._me = str(world.replica)
        self._news = (-1, 0.0)  # how many were done, and since when
        self._unfound = deque(range(count))  # those of which this replica does not know that they are done
        self._unfound.rotate(-LOOKS * world.replica)
        self.bytes = 0
        if known and world.speaks:
            for number, found in known.items():
                self.post(number, found)

    def claim(self) -> Iterator[int]:
        """The pieces that this replica is to do, one at a time, until none is left."""
        while True:
            number = self._add("claimed", 1) - 1 if self._world.leads else 0
            number = int(self._world.broadcast([number], 1)[0])
            if number >= self._count:
                return
            if number in self._known:
                continue
            if self._world.leads:
                self._set(f"replica/{number}", self._me)
            yield number

    def take_over(self, meeting: Meeting, poll: Callable[[], None] = lambda: None) -> Iterator[int]:
        """Wait until all pieces are done. Those whose replica has died are this one's to do, one at a time.

        Raises:
            TimeoutError: nothing was posted for `timeout` seconds; names what is missing and whose it is.
        """
        number, since = WAITING, time.monotonic()
        while number != DONE:
            number = self._orphan(meeting, poll, since) if self._world.leads else 0
            number = int(self._world.broadcast([number], 1)[0])
            if number >= 0:
                yield number
                since = time.monotonic()

    def _orphan(self, meeting: Meeting, poll: Callable[[], None], since: float) -> int:
        """A piece whose replica has died, WAITING after a while, or DONE. `since` is when this one's work ran out."""
        if self._await(poll, since, meeting.timeout / 4):
            return DONE
        for number, found in self._look(self._unfound, LOOKS):
            if found:
                continue
            whose = self._whose(number)
            if meeting.dead(whose) and self._compare_set(f"replica/{number}", whose, self._me) == self._me:
                return number
        return WAITING if self._unfound else DONE  # even if one died between posting and counting

    def post(self, number: int, found: str) -> None:
        """Publish what the replica's leading rank found, unless another, who took over, was first."""
        if self._world.leads:
            found = f"{self._me}:{found}"
            if self._compare_set(f"found/{number}", "", found) == found:
                self._add("done", 1)

    def done(self) -> int:
        """How many pieces are done so far, by all replicas."""
        return self._add("done", 0)

    def news(self) -> Iterator[tuple[int, str]]:
        """What has been found since earlier calls, by all replicas, and was not known: (piece, what); some of it."""
        if self.done() > self._count - len(self._unseen):
            for number, found in self._look(self._unseen, NEWS):
                if found:
                    yield number, self._found(number)

    def _look(self, pieces: deque[int], most: int) -> Iterator[tuple[int, bool]]:
        """So many of the pieces, and whether they are found; those that are leave the queue, the others go behind."""
        for _ in range(min(most, len(pieces))):
            number = pieces.popleft()
            found = self._store.check([f"found/{number}"])
            if not found:
                pieces.append(number)
            yield number, found

    def collect(self, poll: Callable[[], None] = lambda: None) -> list[str]:
        """All that was found, in order, on the leading rank; waits for the other replicas, calling `poll` meanwhile.

        Raises:
            TimeoutError: nothing was posted for `timeout` seconds; names what is missing and whose it is.
        """
        self._await(poll, time.monotonic())
        return [self._found(n) for n in range(self._count)]

    def _await(self, poll: Callable[[], None], since: float, seconds: float = math.inf) -> bool:
        """Wait, for so many seconds at most, until all is done; returns whether it is. `since` as above."""
        until = time.monotonic() + seconds
        while self._unfound and (done := self.done()) < self._count:
            now = time.monotonic()
            if done > self._news[0]:
                self._news = done, now
            if now - self._news[1] > self._timeout:
                missing = [n for n in range(self._count) if not self._store.check([f"found/{n}"])]
                whose = ", ".join(f"{n} (replica {self._whose(n) or '?'})" for n in missing)
                raise TimeoutError(f"{self._name}: nothing new for {self._timeout:.0f} s; missing: {whose}")
            if now > until:
                return False
            poll()
            rest(since)
        return True

    def _whose(self, number: int) -> str:
        """Which replica has claimed a piece last; "": none yet, or it died as it claimed it."""
        key = f"replica/{number}"
        return self._get(key) if self._store.check([key]) else ""

    def _found(self, number: int) -> str:
        return self._get(f"found/{number}").partition(":")[2]

    def _compare_set(self, key: str, expected: str, value: str) -> str:
        now = self._store.compare_set(key, expected, value)
        self.bytes += len(key) + len(expected) + len(value) + len(now)
        return now.decode()

    def _set(self, key: str, value: str) -> None:
        self.bytes += len(key) + len(value.encode())
        self._store.set(key, value)

    def _get(self, key: str) -> str:
        value = self._store.get(key)
        self.bytes += len(key) + len(value)
        return value.decode()

    def _add(self, key: str, amount: int) -> int:
        self.bytes += len(key) + 16  # the amount, and the sum that comes back
        return self._store.add(key, amount)


@dataclass
class Evaluation:
    """A member's reward, how many tokens it generated, and which replica finished it at what time.

    `finished` is in seconds since the epoch, by the replica's clock. `scores` are its rewards by prompt, where they
    are exchanged.
    """

    reward: float
    tokens: int
    replica: int
    finished: float
    scores: list[float] = field(default_factory=list)


def idle_seconds(evaluations: Sequence[Evaluation]) -> float:
    """How long the first replica to run out of members waited for the last reward."""
    last: dict[int, float] = {}
    for evaluation in evaluations:
        last[evaluation.replica] = max(evaluation.finished, last.get(evaluation.replica, evaluation.finished))
    return max(last.values()) - min(last.values())


class Population(Exchange):
    """The members of one iteration, shared out between replicas.

    `seeds` are the members' own. `known` has reward, tokens and scores by member. `width` scores go along with each
    reward.
    """

    def __init__(
        self,
        world: World,
        iteration: int,
        seeds: Sequence[int],
        timeout: float,
        known: Mapping[int, Sequence] = NOTHING,
        width: int = 0,
    ):
        now = time.time()
        found = {
            number: json.dumps([reward, tokens, 0, now, *scores]) for number, (reward, tokens, scores) in known.items()
        }
        super().__init__(world, f"iteration {iteration}", len(seeds), timeout, found)
        self._iteration = iteration
        self._width = width
        self.seeds = list(seeds)

    def post_reward(self, number: int, reward: float, tokens: int, scores: Sequence[float] = ()) -> None:
        """Publish a member's evaluation; all ranks of the replica have the same.

        Raises:
            ConfigError: the reward is NaN or infinite; names the member and its seed.
        """
        if not math.isfinite(reward):
            raise ConfigError(
                f"task: the reward of member {number} of iteration {self._iteration} (seed {self.seeds[number]}) is "
                f"{reward}; a task's scores must be finite numbers"
            )
        assert len(scores) == self._width
        self.post(number, json.dumps([reward, tokens, self._world.replica, time.time(), *scores]))

    def new_rewards(self) -> Iterator[tuple[int, float, int, list[float]]]:
        """What `news` has: (member, reward, tokens, scores)."""
        for number, found in self.news():
            reward, tokens, _, _, *scores = json.loads(found)
            yield number, reward, tokens, scores

    def evaluations(self, poll: Callable[[], None] = lambda: None) -> list[Evaluation]:
        """All members' evaluations, in member order, on a leading rank; waits like `collect`."""
        rows = map(json.loads, self.collect(poll))
        return [Evaluation(reward, tokens, replica, when, scores) for reward, tokens, replica, when, *scores in rows]
