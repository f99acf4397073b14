"""Writes checkpoints of other programs, on two ranks: foreign.py MODEL OUT_DIRECTORY

OUT/zero: a ZeRO-3 checkpoint of bfloat16 weights with float32 masters, after a step of Adam, with
one parameter frozen. OUT/zero.safetensors: its weights, gathered.
OUT/distributed: transformers' distributed save under FSDP.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import deepspeed
import torch
import torch.distributed as dist
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, DistributedConfig

from launch import report

FROZEN = "model.layers.1.mlp.up_proj.weight"


def zero(model: str, out: Path) -> None:
    module = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16)
    module.get_parameter(FROZEN).requires_grad_(False)
    engine, *_ = deepspeed.initialize(
        model=module,
        model_parameters=[param for param in module.parameters() if param.requires_grad],
        config={
            "train_micro_batch_size_per_gpu": 1,
            "bf16": {"enabled": True},
            "optimizer": {"type": "Adam", "params": {"lr": 0.01, "torch_adam": True}},
            "zero_optimization": {
                "stage": 3,
                "stage3_param_persistence_threshold": 0,
                "sub_group_size": 3000,
            },
        },
    )
    ids = torch.arange(8)[None]
    engine.backward(engine(input_ids=ids, labels=ids).loss)
    engine.step()
    engine.save_checkpoint(str(out / "zero"))
    whole = {}
    for name, param in engine.module.named_parameters():
        values = deepspeed.utils.safe_get_full_fp32_param(param) if param.requires_grad else None
        if values is None:
            with deepspeed.zero.GatheredParameters([param]):
                values = param.detach().float().clone()
        whole[name] = values.contiguous()
    if dist.get_rank() == 0:
        save_file(whole, out / "zero.safetensors")
    dist.barrier()


def distributed(model: str, out: Path) -> None:
    module = AutoModelForCausalLM.from_pretrained(
        model, distributed_config=DistributedConfig(fsdp_size=2)
    )
    module.save_pretrained(out / "distributed", distributed_checkpoint=True)
    dist.barrier()


if __name__ == "__main__":
    deepspeed.init_distributed("gloo")
    distributed(sys.argv[1], Path(sys.argv[2]))
    zero(sys.argv[1], Path(sys.argv[2]))
    report({"rank": dist.get_rank()})
    dist.barrier()
