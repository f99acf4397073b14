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


@pytest.mark.parametrize(
    "response, answer, expected",
    [
        (r"so \boxed 2.", "2", 1.0),
        (r"so $\boxed 2$ and 3", "2", 1.0),
        (r"$\boxed \frac{1}{2}$", r"\frac{1}{2}", 1.0),
        (r"$\boxed 2x + 1$", "1 + 2x", 1.0),
        (r"\fbox{2}", "2", 1.0),
        (r"\boxed {5}", "5", 1.0),
        (r"\boxed{104.}", "104", 1.0),
        (r"\boxed{104}", "104.", 1.0),
        (r"\boxed{\textbf{(073)}}", "73", 1.0),
        (r"\boxed{73}", r"\textbf{(073)}", 1.0),
        (r"\boxed{5}, as \boxed asks", "5", 1.0),
        (r"\boxed{\{2, 1\}", r"\{1, 2", 0.0),
    ],
)
def test_boxes_are_read_as_published_solutions_write_them(response, answer, expected):
    assert reward(response, answer) == expected


@pytest.mark.parametrize(
    "response, answer, expected",
    [
        (r"\boxed{1} and \boxed{2}", "1,2", 1.0),
        (r"\(\boxed{2}\), \(\boxed{1}\)", "1,2", 1.0),
        (r"$\boxed{1}$, $\boxed{2}\text{ or }\boxed{234}$", "1, 2, 234", 1.0),
        (r"\boxed{2}", "1,2", 0.0),
        (r"\boxed{2}, no, \boxed{1}", "1,2", 0.0),
        (r"\boxed{2} or \boxed{3}", "2", 0.0),
        (r"\boxed{1}, \boxed{234}", "1234", 0.0),
        (r"\boxed{3} and \boxed{1} and \boxed{2}", "1,2", 0.0),
    ],
)
def test_boxes_that_stand_together_are_one_answer(response, answer, expected):
    assert reward(response, answer) == expected


@pytest.mark.parametrize(
    "response, answer, expected",
    [
        (r"\boxed{\frac{1}{2^{99}}}", r"\frac{1}{2^{98}}", 0.0),
        (r"\boxed{2^{-98}}", r"\frac{1}{2^{98}}", 1.0),
        (r"\boxed{\frac{1}{2006!}}", r"\frac{1}{2004!}", 0.0),
        (r"\boxed{0.333333}", "1/3", 1.0),
        (r"\boxed{50}", r"50\%", 1.0),
        (r"\boxed{\cos(5\pi/14)}", r"\sin(\pi/7)", 1.0),
        (r"\boxed{\?}", r"\?", 1.0),
    ],
)
def test_exact_numbers_are_compared_relative_to_their_size(response, answer, expected):
    assert reward(response, answer) == expected


@pytest.mark.parametrize(
    "hostile",
    ["\\boxed{", "\\boxed{1} ", "\\boxed 1x", "\\boxed{1} and ", "\\boxed ", "\\boxed{1}{"],
)
def test_many_boxes_are_read_in_linear_time(hostile):
    started = time.monotonic()
    assert reward(hostile * 10_000, "5") == 0.0
    assert time.monotonic() - started < 5


@pytest.mark.parametrize(
    "row, answers",
    [
        ({"question": "?", "answer": "48 / 2 = 24\n24 + 48 = 72\n#### 72"}, ["72"]),  # GSM8K
        ({"question": "?", "answer": "so\n#### 1,200"}, ["1,200"]),
        ({"problem": "?", "answer": ["9.6", 10]}, ["9.6", "10"]),
        ({"problem": "?", "answer": "['9.6']"}, ["9.6"]),
        ({"problem": "?", "answer": '["$\\\\pi$", "3"]'}, [r"\pi", "3"]),
        ({"problem": "?", "answer": "[1, 2]"}, ["[1, 2]"]),  # an interval
        ({"problem": "?", "answer": "['a"}, ["['a"]),
        ({"problem": "?", "answer": r"It is $\boxed{5}$."}, ["5"]),
        ({"problem": "?", "answer": "", "solution": r"\boxed {5}"}, ["5"]),
        ({"problem": "?", "answer": None, "solution": r"\fbox{5}"}, ["5"]),
        ({"problem": "?", "answer": 142.0}, ["142.0"]),
    ],
)
def test_answers_of_published_rows(tmp_path, row, answers):
    (tmp_path / "rows.jsonl").write_text(json.dumps(row))
    (problem,) = load_problems(str(tmp_path / "rows.jsonl"))
    assert problem.answers == answers
    task = Math(str(tmp_path / "rows.jsonl"))
    for answer in answers:
        assert task.score("train", [rf"\boxed{{{answer}}}"]) == [1.0]


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
    answers = [rf"\boxed{{{problem.answers[0]}}}" for problem in task._problems["test"]]
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
        ('{"question": 5, "answer": "1"}', "line 1 .* has no problem, nor a question"),
        ('{"problem": "?"}', "line 1 .* has no answer"),
        ('{"problem": "?", "answer": ""}', "line 1 .*: answer is ''; it must be a number"),
        ('{"problem": "?", "answer": " #### "}', "line 1 .*: answer is ' #### '"),
        ('{"problem": "?", "answer": []}', r"line 1 .*: answer is \[\]"),
        ('{"problem": "?", "answer": ["1", ""]}', "line 1 .*: answer is "),
        ('{"problem": "?", "answer": {"value": 1}}', "line 1 .*: answer is {'value': 1}"),
        ('{"problem": "?", "answer": NaN}', "line 1 .*: answer is nan"),
        ('{"problem": "?", "answer": "\\\\frac{1"}', "line 1 .*: answer is "),
        (
            json.dumps({"problem": "?", "answer": "1+" * 600}),
            r"\.\.\. \(1202 characters\); it must",
        ),
        ('{"problem": "?", "solution": "no box"}', "nor a solution with a box"),
    ],
)
def test_malformed_lines_are_named(tmp_path, text, message):
    (tmp_path / "bad.jsonl").write_text(text)
    with pytest.raises(ConfigError, match=message):
        load_problems(str(tmp_path / "bad.jsonl"))


def test_error_messages(monkeypatch):
    with pytest.raises(ConfigError, match="there is no such data file"):
        load_problems("/nowhere.jsonl")
    with pytest.raises(ConfigError, match="datasets:NAME:SPLIT"):
        load_problems("datasets:test")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ConfigError, match="needs the datasets package"):
        load_problems("datasets:a/b:test")
    monkeypatch.setitem(sys.modules, "math_verify", None)
    with pytest.raises(ConfigError, match="needs the package math-verify"):
        Math()
