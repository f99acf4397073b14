"""Low-rank members of tiny models side by side on engine=vllm, and alone: TENSOR RANK MODEL..."""

# ruff: noqa: E402 (threads are set before torch is imported)

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from shardes.distributed import environment

environment.prepare()

import torch
from transformers import AutoTokenizer, GenerationConfig

from launch import report
from shardes.answers import OneBatch
from shardes.clock import Clock
from shardes.config.schema import (
    Config,
    DType,
    EngineName,
    ESConfig,
    ModelConfig,
    Noise,
    Restore,
    VLLMConfig,
)
from shardes.distributed.store import no_poll
from shardes.distributed.world import World, form_replica, join_job
from shardes.engines import open_model
from shardes.engines.vllm import VLLMEngine
from shardes.errors import ConfigError
from shardes.es.adapted_members import AdaptedMembers, adapter_slots
from shardes.es.center import open_center
from shardes.es.population import Iteration, Member
from shardes.inference.generation import decoder
from shardes.inference.sampler import Sampler
from shardes.inference.vllm_generation import VLLMGeneration

PROMPTS = [[5, 6, 7, 8], [9, 10], [11, 12] * 70]
ENDS = GenerationConfig(eos_token_id=1)
MEMBERS = [Member(7, 0.1), Member(7, -0.1), Member(8, 0.05)]


def main(tensor: int, rank: int, directories: list[Path]) -> None:
    job = join_job(60)
    world = form_replica(job, 1, 1, tensor, 60)
    report(
        {"rank": job.rank}
        | {directory.name: answered(directory, world, tensor, rank) for directory in directories}
    )


def answered(directory: Path, world: World, tensor: int, rank: int) -> dict | str:
    """What each member answers, side by side and alone; or why members cannot share the model."""
    es = ESConfig(noise=Noise.low_rank, rank=rank, population_size=len(MEMBERS))
    config = Config(
        EngineName.vllm,
        ModelConfig(str(directory), DType.float32),
        es=es,
        vllm=VLLMConfig(cache_size=0.05, enforce_eager=True),
    )
    config.sharding.tensor = tensor
    files, module = open_model(directory, torch.float32)
    engine = VLLMEngine(config, module, files, world, adapter_slots(es))
    decode = decoder(AutoTokenizer.from_pretrained(directory), ENDS, max_new_tokens=16)
    generation = VLLMGeneration(engine, decode)
    generation.check_writes()
    try:
        together = AdaptedMembers(module, engine, es)
        together.check(generation)
    except ConfigError as error:
        return str(error)
    center = open_center(Restore.copy, engine.shards, world, files, rank=rank)
    sampler = Sampler(world, generation, decode.tokenizer)
    answers = OneBatch(config, world, center, sampler, together, Clock())
    iteration = Iteration(0, "", 0.1, 0.1, [7, 8], MEMBERS, None, PROMPTS)
    found: dict[int, list] = {}
    group = range(len(MEMBERS))
    for _ in range(2):
        answers.generate(iteration, group, no_poll, found.__setitem__)
    alone = []
    for member in MEMBERS:
        with center.perturbed(member):
            alone.append(generation.responses(PROMPTS))
    center.load_into_model()
    return {
        "side by side": [found[number] for number in group],
        "alone": alone,
        "base": generation.responses(PROMPTS),
        "digest": center.digest(),
    }


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), list(map(Path, sys.argv[3:])))
