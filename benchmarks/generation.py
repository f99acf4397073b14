"""Greedy decoding against transformers' generate and, where it is installed, vLLM."""

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
from shardes.engines.cpu import speed_up
from shardes.generation import decoder, encode

PLACES = "France Japan Italy Spain Egypt Peru Norway Kenya Chile Greece Cuba Iran Iraq Nepal Qatar Oman"
THINGS = "a lighthouse, a clock, an otter, a bridge, a comet, a garden, a violin, a harbour"
SHORT = ["What is the capital of {}? Answer with one word.", "Is {} in Europe? Answer yes or no."]
LONG = ["Write a long story about {}.", "Explain how one draws {}.", "Write an essay on {}.", "Praise {} in verse."]


def prompts(count: int) -> list[list[dict[str, str]]]:
    """Questions whose answers are short and requests whose answers are long, in turns: at most 64."""
    short = [text.format(place) for text in SHORT for place in PLACES.split()]
    long = [text.format(thing) for text in LONG for thing in THINGS.split(", ")]
    mixed = [text for pair in zip(short, long, strict=True) for text in pair]
    return [[{"role": "user", "content": text}] for text in mixed[:count]]


def rows(directory: Path, toy: bool) -> Iterator[Row]:
    """Answers that end at very different lengths."""
    tokenizer, model = _load(directory)
    plain = deepcopy(model)
    speed_up(model)  # as the engines do
    count, longest = (8, 12) if toy else (64, 256)
    asked = encode(tokenizer, prompts(count))
    decode = decoder(tokenizer, model.generation_config, max_new_tokens=longest)
    batch = tokenizer.pad({"input_ids": asked}, return_tensors="pt")

    def theirs():
        with torch.no_grad():
            plain.generate(**batch, do_sample=False, max_new_tokens=longest)

    lengths = sorted(map(len, decode(model, asked)))
    note = f"answers of {lengths[0]} to {lengths[-1]} tokens, median {statistics.median(lengths):.0f}"
    found, took = ratios(lambda: decode(model, asked), theirs, 2 if toy else 5)
    note += f"; {sum(lengths) / took:.0f} tokens/s"
    what = f"generation, {count} prompts, at most {longest} new tokens"
    yield Row("generation", what, "transformers' generate", 2, found, note=note)


def against_vllm(directory: Path, toy: bool, vllm: str | None) -> Row:
    """Answers of one length, here and through vLLM in an environment of its own."""
    count, longest = (4, 8) if toy else (32, 64)
    row = Row("vllm", f"generation, {count} prompts × {longest} tokens", "vLLM on CPU", 1.5)
    if vllm is None:
        row.note = "no vLLM given: --vllm PYTHON names an environment's"
        return row
    tokenizer, model = _load(directory)
    speed_up(model)
    asked = encode(tokenizer, prompts(count))
    decode = decoder(tokenizer, model.generation_config, max_new_tokens=longest)
    decode.eos = frozenset()  # every answer runs to the limit, in both
    decode(model, asked)
    mine = [count * longest / seconds(lambda: decode(model, asked)) for _ in range(5)]
    script = Path(__file__).with_name("vllm_worker.py")
    request = json.dumps({"model": str(directory), "prompts": asked, "longest": longest, "repeats": 5})
    # Its own ways of binding threads and taking memory do not fit every machine.
    environ = os.environ | {"VLLM_CPU_KVCACHE_SPACE": "2", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    done = subprocess.run([vllm, str(script)], input=request, env=environ, capture_output=True, text=True, timeout=1200)
    if done.returncode:
        row.note = f"vLLM failed: {done.stderr.strip().splitlines()[-1][:200]}"
        return row
    other = json.loads(next(line for line in done.stdout.splitlines() if line.startswith("[")))
    row.ratios = [a / b for a, b in zip(mine, other, strict=True)]
    row.note = f"{statistics.median(mine):.0f} against {statistics.median(other):.0f} tokens/s, one after the other"
    return row


def _load(directory: Path):
    tokenizer = AutoTokenizer.from_pretrained(directory, padding_side="left")
    return tokenizer, AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
