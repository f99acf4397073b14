"""Tiny models on engine=vllm, on one rank beside engine=fsdp: REPLICAS TENSOR MODEL..."""

# ruff: noqa: E402 (threads are set before torch is imported)

import sys
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from shardes.distributed import environment

environment.prepare()

import torch
from transformers import AutoTokenizer, GenerationConfig, MambaConfig, MambaForCausalLM

from launch import report
from models import save_model
from shardes.config.schema import Attention, Config, DType, EngineName, ModelConfig, Restore
from shardes.distributed.world import World, form_replica, join_job
from shardes.engines import build, open_model
from shardes.engines.linear import linear
from shardes.engines.vllm import VLLMEngine, check_platform
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
LAYER = "model.layers.0.mlp.down_proj"


class Halt(Exception):
    pass


def main(replicas: int, tensor: int, directories: list[Path]) -> None:
    job = join_job(60)
    world = form_replica(job, replicas, 1, tensor, 60)
    report(
        {"rank": job.rank}
        | {directory.name: results(directory, world, tensor) for directory in directories}
    )


def results(directory: Path, world: World, tensor: int) -> dict:
    """What a model gives on vLLM and, on one rank, on fsdp."""
    config = Config(EngineName.vllm, ModelConfig(str(directory), DType.float32))
    config.sharding.tensor = tensor
    config.vllm.enforce_eager, config.vllm.cache_size = True, 0.05
    tokenizer = AutoTokenizer.from_pretrained(directory)
    files, module = open_model(directory, torch.float32)
    vllm = VLLMEngine(config, module, files, world)
    generation = GenerationConfig(eos_token_id=ENDS)
    plain = decoder(tokenizer, generation, max_new_tokens=NEW_TOKENS)
    asked = VLLMGeneration(vllm, plain)
    has_layer = LAYER in dict(vllm._model.named_modules())
    found: dict = {"blind": blind(vllm, asked)} if has_layer else {}
    asked.check_writes()
    engines: list = [("vllm", vllm, partial(VLLMGeneration, vllm))]
    if world.job.size == 1:
        config.engine = EngineName.fsdp
        # Of transformers' attention only this one caps logits as Gemma 2 does.
        eager = open_model(directory, torch.float32, attention=Attention.eager)[1]
        fsdp = build(config, eager, world)
        engines.append(("fsdp", fsdp, partial(ModuleGeneration, world, fsdp)))
    for name, engine, answers in engines:
        found[name] = examine(engine, answers(plain), files, world)
    stop = tokenizer.decode(found["vllm"]["tokens"][0][3:5])
    stopping = decoder(tokenizer, generation, max_new_tokens=NEW_TOKENS, stop=[stop])
    for name, _, answers in engines:
        found[name]["stopped"] = answers(stopping).responses(PROMPTS)
    found |= of_vllm(vllm, asked)
    if directory.name == "llama" and world.job.size == 1:
        found["refused"] = refused(directory, world, config)
    return found


def refused(directory: Path, world: World, config: Config) -> list[str]:
    """What is said of caches that are too small, of another device, and of Mamba's weights."""
    state_space = MambaForCausalLM(MambaConfig(vocab_size=263, hidden_size=32, num_hidden_layers=1))
    other = save_model(directory.with_name("mamba"), state_space)
    config.engine, messages = EngineName.vllm, []

    def build(path: Path, cache_size: float) -> None:
        config.vllm.cache_size = cache_size
        files, module = open_model(path, torch.float32)
        VLLMEngine(config, module, files, world)

    for mistake in (
        lambda: build(directory, 1e-6),
        lambda: build(directory, 5e-4),
        lambda: build(other, 0.05),
        lambda: check_platform(torch.device("cuda")),
    ):
        try:
            mistake()
        except ConfigError as error:
            messages.append(str(error))
    return messages


def examine(engine, answers, files, world) -> dict:
    """What both engines must give alike."""
    center = open_center(Restore.copy, engine.shards, world, files)
    results = {"base": center.digest(), "names": center.names}
    center.load_into_model()
    live = whole_parameters(engine)
    before = [values.clone() for values in live]
    results["tokens"] = answers.responses(PROMPTS)
    with center.perturbed(MEMBER):
        results["member tokens"] = answers.responses(PROMPTS)
    center.load_into_model()
    results["restored"] = all(map(torch.equal, live, before))
    results["tokens again"] = answers.responses(PROMPTS)
    results["log_probs"] = answers.log_probs(PROMPTS, results["tokens"])
    center.update(Update(member_seeds(5, 0, 3), [0.1, -0.2, 0.3]))
    results["updated"] = center.digest()
    results["updated tokens"] = answers.responses(PROMPTS)
    results["numel"] = sum(shard.numel for shard in engine.shards if shard.counted)
    return results


def whole_parameters(engine) -> list[torch.Tensor]:
    """What the shards lie in: of vLLM its parameters, with their padding."""
    if isinstance(engine, VLLMEngine):
        return [param.data for param in engine._model.parameters()]
    return [shard.tensor for shard in engine.shards]


def blind(engine: VLLMEngine, answers: VLLMGeneration) -> str:
    """What `check_writes` says of a layer that computes with a copy of its weight."""
    layer = engine._model.get_submodule(LAYER)
    copy = layer.weight.detach().clone().normal_()
    own, layer.cpu_linear = layer.cpu_linear, lambda x, weight, bias: linear(x, copy, bias)
    try:
        answers.check_writes()
    except ConfigError as error:
        return str(error)
    finally:
        layer.cpu_linear = own
    return ""


def of_vllm(engine: VLLMEngine, answers: VLLMGeneration) -> dict:
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
    from vllm.usage.usage_lib import is_usage_stats_enabled

    results = {
        "tells": is_usage_stats_enabled(),
        "sampled": sampled,
        "sampled again": answers.responses(PROMPTS, SEEDS),
        "halted": halted and answers.responses(PROMPTS) == tokens,
    }
    engine.shards[0].values.fill_(float("nan"))
    return results | {"invalid": answers.responses(PROMPTS)}


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), list(map(Path, sys.argv[3:])))
