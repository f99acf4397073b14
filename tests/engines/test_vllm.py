"""engine=vllm: the center of the other engines to the bit, and their greedy tokens in float32.

Those marked `vllm` need it, in an environment that tools/vllm_environment.sh makes:
`pytest -m vllm tests/engines/test_vllm.py`.
"""

import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from importlib.util import find_spec

import pytest
import torch
from torch import nn
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from launch import ROOT, run, torchrun
from models import SIZES, save_model
from shardes.config.loading import load
from shardes.config.schema import ESConfig, Noise
from shardes.engines import check_model, vllm
from shardes.engines.vllm import check_context, check_processors, check_vllm
from shardes.engines.vllm_adapters import Slots
from shardes.engines.vllm_regions import NoPlace, Piece, _is_partition, find_pieces
from shardes.errors import ConfigError
from shardes.es.adapted_members import adapter_slots, check_adapters
from shardes.es.side_by_side import members_together
from shardes.inference.vllm_generation import check_rotary
from shardes.sharding.regions import Region

LAYER = "model.layers.0.mlp.down_proj"
HEADS_OF_32 = SIZES | dict(hidden_size=128, num_attention_heads=4, num_key_value_heads=2)
EXPERTS = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=64)
GPT2 = dict(vocab_size=263, n_embd=128, n_head=4, n_layer=2, n_inner=50, n_positions=512)
MODELS = {  # vLLM makes groups for experts with the first model of a process, or never
    "qwen3_moe": lambda: Qwen3MoeForCausalLM(Qwen3MoeConfig(**HEADS_OF_32, **EXPERTS, head_dim=32)),
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**HEADS_OF_32, tie_word_embeddings=True)),
    "one_head": lambda: LlamaForCausalLM(  # that tensor ranks have copies of
        LlamaConfig(**HEADS_OF_32 | dict(num_key_value_heads=1))
    ),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**HEADS_OF_32, tie_word_embeddings=False)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**HEADS_OF_32, head_dim=32)),
    "gemma2": lambda: Gemma2ForCausalLM(
        Gemma2Config(**HEADS_OF_32, head_dim=32, query_pre_attn_scalar=32)
    ),
    "mistral": lambda: MistralForCausalLM(
        MistralConfig(**HEADS_OF_32, head_dim=32, sliding_window=None)
    ),
    "phi3": lambda: Phi3ForCausalLM(Phi3Config(**HEADS_OF_32, pad_token_id=0)),  # fused
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(**GPT2, initializer_range=0.3)),  # transposed
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


def test_ranks_count_an_element_once():
    whole = (Region.contiguous(0, 12),)
    halves = [(Region(start, 4, 2, 4),) for start in (0, 2)]  # of a 4 × 4 tensor
    assert _is_partition([tuple(vars(r).values()) for half in halves for r in half], 16)
    assert _is_partition([], 0) and not _is_partition([], 1)
    for regions in (whole, [*whole, Region.contiguous(10, 6)], [*whole, Region.contiguous(13, 3)]):
        assert not _is_partition([tuple(vars(r).values()) for r in regions], 16)


@pytest.mark.skipif(find_spec("vllm") is not None, reason="vLLM is there")
def test_vllm_that_is_not_there():
    with pytest.raises(ConfigError, match=r"^engine=vllm: vLLM is not installed; pip install"):
        check_vllm(config())


@pytest.mark.parametrize(
    "override, message",
    [
        ("sharding.shard=2", "sharding.shard=2: engine=vllm has no shard axis"),
        ("sharding.gather=layer", "sharding.gather=layer: engine=vllm gathers nothing"),
        ("sharding.offload=cpu", "sharding.offload=cpu: engine=vllm keeps"),
        ("es.restore=subtract", "es.restore=subtract: engine=vllm needs the exact center"),
        ("generation.decode=graph", "generation.decode=graph: engine=vllm decodes by itself"),
    ],
)
def test_settings_that_it_does_not_have(override, message):
    with pytest.raises(ConfigError, match=f"^{message}"):
        check_vllm(config(override))


def test_an_older_vllm(monkeypatch):
    monkeypatch.setattr(vllm, "find_spec", lambda name: name)
    monkeypatch.setattr(vllm, "version", lambda name: "0.31.4+cpu")
    with pytest.raises(ConfigError, match=r"^engine=vllm: vLLM is 0.31.4\+cpu; .* least 0.32$"):
        check_vllm(config())


def test_processors_are_refused():
    with pytest.raises(ConfigError, match=r"does not apply repetition_penalty=1.1; set"):
        check_processors("repetition_penalty=1.1")


def test_rotary_frequencies_that_change_with_the_length():
    model = MODELS["llama"]()
    check_rotary(config(), model)
    factors = dict(short_factor=[1.0] * 16, long_factor=[2.0] * 16)
    scaled = dict(rope_type="longrope", original_max_position_embeddings=64, rope_theta=1e4)
    sizes = HEADS_OF_32 | dict(pad_token_id=0, original_max_position_embeddings=64)
    phi3 = Phi3ForCausalLM(Phi3Config(**sizes, rope_parameters=scaled | factors))
    for length, message in (
        ("null", "change at 64 tokens"),
        ("65", "set vllm.max_model_len=64, or"),
        ("64", ""),
    ):
        settings = config(f"vllm.max_model_len={length}")
        if not message:
            check_rotary(settings, phi3)
            continue
        with pytest.raises(ConfigError, match=f"^vllm.max_model_len: .*{message}"):
            check_rotary(settings, phi3)
    dynamic = dict(rope_type="dynamic", factor=2.0, rope_theta=1e4)
    llama = LlamaForCausalLM(LlamaConfig(**HEADS_OF_32, rope_parameters=dynamic))
    with pytest.raises(ConfigError, match=r"^model.path=m: its rotary frequencies change"):
        check_rotary(config(), llama)


def test_experts_cannot_be_shared():
    es = ESConfig(noise=Noise.low_rank)
    check_adapters(MODELS["llama"](), es)
    with pytest.raises(ConfigError, match=r"cannot share \S*experts\S*, for which vLLM has no ada"):
        check_adapters(MODELS["qwen3_moe"](), es)
    check_adapters(MODELS["qwen3_moe"](), replace(es, evolve="self_attn"))


def test_members_of_a_group():
    settings = config("es.noise=low_rank", "es.population_size=30")
    assert members_together(settings, [10], 1) == 16 == adapter_slots(settings.es).number
    assert members_together(settings, [10], 4) == 4
    settings.es.members_per_batch = 30
    assert members_together(settings, [10], 1) == 30 == adapter_slots(settings.es).number
    settings.es.members_per_batch = 1
    assert adapter_slots(settings.es) is None
    assert Slots(3, 9).arguments()["max_lora_rank"] == 16


@pytest.mark.parametrize("tensor, heads", [(3, "4 attention"), (4, ""), (8, "4 attention")])
def test_heads_that_a_tensor_degree_does_not_split(tensor, heads):
    settings = config(f"sharding.tensor={tensor}")
    if not heads:  # two ranks hold each key-value head
        check_model(settings, MODELS["llama"]())
        return
    with pytest.raises(ConfigError, match=rf"^sharding.tensor={tensor}: .* the {heads} heads of m"):
        check_model(settings, MODELS["llama"]())


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
        elif key.endswith("embed_tokens.weight") and name == "gemma2":
            nn.init.normal_(param, std=0.02)  # a large one would make it repeat the prompt
    return save_model(directory, model)


@pytest.fixture(scope="module")
def directories(request, tmp_path_factory):
    """Of the models that are tested, in the order of `MODELS`."""
    specs = [item.callspec.params for item in request.session.items if hasattr(item, "callspec")]
    tested = {spec.get("model") for spec in specs}
    folder = tmp_path_factory.mktemp("models")
    return [saved(name, folder / name) for name in MODELS if name in tested]


def started(directories, replicas, tensor) -> list[dict]:
    """What each rank reports of the models."""
    pytest.importorskip("vllm", reason="no vLLM: tools/vllm_environment.sh")
    worker = ("vllm_engine.py", str(replicas), str(tensor))
    return torchrun(replicas * tensor, *worker, *map(str, directories), seconds=900)


@pytest.fixture(scope="module")
def alone(directories):
    return started(directories, 1, 1)[0]


SAME = ["base", "names", "tokens", "member tokens", "updated", "updated tokens", "stopped"]


@pytest.mark.vllm
@pytest.mark.parametrize("key", [*SAME, "numel"])
@pytest.mark.parametrize("model", MODELS)
def test_what_the_other_engines_give(alone, model, key):
    results = alone[model]
    assert results["vllm"][key] == results["fsdp"][key]


@pytest.mark.vllm
@pytest.mark.parametrize("model", MODELS)
def test_members_leave_nothing_behind(alone, model):
    mine = alone[model]["vllm"]
    assert mine["restored"] and mine["tokens again"] == mine["tokens"] != mine["member tokens"]


@pytest.mark.vllm
@pytest.mark.parametrize("model", MODELS)
def test_log_probabilities(alone, model):
    mine, theirs = (alone[model][name]["log_probs"] for name in ("vllm", "fsdp"))
    assert [len(row) for row in mine] == [len(row) for row in theirs]
    for row, expected in zip(mine, theirs, strict=True):
        assert row == pytest.approx(expected, abs=1e-4)


@pytest.mark.vllm
@pytest.mark.parametrize("model", ["llama"])
def test_a_layer_that_computes_with_a_copy_is_named(alone, model):
    assert f"what is written to {LAYER}.weight" in alone[model]["blind"]


@pytest.mark.vllm
@pytest.mark.parametrize("model", MODELS)
def test_seeds_stops_and_invalid_logits(alone, model):
    results = alone[model]
    assert results["sampled"] == results["sampled again"] and results["halted"]
    if model == "llama":
        assert results["sampled"] != results["vllm"]["updated tokens"]
    assert results["invalid"] == [[]] * 4


@pytest.mark.vllm
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


@pytest.mark.vllm
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


SHARED = ("llama", "qwen2", "phi3", "gemma2")


@pytest.fixture(scope="module", params=[(1, 2), pytest.param((2, 1), marks=pytest.mark.slow)])
def together(request, directories):
    """What low-rank members answer side by side; tensor, rank of the noise."""
    pytest.importorskip("vllm", reason="no vLLM: tools/vllm_environment.sh")
    chosen = [str(directory) for directory in directories if directory.name in SHARED]
    tensor, rank = request.param
    return torchrun(tensor, "vllm_members.py", str(tensor), str(rank), *chosen, seconds=900)


@pytest.mark.vllm
@pytest.mark.parametrize("model", [name for name in SHARED if name != "gemma2"])
def test_members_answer_side_by_side_as_alone(together, alone, model):
    for rank in together:
        results = rank[model]
        assert results["side by side"] == results["alone"]
        first, second, third = results["alone"]
        assert first != second != third and results["base"] not in results["alone"]
        assert results["digest"] == alone[model]["vllm"]["base"]


@pytest.mark.vllm
@pytest.mark.parametrize("model", ["gemma2"])
def test_a_matrix_without_adapters_is_named(together, model):
    for rank in together:
        assert "cannot share lm_head, for which vLLM has no adapter; set es.mem" in rank[model]


@pytest.fixture(scope="module")
def real():
    """SmolLM2 on both engines; see workers/vllm_real.py."""
    pytest.importorskip("vllm", reason="no vLLM: tools/vllm_environment.sh")
    done = run([sys.executable, "-m", "shardes.commands.cli", "get-smollm2"], seconds=300)
    assert done.returncode == 0, done.stdout + done.stderr
    directory = ROOT / "models" / "SmolLM2-135M-Instruct"
    return torchrun(1, "vllm_real.py", str(directory), seconds=900)[0]


@pytest.mark.vllm
@pytest.mark.model
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_center_of_a_real_model(real, dtype):
    mine, theirs = real[dtype]["vllm"], real[dtype]["fsdp"]
    assert [mine["base"], mine["updated"]] == [theirs["base"], theirs["updated"]]


@pytest.mark.vllm
@pytest.mark.model
def test_greedy_answers_of_a_real_model(real, record_property):
    """In float32 an answer may differ where rounding decides between two tokens."""
    mine, theirs = real["float32"]["vllm"], real["float32"]["fsdp"]
    same = [a == b for a, b in zip(mine["responses"], theirs["responses"], strict=True)]
    record_property("answers of 32 that are the same", sum(same))
    assert sum(same) >= 30 and all(abs(value) < 1e-3 for value in real["float32"]["lost"])
    assert sum(a == b for a, b in zip(mine["member"], theirs["member"], strict=True)) >= 30
    assert mine["member"] != mine["responses"]


@pytest.mark.vllm
@pytest.mark.model
def test_a_real_model_in_16_bits(real):
    """Kernels round differently, so answers part; where they do, both tokens are as probable."""
    assert all(map(len, real["bfloat16"]["vllm"]["responses"]))
    assert all(abs(value) < 0.5 for value in real["bfloat16"]["lost"])


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


@pytest.mark.vllm
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
