"""engine=vllm: the center of the other engines to the bit, and their greedy tokens in float32.

They need vLLM, in an environment that tools/vllm_environment.sh makes:
`pytest -m vllm tests/engines/test_vllm.py`.
"""

import json
import os
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from launch import ROOT, run, torchrun
from models import save_model
from vllm_models import MODELS, OF_TRANSFORMERS

pytestmark = pytest.mark.vllm
LAYER = "model.layers.0.mlp.down_proj"  # of Llama


def saved(name, directory):
    torch.manual_seed(1)
    model = (MODELS | OF_TRANSFORMERS)[name]()
    for key, param in model.named_parameters():
        if key.endswith("bias"):
            nn.init.normal_(param, std=0.3)
        elif key.endswith("embed_tokens.weight") and name == "gemma2":
            nn.init.normal_(param, std=0.02)  # a large one would make it repeat the prompt
    save_model(directory, model)
    if name == "mistral":
        add_foreign(directory)
    return directory


def add_foreign(directory):
    """What vLLM would take for another format and another kind of model, and a value head."""
    weights = load_file(directory / "model.safetensors")
    save_file(weights, directory / "consolidated.safetensors")
    head = {"v_head.weight": torch.ones(1, 128)}
    save_file(weights | head, directory / "model.safetensors", {"format": "pt"})
    params = dict(dim=128, n_layers=2, head_dim=32, hidden_dim=50, n_heads=4, n_kv_heads=2)
    params |= dict(norm_eps=1e-6, vocab_size=263, rope_theta=1e4)
    (directory / "params.json").write_text(json.dumps(params))
    parts = [("", "Transformer"), ("1_Pooling", "Pooling")]
    modules = [
        dict(idx=i, name=str(i), path=path, type=f"sentence_transformers.models.{kind}")
        for i, (path, kind) in enumerate(parts)
    ]
    (directory / "modules.json").write_text(json.dumps(modules))
    (directory / "1_Pooling").mkdir()
    pooling = dict(word_embedding_dimension=128, pooling_mode_lasttoken=True)
    (directory / "1_Pooling" / "config.json").write_text(json.dumps(pooling))


@pytest.fixture(scope="module")
def directories(request, tmp_path_factory):
    """Of the models that are tested, in the order of `MODELS`, and those of `OF_TRANSFORMERS`."""
    specs = [item.callspec.params for item in request.session.items if hasattr(item, "callspec")]
    tested = {spec.get("model") for spec in specs}
    folder = tmp_path_factory.mktemp("models")
    return [saved(name, folder / name) for name in MODELS | OF_TRANSFORMERS if name in tested]


def started(directories, replicas, tensor) -> list[dict]:
    """What each rank reports of the models."""
    pytest.importorskip("vllm", reason="no vLLM: tools/vllm_environment.sh")
    worker = ("vllm_engine.py", str(replicas), str(tensor))
    chosen = [str(directory) for directory in directories if directory.name in MODELS]
    return torchrun(replicas * tensor, *worker, *chosen, seconds=900)


@pytest.fixture(scope="module")
def alone(directories):
    return started(directories, 1, 1)[0]


SAME = ["base", "names", "tokens", "member tokens", "updated", "updated tokens", "stopped"]


@pytest.mark.parametrize("key", [*SAME, "numel"])
@pytest.mark.parametrize("model", MODELS)
def test_what_the_other_engines_give(alone, model, key):
    results = alone[model]
    assert results["vllm"][key] == results["fsdp"][key]


@pytest.mark.parametrize("model", MODELS)
def test_members_leave_nothing_behind(alone, model):
    mine = alone[model]["vllm"]
    assert mine["restored"] and mine["tokens again"] == mine["tokens"] != mine["member tokens"]


@pytest.mark.parametrize("model", MODELS)
def test_log_probabilities(alone, model):
    mine, theirs = (alone[model][name]["log_probs"] for name in ("vllm", "fsdp"))
    assert [len(row) for row in mine] == [len(row) for row in theirs]
    for row, expected in zip(mine, theirs, strict=True):
        assert row == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("model", ["llama"])
def test_a_layer_that_computes_with_a_copy_is_named(alone, model):
    assert f"what is written to {LAYER}.weight" in alone[model]["blind"]


@pytest.mark.parametrize("model", MODELS)
def test_seeds_stops_and_invalid_logits(alone, model):
    results = alone[model]
    assert results["sampled"] == results["sampled again"] and results["halted"]
    if model == "llama":
        assert results["sampled"] != results["vllm"]["updated tokens"]
    assert results["invalid"] == [[]] * 4


@pytest.mark.parametrize("model", ["llama"])
def test_nothing_is_told_to_others(alone, model):
    assert not alone[model]["tells"]


@pytest.mark.parametrize("model", ["llama"])
def test_what_vllm_cannot_run_is_named(alone, model):
    no_block, no_context, mamba, device = alone[model]["refused"]
    assert "llama: raise vllm.cache_size: ValueError: " in no_block
    assert "raise vllm.cache_size or lower vllm.max_model_len: ValueError: " in no_context
    assert mamba.endswith("weights of backbone.layers.0.mixer.A; use another engine")
    assert device.startswith("engine=vllm: vLLM 0") and "and the run on cuda; install" in device


@pytest.fixture(
    scope="module", params=[(1, 2), pytest.param((2, 2), marks=pytest.mark.slow)], ids=str
)
def split(request, directories):
    """The results of ranks that hold slices: replicas, tensor."""
    return started(directories, *request.param)


@pytest.mark.parametrize("model", MODELS)
def test_tensor_parallel_ranks_give_the_same(alone, split, model):
    one_rank, one = alone[model], alone[model]["vllm"]
    for rank in split:
        results = rank[model]
        assert {key: results["vllm"][key] for key in SAME} == {key: one[key] for key in SAME}
        assert results["sampled"] == one_rank["sampled"]
        assert results["vllm"]["restored"] and results["halted"]
        for row, expected in zip(results["vllm"]["log_probs"], one["log_probs"], strict=True):
            assert row == pytest.approx(expected, abs=1e-4)
    first = split[:2]
    assert sum(rank[model]["vllm"]["numel"] for rank in first) == one["numel"]


REFUSED = {
    "gemma2": "lm_head, for which vLLM has no adapter; set es.mem",
    "arcee": "model.embed_tokens, for which vLLM has no adapter of its own for each request; set",
}
SHARED = ("llama", "qwen2", "phi3", *REFUSED)


@pytest.fixture(scope="module", params=[(1, 2), pytest.param((2, 1), marks=pytest.mark.slow)])
def together(request, directories):
    """What low-rank members answer side by side; tensor, rank of the noise."""
    pytest.importorskip("vllm", reason="no vLLM: tools/vllm_environment.sh")
    chosen = [str(directory) for directory in directories if directory.name in SHARED]
    tensor, rank = request.param
    return torchrun(tensor, "vllm_members.py", str(tensor), str(rank), *chosen, seconds=900)


@pytest.mark.parametrize("model", [name for name in SHARED if name not in REFUSED])
def test_members_answer_side_by_side_as_alone(together, alone, model):
    for rank in together:
        results = rank[model]
        assert results["side by side"] == results["alone"]
        first, second, third = results["alone"]
        assert first != second != third and results["base"] not in results["alone"]
        assert results["digest"] == alone[model]["vllm"]["base"]


@pytest.mark.parametrize("model", REFUSED)
def test_a_matrix_without_adapters_is_named(together, model):
    for rank in together:
        assert f"cannot share {REFUSED[model]}" in rank[model]


@pytest.fixture(scope="module")
def real():
    """SmolLM2 on both engines; see workers/vllm_real.py."""
    pytest.importorskip("vllm", reason="no vLLM: tools/vllm_environment.sh")
    done = run([sys.executable, "-m", "shardes.commands.cli", "get-smollm2"], seconds=300)
    assert done.returncode == 0, done.stdout + done.stderr
    directory = ROOT / "models" / "SmolLM2-135M-Instruct"
    return torchrun(1, "vllm_real.py", str(directory), seconds=900)[0]


@pytest.mark.model
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_center_of_a_real_model(real, dtype):
    mine, theirs = real[dtype]["vllm"], real[dtype]["fsdp"]
    assert [mine["base"], mine["updated"]] == [theirs["base"], theirs["updated"]]


@pytest.mark.model
def test_greedy_answers_of_a_real_model(real, record_property):
    """In float32 an answer may differ where rounding decides between two tokens."""
    mine, theirs = real["float32"]["vllm"], real["float32"]["fsdp"]
    same = [a == b for a, b in zip(mine["responses"], theirs["responses"], strict=True)]
    record_property("answers of 32 that are the same", sum(same))
    assert sum(same) >= 30 and all(abs(value) < 1e-3 for value in real["float32"]["lost"])
    assert sum(a == b for a, b in zip(mine["member"], theirs["member"], strict=True)) >= 30
    assert mine["member"] != mine["responses"]


@pytest.mark.model
def test_a_real_model_in_16_bits(real):
    """Kernels round differently, so answers part; where they do, both tokens are as probable."""
    assert all(map(len, real["bfloat16"]["vllm"]["responses"]))
    assert all(abs(value) < 0.5 for value in real["bfloat16"]["lost"])


def small_run(directory) -> dict:
    return {
        "model.path": str(directory),
        "model.dtype": "float32",
        "task.name": "conciseness",
        "es.population_size": 4,
        "es.sigma": 0.01,
        "es.alpha": 0.01,
        "generation.max_new_tokens": 6,
        "tracking.loggers": [],
        "vllm.enforce_eager": True,
        "vllm.cache_size": 0.05,
    }


def test_runs_of_one_process(tmp_path):
    """Whatever became of a run, the next one begins as the first, and its memory is free."""
    pytest.importorskip("vllm", reason="no vLLM: tools/vllm_environment.sh")
    settings = small_run(saved("llama", tmp_path / "model"))
    settings |= {"es.iterations": 1, "es.noise": "low_rank"}
    worker = ROOT / "tests" / "workers" / "vllm_runs.py"
    command = [sys.executable, str(worker), json.dumps(settings), str(tmp_path)]
    done = run(command, PYTHONPATH=str(ROOT))
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr[-3000:]
    results = json.loads(done.stdout.splitlines()[-1])
    first, refused, *others = results["digests"]
    assert "raise vllm.cache_size" in refused and others == [first, first]
    assert results["left"] == [0, False]
    assert results["sampled"] == [True, True]  # of low-rank settings, without members


def test_a_killed_run_goes_on_with_another_engine(tmp_path):
    pytest.importorskip("vllm", reason="no vLLM: tools/vllm_environment.sh")
    directory = saved("llama", tmp_path / "model")
    (tmp_path / "empty.yaml").write_text("{}\n")
    settings = [f"{key}={value}" for key, value in small_run(directory).items()]
    settings += ["checkpoint.every=2"]

    config = str(tmp_path / "empty.yaml")

    def shardes(*arguments: str) -> list[str]:
        start = "import sys; from shardes.commands.cli import command; sys.exit(command())"
        return [sys.executable, "-c", start, *arguments]

    def training(folder: str, engine: str, iterations: int) -> list[str]:
        layout = [f"engine={engine}", f"es.iterations={iterations}", f"run.dir={tmp_path / folder}"]
        return shardes("train", config, *settings, *layout)

    def finished(command: list[str]) -> str:
        done = run(command, PYTHONPATH=str(ROOT))
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout + done.stderr

    def train(*arguments) -> str:
        return finished(training(*arguments)).split("center ")[-1].split()[0]

    metrics, environ = tmp_path / "mixed" / "metrics.jsonl", {"PYTHONPATH": str(ROOT)}
    with subprocess.Popen(training("mixed", "vllm", 1000), env=os.environ | environ) as killed:
        try:
            deadline = time.monotonic() + 120
            while not metrics.exists() or metrics.read_text().count("\n") < 3:
                assert killed.poll() is None and time.monotonic() < deadline
                time.sleep(0.02)
        finally:
            killed.kill()
    done = metrics.read_text().count("\n")
    train("mixed", "fsdp", done + 4)
    assert train("mixed", "vllm", done + 6) == train("plain", "fsdp", done + 6)

    exported = str(tmp_path / "exported")
    finished(shardes("export", str(tmp_path / "mixed"), exported))
    evaluations = {}
    for engine in ("vllm", "fsdp"):
        out = tmp_path / f"{engine}.json"
        model = ["--model", exported, "--samples", "1", "--out", str(out)]
        layout = [f"engine={engine}", f"run.dir={tmp_path / 'mixed'}"]
        finished(shardes("evaluate", config, *settings, *layout, *model))
        evaluations[engine] = json.loads(out.read_text())["splits"]["test"]
    mine, theirs = evaluations["vllm"], evaluations["fsdp"]
    assert mine["greedy"] == theirs["greedy"] and mine["sampled"]["kl"] > 0
    greedy = [
        [row["response"] for row in rows["responses"] if not row["sample"]]
        for rows in (mine, theirs)
    ]
    assert greedy[0] == greedy[1]


@pytest.mark.slow
def test_every_way_of_batching_runs(tmp_path):
    pytest.importorskip("vllm", reason="no vLLM: tools/vllm_environment.sh")
    model = str(saved("llama", tmp_path / "model"))
    options = ["--toy", "--model", model, "--out", str(tmp_path)]
    done = run([sys.executable, "-m", "benchmarks.batching", *options], PYTHONPATH=str(ROOT))
    assert done.returncode == 0, done.stderr[-3000:]
    ways = json.loads((tmp_path / "batching.json").read_text())["ways"]
    assert {name: values["same"] for name, values in ways.items()} == dict.fromkeys(
        ("decoder", "vllm", "generate_batch"), 4
    )
