"""The journal: entries survive writing and reading; damaged lines are named."""

import json
import os

import pytest

from shardes.errors import ConfigError, RunError
from shardes.storage.journal import Finish, Header, Journal, Record, Resumption, Reward, read

pytestmark = pytest.mark.faults


def record(iteration: int) -> Record:
    rewards = [1.5, -2.0, 0.1 + iteration]
    return Record(
        iteration,
        [2**64 - 1, 0, 7],
        rewards,
        [1e-4, -1e-4, 0.0],
        0.001,
        0.0005,
        f"{iteration:016x}",
    )


HEADER = Header("models/x", {"model.safetensors": "ab" * 32}, {"es.sigma": 0.001, "es.seed": 3})


@pytest.fixture
def path(tmp_path):
    """A journal of two iterations, and two members of a third."""
    path = tmp_path / "journal.jsonl"
    journal = Journal(path, None)
    entries = [HEADER, Reward(0, 2, 0.5, 9, "0" * 16), record(0), Resumption(1, {}), record(1)]
    for entry in [*entries, Reward(2, 1, -1.25, 4, "c" * 16), Reward(2, 0, 0.1, 5, "c" * 16)]:
        journal.append(entry)
    journal.close()
    return path


def test_what_is_appended_is_found_again(path):
    history = read(path)
    assert (history.header, history.records) == (HEADER, [record(0), record(1)])
    assert sorted(history.rewards) == [0, 1] and history.rewards[1].reward == -1.25
    assert [history.digest(i) for i in range(4)] == ["0" * 16, "0" * 15 + "1", "c" * 16, None]
    assert not history.incomplete_line and history.end == path.stat().st_size


def test_appending_goes_on_where_the_history_ends(path):
    journal = Journal(path, read(path))
    journal.append(record(2))
    journal.append(Finish(3, "d" * 16))
    journal.close()
    history = read(path)
    assert len(history.records) == 3 and not history.rewards
    assert history.digest(3) == "d" * 16


def test_no_journal_is_none(tmp_path):
    assert read(tmp_path / "journal.jsonl") is None
    (tmp_path / "journal.jsonl").write_text('{"kind": "header", "model"')
    assert read(tmp_path / "journal.jsonl") is None


def test_a_line_cut_anywhere_is_left_out_and_written_over(path):
    whole = path.read_bytes()
    before = whole[: whole[:-1].rindex(b"\n") + 1]
    for end in range(len(before) + 1, len(whole)):
        path.write_bytes(whole[:end])
        history = read(path)
        assert list(history.rewards) == [1] and "line 7" in history.incomplete_line
        assert history.end == len(before)
    Journal(path, history).append(Reward(2, 0, 0.1, 5, "c" * 16))
    assert path.read_bytes() == whole


def test_a_flipped_bit_anywhere_is_found_and_its_line_named(path):
    whole = path.read_bytes()
    for at in range(len(whole) - 1):
        damaged, number = bytearray(whole), whole[:at].count(b"\n") + 1
        damaged[at] ^= 1 << at % 8
        path.write_bytes(damaged)
        with pytest.raises(ConfigError, match=f"line {number}: damaged"):
            read(path)
    path.write_bytes(whole[:-1] + b"\x0b")  # without its newline the last line is incomplete
    assert "line 7" in read(path).incomplete_line


def test_lines_that_are_lost_or_moved_are_found(path):
    lines = path.read_bytes().splitlines(keepends=True)
    for spoiled in (lines[:2] + lines[3:], [*lines[:5], lines[6], lines[5]], [*lines, lines[-1]]):
        path.write_bytes(b"".join(spoiled))
        with pytest.raises(ConfigError, match="damaged"):
            read(path)


def test_another_version_is_refused(path):
    path.unlink()
    Journal(path, None).append(Header("m", {}, {}, noise="mersenne/1"))
    with pytest.raises(ConfigError, match="mersenne/1"):
        read(path)


def test_changed_settings_void_the_rewards_measured_before(path):
    Journal(path, read(path)).append(
        Resumption(2, {"es.sigma": [0.001, 0.002], "model.path": [{}, {"a": "b"}]})
    )
    history = read(path)
    assert (history.settings["es.sigma"], history.files, history.rewards) == (0.002, {"a": "b"}, {})
    assert history.header.settings["es.sigma"] == 0.001


def test_a_full_disk_leaves_the_journal_as_it_was(path, monkeypatch):
    whole = path.read_bytes()
    journal = Journal(path, read(path))
    real = os.fsync

    def full(handle):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(RunError, match=r"journal\.jsonl: cannot be written.*No space left"):
        journal.append(record(2))
    monkeypatch.setattr("os.fsync", real)
    assert path.read_bytes() == whole
    journal.append(record(2))
    assert len(read(path).records) == 3


def test_a_second_writer_is_noticed(path):
    one, other = Journal(path, read(path)), Journal(path, read(path))
    other.append(record(2))
    with pytest.raises(RunError, match="another process"):
        one.append(record(2))


def test_numbers_survive_to_the_bit(tmp_path):
    path = tmp_path / "journal.jsonl"
    numbers = [0.1, 1 / 3, 5e-324, 1.7976931348623157e308, -0.0]
    Journal(path, None).append(HEADER)
    Journal(path, read(path)).append(Record(0, [1, 2, 3, 4, 5], numbers, numbers, 0.1, 0.2, "0"))
    (restored,) = read(path).records
    assert list(map(float.hex, restored.rewards)) == list(map(float.hex, numbers))
    assert json.loads(path.read_text().splitlines()[1])["kind"] == "iteration"
