"""The planner: shapes, layouts, times, the search, and messages."""

import json
import sys
from dataclasses import replace
from math import prod

import pytest

from benchmarks.plan_table import markdown
from launch import ROOT, call, run
from shardes.commands.plan import main
from shardes.config.schema import (
    Config,
    Decode,
    EngineName,
    ESConfig,
    Gather,
    ModelConfig,
    Offload,
    Restore,
)
from shardes.errors import ConfigError
from shardes.planning.devices import GPUS
from shardes.planning.layouts import Layout, Machine
from shardes.planning.memory import rank_memory
from shardes.planning.shapes import read_shapes
from shardes.planning.time import Estimate
from shardes.planning.workload import Workload

DATA = ROOT / "tests" / "data"
PARAMETERS = {  # as published, in billions
    "llama-3.1-8b": 8.03,
    "llama-3.1-70b": 70.55,
    "llama-3.1-405b": 405.85,
    "qwen2.5-72b": 72.71,
    "qwen3-30b-a3b": 30.53,
}
WORKLOAD = Workload((120,) * 200, (120,) * 500, 1024, 65536)
NODE = Machine(1, 8, int(80e9), int(2e12))


@pytest.fixture(scope="module")
def models():
    """Reads the shapes of a model for an engine, once."""
    shapes = {}

    def get(name, engine=EngineName.deepspeed):
        if (name, engine) not in shapes:
            shapes[name, engine], _ = read_shapes(Config(engine, ModelConfig(str(DATA / name))))
        return shapes[name, engine]

    return get


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameter_counts_are_the_published_ones(models, name):
    assert models(name).numel / 1e9 == pytest.approx(PARAMETERS[name], abs=0.01)


@pytest.mark.parametrize(
    "engine, tensor, ranks, names",
    [
        pytest.param("deepspeed", 8, 64, ["llama-3.1-8b", "qwen2.5-72b"], marks=pytest.mark.slow),
        ("deepspeed", 3, 6, ["llama-3.1-8b", "uneven"]),
        pytest.param("fsdp", 4, 32, ["llama-3.1-8b", "qwen3-30b-a3b"], marks=pytest.mark.slow),
    ],
)
def test_planned_shards_are_the_engines(engine, tensor, ranks, names, uneven_llama, tmp_path):
    directories = [uneven_llama if name == "uneven" else DATA / name for name in names]
    command = [
        sys.executable,
        "tests/workers/cuts.py",
        engine,
        str(tensor),
        str(ranks),
        *map(str, directories),
    ]
    done = run(command, seconds=200, RESULTS=str(tmp_path), LOCAL_RANK="0")
    assert done.returncode == 0, done.stderr
    counts = json.loads((tmp_path / "0.json").read_text())
    shard = ranks // tensor
    for directory in directories:
        model, _ = read_shapes(Config(EngineName(engine), ModelConfig(str(directory))))
        held = [model.held(tensor, shard, t, s) for t in range(tensor) for s in range(shard)]
        assert held == counts[directory.name]
        for number, parameter in enumerate(model.parameters):
            # All ranks together hold the model, or one copy per tensor rank.
            copies = 1 if parameter.dim is not None else tensor
            assert sum(of_rank[number] for of_rank in held) == copies * prod(parameter.shape)


def total(model, layout, restore=Restore.copy, gpu=int(80e9), workload=WORKLOAD):
    memory = rank_memory(model, layout, workload, ESConfig(restore=restore), gpu)
    return sum(memory.gpu.values()), sum(memory.host.values())


def estimate(model, layout, gpu="H100", response=1024, workload=WORKLOAD, **es):
    return Estimate(model, layout, workload, ESConfig(**es), response, GPUS[gpu], NODE)


def test_memory_depends_on_model_and_layout(models):
    model = models("llama-3.1-70b")
    one, two, four, eight = (total(model, Layout(1, 1, t, Gather.member)) for t in (1, 2, 4, 8))
    assert one > two > four > eight
    member, layer = (total(model, Layout(1, 2, 4, gather)) for gather in Gather)
    assert member[0] > layer[0] and member[1] == layer[1] < four[1]
    assert total(models("llama-3.1-405b"), Layout(1, 1, 8, Gather.member)) > eight
    assert total(model, Layout(1, 1, 8, Gather.member), Restore.subtract)[1] < eight[1]
    assert total(model, Layout(1, 2, 4, Gather.layer, Offload.cpu))[0] < layer[0]
    longer = replace(WORKLOAD, batch_tokens=2 * WORKLOAD.batch_tokens)
    assert total(model, Layout(1, 1, 8, Gather.member), workload=longer)[0] > eight[0]
    on_gpus, on_host = eight
    all_on_host = total(model, Layout(1, 1, 8, Gather.member), gpu=None)
    assert all_on_host[0] == 0 and all_on_host[1] > on_gpus - 0.1 * 80e9 + on_host - 1e9


def test_figures_computed_by_hand(models):
    """Llama 3.1 8B in bfloat16 on one GPU: 57 rows of 120 + 1,024 tokens fit into 65,536 tokens."""
    model, layout = models("llama-3.1-8b"), Layout(1, 1, 1, Gather.member)
    memory = rank_memory(model, layout, WORKLOAD, ESConfig(), int(80e9))
    assert memory.gpu["live shard"] == 2 * 8_030_261_248
    assert memory.host["center"] == 4 * 8_030_261_248
    assert memory.gpu["key-value cache"] == 57 * 1144 * 32 * 2 * 8 * 128 * 2
    assert memory.gpu["gathered weights"] == 0
    sent = estimate(model, Layout(1, 1, 4, Gather.member)).traffic()
    assert sent.reduced_per_token == 2 * 32 * 4096 * 2 * 2 * 3 // 4
    assert sent.reduced == sent.reduced_per_token * 200 * 1144 * 30 and sent.gathered == 0
    gathers = estimate(model, Layout(2, 4, 1, Gather.member)).traffic()
    assert gathers.gathered_per_member == 2 * 8_030_261_248 * 3 // 4
    assert gathers.gathered == 15 * gathers.gathered_per_member


def test_times_follow_the_bounds(models):
    """Decoding reads weights and cache; replicas, bandwidth and shorter responses save time."""
    model = models("llama-3.1-8b")

    def seconds(layout=None, gpu="H100", response=1024):
        layout = layout or Layout(8, 1, 1, Gather.member)
        return estimate(model, layout, gpu, response).seconds()

    batches = 4  # 200 prompts, 57 at a time
    weights = 2 * (model.numel - 128256 * 4096) * 1024 * batches
    cache = 200 * 1024 * (120 + 512) * 32 * 2 * 8 * 128 * 2
    assert seconds().decode == pytest.approx(4 * (weights + cache) / 3.35e12, rel=0.01)
    assert seconds(gpu="H200").total < seconds().total < seconds(gpu="A100-80").total
    assert seconds(response=512).total < seconds().total
    assert seconds(Layout(4, 1, 1, Gather.member)).decode == pytest.approx(2 * seconds().decode)
    member, layer = (seconds(Layout(4, 2, 1, gather)) for gather in Gather)
    assert layer.gather > 100 * member.gather > 0
    offloaded = seconds(Layout(8, 1, 1, Gather.member, Offload.cpu))
    noise = model.numel / GPUS["H100"].host_normals
    assert offloaded.perturb == pytest.approx(4 * noise)  # four members, of seeds of their own
    assert offloaded.update > 30 * noise


def test_rows_and_tokens_that_fill_fixed_shapes_take_time(models):
    """65 rows are decoded as 96, each with 256 tokens; the prompts' pass has 65."""
    model, layout = models("llama-3.1-8b"), Layout(8, 1, 1, Gather.member)
    work = Workload((120,) * 65, (), 136, 10**6)
    eager, graph, full = (
        estimate(model, layout, response=136, workload=each).seconds()
        for each in (
            work,
            replace(work, decode=Decode.graph),
            replace(work, decode=Decode.graph, train=(120,) * 96),
        )
    )
    step = 2 * (model.numel - 128256 * 4096) + 96 * 256 * 32 * 2 * 8 * 128 * 2
    assert graph.decode == full.decode == pytest.approx(4 * 135 * step / 3.35e12)
    assert eager.decode < graph.decode and eager.prefill == graph.prefill < full.prefill


NODE_OF_8 = ["--gpus", 8, "--gpu", "H100"]
CASES = {  # model, sharding, further arguments, exit code, the suggested layout
    "8B fits": ("llama-3.1-8b", {}, [], 0, None),
    "70B on single GPUs": ("llama-3.1-70b", {}, [], 1, (2, 1, 4, "member")),
    "70B": ("llama-3.1-70b", {"tensor": 4}, [], 0, None),
    "405B": ("llama-3.1-405b", {"tensor": 8, "shard": 2}, ["--nodes", 2], 1, (1, 2, 8, "layer")),
    "host memory": (
        "llama-3.1-8b",
        {},
        ["--host-memory", "200GB", "center.device=host"],
        1,
        (4, 1, 2, "member"),
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_suggestions(config, case):
    name, sharding, arguments, code, expected = CASES[case]
    done = call(main, config(DATA / name, **sharding), *NODE_OF_8, *arguments, "--json")
    assert done.returncode == code, done.stderr
    report = json.loads(done.stdout)
    assert report["configured"]["fits"] == (code == 0)
    if expected is not None:
        layout = report["suggested"]["layout"]
        assert tuple(layout[key] for key in ("replicas", "shard", "tensor", "gather")) == expected
        assert report["suggested"]["fits"]


def test_the_printed_table(config):
    done = call(main, config(DATA / "llama-3.1-70b"), *NODE_OF_8)
    assert done.returncode == 1
    for part in (
        "70.55 billion",
        "configured",
        "suggested",
        "key-value cache",
        "NO",
        "Not compared with runs on GPUs",
    ):
        assert part in done.stdout
    pasted = "2 × 1 × 4: sharding.shard=1 sharding.tensor=4 sharding.gather=member"
    assert "suggested: 298.3 s" in done.stdout and pasted in done.stdout
    done = call(main, config(DATA / "llama-3.1-405b", tensor=8), *NODE_OF_8)
    assert done.returncode == 1 and "nothing fits; 2 such nodes would be enough" in done.stdout


def test_a_users_task(config, tmp_path):
    data = tmp_path / "data.jsonl"
    data.write_text('{"prompt": "one"}\n{"prompt": "two"}\n')
    (tmp_path / "my_reward.py").write_text("def reward(response, example):\n    return 0.0\n")
    keys = [
        f"task.train={data}",
        f"task.test={data}",
        f"task.reward={tmp_path}/my_reward.py:reward",
        "task.name=jsonl",
    ]
    done = call(main, config(DATA / "llama-3.1-8b"), *keys, *NODE_OF_8)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "prompts, message",
    [
        ([], "task: its list of prompts is empty"),
        ([3], "task: prompt 0 is neither a str nor a list of messages: 3"),
        ([[{"role": "user"}]], "task: prompt 0: {'role': 'user'} is not a message with role and"),
        (["a"], "task.prompts_per_iteration=2: the task has 1 training prompts"),
        (["a", [{"role": "user", "content": [{"type": "text", "text": "b"}]}]], ""),
    ],
)
def test_prompts_that_training_refuses_are_refused(config, tmp_path, prompts, message):
    (tmp_path / "own.py").write_text(f"""
class Own:
    def prompts(self, split):
        return {prompts!r}
    def score(self, split, responses, which=None):
        return [0.0] * len(responses)
""")
    keys = ["task.name=null", f"task.path={tmp_path}/own.py:Own", "task.prompts_per_iteration=2"]
    done = call(main, config(DATA / "llama-3.1-8b"), *keys, *NODE_OF_8)
    assert done.returncode == (2 if message else 0) and message in done.stderr, done.stderr
    assert done.stderr.count("\n") == bool(message)


def test_a_workload_is_that_of_one_iteration():
    config = Config()
    config.task.prompts_per_iteration, config.eval.prompts = 2, 3
    work = Workload.of_run(config, [5, 9, 3, 7], [1] * 8)
    assert (work.train, work.test) == ((7, 9), (1, 1, 1))
    config.task.prompts_per_iteration = config.eval.prompts = None
    work = Workload.of_run(config, [5, 9, 3, 7], [1] * 8)
    assert (work.train, work.test) == ((5, 9, 3, 7), (1,) * 8)


def test_error_messages(config, tmp_path):
    fine = config(DATA / "llama-3.1-8b")
    (tmp_path / "model").mkdir()
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "config.json").write_text('{"model_type": "llama", "hidden_size": 64}')
    overrides = ["--gpus", 8, "--gpu", "H100"]
    for arguments, expected in [
        ([fine, "--gpus", 8], "--gpu is missing: the card's name"),
        ([fine, "--gpu", "H1000"], "--gpu H1000: not known; did you mean H100?"),
        ([fine, "--gpu-memory", "60GB"], "no known card has that memory"),
        ([fine, *overrides, "--bandwidth", "0"], "--bandwidth 0.0: must be positive"),
        ([fine, *overrides, "--latency", "nan"], "--latency nan: must be positive"),
        ([fine, *overrides, "--flops", "inf"], "--flops inf: must be positive"),
        ([fine, "--gpu-memory", "80 gigs"], "--gpu-memory 80 gigs: must be a size such as 80GB"),
        ([fine, "--gpus", 0, "--gpu-memory", "80GB"], "--gpus 0: must be at least 1"),
        ([fine, *overrides, "--nodes", "0"], "--nodes 0: must be at least 1 and at most 100000"),
        ([fine, *overrides, "--nodes", "-1"], "--nodes -1: must be at least 1"),
        ([fine, "--gpus", 2000, "--gpu", "H100"], "--gpus 2000: must be at least 1 and at most"),
        ([fine, *overrides, "--prompts", 0], "--prompts 0: must be at least 1"),
        ([fine, *overrides, "--prompt-tokens", -4], "--prompt-tokens -4: must be at least 1"),
        ([fine, *overrides, "--response-tokens", 2000], "--response-tokens 2000: no response is"),
        ([fine, *overrides, "--host-memory", "0GB"], "--host-memory 0GB: must be a size such as"),
        ([fine, *overrides, "--gpu-memory=-8GB"], "--gpu-memory -8GB: must be a size such as"),
        ([fine, *overrides, "--gpu-memory", "0.0001KB"], "--gpu-memory 0.0001KB: must be a size"),
        ([fine, "--gpu", "cpu", "--gpu-memory", "8GB"], "--gpu-memory 8GB: --gpu cpu has no GPUs"),
        ([fine, *overrides, "es.population_size=0"], "es.population_size=0: must be at least 2"),
        ([fine, *overrides, "sharding.tensor=3"], "does not divide the 8 GPUs"),
        ([fine, *overrides, "sharding.replicas=3"], "does not fill the 8 GPUs"),
        ([fine, "--gpus", 16, "--gpu-memory", "80GB", "sharding.tensor=16"], "8 key-value heads"),
        ([fine, *overrides, f"model.path={tmp_path / 'model'}"], "no readable config.json"),
        ([fine, *overrides, f"model.path={broken}"], "config.json does not say num_hidden_layers"),
        ([fine, *overrides, "es.sigam=1"], "es.sigma"),
        ([*overrides], "CONFIG.yaml or --model is missing"),
        (["--model", tmp_path / "model", *overrides], "no readable config.json"),
        (["--model", "nowhere", *overrides], "model.path=nowhere: no such directory, and not a"),
    ]:
        done = call(main, *arguments)
        assert done.returncode == 2, (arguments, done.stdout)
        assert done.stderr.startswith("error: ") and expected in done.stderr, done.stderr
        assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    "sizes, message",
    [
        ({"num_hidden_layers": 0}, "num_hidden_layers=0: must be a whole number from 1"),
        ({"num_hidden_layers": -1}, "num_hidden_layers=-1: must be"),
        ({"hidden_size": "3584"}, "hidden_size=3584: must be"),
        ({"hidden_size": 64.5}, "hidden_size=64.5: must be"),
        ({"hidden_size": 10**12}, "hidden_size=1000000000000: must be"),
        ({"vocab_size": 0}, "vocab_size=0: must be"),
        ({"num_attention_heads": 0}, "num_attention_heads=0: must be"),
        ({"num_attention_heads": True}, "num_attention_heads=True: must be"),
        ({"num_key_value_heads": 0}, "num_key_value_heads=0: must be"),
        ({"num_key_value_heads": 3}, "num_attention_heads=28, which is no multiple of num_key"),
        ({"head_dim": -8}, "head_dim=-8: must be"),
        ({"intermediate_size": 0}, "intermediate_size=0: must be"),
        ({"vocab_size": None}, "config.json does not say vocab_size"),
    ],
)
def test_sizes_that_no_model_has_are_named(sizes, message, tmp_path):
    values = json.loads((DATA / "qwen2.5-7b" / "config.json").read_text()) | sizes
    kept = {name: value for name, value in values.items() if value is not None}
    (tmp_path / "config.json").write_text(json.dumps(kept))
    with pytest.raises(ConfigError) as refusal:
        read_shapes(Config(model=ModelConfig(str(tmp_path))))
    assert str(refusal.value).startswith(f"model.path={tmp_path}: config.json")
    assert message in str(refusal.value)


def test_the_docs_have_the_tools_table():
    assert markdown() in (ROOT / "docs" / "plan.md").read_text()


def test_vllm_is_planned_with_its_cache_and_its_layouts():
    model = str(DATA / "llama-3.1-8b")
    command = ["--model", model, "--gpus", "8", "--gpu", "H100", "--prompt-tokens", "100"]
    command += ["--prompts", "10", "--json", "engine=vllm"]

    def planned(*overrides):
        done = call(main, *command, *overrides)
        return done.returncode, json.loads(done.stdout)

    code, plan = planned("vllm.cache_size=20")
    assert code == 0 and any(note.startswith("engine=vllm: the times") for note in plan["notes"])
    for best in plan["best"]:
        assert best["gpu"]["key-value cache"] == 20e9
        assert best["layout"]["engine"] == "vllm" and best["layout"]["shard"] == 1
        tensor, place = best["layout"]["tensor"], best["center_device"]
        assert best["settings"] == f"sharding.tensor={tensor} center.device={place}"
    assert {8, 4, 2, 1} == {best["layout"]["tensor"] for best in plan["best"]}
    code, plan = planned("vllm.cache_size=79")
    assert code == 1 and plan["best"] == []
    code, plan = planned("es.noise=low_rank", "sharding.tensor=1")
    assert {best["members_per_batch"] for best in plan["best"]} == {16, 8, 4, 2}  # half a share
    assert all(best["gpu"]["low-rank factors"] for best in plan["best"])
    code, plan = planned("vllm.max_model_len=131072")  # of which a token takes 131 kB
    assert {best["layout"]["tensor"] for best in plan["best"]} == {8}
