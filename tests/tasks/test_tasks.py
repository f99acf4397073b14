"""Built-in and users' tasks: the interface, conciseness, loading, and error messages."""

import json
import sys
from pathlib import Path

import pytest

from shardes.errors import ConfigError
from shardes.tasks import TASKS, load_task
from shardes.tasks.conciseness import Conciseness

OWN = """
import helper

class Own:
    def prompts(self, split):
        return [split, helper.WORD]

    def score(self, split, responses):
        return [float(len(response)) for response in responses]

class NoScore:
    def prompts(self, split):
        return []

class WrongReward:
    def prompts(self, split):
        return []

    def reward(self, response):
        return 0.0

class OtherTrainers:
    def prompts(self, split):
        return []

    def score(self, prompts, completions, **columns):
        return []

class Demanding:
    def __init__(self, value):
        pass
"""


@pytest.fixture
def own(tmp_path: Path) -> Path:
    (tmp_path / "helper.py").write_text("WORD = 'from helper'\n")
    file = tmp_path / "my task.py"
    file.write_text(OWN)
    yield file
    sys.modules.pop("helper", None)


@pytest.mark.parametrize("name", TASKS)
@pytest.mark.parametrize("split", ["train", "test"])
def test_builtin_tasks_have_the_interface(name, split):
    task = load_task(name, None)
    prompts = task.prompts(split)
    assert prompts
    assert prompts == load_task(name, None).prompts(split)
    for prompt in prompts:
        if not isinstance(prompt, str):
            assert all(set(message) == {"role", "content"} for message in prompt)
    rewards = task.score(split, ["something"] * len(prompts))
    assert len(rewards) == len(prompts)
    assert all(type(reward) is float for reward in rewards)


def test_conciseness_has_the_papers_questions():
    task = Conciseness()
    assert task.prompts("train")[0] == [{"role": "user", "content": "Solve: 3 + 5 ="}]
    assert len(task.prompts("train")) == 2
    assert len(task.prompts("test")) == 8
    questions = [chat[0]["content"] for chat in task.prompts("test")]
    assert questions[1:3] == [
        "Calculate: 12 × 7 =",
        'Is the statement "All cats are mammals" true or false?',
    ]


@pytest.mark.parametrize(
    "split, responses, rewards",
    [
        ("train", ["8", "No"], [0.0, 0.0]),
        ("train", ["9", "Yes"], [0.0, -1.0]),
        ("train", ["", ""], [-1.0, -2.0]),
        ("train", ["The answer is 8.", "No\n"], [-15.0, -1.0]),
        ("train", ["×", "né"], [0.0, 0.0]),  # characters, not bytes
        ("test", ["Paris", "84", "True", "10", "Hola", "30", "Red", "7"], [0.0] * 8),
        ("test", [""] * 8, [-5.0, -2.0, -4.0, -2.0, -4.0, -2.0, -3.0, -1.0]),
    ],
)
def test_conciseness_rewards(split, responses, rewards):
    assert Conciseness().score(split, responses) == rewards


@pytest.mark.parametrize("responses", [[], ["8"], ["8", "No", "more"]])
def test_conciseness_refuses_another_number_of_responses(responses):
    with pytest.raises(ValueError, match=f"{len(responses)} responses for the 2 prompts of train"):
        Conciseness().score("train", responses)


def test_a_users_task_may_import_modules_beside_it(own):
    path_before = list(sys.path)
    task = load_task(None, f"{own}:Own")
    assert task.prompts("test") == ["test", "from helper"]
    assert task.score("test", ["a", ""]) == [1.0, 0.0]
    assert sys.path == path_before


def test_a_users_task_is_relative_to_the_working_directory(own, monkeypatch):
    monkeypatch.chdir(own.parent)
    assert load_task(None, "my task.py:Own").prompts("train")[0] == "train"


def test_users_files_of_one_name_do_not_clash(tmp_path):
    for word in ("first", "second"):
        (tmp_path / word).mkdir()
        (tmp_path / word / "json.py").write_text(
            OWN.replace("import helper", "").replace("helper.WORD", f"'{word}'")
        )
    tasks = [load_task(None, f"{tmp_path}/{word}/json.py:Own") for word in ("first", "second")]
    assert [task.prompts("test")[1] for task in tasks] == ["first", "second"]
    assert sys.modules["json"] is json


@pytest.mark.parametrize(
    "name, path, message",
    [
        (None, None, "neither is given"),
        ("conciseness", "a.py:A", "both are given"),
        ("concisenes", None, "did you mean conciseness"),
        ("zzzzz", None, "no such task; there are: conciseness"),
        ("", None, "no such task"),
        (None, "", "file.py:Class"),
        (None, "a.py", "file.py:Class"),
        (None, "a.py:", "file.py:Class"),
        (None, ":A", "file.py:Class"),
        (None, "/nowhere/a.py:A", "there is no file /nowhere/a.py"),
        (
            None,
            "{own}:Missing",
            "no class Missing there; it has Own, NoScore, WrongReward, OtherTrainers, Demanding",
        ),
        (None, "{own}:helper", "no class helper"),
        (None, "{own}:NoScore", r"NoScore has no score\(\) and no reward\(\)"),
        (
            None,
            "{own}:WrongReward",
            r"WrongReward: reward must take \(split, number, response\): too many",
        ),
        (
            None,
            "{own}:OtherTrainers",
            r": score takes \(prompts, completions, \*\*columns\), as another trainer's rewards "
            r"do; it is called with \(split, responses\)",
        ),
        (None, "{own}:Demanding", r"Demanding\(\) raised TypeError: .*'value'"),
    ],
)
def test_tasks_that_cannot_be_loaded(own, name, path, message):
    with pytest.raises(ConfigError, match=message):
        load_task(name, path and path.format(own=own))


@pytest.mark.parametrize(
    "source, error, message",
    [
        ("raise RuntimeError('no data')", RuntimeError, "RuntimeError: no data"),
        (
            "import a_missing_package",
            ModuleNotFoundError,
            "ModuleNotFoundError: No module named",
        ),
        ("class Broken(:", SyntaxError, "SyntaxError: "),
        ("import sys; sys.exit('bye')", SystemExit, "SystemExit: bye"),
    ],
)
def test_a_file_that_fails_on_import_is_named_with_its_error(tmp_path, source, error, message):
    file = tmp_path / "broken.py"
    file.write_text(source)
    modules_before = set(sys.modules)
    with pytest.raises(ConfigError, match=f"importing {file} raised {message}") as caught:
        load_task(None, f"{file}:Broken")
    assert isinstance(caught.value.__cause__, error)
    assert not [
        name for name in set(sys.modules) - modules_before if name.startswith("shardes_task")
    ]


def test_a_file_that_is_not_python_is_refused(tmp_path):
    file = tmp_path / "task.txt"
    file.write_text("class Own: pass")
    with pytest.raises(ConfigError, match="not a Python file"):
        load_task(None, f"{file}:Own")
