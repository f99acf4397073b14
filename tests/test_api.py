"""shardes from Python: what it returns and raises, and what it leaves behind."""

import gc
import inspect
import json
import os
import re
import signal
import sys
import tempfile
import threading
import time
from pathlib import Path

import pytest
import torch.distributed as dist
from transformers import AutoModelForCausalLM, LlamaForCausalLM

import shardes
from launch import run
from shardes import launch
from shardes.trainer import Trainer


class Letters:
    def prompts(self, split):
        return ["abc", "a much longer prompt"] if split == "train" else ["hello", "you"]

    def score(self, split, responses):
        return [float(sum(map(ord, text)) % 97) for text in responses]

    def correct(self, split, responses):
        return [len(text) % 2 == 0 for text in responses]


class Rewards:
    prompts = Letters.prompts

    def reward(self, split, number, response):
        return 0.0


@pytest.fixture(autouse=True)
def nothing_is_left(monkeypatch):
    """Every call leaves this process as it was."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)

    def state():
        handlers = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)]
        threads = {t.name for t in threading.enumerate() if "ThreadPool" not in t.name}
        return handlers, dist.is_initialized(), "RANK" in os.environ, sys.excepthook, threads

    # A shell ignores SIGINT in what it starts in the background.
    ignored = signal.signal(signal.SIGINT, signal.default_int_handler)
    before = state()
    yield
    assert state() == before
    signal.signal(signal.SIGINT, ignored)


@pytest.fixture(scope="module")
def settings(uneven_llama, tmp_path_factory):
    """Settings of a run in a new directory."""

    def make(iterations: int = 2) -> dict:
        return {
            "model": {"path": uneven_llama, "dtype": "float32"},
            "es": {"population_size": 4, "sigma": 0.05, "alpha": 0.05, "iterations": iterations},
            "generation.max_new_tokens": 4,
            "run": {"dir": tmp_path_factory.mktemp("api") / "run", "timeout": 60},
        }

    return make


@pytest.fixture(scope="module")
def finished(settings):
    """A run of two iterations, with what its callback was given."""
    seen = []
    return shardes.train(settings(), task=Letters(), callback=seen.append), seen


def test_importing_is_quick():
    code = (
        "import sys, shardes; dir(shardes); shardes.load_run; "
        "print(*{'torch', 'transformers', 'deepspeed', 'numba'} & sys.modules.keys())"
    )
    done = run([sys.executable, "-c", code], seconds=60)
    assert (done.returncode, done.stdout.strip()) == (0, ""), done.stdout + done.stderr


def test_a_run_returns_what_its_directory_holds(finished):
    result, seen = finished
    assert [row["iteration"] for row in seen] == [0, 1]
    assert result.metrics == [json.loads(json.dumps(row)) for row in seen]
    assert result.summary["iterations"] == 2 and len(result.summary["digest"]) == 16
    assert {row["split"] for row in result.samples} == {"train", "test"}
    assert result.config.es.sigma == 0.05
    assert result == shardes.load_run(str(result.directory))
    assert re.fullmatch(r"Run\(\S+: 2 of 2 iterations, held-out \S+ → \S+\)", repr(result))
    assert AutoModelForCausalLM.from_pretrained(result.center).config.num_attention_heads == 9


def test_no_model_is_left_in_memory(finished):
    gc.collect()
    kept = [found for found in gc.get_objects() if type(found) is LlamaForCausalLM]
    assert not [model for model in kept if any(p.numel() for p in model.parameters())]


def test_a_run_goes_on_and_other_code_is_refused(finished, settings):
    longer = shardes.train(settings(3), task=Letters())
    again = dict(settings(3), run={"dir": str(settings()["run"]["dir"])})
    shardes.train(again, {"es.iterations": 1}, task=Letters())
    assert shardes.train(again, task=Letters()).summary["digest"] == longer.summary["digest"]
    assert longer.metrics[1]["reward_mean"] == finished[0].metrics[1]["reward_mean"]

    class Other(Letters):
        def score(self, split, responses):
            return [float(len(text)) for text in responses]

    with pytest.raises(shardes.ConfigError, match=r"task\.path: .* changed since the run"):
        shardes.train(again, {"es.iterations": 4}, task=Other())


def test_ranks_reach_the_same_center(finished, settings, tmp_path):
    (tmp_path / "task.py").write_text(inspect.getsource(Letters))
    seen = []
    keys = {"task.path": f"{tmp_path}/task.py:Letters", "sharding.tensor": 2}
    result = shardes.train(settings(), keys, gpus=2, callback=seen.append)
    assert result.metrics == [json.loads(json.dumps(row)) for row in seen] and len(seen) == 2
    assert result.summary["digest"] == finished[0].summary["digest"]


def test_a_run_outside_the_main_thread(finished, settings):
    results = []
    thread = threading.Thread(
        target=lambda: results.append(shardes.train(settings(), task=Letters()))
    )
    thread.start()
    thread.join()
    assert results[0].summary["digest"] == finished[0].summary["digest"]


def interrupt() -> None:
    os.kill(os.getpid(), signal.SIGINT)


class Interrupted(Letters):
    """A Ctrl-C reaches the run while it scores."""

    stops = 1

    def score(self, split, responses):
        if split == "train" and self.stops:
            self.stops -= 1
            interrupt()
            time.sleep(20)
        return super().score(split, responses)


@pytest.mark.parametrize("where", ["checks", "loading", "decoding", "scoring"])
def test_ctrl_c_stops_a_run_that_can_go_on(finished, settings, monkeypatch, where):
    once, callback, task = [None], None, Letters()
    if where == "checks":
        task.prompts = lambda split: (once and once.pop()) or interrupt() or time.sleep(20)
    elif where == "loading":
        load = launch.open_center

        def slow(*arguments):
            if once:
                once.pop()
                interrupt()
                time.sleep(20)
            return load(*arguments)

        monkeypatch.setattr(launch, "open_center", slow)
    elif where == "decoding":

        def callback(metrics):
            if metrics["iteration"] == 0:
                interrupt()
                time.sleep(1)
    else:
        task = Interrupted()
    again, started = settings(), time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        shardes.train(again, task=task, callback=callback)
    assert time.monotonic() - started < 15
    if where == "checks":
        task = Letters()
    result = shardes.train(again, task=task, callback=callback)
    if where != "scoring":  # its class has another source
        assert result.summary["digest"] == finished[0].summary["digest"]


def test_ctrl_c_in_the_last_moment_is_not_lost(settings, monkeypatch):
    finish = Trainer.finish
    monkeypatch.setattr(Trainer, "finish", lambda self: finish(self) or interrupt())
    with pytest.raises(KeyboardInterrupt, match="stopped as asked"):
        shardes.train(settings(), task=Letters())


def test_what_a_callback_raises_ends_the_run(settings):
    class Enough(Exception):
        pass

    def callback(metrics):
        raise Enough

    again = settings()
    with pytest.raises(Enough):
        shardes.train(again, task=Letters(), callback=callback)
    assert len(shardes.train(again, task=Letters()).metrics) == 2


@pytest.mark.parametrize(
    "overrides, arguments, message",
    [
        ({"es.sigm": 1}, {}, r"es.sigm: no such key; did you mean es.sigma"),
        ({"es.sigma": -1.0}, {}, r"es.sigma=-1.0: must be"),
        ({"es.sigma": object()}, {}, r"es.sigma=<object.*>: must be made of Python's numbers"),
        (["es.sigma=1"], {}, r"\['es.sigma=1'\]: must be a mapping of settings"),
        ({}, {"task": None}, r"task.name, task.path: neither is given"),
        ({"task.name": "countdown"}, {}, r"task.name=countdown: is not used with a task object"),
        ({}, {"task": Letters}, r"task=Letters: a class; pass an object, Letters\(\)"),
        ({}, {"task": Rewards()}, r"task=Rewards: has no score.*task.path=file.py:Rewards"),
        ({}, {"gpus": 2}, r"task=Letters: an object of this process.*task.path=FILE.py:CLASS"),
        ({}, {"gpus": 0}, r"gpus=0: must be a number of ranks, at least 1"),
        ({}, {"gpus": "2"}, r"gpus='2': must be a number of ranks"),
        ({}, {"callback": 3}, r"callback=3: must be a function of an iteration's metrics"),
        ({"sharding.tensor": 2}, {}, r"does not divide the 1 ranks"),
    ],
)
def test_mistakes_are_raised(settings, overrides, arguments, message):
    with pytest.raises(shardes.ConfigError, match=message):
        shardes.train(settings(), overrides, **({"task": Letters()} | arguments))


@pytest.mark.slow
def test_a_mistake_that_ranks_find_is_raised(settings, capfd):
    with pytest.raises(shardes.ConfigError, match=r"^sharding.shard=3 × sharding.tensor=1: does"):
        keys = {"task.name": "conciseness", "sharding.shard": 3}
        shardes.train(settings(), keys, gpus=2)
    assert "error" not in capfd.readouterr().err


def test_a_process_group_of_the_users_is_named(settings):
    hook = sys.excepthook  # torch replaces it
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        with pytest.raises(shardes.ConfigError, match=r"destroy_process_group\(\) first"):
            shardes.train(settings(), task=Letters())
    finally:
        dist.destroy_process_group()
        sys.excepthook = hook


def test_there_is_no_run(tmp_path):
    with pytest.raises(shardes.ConfigError, match="no run directory"):
        shardes.load_run(tmp_path)


def test_base_and_tuned_model_are_evaluated_side_by_side(finished, settings, tmp_path, capsys):
    options = dict(task=Letters(), splits=["train", "test"], samples=2)
    alone = [
        shardes.evaluate(settings(), model=model, **options)["splits"]
        for model in (finished[0].center, None)
    ]
    capsys.readouterr()
    out = tmp_path / "both.json"
    both = shardes.evaluate(settings(), model=finished[0].center, base=True, out=out, **options)
    assert both == json.loads(out.read_text())
    printed = capsys.readouterr().out
    assert "difference" in printed and "2 greedy" in printed and "4 sampled" in printed
    for split, report in both["splits"].items():
        tuned, base = (found[split] for found in alone)
        assert report["responses"] == tuned["responses"]
        assert report["base"]["responses"] == base["responses"]
        for kind in ("greedy", "sampled"):
            assert report[kind] == tuned[kind] and report["base"][kind] == base[kind]
            for key in ("reward", "accuracy"):
                gain = report["difference"][kind][key]
                assert gain == pytest.approx(tuned[kind][key] - base[kind][key])
                low, high = report["difference"][kind][f"{key}_interval"]
                assert low <= gain <= high
    assert not list(Path.cwd().glob("evaluation*.json"))
    for arguments, message in (
        (dict(base=True), r"--base: compares .* give that"),
        (dict(splits="test"), r"splits='test': must be a list of splits"),
        (dict(splits=[]), r"splits=\[\]: must be a list of splits"),
    ):
        with pytest.raises(shardes.ConfigError, match=message):
            shardes.evaluate(settings(), task=Letters(), **arguments)


def test_only_what_an_error_names_is_left_of_an_evaluation(settings, tmp_path, monkeypatch):
    class Fails(Letters):
        def score(self, split, responses):
            raise KeyError("answr")

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with pytest.raises(shardes.ConfigError, match=r"no such key"):
        shardes.evaluate(settings(), {"es.sigm": 1}, task=Letters())
    shardes.evaluate(settings(), task=Letters())
    assert not list(tmp_path.glob("shardes_*"))
    with pytest.raises(shardes.ConfigError, match="KeyError: 'answr'") as raised:
        shardes.evaluate(settings(), task=Fails())
    (left,) = tmp_path.glob("shardes_*/*")
    assert str(left) in str(raised.value) and len(json.loads(left.read_text())) == 2


def test_a_damaged_summary_is_named(tmp_path):
    (tmp_path / "config.yaml").write_text("run: {dir: x}\nmodel: {path: m}\n")
    (tmp_path / "summary.json").write_text("{")
    with pytest.raises(shardes.ConfigError, match=r"summary.json: damaged; start the run again"):
        shardes.load_run(tmp_path)


def test_a_plan_is_that_of_the_command(settings):
    found = shardes.plan(settings(), {"task.name": "conciseness"}, gpus=2, gpu="H100")
    assert found["configured"]["fits"] is True and found["best"]
    assert any("H100's data sheet" in note for note in found["notes"])
    for known, message in (
        ({}, "--gpu is missing"),
        ({"gpu_memory": 80}, "--gpu-memory 80: must be a size such as 80GB"),
    ):
        with pytest.raises(shardes.ConfigError, match=message):
            shardes.plan(settings(), {"task.name": "conciseness"}, **known)
