"""Calls of a task's `score`, `correct` and `prompts` in the run's own process."""

import json
import math
import os
from decimal import Decimal
from types import SimpleNamespace

import numpy as np
import pytest

from shardes.config.limits import LARGEST_REWARD, is_reward
from shardes.config.schema import TaskConfig
from shardes.errors import ConfigError
from shardes.rewards.scoring import Scorer
from shardes.tasks import prompts_of

RESPONSES = ["a", "bb", "ccc"]


class Unprintable(Exception):
    def __str__(self):
        raise RuntimeError


class OfNoKind(BaseException):
    pass


RAISED = {
    "SystemExit: 0": SystemExit(0),
    "SystemExit": SystemExit(),
    "KeyboardInterrupt": KeyboardInterrupt(),
    "GeneratorExit": GeneratorExit(),
    "OfNoKind: why": OfNoKind("why"),
    "Unprintable": Unprintable(),
    "ValueError: two lines": ValueError("two\nlines"),
    "StopIteration": StopIteration(),
    "RecursionError: deep": RecursionError("deep"),
}


def raises(error: BaseException):
    def function(*arguments):
        raise error

    return function


def make(tmp_path, on_error="fail", **arguments) -> "Scorer":
    methods = {name: arguments.pop(name) for name in ("score", "correct") if name in arguments}
    task = SimpleNamespace(prompts=lambda split: ["p", "q", "r"], **methods)
    return Scorer(TaskConfig(on_error=on_error), task, tmp_path / "failed.json", **arguments)


def refused(call, *arguments) -> str:
    with pytest.raises(ConfigError) as caught:
        call(*arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("text", RAISED)
def test_whatever_a_task_raises_is_one_line(tmp_path, text):
    function = raises(RAISED[text])
    scorer = make(tmp_path, score=function, correct=function)
    assert f"scoring train raised {text}; the responses: " in refused(scorer, "train", RESPONSES)
    rows = json.loads((tmp_path / "failed.json").read_text())
    assert [row["response"] for row in rows] == RESPONSES
    assert refused(scorer.correct, "test", RESPONSES).endswith(f"raised {text}")
    if text != "KeyboardInterrupt":  # Ctrl-C
        message = refused(prompts_of, SimpleNamespace(prompts=function), "test")
        assert message == f"task: prompts('test') raised {text}"


@pytest.mark.parametrize(
    "rewards, problem",
    [
        ([0.0, math.nan, 0.0], "gave prompt 1 of train the reward nan, not a number from -1e+100"),
        ([0.0, 0.0, -math.inf], "gave prompt 2 of train the reward -inf, not a number"),
        (np.float32([np.inf, 0, 0]), "gave prompt 0 of train the reward inf, not a number"),
        ([1.1e100, 0.0, 0.0], "gave prompt 0 of train the reward 1.1e+100, not a number"),
        ([10**400, 0.0, 0.0], "raised OverflowError: int too large to convert to float"),
        ([0.0, 0.0], "score gave 2 rewards for 3 responses"),
        (None, "raised TypeError: 'NoneType' object is not iterable"),
        (["x", 0, 0], "raised ValueError: could not convert string to float: 'x'"),
    ],
)
def test_rewards_that_are_refused(tmp_path, rewards, problem):
    assert problem in refused(make(tmp_path, score=lambda *_: rewards), "train", RESPONSES)


def test_only_rewards_of_complete_responses_are_refused(tmp_path):
    scorer = make(tmp_path, "-2", score=lambda *_: [-1e100, math.nan, 1e100])
    assert scorer("train", RESPONSES, None, {1: "why"}) == [-1e100, -2.0, 1e100]
    scorer = make(tmp_path, "-2", score=lambda *_: [0.0, math.nan])
    assert "prompt 2 of train" in refused(scorer, "train", ["a", "b"], [0, 2])


@pytest.mark.parametrize(
    "value, acceptable",
    [
        (LARGEST_REWARD, True),
        (-LARGEST_REWARD, True),
        (0, True),
        (np.float64(2), True),
        (math.nextafter(LARGEST_REWARD, math.inf), False),
        (10**400, False),
        (-(10**400), False),
        (math.nan, False),
        (math.inf, False),
        (True, False),
        ("1", False),
        (None, False),
        ([1.0], False),
        (Decimal(1), False),
        (1j, False),
    ],
)
def test_what_can_be_a_reward(value, acceptable):
    assert is_reward(value) is acceptable


@pytest.mark.parametrize("values", [[True, 0, np.bool_(True)], np.array([1.0, 0.0, 1.0])])
def test_correct_gives_bools(tmp_path, values):
    assert make(tmp_path, correct=lambda *_: values).correct("test", RESPONSES) == [
        True,
        False,
        True,
    ]
    assert make(tmp_path).correct("test", RESPONSES) is None


@pytest.mark.parametrize(
    "values, problem",
    [
        ([True, False], "correct gave 2 values for 3 responses of test"),
        ([True, math.nan, 1], "raised ValueError: nan is not True or False"),
        ([True, "no", 1], "raised ValueError: 'no' is not True or False"),
        ([np.ones(2), 1, 1], "raised ValueError: "),
        (None, "raised TypeError: 'NoneType' object is not iterable"),
    ],
)
def test_values_of_correct_that_are_refused(tmp_path, values, problem):
    scorer = make(tmp_path, correct=lambda *_: values)
    assert problem in refused(scorer.correct, "test", RESPONSES)


@pytest.mark.parametrize("prompts", ["text", {"a": 1}, None, 3])
def test_prompts_that_are_no_list_are_refused(prompts):
    message = refused(prompts_of, SimpleNamespace(prompts=lambda split: prompts), "train")
    assert message.startswith("task: prompts('train') raised TypeError: ")


def test_prompts_may_be_of_any_sequence():
    assert prompts_of(SimpleNamespace(prompts=lambda split: (p for p in "ab")), "x") == ["a", "b"]


@pytest.mark.parametrize(
    "score",
    [
        raises(KeyboardInterrupt()),
        raises(RuntimeError("made of a KeyboardInterrupt")),
        lambda *_: [0.0] * 3,  # it was handled, and its rewards mean nothing
    ],
)
def test_a_stop_during_score_is_a_stop(tmp_path, score):
    class Stop(Exception):
        pass

    called = []

    def poll():
        if called:
            raise Stop

    scorer = make(tmp_path, score=lambda *_: called.append(1) or score(), poll=poll)
    with pytest.raises(Stop):
        scorer("train", RESPONSES)
    assert not (tmp_path / "failed.json").exists()


@pytest.mark.parametrize("child", [lambda: [9.0] * 3, lambda: 1 / 0, lambda: os.sys.exit(0)])
def test_a_child_that_score_forked_does_not_train(tmp_path, child):
    pids = []

    def score(*_):
        if pid := os.fork():
            pids.append(pid)
            return [1.0] * 3
        return child()

    assert make(tmp_path, score=score)("train", RESPONSES) == [1.0] * 3
    assert os.waitstatus_to_exitcode(os.waitpid(pids[0], 0)[1]) == 1
