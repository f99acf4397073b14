"""Exports give the trainer's own tokens; checkpoints of other programs can be exported too."""

import json
import shutil
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from launch import ROOT, call, run, script, torchrun
from models import save_model
from shardes.commands import journal as journal_command
from shardes.sharding.weight_files import WeightFiles
from shardes.storage import journal, snapshots
from shardes.storage.checkpoint import verify
from shardes.storage.files import fingerprint

TASK = """
class Echo:
    def prompts(self, split):
        return ["abc", "a much longer prompt", "x"] if split == "train" else ["hello", "you there"]
    def score(self, split, responses):
        return [float(sum(map(ord, text)) % 97) for text in responses]
"""


@pytest.fixture(scope="module")
def trained(zygote, tmp_path_factory, biased_qwen, moe_qwen):
    """Finished runs on two ranks, by the dtype and model they compute with."""
    folder = tmp_path_factory.mktemp("trained")
    (folder / "task.py").write_text(TASK)

    def train(name: str, model: Path, dtype: str, *keys: str) -> Path:
        settings = {
            "model": {"path": str(model), "dtype": dtype},
            "es": {"population_size": 4, "sigma": 0.05, "alpha": 0.1, "iterations": 4},
            "generation": {"max_new_tokens": 16},
            "task": {"path": f"{folder}/task.py:Echo"},
            "checkpoint": {"every": 3, "keep": 1},
            "run": {"dir": str(folder / name), "timeout": 60},
        }
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(settings))
        config = str(folder / f"{name}.yaml")
        run = zygote.start(config, "sharding.shard=2", *keys, ranks=2, log=folder / f"{name}.log")
        assert run.wait() == [0, 0], run.text()
        return folder / name

    return {
        "float32": train("float32", biased_qwen, "float32"),
        "bfloat16": train("bfloat16", moe_qwen, "bfloat16", "engine=fsdp"),
        "subtract": train("subtract", biased_qwen, "bfloat16", "es.restore=subtract"),
    }


@pytest.fixture(scope="module")
def export():
    """A caller of the tool."""
    return partial(call, script("tools/export_safetensors.py").main)


@pytest.mark.parametrize("name", [pytest.param("float32", marks=pytest.mark.slow), "bfloat16"])
def test_an_export_gives_the_trainers_own_tokens(export, trained, tmp_path, name):
    done = export(trained[name], tmp_path / "out", "--shard-size", "50KB")
    assert done.returncode == 0, done.stderr
    assert verify(tmp_path / "out").iteration == 4
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert model.dtype == (torch.float32 if name == "float32" else torch.bfloat16)
    samples = [
        json.loads(line) for line in (trained[name] / "samples.jsonl").read_text().splitlines()
    ]
    samples = [row for row in samples if row["iteration"] == 4]
    assert len(samples) == 5
    for row in samples:
        prompt = tokenizer(row["prompt"], return_tensors="pt")
        tokens = model.generate(**prompt, do_sample=False, max_new_tokens=16)[
            0, prompt["input_ids"].shape[1] :
        ]
        assert tokenizer.decode(tokens, skip_special_tokens=True) == row["response"]


def test_a_center_that_drifted_is_exported_as_it_was(export, trained, tmp_path):
    assert export(trained["subtract"], tmp_path / "out").returncode == 0
    history = journal.read(trained["subtract"] / "journal.jsonl")
    assert verify(tmp_path / "out").digest == history.finish.digest
    assert (
        load_file(tmp_path / "out" / "model.safetensors")["model.norm.weight"].dtype
        == torch.bfloat16
    )


def test_from_the_journal_alone_and_from_a_snapshot_it_is_the_same(export, trained, tmp_path):
    source = shutil.copytree(trained["float32"], tmp_path / "run")
    history = journal.read(source / "journal.jsonl")
    assert list(snapshots.by_iteration(source)) == [4]
    for iteration in range(5):
        assert (
            export(source, tmp_path / f"with {iteration}", "--iteration", iteration).returncode == 0
        )
    shutil.rmtree(source / "snapshots")
    assert export(source, tmp_path / "without").returncode == 0
    for iteration in range(5):
        assert verify(tmp_path / f"with {iteration}").digest == history.digest(iteration)
    with_snapshot, without = (
        load_file(tmp_path / out / "model.safetensors") for out in ("with 4", "without")
    )
    assert all(torch.equal(with_snapshot[key], without[key]) for key in with_snapshot)


def test_the_model_card_says_what_it_is(export, trained, biased_qwen, tmp_path):
    assert export(trained["float32"], tmp_path / "out", "--dtype", "bfloat16").returncode == 0
    card = (tmp_path / "out" / "README.md").read_text()
    for part in (
        biased_qwen.name,
        "task.py",
        "| `es.sigma` | `0.05` |",
        "from_pretrained",
        "| 3 |",
        "4 iterations",
    ):
        assert part in card
    data = ModelCard.load(tmp_path / "out" / "README.md").data
    assert (data.library_name, data.base_model) == ("transformers", None)  # a directory's model
    assert str(biased_qwen.parent) not in card
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"


@pytest.mark.slow
def test_it_holds_one_tensor_at_a_time(tmp_path):
    """A model of 800 MB in float32, whose largest tensor has 67 MB."""
    config = LlamaConfig(
        vocab_size=4000,
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=3,
        num_attention_heads=16,
    )
    model = LlamaForCausalLM(config)
    size = 4 * sum(param.numel() for param in model.parameters())
    save_model(tmp_path / "base", model)
    del model
    directory = tmp_path / "run"
    directory.mkdir()
    settings = {
        "model.dtype": "float32",
        "es.restore": "copy",
        "task.name": "conciseness",
        "task.path": None,
    }
    written = journal.Journal(directory / "journal.jsonl", None)
    files = fingerprint(WeightFiles(tmp_path / "base"))
    written.append(journal.Header(str(tmp_path / "base"), files, settings))
    code = (
        "import export_safetensors as tool, shardes.reporting.reporter as r, sys; "
        "tool.main(sys.argv[1:]); print(r.peak_resident_bytes())"
    )
    done = run(
        [sys.executable, "-c", code, str(directory), str(tmp_path / "out")],
        120,
        PYTHONPATH=f"{ROOT}/tools:{ROOT}",
    )
    assert verify(tmp_path / "out").iteration == 0
    assert size > 7.5e8 and int(done.stdout.split()[-1]) < 67e6 + 2**30 < size + 4.4e8


@pytest.fixture(scope="module")
def external(tmp_path_factory, biased_qwen) -> Path:
    folder = tmp_path_factory.mktemp("external")
    torchrun(2, "foreign.py", str(biased_qwen), str(folder))
    convert = [
        sys.executable,
        str(folder / "zero" / "zero_to_fp32.py"),
        str(folder / "zero"),
        str(folder / "converted"),
    ]
    done = run([*convert, "--safe_serialization", "--max_shard_size", "50KB"], 120)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.slow
def test_a_zero_3_checkpoint(export, external, biased_qwen, tmp_path):
    done = export(
        external / "converted", tmp_path / "out", "--base", biased_qwen, "--dtype", "float32"
    )
    assert done.returncode == 0, done.stderr
    exported = load_file(tmp_path / "out" / "model.safetensors")
    expected = load_file(external / "zero.safetensors")
    before = AutoModelForCausalLM.from_pretrained(biased_qwen).state_dict()
    assert exported.keys() == expected.keys()
    assert all(torch.equal(exported[name], expected[name]) for name in exported)
    changed = [
        name
        for name in exported
        if not torch.equal(exported[name], before[name].bfloat16().float())
    ]
    assert len(changed) > len(exported) / 2


@pytest.mark.slow
def test_transformers_distributed_save(export, external, biased_qwen, tmp_path):
    done = export(external / "distributed", tmp_path / "out", "--base", biased_qwen)
    assert done.returncode == 0, done.stderr
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    expected = AutoModelForCausalLM.from_pretrained(biased_qwen).state_dict()
    assert all(torch.equal(exported[name], expected[name]) for name in expected)


MISTAKES = {
    "no such run": (["{run}/none", "{out}"], "none: neither a run directory"),
    "iteration": (["{run}", "{out}", "--iteration", "9"], "--iteration 9: the run in"),
    "size": (["{run}", "{out}", "--shard-size", "5"], "--shard-size 5"),
    "there already": (["{run}", "{run}"], "already exists"),
    "another base": (
        ["{run}", "{out}", "--base", "{tied}"],
        "not the model that the run began with",
    ),
    "not converted": (["{zero}", "{out}", "--base", "{tied}"], "zero_to_fp32.py"),
    "no base": (["{converted}", "{out}"], "as --base"),
    "a wrong base": (["{converted}", "{out}", "--base", "{tied}"], "is it another model's?"),
}


def of_others(mistake: str) -> bool:
    """Whether it is made with a checkpoint that other programs wrote, which takes long to make."""
    return any(name in "".join(MISTAKES[mistake][0]) for name in ("{zero}", "{converted}"))


@pytest.mark.parametrize(
    "mistake",
    [pytest.param(name, marks=pytest.mark.slow if of_others(name) else ()) for name in MISTAKES],
)
def test_mistakes_are_named(request, export, trained, tied_llama, tmp_path, mistake):
    arguments, expected = MISTAKES[mistake]
    places = {"run": trained["float32"], "out": tmp_path / "out", "tied": tied_llama}
    if of_others(mistake):
        external = request.getfixturevalue("external")
        places |= {"zero": external / "zero", "converted": external / "converted"}
    done = export(*(argument.format(**places) for argument in arguments))
    assert done.returncode == 2, done.stderr
    assert expected in done.stderr and "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_truncated_checkpoint_is_named(export, external, biased_qwen, tmp_path):
    spoiled = shutil.copytree(external / "distributed", tmp_path / "distributed")
    file = sorted(spoiled.glob("*.safetensors"))[1]
    file.write_bytes(file.read_bytes()[:2000])
    done = export(spoiled, tmp_path / "out", "--base", biased_qwen)
    assert done.returncode == 2 and str(spoiled) in done.stderr
    file.unlink()
    done = export(spoiled, tmp_path / "out", "--base", biased_qwen)
    assert done.returncode == 2 and str(spoiled) in done.stderr


def test_the_tools_say_what_they_do():
    for main in (
        journal_command.main,
        script("tools/export_safetensors.py").main,
        script("tools/make_countdown.py").main,
    ):
        done = call(main, "--help")
        assert done.returncode == 0 and "default" in done.stdout
