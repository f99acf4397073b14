"""Nothing that is read is run: no pickle, no eval, no shell; a model's own code only where the user
asks for it.
"""

import ast
import json
from pathlib import Path

import pytest
import torch
from transformers import dynamic_module_utils

from launch import ROOT
from shardes import launch
from shardes.config.schema import Config
from shardes.distributed.world import Job
from shardes.engines import empty_model
from shardes.errors import ConfigError
from shardes.sharding.weight_files import WeightFiles
from shardes.storage.files import fingerprint

SOURCES = sorted(
    file for folder in ("shardes", "launchers", "tools") for file in (ROOT / folder).rglob("*.py")
)
MODULES = {
    "pickle",
    "_pickle",
    "cPickle",
    "dill",
    "cloudpickle",
    "joblib",
    "marshal",
    "shelve",
    "pty",
}
BUILTINS = {"eval", "exec", "compile", "__import__"}
CALLS = {
    "os.system", "os.popen", "numpy.load", "np.load", "yaml.load", "yaml.unsafe_load", "torch.save",
    "torch.hub.load", "subprocess.getoutput", "subprocess.getstatusoutput", "pd.read_pickle",
    "dist.send_object_list", "dist.broadcast_object_list", "dist.all_gather_object",
    "dist.gather_object", "dist.scatter_object_list",
}  # fmt: skip


def findings(source: str) -> list[str]:
    """What of a module's source could run what it reads, each with its line."""
    found = []
    for node in ast.walk(ast.parse(source)):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or ""]
            if node.module == "os":
                found += [
                    f"{node.lineno}: os.{a.name}" for a in node.names if f"os.{a.name}" in CALLS
                ]
        found += [
            f"{node.lineno}: import {name}" for name in names if name.split(".")[0] in MODULES
        ]
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
        if called in BUILTINS | CALLS:
            found.append(f"{node.lineno}: {called}()")
        if called == "torch.load" and keywords.get("weights_only") != "True":
            found.append(f"{node.lineno}: torch.load() without weights_only=True")
        found += [
            f"{node.lineno}: {key}={keywords[key]}"
            for key in ("shell", "trust_remote_code", "allow_pickle")
            if keywords.get(key) == "True"
        ]
    return found


@pytest.mark.parametrize("file", SOURCES, ids=lambda file: str(file.relative_to(ROOT)))
def test_no_source_runs_what_it_reads(file):
    assert findings(file.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from dill import loads",
        "eval(text)",
        "exec(text)",
        "import os\nos.system('ls')",
        "from os import system",
        "subprocess.run('ls', shell=True)",
        "torch.load(file)",
        "torch.load(file, weights_only=False)",
        "AutoModel.from_pretrained(path, trust_remote_code=True)",
        "np.load(file, allow_pickle=True)",
        "dist.all_gather_object(parts, mine)",
    ],
)
def test_what_is_looked_for_is_found(source):
    assert findings(source)


@pytest.mark.parametrize(
    "source", ["spec.loader.exec_module(module)", "torch.load(file, weights_only=True)"]
)
def test_what_is_harmless_is_not(source):
    assert findings(source) == []


CODE = """
from pathlib import Path
from transformers import LlamaConfig, LlamaForCausalLM

Path({witness!r}).touch()

class TheirConfig(LlamaConfig):
    model_type = "theirs"

class TheirModel(LlamaForCausalLM):
    config_class = TheirConfig
"""


@pytest.fixture
def witness(tmp_path):
    """A file that is there once the model's own code has run."""
    return tmp_path / "witness"


@pytest.fixture
def theirs(tied_llama, tmp_path, witness, monkeypatch) -> Path:
    """A model directory whose architecture is code that lies in it."""
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    directory = tmp_path / "theirs"
    directory.mkdir()
    for file in tied_llama.iterdir():
        (directory / file.name).write_bytes(file.read_bytes())
    (directory / "theirs.py").write_text(CODE.format(witness=str(witness)))
    config = json.loads((directory / "config.json").read_text())
    auto_map = {"AutoConfig": "theirs.TheirConfig", "AutoModelForCausalLM": "theirs.TheirModel"}
    config |= {"model_type": "theirs", "architectures": ["TheirModel"], "auto_map": auto_map}
    (directory / "config.json").write_text(json.dumps(config))
    return directory


def settings(directory: Path, trusted: bool) -> Config:
    config = Config()
    config.model.path, config.model.trust_remote_code = str(directory), trusted
    config.task.name = "conciseness"
    return config


def test_a_models_own_code_is_refused_in_one_line(theirs, witness):
    with pytest.raises(ConfigError) as error:
        launch.check(settings(theirs, trusted=False), Job(0, 1, None))
    assert not witness.exists()
    message = str(error.value)
    assert "\n" not in message
    assert str(theirs) in message and "model.trust_remote_code=true" in message


def test_a_models_own_code_runs_where_it_is_asked_for_and_is_said_loudly(theirs, witness, capsys):
    plan = launch.check(settings(theirs, trusted=True), Job(0, 1, None))
    assert witness.exists()
    assert type(plan.module).__name__ == "TheirModel"
    said = capsys.readouterr().err
    assert said.startswith("WARNING: model.trust_remote_code=true") and str(theirs) in said


def test_only_rank_0_says_so(theirs, capsys):
    launch.check(settings(theirs, trusted=True), Job(1, 2, None))
    assert "WARNING" not in capsys.readouterr().err


def test_no_code_runs_by_default(theirs, witness):
    with pytest.raises(ConfigError):
        empty_model(theirs, torch.float32)
    assert not witness.exists()


def test_code_is_part_of_what_a_model_is(theirs):
    before = fingerprint(WeightFiles(theirs))
    with open(theirs / "theirs.py", "a") as opened:
        opened.write("# changed\n")
    after = fingerprint(WeightFiles(theirs))
    assert [name for name in after if after[name] != before[name]] == ["theirs.py"]
