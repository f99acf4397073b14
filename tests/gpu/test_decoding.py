"""The decoder beside transformers' `generate`, both on the device."""

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from shardes.engines.linear import use_own_forward
from shardes.inference.generation import decoder

pytestmark = pytest.mark.gpu
NEW_TOKENS = 32


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_tokens_of_generate(device, tied_llama, dtype, record_property):
    tokenizer = AutoTokenizer.from_pretrained(tied_llama, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(tied_llama, dtype=dtype).eval().to(device)
    generator = torch.Generator().manual_seed(0)
    prompts = [
        torch.randint(256, (5 + 3 * row % 40,), generator=generator).tolist() for row in range(48)
    ]
    batch = tokenizer.pad({"input_ids": prompts}, return_tensors="pt").to(device)
    out = model.generate(**batch, do_sample=False, max_new_tokens=NEW_TOKENS)
    rows, end = out[:, batch["input_ids"].shape[1] :].tolist(), model.generation_config.eos_token_id
    expected = [row[: row.index(end) + 1] if end in row else row for row in rows]
    use_own_forward(model)
    decode = decoder(tokenizer, model.generation_config, max_new_tokens=NEW_TOKENS)
    answers = decode(model, prompts)
    share = 100 * sum(map(list.__eq__, answers, expected)) / len(prompts)
    record_property(f"responses of generate, {dtype}, percent", share)
    assert dtype != torch.float32 or share >= 90
