"""An iteration's members: their seeds, who evaluates which, the rewards exchanged, the fitness.

Replicas meet in the job's store: a replica claims the next member (`add`), posts its reward (`set`) and reads
the others'. A faster replica takes more members; nothing that crosses depends on the model's size.
"""

import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta

import numpy as np
import torch.distributed as dist

from shardes.config import ConfigError
from shardes.world import World


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


@dataclass
class Evaluation:
    """What a replica posts of a member: its reward, and how many tokens it generated."""

    reward: float
    tokens: int


class Population:
    """The members of one iteration, shared out between replicas.

    Every rank of a replica makes the same calls; the replica's leading rank speaks to the store.
    """

    def __init__(self, world: World, iteration: int, seeds: Sequence[int], timeout: float):
        self._world = world
        self._store = dist.PrefixStore(f"iteration{iteration}", world.job.store)
        self._iteration = iteration
        self._timeout = timeout
        self.seeds = list(seeds)

    def claim(self) -> Iterator[int]:
        """The members that this replica is to evaluate, one at a time, until none is left."""
        while True:
            number = self._store.add("claimed", 1) - 1 if self._world.leads else 0
            number = int(self._world.broadcast([number], 1)[0])
            if number >= len(self.seeds):
                return
            if self._world.leads:
                self._store.set(f"replica/{number}", str(self._world.replica))
            yield number

    def post(self, number: int, evaluation: Evaluation) -> None:
        """Publish a member's evaluation, as the replica's leading rank has it.

        Raises:
            ConfigError: on every rank of the replica, the reward is NaN or infinite; names the member and its seed.
        """
        (reward,) = self._world.broadcast([evaluation.reward], 1)
        if not math.isfinite(reward):
            raise ConfigError(
                f"task: the reward of member {number} of iteration {self._iteration} (seed {self.seeds[number]}) is "
                f"{reward}; a task's scores must be finite numbers"
            )
        if self._world.leads:
            self._store.set(f"evaluation/{number}", json.dumps([evaluation.reward, evaluation.tokens]))
            self._store.add("done", 1)

    def done(self) -> int:
        """How many members have been evaluated so far, by all replicas."""
        return self._store.add("done", 0)

    def collect(self, poll: Callable[[], None] = lambda: None) -> list[Evaluation]:
        """All members' evaluations, in member order; waits for the other replicas, calling `poll` meanwhile.

        Raises:
            TimeoutError: no member was evaluated for `timeout` seconds; names those missing and their replicas.
        """
        flat: list[float] | None = None
        if self._world.leads:
            self._wait(poll)
            found = [json.loads(self._store.get(f"evaluation/{n}")) for n in range(len(self.seeds))]
            flat = [value for pair in found for value in pair]
        flat = self._world.broadcast(flat, 2 * len(self.seeds))
        return [Evaluation(reward, int(tokens)) for reward, tokens in zip(flat[::2], flat[1::2], strict=True)]

    def _wait(self, poll: Callable[[], None]) -> None:
        done, since = self.done(), time.monotonic()
        while done < len(self.seeds):
            poll()
            time.sleep(0.02)
            before, done = done, self.done()
            if done > before:
                since = time.monotonic()
            elif time.monotonic() - since > self._timeout:
                missing = [n for n in range(len(self.seeds)) if not self._store.check([f"evaluation/{n}"])]
                whose = ", ".join(f"{n} (replica {self._store.get(f'replica/{n}').decode()})" for n in missing)
                raise TimeoutError(
                    f"iteration {self._iteration}: no reward for {self._timeout:.0f} s; missing members: {whose}"
                )

    def publish(self, name: str) -> None:
        """Tell all replicas that a step of this iteration is done."""
        self._store.set(name, "")

    def await_published(self, name: str) -> None:
        """Wait for one rank's `publish(name)`."""
        if self._world.leads:
            self._store.wait([name], timedelta(seconds=self._timeout))
        dist.barrier()
