"""What a run shows while it goes on."""

import contextlib
import math
import os
import pty
import re
import threading
import time

import pytest

from shardes.reporting import progress
from shardes.reporting.reporter import RunReporter
from shardes.storage.resume import ResumePoint
from written_run import METRICS, settings_of


def test_the_bar_on_a_terminal(tmp_path):
    reader, writer = pty.openpty()
    output = bytearray()

    def read():
        with contextlib.suppress(OSError):
            while chunk := os.read(reader, 4096):
                output.extend(chunk)

    thread = threading.Thread(target=read)
    thread.start()
    with open(writer, "w") as terminal, contextlib.redirect_stdout(terminal):
        reporter = RunReporter(settings_of(tmp_path), ResumePoint())
        reporter.log_iteration(METRICS | {"held_out_reward": 0.25})
        reporter.member_finished(600)
        reporter.progress(1, 2)
        time.sleep(0.5)  # the bar is drawn ten times a second
        reporter.close()
    thread.join(10)
    os.close(reader)
    text = output.decode()
    assert "iteration 1 of 4" in text and "2/3" in text and "members" in text
    for part in ("tokens/s", "reward 1.000", "held-out 0.2500", "best held-out 0.2500", "left"):
        assert part in text, text
    assert "iteration 0  reward 1.000 ± 0.5000  best 2.000  held-out 0.2500" in text


def test_plain_lines_if_not_a_terminal(tmp_path, capsys):
    reporter = RunReporter(settings_of(tmp_path), ResumePoint())
    reporter.member_finished(100)
    reporter.progress(0, 1)
    reporter.log_iteration(METRICS)
    reporter.close()
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("iteration 0  reward 1.000 ± 0.5000  best 2.000  2.0 s  50 tokens/s")
    assert (tmp_path / "logs" / "attempt_1" / "output.log").read_text() == line + "\n"


def test_members_of_an_earlier_start_count_neither_as_tokens_nor_as_time(capsys, monkeypatch):
    """Iteration 1 of 4 goes on with two of its four members; they take ten seconds."""
    clock = iter([0.0, 10.0, 10.0, 10.0])
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock, 10.0))
    pace = progress.Pace(4, 4, start=1, restored=2, every=0)
    terminal = progress.Terminal(pace, -math.inf)
    metrics = METRICS | {"iteration": 1, "seconds": 10.0}
    assert terminal.log_iteration(metrics, tokens=30).endswith("10.0 s  3 tokens/s  0:40 left")
    terminal.close()


def test_rewards_have_four_significant_digits_and_the_accuracy(tmp_path, capsys):
    reporter = RunReporter(settings_of(tmp_path), ResumePoint())
    held_out = {"held_out_reward": 0.00051234, "held_out_accuracy": 0.334}
    metrics = METRICS | {"reward_mean": -144.72, "reward_std": 0.0038, "reward_max": 0}
    reporter.log_iteration(metrics | held_out)
    evaluations = {0: held_out | {"center_reward": 12345.6}, 1: held_out | {"center_reward": 1e20}}
    reporter.summary([1234.5, 9999.96], evaluations, "digest", 1.0)
    reporter.close()
    line, done = capsys.readouterr().out.splitlines()
    assert "reward -144.7 ± 0.003800  best 0.000  held-out 0.0005123 (accuracy 33.4 %)" in line
    assert (
        "member reward 1234 → 10000, center's on training prompts 12346 → 1.000e+20, held" in done
    )


@pytest.mark.parametrize(
    "held_out, told",
    [
        (
            {0: 1.0, 2: 3.0, 4: 2.0},
            "3.000, after 2 iterations: shardes export {} DIR --iteration 2 exports that center",
        ),
        ({0: 1.0, 2: 0.5, 4: 0.75}, "1.000, before the first iteration: "),
        ({0: 1.0, 2: 2.0, 4: 2.0}, None),
    ],
)
def test_an_earlier_center_that_was_better_is_named(tmp_path, capsys, held_out, told):
    reporter = RunReporter(settings_of(tmp_path), ResumePoint())
    evaluations = {t: {"held_out_reward": r, "center_reward": r} for t, r in held_out.items()}
    reporter.summary([0.0] * 4, evaluations, "digest", 1.0)
    reporter.close()
    _, *lines = capsys.readouterr().out.splitlines()
    assert len(lines) == (told is not None)
    if told:
        assert lines[0].startswith(f"the best held-out reward was {told.format(tmp_path)}")


def test_member_lines_if_not_a_terminal_are_seldom(tmp_path, capsys, monkeypatch):
    reporter = RunReporter(settings_of(tmp_path), ResumePoint())
    reporter.member_finished(600)
    reporter.progress(0, 1)
    now = time.monotonic
    monkeypatch.setattr(time, "monotonic", lambda: now() + 11)
    for done in (1, 2):
        reporter.progress(0, done)
    reporter.close()
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("members of iteration 0: 1 of 3, 0:11 so far  ")
    assert line.endswith(" left")


def lines_at(steps, capsys, monkeypatch) -> list[str]:
    """What is printed when calls are made at given seconds; a method's name, and its arguments."""
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    shown = progress.Terminal(progress.Pace(2, 4, start=0, restored=0, every=1), -math.inf)
    for seconds, method, *arguments in steps:
        now[0] = seconds
        getattr(shown, method)(*arguments)
    shown.close()
    return capsys.readouterr().out.splitlines()


def test_a_long_evaluation_is_named_and_the_last_one_is_in_the_time_left(capsys, monkeypatch):
    metrics = METRICS | {"iteration": 0, "seconds": 40.0}
    steps = [
        (0.0, "evaluating", True),
        (9.0, "evaluating"),
        (11.0, "evaluating"),
        (20.0, "progress", 0, 0, 0),
        (60.0, "log_iteration", metrics, 80),
        (100.0, "log_iteration", metrics | {"iteration": 1}, 80),
        (101.0, "evaluating", True),
        (111.0, "evaluating"),
    ]
    lines = lines_at(steps, capsys, monkeypatch)
    assert lines[0] == "evaluating the center, 0:11 so far"
    assert lines[1].endswith("2 tokens/s  1:20 left") and lines[2].endswith("0:20 left")
    assert lines[3:] == ["evaluating the center, 0:10 so far"]


def test_the_scoring_of_an_evaluation_counts_to_it_and_not_to_the_iteration():
    pace = progress.Pace(2, 4, start=0, restored=0, every=0)
    began = pace._began
    assert pace.evaluating(began, begins=True) == 0
    pace.members(0, 0, began + 20)
    assert pace.evaluating(began + 50) == pytest.approx(20)
    assert pace.end_iteration(0, began + 60) == pytest.approx(30 + 30)  # members, and the center


def test_rate_and_time_left_are_those_of_the_members_that_are_done(capsys, monkeypatch):
    steps = [
        (10.0, "progress", 0, 0, 0),
        (20.0, "progress", 0, 2, 60),  # together, after 20 seconds
        (30.0, "progress", 0, 2, 60),
    ]
    assert lines_at(steps, capsys, monkeypatch) == [
        "members of iteration 0: 0 of 4, 0:10 so far",
        "members of iteration 0: 2 of 4, 0:20 so far  3 tokens/s  1:00 left",
        "members of iteration 0: 2 of 4, 0:30 so far  3 tokens/s  0:50 left",
    ]


def test_the_first_iteration_counts_only_until_there_is_another():
    """It compiles and allocates: here it takes 60 seconds, and the others take 30 each."""
    pace = progress.Pace(5, 4, start=0, restored=0, every=0)
    began = pace._began
    assert pace.end_iteration(0, began + 60) == pytest.approx(4 * 60)
    assert pace.members(1, 0, began + 60) == pytest.approx(4 * 60)
    assert pace.end_iteration(1, began + 90) == pytest.approx(3 * 30)
    assert pace.members(2, 2, began + 100) == pytest.approx(3 * 30 - 10)
    assert pace.end_iteration(2, began + 120) == pytest.approx(2 * 30)


def test_there_is_a_line_also_while_nothing_is_called(capsys, monkeypatch):
    """A step of decoding may take long."""
    monkeypatch.setattr(progress, "SILENCE", 1.0)
    shown = progress.Terminal(progress.Pace(2, 4, start=0, restored=0, every=1), -math.inf)
    shown.progress(0, 1, 0)
    until = time.monotonic() + 10
    lines = []
    while len(lines) < 2 and time.monotonic() < until:
        time.sleep(0.1)
        lines += capsys.readouterr().out.splitlines()
    shown.close()
    assert len(lines) >= 2
    for line in lines:
        assert re.match(r"members of iteration 0: 1 of 4, 0:0\d so far", line)


def test_a_slow_step_is_named(capsys, monkeypatch):
    monkeypatch.setattr(progress, "FIRST_WAIT", 0.1)
    with contextlib.suppress(KeyError), progress.slow_step("loading the weights"):
        time.sleep(0.5)
        raise KeyError
    with progress.slow_step("a quick step"):
        pass
    with progress.slow_step("another rank's", shown=False):
        time.sleep(0.2)
    assert re.fullmatch(r"loading the weights, 0:0\d so far\n", capsys.readouterr().err)
