"""Regions of models with up to 405 billion parameters on 64 ranks, from config.json alone."""

import json
import sys

import pytest

from launch import ROOT, run

DATA = ROOT / "tests" / "data"
DENSE = ["llama-3.1-8b", "llama-3.1-70b", "llama-3.1-405b", "qwen2.5-72b"]
CASES = {  # engine, tensor degree (the shard degree is 64 / tensor), models
    "ZeRO 64": ("deepspeed", 1, [*DENSE, "qwen3-30b-a3b"]),
    "ZeRO 32 × TP 2": ("deepspeed", 2, DENSE),
    "ZeRO 8 × TP 8": ("deepspeed", 8, DENSE),
    "FSDP 64": ("fsdp", 1, [*DENSE, "qwen3-30b-a3b"]),
    "FSDP 16 × TP 4": ("fsdp", 4, [*DENSE, "qwen3-30b-a3b"]),
    "FSDP 8 × TP 8": ("fsdp", 8, DENSE),
}
FAST = "ZeRO 8 × TP 8"
PARAMETERS = {  # as published, in billions
    "llama-3.1-8b": 8.03,
    "llama-3.1-70b": 70.55,
    "llama-3.1-405b": 405.85,
    "qwen2.5-72b": 72.71,
    "qwen3-30b-a3b": 30.53,
}


@pytest.mark.parametrize(
    "case", [pytest.param(name, marks=() if name == FAST else pytest.mark.slow) for name in CASES]
)
def test_every_element_is_held_once_and_evenly(case, tmp_path):
    engine, tensor, models = CASES[case]
    command = [
        sys.executable,
        "tests/workers/real_sizes.py",
        engine,
        str(tensor),
        *(str(DATA / name) for name in models),
    ]
    done = run(command, seconds=200, RESULTS=str(tmp_path), LOCAL_RANK="0")
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "0.json").read_text())
    for name in models:
        assert result[name]["total"] / 1e9 == pytest.approx(PARAMETERS[name], abs=0.01)
        assert result[name]["wrong"] == []
        assert result[name]["excess"] < 0.02, (name, result[name])
