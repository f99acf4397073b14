"""SmolLM2 under tensor parallelism: 9 heads, 3 key-value heads, tied embeddings.

With 2 tensor ranks its heads are split unevenly, with 3 evenly.
"""

import sys

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from launch import ROOT, run, torchrun
from shardes.tasks.conciseness import Conciseness

pytestmark = pytest.mark.model
LAYOUTS = {  # shard, tensor
    "ZeRO 2": (2, 1),
    "TP 2": (1, 2),
    "TP 3": (1, 3),
    "ZeRO 2 × TP 2": (2, 2),
}


@pytest.fixture(scope="module")
def directory():
    done = run([sys.executable, "-m", "shardes.commands.cli", "get-smollm2"], seconds=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return ROOT / "models" / "SmolLM2-135M-Instruct"


@pytest.fixture(scope="module")
def expected(directory) -> list[list[int]]:
    """transformers' own greedy tokens, up to the end of each response."""
    tokenizer = AutoTokenizer.from_pretrained(directory, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    batch = tokenizer.apply_chat_template(
        Conciseness().prompts("test"),
        add_generation_prompt=True,
        return_dict=True,
        return_tensors="pt",
        padding=True,
    )
    out = model.generate(**batch, do_sample=False, max_new_tokens=16)[
        :, batch["input_ids"].shape[1] :
    ].tolist()
    eos = model.generation_config.eos_token_id
    return [row[: row.index(eos) + 1] if eos in row else row for row in out]


@pytest.mark.parametrize(
    "layout",
    [pytest.param(name, marks=() if name == "TP 3" else pytest.mark.slow) for name in LAYOUTS],
)
def test_tokens_and_memory(directory, expected, layout):
    shard, tensor = LAYOUTS[layout]
    for result in torchrun(
        shard * tensor, "real_model.py", str(shard), str(tensor), str(directory)
    ):
        assert result["tokens"] == expected
        # No rank holds the whole model, but at most its slice, its shard and one tensor.
        assert result["peak"] <= result["slice"] + result["shard"] + result["largest"], result
