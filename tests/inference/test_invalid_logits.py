"""Logits that are NaN or infinite end a response, and the run names them or counts them."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, GenerationConfig

from models import byte_tokenizer
from shardes.config.schema import DType, TaskConfig
from shardes.errors import ConfigError
from shardes.inference.generation import decoder
from shardes.inference.log_probs import log_probs
from shardes.inference.sampler import invalid_logits
from shardes.rewards.scoring import Scorer
from shardes.tasks import load_task

PROMPTS = [[1, 2, 3], [40, 41], [9] * 8, [7]]


@pytest.fixture(scope="module")
def model(tied_llama):
    return AutoModelForCausalLM.from_pretrained(tied_llama, dtype=torch.float32).eval()


@pytest.mark.parametrize("generation", [{}, {"repetition_penalty": 1.2}], ids=["plain", "penalty"])
@pytest.mark.parametrize("seeds", [None, [1, 2, 3, 4]], ids=["greedy", "sampled"])
@pytest.mark.parametrize("bad", ["nan", "inf", "all -inf", "one -inf"])
def test_a_row_that_is_not_finite_ends_alone(model, bad, seeds, generation):
    def spoil(module, args, kwargs, output):
        for row, position in enumerate(kwargs["position_ids"][:, -1].tolist()):
            if position == 11:  # only the longest prompt gets there
                cells = slice(None) if bad == "all -inf" else slice(5, 6)
                output.logits[row, -1, cells] = float(bad.split()[-1])

    decode = decoder(byte_tokenizer(), GenerationConfig(**generation), max_new_tokens=6)
    expected = decode(model, PROMPTS, seeds=seeds)
    hook = model.register_forward_hook(spoil, with_kwargs=True)
    responses = decode(model, PROMPTS, seeds=seeds)
    hook.remove()
    if bad != "one -inf":  # which some models use as a mask
        expected[2] = []
    assert [responses[row] for row in (0, 1, 3)] == [expected[row] for row in (0, 1, 3)]
    assert (responses[2] == []) == (bad != "one -inf")


def test_float16_that_overflows(tied_llama):
    model = AutoModelForCausalLM.from_pretrained(tied_llama, dtype=torch.float16).eval()
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight *= 3e4
        model.model.layers[0].mlp.down_proj.weight *= 3e4
    decode = decoder(byte_tokenizer(), GenerationConfig(), max_new_tokens=3)
    assert decode(model, PROMPTS) == [[]] * 4
    assert log_probs(model, PROMPTS, [[]] * 4) == [[]] * 4


class Lengths:
    def prompts(self, split):
        return ["p", "q", "r"]

    def score(self, split, responses):
        return [float(len(response)) for response in responses]


def make_scorer(tmp_path, kind: str, on_error) -> Scorer:
    if kind == "score":
        return Scorer(TaskConfig(on_error=on_error), Lengths(), tmp_path / "failed")
    (tmp_path / "my_reward.py").write_text(
        "def reward(response, example):\n    return len(response) ** 2 / len(response)\n"
    )
    data, reward = str(tmp_path / "data.jsonl"), f"{tmp_path}/my_reward.py:reward"
    rows = [json.dumps({"prompt": prompt}) for prompt in "pqr"]
    (tmp_path / "data.jsonl").write_text("\n".join(rows))
    settings = TaskConfig(name="jsonl", reward=reward, workers=1, on_error=on_error)
    task = load_task("jsonl", None, data, data, reward=reward)
    return Scorer(settings, task, tmp_path / "failed")


@pytest.mark.parametrize("kind", ["score", "reward"])
def test_a_response_that_is_not_complete_gets_on_error_or_ends_the_run(tmp_path, kind):
    tokens, texts = [[1, 2], [], [3]], ["abc", "", "de"]
    failures = invalid_logits(tokens, "member 3 of iteration 2 (seed 77)", DType.float16)
    message = (
        r"prompt 1 of train: member 3 of iteration 2 \(seed 77\) gave logits that are NaN or "
        r"infinite, in model\.dtype=float16; .*; to give such responses a fixed reward"
    )
    with pytest.raises(ConfigError, match=message):
        make_scorer(tmp_path, kind, "fail")("train", texts, None, failures)
    scorer = make_scorer(tmp_path, kind, "-4.5")
    assert scorer("train", texts, None, failures) == [3.0, -4.5, 2.0]
    assert scorer.take_failures() == {"scoring_failures": 1, "scoring_timeouts": 0}
    assert scorer("train", [""] * 3, None, dict.fromkeys(range(3), "why")) == [-4.5] * 3
    assert scorer.take_failures()["scoring_failures"] == 3
    scorer.close()
