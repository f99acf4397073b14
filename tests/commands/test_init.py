"""The configs that come with the package: listed, and copied to start from."""

import pytest

from launch import ROOT, call
from shardes.commands import cli
from shardes.config.loading import load
from shardes.config.shipped import is_example, shipped_configs
from shardes.tasks import configured_task


def test_all_are_listed():
    done = call(cli.main, "configs")
    names = [line.split()[0] for line in done.stdout.splitlines()]
    files = {file for part in ("configs", "examples") for file in (ROOT / part).rglob("*.yaml")}
    assert done.returncode == 0 and names == list(shipped_configs())
    assert set(shipped_configs().values()) == files
    assert "facts        " in done.stdout and "A task from JSON lines" in done.stdout


@pytest.mark.parametrize("name", shipped_configs())
def test_a_copy_stands_alone(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = call(cli.main, "init", "mine/task", *([] if name == "facts" else [name]))
    assert done.returncode == 0, done.stderr
    # What it says is to be done next is there, and can be done.
    commands = [line.partition(":  ")[2] for line in done.stdout.splitlines() if ":  " in line]
    assert [command.split()[:3] for command in commands] == [
        ["shardes", "train", "mine/task/config.yaml"]
    ] * 2
    assert ("is not here yet; " in done.stdout) == (
        "path: models/" in shipped_configs()[name].read_text()
    )
    assert name != "facts" or "with reward.py, test.jsonl, train.jsonl" in done.stdout
    config = load("mine/task/config.yaml", [])
    source = shipped_configs()[name]
    assert config.run.dir == "runs/task"
    assert is_example(source) or config == load(str(source), [f"run.dir={config.run.dir}"])
    text = (tmp_path / "mine" / "task" / "config.yaml").read_text()
    assert "deepspeed --num_gpus" not in text and "examples/" not in text
    if is_example(source):
        assert configured_task(config.task).prompts("train")


def test_nothing_is_overwritten(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "reward.py").write_text("")
    for arguments, message in (
        (["mine"], "mine: exists and is not empty"),
        (["other", "fact"], "fact: no such config; did you mean facts?"),
        (["a: b"], "a: b: choose a path of letters"),
        (["@mine"], "@mine: choose a path of letters"),
    ):
        done = call(cli.main, "init", *arguments)
        assert done.returncode == 2 and done.stderr.startswith(f"error: {message}"), done.stderr
    assert not (tmp_path / "other").exists()
