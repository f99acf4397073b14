"""A user's rule in place of the paper's: exact on any layout, after a kill, and in every replay."""

import importlib.util
import re
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import save_file

from launch import ROOT, call
from shardes.commands import export, journal
from shardes.config import loading
from shardes.errors import ConfigError
from shardes.es.rule import load_rule
from shardes.es.update import Update
from shardes.noise import gaussian
from shardes.sharding.regions import Region
from shardes.sharding.weight_files import WeightFiles
from shardes.storage.journal import read

DOCS = (ROOT / "docs" / "variants.md").read_text()
CODE, TEST = re.findall(r"^```python\n(.*?)^```", DOCS, re.MULTILINE | re.DOTALL)
TASK = """
class Letters:
    def prompts(self, split):
        return ["abc", "a longer prompt"] if split == "train" else ["hello"]
    def score(self, split, responses, which=None):
        return [float(sum(map(ord, text)) % 97) for text in responses]
"""


def test_the_test_of_the_docs_passes(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "my_update.py").write_text(CODE)
    (tmp_path / "test_my_update.py").write_text(TEST)
    spec = importlib.util.spec_from_file_location("own", tmp_path / "test_my_update.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.test_every_weight_moves_by_alpha()


def test_a_rule_is_its_formula_on_any_cut(tmp_path):
    (tmp_path / "my_update.py").write_text(CODE)
    rule = load_rule(f"{tmp_path}/my_update.py:SignMomentum")
    assert re.fullmatch(r"SignMomentum [0-9a-f]{16}", rule.name) and rule.buffers == 1
    save_file({"w": torch.zeros(1000)}, tmp_path / "model.safetensors")
    base, theta = WeightFiles(tmp_path), torch.randn(1000)
    updates = [
        Update([seed], [0.5], weight_decay=0.25, rule=rule.name, alpha=0.125) for seed in (5, 6)
    ]

    def after(begin: int, end: int) -> torch.Tensor:
        part, kept = theta[begin:end].clone(), [torch.zeros(end - begin)]
        for update in updates:
            regions = [Region.contiguous(begin, end - begin)]
            update.apply(part, "w", (1000,), regions, base, rule=rule, kept=kept)
        return part

    first, second = (0.5 * gaussian(seed, "w", 0, 1000) for seed in (5, 6))
    expected = 0.75 * theta + 0.125 * first.sign()
    momentum = torch.tensor(0.9) * first + second
    expected = 0.75 * expected + 0.125 * momentum.sign()
    whole = after(0, 1000)
    assert torch.allclose(whole, expected, atol=1e-6)
    pieces = [after(begin, min(begin + 77, 1000)) for begin in range(0, 1000, 77)]
    assert torch.equal(torch.cat(pieces), whole)
    for update, other in ((updates[0], None), (Update([5], [0.5]), rule)):
        with pytest.raises(ConfigError, match=r"the run's es.update is .*--update FILE:Class"):
            update.apply(theta, "w", (1000,), [Region.contiguous(0, 1000)], base, rule=other)


@pytest.mark.parametrize(
    "code, message",
    [
        ("def update(self, theta, step, alpha): return theta + step", "must change theta in place"),
        ("def update(self, theta, step, alpha): theta.add_(step - step.mean())", "other bits wher"),
        (
            "def update(self, theta, step, alpha): theta.add_(step.cumsum(0))",
            "other bits where the",
        ),
        (
            "n = 0\n    def update(self, theta, step, alpha): self.n += 1; theta.mul_(self.n)",
            "other bits where theta is cut",
        ),
        ("def update(self, theta, step, alpha): theta.resize_(0)", "finite and of their sizes"),
        ("def update(self, theta, step, alpha): theta.log_()", "finite and of their sizes"),
        ("def update(self, theta, step): pass", "update raised TypeError"),
        ("buffers = 2\n    def update(self, theta, step, alpha, a): pass", "raised TypeError"),
        ("buffers = '1'\n    def update(self, *all): pass", "buffers is '1', not a number"),
        ("def __init__(self, beta): pass", r"Own\(\) raised TypeError"),
        ("pass", "Own has no update"),
    ],
)
def test_rules_that_are_refused(tmp_path, code, message):
    (tmp_path / "own.py").write_text(f"class Own:\n    {code}\n")
    with pytest.raises(ConfigError, match=f"es.update=.*own.py:Own: .*{message}"):
        load_rule(f"{tmp_path}/own.py:Own")


def test_a_rule_needs_the_exact_center():
    with pytest.raises(ConfigError, match=r"es.update=a.py:B: is for es.restore=copy"):
        keys = ["model.path=m", "run.dir=r", "es.update=a.py:B", "es.restore=subtract"]
        loading.load(None, keys)


@pytest.fixture(scope="module")
def runs(zygote, uneven_llama, tmp_path_factory) -> dict[str, Path]:
    """Run directories of one run: undisturbed, and killed and resumed on another layout."""
    home = tmp_path_factory.mktemp("rules")
    (home / "task.py").write_text(TASK)
    (home / "my_update.py").write_text(CODE)
    directories = {}
    for name, faults in (("one", {}), ("killed", {"kill_in_append": ["reward", 15]})):
        settings = {
            "model": {"path": str(uneven_llama), "dtype": "float32"},
            "es": {
                "population_size": 4,
                "sigma": 0.05,
                "alpha": 0.001,
                "iterations": 4,
                "update": f"{home}/my_update.py:SignMomentum",
            },
            "generation": {"max_new_tokens": 6},
            "task": {"path": f"{home}/task.py:Letters"},
            "checkpoint": {"every": 2, "keep": 1},
            "run": {"dir": str(home / name), "timeout": 60},
        }
        file = home / f"{name}.yaml"
        file.write_text(yaml.safe_dump(settings))
        started = zygote.start(str(file), ranks=1, log=home / f"{name}.log", **faults)
        if faults:
            assert started.wait() != [0]
            log = home / "resumed.log"
            started = zygote.start(str(file), "sharding.shard=2", ranks=2, log=log)
        assert {*started.wait()} == {0}, started.text()
        directories[name] = home / name
    return directories


def test_a_rule_that_keeps_values_is_exact_on_another_layout_and_after_a_kill(runs):
    one, killed = (read(directory / "journal.jsonl") for directory in runs.values())
    assert killed.records == one.records and len(one.records) == 4
    assert killed.finish.digest == one.finish.digest
    assert {record.rule.partition(" ")[0] for record in one.records} == {"SignMomentum"}
    # It was rebuilt from the base model, although there was a snapshot.
    text = (runs["killed"].parent / "resumed.log").read_text()
    assert "the base model and 3 iterations replayed" in text
    deltas = {
        round(abs(value) / 0.001) for value in moved(runs["one"], killed.header.model).tolist()
    }
    assert deltas <= {0, 1, 2, 3, 4} and len(deltas) > 2


def moved(directory: Path, base: str) -> torch.Tensor:
    """How far the final center's embedding is from the base model's."""
    name, values = "model.embed_tokens.weight", []
    for files in (WeightFiles(directory / "snapshots" / "iteration_4"), WeightFiles(Path(base))):
        regions = [Region.contiguous(0, 1000)]
        values.append(torch.empty(1000))
        files.read(name, regions, values[-1])
    return values[0] - values[1]


def test_only_the_runs_own_code_replays_it(runs, tmp_path):
    run, code = runs["one"], runs["one"].parent / "my_update.py"
    other = tmp_path / "my_update.py"
    other.write_text(CODE.replace("0.9", "0.8"))
    option = ("--update", f"{code}:SignMomentum")
    assert call(journal.main, run, "verify", *option).returncode == 0
    for arguments in ((), ("--update", f"{other}:SignMomentum")):
        done = call(journal.main, run, "verify", *arguments)
        assert done.returncode == 2 and "the run's es.update is SignMomentum" in done.stderr
        early = call(export.main, run, tmp_path / "early", "--iteration", "3", *arguments)
        assert early.returncode == 2 and "the run's es.update is" in early.stderr
    # Its digest is compared with the journal's.
    early = call(export.main, run, tmp_path / "early", "--iteration", "3", *option)
    assert early.returncode == 0, early.stderr
    newest = call(export.main, run, tmp_path / "newest", "--dtype", "float32")
    assert newest.returncode == 0, newest.stderr


def test_a_run_is_not_resumed_with_another_rule(runs, zygote, tmp_path):
    home = runs["one"].parent
    (home / "other.py").write_text(CODE)
    resume = [str(home / "one.yaml"), "es.iterations=5"]
    for keys, message in (
        ([f"es.update={home}/other.py:SignMomentum"], "es.update cannot change within a run"),
        (["resume.allow_changes=[es.update]"], "es.update cannot change within a run"),
    ):
        started = zygote.start(*resume, *keys, ranks=1, log=tmp_path / "log")
        assert started.wait() == [2] and message in started.text(), started.text()
    code = home / "my_update.py"
    try:
        code.write_text(CODE.replace("0.9", "0.8"))
        started = zygote.start(*resume, ranks=1, log=tmp_path / "log")
        assert started.wait() == [2]
        assert "es.update: its file changed since the run in" in started.text()
    finally:
        code.write_text(CODE)
