"""Single records of a journal, read while another writes."""

import threading
from contextlib import closing

import pytest

from shardes.storage.journal import Header, Journal, Record, Reward
from shardes.storage.records import RecordReader


def record(iteration: int) -> Record:
    return Record(iteration, [7], [0.5, 1.5], [0.25], 0.1, 0.1, f"digest of {iteration}")


@pytest.fixture
def journal(tmp_path):
    journal = Journal(tmp_path / "journal.jsonl", None)
    journal.append(Header("model", {}, {}))
    with closing(journal):
        yield journal


def append(journal: Journal, iteration: int) -> None:
    for member in range(2):
        journal.append(Reward(iteration, member, 0.5, 3, "digest"))
    journal.append(record(iteration))


def test_records_are_read_in_any_order_while_others_are_written(journal):
    count, reader, found = 60, RecordReader(journal.path), []
    append(journal, 0)

    def read() -> None:
        while len(found) < count:
            try:
                found.append(reader.record(len(found)))
            except ValueError:
                continue

    thread = threading.Thread(target=read)
    thread.start()
    for iteration in range(1, count):
        append(journal, iteration)
    thread.join(20)
    assert found == [record(iteration) for iteration in range(count)]
    assert [reader.record(iteration) for iteration in (5, 59, 0)] == [
        record(5),
        found[59],
        found[0],
    ]


def test_a_record_that_is_not_there_or_damaged_is_not_read(journal):
    append(journal, 0)
    append(journal, 1)
    with pytest.raises(ValueError, match="ends at line 7, before the record of iteration 2"):
        RecordReader(journal.path).record(2)
    content = journal.path.read_bytes()
    place = content.index(b"digest of 1")
    journal.path.write_bytes(content[:place] + b"D" + content[place + 1 :])
    assert RecordReader(journal.path).record(0) == record(0)
    with pytest.raises(ValueError, match=r"line 7: damaged \(its checksum does not match"):
        RecordReader(journal.path).record(1)
    journal.path.write_bytes(content[:place])
    with pytest.raises(ValueError, match="ends at line 6, before the record of iteration 1"):
        RecordReader(journal.path).record(1)
