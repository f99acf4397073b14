"""Settings are typed and checked; an error message names the key and the most similar one."""

import re

import pytest

from launch import ROOT
from shardes.config import loading
from shardes.config.schema import SETTINGS, DType, Gather
from shardes.errors import ConfigError
from shardes.tasks import load_task

MINIMAL = "model: {path: m}\nrun: {dir: r}\n"


@pytest.fixture
def load(tmp_path):
    def load(text: str = MINIMAL, *overrides: str):
        file = tmp_path / "config.yaml"
        file.write_text(text)
        return loading.load(str(file), list(overrides))

    return load


def test_defaults_are_the_papers(load):
    es = load().es
    assert (es.population_size, es.sigma, es.alpha, es.iterations) == (30, 0.001, 0.0005, 500)


def test_overrides_win_and_are_typed(load):
    config = load(
        MINIMAL,
        "model.dtype=float16",
        "sharding.gather=layer",
        "es.sigma=1e-2",
        "generation.stop=[a,b]",
    )
    assert config.model.dtype is DType.float16
    assert config.sharding.gather is Gather.layer
    assert config.es.sigma == 0.01
    assert config.generation.stop == ["a", "b"]


def test_written_settings_load_as_the_same(load, tmp_path):
    config = load(MINIMAL, "es.seed=5", "generation.stop=[x]")
    (tmp_path / "again.yaml").write_text(loading.to_yaml(config))
    assert loading.load(str(tmp_path / "again.yaml"), []) == config


@pytest.mark.parametrize(
    "override, expected",
    [
        ("es.sigm=1", ["es.sigm", "es.sigma"]),
        ("sharding.tensors=2", ["sharding.tensors", "sharding.tensor"]),
        ("modle.path=x", ["modle", "model.path"]),
        ("es.sigma=abc", ["es.sigma", "abc"]),
        ("es.population_size=2.5", ["es.population_size", "2.5"]),
        ("model.dtype=int8", ["model.dtype", "int8"]),
        ("es.restore=undo", ["es.restore", "undo"]),
        ("es.sigma=0", ["es.sigma=0", "positive"]),
        ("es.sigma=-1", ["es.sigma=-1"]),
        ("es.alpha=-1", ["es.alpha=-1"]),
        ("es.population_size=1", ["es.population_size=1", "at least 2"]),
        ("es.iterations=0", ["es.iterations=0"]),
        ("es.rank=0", ["es.rank=0", "at least 1"]),
        ("es.noise=sparse", ["es.noise", "low_rank"]),
        ("sharding.shard=0", ["sharding.shard=0"]),
        ("sharding.tensor=0", ["sharding.tensor=0"]),
        ("sharding.replicas=0", ["sharding.replicas=0"]),
        ("generation.max_new_tokens=0", ["generation.max_new_tokens=0"]),
        ("generation.stop=['']", ["generation.stop"]),
        ("eval.every=-1", ["eval.every=-1"]),
        ("run.timeout=0", ["run.timeout=0"]),
        ("nonsense", ["nonsense", "key=value"]),
    ],
)
def test_mistakes_are_named(load, override, expected):
    with pytest.raises(ConfigError) as error:
        load(MINIMAL, override)
    message = str(error.value)
    assert "\n" not in message
    for part in expected:
        assert part in message


@pytest.mark.parametrize(
    "text, expected",
    [
        ("run: {dir: r}", "model.path"),
        ("model: {path: m}", "run.dir"),
        ("model: [unclosed", "config.yaml"),
        ("- a list", "config.yaml"),
    ],
)
def test_files_that_lack_required_settings_or_are_malformed(load, text, expected):
    with pytest.raises(ConfigError, match=expected):
        load(text)


def test_a_missing_file():
    with pytest.raises(ConfigError, match=r"absent\.yaml"):
        loading.load("absent.yaml", [])


@pytest.mark.parametrize(
    "overrides, world, replicas",
    [
        ([], 1, 1),
        ([], 4, 4),
        (["sharding.shard=2"], 4, 2),
        (["sharding.shard=2", "sharding.tensor=2"], 4, 1),
        (["sharding.replicas=2", "sharding.tensor=2"], 4, 2),
    ],
)
def test_layouts_that_fit(load, overrides, world, replicas):
    assert loading.check_layout(load(MINIMAL, *overrides), world) == replicas


@pytest.mark.parametrize(
    "overrides, world, expected",
    [
        (["sharding.shard=2"], 3, "sharding.shard=2"),
        (["sharding.tensor=4"], 2, "sharding.tensor=4"),
        (["sharding.replicas=2"], 3, "sharding.replicas=2"),
    ],
)
def test_layouts_that_do_not_fit(load, overrides, world, expected):
    with pytest.raises(ConfigError, match=expected) as error:
        loading.check_layout(load(MINIMAL, *overrides), world)
    assert str(world) in str(error.value)


@pytest.mark.parametrize(
    "overrides",
    [
        ["resume=never", "resume.allow_changes=[es.sigma]"],
        ["resume.allow_changes=[es.sigma]", "resume=never"],
    ],
)
def test_resume_has_a_short_form(tmp_path, overrides):
    file = tmp_path / "config.yaml"
    file.write_text("model: {path: x}\nrun: {dir: y}\nresume: /a/run\n")
    assert loading.load(str(file), []).resume.source == "/a/run"
    resume = loading.load(str(file), overrides).resume
    assert (resume.source, resume.allow_changes) == ("never", ["es.sigma"])


@pytest.mark.parametrize(
    "file", sorted((ROOT / "configs").rglob("*.yaml")), ids=lambda file: file.stem
)
def test_the_shipped_configs_are_valid(file):
    config = loading.load(str(file), [])
    load_task(config.task.name, config.task.path)


def test_the_configs_of_the_papers_models_differ_only_in_model_and_layout():
    files = sorted((ROOT / "configs" / "countdown").glob("*.yaml"))
    assert len(files) == 9
    configs = [loading.load(str(file), []) for file in files]
    assert len({config.model.path for config in configs}) == 9
    same = {str((c.es, c.generation, c.task, c.eval, c.checkpoint, c.model.dtype)) for c in configs}
    assert len(same) == 1


@pytest.mark.parametrize(
    "override, message",
    [
        ("es.evolve='('", "es.evolve=(: must be a regular expression"),
        ("es.weight_decay=1", "es.weight_decay=1.0: must be at least 0 and below 1"),
        ("es.sigma_final=0", "es.sigma_final=0.0: must be positive"),
        ("task.prompts_per_iteration=0", "task.prompts_per_iteration=0: must be at least 1"),
        ("es.fitness=rank", "es.fitness"),
        ("task.workers=0", "task.workers=0: must be at least 1"),
        ("task.timeout=0", "task.timeout=0.0: must be positive"),
        ("task.memory=-1", "task.memory=-1.0: must be positive"),
        ("task.on_error=skip", "task.on_error=skip: must be fail, or the reward"),
        ("task.on_error=nan", "task.on_error=nan: must be fail, or the reward"),
    ],
)
def test_values_out_of_range_are_refused(tmp_path, override, message):
    file = tmp_path / "config.yaml"
    file.write_text("model: {path: x}\nrun: {dir: y}\n")
    with pytest.raises(ConfigError, match=re.escape(message)):
        loading.load(str(file), [override])


def test_antithetic_members_need_an_even_population(tmp_path):
    file = tmp_path / "config.yaml"
    file.write_text("model: {path: x}\nrun: {dir: y}\nes: {population_size: 5, antithetic: true}\n")
    with pytest.raises(ConfigError, match="must be even"):
        loading.load(str(file), [])


def test_a_leading_tilde_is_the_home_directory(load, monkeypatch):
    monkeypatch.setenv("HOME", "/home/of/mine")
    config = load(
        "model: {path: ~/m}\nrun: {dir: ~/r}\nresume: ~/other\n",
        "task.train=~/train.jsonl",
        "task.tests.more=~/more.jsonl",
        "tracking.loggers=[tensorboard, ~/logger.py:Class]",
        "task.template=~/no path",
    )
    assert config.model.path == "/home/of/mine/m" and config.run.dir == "/home/of/mine/r"
    assert config.resume.source == "/home/of/mine/other"
    assert config.task.train == "/home/of/mine/train.jsonl"
    assert config.task.tests == {"more": "/home/of/mine/more.jsonl"}
    assert config.tracking.loggers == ["tensorboard", "/home/of/mine/logger.py:Class"]
    assert config.task.template == "~/no path"


@pytest.mark.parametrize("value", [".inf", "-.inf", ".nan", "1e300", "-9999999999", "9" * 30])
def test_no_number_is_infinite_or_huge(load, value):
    for key, setting in SETTINGS.items():
        if isinstance(setting.default, int | float) and not isinstance(setting.default, bool):
            with pytest.raises(ConfigError, match=rf"^{re.escape(key)}"):
                load(MINIMAL, f"{key}={value}")
