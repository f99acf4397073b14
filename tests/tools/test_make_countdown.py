"""Countdown problems are solvable, distinct, reproducible, and read back as written."""

import json

import pytest

from launch import call, script
from shardes.errors import ConfigError
from shardes.tasks import load_task
from shardes.tasks.countdown import Countdown, evaluate, load_problems, prompt


@pytest.fixture(scope="module")
def make():
    tool = script("tools/make_countdown.py")
    return lambda *arguments: call(tool.main, *arguments)


def test_every_problem_is_solved_by_its_solution_and_unlike_the_others(make, tmp_path):
    assert (
        make(tmp_path, "--train", 50, "--test", 300, "--numbers", 3, 4, "--largest", 12).returncode
        == 0
    )
    seen = set()
    for name, count in (("train", 50), ("test", 300)):
        entries = json.loads((tmp_path / f"{name}.json").read_text())
        assert len(entries) == count
        for entry in entries:
            assert list(entry) == ["id", "context", "numbers", "target", "solution"]
            assert isinstance(entry["target"], str) and len(entry["numbers"]) in (3, 4)
            assert evaluate(entry["solution"], entry["numbers"]) == int(entry["target"])
            assert all(1 <= number <= 12 for number in entry["numbers"])
            seen.add((*sorted(entry["numbers"]), "=", entry["target"]))
    assert len(seen) == 350


def test_a_seed_gives_its_problems(make, tmp_path):
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        make(tmp_path / name, "--train", 20, "--test", 20, "--seed", seed)
    a, b, c = ((tmp_path / name / "test.json").read_text() for name in "abc")
    assert a == b != c


def test_impossible_wishes_are_refused(make, tmp_path):
    for arguments in (["--numbers", 1], ["--train", 0], ["--numbers", 2, "--largest", 5]):
        done = make(tmp_path / "none", *arguments)
        assert done.returncode == 2 and not (tmp_path / "none").exists()


def test_the_task_takes_files_as_they_are_published(make, tmp_path):
    make(tmp_path, "--train", 3, "--test", 2)
    task = load_task("countdown", None, str(tmp_path / "train.json"), str(tmp_path / "test.json"))
    entries = json.loads((tmp_path / "train.json").read_text())
    assert task.prompts("train") == [entry["context"] for entry in entries]
    right = [f"</think>\n<answer>{entry['solution']}</answer>" for entry in entries]
    assert task.score("train", right) == [1.1] * 3
    assert task.score("test", ["", "</think>"]) == pytest.approx([0, 0.01])

    own = [
        {
            "id": 7,
            "context": "Make 5 of 2, 3. <think>",
            "numbers": [2, 3],
            "target": "5",
            "solution": "2+3",
        }
    ]
    own += [{"numbers": ["4", 4], "target": 8}]
    (tmp_path / "own.json").write_text(json.dumps(own))
    problems = load_problems(tmp_path / "own.json")
    assert [(p.prompt, p.numbers, p.target) for p in problems] == [
        ("Make 5 of 2, 3. <think>", [2, 3], 5),
        (prompt([4, 4], 8), [4, 4], 8),
    ]


def test_the_shipped_problems_are_solvable_and_apart():
    task = Countdown()
    assert (len(task.prompts("train")), len(task.prompts("test"))) == (200, 500)
    assert not set(task.prompts("train")) & set(task.prompts("test"))
    assert all(
        text.endswith("<think>") for split in ("train", "test") for text in task.prompts(split)
    )


@pytest.mark.parametrize(
    "text, message",
    [
        ("{", "not a readable JSON"),
        ("[]", "must hold a list"),
        ('[{"id": 7, "numbers": [1]}]', r"bad\.json: entry 0 \(id 7\): target is None"),
        ('[{"numbers": "1 2", "target": 3}]', r"entry 0 \(id none\): numbers is '1 2'"),
        ('[{"numbers": [1], "target": 3, "context": 4}]', "context is 4"),
        ("[3]", "entry 0 is not an object"),
    ],
)
def test_damaged_files_are_named(tmp_path, text, message):
    (tmp_path / "bad.json").write_text(text)
    with pytest.raises(ConfigError, match=message):
        Countdown(train=str(tmp_path / "bad.json"))


def test_only_countdown_takes_files():
    with pytest.raises(
        ConfigError, match=r"task\.train=x\.json: only for task.name=countdown or extraction"
    ):
        load_task("conciseness", None, "x.json")
