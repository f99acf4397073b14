"""Runs tiny models of many architectures on one engine and layout: ENGINE SHARD TENSOR MODELS
OUT NAME ...; started by the zygote. A model is in MODELS/base/NAME, its export in OUT/export/NAME.

A model that is refused or that fails does not end the run: its result says why.
"""

import signal
import traceback
from pathlib import Path

import torch
import torch.distributed as dist
from transformers import AutoTokenizer, GenerationConfig

from launch import report
from models import paper_coefficients
from shardes.config.schema import Config, EngineName, ModelConfig, Restore, ShardingConfig
from shardes.distributed.world import World, form_replica, join_job
from shardes.engines import build, check_model, open_model
from shardes.errors import ConfigError
from shardes.es.center import Center, open_center
from shardes.es.population import Member, member_seeds
from shardes.es.update import Update
from shardes.inference.engine_generation import ModuleGeneration
from shardes.inference.generation import decoder
from shardes.inference.limits import check_decoding
from shardes.inference.sampler import Sampler
from shardes.sharding.weight_files import WeightFiles
from shardes.storage.checkpoint import Checkpoint, Manifest

PROMPTS = [list(range(40, 40 + n)) for n in (3, 11, 5)]
RESPONSES = [[30 + n] * n for n in (4, 1, 9)]
NEW_TOKENS = 8
MEMBER = Member(7, 0.05)
REWARDS, ALPHA = [3.0, -1.0, 2.5, 0.0], 0.05
SECONDS = 120  # for one model


def main(argv: list[str]) -> int:
    engine, (shard, tensor), (models, out) = EngineName(argv[0]), map(int, argv[1:3]), argv[3:5]
    job = join_job(60)
    world = form_replica(job, 1, shard, tensor, SECONDS)
    result: dict = {"rank": job.rank}
    signal.signal(signal.SIGALRM, give_up)
    for name in argv[5:]:
        config = Config(
            engine=engine,
            model=ModelConfig(path=f"{models}/base/{name}"),
            sharding=ShardingConfig(shard=shard, tensor=tensor),
        )
        signal.alarm(SECONDS)
        try:
            result[name] = examine(config, world, Path(out, "export", name))
        except ConfigError as error:
            result[name] = {"refused": str(error)}
        except Exception as error:
            traceback.print_exc()
            result[name] = {"error": repr(error)}
        signal.alarm(0)
        report(result)
    dist.barrier()
    return 0


def give_up(*_) -> None:
    raise TimeoutError(f"not done after {SECONDS} s")


def examine(config: Config, world: World, export: Path) -> dict:
    """What the model gives on this layout; the updated center is exported."""
    directory = Path(config.model.path)
    files, module = open_model(directory, torch.float32)
    check_model(config, module)
    check_decoding(config.model.path, module)
    engine = build(config, module, world)
    center = open_center(Restore.copy, engine.shards, world, files)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    decode = decoder(
        tokenizer, GenerationConfig.from_pretrained(directory), max_new_tokens=NEW_TOKENS
    )
    sampler = Sampler(world, ModuleGeneration(world, engine, decode), tokenizer)
    center.load_into_model()
    result = {
        "base": center.digest(),
        "tokens": sampler.generate(PROMPTS),
        "log_probs": sampler.log_probs(PROMPTS, RESPONSES),
    }
    with center.perturbed(MEMBER):
        result["member tokens"] = sampler.generate(PROMPTS)
    seeds = member_seeds(5, 0, len(REWARDS))
    center.update(Update(seeds, paper_coefficients(REWARDS, ALPHA)))
    result["digest"] = center.digest()
    write(center, files, export)
    return result


def write(center: Center, files: WeightFiles, export: Path) -> None:
    """Write a checkpoint of the center, each rank its own regions."""
    checkpoint = Checkpoint(export, files, center.names, torch.float32, "5GB")
    if dist.get_rank() == 0:
        checkpoint.create()
    dist.barrier()
    for part in center.parts():
        checkpoint.write(*part)
    checkpoint.flush()
    dist.barrier()
    if dist.get_rank() == 0:
        shas = {file: checkpoint.read_back(file)[0] for file in checkpoint.files}
        checkpoint.publish(Manifest(1, "", shas))
