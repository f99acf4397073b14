"""A tiny model on engine=vllm beside engine=fsdp, in one process: MODEL OUT; started alone."""

# ruff: noqa: E402 (threads are set before torch is imported)

import json
import sys
from pathlib import Path

from shardes.distributed import environment

environment.prepare()

import torch
from transformers import AutoTokenizer, GenerationConfig

from shardes.config.schema import Config, DType, EngineName, ModelConfig, Restore
from shardes.distributed.world import form_replica, join_job
from shardes.engines import build, open_model
from shardes.engines.linear import linear
from shardes.engines.vllm import VLLMEngine
from shardes.errors import ConfigError
from shardes.es.center import open_center
from shardes.es.population import Member, member_seeds
from shardes.es.update import Update
from shardes.inference.engine_generation import ModuleGeneration
from shardes.inference.generation import decoder
from shardes.inference.vllm_generation import VLLMGeneration

PROMPTS = [[5, 6, 7, 8], [9, 10], [11, 12] * 140, [40, 41, 42]]  # one fills blocks of the cache
ENDS = [1, 2, 30, 31]
SEEDS = [1, 2, 2**64 - 1, 3]
MEMBER = Member(7, 0.05)
NEW_TOKENS = 24


class Halt(Exception):
    pass


def main(directory: Path, out: Path) -> None:
    world = form_replica(join_job(60), 1, 1, 1, 60)
    config = Config(EngineName.vllm, ModelConfig(str(directory), DType.float32))
    config.vllm.enforce_eager, config.vllm.cache_size = True, 0.05
    tokenizer = AutoTokenizer.from_pretrained(directory)
    files, module = open_model(directory, torch.float32)
    vllm = VLLMEngine(config, module, files, world)
    generation = GenerationConfig(eos_token_id=ENDS)
    plain = decoder(tokenizer, generation, max_new_tokens=NEW_TOKENS)
    asked = VLLMGeneration(vllm, plain)
    results: dict = {"blind": blind(vllm, asked)}
    asked.check_writes()
    config.engine = EngineName.fsdp
    fsdp = build(config, open_model(directory, torch.float32)[1], world)
    for name, engine, answers in (
        ("fsdp", fsdp, ModuleGeneration(world, fsdp, plain)),
        ("vllm", vllm, asked),
    ):
        results[name] = examine(engine, answers, files, world)
    stop = tokenizer.decode(results["fsdp"]["tokens"][0][3:5])
    stopping = decoder(tokenizer, generation, max_new_tokens=NEW_TOKENS, stop=[stop])
    results["fsdp"]["stopped"] = ModuleGeneration(world, fsdp, stopping).responses(PROMPTS)
    results["vllm"]["stopped"] = VLLMGeneration(vllm, stopping).responses(PROMPTS)
    results |= alone(vllm, asked)
    out.write_text(json.dumps(results))


def examine(engine, answers, files, world) -> dict:
    """What both engines must give alike."""
    center = open_center(Restore.copy, engine.shards, world, files)
    results = {"base": center.digest(), "names": center.names}
    center.load_into_model()
    before = [shard.values.clone() for shard in engine.shards]
    results["tokens"] = answers.responses(PROMPTS)
    with center.perturbed(MEMBER):
        results["member tokens"] = answers.responses(PROMPTS)
    center.load_into_model()
    results["restored"] = all(
        torch.equal(shard.values, values)
        for shard, values in zip(engine.shards, before, strict=True)
    )
    results["tokens again"] = answers.responses(PROMPTS)
    results["log_probs"] = answers.log_probs(PROMPTS, results["tokens"])
    center.update(Update(member_seeds(5, 0, 3), [0.1, -0.2, 0.3]))
    results["updated"] = center.digest()
    results["updated tokens"] = answers.responses(PROMPTS)
    return results


def blind(engine: VLLMEngine, answers: VLLMGeneration) -> str:
    """What `check_writes` says of a layer that computes with a copy of its weight."""
    layer = engine._model.model.layers[0].mlp.down_proj
    copy = layer.weight.detach().clone().normal_()
    own, layer.cpu_linear = layer.cpu_linear, lambda x, weight, bias: linear(x, copy, bias)
    try:
        answers.check_writes()
    except ConfigError as error:
        return str(error)
    finally:
        layer.cpu_linear = own
    return ""


def alone(engine: VLLMEngine, answers: VLLMGeneration) -> dict:
    """Seeds, a stop in the middle, and weights that give NaN."""
    tokens, polls = answers.responses(PROMPTS), 0
    sampled = answers.responses(PROMPTS, SEEDS)

    def halt() -> None:
        nonlocal polls
        polls += 1
        if polls == 3:
            raise Halt

    try:
        answers.responses(PROMPTS, poll=halt)
        halted = False
    except Halt:
        halted = polls == 3 and not engine.llm.has_unfinished_requests()
    results = {
        "sampled alike": sampled == answers.responses(PROMPTS, SEEDS) and sampled != tokens,
        "halted": halted and answers.responses(PROMPTS) == tokens,
    }
    engine.shards[0].values.fill_(float("nan"))
    return results | {"invalid": answers.responses(PROMPTS)}


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
