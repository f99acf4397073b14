"""A newcomer's path, from a clean clone in a new virtual environment, by what the README says."""

import json
import os
import re
import subprocess
import venv

import pytest
import torch

from launch import ROOT, run

pytestmark = [pytest.mark.slow, pytest.mark.model]

README = (ROOT / "README.md").read_text(encoding="utf-8")
FEWER = "es.population_size=4 es.iterations=2 generation.max_new_tokens=12"
LOAD = """
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained("tuned")
tokenizer = AutoTokenizer.from_pretrained("tuned")
words = tokenizer("Good morning", return_tensors="pt")
text = tokenizer.decode(model.generate(**words, max_new_tokens=4)[0])
print(model.dtype, len(text) > len("Good morning"))
"""


@pytest.fixture(scope="module")
def shell(tmp_path_factory):
    """Runs a line in a clone, in an environment that holds nothing but torch; returns what it
    printed.
    """
    folder = tmp_path_factory.mktemp("newcomer")
    clone, environment = folder / "shardes", folder / "venv"
    subprocess.run(["git", "clone", "--quiet", str(ROOT), str(clone)], check=True)
    venv.create(environment, with_pip=True)
    environ = {"PATH": f"{environment}/bin:{os.environ['PATH']}", "PYTHONPATH": ""}

    def shell(line: str, seconds: float = 300) -> str:
        done = run(["bash", "-euo", "pipefail", "-c", line], seconds, cwd=clone, **environ)
        assert done.returncode == 0, f"{line}\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
        return done.stdout

    shell(f"pip install --quiet torch=={torch.__version__.partition('+')[0]}", 1200)
    shell.clone = clone
    return shell


def block(language: str, holding: str) -> str:
    """The README's code of a language that has some text in it."""
    (found,) = (
        text
        for text in re.findall(rf"^```{language}\n(.*?)^```", README, re.M | re.S)
        if holding in text
    )
    return found


def test_from_installation_to_a_tuned_model_in_transformers(shell):
    (quickstart,) = re.findall(
        r"^    (pip install .*\\\n.*configs/quickstart\.yaml --gpus 2)$", README, re.MULTILINE
    )
    told = shell(f"{quickstart} {FEWER}", 1800)
    assert "done: member reward" in told

    (shell.clone / "mine.yaml").write_text(config := block("yaml", "name: jsonl"))
    (line,) = re.findall(r"train\.jsonl +# (\{.*\})$", config, re.MULTILINE)
    for file in ("train.jsonl", "test.jsonl"):
        (shell.clone / file).write_text(line + "\n")
    (shell.clone / "my_reward.py").write_text(block("python", "def score(response, example)"))
    keys = f"model.path=models/SmolLM2-135M-Instruct run.dir=runs/mine {FEWER}"
    shell(f"shardes train mine.yaml --gpus 2 --dry-run {keys}")
    shell(f"shardes train mine.yaml --gpus 2 {keys}")
    assert json.loads((shell.clone / "runs/mine/summary.json").read_text())["iterations"] == 2

    snapshot = "runs/mine/snapshots/iteration_2"
    shell(f"shardes evaluate mine.yaml --gpus 2 --model {snapshot} --out judged.json {keys}")
    judged = json.loads((shell.clone / "judged.json").read_text())
    assert isinstance(judged["splits"]["test"]["greedy"]["reward"], float)

    shell("shardes export runs/mine tuned --dtype bfloat16")
    assert shell(f"python -c '{LOAD}'").split() == ["torch.bfloat16", "True"]
