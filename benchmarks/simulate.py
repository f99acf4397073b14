"""A discrete-event simulation of many replicas that share out the members of ES iterations.

It simulates the protocol of `shardes.replicas`: claims, posts, polls with their back-off,
heartbeats, takeovers and records. There are no models, stores or networks, and a request takes no
time. Requests are counted; benchmarks/store_load.py sends as many to a real store.
"""

import heapq
from array import array
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from math import inf

import numpy as np

from benchmarks.replicas import Draw, Outcome, Setting
from shardes.replicas.heartbeat import BEATS

PRIMARY = 0  # the replica that owns the journal; it does not fail, because the run would end


@dataclass
class _Orphan:
    """A member whose replica died."""

    beat: float  # the last heartbeat of its replica
    # The waiting replica that will be the first to find it, and when.
    waiter: int = -1
    found_at: float = inf


@dataclass
class _Iteration:
    claimed: int = 0
    done: int = 0
    waiting_since: float = inf  # when the first replica ran out of members
    done_at: float = inf
    record_at: float = inf
    # The start of each waiting replica's wait, the longest wait first.
    waiting: dict[int, float] = field(default_factory=dict)
    orphans: dict[int, _Orphan] = field(default_factory=dict)  # by member


@dataclass
class _Replica:
    beat: float  # the offset of its heartbeats in their interval
    slowness: float
    state: str = "absent"  # absent, useful (evaluating), wait, update, down, done
    since: float = 0.0
    life: int = 0  # number of restarts; events of an earlier life are void
    born: float = 0.0
    known: int = 0  # number of records that it has applied, hence its iteration
    member: int = -1


class Simulation:
    """A run in which replicas claim members one by one. `run` may be called once."""

    def __init__(self, setting: Setting, draw: Draw | None = None):
        self._setting = setting
        draw = draw or Draw.of(setting)
        self._times, slowness = draw.times, draw.slowness
        self._rng = np.random.default_rng([setting.seed, 1])
        beats = self._rng.uniform(0, setting.timeout / BEATS, len(slowness))
        self._replicas = [
            _Replica(*pair) for pair in zip(beats.tolist(), slowness.tolist(), strict=True)
        ]
        self._iterations = [_Iteration() for _ in range(setting.iterations)]
        self._recorded = 0
        self._working = 0  # live replicas that have not applied the last record
        self._seconds: dict[str, float] = defaultdict(float)
        self._requests: dict[str, array] = defaultdict(lambda: array("d"))
        self._waits: list[tuple[float, float]] = []
        self._lives: list[tuple[int, float, float]] = []
        self._counts: dict[str, int] = defaultdict(int)
        self._events: list[tuple] = []
        self._pushed = 0

    def run(self) -> Outcome:
        setting, now = self._setting, 0.0
        for number in range(setting.replicas):
            self._start(number, now)
        for number, when in enumerate(setting.joins, setting.replicas):
            self._at(when, self._replay, number, 0)
        for number, when in setting.deaths:
            self._at(when, self._die, number, None)
        while self._working or self._recorded < setting.iterations:
            now, _, event, arguments = heapq.heappop(self._events)
            event(now, *arguments)
        for number, replica in enumerate(self._replicas):
            if replica.state not in ("absent", "down"):
                self._lives.append((number, replica.born, now))
            self._spent(replica, now, {"done": "exchange"}.get(replica.state, replica.state))
        return self._outcome(now)

    def _at(self, when: float, event: Callable, *arguments) -> None:
        self._pushed += 1
        heapq.heappush(self._events, (when, self._pushed, event, arguments))

    def _spent(self, replica: _Replica, now: float, activity: str) -> None:
        """Count the time since the replica's last change of state for `activity`."""
        if replica.state != "absent":
            self._seconds[activity] += now - replica.since
        replica.since = now

    def _request(self, kind: str, now: float, times: int = 1) -> None:
        self._requests[kind].extend([now] * times)

    # Start, death and return of a replica.

    def _start(self, number: int, now: float) -> None:
        replica = self._replicas[number]
        replica.born = now
        self._working += 1
        if self._setting.mtbf < inf and number != PRIMARY:
            self._at(
                now + self._rng.exponential(self._setting.mtbf), self._die, number, replica.life
            )
        self._claim(number, now)

    def _die(self, now: float, number: int, life: int | None) -> None:
        replica = self._replicas[number]
        if replica.state in ("absent", "down", "done") or life not in (None, replica.life):
            return
        iteration = self._iterations[replica.known]
        state = replica.state
        if state == "wait":
            self._end_wait(number, now)
        else:
            self._spent(replica, now, "lost" if state == "useful" else state)
        replica.state, replica.life = "down", replica.life + 1
        self._lives.append((number, replica.born, now))
        self._working -= 1
        self._counts["deaths"] += 1
        if state == "useful":
            every = self._setting.timeout / BEATS
            beat = max(replica.born, now - (now - replica.beat) % every)
            iteration.orphans[replica.member] = _Orphan(beat)
            self._assign(iteration, replica.member, now)
        self._at(now + self._setting.restart, self._replay, number, None)

    def _replay(self, now: float, number: int, known: int | None) -> None:
        """Apply the records after the first `known`; once there are none, start.

        `known` is None after a failure: replaying begins at the latest snapshot.
        """
        if self._recorded == self._setting.iterations:
            return
        replica = self._replicas[number]
        if replica.state == "absent":
            replica.state, replica.since = "down", now
        if known is None:
            known = self._recorded // self._setting.snapshots * self._setting.snapshots
        if missing := self._recorded - known:
            self._request("records", now, missing)
            self._at(
                now + missing * self._setting.update * replica.slowness,
                self._replay,
                number,
                self._recorded,
            )
            return
        self._spent(replica, now, "down")
        replica.known = known
        self._start(number, now)

    # An iteration of a replica: claim, evaluate and post; wait or take over; apply the record.

    def _claim(self, number: int, now: float) -> None:
        replica = self._replicas[number]
        iteration = self._iterations[replica.known]
        self._look_for_record(number, now)
        self._request("claims", now)
        if self._setting.watched:
            for member, orphan in iteration.orphans.items():
                if orphan.beat + self._setting.timeout <= now:
                    del iteration.orphans[member]
                    self._evaluate_orphan(member, number, now)
                    return
        if iteration.claimed < self._setting.members:
            self._request("claims", now)  # to store the claimant
            iteration.claimed += 1
            self._evaluate(number, iteration.claimed - 1, now)
        else:
            self._wait(number, now)

    def _look_for_record(self, number: int, now: float) -> None:
        """Replicas other than the primary's may be late, and the queue deleted."""
        if number != PRIMARY:
            self._request("looks", now)

    def _evaluate(self, number: int, member: int, now: float) -> None:
        replica = self._replicas[number]
        replica.state, replica.member = "useful", member
        self._counts["evaluations"] += 1
        takes = self._times[replica.known, member] * replica.slowness
        self._at(now + takes, self._post, number, replica.life)

    def _post(self, now: float, number: int, life: int) -> None:
        replica = self._replicas[number]
        if life != replica.life:
            return
        iteration = self._iterations[replica.known]
        self._spent(replica, now, "useful")
        self._look_for_record(number, now)
        self._request("posts", now, 2)
        iteration.done += 1
        if iteration.done == self._setting.members:
            iteration.done_at = now
            if PRIMARY in iteration.waiting:
                since = iteration.waiting[PRIMARY]
                self._schedule_record(since + self._setting.polls.after(now - since), replica.known)
        self._claim(number, now)

    def _wait(self, number: int, now: float) -> None:
        replica = self._replicas[number]
        iteration = self._iterations[replica.known]
        replica.state = "wait"
        iteration.waiting[number] = now
        iteration.waiting_since = min(iteration.waiting_since, now)
        if iteration.record_at <= now:
            self._take_record(now, number, replica.life)
            return
        if iteration.record_at < inf:
            self._wait_for_record(number)
        elif number == PRIMARY and iteration.done_at <= now:
            self._schedule_record(now, replica.known)
        for member, orphan in list(iteration.orphans.items()):
            self._offer(iteration, member, orphan, number, now)

    def _end_wait(self, number: int, now: float) -> None:
        replica = self._replicas[number]
        iteration = self._iterations[replica.known]
        del iteration.waiting[number]
        self._waits.append((replica.since, now))
        split = min(max(iteration.done_at, replica.since), now)
        self._seconds["waiting"] += split - replica.since
        self._seconds["exchange"] += now - split
        replica.since = now
        for member, orphan in iteration.orphans.items():
            if orphan.waiter == number:
                self._assign(iteration, member, now)

    def _schedule_record(self, polled: float, iteration_number: int) -> None:
        """The primary sees at `polled` that all members are done; others poll for the record."""
        iteration = self._iterations[iteration_number]
        iteration.record_at = polled + self._setting.exchange
        self._at(iteration.record_at, self._record, iteration_number)
        for number in iteration.waiting:
            self._wait_for_record(number)

    def _record(self, now: float, iteration_number: int) -> None:
        self._recorded = iteration_number + 1
        self._request("records", now)

    def _wait_for_record(self, number: int) -> None:
        replica = self._replicas[number]
        iteration = self._iterations[replica.known]
        since = iteration.waiting[number]
        when = iteration.record_at
        if number != PRIMARY:
            when = since + self._setting.polls.after(when - since)
        self._at(when, self._take_record, number, replica.life)

    def _take_record(self, now: float, number: int, life: int) -> None:
        replica = self._replicas[number]
        if life != replica.life:
            return
        self._end_wait(number, now)
        self._request("records", now, number != PRIMARY)
        replica.state = "update"
        self._at(now + self._setting.update * replica.slowness, self._updated, number, life)

    def _updated(self, now: float, number: int, life: int) -> None:
        replica = self._replicas[number]
        if life != replica.life:
            return
        self._spent(replica, now, "update")
        replica.known += 1
        if replica.known == self._setting.iterations:
            replica.state = "done"
            self._working -= 1
        else:
            self._claim(number, now)

    # Members of dead replicas: the first waiting replica that detects the death takes them over.

    def _silent_at(self, orphan: _Orphan, since: float) -> float:
        """When a replica that waits since `since` has seen no heartbeat for the timeout."""
        seen = orphan.beat if self._setting.watched else max(since, orphan.beat)
        return seen + self._setting.timeout

    def _assign(self, iteration: _Iteration, member: int, now: float) -> None:
        """Find the waiting replica that will be the first to take over a member."""
        orphan = iteration.orphans[member]
        orphan.waiter, orphan.found_at = -1, inf
        for number, since in iteration.waiting.items():
            if self._silent_at(orphan, since) > orphan.found_at:
                break  # a later wait detects the death later
            self._offer(iteration, member, orphan, number, now)

    def _offer(
        self, iteration: _Iteration, member: int, orphan: _Orphan, number: int, now: float
    ) -> None:
        """Let a waiting replica take over a member, unless another one finds it earlier."""
        since = iteration.waiting[number]
        silent = max(self._silent_at(orphan, since), now)
        found_at = since + self._setting.polls.after(silent - since)
        if found_at < orphan.found_at:
            orphan.waiter, orphan.found_at = number, found_at
            self._at(found_at, self._take_over, iteration, member, number)

    def _take_over(self, now: float, iteration: _Iteration, member: int, number: int) -> None:
        orphan = iteration.orphans.get(member)
        if orphan is None or (orphan.waiter, orphan.found_at) != (number, now):
            return
        del iteration.orphans[member]
        self._end_wait(number, now)
        self._evaluate_orphan(member, number, now)

    def _evaluate_orphan(self, member: int, number: int, now: float) -> None:
        self._counts["takeovers"] += 1
        self._request("takeovers", now)
        self._evaluate(number, member, now)

    def _outcome(self, now: float) -> Outcome:
        requests = {kind: np.array(times) for kind, times in self._requests.items()}
        polls = self._setting.polls
        waits = [since + polls.until(end - since) for since, end in self._waits]
        requests["polls"] = np.concatenate(waits)
        interval = self._setting.timeout / BEATS
        beats = [
            np.arange(born + (self._replicas[number].beat - born) % interval, end, interval)
            for number, born, end in self._lives
        ]
        # Two requests each, as of a replica that joined, which also asks whether the run has ended.
        requests["heartbeats"] = np.repeat(np.concatenate(beats), 2)
        ends = [iteration.record_at for iteration in self._iterations]
        counts = (self._counts[name] for name in ("evaluations", "takeovers", "deaths"))
        idle = [
            max(0.0, iteration.done_at - iteration.waiting_since) for iteration in self._iterations
        ]
        return Outcome(
            now,
            dict(self._seconds),
            requests,
            *counts,
            ends,
            idle,
            [end - since for since, end in self._waits],
        )


def simulate(setting: Setting, draw: Draw | None = None) -> Outcome:
    """A run in which replicas claim members one by one."""
    return Simulation(setting, draw).run()
