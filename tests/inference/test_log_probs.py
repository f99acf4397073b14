"""Log-probabilities and the k3 estimator; engines/test_layouts.py compares layouts."""

import math

import pytest
import torch
from transformers import AutoModelForCausalLM

from shardes.inference import log_probs as log_probs_module
from shardes.inference.choosing import gumbel
from shardes.inference.log_probs import k3, log_probs


def test_k3_is_the_formula():
    tuned, base = [-1.0, -2.0], [-1.5, -0.5]
    ratios = [math.exp(b - t) for t, b in zip(tuned, base, strict=True)]
    assert k3(tuned, base) == pytest.approx(sum(r - math.log(r) - 1 for r in ratios) / 2)
    assert k3(tuned, tuned) == 0


def test_k3_on_samples_estimates_the_divergence():
    torch.manual_seed(0)
    tuned, base = torch.randn(2, 50).mul(0.5).log_softmax(-1)
    exact = torch.sum(tuned.exp() * (tuned - base)).item()
    drawn = [
        (tuned + gumbel([seed], 0, 50, tuned.device)[0]).argmax().item() for seed in range(4000)
    ]
    estimate = k3(tuned[drawn].tolist(), base[drawn].tolist())
    assert estimate == pytest.approx(exact, rel=0.1)


def test_the_batches_do_not_change_the_result(tied_llama, monkeypatch):
    model = AutoModelForCausalLM.from_pretrained(tied_llama, dtype=torch.float32).eval()
    prompts = [list(range(5, 5 + n)) for n in (3, 9, 1, 4)]
    responses = [list(range(60, 60 + n)) for n in (7, 2, 5, 5)]
    together = log_probs(model, prompts, responses)
    monkeypatch.setattr(log_probs_module, "MAX_LOGITS", 1)
    for one, other in zip(log_probs(model, prompts, responses), together, strict=True):
        assert one == pytest.approx(other, abs=1e-5)
