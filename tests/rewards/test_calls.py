"""Async, batched and named rewards: each is scored as a plain function's would be."""

import json
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace

import pytest

from shardes.config.schema import TaskConfig
from shardes.errors import ConfigError
from shardes.rewards.scoring import Scorer
from shardes.tasks import load_task
from shardes.tasks.user_code import load_reward_function

REWARDS = """
import asyncio, os, sys, time

flying = peak = 0

async def judge(response, example):  # the response is a key of WORTH
    global flying
    flying += 1
    try:
        value = WORTH[response]()
        return await value if hasattr(value, "__await__") else value
    finally:
        flying -= 1

async def most():  # the most calls that were in flight
    global peak
    await asyncio.sleep(0.3)
    peak = max(peak, flying)
    await asyncio.sleep(0.1)
    return peak

async def never():
    await asyncio.sleep(1000)

async def stubborn():
    while True:
        try:
            await asyncio.sleep(1000)
        except asyncio.CancelledError:
            pass

async def late(seconds, value):
    await asyncio.sleep(seconds)
    return value

def cancelled():
    raise asyncio.CancelledError

def timed_out():
    raise TimeoutError("mine")

def one(response, example):
    return WORTH[response]()

def score_batch(responses, examples):
    assert len(responses) == len(examples) and all(example["worth"] == 7 for example in examples)
    return [WORTH[response]() for response in responses if response != "short"]
"""


class Own:
    """A task class whose reward is async."""

    CODE = """
import asyncio

class Own:
    def prompts(self, split):
        return ["a", "b", "c"]

    async def reward(self, split, number, response):
        await asyncio.sleep(0.01)
        return {"reward": number, "length": len(response)}
"""


@pytest.fixture
def scorer(tmp_path) -> Iterator:
    """Makes scorers of 40 prompts, with one of REWARDS' functions."""
    worth = "".join(f"    {text!r}: lambda: {text},\n" for text in EXPRESSIONS)
    (tmp_path / "my_reward.py").write_text(f"{REWARDS}\nWORTH = {{\n{worth}}}\n")
    rows = [json.dumps({"prompt": f"prompt {n}", "worth": 7}) for n in range(40)]
    (tmp_path / "data.jsonl").write_text("\n".join(rows))
    scorers = []

    def make(function: str, **settings) -> Scorer:
        reward, data = f"{tmp_path}/my_reward.py:{function}", str(tmp_path / "data.jsonl")
        task = load_task("jsonl", None, data, data, reward=reward)
        settings = {"workers": 1, "timeout": 60.0} | settings
        config = TaskConfig(name="jsonl", reward=reward, **settings)
        scorers.append(Scorer(config, task, tmp_path / "failed.json"))
        return scorers[-1]

    yield make
    for made in scorers:
        made.close()


def score(scorer: Scorer, responses: list[str]) -> list[float]:
    return scorer("train", responses, range(len(responses)))


def test_async_calls_are_in_flight_together_and_no_more_than_allowed(scorer):
    scores = scorer("judge", concurrency=3)
    assert score(scores, ["most()"] * 7) == [3.0] * 7
    # Those of several members count together.
    scores = scorer("judge", concurrency=3)
    started = [scores.start("train", ["most()"], [n]) for n in range(4)]
    assert [wait() for wait in started] == [[3.0]] * 4


def test_rewards_come_in_the_responses_order_whichever_call_ends_first(scorer):
    scores = scorer("judge", workers=2, concurrency=5)
    assert score(scores, LATE) == list(map(float, range(24)))


BAD = {  # an async call: what is said of it
    "1 / 0": "ZeroDivisionError: division by zero",
    "float('nan')": "the reward is nan, not a number from",
    "'one'": "the reward is 'one', of type str, not a number",
    "never()": "not done within 1 s",
    "stubborn()": "not done within 1 s",
    "time.sleep(1000)": "not done within 1 s",
    "sys.exit(3)": "SystemExit: 3",
    "os._exit(3)": "it ended its process (exit code 3)",
    "os.kill(os.getpid(), 11)": "it ended its process (SIGSEGV)",
    "cancelled()": "CancelledError",
    "timed_out()": "TimeoutError: mine",
}


@pytest.mark.slow
def test_an_async_call_that_fails_harms_no_other(scorer, tmp_path):
    responses = [text for bad in BAD for text in ("late(0.2, 2)", bad, "3")]
    scores = scorer("judge", on_error="-1", timeout=1.0, concurrency=8)
    assert score(scores, responses) == [2.0, -1.0, 3.0] * len(BAD)
    assert scores.take_failures() == {"scoring_failures": len(BAD), "scoring_timeouts": 3}
    errors = {row["response"]: row["error"] for row in json.loads(scores.saved.read_text())}
    assert not [bad for bad, error in BAD.items() if not errors[bad].startswith(error)], errors
    assert score(scores, ["1", "2"]) == [1.0, 2.0]


@pytest.mark.parametrize("bad", ["os._exit(3)", "1 / 0"])
def test_an_async_call_that_fails_ends_the_run(scorer, bad):
    scores = scorer("judge", concurrency=4)
    with pytest.raises(ConfigError, match=r"task: scoring prompt 2 of train: .*task.on_error"):
        score(scores, ["late(0.1, 1)", "1", bad, "never()"])


def test_a_batch_is_one_call(scorer):
    scores = scorer("score_batch", workers=2)
    pids = score(scores, ["os.getpid()"] * 7)
    assert len({*pids}) == 1
    started = [scores.start("train", ["time.sleep(0.5) or os.getpid()"], [n]) for n in range(2)]
    assert len({wait()[0] for wait in started}) == 2  # two members', beside each other


def test_only_complete_responses_are_in_a_batch(scorer):
    scores = scorer("score_batch", on_error="-1")
    assert scores("train", ["1", "short", "3"], [4, 5, 6], {1: "no"}) == [1.0, -1.0, 3.0]
    assert scores("train", ["1"], [4], {0: "no"}) == [-1.0]
    assert scores.take_failures()["scoring_failures"] == 2


@pytest.mark.parametrize(
    "responses, rewards, error",
    [
        (["1", "'x'", "3"], [1.0, -1.0, 3.0], "the reward is 'x', of type str, not a number"),
        (["1", "10**400", "3"], [1.0, -1.0, 3.0], "OverflowError: int too large"),
        (["1", "short", "3"], [-1.0] * 3, "it gave 2 rewards for 3 responses"),
        (["1", "1 / 0", "3"], [-1.0] * 3, "ZeroDivisionError: division by zero"),
        (["1", "os._exit(1)"], [-1.0] * 2, r"it ended its process \(exit code 1\)"),
        (["1", "time.sleep(100)"], [-1.0] * 2, "not done within 2 s"),
    ],
)
def test_what_fails_in_a_batch(scorer, responses, rewards, error):
    limits = {"timeout": 2.0} if "sleep" in responses[1] else {}
    scores = scorer("score_batch", on_error="-1", **limits)
    assert score(scores, responses) == rewards
    failures = {"scoring_failures": rewards.count(-1.0), "scoring_timeouts": 2 * bool(limits)}
    assert scores.take_failures() == failures
    whole = rewards.count(-1.0) > 1
    what = f"a batch of {len(rewards)} responses to prompts" if whole else "prompt 1"
    with pytest.raises(ConfigError, match=f"scoring {what} of train: {error}"):
        score(scorer("score_batch", **limits), responses)
    saved = json.loads(scores.saved.read_text())
    assert [row["response"] for row in saved] == (responses if whole else [responses[1]])


PARTS = ["{'reward': 1, 'fluent': 0.25, 'true': 1}", "{'reward': -1, 'true': 2, 'fluent': 0.75}"]


@pytest.mark.parametrize("function", ["one", "judge", "score_batch"])
def test_named_parts_are_means_and_the_reward_decides(scorer, function):
    scores = scorer(function, on_error="-9")
    assert score(scores, PARTS) == [1.0, -1.0]
    assert scores.parts == {"fluent": 0.5, "true": 1.5}
    assert scores("train", ["?", PARTS[0]], [0, 1], {0: "no"}) == [-9.0, 1.0]
    assert scores.parts == {"fluent": 0.25, "true": 1.0}
    assert scores("train", ["?"], [0], {0: "no"}) == [-9.0]
    assert scores.parts == {}


def renamed(parts: str) -> str:
    return parts.replace("fluent", "other")


@pytest.mark.parametrize("first, second", [PARTS, PARTS[::-1], ["1", PARTS[0]], [PARTS[0], "1"]])
def test_parts_that_change_end_the_run(scorer, first, second):
    other = renamed(second) if first in PARTS and second in PARTS else second
    scores = scorer("one", on_error="0")
    score(scores, [first])
    with pytest.raises(
        ConfigError, match=r"task: a reward has reward.*, and rewards before had rew"
    ):
        score(scores, [first, other])


NO_NUMBERS = [
    ("{'fluent': 1}", "the reward is a dict without 'reward'; it has fluent"),
    ("{}", "the reward is a dict without 'reward'; it has nothing"),
    ("{'reward': 'x'}", "the reward is 'x', of type str, not a number"),
    ("{'reward': 1, 'a': None}", "the reward's a is None, of type NoneType, not a number"),
    ("{'reward': 1, 'a': float('nan')}", "the reward's a is nan, not a number from"),
    ("{'reward': 1, 'a b': 1}", "a part of the reward is named 'a b'; a name is a letter"),
    ("{'reward': 1, 5: 1}", "a part of the reward is named 5; a name is a letter"),
    ("{'reward': 1} | {f'a{n}': n for n in range(17)}", "the reward has 17 other parts; at"),
]


@pytest.mark.parametrize("reward, error", NO_NUMBERS)
def test_rewards_that_are_no_dict_of_numbers_fail(scorer, reward, error):
    scores = scorer("one", on_error="-1")
    assert score(scores, ["0", reward]) == [0.0, -1.0]
    (row,) = json.loads(scores.saved.read_text())
    assert row["error"].startswith(error)


def test_a_class_gives_parts_from_either_method(tmp_path):
    (tmp_path / "own.py").write_text(Own.CODE)
    path = f"{tmp_path}/own.py:Own"
    scorer = Scorer(TaskConfig(path=path), load_task(None, path), tmp_path / "failed.json")
    with closing(scorer):
        assert scorer("train", ["a", "bb", "ccc"]) == [0.0, 1.0, 2.0]
        assert scorer.parts == {"length": 2.0}
    values = [{"reward": n, "length": 3 * n} for n in range(3)]
    task = SimpleNamespace(prompts=lambda split: ["a", "b", "c"], score=lambda *_: values)
    scorer = Scorer(TaskConfig(), task, tmp_path / "failed.json")
    assert scorer("train", ["", "", ""]) == [0.0, 1.0, 2.0] and scorer.parts == {"length": 3.0}
    values[1] = {"reward": 1, "length": float("inf")}
    with pytest.raises(ConfigError, match="gave prompt 1 of train a reward whose length is inf"):
        scorer("train", ["", "", ""])


@pytest.mark.parametrize(
    "code, name, message",
    [
        ("def score(responses, examples): pass", "score", "takes lists; name it score_batch, or"),
        ("def score_batch(responses): pass", "score_batch", r"must take \(responses, examples\)"),
        ("def score_batch(prompts, completions): pass", "score_batch", "another trainer's rewards"),
    ],
)
def test_functions_of_another_form_are_refused(tmp_path, code, name, message):
    (tmp_path / "my_reward.py").write_text(code)
    with pytest.raises(ConfigError, match=message):
        load_reward_function(f"{tmp_path}/my_reward.py:{name}")


def test_workers_of_async_code_end_with_close(scorer):
    scores = scorer("judge")
    (pid,) = score(scores, ["os.getpid()"])
    scores.start("train", ["never()", "time.sleep(1000)"], [0, 1])
    time.sleep(0.2)
    scores.close()
    assert not Path(f"/proc/{int(pid)}").exists()


LATE = [f"late({0.01 * (7 - n % 8)}, {n})" for n in range(24)]
EXPRESSIONS = [  # the responses, each with what it is worth
    *("0", "1", "2", "3", "'x'", "10**400", "most()", "late(0.1, 1)", "late(0.2, 2)", *LATE),
    *("os.getpid()", "os._exit(1)", "time.sleep(100)", "time.sleep(0.5) or os.getpid()"),
    *(*BAD, *PARTS, *map(renamed, PARTS), *(reward for reward, _ in NO_NUMBERS)),
]
