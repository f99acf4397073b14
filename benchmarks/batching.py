"""Greedy decoding of a ragged batch: the project's decoder, engine=vllm, and transformers'
continuous batching (`generate_batch`), in turns.

    DIRECTORY/bin/python -m benchmarks.batching [--model DIR] [--out DIR] [--toy]

It runs in an environment that has vLLM: `sh tools/vllm_environment.sh DIRECTORY` makes one. All
three are eager: nothing is compiled. Writes batching.json with every repeat.
"""

# ruff: noqa: E402 (threads are set before torch is imported)

import argparse
import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

from shardes.distributed import environment

environment.prepare()

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    ContinuousBatchingConfig,
    GenerationConfig,
    PreTrainedModel,
)

from benchmarks.generation import prompts
from benchmarks.measure import seconds
from shardes.config.schema import Config, DType, EngineName, ModelConfig
from shardes.distributed.world import form_replica, join_job
from shardes.engines import open_model
from shardes.engines.linear import use_own_forward
from shardes.engines.vllm import VLLMEngine
from shardes.inference.generation import Decoder, decoder
from shardes.inference.prompts import encode
from shardes.inference.vllm_generation import VLLMGeneration
from shardes.sharding.weight_files import load

PAGE, STEP_TOKENS = 32, 1024  # of generate_batch: a page of its cache, and a step at most
Answer = Callable[[], list[list[int]]]


def ways(directory: Path, count: int, longest: int) -> dict[str, Answer]:
    """By name, what answers the same prompts."""
    tokenizer = AutoTokenizer.from_pretrained(directory, padding_side="left")
    generation = GenerationConfig.from_pretrained(directory)
    asked = encode(tokenizer, prompts(count))
    decode = decoder(tokenizer, generation, max_new_tokens=longest)
    module = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    use_own_forward(module)  # as the engines do
    plain = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    vllm = _vllm(directory, decode)
    return {
        "decoder": lambda: decode(module, asked),
        "vllm": lambda: vllm.responses(asked),
        "generate_batch": lambda: _generate_batch(plain, asked, longest, decode.eos),
    }


def _vllm(directory: Path, decode: Decoder) -> VLLMGeneration:
    config = Config(EngineName.vllm, ModelConfig(str(directory), DType.float32))
    config.vllm.enforce_eager, config.vllm.cache_size = True, 2.0
    files, module = open_model(directory, torch.float32)
    engine = VLLMEngine(config, module, files, form_replica(join_job(60), 1, 1, 1, 60))
    load(files, engine.shards)
    return VLLMGeneration(engine, decode)


def _generate_batch(
    module: PreTrainedModel, asked: list[list[int]], longest: int, eos: frozenset[int]
) -> list[list[int]]:
    config = GenerationConfig(
        max_new_tokens=longest, do_sample=False, eos_token_id=sorted(eos), pad_token_id=min(eos)
    )
    longest_row = max(map(len, asked)) + longest
    cache = ContinuousBatchingConfig(  # by itself it takes most of the memory that is free
        page_size=PAGE,
        num_blocks=len(asked) * (-(-longest_row // PAGE) + 1),
        max_batch_tokens=STEP_TOKENS,
        use_cuda_graph=False,
    )
    outputs = module.generate_batch(
        asked, generation_config=config, continuous_batching_config=cache, progress_bar=False
    )
    by_prompt = {tuple(output.prompt_ids): output.generated_tokens for output in outputs.values()}
    return [by_prompt[tuple(prompt)] for prompt in asked]


def measure(answers: dict[str, Answer], repeats: int) -> dict[str, dict]:
    """By way: seconds of each repeat, tokens, how many answers are the first way's, and why a way
    does not run.
    """
    found: dict[str, dict] = {}
    for name, answer in answers.items():  # the first call of each is not timed
        try:
            responses = answer()
        except Exception as error:
            found[name] = {"error": f"{type(error).__name__}: {error}"[:300]}
            continue
        first = found["decoder"]["responses"] if found else responses
        same = sum(a == b for a, b in zip(responses, first, strict=True))
        found[name] = {"responses": responses, "same": same, "seconds": []}
    running = [name for name, values in found.items() if "seconds" in values]
    for _ in range(repeats):
        for name in running:
            found[name]["seconds"].append(seconds(answers[name]))
            print(f"{name}: {found[name]['seconds'][-1]:.1f} s", file=sys.stderr, flush=True)
    for values in found.values():
        if responses := values.pop("responses", None):
            lengths = sorted(map(len, responses))
            values |= {"tokens": sum(lengths), "shortest": lengths[0], "longest": lengths[-1]}
    return found


def summary(found: dict[str, dict], count: int) -> list[str]:
    """A line per way; ratios are medians of the repeats' ratios to the decoder's seconds."""
    lines, base = [], found["decoder"]["seconds"]
    for name, values in found.items():
        if "error" in values:
            lines.append(f"{name}: does not run: {values['error']}")
            continue
        ratios = [mine / other for mine, other in zip(base, values["seconds"], strict=True)]
        middle = statistics.median(values["seconds"])
        lines.append(
            f"{name}: {middle:.1f} s, {values['tokens'] / middle:.0f} tokens/s; "
            f"{statistics.median(ratios):.2f} times the decoder's speed ({min(ratios):.2f} to "
            f"{max(ratios):.2f}); {values['same']} of {count} answers are the decoder's"
        )
    return lines


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.batching", description=__doc__.splitlines()[0]
    )
    add = parser.add_argument
    add("--model", type=Path, default=Path("models/SmolLM2-135M-Instruct"))
    add("--out", type=Path, default=Path("benchmarks/results"))
    add("--toy", action="store_true", help="small sizes, to check that every way runs")
    options = parser.parse_args(argv)
    count, longest, repeats = (4, 8, 2) if options.toy else (32, 128, 5)
    found = measure(ways(options.model, count, longest), repeats)
    print(*summary(found, count), sep="\n", flush=True)
    options.out.mkdir(parents=True, exist_ok=True)
    sizes = {"prompts": count, "longest": longest, "threads": torch.get_num_threads()}
    text = json.dumps(sizes | {"torch": torch.__version__, "ways": found}, indent=1)
    (options.out / "batching.json").write_text(text + "\n")
    return 0


if __name__ == "__main__":
    environment.run(main)
