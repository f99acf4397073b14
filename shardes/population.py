"""An iteration's members: their seeds, who evaluates which, the rewards exchanged, the fitness.

Replicas meet in the job's store: a replica claims the next member (`add`), posts its reward (`set`) and reads
the others'. A faster replica takes more members; nothing that crosses depends on the model's size.
"""

import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
import torch.distributed as dist

from shardes.config import ConfigError
from shardes.world import World, await_keys

NOTHING: Mapping = MappingProxyType({})


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


def update_coefficients(rewards: Sequence[float], alpha: float) -> list[float]:
    """c_n = (α/N)·z_n as float32: what the update adds of each member's ε."""
    return [float(np.float32(alpha / len(rewards) * z)) for z in standardize(rewards)]


class Exchange:
    """Pieces of work, numbered from 0, that replicas share out, and what was found, as text.

    Every rank of a replica makes the same calls; the replica's leading rank speaks to the store. `known` is what was
    found before, by piece: nobody is to do those. `bytes` counts the keys and values that this rank has sent to and
    received from the store.
    """

    def __init__(self, world: World, name: str, count: int, timeout: float, known: Mapping[int, str] = NOTHING):
        self._world = world
        self._store = dist.PrefixStore(name, world.job.store)
        self._name = name
        self._count = count
        self._timeout = timeout
        self._known = known
        self._seen = set(known)
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
                self._set(f"replica/{number}", str(self._world.replica))
            yield number

    def post(self, number: int, found: str) -> None:
        """Publish what the replica's leading rank found."""
        if self._world.leads:
            self._set(f"found/{number}", found)
            self._add("done", 1)

    def done(self) -> int:
        """How many pieces are done so far, by all replicas."""
        return self._add("done", 0)

    def news(self) -> Iterator[tuple[int, str]]:
        """What has been found since the last call, by all replicas, and was not known: (piece, what)."""
        if self.done() > len(self._seen):
            for number in range(self._count):
                if number not in self._seen and self._store.check([f"found/{number}"]):
                    self._seen.add(number)
                    yield number, self._get(f"found/{number}")

    def collect(self, poll: Callable[[], None] = lambda: None) -> list[str]:
        """All that was found, in order, on the leading rank; waits for the other replicas, calling `poll` meanwhile.

        Raises:
            TimeoutError: nothing was posted for `timeout` seconds; names what is missing and whose it is.
        """
        done, since = self.done(), time.monotonic()
        while done < self._count:
            poll()
            time.sleep(0.02)
            before, done = done, self.done()
            if done > before:
                since = time.monotonic()
            elif time.monotonic() - since > self._timeout:
                missing = [n for n in range(self._count) if not self._store.check([f"found/{n}"])]
                whose = ", ".join(f"{n} (replica {self._get(f'replica/{n}')})" for n in missing)
                raise TimeoutError(f"{self._name}: nothing new for {self._timeout:.0f} s; missing: {whose}")
        return [self._get(f"found/{n}") for n in range(self._count)]

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

    `finished` is in seconds since the epoch, by the replica's clock.
    """

    reward: float
    tokens: int
    replica: int
    finished: float


def idle_seconds(evaluations: Sequence[Evaluation]) -> float:
    """How long the first replica to run out of members waited for the last reward."""
    last: dict[int, float] = {}
    for evaluation in evaluations:
        last[evaluation.replica] = max(evaluation.finished, last.get(evaluation.replica, evaluation.finished))
    return max(last.values()) - min(last.values())


class Population(Exchange):
    """The members of one iteration, shared out between replicas."""

    def __init__(
        self,
        world: World,
        iteration: int,
        seeds: Sequence[int],
        timeout: float,
        known: Mapping[int, Sequence] = NOTHING,
    ):
        now = time.time()
        found = {number: json.dumps([reward, tokens, 0, now]) for number, (reward, tokens) in known.items()}
        super().__init__(world, f"iteration {iteration}", len(seeds), timeout, found)
        self._iteration = iteration
        self.seeds = list(seeds)

    def post_reward(self, number: int, reward: float, tokens: int) -> None:
        """Publish a member's evaluation; all ranks of the replica have the same.

        Raises:
            ConfigError: the reward is NaN or infinite; names the member and its seed.
        """
        if not math.isfinite(reward):
            raise ConfigError(
                f"task: the reward of member {number} of iteration {self._iteration} (seed {self.seeds[number]}) is "
                f"{reward}; a task's scores must be finite numbers"
            )
        self.post(number, json.dumps([reward, tokens, self._world.replica, time.time()]))

    def new_rewards(self) -> Iterator[tuple[int, float, int]]:
        """The rewards posted since the last call that were not known before: (member, reward, tokens)."""
        for number, found in self.news():
            reward, tokens, *_ = json.loads(found)
            yield number, reward, tokens

    def evaluations(self, poll: Callable[[], None] = lambda: None) -> list[Evaluation]:
        """All members' evaluations, in member order, on every rank; otherwise like `collect`."""
        count = len(self.seeds)
        flat: list[float] | None = None
        if self._world.leads:
            flat = [value for found in self.collect(poll) for value in json.loads(found)]
        flat = self._world.broadcast(flat, 4 * count)
        rows = (flat[4 * n : 4 * n + 4] for n in range(count))
        return [Evaluation(reward, int(tokens), int(who), when) for reward, tokens, who, when in rows]

    def publish(self, name: str) -> None:
        """Tell all replicas that a step of this iteration is done."""
        self._set(name, "")

    def await_published(self, name: str) -> None:
        """Wait for one rank's `publish(name)`. Every rank looks for itself."""
        await_keys(self._store, [name], self._timeout, self._name)
