"""launchers/evaluate.py: the figures are those of transformers, on any layout."""

import json
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from launch import deepspeed, script
from shardes import evaluation
from shardes.errors import ConfigError, RunError
from shardes.es.statistics import interval, proportion_interval
from shardes.inference.log_probs import k3, log_probs
from shardes.reporting.report_file import ReportFile

evaluate = script("launchers/evaluate.py")

TASK = """
class Letters:
    def prompts(self, split):
        return {"test": ["hello", "you", "a longer one"], "more": ["x"]}[split]
    def score(self, split, responses):
        return [float(len(text)) for text in responses]
    def correct(self, split, responses):
        return [len(text) % 2 == 0 for text in responses]
"""


@pytest.fixture(scope="module")
def home(tmp_path_factory, uneven_llama) -> Path:
    """A directory with config.yaml, and `tuned`: the base with other weights."""
    home = tmp_path_factory.mktemp("evaluate")
    (home / "task.py").write_text(TASK)
    settings = {
        "model": {"path": str(uneven_llama), "dtype": "float32"},
        "generation": {"max_new_tokens": 6},
        "task": {"path": f"{home}/task.py:Letters"},
        "run": {"dir": str(home / "run")},
    }
    (home / "config.yaml").write_text(yaml.safe_dump(settings))
    tuned = home / "tuned"
    tuned.mkdir()
    for file in uneven_llama.iterdir():
        (tuned / file.name).write_bytes(file.read_bytes())
    generator = torch.Generator().manual_seed(3)
    for file in tuned.glob("*.safetensors"):
        tensors = load_file(file)
        moved = {
            n: t + 0.02 * torch.randn(t.shape, generator=generator) for n, t in tensors.items()
        }
        save_file(moved, file, metadata={"format": "pt"})
    return home


@pytest.fixture(scope="module")
def reports(zygote, home):
    """By number of ranks: one, as a user starts it, and ZeRO 2 × 2 replicas."""
    config, tuned = str(home / "config.yaml"), str(home / "tuned")
    options = ["--model", tuned, "--split", "test", "more", "--samples", "3", "--out"]
    one, four = home / "1.json", home / "4.json"
    done = deepspeed(1, "launchers/evaluate.py", config, *options, str(one))
    assert done.returncode == 0, done.stderr[-3000:]
    assert "test, sampled: reward " in done.stdout
    arguments = [config, "sharding.shard=2", *options, str(four)]
    run = zygote.start(*arguments, ranks=4, log=home / "4.log", tool="evaluate")
    assert run.wait() == [0] * 4, run.text()
    return {ranks: json.loads(out.read_text()) for ranks, out in ((1, one), (4, four))}


def test_every_response_is_there_and_the_same_on_any_layout(reports):
    one, four = (report["splits"] for report in reports.values())
    assert list(one) == list(four) == ["test", "more"]
    assert [len(split["responses"]) for split in one.values()] == [12, 4]
    for split in one:
        for mine, theirs in zip(one[split]["responses"], four[split]["responses"], strict=True):
            assert mine == pytest.approx(theirs, abs=1e-4)


def test_figures_are_those_of_the_responses(reports):
    found = reports[1]["splits"]["test"]
    rows = [row for row in found["responses"] if row["sample"]]
    by_prompt = [[row["kl"] for row in rows if row["prompt"] == prompt] for prompt in range(3)]
    means = [sum(values) / 3 for values in by_prompt]
    assert found["sampled"]["kl"] == pytest.approx(sum(means) / 3)
    assert found["sampled"]["kl"] > 0
    assert found["sampled"]["kl_interval"] == pytest.approx(interval(means))
    right = sum(len(row["response"]) % 2 == 0 for row in rows)
    assert found["sampled"]["accuracy"] == right / 9
    greedy = [row for row in found["responses"] if not row["sample"]]
    assert found["greedy"]["reward"] == pytest.approx(
        sum(len(row["response"]) for row in greedy) / 3
    )
    assert "kl" not in found["greedy"]


def test_the_divergence_is_that_of_transformers_models(home, uneven_llama):
    tuned, base = (
        AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
        for path in (home / "tuned", uneven_llama)
    )
    prompt, response = [5, 6, 7], [8, 9, 10, 11]
    ours = k3(*(log_probs(model, [prompt], [response])[0] for model in (tuned, base)))
    with torch.no_grad():
        t, b = (
            model(torch.tensor([prompt + response]))
            .logits[0, 2:-1]
            .log_softmax(-1)[range(4), response]
            .double()
            for model in (tuned, base)
        )
    assert ours == pytest.approx(torch.mean(torch.exp(b - t) - (b - t) - 1).item(), rel=1e-3)


def test_intervals():
    assert proportion_interval(81, 500) == pytest.approx((0.1323, 0.1969), abs=1e-4)
    assert proportion_interval(0, 10)[0] == pytest.approx(0)
    assert interval([1.0, 2.0, 3.0]) == pytest.approx(
        (2 - 1.959964 / 3**0.5, 2 + 1.959964 / 3**0.5)
    )


@pytest.mark.parametrize(
    "options, message",
    [
        (["--samples", "-1"], "--samples -1: must not be negative"),
        (["--split", "other"], "--split other: the task has no such prompts"),
        (["--out", "/nowhere/x.json"], "there is no directory /nowhere"),
        (["--out", "/tmp"], "--out /tmp: a directory; name a file in it"),
        (["--model", "/nowhere"], "--model /nowhere: no such directory"),
    ],
)
def test_mistakes_are_explained(home, options, message):
    with pytest.raises(ConfigError, match=message):
        evaluate.prepare([str(home / "config.yaml"), *options], SimpleNamespace(rank=0, size=1))


def test_evaluations_beside_each_other_overwrite_none(home, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    job = SimpleNamespace(rank=0, size=1)
    for number, prepared in enumerate(
        [evaluate.prepare([str(home / "config.yaml")], job) for _ in range(2)]
    ):
        evaluation.write(prepared, {"test": {"number": number}}, 1.0)
        assert json.loads(prepared.out.path.read_text())["splits"]["test"]["number"] == number
    assert {file.name for file in tmp_path.iterdir()} == {"evaluation.json", "evaluation_2.json"}


def test_the_report_goes_where_a_path_leads(tmp_path):
    """A link stays one; a pipe is written to if somebody reads it, and is not waited for."""
    target, link, pipe = (tmp_path / name for name in ("target.json", "link.json", "pipe"))
    link.symlink_to("target.json")
    ReportFile(link).write("{}")
    assert link.is_symlink() and target.read_text() == "{}"
    output = tmp_path / "output"
    with open(output, "w") as file:
        (tmp_path / "stdout").symlink_to(f"/proc/self/fd/{file.fileno()}")
        file.write("before\n")
        file.flush()
        stdout = ReportFile(tmp_path / "stdout")
        stdout.write("{}")
    assert output.read_text() == "before\n{}" and stdout.failed == Path("evaluation.failed.json")
    os.mkfifo(pipe)
    with pytest.raises(RunError, match="pipe: cannot be written"):
        ReportFile(pipe).write("{}")
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    ReportFile(pipe).write("{}")
    assert os.read(reader, 10) == b"{}"
    os.close(reader)
