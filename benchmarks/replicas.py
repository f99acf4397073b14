"""Settings and outcomes of benchmarks/simulate.py."""

from bisect import bisect_left, bisect_right
from dataclasses import dataclass, field
from math import ceil, inf

import numpy as np


class Polls:
    """When a waiting replica polls: at once, then after a `fraction` of the time waited so far.

    The interval is at least `shortest` and at most `longest` seconds.
    """

    def __init__(self, fraction: float = 0.1, shortest: float = 0.02, longest: float = 1.0):
        self.longest = longest
        waited, offsets = 0.0, [0.0]
        while (step := min(max(fraction * waited, shortest), longest)) < longest:
            waited += step
            offsets.append(waited)
        self._offsets = offsets  # after the last one, polls are `longest` apart

    def after(self, waited: float) -> float:
        """The offset of the first poll at or after `waited`."""
        last = self._offsets[-1]
        if waited <= last:
            return self._offsets[bisect_left(self._offsets, waited)]
        return last + ceil((waited - last) / self.longest) * self.longest

    def until(self, waited: float) -> np.ndarray:
        """The offsets of all polls up to `waited`."""
        last = self._offsets[-1]
        first = self._offsets[: bisect_right(self._offsets, waited)]
        steps = max(0, int((waited - last) / self.longest))
        return np.concatenate([first, last + self.longest * np.arange(1, steps + 1)])


@dataclass
class Setting:
    """What is simulated. Times are in seconds.

    Attributes:
        members: of the population.
        times: a member's time is drawn from these, scaled to a mean of `mean`, and multiplied by
            the slowness of its replica.
        spread: relative standard deviation of the replicas' slowness, whose mean is 1.
        mtbf: mean time between failures of a replica.
        deaths: failures in place of random ones: (replica, time).
        joins: at each of these times, one more replica joins.
        restart: from a replica's failure until it replays the records since the latest snapshot.
        snapshots: iterations between two snapshots.
        exchange: from the poll that sees the last result until the record is published.
        update: of the center, and of replaying one record.
        timeout: without a heartbeat, until a replica counts as dead.
        watched: all replicas watch heartbeats all the time, and the next claim takes over a dead
            replica's member. Otherwise only waiting replicas watch, from when they begin to wait.
    """

    replicas: int
    members: int
    iterations: int = 1
    times: np.ndarray = field(default_factory=lambda: np.ones(1))
    mean: float = 60.0
    spread: float = 0.0
    mtbf: float = inf
    deaths: tuple[tuple[int, float], ...] = ()
    joins: tuple[float, ...] = ()
    restart: float = 300.0
    snapshots: int = 20
    exchange: float = 0.0
    update: float = 0.0
    timeout: float = 60.0
    watched: bool = False
    polls: Polls = field(default_factory=Polls)
    seed: int = 0


@dataclass
class Draw:
    """Random members' times, by iteration, and slowness of replicas, for any protocol."""

    times: np.ndarray
    slowness: np.ndarray

    @classmethod
    def of(cls, setting: Setting) -> "Draw":
        rng = np.random.default_rng(setting.seed)
        relative = np.asarray(setting.times) / np.mean(setting.times)
        times = setting.mean * rng.choice(relative, (setting.iterations, setting.members))
        sigma = np.log1p(setting.spread**2) ** 0.5
        return cls(
            times, rng.lognormal(-(sigma**2) / 2, sigma, setting.replicas + len(setting.joins))
        )


@dataclass
class Outcome:
    """What happened in a run.

    Attributes:
        elapsed: seconds that the run took.
        seconds: of all replicas, by activity: useful, lost (evaluations that a failure ended),
            waiting (for the last member), exchange (from the last post until the record arrived),
            update, down.
        requests: times of requests, by kind.
        evaluations: number of evaluations that began.
        takeovers: number of members that were taken over from dead replicas.
        ends: when each iteration's record was published.
        idle: how long the first replica to run out of members waited for the last post, by
            iteration.
        waits: of replicas, from running out of members to the record or a takeover.
    """

    elapsed: float
    seconds: dict[str, float]
    requests: dict[str, np.ndarray]
    evaluations: int
    takeovers: int
    deaths: int
    ends: list[float]
    idle: list[float]
    waits: list[float]

    @property
    def efficiency(self) -> float:
        return self.share("useful")

    def share(self, activity: str) -> float:
        return self.seconds.get(activity, 0.0) / sum(self.seconds.values())

    def rate(self) -> tuple[float, int]:
        """Requests per second: the mean, and the maximum of any whole second."""
        times = np.concatenate(list(self.requests.values()))
        counts = np.bincount(times.astype(int))
        return len(times) / self.elapsed, int(counts.max())


def fixed_rounds(setting: Setting, draw: Draw | None = None) -> float:
    """The efficiency if each replica evaluates one member per round and waits for the slowest.

    There are no failures: such a run would end with the first one.
    """
    draw = draw or Draw.of(setting)
    count, replicas = setting.members, setting.replicas
    useful = elapsed = 0.0
    for times in draw.times:
        for first in range(0, count, replicas):
            round_ = times[first : first + replicas]
            seconds = round_ * draw.slowness[: len(round_)]
            useful, elapsed = useful + seconds.sum(), elapsed + seconds.max()
        elapsed += setting.exchange + setting.update * draw.slowness[:replicas].max()
    return useful / (elapsed * replicas)
