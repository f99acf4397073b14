"""engine=vllm: the center of the other engines to the bit, and their greedy tokens in float32.

Those marked `vllm` need it, in an environment that tools/vllm_environment.sh makes:
`pytest -m vllm tests/engines/test_vllm.py`.
"""

import json
import os
import subprocess
import sys
import time
from importlib.util import find_spec

import pytest
import torch
from torch import nn
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from launch import ROOT, call, run
from models import SIZES, save_model
from shardes.commands import plan
from shardes.config.loading import load
from shardes.engines.vllm import check_context, check_processors, check_vllm
from shardes.engines.vllm_regions import NoPlace, Piece, find_pieces
from shardes.errors import ConfigError
from shardes.sharding.regions import Region

HEADS_OF_32 = SIZES | dict(hidden_size=128, num_attention_heads=4, num_key_value_heads=2)
MODELS = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**HEADS_OF_32, tie_word_embeddings=True)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**HEADS_OF_32, head_dim=32)),
    "phi3": lambda: Phi3ForCausalLM(Phi3Config(**HEADS_OF_32, pad_token_id=0)),  # fused
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**HEADS_OF_32, tie_word_embeddings=False)),
}


class Fused(nn.Module):
    """A model that loads as vLLM's do: two tensors into one parameter with padding, one
    transposed.
    """

    def __init__(self):
        super().__init__()
        self.both = nn.Parameter(torch.zeros(6, 3))
        self.turned = nn.Parameter(torch.zeros(2, 4))

    def load_weights(self, weights):
        for name, tensor in weights:
            if name == "turned":
                self.turned.data.copy_(tensor.t())
            else:
                first = {"first": 0, "second": 2}[name]
                self.both.data.narrow(0, first, len(tensor)).copy_(tensor)


class Computing(Fused):
    def load_weights(self, weights):
        for _, tensor in weights:
            self.both.data[: len(tensor)].copy_(tensor + 1)


def test_pieces_say_which_elements_a_loader_copies_where():
    shapes = {"first": (2, 3), "second": (3, 3), "turned": (4, 2)}
    pieces = find_pieces(Fused(), shapes, torch.float32)
    columns = tuple(Region(start, 4, 1, 2) for start in (0, 1))
    assert pieces[:2] == [
        Piece("both", 0, "first", (Region.contiguous(0, 6),)),
        Piece("both", 6, "second", (Region.contiguous(0, 9),)),
    ]
    turned = [region.index(i) for region in pieces[2].regions for i in range(region.numel)]
    assert turned == [c.index(i) for c in columns for i in range(4)]


def test_a_loader_that_computes_is_refused():
    with pytest.raises(NoPlace, match="computes with the weights of both"):
        find_pieces(Computing(), {"first": (2, 3)}, torch.float32)


@pytest.mark.skipif(find_spec("vllm") is not None, reason="vLLM is there")
def test_vllm_that_is_not_there():
    with pytest.raises(ConfigError, match=r"^engine=vllm: vLLM is not installed; pip install"):
        check_vllm(config(), False)


@pytest.mark.parametrize(
    "override, message",
    [
        ("sharding.shard=2", "sharding.shard=2: engine=vllm has no shard axis"),
        ("sharding.tensor=2", "sharding.tensor=2: engine=vllm has one rank"),
        ("sharding.gather=layer", "sharding.gather=layer: engine=vllm gathers nothing"),
        ("sharding.offload=cpu", "sharding.offload=cpu: engine=vllm keeps"),
        ("es.restore=subtract", "es.restore=subtract: engine=vllm needs the exact center"),
        ("generation.decode=graph", "generation.decode=graph: engine=vllm decodes by itself"),
    ],
)
def test_settings_that_it_does_not_have(override, message):
    with pytest.raises(ConfigError, match=f"^{message}"):
        check_vllm(config(override), False)


def test_members_side_by_side_and_processors_are_refused():
    with pytest.raises(ConfigError, match=r"^es.noise=low_rank: .* es.members_per_batch=1"):
        check_vllm(config(), True)
    with pytest.raises(ConfigError, match=r"does not apply repetition_penalty=1.1; set"):
        check_processors("repetition_penalty=1.1")


def test_the_planner_does_not_know_it():
    planned = call(plan.main, "--model", "m", "engine=vllm")
    assert planned.returncode == 2
    assert planned.stderr.startswith("error: engine=vllm: shardes plan estimates")


def test_a_prompt_must_fit_the_context():
    model = MODELS["llama"]()
    for overrides, context in ([], 512), (["vllm.max_model_len=40"], 40):
        settings = config(f"generation.max_new_tokens={context - 10}", *overrides)
        check_context(settings, model, "train", [[1] * 9])
        with pytest.raises(ConfigError, match=f"longest prompt of train has 10 .* {context} "):
            check_context(settings, model, "train", [[1], [1] * 10])


def config(*overrides):
    return load(None, ["engine=vllm", "model.path=m", "run.dir=r", *overrides])


def saved(name, directory):
    torch.manual_seed(1)
    model = MODELS[name]()
    for key, param in model.named_parameters():
        if key.endswith("bias"):
            nn.init.normal_(param, std=0.3)
    return save_model(directory, model)


@pytest.fixture(scope="module", params=MODELS)
def directory(request, tmp_path_factory):
    return saved(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def results(directory):
    pytest.importorskip("vllm", reason="no vLLM: tools/vllm_environment.sh")
    out = directory / "results.json"
    worker = ROOT / "tests" / "workers" / "vllm_engine.py"
    paths = f"{ROOT}:{ROOT / 'tests'}"
    done = run([sys.executable, str(worker), str(directory), str(out)], PYTHONPATH=paths)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(out.read_text())


@pytest.mark.vllm
@pytest.mark.parametrize(
    "key", ["base", "names", "tokens", "member tokens", "updated", "updated tokens", "stopped"]
)
def test_what_the_other_engines_give(results, key):
    assert results["vllm"][key] == results["fsdp"][key]


@pytest.mark.vllm
def test_members_leave_nothing_behind(results):
    mine = results["vllm"]
    assert mine["restored"] and mine["tokens again"] == mine["tokens"] != mine["member tokens"]


@pytest.mark.vllm
def test_log_probabilities(results):
    mine, theirs = (results[name]["log_probs"] for name in ("vllm", "fsdp"))
    assert [len(row) for row in mine] == [len(row) for row in theirs]
    for row, expected in zip(mine, theirs, strict=True):
        assert row == pytest.approx(expected, abs=1e-4)


@pytest.mark.vllm
def test_a_layer_that_computes_with_a_copy_is_named(results):
    assert "what is written to model.layers.0.mlp.down_proj.weight" in results["blind"]


@pytest.mark.vllm
def test_seeds_stops_and_invalid_logits(results):
    assert results["sampled alike"] and results["halted"]
    assert results["invalid"] == [[]] * 4


@pytest.mark.vllm
def test_a_killed_run_goes_on_with_another_engine(tmp_path):
    pytest.importorskip("vllm", reason="no vLLM: tools/vllm_environment.sh")
    directory = saved("llama", tmp_path / "model")
    (tmp_path / "empty.yaml").write_text("{}\n")
    settings = [
        f"model.path={directory}",
        "model.dtype=float32",
        "task.name=conciseness",
        "es.population_size=4",
        "es.sigma=0.01",
        "es.alpha=0.01",
        "generation.max_new_tokens=6",
        "checkpoint.every=2",
        "tracking.loggers=[]",
        "vllm.enforce_eager=true",
        "vllm.cache_size=0.05",
    ]

    def command(folder: str, engine: str, iterations: int) -> list[str]:
        shardes = "import sys; from shardes.commands.cli import command; sys.exit(command())"
        layout = [f"engine={engine}", f"es.iterations={iterations}", f"run.dir={tmp_path / folder}"]
        config = str(tmp_path / "empty.yaml")
        return [sys.executable, "-c", shardes, "train", config, *settings, *layout]

    def train(*arguments) -> str:
        done = run(command(*arguments), PYTHONPATH=str(ROOT))
        assert done.returncode == 0, done.stderr[-3000:]
        return (done.stdout + done.stderr).split("center ")[-1].split()[0]

    metrics, environ = tmp_path / "mixed" / "metrics.jsonl", {"PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command("mixed", "vllm", 1000), env=os.environ | environ) as killed:
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
