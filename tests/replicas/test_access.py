"""Who knows the token can do what the protocol has, and nothing else, with every key."""

import itertools
import json
import re

import pytest
import torch.distributed as dist
from gateways import LIMITS, SECRET, forgeries
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from shardes.errors import RunError
from shardes.replicas.access import ClientAccess, Refused, SharedKeys
from shardes.replicas.gateway import LENGTH
from shardes.replicas.gateway_client import GatewayStore, connect
from shardes.replicas.protocol import MemberResult
from shardes.storage.journal import Record
from shardes.storage.records import RecordReader


def permitted(request: list, own: int) -> bool:
    """The requests that the documentation of `replicas.access` lists, by other means than its."""
    operation, key, *values = request
    queue = re.fullmatch(r"(iteration|evaluation) 0/(\w+)(?:/([0-3]))?", key)
    exists = key in ("welcome", "current iteration")
    name, piece = (queue[2], queue[3]) if queue else ("", None)
    if name in ("claimant", "result") and int(piece or 9) > (3 if key[0] == "i" else 1):
        return False
    match operation, values:
        case "check", []:
            readable = key == "over" or exists
            replica = re.fullmatch(rf"left/(-1|0|{own})", key)
            return (key != "welcome" and bool(readable or replica)) or name == "result"
        case "get", []:
            return exists
        case "add", [amount]:
            if name == "claimed" or key == f"heartbeat/{own}":
                return amount in ((1,) if name else (0, 1)) and amount is not None
            others = re.fullmatch(r"heartbeat/(-1|0)", key) is not None
            read = others or key == "finished"
            return (name == "done" and amount in (0, 1)) or (read and amount == 0)
        case "set", [value]:
            own_claim = name == "claimant" and value == str(own)
            return own_claim or (key == f"left/{own}" and value == "")
        case "compare_set", [before, after]:
            takes_over = after == str(own) and before in ("", "0", "-1")
            return name == "claimant" and (takes_over or before == after == "-1")
    return False


@pytest.fixture
def victim(store, primary, join):
    """A replica that has posted a result; nothing happens to it, or to what the primary wrote."""
    victim = join()
    queue = victim.queue("iteration 0")
    assert queue.claim() == 0
    queue.set_claimant(0, 1)
    queue.post(0, 1, MemberResult(0.5, 3, 1, 12.0).to_json())
    fixed = ("welcome", "current iteration", "left/1", "iteration 0/result/0", "iteration 0/done")
    before = {key: store.compare_set(f"prefix/{key}", "?", "?") for key in fixed}
    yield
    assert {key: store.compare_set(f"prefix/{key}", "?", "?") for key in fixed} == before
    assert not store.check(["prefix/over"]) and not store.check(["prefix/record/0"])
    assert not store.check(["prefix/evaluation 0/result/0"])
    victim.beat(1)  # its connection is as good as before
    assert queue.number_done() == 1 and not primary.has_left(0)


def test_a_damaged_journal_is_not_the_clients_mistake(primary, journal, join, warnings):
    for iteration in range(2):
        record = Record(iteration, [7], [0.5, 1.5], [0.25], 0.1, 0.1, "digest")
        journal.append(record)
        primary.publish(record)
    client = join()
    content = journal.path.read_bytes()
    journal.path.write_bytes(content[:-9] + b"?" + content[-8:])
    assert client.record(0).iteration == 0
    for _ in range(2):
        with pytest.raises(RunError) as failure:
            join().record(1)
        message = str(failure.value)
        assert f"{journal.path}, line 3: damaged" in message and "shardes journal" in message
        assert "excluded" not in message and "sent" not in message
    assert len(warnings) == 2
    assert all("line 3: damaged" in line and "sent" not in line for line in warnings)


def test_what_is_permitted_is_what_is_documented(primary, journal, victim):
    """Each key is forged, without a network, by one client that is not excluded for it."""
    client = ClientAccess(SharedKeys(primary.clone(), LIMITS, RecordReader(journal.path)))
    own = client.answer(["add", "replicas", 1]) - 1
    answered = 0
    for request in forgeries(own):
        try:
            client.answer(json.loads(json.dumps(request)))
            assert permitted(request, own), request
            answered += 1
        except Refused as refused:
            assert not permitted(request, own), (request, refused)
    assert answered > 30


def test_each_key_is_forged_and_nothing_happens_but_to_the_forger(
    primary, victim, join, warnings, capfd
):
    """By clients that have the token."""
    count = 0
    for request in [r for r in forgeries(999_999_999)[::121] if not permitted(r, 999_999_999)]:
        client, number = join(), count + 2
        with pytest.raises(dist.DistError, match="has excluded this replica; it sent a"):
            client._base._ask(*request)
        count += 1
        assert len(warnings) == count and f"replica {number} from" in warnings[-1]
        assert primary.has_left(number)
    assert count > 250
    assert capfd.readouterr().err == ""


GOOD = [0.5, 3, "K", 12.0]
MEMBERS = [
    "",
    "null",
    "{",
    "[" * 2_000,
    "9" * 2_000,
    "[]",
    "{}",
    '"x"',
    "[0.5]",
    *(
        json.dumps(values)
        for values in (
            GOOD[:3],
            [*GOOD, [], {}, {}, 0],
            [*GOOD, [], {}, 0],
            [*GOOD, [], {}, {"true": "1"}],
            [*GOOD, [], {}, {"true": float("nan")}],
            [*GOOD, [], {}, {"of two words": 1.0}],
            [*GOOD, [], {}, {f"a{n}": 1.0 for n in range(17)}],
            [None, *GOOD[1:]],
            ["0.5", *GOOD[1:]],
            [True, *GOOD[1:]],
            [float("nan"), *GOOD[1:]],
            [float("inf"), *GOOD[1:]],
            [1e200, *GOOD[1:]],
            [10**400, *GOOD[1:]],
            [0.5, -1, *GOOD[2:]],
            [0.5, 16, *GOOD[2:]],
            [0.5, 1.0, *GOOD[2:]],
            [0.5, True, *GOOD[2:]],
            [0.5, 3, 0, 12.0],
            [0.5, 3, "x", 12.0],
            [0.5, 3, True, 12.0],
            [0.5, 3, "K", "now"],
            [0.5, 3, "K", float("-inf")],
            [*GOOD, [0.5]],
            [*GOOD, [0.5, 0.5, 0.5]],
            [*GOOD, None],
            [*GOOD, [], []],
            [*GOOD, [], {"x": 1}],
            [*GOOD, [], {"scoring_failures": 4}],
            [*GOOD, [], {"scoring_failures": -1}],
            [*GOOD, [], {"scoring_failures": "1"}],
        )
    ),
]
RESPONSES = [
    *MEMBERS[:6],
    *(
        json.dumps(values)
        for values in (
            [[1, 2]],
            [[1], [2], [3]],
            [[1], "x"],
            [[1], [100]],
            [[1], [-1]],
            [[1], [1.0]],
            [[1], [True]],
            [[1], [None]],
            [[1], [[1]]],
            [[1], [1] * 6],
        )
    ),
]


@pytest.mark.parametrize(
    "queue, piece, texts",
    [("iteration 0", 1, MEMBERS), ("evaluation 0", 0, RESPONSES)],
    ids=["members", "responses"],
)
def test_a_malformed_result_costs_the_replica_its_place(
    primary, join, warnings, capfd, queue, piece, texts
):
    posted = primary.queue(queue)
    for number, text in enumerate(texts, 1):
        client = join()
        with pytest.raises(dist.DistError, match="has excluded this replica"):
            client.queue(queue).post(piece, number, text.replace('"K"', str(number)))
        with pytest.raises(dist.DistError):
            client.beat(number)
        assert primary.has_left(number) and not posted.is_posted(piece), text
        assert len(warnings) == number
        (line,) = warnings[-1].splitlines()
        assert f"{piece} of {queue}, but it" in line or "but a response" in line, text
        assert len(line) < 250
    assert posted.number_done() == 0
    good = {"iteration 0": [*GOOD, [], {}, {"true": 0.25}], "evaluation 0": [[1, 99], []]}[queue]
    text = json.dumps(good).replace('"K"', str(len(texts) + 1))
    join().queue(queue).post(piece, len(texts) + 1, text)
    assert posted.result(piece) == text
    assert capfd.readouterr().err == ""


def test_a_result_counts_once_however_often_it_is_posted(primary, join):
    texts = ["[[1],[2,99]]", "[[1],[]]"]
    clients = [join(), join()]
    for text, (number, client) in itertools.product(texts, enumerate(clients, 1)):
        client.queue("evaluation 0").post(0, number, text)
    assert primary.queue("evaluation 0").number_done() == 1
    assert primary.queue("evaluation 0").result(0) == texts[0]
    with pytest.raises(dist.DistError):
        clients[1].queue("evaluation 0").post(1, 1, "[[1]]")  # in another's name


def test_a_queue_that_is_over_is_done(store, primary, join):
    client = join()
    primary.queue("iteration 0").post(0, 0, "[]")
    primary.publish(Record(0, [1], [0.5], [0.0], 0.1, 0.1, "digest"))
    client.queue("iteration 1").claim()
    primary.queue("iteration 0").delete(4)
    keys = store.num_keys()
    queue = client.queue("iteration 0")
    assert queue.claim() >= 4 and queue.number_done() >= 4 and queue.is_posted(0)
    queue.set_claimant(0, 1)
    assert queue.claimant(0) == -1 and not queue.take_over(0, -1, 1)
    queue.post(0, 1, MemberResult(0.5, 3, 1, 12.0).to_json())
    assert store.num_keys() == keys


@settings(
    max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.binary(max_size=80), st.sampled_from(["frame", "raw"]))
def test_whatever_is_sent_ends_that_connection_only(gateway, warnings, data, how):
    client = connect(f"127.0.0.1:{gateway.port}", SECRET, 5)._base
    assert isinstance(client, GatewayStore)
    length = len(data).to_bytes(LENGTH, "big") if how == "frame" else b""
    client._gateway.sendall(length + data)
    client._gateway.shutdown(1)
    answer = client._answers.read()
    assert answer == b"" or b'{"refused":"a request that ' in answer
    client.close()
    other = connect(f"127.0.0.1:{gateway.port}", SECRET, 5)
    assert other.read_welcome().replicas == 1
    other._base.close()
    assert all("\n" not in line and len(line) < 250 for line in warnings)


@pytest.mark.parametrize("length", [1 << 16, 1 << 31, (1 << 32) - 1])
def test_a_request_that_is_too_long_is_not_read(gateway, length):
    client = connect(f"127.0.0.1:{gateway.port}", SECRET, 5)._base
    client._gateway.sendall(length.to_bytes(LENGTH, "big") + b"[")
    assert b"too long" in client._answers.read()
