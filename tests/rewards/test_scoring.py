"""Scoring in worker processes: a reward that fails or hangs harms no other response."""

import json
import os
import subprocess
import sys
import time
from contextlib import closing
from decimal import Decimal
from pathlib import Path

import numpy as np
import pytest
import torch

from shardes.config.schema import TaskConfig
from shardes.errors import ConfigError
from shardes.rewards.scoring import Scorer
from shardes.rewards.worker import score
from shardes.tasks import load_task

REWARD = """
import ctypes, fcntl, json, os, subprocess, sys, time

print("loaded: this is not a reply")

def reward(response, example):
    print(os.getpid(), "is asked", response)
    return CASES[response](example)

def loop():
    while True:
        pass

def replies():
    # the worker's own pipe
    fds = [fd for fd in map(int, os.listdir("/proc/self/fd")) if fd > 2]
    (fd,) = [fd for fd in fds if is_pipe(fd) and fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_WRONLY]
    return fd

def is_pipe(fd):
    try:
        return "pipe" in os.readlink(f"/proc/self/fd/{fd}")
    except OSError:  # that of listdir
        return False

def forge(**reply):
    os.write(replies(), json.dumps(reply).encode() + b"\\n")

def grandchild():
    child = subprocess.Popen(["sleep", "1000"])
    open(os.environ["PIDS"], "a").write(f"{child.pid}\\n")
    loop()
"""
GOOD = [
    "1.5",
    "float(example['worth'])",
    "len(sys.stdin.read())",
    "True",
    "__import__('fractions').Fraction(1, 4)",
]
WORTH = [1.5, 7.0, 0.0, 1.0, 0.25]


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_for_end(pids: list[int], seconds: float = 5) -> list[int]:
    """The processes that are still alive after `seconds`."""
    deadline = time.monotonic() + seconds
    while (left := [pid for pid in pids if alive(pid)]) and time.monotonic() < deadline:
        time.sleep(0.02)
    return left


@pytest.fixture
def scorer(tmp_path):
    """Makes scorers; responses are expressions, whose value the reward function returns."""
    scorers = []

    def make(*responses: str, poll=lambda: None, **settings) -> Scorer:
        cases = ", ".join(f"{response!r}: lambda example: {response}" for response in responses)
        (tmp_path / "my_reward.py").write_text(f"{REWARD}\nCASES = {{{cases}}}\n")
        rows = [
            json.dumps({"id": f"x{n}", "prompt": f"prompt {n}", "worth": 7})
            for n in range(len(responses))
        ]
        (tmp_path / "data.jsonl").write_text("\n".join(rows))
        reward, data = f"{tmp_path}/my_reward.py:reward", str(tmp_path / "data.jsonl")
        task = load_task("jsonl", None, data, data, reward=reward)
        settings = TaskConfig(
            name="jsonl", reward=reward, **{"workers": 2, "timeout": 60.0} | settings
        )
        scorers.append(Scorer(settings, task, tmp_path / "failed.json", poll))
        return scorers[-1]

    yield make
    for scorer in scorers:
        scorer.close()


def test_rewards_come_in_the_responses_order(scorer):
    sleeping = [f"(time.sleep({0.02 * (7 - n % 8)}), {n})[1]" for n in range(24)]
    assert scorer(*sleeping, workers=3)("train", sleeping) == list(map(float, range(24)))
    scores = scorer(*GOOD)
    assert scores("train", GOOD) == WORTH
    assert scores("train", GOOD[1:2], [4]) == [7.0]


@pytest.mark.parametrize(
    "value, reply",
    [
        (np.float32(0.5), {"reward": 0.5}),
        (np.int64(3), {"reward": 3.0}),
        (np.bool_(True), {"reward": 1.0}),
        (np.array(0.25), {"reward": 0.25}),
        (torch.tensor(2, dtype=torch.bfloat16), {"reward": 2.0}),
        (Decimal("0.1"), {"reward": 0.1}),
        (Decimal("-inf"), {"reward": -np.inf}),  # refused in the run's process
        (np.array([1.0]), {"error": "the reward is array([1.]), of type ndarray, not a number"}),
        (np.str_("1"), {"error": "the reward is '1', of type str, not a number"}),
        (1j, {"error": "the reward is 1j, of type complex, not a number"}),
    ],
)
def test_numbers_of_every_library_are_rewards(value, reply):
    assert score(lambda response, example: value, ["", {}]) == reply


@pytest.mark.parametrize(
    "bad, reason",
    [
        ("1 / 0", "ZeroDivisionError: division by zero"),
        ("example['missing']", "KeyError: 'missing'"),
        ("(lambda f: f(f))(lambda f: f(f))", "RecursionError"),
        pytest.param("loop()", "not done within 2 s", marks=pytest.mark.slow),
        pytest.param("time.sleep(1000)", "not done within 2 s", marks=pytest.mark.slow),
        # in C code, which no signal handler interrupts
        ("9 ** 9 ** 9 ** 9", "not done within 2 s"),
        ("sys.exit(3)", "SystemExit: 3"),
        ("os._exit(3)", r"it ended its process \(exit code 3\)"),
        ("os._exit(0)", r"it ended its process \(exit code 0\)"),
        ("ctypes.string_at(0)", r"it ended its process \(SIGSEGV\)"),
        ("os.kill(os.getpid(), 9)", r"it ended its process \(SIGKILL\)"),
        ("[bytearray(10**8) for _ in range(20)]", "MemoryError"),
        ("float('nan')", "the reward is nan, not a number from -1e.100 to 1e.100"),
        ("'1.0'", "the reward is '1.0', of type str, not a number"),
        ("None", "the reward is None, of type NoneType, not a number"),
        ("[1.0]", r"the reward is \[1.0\], of type list, not a number"),
        ("'x' * 10**6", "the reward is 'xxx"),
    ],
)
def test_a_reward_that_fails(scorer, tmp_path, bad, reason):
    responses, timeouts = [*GOOD, bad, *GOOD], int("not done" in reason)
    limits = dict(memory=0.3, timeout=2.0 if timeouts else 60.0)
    scores = scorer(*responses, on_error="-2.5", **limits)
    assert scores("train", responses) == [*WORTH, -2.5, *WORTH]
    assert scores.take_failures() == {"scoring_failures": 1, "scoring_timeouts": timeouts}
    assert scores.take_failures() == {"scoring_failures": 0, "scoring_timeouts": 0}
    assert scores("train", GOOD * 2 + GOOD[:1]) == WORTH * 2 + WORTH[:1]
    assert len(scores._pool.idle) == 2  # as many as before

    with pytest.raises(ConfigError, match=f"task: scoring prompt 5 of train: {reason}"):
        scorer(*responses, **limits)("train", responses)
    ((prompt, response, error),) = (
        row.values() for row in json.loads((tmp_path / "failed.json").read_text())
    )
    assert prompt == [{"role": "user", "content": "prompt 5"}] and response == bad
    assert "\n" not in error


def test_a_reward_that_often_fails_harms_no_other_response(scorer):
    responses = ["os._exit(1)", "2"] * 6
    scores = scorer(*responses, on_error="0", workers=3)
    assert scores("train", responses) == [0.0, 2.0] * 6
    assert scores.take_failures()["scoring_failures"] == 6


FORGED = {
    "forge(request=0, reward=5)": "its process sent no valid reply: b'{",
    "forge(reward=5)": "its process sent no valid reply: b'{",
    "os.write(replies(), b'[]\\n')": "its process sent no valid reply: b'[]",
    "os.write(replies(), b'stray')": "its process sent no valid reply: Expecting value",
    "os.write(replies(), b'\\n')": "its process sent no valid reply: Expecting value",
    "os.write(replies(), b'[' * 50000 + b'\\n')": "its process sent no valid reply: ",
    "os.write(replies(), b'x' * 10**6)": "its process sent no valid reply: ",
    "float('-inf')": "the reward is -inf, not a number from -1e+100 to 1e+100",
    "1.1e100": "the reward is 1.1e+100, not a number from",
    "10**400": "OverflowError: int too large to convert to float",
}


def test_replies_that_are_not_a_reward_for_the_request_are_failures(scorer, tmp_path):
    responses = [response for forged in FORGED for response in ("0.5", forged, "-1e100")]
    scores = scorer(*responses, workers=2, on_error="-1")
    assert scores("train", responses) == [0.5, -1.0, -1e100] * len(FORGED)
    assert scores.take_failures()["scoring_failures"] == len(FORGED)
    errors = {row["response"]: row["error"] for row in json.loads(scores.saved.read_text())}
    wrong = [errors[forged] for forged, error in FORGED.items() if error not in errors[forged]]
    assert not wrong and len(errors) == len(FORGED)


@pytest.mark.faults
def test_a_second_reply_is_not_taken_for_that_of_the_next_response(scorer):
    # The first reply is a forged one, so that the true one remains.
    responses = ["forge(request=2, reward=5)", *GOOD]
    scores = scorer(*responses, workers=1, on_error="-1")
    assert scores("train", GOOD[:1], [0]) == [1.5]
    assert scores("train", responses) == [5.0, -1.0, *WORTH[1:]]
    assert scores.take_failures()["scoring_failures"] == 1
    scores = scorer(*responses, workers=1)
    assert scores("train", [GOOD[0], responses[0]], [1, 0]) == [1.5, 5.0]
    with pytest.raises(ConfigError, match="prompt 1 of train: its process sent no valid reply"):
        scores("train", GOOD, range(1, 6))


@pytest.mark.parametrize("child", ["7", "sys.exit(0)", "1 / 0"])
def test_a_child_that_a_reward_forked_gives_no_reward(scorer, child):
    responses = [f"(os.fork() and 1) or {child}", *GOOD, "(os.fork() and 2) or 7", *GOOD]
    scores = scorer(*responses, workers=1)
    for _ in range(2):
        assert scores("train", responses) == [1.0, *WORTH, 2.0, *WORTH]


def test_several_responses_are_scored_at_a_time(scorer):
    seconds, responses = {}, ["time.sleep(0.25) or 0"] * 8
    for workers in (1, 4):
        scores = scorer(*responses, workers=workers)
        scores("train", responses)  # starts the workers
        started = time.monotonic()
        scores("train", responses)
        seconds[workers] = time.monotonic() - started
    assert seconds[1] / seconds[4] > 2.5, seconds


def test_workers_start_once_and_end_with_close(scorer):
    responses = ["time.sleep(0.05) or os.getpid()"] * 8
    scores = scorer(*responses)
    pids = {int(pid) for _ in range(3) for pid in scores("train", responses)}
    assert len(pids) == 2 and all(map(alive, pids))
    scores.close()
    assert not wait_for_end(list(pids), 0)


def test_a_worker_that_died_while_idle_is_replaced(scorer):
    scores = scorer("os.getpid()", "0", workers=1)
    (pid, _) = scores("train", ["os.getpid()", "0"])
    os.kill(int(pid), 9)
    assert not wait_for_end([int(pid)])
    assert scores("train", ["0", "0"]) == [0.0, 0.0]


def test_processes_that_a_reward_started_are_killed_with_it(scorer, tmp_path, monkeypatch):
    monkeypatch.setenv("PIDS", str(tmp_path / "pids"))
    assert scorer("grandchild()", timeout=2.0, on_error="0")("train", ["grandchild()"]) == [0.0]
    assert not wait_for_end([int((tmp_path / "pids").read_text())])


def test_a_stop_ends_the_scoring(scorer):
    class Stop(Exception):
        pass

    started = time.monotonic()

    def poll():
        if time.monotonic() - started > 1:
            raise Stop

    responses = ["loop()"] * 3
    scores = scorer(*responses, poll=poll, timeout=1000.0)
    with pytest.raises(Stop):
        scores("train", responses)
    assert time.monotonic() - started < 20
    assert not scores._pool.idle


PARENT = """
import json, sys
from pathlib import Path
from shardes.config.schema import TaskConfig
from shardes.rewards.scoring import Scorer
from shardes.tasks import load_task
data, reward, responses = sys.argv[1:]
task = load_task("jsonl", None, data, data, reward=reward)
settings = TaskConfig(name="jsonl", reward=reward, timeout=1000.0, workers=3)
Scorer(settings, task, Path("unused"))("train", json.loads(responses))
"""


def test_workers_end_when_the_parent_is_killed(scorer, tmp_path):
    log_pid = "open(os.environ['PIDS'], 'a').write(f'{os.getpid()}\\n') and "
    responses = [log_pid + body for body in ("loop()", "time.sleep(1000)", "9 ** 9 ** 9 ** 9")]
    scorer(*responses)
    pids = tmp_path / "pids"
    parent = subprocess.Popen(
        [
            sys.executable,
            "-c",
            PARENT,
            str(tmp_path / "data.jsonl"),
            f"{tmp_path}/my_reward.py:reward",
            json.dumps(responses),
        ],
        env=os.environ | {"PIDS": str(pids)},
    )
    try:
        deadline = time.monotonic() + 200
        while not pids.exists() or len(pids.read_text().split()) < 3:
            assert time.monotonic() < deadline and parent.poll() is None
            time.sleep(0.05)
    finally:
        parent.kill()
        parent.wait()
    assert not wait_for_end(list(map(int, pids.read_text().split())))


@pytest.mark.parametrize(
    "source, message",
    [
        (
            "import os\nif os.environ.get('IN_WORKER'): os._exit(5)",
            r"did not get ready: it ended its .*exit code 5",
        ),
        (
            "import os\nif os.environ.get('IN_WORKER'): raise OSError('no')",
            r"raised OSError: no \(in a scoring process\)",
        ),
    ],
)
def test_code_that_loads_only_in_the_trainer_ends_the_run(
    scorer, tmp_path, monkeypatch, source, message
):
    scores = scorer("1", "2", "3", on_error="0")
    (tmp_path / "my_reward.py").write_text(source + REWARD)
    monkeypatch.setenv("IN_WORKER", "1")
    with pytest.raises(ConfigError, match=message):
        scores("train", ["1", "2", "3"])


OWN = """
import helper

class Own:
    def __init__(self):
        self.answers = {"train": ["a", "bb"], "test": ["ccc"]}

    def prompts(self, split):
        return self.answers[split]

    def reward(self, split, number, response):
        return helper.same(response, self.answers[split][number])
"""


def test_a_class_may_leave_scoring_to_workers(tmp_path):
    (tmp_path / "helper.py").write_text("def same(a, b):\n    return float(a == b) or 1 / len(a)\n")
    (tmp_path / "own.py").write_text(OWN)
    settings = TaskConfig(path=f"{tmp_path}/own.py:Own", on_error="-1")
    with closing(
        Scorer(settings, load_task(None, settings.path), tmp_path / "failed.json")
    ) as scores:
        assert scores("train", ["a", "xx"]) == [1.0, 0.5]
        assert scores("train", ["bb"], [1]) == [1.0]
        assert scores("test", [""]) == [-1.0]
    assert json.loads((tmp_path / "failed.json").read_text()) == [
        {
            "prompt": "ccc",
            "response": "",
            "error": "ZeroDivisionError: division by zero (own.py, line 12)",
        }
    ]


def test_importing_the_trainer_leaves_the_import_path_alone():
    code = "import sys; path = [*sys.path]; import shardes.commands.train; print(sys.path == path)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.endswith("True\n")
