"""What a replica that joined through the gateway may do with the keys of the run's store.

Requests are JSON lists. Everything that is not listed here is refused: other operations, keys,
numbers and values. T is the run's iteration, K the replica's own number, L any replica's.

| request | answer |
| --- | --- |
| `["check", KEY]` | whether it is there: `current iteration`, `over`, `left/L` |
| `["get", KEY]` | its value: `welcome` and, where they are there, the first two of these |
| `["add", "finished", 0]` | the number of finished iterations |
| `["records", T]` | the journal's records from finished iteration T on, as many as a reply holds |
| `["add", "replicas", 1]` | as the first one of a connection: the number that it takes, plus 1 |
| `["add", "heartbeat/K", 1]` | shows that replica K is alive |
| `["add", "heartbeat/L", 0]` | the heartbeats of replica L |
| `["set", "left/K", ""]` | replica K leaves |
| `["add", "Q/claimed", 1]` | claims a piece of queue Q |
| `["set", "Q/claimant/N", K]` | says so |
| `["compare_set", "Q/claimant/N", L, K]` | takes a piece over; with -1 in place of both: reads |
| `["check", "Q/result/N"]` | whether there is a result |
| `["compare_set", "Q/result/N", "", "K:" RESULT]` | posts a result and counts it |
| `["add", "Q/done", 0 or 1]` | the number of results: the gateway has counted the replica's |

A result must be one of this run (`replicas.validation`). The queues are those of iteration T. In
those of earlier iterations, whose keys may be deleted, everything is claimed and done.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import asdict

from shardes.replicas.protocol import NOBODY, RunStore
from shardes.replicas.validation import Malformed, ResultLimits
from shardes.storage.records import RecordReader

READABLE = ("current iteration", "over")
OF_REPLICA = re.compile(r"(heartbeat|left)/(-1|[0-9]{1,9})")
OF_QUEUE = re.compile(
    r"(iteration|evaluation) ([0-9]{1,9})/(?:(claimed|done)|(claimant|result)/([0-9]{1,9}))"
)
REPLICA = re.compile(r"|-1|[0-9]{1,9}")
CLOSED = 1 << 40  # as the counters of a queue that is over: no queue has so many pieces
UNKNOWN = "a request that the protocol does not have"
REPLY = 1 << 20  # characters of records in one answer; one record may be longer

Answer = int | str | bool | list[str] | None


class Refused(Exception):
    """A request is not permitted; says why, in words of our own."""


class Unreadable(Exception):
    """What a client rightly asked for cannot be read; says what is wrong with which file."""


class SharedKeys:
    """The keys of a run, for all clients of its gateway.

    Args:
        store: the run's, by a connection for the gateway's thread alone.
        records: those of the run's journal, for the gateway's thread alone.
    """

    def __init__(self, store: RunStore, limits: ResultLimits, records: RecordReader):
        self.store, self.keys, self.limits = store, store.keys, limits
        self._records = records
        self._iteration = 0  # not finished, when it was last looked up
        self._answered: tuple[int, int] = (-1, -1)  # the latest request for records: from, to
        self._answer: list[str] = []

    def iteration(self, asked: int) -> int:
        """The iteration that is not finished, if a client asks for one at least as late as `asked`.

        Clients ask for a later one only when the one before is finished, so it is looked up only
        then.
        """
        if asked > self._iteration:
            self._iteration = self.store.number_finished()
        return self._iteration

    def records(self, first: int) -> list[str]:
        """The records of finished iterations from `first` on, as JSON; as many as a reply holds.

        Raises:
            Refused: the iteration is not finished.
            Unreadable: the record cannot be read.
        """
        finished = self.iteration(first + 1)
        if first >= finished:
            raise Refused("a request for the record of an iteration that is not finished")
        if self._answered != (first, finished):  # all replicas ask for the newest one
            self._answer, self._answered = self._read(first, finished), (first, finished)
        return self._answer

    def _read(self, first: int, finished: int) -> list[str]:
        texts: list[str] = []
        for iteration in range(first, finished):
            try:
                text = json.dumps(asdict(self._records.record(iteration)))
            except (OSError, ValueError) as error:
                if texts:  # the client asks for the damaged one next, if it needs it
                    break
                raise Unreadable(f"{error}; see shardes journal RUN_DIR verify") from error
            if texts and sum(map(len, texts)) + len(text) > REPLY:
                break
            texts.append(text)
        return texts


class ClientAccess:
    """Answers the requests of one client, in order."""

    def __init__(self, shared: SharedKeys):
        self._shared, self._keys = shared, shared.keys
        self.replica: int | None = None  # the client's number, once it has taken one

    def leave(self) -> None:
        """The client is gone: others may take over its pieces at once."""
        if self.replica is not None:
            self._shared.store.leave(self.replica)

    def answer(self, request: object) -> Answer:
        """The answer to a request.

        Raises:
            Refused: the request is not permitted.
            Unreadable: it is, and the run's journal is damaged.
        """
        match request:
            case ["check", str(key)] if key in READABLE:
                return self._keys.check([key])
            case ["get", str(key)] if key == "welcome" or key in READABLE:
                return self._get(key)
            case ["add", "finished", 0]:
                return self._shared.store.number_finished()
            case ["records", int(first)] if first >= 0 and not isinstance(first, bool):
                return self._shared.records(first)
            case ["add", "replicas", 1] if self.replica is None:
                self.replica = self._shared.store.take_replica_number()
                return self.replica + 1
            case [str(operation), str(key), *values] if self.replica is not None:
                if found := OF_REPLICA.fullmatch(key):
                    return self._replica(operation, found[1], int(found[2]), values)
                if found := OF_QUEUE.fullmatch(key):
                    queue = found[1], int(found[2])
                    if found[3]:
                        return self._counter(operation, queue, found[3], values)
                    return self._piece(operation, queue, found[4], int(found[5]), values)
        raise Refused(UNKNOWN)

    def _get(self, key: str) -> str:
        if not self._keys.check([key]):
            raise Refused("a read of a key that is not there")
        return self._keys.get(key).decode()

    def _replica(self, operation: str, name: str, number: int, values: Sequence) -> Answer:
        own, key = number == self.replica, f"{name}/{number}"
        if not own and number >= self._shared.store.number_of_replicas():
            raise Refused("a number that no replica has")
        match operation, name, values:
            case "add", "heartbeat", [0]:
                return self._keys.add(key, 0)
            case "add", "heartbeat", [1] if own:
                return self._keys.add(key, 1)
            case "check", "left", []:
                return self._keys.check([key])
            case "set", "left", [""] if own:
                self._keys.set(key, "")
                return None
        raise Refused("a change of what belongs to another replica")

    def _is_over(self, iteration: int) -> bool:
        current = self._shared.iteration(iteration)
        if iteration > current:
            raise Refused("a queue of an iteration that has not begun")
        return iteration < current

    def _counter(
        self, operation: str, queue: tuple[str, int], name: str, values: Sequence
    ) -> Answer:
        over, (kind, iteration) = self._is_over(queue[1]), queue
        match operation, name, values:
            case "add", "claimed", [1]:
                return CLOSED if over else self._keys.add(f"{kind} {iteration}/claimed", 1)
            case "add", "done", [0 | 1]:
                return CLOSED if over else self._keys.add(f"{kind} {iteration}/done", 0)
        raise Refused(UNKNOWN)

    def _piece(
        self, operation: str, queue: tuple[str, int], name: str, piece: int, values: Sequence
    ) -> Answer:
        over, (kind, iteration) = self._is_over(queue[1]), queue
        if piece >= self._shared.limits.pieces(kind):
            raise Refused("a piece that the queue does not have")
        key, own = f"{kind} {iteration}/{name}/{piece}", str(self.replica)
        match operation, name, values:
            case "set", "claimant", [value] if value == own:
                if not over:
                    self._keys.set(key, own)
                return None
            case "compare_set", "claimant", [str(before), str(after)] if REPLICA.fullmatch(
                before
            ) and (after == own or before == after == str(NOBODY)):
                return before if over else self._keys.compare_set(key, before, after).decode()
            case "check", "result", []:
                return over or self._keys.check([key])
            case "compare_set", "result", ["", str(text)]:
                return self._post(queue, piece, text, over)
        raise Refused(UNKNOWN)

    def _post(self, queue: tuple[str, int], piece: int, text: str, over: bool) -> str:
        assert self.replica is not None
        kind, iteration = queue
        poster, _, result = text.partition(":")
        try:
            if poster != str(self.replica):
                raise Malformed("it is in the name of another replica")
            self._shared.limits.check(kind, piece, self.replica, result)
        except Malformed as malformed:
            what = "the result of member" if kind == "iteration" else "the responses of part"
            where = f"{piece} of {kind} {iteration}"
            raise Refused(f"{what} {where}, but {malformed}") from None
        store = self._shared.store.queue(f"{kind} {iteration}")
        if not over and not store.is_posted(piece):  # the same text again would be counted again
            store.post(piece, self.replica, result)
        return text
