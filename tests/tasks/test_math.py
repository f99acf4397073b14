"""The mathematics task: grading of boxed answers, its problems, and error messages."""

import json
import sys
import time

import pytest

from shardes.errors import ConfigError
from shardes.tasks import load_task
from shardes.tasks.math import Math, boxed, load_problems, reward


@pytest.mark.parametrize(
    "response, answer, expected",
    [
        (r"So it is \boxed{\frac{2}{4}}.", "0.5", 1.0),
        (r"\boxed{3\sqrt{3}}", r"\sqrt{27}", 1.0),
        (r"\boxed{x^2+2x+1}", "(x+1)^2", 1.0),
        (r"\boxed{\{2, 1\}}", r"\{1, 2\}", 1.0),
        (r"first \boxed{4}, no, \boxed{5}", "5", 1.0),
        (r"first \boxed{5}, no, \boxed{4}", "5", 0.0),
        ("it is 5", "5", 0.0),
        (r"\boxed{5", "5", 0.0),
        (r"\boxed{}", "5", 0.0),
        (r"\boxed{" * 3000, "5", 0.0),
        (r"\boxed{" + "(" * 5000 + "}", "5", 0.0),
        ("\0\ud800 \\boxed{\ud800}", "5", 0.0),
    ],
)
def test_boxed_answers_are_compared_as_mathematics(response, answer, expected):
    assert reward(response, answer) == expected


def test_a_grader_that_does_not_end_is_stopped():
    started = time.monotonic()
    assert reward(r"\boxed{9^{9^{9^{9^{9}}}}}", "5") == 0.0
    assert time.monotonic() - started < 10


def test_the_last_box_is_taken_with_its_braces():
    assert boxed(r"\boxed{1} and \boxed{\frac{1}{2}}!") == r"\frac{1}{2}"
    assert boxed("none") is None


def test_the_packaged_problems_are_disjoint_and_their_answers_right():
    task = Math()
    prompts = {
        split: [chat[0]["content"] for chat in task.prompts(split)] for split in ("train", "test")
    }
    assert len(prompts["train"]) == len(prompts["test"]) == 20
    assert not set(prompts["train"]) & set(prompts["test"])
    answers = [rf"\boxed{{{problem.answer}}}" for problem in task._problems["test"]]
    assert task.score("test", answers) == [1.0] * 20
    assert task.correct("test", ["no"] * 20) == [False] * 20
    assert task.score("test", [answers[3], "?"], [3, 4]) == [1.0, 0.0]


def test_any_number_of_named_test_sets(tmp_path):
    rows = [
        {"problem": "1 + 1?", "solution": r"It is \boxed{2}."},
        {"problem": "2 + 2?", "answer": 4},
    ]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    task = load_task("math", None, tests={"extra": str(tmp_path / "a.jsonl")})
    assert len(task.prompts("extra")) == 2
    assert task.score("extra", [r"\boxed{2}", r"\boxed{5}"]) == [1.0, 0.0]
    with pytest.raises(KeyError):
        task.prompts("other")


@pytest.mark.parametrize(
    "text, message",
    [
        ("", "holds no rows"),
        ("{", "line 1 is not JSON"),
        ("[1]", "line 1 is not an object"),
        ('{"id": "x7", "answer": "1"}', r"line 1 \(id x7\) has no problem"),
        ('{"problem": "?"}', "line 1 .* has no answer"),
        ('{"problem": "?", "solution": "no box"}', "nor a solution with a box"),
    ],
)
def test_malformed_lines_are_named(tmp_path, text, message):
    (tmp_path / "bad.jsonl").write_text(text)
    with pytest.raises(ConfigError, match=message):
        load_problems(str(tmp_path / "bad.jsonl"))


def test_error_messages(monkeypatch):
    with pytest.raises(ConfigError, match="not a readable file"):
        load_problems("/nowhere.jsonl")
    with pytest.raises(ConfigError, match="datasets:NAME:SPLIT"):
        load_problems("datasets:test")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ConfigError, match="needs the datasets package"):
        load_problems("datasets:a/b:test")
    monkeypatch.setitem(sys.modules, "math_verify", None)
    with pytest.raises(ConfigError, match="needs the package math-verify"):
        Math()
