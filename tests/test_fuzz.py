"""Whatever a config, a model's files or a task hold: exit code 0 or 2, one line, no traceback."""

import json
import os
import shutil
import string
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from launch import call
from shardes.commands import cli
from shardes.config.loading import load, to_yaml
from shardes.config.schema import SETTINGS
from shardes.errors import ConfigError

FEW = settings(derandomize=True, database=None, max_examples=40)
MANY = settings(database=None, max_examples=500)  # others in every run; 0.1 s each

TASK = """
import json
from pathlib import Path

class Task:
    def prompts(self, split):
        return json.loads(Path(__file__).with_name("prompts.json").read_text())
    def score(self, split, responses):
        return [0.0] * len(responses)
"""
PROMPTS = ["abc", [{"role": "user", "content": "defg"}]]

OVERRIDES = st.sampled_from(
    "*.mlp|Name: {x}: y|[a|{|]|inf|-inf|.nan|1e400|1e308|-1|0|9999999999999999999999|???|${x}|${|"
    "!!python/object:os.system x|2020-01-01|null||~|~/x|[1,2]|{a: b}|'|\"|&a *a|\0|\udc80|[???]|"
    "true|0x10|!!binary abc|? x|- a|%|@|[a: ]|[[a]]|[null]|{1: 2}|{a: null}|a\nb|#|(|a:1|"
    f"{'x' * 5000}".split("|")
) | st.text(string.printable, max_size=8)
KEYS = st.sampled_from(
    [*SETTINGS, "", "es", "es.", "es[0]", "es.sigma.x", "task.tests.x", "[", "resume"]
)
# Sizes for which transformers would build so many modules or such large buffers are left out.
JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.sampled_from([-1, 0, 7, 10**4, 1.5, -1e300, float("nan"), float("inf")])
    | st.sampled_from(["", "x", "../x", "/etc/passwd", "\ud800", "a\nb"]),
    lambda inner: (
        st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=2), inner, max_size=2)
    ),
    max_leaves=3,
)


@pytest.fixture(scope="module", autouse=True)
def workspace(tmp_path_factory) -> Iterator[Path]:
    """The working directory: config.yaml, own.py, and no variables of a launcher."""
    before, working_directory = dict(os.environ), Path.cwd()
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        os.environ.pop(name, None)
    directory = tmp_path_factory.mktemp("fuzz")
    os.chdir(directory)
    Path("own.py").write_text(TASK)
    Path("prompts.json").write_text(json.dumps(PROMPTS))
    config = {
        "model": {"path": "model", "dtype": "float32"},
        "generation": {"max_new_tokens": 4},
        "task": {"path": "own.py:Task"},
        "run": {"dir": "run"},
    }
    Path("config.yaml").write_text(yaml.safe_dump(config))
    yield directory
    os.chdir(working_directory)
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture(scope="module")
def model(biased_qwen, workspace) -> Path:
    """The model of config.yaml; its JSON files may be changed, and are restored by `reset`."""
    return biased_qwen


def reset(model: Path) -> Path:
    """Bring the JSON files in the directory "model" into their first state."""
    directory = Path("model")
    directory.mkdir(exist_ok=True)
    for changed in directory.glob("*.json"):
        changed.unlink()
    for file in model.iterdir():
        if not (directory / file.name).exists():
            shutil.copyfile(file, directory / file.name)
    return directory


def is_accepted_or_refused_in_one_line(*arguments: str) -> None:
    done = call(cli.main, "train", "config.yaml", "--dry-run", "--gpus", "1", *arguments)
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert (done.returncode, len(lines)) in ((0, 0), (2, 1)), done.stderr
    if done.returncode == 2:
        assert done.stderr.endswith(lines[0] + "\n") and not done.stdout


def check_override(key: str, value: str) -> None:
    try:
        to_yaml(load("config.yaml", [f"{key}={value}"]))
    except ConfigError as error:
        assert str(error)


@given(KEYS, OVERRIDES)
@settings(FEW, max_examples=150)
def test_values_of_settings(key, value):
    check_override(key, value)


@pytest.mark.slow
@pytest.mark.faults
@given(KEYS, OVERRIDES)
@MANY
def test_many_values_of_settings_in_a_dry_run(model, key, value):
    if not Path("model").exists():
        reset(model)
    is_accepted_or_refused_in_one_line(f"{key}={value}")


def places(value: Any, path: tuple = ()) -> list[tuple]:
    """The paths of all values within a JSON value; of long lists and mappings, of the first few."""
    items = list(value.items() if isinstance(value, dict) else enumerate(value))[:40]
    found = [path]
    for key, item in items:
        inner = isinstance(item, dict | list)
        found += places(item, (*path, key)) if inner else [(*path, key)]
    return found


def change_field(model: Path, data: st.DataObject) -> None:
    """Change one value of one of the model's JSON files, and start."""
    directory = reset(model)
    file = data.draw(st.sampled_from(sorted(Path(directory).glob("*.json"))))
    content = json.loads(file.read_text())
    path, value = data.draw(st.sampled_from(places(content))), data.draw(JSON)
    owner = content
    for key in path[:-1]:
        owner = owner[key]
    if not path:
        content = value
    elif isinstance(owner, dict) and data.draw(st.booleans()) and data.draw(st.booleans()):
        del owner[path[-1]]
    else:
        owner[path[-1]] = value
    file.write_text(json.dumps(content))
    is_accepted_or_refused_in_one_line()


@given(st.data())
@FEW
def test_fields_of_a_models_files(model, data):
    change_field(model, data)


@pytest.mark.slow
@pytest.mark.faults
@given(st.data())
@MANY
def test_many_fields_of_a_models_files(model, data):
    change_field(model, data)


def test_files_that_are_no_json_objects(model):
    for file in ("config.json", "tokenizer.json", "model.safetensors.index.json"):
        for content in (b"", b"{", b"[]", b"null", b"\xff", b"[" * 100_000):
            (reset(model) / file).write_bytes(content)
            is_accepted_or_refused_in_one_line()


def return_prompts(model: Path, value: Any) -> None:
    if not Path("model").exists():
        reset(model)
    Path("prompts.json").write_text(json.dumps(value))
    is_accepted_or_refused_in_one_line()
    Path("prompts.json").write_text(json.dumps(PROMPTS))


MESSAGES = st.fixed_dictionaries({}, optional={"role": JSON, "content": JSON, "tool_calls": JSON})


@given(JSON | st.lists(st.lists(MESSAGES | JSON, max_size=2) | JSON, max_size=2))
@settings(FEW, max_examples=30)
def test_prompts_of_a_task(model, value):
    return_prompts(reset(model), value)


@pytest.mark.slow
@pytest.mark.faults
@given(JSON | st.lists(st.lists(MESSAGES | JSON, max_size=2) | JSON, max_size=2))
@MANY
def test_many_prompts_of_a_task(model, value):
    return_prompts(model, value)
