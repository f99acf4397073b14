"""Many replicas sharing out the members of ES iterations, simulated event by event.

It knows of the protocol (claims, posts, looks with their back-off, heartbeats, takeovers, records) and of times; of
models, stores and networks it knows nothing. A request takes no time: what the store then has to serve is counted, and
benchmarks/store_load.py asks a real store for it.
"""

import heapq
from array import array
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from math import inf

import numpy as np

from benchmarks.replicas import Draw, Outcome, Setting
from shardes.meeting import BEATS

HOME = 0  # the replica that keeps the journal; it does not fail, for the run ends with it


@dataclass
class _Orphan:
    """A member whose replica died, its last heartbeat, and who finds that first, at which look."""

    beat: float
    waiter: int = -1
    at: float = inf


@dataclass
class _Iteration:
    claimed: int = 0
    done: int = 0
    waited_for: float = inf  # the first to run out of members did then
    done_at: float = inf
    record_at: float = inf
    waiting: dict[int, float] = field(default_factory=dict)  # since when, by replica, the longest first
    orphans: dict[int, _Orphan] = field(default_factory=dict)  # by member


@dataclass
class _Replica:
    beat: float  # when in each heartbeat interval it beats
    slowness: float
    state: str = "absent"  # absent, useful (evaluating), wait, update, down, done
    since: float = 0.0
    life: int = 0  # events of an earlier life do not count
    born: float = 0.0
    known: int = 0  # records that it has applied: it is in this iteration
    member: int = -1


class Simulation:
    """The claiming protocol. `run` may be called once."""

    def __init__(self, setting: Setting, draw: Draw | None = None):
        self._setting = setting
        draw = draw or Draw.of(setting)
        self._times, slowness = draw.times, draw.slowness
        self._rng = np.random.default_rng([setting.seed, 1])
        beats = self._rng.uniform(0, setting.timeout / BEATS, len(slowness))
        self._replicas = [_Replica(*pair) for pair in zip(beats.tolist(), slowness.tolist(), strict=True)]
        self._iterations = [_Iteration() for _ in range(setting.iterations)]
        self._recorded = 0
        self._working = 0  # replicas that live and have not applied the last record
        self._seconds: dict[str, float] = defaultdict(float)
        self._requests: dict[str, array] = defaultdict(lambda: array("d"))
        self._waits: list[tuple[float, float]] = []
        self._lives: list[tuple[int, float, float]] = []
        self._counts: dict[str, int] = defaultdict(int)
        self._events: list[tuple] = []
        self._pushed = 0

    def run(self) -> Outcome:
        setting, now = self._setting, 0.0
        for who in range(setting.replicas):
            self._live(who, now)
        for who, when in enumerate(setting.joins, setting.replicas):
            self._at(when, self._come, who, 0)
        for who, when in setting.deaths:
            self._at(when, self._die, who, None)
        while self._working or self._recorded < setting.iterations:
            now, _, event, arguments = heapq.heappop(self._events)
            event(now, *arguments)
        for who, replica in enumerate(self._replicas):
            if replica.state not in ("absent", "down"):
                self._lives.append((who, replica.born, now))
            self._spent(replica, now, {"done": "exchange"}.get(replica.state, replica.state))
        return self._outcome(now)

    def _at(self, when: float, event: Callable, *arguments) -> None:
        self._pushed += 1
        heapq.heappush(self._events, (when, self._pushed, event, arguments))

    def _spent(self, replica: _Replica, now: float, what: str) -> None:
        """The time since the replica's last change of state went to `what`."""
        if replica.state != "absent":
            self._seconds[what] += now - replica.since
        replica.since = now

    def _ask(self, kind: str, now: float, times: int = 1) -> None:
        self._requests[kind].extend([now] * times)

    # What happens to a replica: it comes to life with the center rebuilt, and dies.

    def _live(self, who: int, now: float) -> None:
        replica = self._replicas[who]
        replica.born = now
        self._working += 1
        if self._setting.mtbf < inf and who != HOME:
            self._at(now + self._rng.exponential(self._setting.mtbf), self._die, who, replica.life)
        self._claim(who, now)

    def _die(self, now: float, who: int, life: int | None) -> None:
        replica = self._replicas[who]
        if replica.state in ("absent", "down", "done") or life not in (None, replica.life):
            return
        iteration = self._iterations[replica.known]
        state = replica.state
        if state == "wait":
            self._wait_no_more(who, now)
        else:
            self._spent(replica, now, "lost" if state == "useful" else state)
        replica.state, replica.life = "down", replica.life + 1
        self._lives.append((who, replica.born, now))
        self._working -= 1
        self._counts["deaths"] += 1
        if state == "useful":
            every = self._setting.timeout / BEATS
            beat = max(replica.born, now - (now - replica.beat) % every)
            iteration.orphans[replica.member] = _Orphan(beat)
            self._assign(iteration, replica.member, now)
        self._at(now + self._setting.restart, self._come, who, None)

    def _come(self, now: float, who: int, known: int | None) -> None:
        """Replay what is recorded, as long as there is something, then live. `known` is None right after a start."""
        if self._recorded == self._setting.iterations:
            return
        replica = self._replicas[who]
        if replica.state == "absent":
            replica.state, replica.since = "down", now
        if known is None:
            known = self._recorded // self._setting.snapshots * self._setting.snapshots
        if missing := self._recorded - known:
            self._ask("records", now, missing)
            self._at(now + missing * self._setting.update * replica.slowness, self._come, who, self._recorded)
            return
        self._spent(replica, now, "down")
        replica.known = known
        self._live(who, now)

    # What a replica does in an iteration: claim, evaluate, post; wait, take over; apply the record.

    def _claim(self, who: int, now: float) -> None:
        replica = self._replicas[who]
        iteration = self._iterations[replica.known]
        self._ask("claims", now)
        if self._setting.watched:
            for member, orphan in iteration.orphans.items():
                if orphan.beat + self._setting.timeout <= now:
                    del iteration.orphans[member]
                    self._adopt(member, who, now)
                    return
        if iteration.claimed < self._setting.members:
            self._ask("claims", now)  # whose it is
            iteration.claimed += 1
            self._evaluate(who, iteration.claimed - 1, now)
        else:
            self._wait(who, now)

    def _evaluate(self, who: int, member: int, now: float) -> None:
        replica = self._replicas[who]
        replica.state, replica.member = "useful", member
        self._counts["evaluations"] += 1
        takes = self._times[replica.known, member] * replica.slowness
        self._at(now + takes, self._post, who, replica.life)

    def _post(self, now: float, who: int, life: int) -> None:
        replica = self._replicas[who]
        if life != replica.life:
            return
        iteration = self._iterations[replica.known]
        self._spent(replica, now, "useful")
        self._ask("posts", now, 2)
        iteration.done += 1
        if iteration.done == self._setting.members:
            iteration.done_at = now
            if HOME in iteration.waiting:
                since = iteration.waiting[HOME]
                self._record_at(since + self._setting.looks.after(now - since), replica.known)
        self._claim(who, now)

    def _wait(self, who: int, now: float) -> None:
        replica = self._replicas[who]
        iteration = self._iterations[replica.known]
        replica.state = "wait"
        iteration.waiting[who] = now
        iteration.waited_for = min(iteration.waited_for, now)
        if iteration.record_at <= now:
            self._take_record(now, who, replica.life)
            return
        if iteration.record_at < inf:
            self._await_record(who)
        elif who == HOME and iteration.done_at <= now:
            self._record_at(now, replica.known)
        for member, orphan in list(iteration.orphans.items()):
            self._offer(iteration, member, orphan, who, now)

    def _wait_no_more(self, who: int, now: float) -> None:
        replica = self._replicas[who]
        iteration = self._iterations[replica.known]
        del iteration.waiting[who]
        self._waits.append((replica.since, now))
        split = min(max(iteration.done_at, replica.since), now)
        self._seconds["waiting"] += split - replica.since
        self._seconds["exchange"] += now - split
        replica.since = now
        for member, orphan in iteration.orphans.items():
            if orphan.waiter == who:
                self._assign(iteration, member, now)

    def _record_at(self, looked: float, number: int) -> None:
        """The home knows at `looked` that all is done; the others will find the record at their looks."""
        iteration = self._iterations[number]
        iteration.record_at = looked + self._setting.exchange
        self._at(iteration.record_at, self._record, number)
        for who in iteration.waiting:
            self._await_record(who)

    def _record(self, now: float, number: int) -> None:
        self._recorded = number + 1
        self._ask("records", now)

    def _await_record(self, who: int) -> None:
        replica = self._replicas[who]
        iteration = self._iterations[replica.known]
        since = iteration.waiting[who]
        found = since + self._setting.looks.after(iteration.record_at - since) if who != HOME else iteration.record_at
        self._at(found, self._take_record, who, replica.life)

    def _take_record(self, now: float, who: int, life: int) -> None:
        replica = self._replicas[who]
        if life != replica.life:
            return
        self._wait_no_more(who, now)
        self._ask("records", now, who != HOME)
        replica.state = "update"
        self._at(now + self._setting.update * replica.slowness, self._updated, who, life)

    def _updated(self, now: float, who: int, life: int) -> None:
        replica = self._replicas[who]
        if life != replica.life:
            return
        self._spent(replica, now, "update")
        replica.known += 1
        if replica.known == self._setting.iterations:
            replica.state = "done"
            self._working -= 1
        else:
            self._claim(who, now)

    # Members of dead replicas: the first waiting replica that knows takes them over.

    def _knows_at(self, orphan: _Orphan, since: float, now: float) -> float:
        """The look at which one that waits since then has seen no heartbeat for the timeout."""
        silent = self._silent_at(orphan, since)
        return since + self._setting.looks.after(max(silent, now) - since)

    def _silent_at(self, orphan: _Orphan, since: float) -> float:
        seen = orphan.beat if self._setting.watched else max(since, orphan.beat)
        return seen + self._setting.timeout

    def _assign(self, iteration: _Iteration, member: int, now: float) -> None:
        orphan = iteration.orphans[member]
        orphan.waiter, orphan.at = -1, inf
        for who, since in iteration.waiting.items():
            if self._silent_at(orphan, since) > orphan.at:
                break  # those who came later know later
            self._offer(iteration, member, orphan, who, now)

    def _offer(self, iteration: _Iteration, member: int, orphan: _Orphan, who: int, now: float) -> None:
        at = self._knows_at(orphan, iteration.waiting[who], now)
        if at < orphan.at:
            orphan.waiter, orphan.at = who, at
            self._at(at, self._take_over, iteration, member, who)

    def _take_over(self, now: float, iteration: _Iteration, member: int, who: int) -> None:
        orphan = iteration.orphans.get(member)
        if orphan is None or (orphan.waiter, orphan.at) != (who, now):
            return
        del iteration.orphans[member]
        self._wait_no_more(who, now)
        self._adopt(member, who, now)

    def _adopt(self, member: int, who: int, now: float) -> None:
        self._counts["takeovers"] += 1
        self._ask("takeovers", now)
        self._evaluate(who, member, now)

    def _outcome(self, now: float) -> Outcome:
        requests = {kind: np.array(times) for kind, times in self._requests.items()}
        looks = self._setting.looks
        waits = [since + looks.until(end - since) for since, end in self._waits]
        requests["looks"] = np.concatenate(waits)
        every = self._setting.timeout / BEATS
        beats = [np.arange(born + (self._replicas[who].beat - born) % every, end, every)
                 for who, born, end in self._lives]  # fmt: skip
        requests["heartbeats"] = np.repeat(np.concatenate(beats), 2)  # and with each, whether the run is over
        ends = [iteration.record_at for iteration in self._iterations]
        counts = (self._counts[name] for name in ("evaluations", "takeovers", "deaths"))
        idle = [max(0.0, iteration.done_at - iteration.waited_for) for iteration in self._iterations]
        return Outcome(
            now, dict(self._seconds), requests, *counts, ends, idle, [end - since for since, end in self._waits]
        )


def claimed(setting: Setting, draw: Draw | None = None) -> Outcome:
    """A run in which replicas claim members one by one."""
    return Simulation(setting, draw).run()
