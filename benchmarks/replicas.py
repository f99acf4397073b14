"""What benchmarks/simulate.py is asked and answers: a setting, how long members take, what came of it."""

from bisect import bisect_left, bisect_right
from dataclasses import dataclass, field
from math import ceil, inf

import numpy as np


class Looks:
    """When a waiting replica looks: after 0 s, then every clamp(`part` of the time waited, `shortest`, `longest`)."""

    def __init__(self, part: float = 0.1, shortest: float = 0.02, longest: float = 1.0):
        self.longest = longest
        waited, offsets = 0.0, [0.0]
        while (step := min(max(part * waited, shortest), longest)) < longest:
            waited += step
            offsets.append(waited)
        self._offsets = offsets  # from the last one on, every `longest`

    def after(self, waited: float) -> float:
        """The offset of the first look that is not before `waited`."""
        last = self._offsets[-1]
        if waited <= last:
            return self._offsets[bisect_left(self._offsets, waited)]
        return last + ceil((waited - last) / self.longest) * self.longest

    def until(self, waited: float) -> np.ndarray:
        """The offsets of all looks up to `waited`."""
        last = self._offsets[-1]
        first = self._offsets[: bisect_right(self._offsets, waited)]
        steps = max(0, int((waited - last) / self.longest))
        return np.concatenate([first, last + self.longest * np.arange(1, steps + 1)])


@dataclass
class Setting:
    """What is simulated; times are in seconds.

    Members' times are drawn from `times`, scaled to a mean of `mean` and multiplied by the replica's slowness, 1 on
    average with the relative deviation `spread`. A replica fails on average every `mtbf`, or at the given `deaths`
    (replica, when); it is back after `restart` and replays what was recorded since the last of the snapshots,
    `snapshots` iterations apart, at `update` each. `exchange` goes from the home's last look to the record.
    At each of `joins` one more replica comes. `watched`: heartbeats are watched all along, not by waiting replicas from
    when they began to wait, and a dead replica's member goes to the next claim.
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
    looks: Looks = field(default_factory=Looks)
    seed: int = 0


@dataclass
class Draw:
    """Members' times by iteration, before the replica's `slowness` counts: one draw serves all ways of sharing out."""

    times: np.ndarray
    slowness: np.ndarray

    @classmethod
    def of(cls, setting: Setting) -> "Draw":
        rng = np.random.default_rng(setting.seed)
        relative = np.asarray(setting.times) / np.mean(setting.times)
        times = setting.mean * rng.choice(relative, (setting.iterations, setting.members))
        sigma = np.log1p(setting.spread**2) ** 0.5
        return cls(times, rng.lognormal(-(sigma**2) / 2, sigma, setting.replicas + len(setting.joins)))


@dataclass
class Outcome:
    """What came of a run that took `elapsed` seconds.

    `seconds` are the replicas', by what they did: useful, lost (evaluations that died), waiting (for the last member),
    exchange (from the last post to having the record), update, down. `requests` has the times of requests by kind.
    `evaluations` counts those begun, `takeovers` those of members whose replica had died. By iteration, `ends` says
    when the record was set and `idle` how long the first to run out of members waited for the last post.
    `waits` are the replicas' waits, from running out of members to the record or a takeover.
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

    def share(self, what: str) -> float:
        return self.seconds.get(what, 0.0) / sum(self.seconds.values())

    def rate(self) -> tuple[float, int]:
        """Requests per second: the mean, and the most within any second of the clock."""
        times = np.concatenate(list(self.requests.values()))
        counts = np.bincount(times.astype(int))
        return len(times) / self.elapsed, int(counts.max())


def fixed_rounds(setting: Setting, draw: Draw | None = None) -> float:
    """The efficiency where every replica evaluates one member a round and all wait for the round's slowest.

    Without failures: the first one ends such a run.
    """
    draw = draw or Draw.of(setting)
    count, replicas = setting.members, setting.replicas
    useful = elapsed = 0.0
    for times in draw.times:
        for first in range(0, count, replicas):
            round_ = times[first : first + replicas]
            took = round_ * draw.slowness[: len(round_)]
            useful, elapsed = useful + took.sum(), elapsed + took.max()
        elapsed += setting.exchange + setting.update * draw.slowness[:replicas].max()
    return useful / (elapsed * replicas)
