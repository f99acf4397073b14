"""Greedy decoding, compared with transformers' `generate` and with vLLM."""

import json
import os
import statistics
import subprocess
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.measure import Row, ratios, seconds
from shardes.engines.linear import use_own_forward
from shardes.inference.generation import decoder
from shardes.inference.prompts import encode

PLACES = (
    "France Japan Italy Spain Egypt Peru Norway Kenya Chile Greece Cuba Iran Iraq Nepal Qatar Oman"
)
THINGS = "a lighthouse, a clock, an otter, a bridge, a comet, a garden, a violin, a harbour"
SHORT = ["What is the capital of {}? Answer with one word.", "Is {} in Europe? Answer yes or no."]
LONG = [
    "Write a long story about {}.",
    "Explain how one draws {}.",
    "Write an essay on {}.",
    "Praise {} in verse.",
]


def prompts(count: int) -> list[list[dict[str, str]]]:
    """At most 64 prompts, alternately with short and with long answers."""
    short = [text.format(place) for text in SHORT for place in PLACES.split()]
    long = [text.format(thing) for text in LONG for thing in THINGS.split(", ")]
    mixed = [text for pair in zip(short, long, strict=True) for text in pair]
    return [[{"role": "user", "content": text}] for text in mixed[:count]]


def rows(directory: Path, toy: bool) -> Iterator[Row]:
    """Responses of very different lengths, compared with transformers' `generate`."""
    tokenizer, model = _load(directory)
    plain = deepcopy(model)
    use_own_forward(model)  # as the engines do
    count, longest = (8, 12) if toy else (64, 256)
    encoded = encode(tokenizer, prompts(count))
    decode = decoder(tokenizer, model.generation_config, max_new_tokens=longest)
    batch = tokenizer.pad({"input_ids": encoded}, return_tensors="pt")

    def generate():
        with torch.no_grad():
            plain.generate(**batch, do_sample=False, max_new_tokens=longest)

    lengths = sorted(map(len, decode(model, encoded)))
    values, time = ratios(lambda: decode(model, encoded), generate, 2 if toy else 5)
    note = (
        f"answers of {lengths[0]} to {lengths[-1]} tokens, "
        f"median {statistics.median(lengths):.0f}; {sum(lengths) / time:.0f} tokens/s"
    )
    what = f"generation, {count} prompts, at most {longest} new tokens"
    yield Row("generation", what, "transformers' generate", 2, values, note=note)


def against_vllm(directory: Path, toy: bool, vllm: str | None) -> Row:
    """Responses of equal lengths, compared with vLLM, which runs in an environment of its own."""
    count, longest = (4, 8) if toy else (32, 64)
    row = Row("vllm", f"generation, {count} prompts × {longest} tokens", "vLLM on CPU", 1.5)
    if vllm is None:
        row.note = "needs vLLM: name the Python of its environment with --vllm PYTHON"
        return row
    tokenizer, model = _load(directory)
    use_own_forward(model)
    encoded = encode(tokenizer, prompts(count))
    decode = decoder(tokenizer, model.generation_config, max_new_tokens=longest)
    decode.eos = frozenset()  # every response has the maximum length, as with vLLM
    decode(model, encoded)
    rates = [count * longest / seconds(lambda: decode(model, encoded)) for _ in range(5)]
    others, row.note = vllm_rates(vllm, directory, encoded, longest, "float32", 5)
    if others:
        row.ratios = [rate / other for rate, other in zip(rates, others, strict=True)]
        row.note = (
            f"{statistics.median(rates):.0f} against {statistics.median(others):.0f} tokens/s, "
            "one after the other"
        )
    return row


def vllm_rates(
    python: str, directory: Path, prompts: list[list[int]], longest: int, dtype: str, repeats: int
) -> tuple[list[float], str]:
    """Tokens/s of each repeat with vLLM, and what went wrong if there are none.

    Args:
        python: of the environment that has vLLM.
        longest: tokens of every response.
    """
    request = {"model": str(directory), "prompts": prompts, "longest": longest}
    request |= {"dtype": dtype, "repeats": repeats}
    # vLLM's defaults for binding threads and reserving memory do not suit every machine.
    environ = os.environ | {"VLLM_CPU_KVCACHE_SPACE": "2", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    done = subprocess.run(
        [python, str(Path(__file__).with_name("vllm_worker.py"))],
        input=json.dumps(request),
        env=environ,
        capture_output=True,
        text=True,
        timeout=1200,
    )
    if done.returncode:
        return [], f"vLLM failed: {done.stderr.strip().splitlines()[-1][:200]}"
    output = next(line for line in done.stdout.splitlines() if line.startswith("["))
    return json.loads(output), ""


def _load(directory: Path):
    tokenizer = AutoTokenizer.from_pretrained(directory, padding_side="left")
    return tokenizer, AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
