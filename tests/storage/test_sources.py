"""Code, data, prompts and the date that a run began with are those that it goes on with."""

import json
import sys
import time
from datetime import datetime
from pathlib import Path

import pytest
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from launch import call
from models import save_model
from shardes.commands import train
from shardes.config.schema import TaskConfig
from shardes.distributed.world import Job
from shardes.errors import ConfigError
from shardes.inference.prompts import with_date
from shardes.replicas.joining import _compare
from shardes.storage.journal import FORMAT, Header, Record, read
from shardes.storage.sources import run_sources

TASK = """
from helper import worth

class Letters:
    def prompts(self, split):
        return ["abc", "x"] if split == "train" else ["hello"]
    def score(self, split, responses, which=None):
        return [worth(text) for text in responses]
"""
REWARD = "def score(response, example):\n    return float(len(set(response)))\n"
DATED = (
    "{% for m in messages %}{{ m['content'] }}{% endfor %}{{ strftime_now('%d %b %Y %H:%M:%S') }}"
)


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """A working directory with a task, a module that it imports, a reward and data."""
    monkeypatch.chdir(tmp_path)
    sys.modules.pop("helper", None)  # another test's
    Path("task.py").write_text(TASK)
    Path("helper.py").write_text("def worth(text):\n    return float(sum(map(ord, text)) % 97)\n")
    Path("reward.py").write_text(REWARD)
    Path("train.jsonl").write_text('{"prompt": "abc"}\n{"prompt": "x"}\n')
    Path("test.jsonl").write_text('{"prompt": "hello"}\n')
    return tmp_path


def dry_run(model: Path, task: dict, *overrides: str):
    """What a start would say of the run directory."""
    settings = {
        "model": {"path": str(model), "dtype": "float32"},
        "es": {"population_size": 2, "iterations": 2},
        "generation": {"max_new_tokens": 2},
        "task": task,
        "run": {"dir": "run"},
    }
    Path("config.yaml").write_text(yaml.safe_dump(settings))
    return call(lambda argv: train.dry_run(argv, 1), "config.yaml", *overrides)


def begin(model: Path, task: dict, *overrides: str):
    """Begin a run, and record an iteration of it."""
    assert dry_run(model, task).returncode == 0
    prepared = train.prepare(["config.yaml", *overrides], Job(0, 1, None))
    run = prepared.run
    run.begin()
    run.journal.append(Record(0, [1, 2], [0.0, 1.0], [-0.1, 0.1], 0.001, 0.0005, f"{7:016x}"))
    run.close()
    return run


CODE = {"path": "task.py:Letters"}
DATA = {
    "name": "jsonl",
    "train": "train.jsonl",
    "test": "test.jsonl",
    "reward": "reward.py:score",
    "chat": False,
}


@pytest.mark.parametrize(
    "task, file, text, key",
    [
        (CODE, "task.py", TASK + "\n", "task.path"),
        (CODE, "helper.py", "def worth(text):\n    return -1.0\n", "task.path"),
        (DATA, "reward.py", REWARD.replace("float", "-float"), "task.reward"),
        (DATA, "train.jsonl", '{"prompt": "abc", "answer": 1}\n{"prompt": "x"}\n', "task.train"),
        (DATA, "train.jsonl", '{"prompt": "x"}\n{"prompt": "abc"}\n', "task.train"),
    ],
    ids=["task", "module of the task", "reward", "data", "order of the data"],
)
def test_a_run_is_not_resumed_with_other_code_or_data(folder, tied_llama, task, file, text, key):
    run = begin(tied_llama, task)
    assert run.sources == read(folder / "run" / "journal.jsonl").sources
    assert dry_run(tied_llama, task).returncode == 0
    Path(file).write_text(text)
    sys.modules.pop("helper", None)
    done = dry_run(tied_llama, task)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert key in done.stderr and f"list {key} in resume.allow_changes" in done.stderr
    done = dry_run(tied_llama, task, f"resume.allow_changes=[{key}]")
    assert done.returncode == 0, done.stderr


def test_another_held_out_file_is_only_noted(folder, tied_llama):
    begin(tied_llama, DATA)
    Path("test.jsonl").write_text('{"prompt": "you"}\n')
    assert dry_run(tied_llama, DATA).returncode == 0


def test_a_journal_has_sources_and_a_date(folder, tied_llama):
    begin(tied_llama, CODE)
    history = read(folder / "run" / "journal.jsonl")
    assert history.header.format == FORMAT == 2 and history.date
    assert {"task.path", "task.path/helper.py", "task.prompts/train"} <= set(history.sources)


def test_the_prompts_count_in_their_order(folder, tied_llama):
    one = run_sources_of([[1, 2], [3]])
    assert one == run_sources_of([[1, 2], [3]]) != run_sources_of([[3], [1, 2]])


def run_sources_of(prompts: list[list[int]]) -> dict[str, str]:
    return run_sources(TaskConfig(name="conciseness"), {"train": prompts})


def test_a_chat_template_shows_the_date_of_the_first_start(folder, tied_llama, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(tied_llama)
    tokenizer.chat_template = DATED
    model = AutoModelForCausalLM.from_pretrained(tied_llama)
    dated = save_model(tmp_path / "dated", model, tokenizer)
    task = DATA | {"chat": True}
    begin(dated, task)
    journal = folder / "run" / "journal.jsonl"
    date = read(journal).date
    lines = journal.read_text().splitlines()
    assert json.loads(lines[0])["date"] == date
    time.sleep(1.1)  # the template shows seconds
    assert dry_run(dated, task).returncode == 0  # the prompts' token ids are the journal's
    later = train.prepare(["config.yaml", "run.dir=another"], Job(0, 1, None))
    later.run.begin()
    later.run.close()
    assert later.sources["task.prompts/train"] != read(journal).sources["task.prompts/train"]


def test_a_date_that_a_template_computes_is_refused():
    date = datetime(2026, 1, 2)
    template = "{% if strftime_now is defined %}{{ strftime_now('%Y') }}{% endif %}"
    assert with_date(template, date) == template.replace("strftime_now('%Y')", '"2026"')
    with pytest.raises(ConfigError, match="chat template shows the date"):
        with_date("{{ strftime_now(form) }}", date)


def test_a_replica_with_other_data_cannot_join():
    run = Header("model", {}, {}, sources={"task.train": "a" * 64})
    _compare(run, Header("model", {}, {}, sources={"task.train": "a" * 64}))
    with pytest.raises(ConfigError, match=r"task\.train: its file \(SHA-256 b+, not a+\) differs"):
        _compare(run, Header("model", {}, {}, sources={"task.train": "b" * 64}))
