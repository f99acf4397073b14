"""Runs models on one engine and layout: ENGINE REPLICAS SHARD TENSOR EVERY MODEL_DIRECTORY ...;
started by the zygote. EVERY: 1, or 2 for every second variant.
"""

from pathlib import Path

import torch
import torch.distributed as dist
from transformers import AutoTokenizer, GenerationConfig

from launch import report
from models import paper_coefficients
from shardes.clock import Clock
from shardes.config.schema import Decode, Gather, Offload, Restore, ShardingConfig
from shardes.distributed.world import form_replica, join_job
from shardes.engines import empty_model
from shardes.engines.deepspeed import DeepSpeedEngine
from shardes.engines.fsdp import FSDPEngine
from shardes.errors import ConfigError
from shardes.es.center import open_center
from shardes.es.population import Member, member_seeds
from shardes.es.side_by_side import SideBySide
from shardes.es.update import Update
from shardes.inference.engine_generation import ModuleGeneration
from shardes.inference.generation import decoder
from shardes.inference.sampler import Sampler
from shardes.sharding.digest import digest, format_digest
from shardes.sharding.weight_files import WeightFiles

PROMPTS = [list(range(40, 40 + n)) for n in (3, 11, 5, 1, 7)]
RESPONSES = [[30 + n] * n for n in (4, 1, 9, 2, 6)]
SEEDS = [2**63 + 5, 1, 2, 3, 4]
ENDS = [*range(24), 256]  # many end-of-sequence tokens, so that responses differ in length
PROCESSORS = dict(repetition_penalty=1.3, no_repeat_ngram_size=3)
REWARDS = [[3.0, -1.0, 2.5, 0.0], [-4.0, -4.5, -1.0, -2.0], [10.0, 11.0, 9.0, 12.5]]
GROUP = [Member(7, 0.05), Member(8, 0.03), Member(7, -0.05)]  # two of one seed, as pairs are
RANK = 3  # of low-rank noise
VARIANTS = [
    (torch.float32, Gather.member, Offload.none),
    (torch.float32, Gather.layer, Offload.none),
    (torch.float32, Gather.layer, Offload.cpu),
    (torch.float32, Gather.member, Offload.cpu),
    (torch.bfloat16, Gather.member, Offload.none),
    (torch.float16, Gather.member, Offload.none),
]


def main(argv: list[str]) -> int:
    engine = {"deepspeed": DeepSpeedEngine, "fsdp": FSDPEngine}[argv[0]]
    replicas, shard, tensor = map(int, argv[1:4])
    job = join_job(60)
    world = form_replica(job, replicas, shard, tensor, 120)
    result = {"rank": job.rank}
    for directory in map(Path, argv[5:]):
        for dtype, gather, offload in VARIANTS[:: int(argv[4])]:
            if shard == 1 and (
                gather is Gather.layer or (engine is FSDPEngine and offload is Offload.cpu)
            ):
                continue
            sharding = ShardingConfig(shard=shard, tensor=tensor, gather=gather, offload=offload)
            name, precision = directory.name.rstrip("0123456789"), str(dtype).removeprefix("torch.")
            key = f"{name} {precision} {gather.value} {offload.value}"
            result[key] = examine(engine, directory, dtype, sharding, world)
    report(result)
    dist.barrier()
    return 0


def examine(kind, directory: Path, dtype: torch.dtype, sharding: ShardingConfig, world) -> dict:
    files, module = WeightFiles(directory), empty_model(directory, dtype)
    files.map_names(module)
    engine = kind(module, world, sharding)
    center = open_center(Restore.copy, engine.shards, world, files)
    generation = GenerationConfig(eos_token_id=ENDS)
    decode = decoder(AutoTokenizer.from_pretrained(directory), generation, max_new_tokens=24)
    sampler = Sampler(world, ModuleGeneration(world, engine, decode), decode.tokenizer)
    generation = GenerationConfig(eos_token_id=ENDS, **PROCESSORS)
    decode = decoder(decode.tokenizer, generation, max_new_tokens=24)
    processed = Sampler(world, ModuleGeneration(world, engine, decode), decode.tokenizer)
    generation = GenerationConfig(eos_token_id=ENDS)
    # A GPU captures neither hooks that gather nor the collectives of gloo.
    on_cpu, tensors = world.device.type == "cpu", world.mesh.shape[1]
    is_static = not engine.sync_forwards and (on_cpu or tensors == 1)
    mode = Decode.graph if is_static else Decode.eager
    decode = decoder(decode.tokenizer, generation, max_new_tokens=24, decode=mode)
    static = Sampler(world, ModuleGeneration(world, engine, decode), decode.tokenizer)
    center.load_into_model()
    results = {
        "base": center.digest(),
        "tokens": sampler.generate(PROMPTS),
        "processed tokens": processed.generate(PROMPTS),
        "sampled": sampler.generate(PROMPTS, SEEDS),
        "log_probs": sampler.log_probs(PROMPTS, RESPONSES),
        "numel": sum(s.numel for s in engine.shards if s.counted),
    }
    with center.perturbed(Member(7, 0.05)):
        results["member tokens"] = sampler.generate(PROMPTS)
        parts = (digest(s.name, s.regions, s.values) for s in engine.shards if s.counted)
        results["member weights"] = format_digest(world.sum_uint64(sum(parts) % 2**64))
        results["static member tokens"] = static.generate(PROMPTS)
    try:
        with center.perturbed(Member(8, 0.05)), engine.gathered():
            raise KeyError("a reward that raises")
    except KeyError:
        results["after a failure"] = center.digest()
        center.load_into_model()
        results["live again"] = all(
            torch.equal(s.values.cpu(), center.values(s).cpu().to(dtype)) for s in engine.shards
        )
        results["tokens again"] = sampler.generate(PROMPTS)
    digests = []
    for iteration, rewards in enumerate(REWARDS):
        seeds = member_seeds(5, iteration, len(rewards))
        center.update(Update(seeds, paper_coefficients(rewards, 0.05)))
        digests.append(center.digest())
    results["digests"] = digests
    results["distance"] = center.distance()
    low_rank = open_center(Restore.copy, engine.shards, world, files, rank=RANK)
    with low_rank.perturbed(Member(7, 0.05)):
        results["low-rank member tokens"] = sampler.generate(PROMPTS)
    low_rank.load_into_model()
    try:
        side_by_side = SideBySide(module, engine.shards, engine.device, RANK)
    except ConfigError as error:
        results["side by side"] = results["static side by side"] = str(error)
    else:
        with side_by_side.members(GROUP, Clock()):
            rows = [member for member in range(len(GROUP)) for _ in PROMPTS]
            for key, chosen in (("side by side", sampler), ("static side by side", static)):
                results[key] = chosen.generate(
                    PROMPTS * len(GROUP), members=rows, set_members=side_by_side.set_rows
                )
        results["alone again"] = sampler.generate(PROMPTS)
    seeds = member_seeds(5, 0, len(REWARDS[0]))
    low_rank.update(Update(seeds, paper_coefficients(REWARDS[0], 0.05), rank=RANK))
    results["low-rank digest"] = low_rank.digest()
    with engine.gathered() as module:
        results["gradients"] = sum(
            p.grad is not None or p.requires_grad for p in module.parameters()
        )
    if kind is DeepSpeedEngine:
        results["optimizer"] = [
            type(engine._runtime.optimizer).__name__,
            engine._runtime.basic_optimizer,
        ]
    for shard in engine.shards:
        shard.values.fill_(torch.nan)
    results["invalid tokens"] = sampler.generate(PROMPTS)
    return results
