"""The examples run as their README says, here with a tiny model and fewer iterations."""

import json
import re
import shlex
import sys
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace

import pytest

from launch import ROOT, run, script
from shardes.config import loading as settings
from shardes.rewards.scoring import Scorer
from shardes.tasks.user_code import load_reward_function, load_user_task

EXAMPLES = ROOT / "examples"
CONFIGS = sorted(EXAMPLES.glob("*/*.yaml"))


# Those of judge and reward_model are scored in test_example_rewards.py.
QUICK = ("facts", "three_words")
RUNS = [
    pytest.param(
        file, id=file.parent.name, marks=[] if file.parent.name in QUICK else pytest.mark.slow
    )
    for file in CONFIGS
]


@pytest.mark.parametrize("file", RUNS)
def test_an_example_runs(file, uneven_llama, judge, judging_llama, tmp_path, monkeypatch):
    monkeypatch.setenv("REWARD_MODEL", str(judging_llama))
    directory = tmp_path / "run"
    keys = [
        f"model.path={uneven_llama}",
        f"run.dir={directory}",
        "es.population_size=2",
        "es.iterations=2",
    ]
    done = run(
        [
            sys.executable,
            "launchers/train.py",
            str(file.relative_to(ROOT)),
            *keys,
            "checkpoint.every=0",
        ]
    )
    assert done.returncode == 0, done.stdout + done.stderr
    first, _ = (json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines())
    assert first["reward_min"] < first["reward_max"] and first["scoring_failures"] == 0
    assert "held_out_reward" in first


def test_every_example_is_in_the_readme_with_its_command():
    text = (EXAMPLES / "README.md").read_text()
    commands = [shlex.split(line) for line in re.findall(r"^    (shardes .*)$", text, re.MULTILINE)]
    assert {ROOT / word for words in commands for word in words if word.endswith(".yaml")} == set(
        CONFIGS
    )
    for file in CONFIGS:
        config = settings.load(str(file), [])
        assert config.run.dir == f"runs/{file.parent.name}"
        assert file.relative_to(ROOT).as_posix() in file.read_text()


@pytest.mark.parametrize(
    "response, reward",
    [
        ("Earth", 1.0),
        ("earth!", 0.98),
        ("", 0.0),
        ("Mars", 0.0),
        ("Hearths", -0.04),
        ("It is Earth.", 1 - 0.02 * 7),
    ],
)
def test_the_reward_function_of_the_facts(response, reward):
    function = load_reward_function(f"{EXAMPLES}/facts/reward.py:one_word")
    (line, *_) = Path(EXAMPLES / "facts" / "train.jsonl").read_text().splitlines()
    assert function(response, json.loads(line)) == pytest.approx(reward)


DOCS = (ROOT / "docs" / "tasks.md").read_text()


def test_the_worked_example_of_the_docs(uneven_llama, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("moods").mkdir()
    files = dict(
        re.findall(r"^`(moods/\S+)`:\n\n```\w+\n(.*?)^```", DOCS, re.MULTILINE | re.DOTALL)
    )
    assert len(files) == 4
    for name, text in files.items():
        Path(name).write_text(text)
    arguments = ["moods/config.yaml", f"model.path={uneven_llama}"]
    plan = script("launchers/train.py").prepare(arguments, SimpleNamespace(rank=0, size=1))
    plan.run.close()
    assert (
        plan.task.prompts("test")[0][0]["content"] == "Name one emotion. The soup had a hair in it."
    )
    with closing(Scorer(plan.config.task, plan.task, tmp_path / "failed.json")) as scorer:
        assert scorer("test", ["Disgust.", "I do not know"]) == pytest.approx([1.0, -0.3])


def test_the_class_of_the_docs(tmp_path):
    ((whole, each),) = re.findall(
        r"^```python\n(class Rhymes.*?)^```.*?^```python\n(.*?)^```", DOCS, re.M | re.S
    )
    (tmp_path / "whole.py").write_text(whole)
    (tmp_path / "each.py").write_text(whole[: whole.index("    def score")] + each)
    task = load_user_task(f"{tmp_path}/whole.py:Rhymes")
    assert task.score("test", ["tea", "a hand"]) == [0.0, -1.0]
    task = load_user_task(f"{tmp_path}/each.py:Rhymes")
    assert [task.reward("test", n, text) for n, text in enumerate(["tea", "a hand"])] == [0.0, -1.0]
    assert len(task.prompts("train")) == 2
