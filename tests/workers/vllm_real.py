"""A real model on engine=vllm beside engine=fsdp, on one rank: MODEL"""

# ruff: noqa: E402 (threads are set before torch is imported)

import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[2])]

from shardes.distributed import environment

environment.prepare()

import torch
from transformers import AutoTokenizer, GenerationConfig

from benchmarks.generation import prompts
from launch import report
from shardes.config.schema import Config, DType, EngineName, ModelConfig, Restore
from shardes.distributed.world import World, form_replica, join_job
from shardes.engines import build, open_model
from shardes.engines.vllm import VLLMEngine
from shardes.es.center import open_center
from shardes.es.population import Member, member_seeds
from shardes.es.update import Update
from shardes.inference.engine_generation import Generation, ModuleGeneration
from shardes.inference.generation import decoder
from shardes.inference.prompts import encode
from shardes.inference.vllm_generation import VLLMGeneration

NEW_TOKENS = 32
COUNTS = {DType.float32: 32, DType.bfloat16: 4}  # of prompts; a CPU is slow in 16 bits
MEMBER = Member(7, 0.002)
UPDATE = Update(member_seeds(5, 0, 3), [0.001, -0.002, 0.003])


def main(directory: Path) -> None:
    world = form_replica(join_job(60), 1, 1, 1, 60)
    report({"rank": 0} | {dtype.value: compared(directory, world, dtype) for dtype in COUNTS})


def compared(directory: Path, world: World, dtype: DType) -> dict:
    """What both engines answer as the base and as a member, and their centers' digests."""
    config = Config(EngineName.vllm, ModelConfig(str(directory), dtype))
    config.vllm.enforce_eager, config.vllm.cache_size = True, 0.5
    tokenizer = AutoTokenizer.from_pretrained(directory)
    generation = GenerationConfig.from_pretrained(directory)
    plain = decoder(tokenizer, generation, max_new_tokens=NEW_TOKENS)
    asked = encode(tokenizer, prompts(COUNTS[dtype]))
    files, module = open_model(directory, getattr(torch, dtype.value))
    vllm = VLLMEngine(config, module, files, world)
    config.engine = EngineName.fsdp
    fsdp = build(config, open_model(directory, getattr(torch, dtype.value))[1], world)
    engines = {
        "vllm": (vllm, VLLMGeneration(vllm, plain)),
        "fsdp": (fsdp, ModuleGeneration(world, fsdp, plain)),
    }
    engines["vllm"][1].check_writes()
    found: dict = {name: {} for name in engines}
    for name, (engine, answers) in engines.items():
        center = open_center(Restore.copy, engine.shards, world, files)
        results = found[name]
        results["base"] = center.digest()
        with center.perturbed(MEMBER):
            results["member"] = answers.responses(asked)
        center.update(UPDATE)
        results["updated"] = center.digest()
        results["responses"] = answers.responses(asked)
        results["log_probs"] = answers.log_probs(asked, results["responses"])
    found["lost"] = [
        lost(engines["fsdp"][1], prompt, mine, theirs)
        for prompt, mine, theirs in zip(
            asked, found["vllm"]["responses"], found["fsdp"]["responses"], strict=True
        )
        if mine != theirs
    ]
    return found


def lost(answers: Generation, prompt: list[int], mine: list[int], theirs: list[int]) -> float:
    """How much less probable, as a log-probability, the first token of vLLM that differs is."""
    same = next(i for i, pair in enumerate(zip(mine, theirs, strict=False)) if pair[0] != pair[1])
    cut = same + 1
    values = answers.log_probs([prompt, prompt], [theirs[:cut], mine[:cut]])
    return values[0][-1] - values[1][-1]


if __name__ == "__main__":
    main(Path(sys.argv[1]))
